//! The normalized Walsh–Hadamard transform.

use crate::error::{ReferenceError, value};

/// H x for a row of d values, d a power of two: spreads outliers over the row before encoding (QuaRot, arXiv 2404.00456 §3).
/// H is orthogonal and its own inverse, so the same function turns decoded rows back, and (Hq)·(Hk) = q·k.
///
/// In f32, and a device does exactly this, bit for bit: for strides 1, 2, 4, … d/2, in this order, each pair (a, b) a
/// stride apart becomes (a + b, a − b), one rounding each; then one multiplication of each value by the f32 nearest to 1/√d.
/// A row with a value that is not finite has no finite value left.
///
/// # Errors
/// d is not a power of two.
pub fn hadamard(row: &[f32]) -> Result<Vec<f32>, ReferenceError> {
    let d = row.len();
    check(d)?;
    let mut x = row.to_vec();
    let mut stride = 1;
    while stride < d {
        for block in x.chunks_exact_mut(2 * stride) {
            let (low, high) = block.split_at_mut(stride);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        stride *= 2;
    }
    let norm = (1.0 / (d as f64).sqrt()) as f32;
    x.iter_mut().for_each(|x| *x *= norm);
    Ok(x)
}

pub(super) fn check(d: usize) -> Result<(), ReferenceError> {
    if d.is_power_of_two() { Ok(()) } else { value("hadamard", format!("{d} dimensions are not a power of two")) }
}
