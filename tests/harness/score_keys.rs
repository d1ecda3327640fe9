//! Cases of score_keys.

use crate::pages::{DevicePages, Layout, Pages, RowFormat};
use crate::{Lab, reference_dtype};
use kvlar::{
    AppendArgs, AppendShape, Buffer, Codec, Dtype, Format, KeyMethod, KeyScores, KeySums, Pool, Rows, ScoreKeysArgs,
    ScoreKeysPlan, ScoreKeysShape, Tables, Workspace,
};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{KeysInput, score_keys};

/// Rows of a batch, and how they are judged.
#[derive(Clone, Debug)]
pub struct KeysCase {
    pub dtype: Dtype,
    pub method: KeyMethod,
    pub layout: Layout,
    pub seqs: usize,
    pub heads: usize,
    pub capacity: usize,
    /// `[B]` or `[B, Hk]`.
    pub lengths: Vec<usize>,
    pub head_dim: usize,
    pub value_dim: usize,
    pub fill: bool,
    /// Between the heads' scores.
    pub head_gap: usize,
    /// `[B, Hk, capacity, d]`.
    pub k: Vec<f32>,
    /// `[B, Hk, capacity, dv]`.
    pub v: Vec<f32>,
}

impl KeysCase {
    /// Rows that scatter differently, so that no two of a lag are close.
    pub fn new(
        method: KeyMethod,
        dtype: Dtype,
        layout: Layout,
        (seqs, heads): (usize, usize),
        lengths: &[usize],
        dim: usize,
    ) -> Self {
        Self::of_dims(method, dtype, layout, (seqs, heads), lengths, (dim, dim))
    }

    pub fn of_dims(
        method: KeyMethod,
        dtype: Dtype,
        layout: Layout,
        (seqs, heads): (usize, usize),
        lengths: &[usize],
        (head_dim, value_dim): (usize, usize),
    ) -> Self {
        let capacity = lengths.iter().max().copied().unwrap_or(0);
        let mut rng = Rng::new((head_dim + capacity) as u64);
        let mut rows = |dim: usize| -> Vec<f32> {
            let mut row = || {
                let size = 0.2 + 4.0 * rng.uniform() as f32;
                (0..dim).map(|c| 0.3 * (c % 5) as f32 + size * rng.normal()).collect::<Vec<_>>()
            };
            (0..seqs * heads * capacity).flat_map(|_| row()).collect()
        };
        let (k, v) = (rows(head_dim), rows(value_dim));
        let (fill, head_gap, lengths) = (true, 0, lengths.to_vec());
        Self { dtype, method, layout, seqs, heads, capacity, lengths, head_dim, value_dim, fill, head_gap, k, v }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Row `row` of a head's keys.
    pub fn key(&mut self, head: usize, row: usize) -> &mut [f32] {
        let d = self.head_dim;
        &mut self.k[(head * self.capacity + row) * d..][..d]
    }

    /// Row `row` of a head's values.
    pub fn value(&mut self, head: usize, row: usize) -> &mut [f32] {
        let d = self.value_dim;
        &mut self.v[(head * self.capacity + row) * d..][..d]
    }

    pub fn length(&self, seq: usize, head: usize) -> usize {
        self.lengths[if self.lengths.len() == self.seqs { seq } else { seq * self.heads + head }]
    }

    fn shape(&self) -> ScoreKeysShape {
        ScoreKeysShape {
            dtype: self.dtype,
            method: self.method,
            seqs: self.seqs,
            kv_heads: self.heads,
            max_rows: self.capacity,
            head_dim: self.head_dim,
            value_dim: self.value_dim,
            fill: self.fill,
        }
    }

    /// Scores of the rows of a head.
    pub fn expected(&self, seq: usize, head: usize) -> Vec<f32> {
        let (rows, n, dtype) = ((seq * self.heads + head) * self.capacity, self.length(seq, head), reference_dtype(self.dtype));
        let of = |x: &[f32], dim: usize| dtype.round_all(&x[rows * dim..][..n * dim]);
        let (head_dim, value_dim, method) = (self.head_dim, self.value_dim, self.method);
        let (k, v) = (of(&self.k, head_dim), of(&self.v, value_dim));
        score_keys(&KeysInput { seqs: 1, kv_heads: 1, rows: n, head_dim, value_dim, k: &k, v: Some(&v), method }).expect("scores")
    }

    /// Runs it and compares.
    pub fn check(&self, lab: &Lab) -> Vec<f32> {
        let mut run = KeysRun::new(lab, self);
        for _ in 0..2 {
            run.launch(&lab.stream, KeySums::Own).expect("score_keys");
        }
        let scores = run.scores();
        self.compare(&scores);
        assert!(run.workspace.status(&lab.stream).expect("a status").is_clean());
        assert!(lab.counters(&run.workspace, run.plan.workspace()).iter().all(|&x| x == 0), "counters");
        scores
    }

    /// Scores as they lie in memory.
    pub fn compare(&self, scores: &[f32]) {
        let stride = self.capacity + self.head_gap;
        for (seq, head) in (0..self.seqs).flat_map(|s| (0..self.heads).map(move |h| (s, h))) {
            let (n, all) = (self.length(seq, head), &scores[(seq * self.heads + head) * stride..][..stride]);
            let what = format!("sequence {seq} head {head} of {n} rows, {:?}", self.shape());
            let tolerance = Tolerance { absolute: 2e-6, relative: 2e-6, cosine: 1e-9 };
            compare(&all[..n], &self.expected(seq, head), tolerance).unwrap_or_else(|e| panic!("{what}: {e}"));
            for (row, x) in all.iter().enumerate().skip(n) {
                let filled = self.fill && row < self.capacity;
                let right = if filled { *x == f32::NEG_INFINITY } else { x.to_bits() == u32::MAX };
                assert!(right, "{what}: row {row} is {x}");
            }
        }
    }
}

/// A case on a device.
pub struct KeysRun<'a> {
    lab: &'a Lab,
    case: KeysCase,
    pub plan: ScoreKeysPlan,
    pages: Pages,
    pub on_device: DevicePages,
    keys: Buffer,
    values: Buffer,
    scores: Buffer,
    pub workspace: Workspace,
}

