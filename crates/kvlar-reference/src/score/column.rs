//! Attention of all queries, summed over each column.

use super::{HeadReduction, attention_sums, group};
use crate::error::{ReferenceError, shape, value};

/// Inputs of [`score_column`]; names as in `OPS.md`.
#[derive(Clone, Debug, Default)]
pub struct ColumnInput<'a> {
    /// B.
    pub seqs: usize,
    /// Hq.
    pub q_heads: usize,
    /// Hk; divides Hq.
    pub kv_heads: usize,
    /// T.
    pub rows: usize,
    /// d.
    pub head_dim: usize,
    /// `[B, Hq, T, d]`, rotated.
    pub q: &'a [f32],
    /// `[B, Hk, T, d]`, rotated.
    pub k: &'a [f32],
    /// Default 1 / √d.
    pub scale: Option<f64>,
}

impl ColumnInput<'_> {
    /// Checks sizes.
    ///
    /// # Errors
    /// A tensor of the wrong size, heads that do not divide, rows of no dimensions.
    pub fn check(&self) -> Result<(), ReferenceError> {
        group(self.q_heads, self.kv_heads)?;
        if self.head_dim == 0 {
            return value("q", "it has rows of no dimensions");
        }
        shape("q", self.q.len(), &[self.seqs, self.q_heads, self.rows, self.head_dim])?;
        shape("k", self.k.len(), &[self.seqs, self.kv_heads, self.rows, self.head_dim])
    }
}

/// Scores `[B, Hk, T]`: the causal attention that each row gets, summed over all queries, mean over the query heads of a kv
/// head (H2O, arXiv 2306.14048). They sum to T in each kv head.
///
/// A NaN or +∞ among the logits of a query makes all its weights NaN, and with them the sums of the rows that it sees.
///
/// # Errors
/// As [`ColumnInput::check`].
pub fn score_column(i: &ColumnInput<'_>) -> Result<Vec<f32>, ReferenceError> {
    i.check()?;
    let (t, d, group) = (i.rows, i.head_dim, i.q_heads / i.kv_heads);
    let scale = i.scale.unwrap_or(1.0 / (d as f64).sqrt());
    let mut scores = Vec::with_capacity(i.seqs * i.kv_heads * t);
    for kv in 0..i.seqs * i.kv_heads {
        let keys = &i.k[kv * t * d..][..t * d];
        let sums = |head: usize| attention_sums(&i.q[head * t * d..][..t * d], keys, d, scale, None);
        let heads: Vec<Vec<f64>> = (kv * group..(kv + 1) * group).map(sums).collect();
        scores.extend(HeadReduction::Mean.apply(&heads));
    }
    Ok(scores)
}
