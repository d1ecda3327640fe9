//! Cases of scores by attention: random keys in random pages, run on a device and by the reference.

use crate::pages::{DevicePages, Layout, Pages, RowFormat};
use crate::{Lab, once_a_case, reference_dtype};
use kvlar::{Buffer, Codec, Dtype, Pooling, ScoreArgs, ScorePlan, ScoreReduction, ScoreShape, ScoredRows, Strides, Workspace};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{
    ColumnInput, HeadReduction, Pool, RepeatInput, RowReduction, WindowColumns, WindowInput, score_column, score_repeat,
    score_window,
};

/// A case: all that decides the input is here.
#[derive(Clone, Debug)]
pub struct ScoreCase {
    pub shape: ScoreShape,
    pub layout: Layout,
    /// `[B]` or `[B, Hk]`.
    pub lengths: Vec<usize>,
    /// (sink rows, first row of the chunk, its rows) of each sequence.
    pub spans: Vec<[i32; 3]>,
    /// Whether the lse is an output.
    pub lse: bool,
    /// `[B]` or `[B, Hk]`, where scores are added to others.
    pub previous: Option<Vec<i32>>,
    /// Scores between rows beyond the columns.
    pub gap: usize,
    /// q as `[B, W, 2 Hq, d]`, of which every other head is NaN.
    pub strided: bool,
    /// Rows of each head whose key holds this in one dimension.
    pub odd_keys: Vec<(usize, f32)>,
    /// A given lse has −∞, +∞ and NaN in it.
    pub odd_lse: bool,
    /// The first sequence's second page does not exist.
    pub bad_page: bool,
    pub q_size: f32,
    pub k_size: f32,
    pub seed: u64,
}

impl ScoreCase {
    pub fn new(shape: ScoreShape, lengths: &[usize]) -> Self {
        Self {
            shape,
            layout: Layout::Hnd(16),
            lengths: lengths.to_vec(),
            spans: Vec::new(),
            lse: false,
            previous: None,
            gap: 0,
            strided: false,
            odd_keys: Vec::new(),
            odd_lse: false,
            bad_page: false,
            q_size: 1.0,
            k_size: 1.0,
            seed: 1,
        }
    }

    /// bf16; the capacity is the largest length, or the window.
    pub fn window(heads: (usize, usize), window: usize, dim: usize, lengths: &[usize]) -> Self {
        let rows = lengths.iter().copied().max().unwrap_or(0).max(window);
        Self::new(ScoreShape::window(Dtype::Bf16, lengths.len(), heads, window, rows, dim), lengths)
    }

    pub fn column(heads: (usize, usize), dim: usize, lengths: &[usize]) -> Self {
        let rows = lengths.iter().copied().max().unwrap_or(0).max(1);
        Self::new(ScoreShape::column(Dtype::Bf16, lengths.len(), heads, rows, dim), lengths)
    }

    /// A sequence for each span; all have `rows` rows, the queries' own among them.
    pub fn repeat(heads: (usize, usize), queries: usize, dim: usize, rows: usize, spans: &[[i32; 3]]) -> Self {
        let chunk = spans.iter().map(|s| s[2] as usize).max().unwrap_or(0);
        let shape = ScoreShape::repeat(Dtype::Bf16, spans.len(), heads, queries, chunk, rows, dim);
        Self { spans: spans.to_vec(), ..Self::new(shape, &vec![rows; spans.len()]) }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn heads(&self) -> usize {
        self.shape.seqs * self.shape.kv_heads
    }

    fn codec(&self) -> RowFormat {
        RowFormat::from(if self.shape.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 })
    }

    /// Rows of (sequence, kv head) number `head`.
    pub fn length(&self, head: usize) -> usize {
        let s = &self.shape;
        self.lengths[if self.lengths.len() == s.seqs { head / s.kv_heads } else { head }]
    }

    pub fn tolerance(&self) -> Tolerance {
        let s = &self.shape;
        let logit = f64::from(self.q_size) * f64::from(self.k_size) * f64::from(s.scale) * (s.head_dim as f64).sqrt();
        Tolerance::score(logit)
    }
}

