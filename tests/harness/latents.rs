//! Cases of projection to latents and of appending latents: random rows, encoders and groups, on a device and by the
//! reference.

mod append;

pub use append::{AppendLowrankCase, SideCase};

use crate::{Lab, once_a_case, reference_dtype};
use kvlar::{Buffer, Dtype, HeadGroups, ProjectShape, Projection, Strides};
use kvlar_reference::ProjectInput;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;

/// `count` groups of `size` different kv heads, in random order; heads may be in several groups.
pub fn random_groups(rng: &mut Rng, kv_heads: usize, count: usize, size: usize) -> Vec<Vec<i32>> {
    (0..count).map(|_| rng.permutation(kv_heads)[..size].iter().map(|&h| h as i32).collect()).collect()
}

/// Rows of some heads, an encoder of groups of them, and the mean that is taken off.
#[derive(Clone, Debug)]
pub struct Encoding {
    pub members: Vec<Vec<i32>>,
    pub rank: usize,
    /// `[B, Hk, rows, d]`.
    pub x: Vec<f32>,
    pub encoder: Vec<f32>,
    pub mean: Option<Vec<f32>>,
    shape: ProjectShape,
}

impl Encoding {
    /// `dims`: sequences, kv heads, rows, head dimension.
    pub fn new(rng: &mut Rng, dtype: Dtype, dims: [usize; 4], members: Vec<Vec<i32>>, rank: usize, mean: bool) -> Self {
        let [seqs, kv_heads, rows, head_dim] = dims;
        let (groups, size) = (members.len(), members[0].len());
        let (width, round) = (size * head_dim, reference_dtype(dtype));
        let shape = ProjectShape { dtype, out_dtype: Dtype::F32, seqs, kv_heads, rows, head_dim, groups, size, rank };
        let mean = mean.then(|| rng.normals(kv_heads * head_dim, 2.0));
        let mut x = rng.normals(seqs * kv_heads * rows * head_dim, 1.0);
        if let Some(mean) = &mean {
            for (i, x) in x.iter_mut().enumerate() {
                *x += mean[i / head_dim / rows % kv_heads * head_dim + i % head_dim];
            }
        }
        let encoder = round.round_all(&rng.normals(groups * rank * width, 1.0 / (width as f32).sqrt()));
        Self { members, rank, x: round.round_all(&x), encoder, mean, shape }
    }

    fn flat_members(&self) -> Vec<i32> {
        self.members.concat()
    }

    /// Latents `[B, n, rows, r]` by the reference.
    pub fn latents(&self) -> Vec<f32> {
        let s = &self.shape;
        let input = ProjectInput {
            seqs: s.seqs,
            kv_heads: s.kv_heads,
            rows: s.rows,
            head_dim: s.head_dim,
            groups: s.groups,
            size: s.size,
            rank: s.rank,
            k: &self.x,
            encoder: &self.encoder,
            members: &self.flat_members(),
            mean: self.mean.as_deref(),
        };
        kvlar_reference::project(&input).expect("a case")
    }

    /// |mean|² adds to the sums that are rounded.
    pub fn tolerance(&self, out: Dtype) -> Tolerance {
        let magnitude = if self.mean.is_some() { 12.0 } else { 5.0 };
        Tolerance::project(reference_dtype(out), self.shape.size * self.shape.head_dim, magnitude)
    }
}

/// An encoding on a device.
#[derive(Debug)]
pub struct DeviceEncoding {
    pub x: Buffer,
    pub encoder: Buffer,
    pub groups: HeadGroups,
    pub offset: Option<Buffer>,
    strides: Option<Strides>,
}

/// `[B, H, T, d]` as `[B, T, H, d]`.
fn rows_first(x: &[f32], [b, h, t, d]: [usize; 4]) -> Vec<f32> {
    let row = |q: usize, r: usize, g: usize| &x[((q * h + g) * t + r) * d..][..d];
    (0..b)
        .flat_map(|q| (0..t).flat_map(move |r| (0..h).map(move |g| (q, r, g))))
        .flat_map(|(q, r, g)| row(q, r, g).to_vec())
        .collect()
}

impl DeviceEncoding {
    pub fn upload(lab: &Lab, e: &Encoding, strided: bool) -> Self {
        let s = &e.shape;
        let dims = [s.seqs, s.kv_heads, s.rows, s.head_dim];
        let x = if strided { rows_first(&e.x, dims) } else { e.x.clone() };
        let offset = e.mean.as_ref().map(|m| s.offset_of(m, &e.encoder, &e.flat_members()).expect("an offset"));
        Self {
            x: lab.upload_as(&x, s.dtype),
            encoder: lab.upload_as(&e.encoder, s.dtype),
            groups: HeadGroups::new(&lab.device, &lab.stream, s.kv_heads, s.size, &e.flat_members()).expect("groups"),
            offset: offset.map(|o| lab.upload(&o)),
            strides: strided.then(|| Strides::rows_first(s.kv_heads, s.rows, s.head_dim)),
        }
    }

    pub fn projection(&self) -> Projection<'_> {
        Projection {
            x: self.x.view(),
            x_strides: self.strides,
            encoder: self.encoder.view(),
            groups: &self.groups,
            offset: self.offset.as_ref().map(Buffer::view),
        }
    }
}

/// A case of `project`.
#[derive(Clone, Debug)]
pub struct ProjectCase {
    pub dtype: Dtype,
    pub out_dtype: Dtype,
    pub seqs: usize,
    pub kv_heads: usize,
    pub rows: usize,
    pub head_dim: usize,
    /// Groups and heads a group.
    pub groups: (usize, usize),
    pub rank: usize,
    pub mean: bool,
    pub rows_first: bool,
    /// Elements of x that are replaced.
    pub odd: Vec<(usize, f32)>,
    pub seed: u64,
}

impl ProjectCase {
    /// Two groups of two of four heads.
    pub fn new(dtype: Dtype, rows: usize, head_dim: usize, rank: usize) -> Self {
        Self {
            dtype,
            out_dtype: Dtype::F32,
            seqs: 2,
            kv_heads: 4,
            rows,
            head_dim,
            groups: (2, 2),
            rank,
            mean: false,
            rows_first: false,
            odd: Vec::new(),
            seed: 1,
        }
    }

    /// Projects, and compares with the reference.
    ///
    /// # Panics
    /// If it differs.
    pub fn check(&self, lab: &Lab) {
        let made = once_a_case(self, || {
            let mut rng = Rng::new(self.seed);
            let members = random_groups(&mut rng, self.kv_heads, self.groups.0, self.groups.1);
            let dims = [self.seqs, self.kv_heads, self.rows, self.head_dim];
            let mut e = Encoding::new(&mut rng, self.dtype, dims, members, self.rank, self.mean);
            for &(i, value) in &self.odd {
                e.x[i] = value;
            }
            let expected = e.latents();
            (e, expected)
        });
        let (e, expected) = &*made;
        let on_device = DeviceEncoding::upload(lab, e, self.rows_first);
        let plan = ProjectShape { out_dtype: self.out_dtype, ..e.shape }.plan(&lab.device).expect("a plan");
        let mut out = lab.poisoned(self.seqs * self.groups.0 * self.rows * self.rank * self.out_dtype.bytes());
        plan.launch(&lab.stream, &on_device.projection(), &mut out.view_mut()).expect("project");
        let actual = lab.download_as(&out, self.out_dtype);
        kvlar_reference::compare::compare(&actual, expected, e.tolerance(self.out_dtype))
            .unwrap_or_else(|error| panic!("{error}\n{self:?} {:?}", e.members));
    }
}
