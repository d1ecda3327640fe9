//! Merging of attention results over disjoint sets of rows.

use crate::error::{ReferenceError, shape};

/// `out [rows, dim]` and `lse [rows]` over the union of the row sets of `parts [n, rows, dim]`, `lse [n, rows]`.
///
/// A part with lse −∞ vanishes, whatever its output holds; all of them: 0 and −∞.
///
/// # Errors
/// A tensor of the wrong size.
pub fn merge(parts: &[f32], lse: &[f32], n: usize, rows: usize, dim: usize) -> Result<(Vec<f32>, Vec<f32>), ReferenceError> {
    shape("out", parts.len(), &[n, rows, dim])?;
    shape("lse", lse.len(), &[n, rows])?;
    let (mut out, mut merged) = (vec![0f32; rows * dim], vec![f32::NEG_INFINITY; rows]);
    for r in 0..rows {
        let weights = || (0..n).map(|p| f64::from(lse[p * rows + r]));
        let top = weights().fold(f64::NEG_INFINITY, |a, x| if a.is_nan() || x.is_nan() { f64::NAN } else { a.max(x) });
        if top == f64::NEG_INFINITY {
            continue;
        }
        let sum: f64 = weights().map(|x| (x - top).exp()).sum();
        for i in 0..dim {
            let x: f64 = weights()
                .enumerate()
                .filter(|&(_, x)| x != f64::NEG_INFINITY)
                .map(|(p, x)| (x - top).exp() / sum * f64::from(parts[(p * rows + r) * dim + i]))
                .sum();
            out[r * dim + i] = x as f32;
        }
        merged[r] = (top + sum.ln()) as f32;
    }
    Ok((out, merged))
}
