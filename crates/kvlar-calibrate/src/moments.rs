//! Streaming second moments: all that fitting needs to know of the calibration data, in memory that does not grow with it.

use crate::error::{Result, config, finite, shape};
use crate::shape::LayerShape;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, MatRef, Par};

/// Rows that are widened to f64 at a time.
const CHUNK: usize = 256;

/// Sums over rows y of `heads` × `dim` numbers: of y yᵀ (uncentred) and of y. f64.
#[derive(Clone, Debug)]
pub struct SecondMoment {
    heads: usize,
    dim: usize,
    rows: u64,
    /// The lower triangle.
    outer: Mat<f64>,
    sum: Vec<f64>,
}

impl SecondMoment {
    /// Of no rows yet.
    pub fn new(heads: usize, dim: usize) -> Self {
        let width = heads * dim;
        Self { heads, dim, rows: 0, outer: Mat::zeros(width, width), sum: vec![0.0; width] }
    }

    /// Of the rows `y` [n, heads, dim].
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn of(name: &str, y: &[f32], heads: usize, dim: usize) -> Result<Self> {
        let mut moment = Self::new(heads, dim);
        moment.add(name, y)?;
        Ok(moment)
    }

    /// Adds rows [n, heads, dim]; `name` is what errors call them.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a part of a row, [`Error::NotFinite`](crate::Error::NotFinite) for NaN and infinities; nothing is added then.
    pub fn add(&mut self, name: &str, y: &[f32]) -> Result<()> {
        let width = self.heads * self.dim;
        shape(name, "[n, heads, dim]", y.len() / width.max(1) * width, y.len())?;
        finite(name, y, width)?;
        self.add_checked(y);
        Ok(())
    }

    fn add_checked(&mut self, y: &[f32]) {
        let width = self.heads * self.dim;
        let mut wide = Vec::with_capacity(CHUNK * width);
        for chunk in y.chunks(CHUNK * width) {
            wide.clear();
            wide.extend(chunk.iter().map(|x| f64::from(*x)));
            let n = chunk.len() / width;
            let rows = MatRef::from_row_major_slice(&wide, n, width);
            triangular::matmul(
                self.outer.as_mut(),
                BlockStructure::TriangularLower,
                Accum::Add,
                rows.transpose(),
                BlockStructure::Rectangular,
                rows,
                BlockStructure::Rectangular,
                1.0,
                Par::Seq,
            );
            for row in wide.chunks_exact(width) {
                self.sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
            }
            self.rows += n as u64;
        }
    }

    /// Adds the rows of another.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if its heads or dimension differ.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if (self.heads, self.dim) != (other.heads, other.dim) {
            let (a, b, c, d) = (self.heads, self.dim, other.heads, other.dim);
            return config("moments", format!("{a} heads of {b} and {c} of {d} do not add up; merge moments of one layer"));
        }
        self.rows += other.rows;
        self.outer += &other.outer;
        self.sum.iter_mut().zip(&other.sum).for_each(|(s, x)| *s += x);
        Ok(())
    }

    /// Heads of a row.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Numbers of a head.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Rows added.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Σ of products of dimension `a` of head `i` and dimension `b` of head `j`.
    pub fn product(&self, (i, a): (usize, usize), (j, b): (usize, usize)) -> f64 {
        let (x, y) = (i * self.dim + a, j * self.dim + b);
        self.outer[(x.max(y), x.min(y))]
    }

    /// Mean row [heads · dim]; zeros if there is none.
    pub fn mean(&self) -> Vec<f64> {
        let n = self.rows.max(1) as f64;
        self.sum.iter().map(|s| s / n).collect()
    }

    /// Σ y yᵀ of some heads, in that order: [size·dim, size·dim], symmetric.
    pub fn group(&self, heads: &[usize]) -> Mat<f64> {
        let d = self.dim;
        Mat::from_fn(heads.len() * d, heads.len() * d, |r, c| self.product((heads[r / d], r % d), (heads[c / d], c % d)))
    }

    /// Σ (y − mean)(y − mean)ᵀ of some heads, in that order.
    pub fn group_centred(&self, heads: &[usize]) -> Mat<f64> {
        let (d, mean, n) = (self.dim, self.mean(), self.rows as f64);
        let mut c = self.group(heads);
        let of = |r: usize| mean[heads[r / d] * d + r % d];
        for col in 0..c.ncols() {
            for row in 0..c.nrows() {
                c[(row, col)] -= n * of(row) * of(col);
            }
        }
        c
    }

    /// Σ ‖y‖² over all heads.
    pub fn energy(&self) -> f64 {
        (0..self.sum.len()).map(|i| self.outer[(i, i)]).sum()
    }
}

