//! Cases of attention: random data in random pages, run on a device and by the reference.

mod run;

pub use run::AttendRun;

use crate::heads::{self, HeadRows};
use crate::pages::{Layout, Pages, RowFormat};
use crate::{Lab, once_a_case, reference_dtype};
use kvlar::{AttendShape, Codec, Dtype, Format, Schedule, SegmentShape, Strides};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, Attended, hadamard};

/// A segment of a case.
#[derive(Clone, Debug)]
pub struct SegmentCase {
    pub keys: RowFormat,
    pub values: RowFormat,
    pub layout: Layout,
    pub capacity: usize,
    /// `[B]` or `[B, Hk]`.
    pub lengths: Vec<usize>,
    /// Store positions, with gaps.
    pub positions: bool,
}

impl SegmentCase {
    /// Keys and values of one format, in as many rows as the longest sequence has.
    pub fn new(format: impl Into<Format>, layout: Layout, lengths: &[usize]) -> Self {
        let rows = RowFormat::from(format);
        let capacity = lengths.iter().copied().max().unwrap_or(0).max(1);
        Self { keys: rows.clone(), values: rows, layout, capacity, lengths: lengths.to_vec(), positions: false }
    }

    /// Stores both so.
    pub fn set_formats(&mut self, keys: impl Into<Format>, values: impl Into<Format>) {
        (self.keys, self.values) = (keys.into().into(), values.into().into());
    }
}

/// A case: all that decides the input is here.
#[derive(Clone, Debug)]
pub struct AttendCase {
    pub dtype: Dtype,
    pub out_dtype: Dtype,
    pub seqs: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub query_rows: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub segments: Vec<SegmentCase>,
    pub softcap: f32,
    pub window: u32,
    pub sinks: bool,
    pub q_positions: bool,
    /// q and out as `[B, S, Hq, d]`.
    pub rows_first: bool,
    pub schedule: Schedule,
    /// Queries are rounded to 8 bits first.
    pub int8_queries: bool,
    /// The values of each head's last row hold an infinity.
    pub broken: bool,
    /// Keys (values) of each head's third row hold a NaN.
    pub nan_key: bool,
    pub nan_value: bool,
    /// Each key and value row holds one number.
    pub constant: bool,
    /// Size of the queries: logits are about as large.
    pub q_size: f32,
    pub key_size: f32,
    pub seed: u64,
}

