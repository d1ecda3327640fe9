//! Cases of low-rank attention: random latents in random pages, bases, groups; on a device and by the reference.

mod run;
mod step;

pub use run::{LowrankRun, check, compare};
pub use step::LowrankSteps;

use crate::heads::{self, HeadRows};
use crate::pages::{Layout, Pages};
use crate::reference_dtype;
use kvlar::{AttendShape, Codec, Dtype, HeadSets, Latents, LowrankShape, LowrankValues, MAX_SEGMENTS, Schedule, SegmentShape};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, Attended, Int8Basis, RopeLayout, RotaryPairs, expand_row};

/// Where rows say they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// At their index.
    Index,
    /// Stored: one after the other, from here on.
    From(i32),
    /// Stored, with gaps, from here on.
    Gaps(i32),
}

/// A segment of a case.
#[derive(Clone, Debug)]
pub struct SegmentCase {
    pub latent: bool,
    pub layout: Layout,
    pub capacity: usize,
    /// `[B]` or `[B, Hk]`.
    pub lengths: Vec<usize>,
    pub positions: Positions,
}

/// Values of a case.
#[derive(Clone, Debug)]
pub enum ValueCase {
    Dense,
    Latent { group: Vec<i32>, rank: usize, int8: bool },
}

/// A case: all that decides the input is here.
#[derive(Clone, Debug)]
pub struct LowrankCase {
    pub dtype: Dtype,
    pub out_dtype: Dtype,
    pub seqs: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub query_rows: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub group_k: Vec<i32>,
    pub rank: usize,
    pub latents: Latents,
    pub mean: bool,
    pub values: ValueCase,
    pub per_seq_bases: bool,
    pub rope: kvlar_reference::Rope,
    pub segments: Vec<SegmentCase>,
    pub softcap: f32,
    pub window: u32,
    pub sinks: bool,
    pub q_positions: Option<i32>,
    pub schedule: Schedule,
    /// The values of each group's last latent row hold an infinity.
    pub broken: bool,
    pub q_size: f32,
    pub seed: u64,
}