/// Second moments of one layer: of its keys before RoPE, of its values, and the power of its queries.
#[derive(Clone, Debug)]
pub struct Moments {
    shape: LayerShape,
    keys: SecondMoment,
    values: SecondMoment,
    /// Σ q² [q_heads, head_dim].
    power: Vec<f64>,
}

impl Moments {
    /// Of no rows yet.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for sizes that make no sense.
    pub fn new(shape: LayerShape) -> Result<Self> {
        let LayerShape { q_heads, kv_heads, head_dim, value_dim } = shape.checked()?;
        Ok(Self {
            shape,
            keys: SecondMoment::new(kv_heads, head_dim),
            values: SecondMoment::new(kv_heads, value_dim),
            power: vec![0.0; q_heads * head_dim],
        })
    }

    /// Adds n tokens: q [n, q_heads, head_dim], rotated or not (only the power of rotary pairs is used, which rotation
    /// keeps); k [n, kv_heads, head_dim] before RoPE (after a key norm, if the model has one); v [n, kv_heads, value_dim].
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), or [`Error::NotFinite`](crate::Error::NotFinite) naming tensor and row; nothing is added then.
    pub fn add(&mut self, q: &[f32], k: &[f32], v: &[f32]) -> Result<()> {
        let LayerShape { q_heads, kv_heads, head_dim, value_dim } = self.shape;
        let n = k.len() / (kv_heads * head_dim);
        shape("k", "[n, kv_heads, head_dim]", n * kv_heads * head_dim, k.len())?;
        shape("q", "[n, q_heads, head_dim] with the rows of k", n * q_heads * head_dim, q.len())?;
        shape("v", "[n, kv_heads, value_dim] with the rows of k", n * kv_heads * value_dim, v.len())?;
        finite("q", q, q_heads * head_dim)?;
        finite("k", k, kv_heads * head_dim)?;
        finite("v", v, kv_heads * value_dim)?;
        let (keys, values) = (&mut self.keys, &mut self.values);
        rayon::join(|| keys.add_checked(k), || values.add_checked(v));
        for row in q.chunks_exact(q_heads * head_dim) {
            self.power.iter_mut().zip(row).for_each(|(p, x)| *p += f64::from(*x) * f64::from(*x));
        }
        Ok(())
    }

    /// Adds the rows of another, of the same layer.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) if the shapes differ; nothing is added then.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if self.shape != other.shape {
            return config(
                "moments",
                format!("{:?} and {:?} do not add up; merge moments of one layer", self.shape, other.shape),
            );
        }
        self.keys.merge(&other.keys)?;
        self.values.merge(&other.values)?;
        self.power.iter_mut().zip(&other.power).for_each(|(p, x)| *p += x);
        Ok(())
    }

    /// Tokens added.
    pub fn rows(&self) -> u64 {
        self.keys.rows()
    }

    /// Sizes of the layer.
    pub fn shape(&self) -> LayerShape {
        self.shape
    }

    /// Moments of the keys before RoPE.
    pub fn keys(&self) -> &SecondMoment {
        &self.keys
    }

    /// Moments of the values.
    pub fn values(&self) -> &SecondMoment {
        &self.values
    }

    /// Mean over rows of q² [q_heads, head_dim]; zeros if there are none.
    pub fn query_power(&self) -> Vec<f64> {
        let n = self.rows().max(1) as f64;
        self.power.iter().map(|p| p / n).collect()
    }
}
