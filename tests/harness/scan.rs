//! Cases of scan: random keys in random pages, run on a device and by the reference.

use crate::pages::{DevicePages, Layout, Pages, RowFormat};
use crate::{Lab, once_a_case, reference_dtype};
use kvlar::{
    Buffer, Dtype, Format, Reduction, SCORE_BINS, ScanArgs, ScanPlan, ScanShape, Schedule, Strides, WorkList, Workspace,
};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{ReduceInput, ScanInput, reduce, scan};

/// A case: all that decides the input is here.
#[derive(Clone, Debug)]
pub struct ScanCase {
    pub dtype: Dtype,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub keys: RowFormat,
    pub layout: Layout,
    pub seqs: usize,
    /// `[B]` or `[B, Hk]`.
    pub lengths: Vec<usize>,
    pub capacity: usize,
    pub scores: Option<Reduction>,
    pub logits: bool,
    pub lse: bool,
    pub histogram: bool,
    pub fill: bool,
    pub schedule: Schedule,
    /// q as part of rows of twice as many heads.
    pub strided: bool,
    /// Each head's third key holds a NaN.
    pub nan_key: bool,
    /// The first sequence's second page does not exist.
    pub bad_page: bool,
    /// Each key holds one number.
    pub constant: bool,
    /// Size of the queries: logits are about as large.
    pub q_size: f32,
    /// Size of the keys.
    pub k_size: f32,
    pub seed: u64,
}

impl ScanCase {
    /// Keys in pages of 16, every output, the largest logit of a group; random codebooks where the format has any.
    pub fn new(keys: impl Into<Format>, heads: (usize, usize), head_dim: usize, lengths: &[usize]) -> Self {
        Self {
            dtype: Dtype::Bf16,
            q_heads: heads.0,
            kv_heads: heads.1,
            head_dim,
            keys: RowFormat::from(keys).with_codebooks(heads.1, head_dim),
            layout: Layout::Hnd(16),
            seqs: lengths.len(),
            lengths: lengths.to_vec(),
            capacity: lengths.iter().copied().max().unwrap_or(0).max(1),
            scores: Some(Reduction::MaxLogit),
            logits: true,
            lse: true,
            histogram: true,
            fill: true,
            schedule: Schedule::Balanced,
            strided: false,
            nan_key: false,
            bad_page: false,
            constant: false,
            q_size: 1.0,
            k_size: 1.0,
            seed: 1,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn shape(&self) -> ScanShape {
        let heads = (self.q_heads, self.kv_heads);
        ScanShape {
            scores: self.scores,
            logits: self.logits,
            histogram: self.histogram,
            fill: self.fill,
            schedule: self.schedule,
            ..ScanShape::new(self.dtype, self.seqs, heads, self.head_dim, self.keys.format, self.capacity)
        }
    }
}

/// Everything of a case, on the host.
#[derive(Clone, Debug)]
pub struct ScanData {
    pub case: ScanCase,
    /// `[B, Hq, d]`.
    pub q: Vec<f32>,
    /// `[B, Hk, T, d]`; NaN beyond a length.
    pub k: Vec<f32>,
}

/// Results; what was not asked for is empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Scanned {
    pub scores: Vec<f32>,
    pub logits: Vec<f32>,
    pub lse: Vec<f32>,
    pub histogram: Vec<u32>,
}

impl ScanData {
    pub fn new(case: &ScanCase) -> Self {
        let mut rng = Rng::new(case.seed);
        let (c, d) = (case, case.head_dim);
        let q = reference_dtype(c.dtype).round_all(&rng.normals(c.seqs * c.q_heads * d, c.q_size));
        let mut data = Self { case: c.clone(), q, k: vec![f32::NAN; c.seqs * c.kv_heads * c.capacity * d] };
        for head in 0..c.seqs * c.kv_heads {
            for row in 0..data.length(head) {
                let mut key = rng.normals(d, c.k_size);
                if c.constant {
                    key = vec![key[0]; d];
                }
                if c.nan_key && row == 2 {
                    key[d / 3] = f32::NAN;
                }
                data.k[(head * c.capacity + row) * d..][..d].copy_from_slice(&key);
            }
        }
        data
    }

    /// Rows of (sequence, kv head) number `head`.
    pub fn length(&self, head: usize) -> usize {
        let c = &self.case;
        c.lengths[if c.lengths.len() == c.seqs { head / c.kv_heads } else { head }]
    }