/// Everything of a case, on the host.
#[derive(Clone, Debug)]
pub struct ScoreData {
    pub case: ScoreCase,
    /// `[B, Hq, W, d]`.
    pub q: Vec<f32>,
    /// `[B, Hk, T, d]`; NaN beyond a length.
    pub k: Vec<f32>,
    /// `[B, Hq, W]`, where it is given.
    pub lse: Option<Vec<f32>>,
    /// `[B, Hk, columns]`: scores that are there before the launch.
    pub before: Vec<f32>,
}

/// Results.
#[derive(Clone, Debug, PartialEq)]
pub struct Scored {
    /// `[B, Hk, columns]`.
    pub scores: Vec<f32>,
    /// `[B, Hq, W]`; empty where it is no output.
    pub lse: Vec<f32>,
}

impl ScoreData {
    pub fn new(case: &ScoreCase) -> Self {
        let (c, s) = (case, &case.shape);
        let (mut rng, d, dtype) = (Rng::new(c.seed), s.head_dim, reference_dtype(s.dtype));
        let q = dtype.round_all(&rng.normals(s.seqs * s.q_heads * s.queries * d, c.q_size));
        let mut k = vec![f32::NAN; c.heads() * s.rows * d];
        for head in 0..c.heads() {
            let n = c.length(head);
            k[head * s.rows * d..][..n * d].copy_from_slice(&dtype.round_all(&rng.normals(n * d, c.k_size)));
            for &(row, x) in c.odd_keys.iter().filter(|odd| odd.0 < n) {
                k[(head * s.rows + row) * d + d / 3] = x;
            }
        }
        let mut data = Self { case: c.clone(), q, k, lse: None, before: vec![f32::NAN; c.heads() * s.columns()] };
        if s.given_lse {
            let mut lse = data.expected_lse();
            // Any will do: that of other rows, say.
            lse.iter_mut().for_each(|x| *x += 0.25 * rng.normal());
            if c.odd_lse {
                let odd = [f32::NEG_INFINITY, f32::NAN, f32::INFINITY];
                lse.iter_mut().enumerate().for_each(|(i, x)| *x = if i % 5 < 3 { odd[i % 5] } else { *x });
            }
            data.lse = Some(lse);
        }
        if s.accumulate.is_some() {
            for (head, row) in data.before.chunks_mut(s.columns().max(1)).enumerate() {
                let known = c.known(head).min(row.len());
                row[..known].copy_from_slice(&rng.normals(known, 1.0));
            }
        }
        data
    }

    fn group(&self) -> usize {
        self.case.shape.q_heads / self.case.shape.kv_heads
    }

    fn keys(&self, head: usize) -> &[f32] {
        let s = &self.case.shape;
        &self.k[head * s.rows * s.head_dim..][..self.case.length(head) * s.head_dim]
    }

    /// Queries whose rows there are, and the row of query 0.
    fn live(&self, head: usize) -> (std::ops::Range<usize>, i64) {
        let (s, n) = (&self.case.shape, self.case.length(head) as i64);
        let first = if s.from_start { 0 } else { n - s.queries as i64 };
        ((-first).max(0) as usize..(n - first).min(s.queries as i64) as usize, first)
    }

    fn own_queries(&self, head: usize) -> Vec<f32> {
        let (s, (live, _)) = (&self.case.shape, self.live(head));
        let rows =
            |g| &self.q[(head * self.group() + g) * s.queries * s.head_dim..][live.start * s.head_dim..live.end * s.head_dim];
        (0..self.group()).flat_map(rows).copied().collect()
    }

