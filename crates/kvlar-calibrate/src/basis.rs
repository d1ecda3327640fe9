//! Bases: principal components of what a head group produces, under a metric.
//!
//! Whitened truncated SVD of a projection's weights, as ReCalKV and Palu do it, is the projector on the leading
//! eigenvectors of C = Σ y yᵀ, y being the projection's output. So fitting needs C alone: latent z = Uᵀ y, ŷ = U z.
//! With a metric G (the error that counts is ‖G (y − ŷ)‖²), U are eigenvectors of G C Gᵀ, z = Uᵀ G y and ŷ = G⁻¹ U z.

use crate::error::{Error, Result, shape};
use crate::moments::SecondMoment;
use crate::shape::RopePairs;
use faer::{Mat, MatRef, Side};

/// Eigenvalues below this share of the largest are left out of a metric's inverse.
const METRIC_FLOOR: f64 = 1e-8;

/// A weighting of errors, block-diagonal over heads: G_h and its inverse.
#[derive(Clone, Debug)]
pub struct Metric {
    dim: usize,
    heads: Vec<(Mat<f64>, Mat<f64>)>,
}

impl Metric {
    /// For keys: under RoPE, averaged over the distance of query and key, the error of a logit counts each rotary pair by
    /// the power p of the queries in it, the mean of (q_i² + q_j²)/2 over the query heads of the kv head.
    /// G = diag(√p). `power` [q_heads, dim] holds means of q².
    ///
    /// Powers below 1e-8 of the greatest are raised to that, so that G has an inverse; queries that are all zero weigh
    /// nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] if `power` has another size.
    pub fn query(power: &[f64], q_heads: usize, kv_heads: usize, dim: usize, rope: RopePairs) -> Result<Self> {
        shape("query power", "[q_heads, dim]", q_heads * dim, power.len())?;
        let per = q_heads / kv_heads.max(1);
        let mut weights = vec![0.0; kv_heads * dim];
        for (at, w) in weights.iter_mut().enumerate() {
            let (h, i) = (at / dim, at % dim);
            let j = rope.partner(i);
            let pairs = (h * per..(h + 1) * per).map(|q| 0.5 * (power[q * dim + i] + power[q * dim + j]));
            *w = pairs.sum::<f64>() / per as f64;
        }
        let top = weights.iter().copied().fold(0.0, f64::max);
        let root = |w: f64| if top > 0.0 { w.max(METRIC_FLOOR * top).sqrt() } else { 1.0 };
        let diagonal =
            |h: usize, f: &dyn Fn(f64) -> f64| Mat::from_fn(dim, dim, |r, c| if r == c { f(weights[h * dim + r]) } else { 0.0 });
        let heads = (0..kv_heads).map(|h| (diagonal(h, &root), diagonal(h, &|w| 1.0 / root(w)))).collect();
        Ok(Self { dim, heads })
    }

    /// For values: the output projection makes an error e of kv head h into W_o e for each of its query heads, so
    /// G_h = (Σ W_oᵀ W_o)^½ over them. `out` is W_o [hidden, q_heads · dim], row-major.
    ///
    /// # Errors
    /// [`Error::Shape`] if `out` has another size, [`Error::Numerical`] if a decomposition does not converge.
    pub fn output(out: &[f32], hidden: usize, q_heads: usize, kv_heads: usize, dim: usize) -> Result<Self> {
        shape("W_o", "[hidden, q_heads * dim]", hidden * q_heads * dim, out.len())?;
        let per = q_heads / kv_heads.max(1);
        let mut spectra = Vec::with_capacity(kv_heads);
        for h in 0..kv_heads {
            let mut gram = Mat::<f64>::zeros(dim, dim);
            for q in h * per..(h + 1) * per {
                let w = Mat::from_fn(hidden, dim, |r, c| f64::from(out[(r * q_heads + q) * dim + c]));
                gram += w.transpose() * &w;
            }
            spectra.push(eigen(gram.as_ref())?);
        }
        let top = spectra.iter().flat_map(|s| s.values.first().copied()).fold(0.0, f64::max);
        let root = |w: f64| if top > 0.0 { w.max(METRIC_FLOOR * top).sqrt() } else { 1.0 };
        let power = |s: &Spectrum, f: &dyn Fn(f64) -> f64| {
            let scaled = Mat::from_fn(dim, dim, |r, c| s.vectors[(r, c)] * f(s.values[c]));
            scaled * s.vectors.transpose()
        };
        let heads = spectra.iter().map(|s| (power(s, &root), power(s, &|w| 1.0 / root(w)))).collect();
        Ok(Self { dim, heads })
    }

    /// G · m: `m` has a block of rows for each of `heads`.
    pub fn forward(&self, heads: &[usize], m: MatRef<'_, f64>) -> Mat<f64> {
        self.blockwise(heads, m, |block| &block.0)
    }

    /// G⁻¹ · m.
    pub fn inverse(&self, heads: &[usize], m: MatRef<'_, f64>) -> Mat<f64> {
        self.blockwise(heads, m, |block| &block.1)
    }

    fn blockwise(&self, heads: &[usize], m: MatRef<'_, f64>, of: impl Fn(&(Mat<f64>, Mat<f64>)) -> &Mat<f64>) -> Mat<f64> {
        let mut out = Mat::zeros(m.nrows(), m.ncols());
        for (slot, h) in heads.iter().enumerate() {
            let rows = of(&self.heads[*h]) * m.subrows(slot * self.dim, self.dim);
            out.subrows_mut(slot * self.dim, self.dim).copy_from(rows);
        }
        out
    }