impl LowrankCase {
    /// One segment of latents in pages of 16, groups of `size` neighbours, latent values with the same groups.
    pub fn new(
        dtype: Dtype,
        heads: (usize, usize),
        size: usize,
        head_dim: usize,
        ranks: (usize, usize),
        lengths: &[usize],
    ) -> Self {
        let group: Vec<i32> = (0..heads.1).map(|h| (h / size) as i32).collect();
        let capacity = lengths.iter().copied().max().unwrap_or(0).max(1);
        Self {
            dtype,
            out_dtype: Dtype::F32,
            seqs: lengths.len(),
            q_heads: heads.0,
            kv_heads: heads.1,
            query_rows: 1,
            head_dim,
            value_dim: head_dim,
            group_k: group.clone(),
            rank: ranks.0,
            latents: Latents::Dtype,
            mean: false,
            values: ValueCase::Latent { group, rank: ranks.1, int8: false },
            per_seq_bases: false,
            rope: kvlar_reference::Rope::new(10_000.0, head_dim, RopeLayout::Half, kvlar_reference::RopeScaling::None),
            segments: vec![SegmentCase {
                latent: true,
                layout: Layout::Hnd(16),
                capacity,
                lengths: lengths.to_vec(),
                positions: Positions::Index,
            }],
            softcap: 0.0,
            window: 0,
            sinks: false,
            q_positions: None,
            schedule: Schedule::Balanced,
            broken: false,
            q_size: 1.0,
            seed: 1,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// int8 latents, of keys and of latent values.
    pub fn int8(mut self, latents: Latents) -> Self {
        self.latents = latents;
        if let ValueCase::Latent { int8, .. } = &mut self.values {
            *int8 = true;
        }
        self
    }

    fn native(&self) -> Codec {
        if self.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 }
    }

    fn key_codec(&self) -> Codec {
        self.latents.codec(self.native())
    }

    /// Codec, groups and width of a latent segment's values.
    fn value_rows(&self) -> (Codec, usize, usize) {
        match &self.values {
            ValueCase::Dense => (self.native(), self.kv_heads, self.value_dim),
            ValueCase::Latent { group, rank, int8 } => {
                (if *int8 { self.latents.codec(self.native()) } else { self.native() }, groups(group), *rank)
            }
        }
    }

    /// Codec and width of a segment's key rows and value rows.
    fn rows(&self, segment: &SegmentCase) -> [(Codec, usize); 2] {
        if !segment.latent {
            return [(self.native(), self.head_dim), (self.native(), self.value_dim)];
        }
        let (codec, _, width) = self.value_rows();
        [(self.key_codec(), self.rank), (codec, width)]
    }

    pub fn shape(&self, sets: &HeadSets) -> LowrankShape {
        let mut segments = [None; MAX_SEGMENTS];
        let mut latent_segments = [false; MAX_SEGMENTS];
        for (i, s) in self.segments.iter().enumerate() {
            segments[i] = Some(SegmentShape::new(if s.latent { self.key_codec() } else { self.native() }, s.capacity));
            latent_segments[i] = s.latent;
        }
        let rows = SegmentShape::new(self.native(), 0);
        let heads = (self.q_heads, self.kv_heads);
        let attend = AttendShape {
            out_dtype: self.out_dtype,
            value_dim: self.value_dim,
            softcap: self.softcap,
            window: self.window,
            schedule: self.schedule,
            ..AttendShape::new(self.dtype, self.seqs, heads, self.query_rows, self.head_dim, rows)
        };
        let values = match &self.values {
            ValueCase::Dense => LowrankValues::Dense,
            ValueCase::Latent { rank, .. } => LowrankValues::Latent { rank: *rank, codec: self.value_rows().0 },
        };
        let shape = LowrankShape::new(attend, 1, self.rank, self.latents, values, sets.shape());
        LowrankShape {
            attend: AttendShape { segments, ..shape.attend },
            latent_segments,
            key_mean: self.mean,
            stored_positions: self.segments.iter().any(|s| s.latent && s.positions != Positions::Index),
            ..shape
        }
    }
}

fn groups(group: &[i32]) -> usize {
    group.iter().max().map_or(0, |&g| g as usize + 1)
}

#[derive(Clone, Debug)]
struct SegmentData {
    keys: Pages,
    values: Pages,
    /// By kv head.
    lengths: Vec<i32>,
    key_bytes: Vec<u8>,
    value_bytes: Vec<u8>,
    /// Decoded rows of each (sequence, group or head).
    key_rows: Vec<Vec<f32>>,
    value_rows: Vec<Vec<f32>>,
}

/// Everything of a case, on the host.
#[derive(Clone, Debug)]
pub struct LowrankData {
    pub case: LowrankCase,
    q: Vec<f32>,
    sinks: Option<Vec<f32>>,
    q_positions: Option<Vec<i32>>,
    /// As the kernel has it: rounded, or dequantized.
    pub key_basis: Vec<f32>,
    int8_basis: Option<Int8Basis>,
    mean: Option<Vec<f32>>,
    pub value_basis: Vec<f32>,
    segments: Vec<SegmentData>,
}

impl LowrankData {
    pub fn new(case: &LowrankCase) -> Self {
        let mut rng = Rng::new(case.seed);
        let mut layout_rng = Rng::new(!case.seed);
        let c = case;
        let dtype = reference_dtype(c.dtype);
        let q = dtype.round_all(&rng.normals(c.seqs * c.q_heads * c.query_rows * c.head_dim, c.q_size));
        let copies = if c.per_seq_bases { c.seqs } else { 1 };
        let basis =
            |rng: &mut Rng, dim: usize, rank: usize| rng.normals(copies * c.kv_heads * dim * rank, 1.0 / (rank as f32).sqrt());
        let raw = basis(&mut rng, c.head_dim, c.rank);
        let (key_basis, int8_basis) = match c.latents {
            Latents::Dtype => (dtype.round_all(&raw), None),
            Latents::Int8 | Latents::Int4 => (kvlar_reference::Dtype::F16.round_all(&raw), None),
            Latents::Int8Basis => {
                let pairs = RotaryPairs { rotary_dim: c.rope.rotary_dim(), half: c.rope.layout == RopeLayout::Half };
                let int8 = Int8Basis::quantize(&raw, None, copies * c.kv_heads, c.head_dim, c.rank, pairs).expect("a basis");
                (int8.dequantize(c.head_dim, c.rank, pairs), Some(int8))
            }
        };
        let (_, value_groups, _) = c.value_rows();
        let value_basis = match &c.values {
            ValueCase::Dense => Vec::new(),
            ValueCase::Latent { rank, .. } => dtype.round_all(&basis(&mut rng, c.value_dim, *rank)),
        };
        let mean = c.mean.then(|| rng.normals(c.kv_heads * c.head_dim, 0.5));
        let sinks = c.sinks.then(|| rng.normals(c.q_heads, 2.0));
        let mut segments = Vec::new();
        for s in &c.segments {
            let key_heads = if s.latent { groups(&c.group_k) } else { c.kv_heads };
            let value_heads = if s.latent { value_groups } else { c.kv_heads };
            let [(kc, kd), (vc, vd)] = c.rows(s);
            let by_head = s.lengths.len() != c.seqs;
            let length = |b: usize, h: usize| if by_head { s.lengths[b * c.kv_heads + h] } else { s.lengths[b] };
            // A group stores as many rows as its longest head reads.
            let held: Vec<usize> = if by_head {
                let longest = |b: usize, g: usize| {
                    (0..c.kv_heads)
                        .filter(|&h| !s.latent || c.group_k[h] as usize == g)
                        .filter(|&h| s.latent || h == g)
                        .map(|h| length(b, h))
                        .max()
                        .unwrap_or(0)
                };
                (0..c.seqs).flat_map(|b| (0..key_heads).map(move |g| (b, g))).map(|(b, g)| longest(b, g)).collect()
            } else {
                s.lengths.clone()
            };
            let mut keys = Pages::new(&mut layout_rng, s.layout, c.seqs, key_heads, s.capacity, &held);
            let per_head = matches!(s.layout, Layout::PerHead(_));
            match s.positions {
                Positions::Index => {}
                Positions::From(first) => keys = keys.with_positions(|_, _, row| first + row as i32),
                Positions::Gaps(first) => {
                    keys = keys.with_positions(|b, h, row| first + (2 * row + row / 5 + b + if per_head { h } else { 0 }) as i32);
                }
            }
            // The same pages hold values, of as many groups or heads as these have.
            let most = (0..c.seqs).map(|b| (0..key_heads).map(|g| keys.length(b, g)).max().unwrap_or(0) as i32).collect();
            let values =
                if value_heads == key_heads { keys.clone() } else { Pages { heads: value_heads, lengths: most, ..keys.clone() } };
            let mut data = SegmentData {
                key_bytes: vec![0xffu8; keys.pool_bytes(&kc.into(), kd)],
                value_bytes: vec![0xffu8; values.pool_bytes(&vc.into(), vd)],
                lengths: (0..c.seqs)
                    .flat_map(|b| (0..c.kv_heads).map(move |h| (b, h)))
                    .map(|(b, h)| length(b, h) as i32)
                    .collect(),
                keys,
                values,
                key_rows: Vec::new(),
                value_rows: Vec::new(),
            };
            for (b, g) in (0..c.seqs).flat_map(|b| (0..key_heads).map(move |g| (b, g))) {
                let rows = (0..data.keys.length(b, g))
                    .flat_map(|row| data.keys.store(&mut data.key_bytes, (b, g, row), &rng.normals(kd, 1.0), &kc.into()));
                data.key_rows.push(rows.collect());
            }
            for (b, g) in (0..c.seqs).flat_map(|b| (0..value_heads).map(move |g| (b, g))) {
                let mut rows = Vec::new();
                for row in 0..data.values.length(b, g) {
                    let mut v = rng.normals(vd, 1.0);
                    if c.broken && s.latent && row + 1 == data.values.length(b, g) {
                        v[vd / 2] = f32::INFINITY;
                    }
                    rows.extend(data.values.store(&mut data.value_bytes, (b, g, row), &v, &vc.into()));
                }
                data.value_rows.push(rows);
            }
            segments.push(data);
        }
        let mut data = Self { case: c.clone(), q, sinks, q_positions: None, key_basis, int8_basis, mean, value_basis, segments };
        data.q_positions = c.q_positions.map(|back| {
            let last = |b: usize| data.head(b, 0).positions.last().copied().unwrap_or(0);
            (0..c.seqs).flat_map(|b| (0..c.query_rows).map(move |s| (b, s))).map(|(b, s)| last(b) - back + s as i32).collect()
        });
        data
    }

