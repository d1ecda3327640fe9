//! OVC, the offline calibration of values (arXiv 2505.24357 §3.2), as the paper writes it and in closed form.

use crate::basis::eigenvalues;
use crate::error::{Error, Result, config};
use faer::{Mat, MatRef};

/// W ≈ left · right.
#[derive(Clone, Debug)]
pub struct Factorization {
    /// [d, rank].
    pub left: Mat<f64>,
    /// [rank, m].
    pub right: Mat<f64>,
    /// ‖W Xᵀ − left right Xᵀ‖².
    pub error: f64,
}

/// Leading left singular vectors of w [d, m] as columns [d, rank]; zero where w has fewer directions.
///
/// # Errors
/// [`Error::Numerical`] if the decomposition does not converge.
pub fn left_vectors(w: MatRef<'_, f64>, rank: usize) -> Result<Mat<f64>> {
    let svd = w.thin_svd().map_err(|_| Error::Numerical("a singular value decomposition"))?;
    let values: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let floor = values.first().copied().unwrap_or(0.0) * w.nrows().max(w.ncols()) as f64 * f64::EPSILON;
    let filled = values.iter().take(rank).take_while(|s| **s > floor).count();
    let u = svd.U();
    Ok(Mat::from_fn(w.nrows(), rank, |r, c| if c < filled { u[(r, c)] } else { 0.0 }))
}

/// W [d, m] factored for inputs x [n, m] (rows): truncated SVD of W, then `rounds` times
/// (7) L ← W XᵀX Rᵀ (R XᵀX Rᵀ)⁻¹ and (8) R ← (LᵀL)⁻¹ Lᵀ W, both as least squares (pseudo-inverse where data or factors
/// span less than the rank).
///
/// (7) never raises the error; (8) does not either if X has full rank. On the data of which the error is taken, rounds are
/// block power iterations: they converge to [`floor`].
///
/// # Errors
/// [`Error::Config`] for a rank outside 1..=min(d, m) or no rows, [`Error::Numerical`] if a decomposition does not converge.
pub fn factorize(w: MatRef<'_, f64>, x: MatRef<'_, f64>, rank: usize, rounds: usize) -> Result<Factorization> {
    let most = w.nrows().min(w.ncols());
    if rank == 0 || rank > most {
        return config("rank", format!("{rank} is outside 1..={most} (the smaller side of w)"));
    }
    if x.nrows() == 0 {
        return Err(Error::Empty("x".into()));
    }
    if x.ncols() != w.ncols() {
        return config("x", format!("rows of {} numbers; w takes {}", x.ncols(), w.ncols()));
    }
    // Only XᵀX matters; its triangular root is shorter than X and as well conditioned.
    let x = if x.nrows() > x.ncols() { x.qr().thin_R().to_owned() } else { x.to_owned() };
    let y = &x * w.transpose();
    let svd = w.thin_svd().map_err(|_| Error::Numerical("a singular value decomposition"))?;
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let mut left = Mat::from_fn(w.nrows(), rank, |r, c| u[(r, c)] * s[c].sqrt());
    let mut right = Mat::from_fn(rank, w.ncols(), |r, c| v[(c, r)] * s[r].sqrt());
    for _ in 0..rounds {
        let latents = &x * right.transpose();
        left = least_squares(latents.as_ref(), y.as_ref())?.transpose().to_owned();
        right = least_squares(left.as_ref(), w)?;
    }
    let rest = &y - (&x * right.transpose()) * left.transpose();
    let error = rest.col_iter().map(|c| c.iter().map(|e| e * e).sum::<f64>()).sum();
    Ok(Factorization { left, right, error })
}

/// The least error of any factorization of that rank: Σ of the eigenvalues of C = W XᵀX Wᵀ beyond it.
///
/// # Errors
/// [`Error::Numerical`] if the eigenvalues do not converge.
pub fn floor(w: MatRef<'_, f64>, x: MatRef<'_, f64>, rank: usize) -> Result<f64> {
    let y = x * w.transpose();
    Ok(crate::basis::tail(&eigenvalues((y.transpose() * &y).as_ref())?, rank))
}

/// The same rounds, seen from the outputs: after (7) and (8), span(L) = span(C · U) for the span U before, and L R is the
/// orthogonal projector on it times W. So one round is `U ← orthonormal basis of C U`; the columns come out orthonormal, or
/// zero where C U has fewer directions.
///
/// # Errors
/// [`Error::Numerical`] if a decomposition does not converge.
pub fn power(c: MatRef<'_, f64>, start: Mat<f64>, rounds: usize) -> Result<Mat<f64>> {
    let mut u = start;
    for _ in 0..rounds {
        u = left_vectors((c * &u).as_ref(), u.ncols())?;
    }
    Ok(u)
}

/// The least s of ‖a s − b‖ that is itself least.
fn least_squares(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> Result<Mat<f64>> {
    let svd = a.thin_svd().map_err(|_| Error::Numerical("a singular value decomposition"))?;
    let s = svd.S().column_vector();
    let floor = s.iter().copied().fold(0.0, f64::max) * a.nrows().max(a.ncols()) as f64 * f64::EPSILON;
    let mut coefficients = svd.U().transpose() * b;
    for c in 0..coefficients.ncols() {
        for r in 0..coefficients.nrows() {
            coefficients[(r, c)] = if s[r] > floor { coefficients[(r, c)] / s[r] } else { 0.0 };
        }
    }
    Ok(svd.V() * coefficients)
}