impl<'a> KeysRun<'a> {
    pub fn new(lab: &'a Lab, case: &KeysCase) -> Self {
        let plan = case.shape().plan(&lab.device).expect("a plan");
        let mut rng = Rng::new(31);
        let pages = Pages::new(&mut rng, case.layout, case.seqs, case.heads, case.capacity, &case.lengths);
        let format = Self::format(case);
        let pool = |x: &[f32], dim: usize| {
            let mut bytes = vec![0xffu8; pages.pool_bytes(&format, dim)];
            for (seq, head) in (0..case.seqs).flat_map(|s| (0..case.heads).map(move |h| (s, h))) {
                let rows = &x[(seq * case.heads + head) * case.capacity * dim..][..case.length(seq, head) * dim];
                pages.store_all(&mut bytes, (seq, head), rows, dim, &format);
            }
            lab.upload(&bytes)
        };
        Self {
            lab,
            plan,
            keys: pool(&case.k, case.head_dim),
            values: pool(&case.v, case.value_dim),
            on_device: DevicePages::upload(lab, &pages),
            pages,
            scores: lab.poisoned(4 * case.seqs * case.heads * (case.capacity + case.head_gap)),
            workspace: Workspace::new(&lab.device, plan.workspace()).expect("a workspace"),
            case: case.clone(),
        }
    }

    fn format(case: &KeysCase) -> RowFormat {
        RowFormat::from(if case.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 })
    }

    pub fn launch(&mut self, stream: &kvlar::Stream, sums: KeySums<'_>) -> kvlar::Result<()> {
        let (c, format) = (&self.case, Self::format(&self.case));
        let head = c.capacity + c.head_gap;
        let mut args = ScoreKeysArgs {
            rows: self.on_device.rows(),
            keys: self.pages.pool(self.keys.view(), &format, c.head_dim),
            values: c.method.needs_values().then(|| self.pages.pool(self.values.view(), &format, c.value_dim)),
            scores: self.scores.view_mut(),
            score_strides: (c.head_gap > 0).then_some([c.heads * head, head]),
            sums,
        };
        self.plan.launch(stream, &mut args, &mut self.workspace)
    }

    pub fn scores(&self) -> Vec<f32> {
        self.lab.download(&self.scores)
    }

    pub fn poison(&mut self) {
        let end = self.scores.len();
        self.lab.stream.fill(&mut self.scores, 0..end, 0xff).expect("poison");
    }
}

/// An append of rows that are not rotated into contiguous memory.
pub struct Appends<'a> {
    lab: &'a Lab,
    dtype: Dtype,
    format: Format,
    dim: usize,
    keys: Buffer,
    values: Buffer,
    pub l2norm: Buffer,
    pub sums: Buffer,
}

pub const SEQS: usize = 2;
pub const HEADS: usize = 3;
pub const CAPACITY: usize = 20;
pub const GAP: usize = 2;