    /// By the reference, from dense keys.
    pub fn expected(&self) -> Scanned {
        let c = &self.case;
        let lengths: Vec<i32> = c.lengths.iter().map(|&n| n as i32).collect();
        // Dense rows are rounded to their own type, as the store does.
        let scanned = scan(&ScanInput {
            seqs: c.seqs,
            q_heads: c.q_heads,
            kv_heads: c.kv_heads,
            rows: c.capacity,
            head_dim: c.head_dim,
            q: &self.q,
            k: &self.k,
            keys: c.keys.storage(c.head_dim),
            lengths: Some(&lengths),
            scale: None,
        })
        .expect("a valid case");
        let scores = c.scores.map_or(Vec::new(), |method| {
            let input = ReduceInput {
                seqs: c.seqs,
                q_heads: c.q_heads,
                kv_heads: c.kv_heads,
                rows: c.capacity,
                logits: &scanned.logits,
                lse: &scanned.lse,
                method,
            };
            reduce(&input).expect("a valid case")
        });
        Scanned { scores, logits: scanned.logits, lse: scanned.lse, histogram: Vec::new() }
    }

    pub fn tolerance(&self) -> Tolerance {
        let logit = f64::from(self.case.q_size) * f64::from(self.case.k_size);
        Tolerance::scan(self.case.keys.format.codec.reference(), logit)
    }
}

/// A case on a device, ready to launch any number of times.
#[derive(Debug)]
pub struct ScanRun<'a> {
    lab: &'a Lab,
    pub plan: ScanPlan,
    data: ScanData,
    q: Buffer,
    pages: Pages,
    rows: DevicePages,
    keys: Buffer,
    tables: Option<Buffer>,
    pub outputs: [Option<Buffer>; 4],
    pub work: WorkList,
    pub workspace: Workspace,
}

impl<'a> ScanRun<'a> {
    pub fn new(lab: &'a Lab, data: &ScanData) -> Self {
        let (c, d) = (&data.case, data.case.head_dim);
        let plan = c.shape().plan(&lab.device).expect("a plan");
        let mut pages = Pages::new(&mut Rng::new(!c.seed), c.layout, c.seqs, c.kv_heads, c.capacity, &c.lengths);
        // Positions are none of a scan's business: where there are any, they are wrong.
        pages = pages.with_positions(|_, _, row| -(row as i32));
        let mut keys = vec![0xffu8; pages.pool_bytes(&c.keys, d)];
        for head in 0..c.seqs * c.kv_heads {
            let rows = &data.k[head * c.capacity * d..][..data.length(head) * d];
            pages.store_all(&mut keys, (head / c.kv_heads, head % c.kv_heads), rows, d, &c.keys);
        }
        let q: Vec<f32> = if c.strided {
            data.q.chunks(d).flat_map(|row| [row.to_vec(), vec![f32::NAN; d]].concat()).collect()
        } else {
            data.q.clone()
        };
        if c.bad_page {
            pages.table[1] = i32::MAX;
        }
        let (heads, queries) = (c.seqs * c.kv_heads, c.seqs * c.q_heads);
        let output = |wanted: bool, elements: usize| wanted.then(|| lab.poisoned(4 * elements));
        Self {
            lab,
            plan,
            q: lab.upload_as(&q, c.dtype),
            rows: DevicePages::upload(lab, &pages),
            pages,
            keys: lab.upload(&keys),
            tables: c.keys.upload(lab),
            outputs: [
                output(c.scores.is_some(), heads * c.capacity),
                output(c.logits, queries * c.capacity),
                output(c.lse, queries),
                output(c.histogram, heads * SCORE_BINS),
            ],
            work: plan.work_list(&lab.device).expect("a work list"),
            workspace: Workspace::new(&lab.device, plan.workspace()).expect("a workspace"),
            data: data.clone(),
        }
    }

