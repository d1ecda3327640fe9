//! Scores of cached rows: what eviction ranks them by, the highest being kept.

mod column;
mod gate;
mod keys;
mod repeat;
mod window;

pub use column::{ColumnInput, score_column};
pub use gate::{Gate, score_gate};
pub use keys::{KeyMethod, KeysInput, score_keys};
pub use repeat::{RepeatInput, score_repeat};
pub use window::{HeadReduction, Pool, RowReduction, WindowColumns, WindowInput, score_window};

use crate::attend::dot;
use crate::error::{ReferenceError, value};
use crate::scan::log_sum_exp;

/// Query heads a kv head.
fn group(q_heads: usize, kv_heads: usize) -> Result<usize, ReferenceError> {
    if kv_heads == 0 || q_heads == 0 || !q_heads.is_multiple_of(kv_heads) {
        return value("q", format!("{q_heads} query heads are not shared out over {kv_heads} kv heads"));
    }
    Ok(q_heads / kv_heads)
}

/// Turns logits into exp(logit − lse), lse being theirs unless it is given.
///
/// One NaN or +∞ among logits makes all weights NaN where the lse is theirs, as floating-point softmax does. A row that saw
/// nothing (lse −∞) weighs nothing.
fn softmax(logits: &mut [f64], lse: Option<f64>) {
    let lse = lse.unwrap_or_else(|| log_sum_exp(logits));
    for x in logits {
        *x = if lse == f64::NEG_INFINITY { 0.0 } else { (*x - lse).exp() };
    }
}

/// What each key `[T]` gets of the attention of queries `[W, d]`, which are those of the last W rows of keys `[T, d]`.
///
/// Each query sees the rows up to its own. `lse` `[W]` if it is known.
fn attention_sums(q: &[f32], keys: &[f32], head_dim: usize, scale: f64, lse: Option<&[f32]>) -> Vec<f64> {
    let (queries, rows) = (q.len() / head_dim, keys.len() / head_dim);
    let mut sums = vec![0.0; rows];
    for (w, query) in q.chunks_exact(head_dim).enumerate() {
        let seen = keys.chunks_exact(head_dim).take(rows - queries + w + 1);
        let mut weights: Vec<f64> = seen.map(|key| scale * dot(query, key)).collect();
        softmax(&mut weights, lse.map(|lse| f64::from(lse[w])));
        sums.iter_mut().zip(&weights).for_each(|(sum, weight)| *sum += weight);
    }
    sums
}