    /// Takes the first sequence of a contiguous case with the same capacity, and what all sequences share.
    pub fn take_first_sequence(&mut self, batch: &Self) {
        self.q = batch.q[..self.q.len()].to_vec();
        self.key_basis = batch.key_basis.clone();
        self.int8_basis = batch.int8_basis.clone();
        self.value_basis = batch.value_basis.clone();
        for (to, from) in self.segments.iter_mut().zip(&batch.segments) {
            to.key_bytes = from.key_bytes[..to.key_bytes.len()].to_vec();
            to.value_bytes = from.value_bytes[..to.value_bytes.len()].to_vec();
            to.key_rows = from.key_rows[..to.key_rows.len()].to_vec();
            to.value_rows = from.value_rows[..to.value_rows.len()].to_vec();
        }
    }

    /// Gives the first sequence a page that does not exist.
    pub fn with_bad_page(mut self) -> Self {
        self.segments[0].keys.table[1] = i32::MAX;
        self
    }

    /// A kv head's rows: keys are rebuilt and rotated.
    fn head(&self, b: usize, h: usize) -> HeadRows {
        let c = &self.case;
        let mut all = HeadRows::default();
        let of_head = |basis: &[f32], each: usize| -> Vec<f32> {
            basis[(if c.per_seq_bases { b * c.kv_heads } else { 0 } + h) * each..][..each].to_vec()
        };
        let key_basis = of_head(&self.key_basis, c.head_dim * c.rank);
        for (s, data) in c.segments.iter().zip(&self.segments) {
            let first = all.positions.len();
            let owner = if s.latent { c.group_k[h] as usize } else { h };
            let (_, value_heads, width) = c.value_rows();
            for row in 0..data.lengths[b * c.kv_heads + h] as usize {
                let position = match &data.keys.positions {
                    Some(p) => p[data.keys.position_index(b, owner, row)],
                    None => (first + row) as i32,
                };
                all.positions.push(position);
                if !s.latent {
                    all.keys.extend(&data.key_rows[b * c.kv_heads + h][row * c.head_dim..][..c.head_dim]);
                    all.values.extend(&data.value_rows[b * c.kv_heads + h][row * c.value_dim..][..c.value_dim]);
                    continue;
                }
                let z = &data.key_rows[b * groups(&c.group_k) + owner][row * c.rank..][..c.rank];
                let mean = self.mean.as_ref().map(|m| &m[h * c.head_dim..][..c.head_dim]);
                all.keys.extend(c.rope.rotate(&expand_row(&key_basis, z, mean, c.head_dim), i64::from(position)));
                match &c.values {
                    ValueCase::Dense => all.values.extend(&data.value_rows[b * value_heads + h][row * width..][..width]),
                    ValueCase::Latent { group, rank, .. } => {
                        let z = &data.value_rows[b * value_heads + group[h] as usize][row * rank..][..*rank];
                        all.values.extend(expand_row(&of_head(&self.value_basis, c.value_dim * rank), z, None, c.value_dim));
                    }
                }
            }
        }
        all
    }

    /// By the reference, from rebuilt dense tensors.
    pub fn expected(&self) -> Attended {
        let c = &self.case;
        let input = AttendInput {
            seqs: c.seqs,
            q_heads: c.q_heads,
            kv_heads: c.kv_heads,
            query_rows: c.query_rows,
            head_dim: c.head_dim,
            value_dim: c.value_dim,
            q: &self.q,
            q_positions: self.q_positions.as_deref(),
            sink_logits: self.sinks.as_deref(),
            softcap: f64::from(c.softcap),
            window: i64::from(c.window),
            ..Default::default()
        };
        heads::attend(input, |b, h| self.head(b, h))
    }

    fn tolerances(&self) -> (Tolerance, Tolerance) {
        let c = &self.case;
        let rows = c.segments.iter().map(|s| s.capacity).sum();
        let dtype = reference_dtype(c.dtype);
        let logit = f64::from(c.q_size) * if c.mean { 1.12 } else { 1.0 } * f64::from(c.rope.attention_factor.max(1.0));
        let out = Tolerance::attend_lowrank(dtype, rows, 4.0, logit);
        (heads::rounded_to(c.out_dtype, out), Tolerance::lse_lowrank(dtype, logit))
    }
}