    /// Calls `f` with the arguments and what a launch needs besides.
    pub fn with_args<R>(&mut self, f: impl FnOnce(&ScanPlan, &mut ScanArgs<'_>, &mut WorkList, &mut Workspace) -> R) -> R {
        let (c, d) = (&self.data.case, self.data.case.head_dim);
        let [scores, logits, lse, histogram] = &mut self.outputs;
        let mut args = ScanArgs {
            q: self.q.view(),
            q_strides: c.strided.then_some(Strides { seq: 2 * c.q_heads * d, head: 2 * d, row: d }),
            rows: self.rows.rows(),
            keys: self.pages.pool(self.keys.view(), &c.keys, d),
            tables: self.tables.as_ref().map(Buffer::view),
            scores: scores.as_mut().map(Buffer::view_mut),
            logits: logits.as_mut().map(Buffer::view_mut),
            lse: lse.as_mut().map(Buffer::view_mut),
            histogram: histogram.as_mut().map(Buffer::view_mut),
        };
        f(&self.plan, &mut args, &mut self.work, &mut self.workspace)
    }

    /// Enqueues the schedule and the launches.
    pub fn enqueue(&mut self) {
        let lab = self.lab;
        self.with_args(|plan, args, work, workspace| {
            plan.schedule(&lab.stream, args, work, workspace).expect("a schedule");
            plan.launch(&lab.stream, args, work, workspace).expect("a launch");
        });
    }

    /// The result so far.
    pub fn result(&self) -> Scanned {
        let [scores, logits, lse, histogram] = &self.outputs;
        let floats = |x: &Option<Buffer>| x.as_ref().map_or(Vec::new(), |x| self.lab.download(x));
        Scanned {
            scores: floats(scores),
            logits: floats(logits),
            lse: floats(lse),
            histogram: histogram.as_ref().map_or(Vec::new(), |x| self.lab.download(x)),
        }
    }

    /// Makes the outputs NaN again.
    pub fn poison(&mut self) {
        for buffer in self.outputs.iter_mut().flatten() {
            let all = 0..buffer.len();
            self.lab.stream.fill(buffer, all, 0xff).expect("a fill");
        }
    }

    /// Everything that launches must leave zeroed.
    pub fn counters(&self) -> Vec<u32> {
        self.lab.counters(&self.workspace, self.plan.workspace())
    }

    /// Replaces the lengths on the device.
    pub fn set_lengths(&mut self, lengths: &[i32]) {
        self.lab.stream.upload(&mut self.rows.lengths, 0, bytemuck::cast_slice(lengths)).expect("upload");
    }
}

/// A score's bin, from the order that selection has: a plain reading of `SCORE_BINS`.
pub fn bin_of(x: f32) -> usize {
    let bits = if x == 0.0 { 0 } else { x.to_bits() };
    let key = if x.is_nan() {
        0
    } else if bits >> 31 == 1 {
        !bits
    } else {
        bits | 0x8000_0000
    };
    (key >> 21) as usize
}

/// Runs a case once.
pub fn run(lab: &Lab, data: &ScanData) -> Scanned {
    let mut run = ScanRun::new(lab, data);
    run.enqueue();
    run.result()
}

/// Runs a case and compares with the reference; the histogram must count the scores that were written. The text names the case.
pub fn check(lab: &Lab, case: &ScanCase) -> Result<(), String> {
    let made = once_a_case(case, || {
        let data = ScanData::new(case);
        let expected = data.expected();
        (data, expected)
    });
    let (data, expected) = &*made;
    let mut run = ScanRun::new(lab, data);
    run.enqueue();
    let (actual, c) = (run.result(), case);
    let named = |what: &str, e: String| format!("{what}: {e}\n{case:?}");
    // Rows beyond a length: left as they were.
    let unwritten = |heads: usize, values: &[f32]| {
        let mut values = values.to_vec();
        if !c.fill {
            for (i, row) in values.chunks_mut(c.capacity).enumerate() {
                row[data.length(i / (heads / c.kv_heads))..].fill(f32::NAN);
            }
        }
        values
    };
    for (what, wanted, heads, actual, expected) in [
        ("scores", c.scores.is_some(), c.kv_heads, &actual.scores, &expected.scores),
        ("logits", c.logits, c.q_heads, &actual.logits, &expected.logits),
        ("lse", c.lse, 0, &actual.lse, &expected.lse),
    ] {
        if wanted {
            let expected = if heads > 0 { unwritten(heads, expected) } else { expected.clone() };
            compare(actual, &expected, data.tolerance()).map_err(|e| named(what, e.to_string()))?;
        }
    }
    if c.histogram {
        let mut counts = vec![0u32; c.seqs * c.kv_heads * SCORE_BINS];
        for (head, row) in actual.scores.chunks(c.capacity).enumerate() {
            row[..data.length(head)].iter().for_each(|&x| counts[head * SCORE_BINS + bin_of(x)] += 1);
        }
        if let Some(i) = (0..counts.len()).find(|&i| counts[i] != actual.histogram[i]) {
            return Err(named("histogram", format!("bin {i} has {} of {} scores", actual.histogram[i], counts[i])));
        }
    }
    if run.counters().iter().any(|&x| x != 0) {
        return Err(named("workspace", "counters were left behind".into()));
    }
    let status = run.workspace.status(&lab.stream).expect("a status");
    if status.is_clean() { Ok(()) } else { Err(named("status", format!("{status:?}"))) }
}