    /// `[B, Hq, W]`, over the rows that a query sees.
    pub fn expected_lse(&self) -> Vec<f32> {
        let (c, s, d) = (&self.case, &self.case.shape, self.case.shape.head_dim);
        let mut all = vec![f32::NEG_INFINITY; s.seqs * s.q_heads * s.queries];
        for head in 0..c.heads() {
            let (live, first) = self.live(head);
            for g in 0..self.group() {
                for w in live.clone() {
                    let (at, index) = (first + w as i64, (head * self.group() + g) * s.queries + w);
                    let q = &self.q[index * d..][..d];
                    let sees = |t: i64| {
                        t <= at
                            && c.spans.get(head / s.kv_heads).is_none_or(|&[sink, start, len]| {
                                t < i64::from(sink) || (i64::from(start)..i64::from(start + len)).contains(&t) || t >= first
                            })
                    };
                    let seen = self.keys(head).chunks(d).zip(0..).filter(|x| sees(x.1));
                    let dot = |k: &[f32]| q.iter().zip(k).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
                    let logits: Vec<f64> = seen.map(|(k, _)| f64::from(s.scale) * dot(k)).collect();
                    let top = logits.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
                    let sum: f64 = logits.iter().map(|x| (x - top).exp()).sum();
                    all[index] = if top == f64::NEG_INFINITY { f32::NEG_INFINITY } else { (top + sum.ln()) as f32 };
                }
            }
        }
        all
    }

    /// New scores of a (sequence, kv head): of the rows that get one.
    fn scored(&self, head: usize) -> Vec<f32> {
        let (c, s, d, group) = (&self.case, &self.case.shape, self.case.shape.head_dim, self.group());
        let (n, (live, first)) = (c.length(head), self.live(head));
        let all = s.scored == ScoredRows::All;
        if n == 0 || (!all && first <= 0) {
            return Vec::new();
        }
        let (q, k, scale) = (self.own_queries(head), self.keys(head), Some(f64::from(s.scale)));
        if let ScoredRows::Chunk(_) = s.scored {
            let [sink, start, len] = c.spans[head / s.kv_heads].map(|x| x as usize);
            let (queries, rows) = (live.len(), n - live.len());
            let i = RepeatInput { q_heads: group, kv_heads: 1, queries, rows, head_dim: d, q: &q, k, sink, start, len, scale };
            return score_repeat(&i).expect("a valid case");
        }
        if s.from_start && s.over_heads == ScoreReduction::Mean && self.lse.is_none() && s.pool == Pooling::None {
            let i = ColumnInput { seqs: 1, q_heads: group, kv_heads: 1, rows: n, head_dim: d, q: &q, k, scale };
            return score_column(&i).expect("a valid case");
        }
        let own = |lse: &Vec<f32>| {
            let head = |g| lse[(head * group + g) * s.queries..][live.clone()].to_vec();
            (0..group).flat_map(head).collect::<Vec<f32>>()
        };
        let lse = self.lse.as_ref().map(own);
        score_window(&WindowInput {
            seqs: 1,
            q_heads: group,
            kv_heads: 1,
            window: live.len(),
            rows: n,
            head_dim: d,
            q: &q,
            k,
            lse: lse.as_deref(),
            scale,
            row_reduction: if s.over_rows == ScoreReduction::Mean { RowReduction::Mean } else { RowReduction::Sum },
            pool: match s.pool {
                Pooling::None => Pool::None,
                Pooling::Avg(kernel) => Pool::Avg(kernel),
                Pooling::Max(kernel) => Pool::Max(kernel),
            },
            head_reduction: match s.over_heads {
                ScoreReduction::Sum => HeadReduction::Sum,
                ScoreReduction::Mean => HeadReduction::Mean,
                ScoreReduction::Max => HeadReduction::Max,
            },
            columns: if all { WindowColumns::All } else { WindowColumns::Prefix },
        })
        .expect("a valid case")
    }

    /// By the reference; NaN where nothing is written.
    pub fn expected(&self) -> Scored {
        let (c, s) = (&self.case, &self.case.shape);
        let mut scores = self.before.clone();
        for (head, row) in scores.chunks_mut(s.columns().max(1)).enumerate() {
            let new = self.scored(head);
            for (t, (to, x)) in row.iter_mut().zip(&new).enumerate() {
                *to = match s.accumulate {
                    Some(decay) if t < c.known(head) => decay * *to + x,
                    _ => *x,
                };
            }
            if s.fill {
                row[new.len()..].fill(f32::NEG_INFINITY);
            }
        }
        let lse = if c.lse { self.expected_lse() } else { Vec::new() };
        Scored { scores, lse }
    }
}

