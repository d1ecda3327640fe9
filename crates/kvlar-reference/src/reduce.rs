//! One score for each cached row and kv head, from the logits of its query heads.

use crate::error::{ReferenceError, shape, value};

/// How the query heads of a kv head share a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// Mean of the logits.
    MeanLogit,
    /// Largest logit.
    MaxLogit,
    /// Largest logit − lse: the log of the largest attention weight.
    MaxProb,
}

/// Inputs of [`reduce`]; names as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct ReduceInput<'a> {
    /// B.
    pub seqs: usize,
    /// Hq.
    pub q_heads: usize,
    /// Hk; divides Hq.
    pub kv_heads: usize,
    /// T.
    pub rows: usize,
    /// `[B, Hq, T]`.
    pub logits: &'a [f32],
    /// `[B, Hq]`.
    pub lse: &'a [f32],
    /// How.
    pub method: Reduction,
}

/// The larger in the order of scores: NaN < −∞ < finite < +∞, −0 = +0; of equals the first.
pub(crate) fn larger(a: f64, b: f64) -> f64 {
    if a < b || (a.is_nan() && !b.is_nan()) { b } else { a }
}

/// Scores `[B, Hk, T]`.
///
/// A NaN logit counts as the least of its group, so that it shows in a maximum only where all are NaN; a mean with one is
/// NaN. A row that no query sees (logit −∞) has score −∞, also in a head that sees none (lse −∞).
///
/// # Errors
/// A tensor of the wrong size, heads that do not divide.
pub fn reduce(i: &ReduceInput<'_>) -> Result<Vec<f32>, ReferenceError> {
    if i.kv_heads == 0 || i.q_heads == 0 || !i.q_heads.is_multiple_of(i.kv_heads) {
        return value("kv_heads", format!("{} query heads are not shared out over {} kv heads", i.q_heads, i.kv_heads));
    }
    shape("logits", i.logits.len(), &[i.seqs, i.q_heads, i.rows])?;
    shape("lse", i.lse.len(), &[i.seqs, i.q_heads])?;
    let group = i.q_heads / i.kv_heads;
    let score = |kv: usize, row: usize| {
        let heads = kv * group..(kv + 1) * group;
        let logits = heads.map(|head| (f64::from(i.logits[head * i.rows + row]), f64::from(i.lse[head])));
        match i.method {
            Reduction::MeanLogit => logits.map(|(x, _)| x).sum::<f64>() / group as f64,
            Reduction::MaxLogit => logits.map(|(x, _)| x).fold(f64::NAN, larger),
            Reduction::MaxProb => logits.map(|(x, lse)| if x == f64::NEG_INFINITY { x } else { x - lse }).fold(f64::NAN, larger),
        }
    };
    Ok((0..i.seqs * i.kv_heads).flat_map(|kv| (0..i.rows).map(move |row| score(kv, row) as f32)).collect())
}
