//! Rotations of latents that make their numbers alike in size, so that quantizing them costs less (as Palu and ReCalKV §3.3
//! do). They are folded into encoder and decoder: nothing of them is left at run time.

use faer::Mat;
use std::f64::consts::PI;

/// An orthogonal matrix [n, n] of entries as even in size as may be: n = 2ᵃ·m, m odd; Walsh–Hadamard of 2ᵃ, Kronecker
/// the orthonormal cosine transform of m. Symmetric signs for m = 1: all entries ±1/√n.
///
/// Released code has tables of Hadamard matrices for some odd multiples of 32; this one takes any size.
pub fn orthogonal(n: usize) -> Mat<f64> {
    let power = if n == 0 { 1 } else { 1 << n.trailing_zeros() };
    let odd = (n / power).max(1);
    let scale = 1.0 / (power as f64).sqrt();
    let cosine = |k: usize, i: usize| {
        let norm = if k == 0 { (1.0 / odd as f64).sqrt() } else { (2.0 / odd as f64).sqrt() };
        norm * (PI * (2 * i + 1) as f64 * k as f64 / (2 * odd) as f64).cos()
    };
    Mat::from_fn(n, n, |r, c| {
        let sign = if ((r / odd) & (c / odd)).count_ones().is_multiple_of(2) { scale } else { -scale };
        sign * cosine(r % odd, c % odd)
    })
}

/// Folds a rotation Q of the latents into a basis: z' = Qᵀ z, so encode' = Qᵀ encode and decode' = decode Q. What pads a
/// rank beyond the length of the rows stays zero.
pub fn fold(basis: &crate::basis::GroupBasis) -> crate::basis::GroupBasis {
    let (rows, rank) = (basis.decode.nrows(), basis.decode.ncols());
    let turned = orthogonal(rows.min(rank));
    let q = Mat::from_fn(rank, rank, |r, c| match r.max(c) < turned.ncols() {
        true => turned[(r, c)],
        false => f64::from(u8::from(r == c)),
    });
    crate::basis::GroupBasis { encode: q.transpose() * &basis.encode, decode: &basis.decode * &q }
}