impl AttendCase {
    /// One dense segment in pages of 16, one query row.
    pub fn new(dtype: Dtype, heads: (usize, usize), head_dim: usize, lengths: &[usize]) -> Self {
        let codec = Option::<Codec>::from(dtype).expect("a 16-bit type");
        Self {
            dtype,
            out_dtype: Dtype::F32,
            seqs: lengths.len(),
            q_heads: heads.0,
            kv_heads: heads.1,
            query_rows: 1,
            head_dim,
            value_dim: head_dim,
            segments: vec![SegmentCase::new(codec, Layout::Hnd(16), lengths)],
            softcap: 0.0,
            window: 0,
            sinks: false,
            q_positions: false,
            rows_first: false,
            schedule: Schedule::Balanced,
            int8_queries: false,
            broken: false,
            nan_key: false,
            nan_value: false,
            constant: false,
            q_size: 1.0,
            key_size: 1.0,
            seed: 1,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    pub fn shape(&self) -> AttendShape {
        let mut segments = [None; kvlar::MAX_SEGMENTS];
        for (to, s) in segments.iter_mut().zip(&self.segments) {
            *to = Some(SegmentShape { keys: s.keys.format, values: s.values.format, max_rows: s.capacity });
        }
        AttendShape {
            out_dtype: self.out_dtype,
            value_dim: self.value_dim,
            segments,
            softcap: self.softcap,
            window: self.window,
            schedule: self.schedule,
            int8_queries: self.int8_queries,
            ..AttendShape::new(
                self.dtype,
                self.seqs,
                (self.q_heads, self.kv_heads),
                self.query_rows,
                self.head_dim,
                SegmentShape::new(Codec::Bf16, 0),
            )
        }
    }

    fn strides(&self, dim: usize) -> Strides {
        if self.rows_first {
            Strides::rows_first(self.q_heads, self.query_rows, dim)
        } else {
            Strides::heads_first(self.q_heads, self.query_rows, dim)
        }
    }
}

/// Everything of a case, on the host.
#[derive(Clone, Debug)]
pub struct AttendData {
    pub case: AttendCase,
    pub q: Vec<f32>,
    sinks: Option<Vec<f32>>,
    q_positions: Option<Vec<i32>>,
    segments: Vec<SegmentData>,
}

#[derive(Clone, Debug)]
struct SegmentData {
    pages: Pages,
    keys: Vec<u8>,
    values: Vec<u8>,
    /// Decoded rows of each (sequence, head).
    rows: Vec<HeadData>,
}

#[derive(Clone, Debug, Default)]
struct HeadData {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl AttendData {
    pub fn new(case: &AttendCase) -> Self {
        let mut rng = Rng::new(case.seed);
        // Of its own: the same rows lie in any layout.
        let mut layout_rng = Rng::new(!case.seed);
        let dtype = reference_dtype(case.dtype);
        let (b, hk) = (case.seqs, case.kv_heads);
        let q = dtype.round_all(&rng.normals(b * case.q_heads * case.query_rows * case.head_dim, case.q_size));
        let mut segments = Vec::new();
        for s in &case.segments {
            let mut pages = Pages::new(&mut layout_rng, s.layout, b, hk, s.capacity, &s.lengths);
            if s.positions {
                let per_head = matches!(s.layout, Layout::PerHead(_));
                pages = pages.with_positions(|seq, head, row| (row * 2 + row / 5 + seq + if per_head { head } else { 0 }) as i32);
            }
            let (d, dv) = (case.head_dim, case.value_dim);
            let mut keys = vec![0xffu8; pages.pool_bytes(&s.keys, d)];
            let mut values = vec![0xffu8; pages.pool_bytes(&s.values, dv)];
            let mut rows = Vec::new();
            for (seq, head) in (0..b).flat_map(|s| (0..hk).map(move |h| (s, h))) {
                let mut given = HeadData::default();
                for row in 0..pages.length(seq, head) {
                    let (mut k, mut v) = (rng.normals(d, case.key_size), rng.normals(dv, 1.0));
                    if case.constant {
                        k = vec![k[0]; d];
                        v = vec![v[0]; dv];
                    }
                    if row == 2 && case.nan_key {
                        k[d / 3] = f32::NAN;
                    }
                    if row == 2 && case.nan_value {
                        v[dv / 3] = f32::NAN;
                    }
                    if case.broken && row + 1 == pages.length(seq, head) {
                        v[dv / 2] = f32::INFINITY;
                    }
                    given.keys.extend(k);
                    given.values.extend(v);
                }
                rows.push(HeadData {
                    keys: pages.store_all(&mut keys, (seq, head), &given.keys, d, &s.keys),
                    values: pages.store_all(&mut values, (seq, head), &given.values, dv, &s.values),
                });
            }
            segments.push(SegmentData { pages, keys, values, rows });
        }
        let sinks = case.sinks.then(|| rng.normals(case.q_heads, 2.0));
        let mut data = Self { case: case.clone(), q, sinks, q_positions: None, segments };
        if case.q_positions {
            // Somewhere in the second half of the rows, so that some are hidden; equal ones and gaps occur.
            let positions = |seq: usize| {
                let last = data.dense_head(seq, 0).positions.last().copied().unwrap_or(0);
                (0..case.query_rows).map(move |s| last / 2 + (s * 3 / 2) as i32).collect::<Vec<_>>()
            };
            data.q_positions = Some((0..b).flat_map(positions).collect());
        }
        data
    }

    /// A (sequence, kv head)'s rows.
    pub fn dense_head(&self, seq: usize, head: usize) -> HeadRows {
        let mut all = HeadRows::default();
        for s in &self.segments {
            let rows = &s.rows[seq * self.case.kv_heads + head];
            all.keys.extend(&rows.keys);
            all.values.extend(&rows.values);
            let first = all.positions.len();
            all.positions.extend((0..s.pages.length(seq, head)).map(|row| match &s.pages.positions {
                Some(p) => p[s.pages.position_index(seq, head, row)],
                None => (first + row) as i32,
            }));
        }
        all
    }

    /// By the reference, from dense tensors.
    pub fn expected(&self) -> Attended {
        self.expected_of(self.q_positions.as_deref(), |seq, head| self.dense_head(seq, head))
    }

    /// Likewise, over the rows of a segment that are seen and all rows of the others.
    pub fn expected_over(&self, segment: usize, seen: impl Fn(usize, usize, usize) -> bool) -> Attended {
        let c = &self.case;
        // Queries are where they are among all rows. (Those of heads with other lengths would be elsewhere.)
        let last = |seq: usize| {
            let held = self.dense_head(seq, 0).positions;
            (0..c.query_rows).map(move |s| match (held.len() + s).checked_sub(c.query_rows) {
                Some(row) => held[row],
                None => (held.len() + s) as i32 - c.query_rows as i32,
            })
        };
        let derived: Vec<i32> = (0..c.seqs).flat_map(last).collect();
        self.expected_of(Some(self.q_positions.as_deref().unwrap_or(&derived)), |seq, head| {
            let all = self.dense_head(seq, head);
            let first: usize = (0..segment).map(|s| self.length(s, seq, head)).sum();
            let own = first..first + self.length(segment, seq, head);
            let mut rows = HeadRows::default();
            for row in (0..all.positions.len()).filter(|row| !own.contains(row) || seen(seq, head, row - first)) {
                rows.keys.extend(&all.keys[row * c.head_dim..][..c.head_dim]);
                rows.values.extend(&all.values[row * c.value_dim..][..c.value_dim]);
                rows.positions.push(all.positions[row]);
            }
            rows
        })
    }

    fn expected_of(&self, q_positions: Option<&[i32]>, rows: impl Fn(usize, usize) -> HeadRows) -> Attended {
        let c = &self.case;
        let rotated = c.segments.iter().any(|s| s.keys.format.hadamard);
        let rounded = c.int8_queries.then(|| int8_queries(&self.q, c, rotated));
        let input = AttendInput {
            seqs: c.seqs,
            q_heads: c.q_heads,
            kv_heads: c.kv_heads,
            query_rows: c.query_rows,
            head_dim: c.head_dim,
            value_dim: c.value_dim,
            q: rounded.as_ref().unwrap_or(&self.q),
            q_positions,
            sink_logits: self.sinks.as_deref(),
            softcap: f64::from(c.softcap),
            window: i64::from(c.window),
            ..Default::default()
        };
        heads::attend(input, rows)
    }

    /// Keeps the first rows of each sequence of a contiguous case.
    pub fn shorten(&mut self, lengths: &[usize]) {
        let heads = self.case.kv_heads;
        let (d, dv) = (self.case.head_dim, self.case.value_dim);
        for (case, segment) in self.case.segments.iter_mut().zip(&mut self.segments) {
            case.lengths = lengths.to_vec();
            segment.pages.lengths = lengths.iter().map(|&n| n as i32).collect();
            for (i, rows) in segment.rows.iter_mut().enumerate() {
                rows.keys.truncate(lengths[i / heads] * d);
                rows.values.truncate(lengths[i / heads] * dv);
            }
        }
    }

    /// Takes the first sequence of a contiguous case with the same capacity.
    pub fn take_first_sequence(&mut self, batch: &Self) {
        self.q = batch.q[..self.q.len()].to_vec();
        for (to, from) in self.segments.iter_mut().zip(&batch.segments) {
            to.keys = from.keys[..to.keys.len()].to_vec();
            to.values = from.values[..to.values.len()].to_vec();
            to.rows = from.rows[..to.rows.len()].to_vec();
        }
    }

    /// Rows that a (sequence, kv head) has in a segment.
    pub fn length(&self, segment: usize, seq: usize, head: usize) -> usize {
        self.segments[segment].pages.length(seq, head)
    }

    /// Overwrites rows of a segment, as if they had not been written: nothing of them may reach a result.
    pub fn poison_rows(&mut self, segment: usize, which: impl Fn(usize, usize, usize) -> bool) {
        let (c, s) = (&self.case, &mut self.segments[segment]);
        let formats = &c.segments[segment];
        for (seq, head) in (0..c.seqs).flat_map(|s| (0..c.kv_heads).map(move |h| (s, h))) {
            for row in (0..s.pages.length(seq, head)).filter(|&row| which(seq, head, row)) {
                s.pages.poison(&mut s.keys, (seq, head, row), c.head_dim, &formats.keys);
                s.pages.poison(&mut s.values, (seq, head, row), c.value_dim, &formats.values);
            }
        }
    }

    /// Gives the first sequence a page that does not exist.
    pub fn with_bad_page(mut self) -> Self {
        self.segments[0].pages.table[1] = i32::MAX;
        self
    }

    /// Bounds for the result: the loosest segment's.
    pub fn tolerances(&self) -> (Tolerance, Tolerance) {
        let c = &self.case;
        let rows = c.segments.iter().map(|s| s.capacity).sum();
        let dtype = reference_dtype(c.dtype);
        let loosest = |all: Vec<Tolerance>| {
            let most = |of: fn(&Tolerance) -> f64| all.iter().map(of).fold(0.0, f64::max);
            Tolerance { absolute: most(|t| t.absolute), relative: most(|t| t.relative), cosine: most(|t| t.cosine) }
        };
        let of = |f: &dyn Fn(&SegmentCase) -> Tolerance| loosest(c.segments.iter().map(f).collect());
        let logit = f64::from(c.q_size * c.key_size);
        let out = of(&|s| match s.keys.format.codec.is_channel_wise() {
            true => Tolerance::attend_channels(rows, 4.0, logit),
            false => Tolerance::attend(dtype, s.values.format.codec.reference(), rows, 4.0),
        });
        let lse = of(&|s| match s.keys.format.codec.is_channel_wise() {
            true => Tolerance::lse_channels(logit),
            false => Tolerance::lse(s.keys.format.codec.reference()),
        });
        (heads::rounded_to(c.out_dtype, out), lse)
    }
}

/// Queries in 8 bits, one scale a (sequence, head), rotated first (and back) where keys are.
fn int8_queries(q: &[f32], c: &AttendCase, rotated: bool) -> Vec<f32> {
    let turn = |x: &[f32]| if rotated { hadamard(x).expect("a power of two") } else { x.to_vec() };
    q.chunks(c.query_rows * c.head_dim)
        .flat_map(|head| {
            let rows: Vec<f32> = head.chunks(c.head_dim).flat_map(turn).collect();
            let scale = rows.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
            let code = |x: &f32| if scale > 0.0 { (x / scale).round_ties_even() * scale } else { 0.0 };
            rows.iter().map(code).collect::<Vec<_>>().chunks(c.head_dim).flat_map(turn).collect::<Vec<_>>()
        })
        .collect()
}

/// `[B, H, S, d]` to `[B, S, H, d]`.
fn transpose(x: &[f32], c: &AttendCase, dim: usize) -> Vec<f32> {
    let (h, s) = (c.q_heads, c.query_rows);
    let at = |b: usize, i: usize, j: usize| &x[((b * h + j) * s + i) * dim..][..dim];
    (0..c.seqs)
        .flat_map(|b| (0..s).flat_map(move |i| (0..h).map(move |j| (b, i, j))))
        .flat_map(|(b, i, j)| at(b, i, j).to_vec())
        .collect()
}

/// Runs a case and compares; the text names the case.
pub fn check(lab: &Lab, case: &AttendCase) -> Result<(), String> {
    let made = once_a_case(case, || {
        let data = AttendData::new(case);
        let expected = data.expected();
        (data, expected)
    });
    let (data, expected) = &*made;
    let mut run = AttendRun::new(lab, data);
    run.enqueue();
    heads::check_attended(&run.result(), run.status(), expected, data.tolerances(), case)
}

/// Compares a result with the reference.
pub fn compare(data: &AttendData, actual: &Attended) -> Result<(), String> {
    heads::compare_attended(actual, &data.expected(), data.tolerances(), &data.case)
}