impl<'a> Appends<'a> {
    pub fn new(lab: &'a Lab, dtype: Dtype, format: Format, dim: usize) -> Self {
        let bytes = SEQS * HEADS * CAPACITY * (format.row_bytes(dim) + format.params_bytes(dim).next_multiple_of(16));
        Self {
            lab,
            dtype,
            format,
            dim,
            keys: lab.poisoned(bytes),
            values: lab.poisoned(bytes),
            l2norm: lab.poisoned(4 * SEQS * HEADS * (CAPACITY + GAP)),
            sums: lab.upload(&vec![0f32; SEQS * HEADS * dim]),
        }
    }

    fn pool<M: kvlar::Memory>(&self, data: M) -> Pool<M> {
        let (row, params) = (self.format.row_bytes(self.dim), self.format.params_bytes(self.dim));
        let head = CAPACITY * (row + params.next_multiple_of(16));
        Pool {
            head_stride: head,
            seq_stride: HEADS * head,
            params_offset: CAPACITY * row,
            params_stride: params,
            ..Pool::contiguous(data, HEADS, CAPACITY, row)
        }
    }

    /// New rows `[B, Hk, n, d]` at `slots` `[B, n]`.
    pub fn append(&mut self, k: &[f32], slots: &[i32], rows: usize, summed: bool) -> kvlar::Result<()> {
        let (lab, dim) = (self.lab, self.dim);
        let shape = AppendShape {
            dtype: self.dtype,
            key_format: self.format,
            value_format: self.format,
            seqs: SEQS,
            kv_heads: HEADS,
            new_rows: rows,
            head_dim: dim,
            value_dim: dim,
        };
        let x = lab.upload_as(k, self.dtype);
        let (slots, positions) = (lab.upload(slots), lab.upload(&vec![0i32; SEQS * rows]));
        let mut workspace = Workspace::new(&lab.device, Default::default()).unwrap();
        let [mut keys, mut values, mut l2norm, mut sums] = [&mut self.keys, &mut self.values, &mut self.l2norm, &mut self.sums]
            .map(|b| std::mem::replace(b, lab.device.alloc(0).unwrap()));
        let mut args = AppendArgs {
            k: x.view(),
            k_strides: None,
            v: x.view(),
            v_strides: None,
            positions: positions.view(),
            slots: slots.view(),
            slots_per_head: false,
            rope: None,
            rows: Rows::contiguous(None, CAPACITY),
            row_positions: None,
            keys: self.pool(keys.view_mut()),
            values: self.pool(values.view_mut()),
            tables: Tables::default(),
            key_scores: Some(KeyScores {
                l2norm: Some(l2norm.view_mut()),
                strides: Some([HEADS * (CAPACITY + GAP), CAPACITY + GAP]),
                direction_sums: summed.then(|| sums.view_mut()),
            }),
        };
        let result = shape.plan(&lab.device).and_then(|plan| plan.launch(&lab.stream, &mut args, &mut workspace));
        (self.keys, self.values, self.l2norm, self.sums) = (keys, values, l2norm, sums);
        result
    }

    /// What score_keys makes of the first rows.
    pub fn scored(&self, method: KeyMethod, rows: usize, sums: KeySums<'_>) -> Vec<f32> {
        let lab = self.lab;
        let (dtype, seqs, kv_heads, max_rows, fill) = (self.format.codec.dense().unwrap(), SEQS, HEADS, CAPACITY, true);
        let shape = ScoreKeysShape { dtype, method, seqs, kv_heads, max_rows, head_dim: self.dim, value_dim: self.dim, fill };
        let plan = shape.plan(&lab.device).unwrap();
        let (mut scores, lengths) = (lab.poisoned(4 * SEQS * HEADS * CAPACITY), lab.upload(&[rows as i32; SEQS]));
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
        let mut args = ScoreKeysArgs {
            rows: Rows::contiguous(Some(lengths.view()), CAPACITY),
            keys: self.pool(self.keys.view()),
            values: None,
            scores: scores.view_mut(),
            score_strides: None,
            sums,
        };
        plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
        lab.download(&scores)
    }
}

pub fn rows_to_append(rows: usize, dim: usize) -> Vec<f32> {
    let mut rng = Rng::new((rows * dim) as u64);
    let mut k = rng.normals(SEQS * HEADS * rows * dim, 2.0);
    k[..dim].fill(0.0);
    k[dim..2 * dim].iter_mut().for_each(|x| *x *= 1e4);
    k
}