impl ScoreCase {
    /// Rows of a head that have a score before the launch.
    fn known(&self, head: usize) -> usize {
        let s = &self.shape;
        match &self.previous {
            None => self.length(head).saturating_sub(s.queries),
            Some(p) => p[if p.len() == s.seqs { head / s.kv_heads } else { head }] as usize,
        }
    }
}

/// A case on a device, ready to launch any number of times.
#[derive(Debug)]
pub struct ScoreRun<'a> {
    lab: &'a Lab,
    pub plan: ScorePlan,
    data: ScoreData,
    q: Buffer,
    pages: Pages,
    rows: DevicePages,
    keys: Buffer,
    spans: Option<Buffer>,
    given: Option<Buffer>,
    previous: Option<Buffer>,
    pub scores: Buffer,
    pub lse: Option<Buffer>,
    pub workspace: Workspace,
}

impl<'a> ScoreRun<'a> {
    pub fn new(lab: &'a Lab, data: &ScoreData) -> Self {
        let (c, s, d) = (&data.case, &data.case.shape, data.case.shape.head_dim);
        let plan = s.plan(&lab.device).expect("a plan");
        let mut pages = Pages::new(&mut Rng::new(!c.seed), c.layout, s.seqs, s.kv_heads, s.rows, &c.lengths);
        // Positions are none of a score's business: where there are any, they are wrong.
        pages = pages.with_positions(|_, _, row| -(row as i32));
        let mut keys = vec![0xffu8; pages.pool_bytes(&c.codec(), d)];
        for head in 0..c.heads() {
            pages.store_all(&mut keys, (head / s.kv_heads, head % s.kv_heads), data.keys(head), d, &c.codec());
        }
        if c.bad_page {
            pages.table[1] = i32::MAX;
        }
        let q = if c.strided {
            let mut q = Vec::new();
            for b in 0..s.seqs {
                for w in 0..s.queries {
                    for h in 0..s.q_heads {
                        q.extend_from_slice(&data.q[((b * s.q_heads + h) * s.queries + w) * d..][..d]);
                        q.extend(vec![f32::NAN; d]);
                    }
                }
            }
            q
        } else {
            data.q.clone()
        };
        let mut run = Self {
            lab,
            plan,
            q: lab.upload_as(&q, s.dtype),
            rows: DevicePages::upload(lab, &pages),
            pages,
            keys: lab.upload(&keys),
            spans: (!c.spans.is_empty()).then(|| lab.upload(&c.spans.concat())),
            given: data.lse.as_ref().map(|lse| lab.upload(lse)),
            previous: c.previous.as_ref().map(|p| lab.upload(p)),
            scores: lab.device.alloc(0).expect("nothing"),
            lse: c.lse.then(|| lab.poisoned(4 * s.seqs * s.q_heads * s.queries)),
            workspace: Workspace::new(&lab.device, plan.workspace()).expect("a workspace"),
            data: data.clone(),
        };
        run.reset();
        run
    }

    /// Scores are what they were before the first launch.
    pub fn reset(&mut self) {
        let (c, columns) = (&self.data.case, self.data.case.shape.columns());
        let mut all: Vec<f32> = Vec::new();
        for head in 0..c.heads() {
            all.extend_from_slice(&self.data.before[head * columns..][..columns]);
            all.extend(vec![f32::NAN; c.gap]);
        }
        all.truncate(all.len().saturating_sub(c.gap)); // nothing behind the last
        self.scores = self.lab.upload(&all);
    }