    /// G c Gᵀ.
    pub fn weigh(&self, heads: &[usize], c: MatRef<'_, f64>) -> Mat<f64> {
        let half = self.forward(heads, c);
        let full = self.forward(heads, half.transpose());
        // Exactly symmetric: the eigensolver reads one triangle, errors read both.
        Mat::from_fn(full.nrows(), full.ncols(), |r, c| 0.5 * (full[(r, c)] + full[(c, r)]))
    }
}

/// What a basis of some heads is fitted to: C of the group, weighted and centred as asked.
pub fn covariance(moment: &SecondMoment, heads: &[usize], metric: Option<&Metric>, centred: bool) -> Mat<f64> {
    let c = if centred { moment.group_centred(heads) } else { moment.group(heads) };
    match metric {
        None => c,
        Some(m) => m.weigh(heads, c.as_ref()),
    }
}

/// Eigenvalues in descending order and their vectors, as columns.
#[derive(Clone, Debug)]
pub struct Spectrum {
    /// Eigenvalues; those that rounding made negative are 0.
    pub values: Vec<f64>,
    /// Orthonormal columns.
    pub vectors: Mat<f64>,
}

/// Eigendecomposition of a covariance (symmetric, positive semidefinite).
///
/// # Errors
/// [`Error::Numerical`] if it does not converge.
pub fn eigen(c: MatRef<'_, f64>) -> Result<Spectrum> {
    let e = c.self_adjoint_eigen(Side::Lower).map_err(|_| Error::Numerical("an eigendecomposition"))?;
    let values: Vec<f64> = e.S().column_vector().iter().rev().map(|x| x.max(0.0)).collect();
    Ok(Spectrum { values, vectors: e.U().reverse_cols().to_owned() })
}

/// Eigenvalues of a covariance, descending, none negative.
///
/// # Errors
/// [`Error::Numerical`] if they do not converge.
pub fn eigenvalues(c: MatRef<'_, f64>) -> Result<Vec<f64>> {
    let mut values = c.self_adjoint_eigenvalues(Side::Lower).map_err(|_| Error::Numerical("an eigendecomposition"))?;
    values.iter_mut().for_each(|x| *x = x.max(0.0));
    values.sort_by(|a, b| b.total_cmp(a));
    Ok(values)
}

/// Σ of the eigenvalues that a basis of `rank` leaves out: the least Σ ‖y − ŷ‖² of any (Eckart–Young).
pub fn tail(values: &[f64], rank: usize) -> f64 {
    values.iter().skip(rank).sum()
}

/// Leading `rank` eigenvectors [n, rank]. Where C has fewer directions (eigenvalues above n·ε of the largest), the rest of
/// the columns is zero, and so are they beyond n.
pub fn leading(spectrum: &Spectrum, rank: usize) -> Mat<f64> {
    let n = spectrum.values.len();
    let floor = spectrum.values.first().copied().unwrap_or(0.0) * n as f64 * f64::EPSILON;
    let filled = spectrum.values.iter().take(rank).take_while(|x| **x > floor).count();
    Mat::from_fn(n, rank, |r, c| if c < filled { spectrum.vectors[(r, c)] } else { 0.0 })
}

/// Encoder and decoder of one group.
#[derive(Clone, Debug)]
pub struct GroupBasis {
    /// [rank, size · dim]: z = encode · y.
    pub encode: Mat<f64>,
    /// [size · dim, rank]: ŷ = decode · z.
    pub decode: Mat<f64>,
}

impl GroupBasis {
    /// From orthonormal (or zero) columns in the metric's space: z = Uᵀ G y, ŷ = G⁻¹ U z.
    pub fn new(u: Mat<f64>, heads: &[usize], metric: Option<&Metric>) -> Self {
        match metric {
            None => Self { encode: u.transpose().to_owned(), decode: u },
            Some(m) => {
                // G is symmetric, so (G U)ᵀ is Uᵀ G.
                Self { encode: m.forward(heads, u.as_ref()).transpose().to_owned(), decode: m.inverse(heads, u.as_ref()) }
            }
        }
    }

    /// Σ ‖y − ŷ‖² over rows whose second moment is `c`: tr (I − P) C (I − P)ᵀ, P = decode · encode.
    pub fn discarded(&self, c: MatRef<'_, f64>) -> f64 {
        let left = c - &self.decode * (&self.encode * c);
        let both = &left - (&left * self.encode.transpose()) * self.decode.transpose();
        (0..both.nrows()).map(|i| both[(i, i)]).sum::<f64>().max(0.0)
    }

    /// (I − P) m: what of a vector the basis does not reach.
    pub fn unreached(&self, m: &[f64]) -> Vec<f64> {
        let m = Mat::from_fn(m.len(), 1, |r, _| m[r]);
        let rest = &m - &self.decode * (&self.encode * &m);
        (0..rest.nrows()).map(|r| rest[(r, 0)]).collect()
    }
}

/// Trace.
pub fn trace(c: MatRef<'_, f64>) -> f64 {
    (0..c.nrows()).map(|i| c[(i, i)]).sum()
}

/// What the best basis of `rank` discards of a group: [`tail`] of its (weighted, centred) covariance. Eigenvalues that are
/// rounding only count as 0, so that groups without any loss tie.
///
/// # Errors
/// [`Error::Numerical`] if the eigenvalues do not converge.
pub fn tail_energy(moment: &SecondMoment, heads: &[usize], metric: Option<&Metric>, centred: bool, rank: usize) -> Result<f64> {
    let values = eigenvalues(covariance(moment, heads, metric, centred).as_ref())?;
    let floor = values.first().copied().unwrap_or(0.0) * values.len() as f64 * f64::EPSILON;
    Ok(values.iter().skip(rank).filter(|x| **x > floor).sum())
}