    /// Calls `f` with the arguments and what a launch needs besides.
    pub fn with_args<R>(&mut self, f: impl FnOnce(&ScorePlan, &mut ScoreArgs<'_>, &mut Workspace) -> R) -> R {
        let (c, s, d) = (&self.data.case, &self.data.case.shape, self.data.case.shape.head_dim);
        let keys = self.pages.pool(self.keys.view(), &c.codec(), d);
        let strides = Strides { seq: 2 * s.queries * s.q_heads * d, head: 2 * d, row: 2 * s.q_heads * d };
        let mut args = ScoreArgs {
            q_strides: c.strided.then_some(strides),
            spans: self.spans.as_ref().map(Buffer::view),
            given_lse: self.given.as_ref().map(Buffer::view),
            lse: self.lse.as_mut().map(Buffer::view_mut),
            score_stride: (c.gap > 0).then_some(s.columns() + c.gap),
            previous: self.previous.as_ref().map(Buffer::view),
            previous_per_head: c.previous.as_ref().is_some_and(|p| p.len() != s.seqs),
            ..ScoreArgs::new(self.q.view(), self.rows.rows(), keys, self.scores.view_mut())
        };
        f(&self.plan, &mut args, &mut self.workspace)
    }

    pub fn enqueue(&mut self) {
        let lab = self.lab;
        self.with_args(|plan, args, workspace| plan.launch(&lab.stream, args, workspace).expect("a launch"));
    }

    /// The result so far. What lies between rows of scores must be as it was.
    pub fn result(&self) -> Scored {
        let (columns, gap) = (self.data.case.shape.columns(), self.data.case.gap);
        let mut scores: Vec<f32> = self.lab.download(&self.scores);
        if gap > 0 {
            let rows = scores.chunks(columns + gap);
            assert!(rows.clone().all(|row| row[columns.min(row.len())..].iter().all(|x| x.is_nan())), "written between rows");
            scores = rows.flat_map(|row| &row[..columns.min(row.len())]).copied().collect();
        }
        Scored { scores, lse: self.lse.as_ref().map_or(Vec::new(), |lse| self.lab.download(lse)) }
    }

    /// Everything that launches must leave zeroed.
    pub fn counters(&self) -> Vec<u32> {
        self.lab.counters(&self.workspace, self.plan.workspace())
    }

    /// Replaces the lengths on the device.
    pub fn set_lengths(&mut self, lengths: &[i32]) {
        self.lab.stream.upload(&mut self.rows.lengths, 0, bytemuck::cast_slice(lengths)).expect("upload");
    }

    /// Replaces the spans on the device.
    pub fn set_spans(&mut self, spans: &[[i32; 3]]) {
        let buffer = self.spans.as_mut().expect("spans");
        self.lab.stream.upload(buffer, 0, bytemuck::cast_slice(&spans.concat())).expect("upload");
    }
}

/// Runs a case once.
pub fn run(lab: &Lab, data: &ScoreData) -> Scored {
    let mut run = ScoreRun::new(lab, data);
    run.enqueue();
    run.result()
}

/// Compares a result with the reference's.
///
/// # Errors
/// What differs.
pub fn agrees(actual: &Scored, expected: &Scored, tolerance: Tolerance) -> Result<(), String> {
    compare(&actual.scores, &expected.scores, tolerance).map_err(|e| format!("scores: {e}"))?;
    let lse = Tolerance { absolute: 1e-4 + tolerance.absolute, ..tolerance };
    compare(&actual.lse, &expected.lse, lse).map_err(|e| format!("lse: {e}"))
}

/// Runs a case and compares with the reference. The text names the case.
///
/// # Errors
/// What differs.
pub fn check(lab: &Lab, case: &ScoreCase) -> Result<(), String> {
    let made = once_a_case(case, || {
        let data = ScoreData::new(case);
        let expected = data.expected();
        (data, expected)
    });
    let (data, expected) = &*made;
    let mut run = ScoreRun::new(lab, data);
    run.enqueue();
    agrees(&run.result(), expected, case.tolerance()).map_err(|e| format!("{e}\n{case:?}"))?;
    if run.counters().iter().any(|&x| x != 0) {
        return Err(format!("counters were left behind\n{case:?}"));
    }
    let status = run.workspace.status(&lab.stream).expect("a status");
    if status.is_clean() { Ok(()) } else { Err(format!("{status:?}\n{case:?}")) }
}
