//! Attention of a text that repeats the context: what the gate of Fast KVzip is taught.

use super::{group, softmax};
use crate::attend::dot;
use crate::error::{ReferenceError, shape, value};
use crate::reduce::larger;

/// Inputs of [`score_repeat`]; names as in `OPS.md`.
#[derive(Clone, Debug, Default)]
pub struct RepeatInput<'a> {
    /// Hq.
    pub q_heads: usize,
    /// Hk; divides Hq.
    pub kv_heads: usize,
    /// n: rows of the repeating text, above 0.
    pub queries: usize,
    /// T: rows of the cache before it.
    pub rows: usize,
    /// d.
    pub head_dim: usize,
    /// `[Hq, n, d]`, rotated.
    pub q: &'a [f32],
    /// `[Hk, T + n, d]`, rotated; the last n rows are the repeating text's own.
    pub k: &'a [f32],
    /// How many of the first rows are attended to besides the chunk: the system prompt.
    pub sink: usize,
    /// First row of the chunk that is repeated.
    pub start: usize,
    /// Rows of the chunk.
    pub len: usize,
    /// Default 1 / √d.
    pub scale: Option<f64>,
}

impl RepeatInput<'_> {
    /// Checks sizes and ranges.
    ///
    /// # Errors
    /// A tensor of the wrong size, heads that do not divide, no queries, sinks or a chunk beyond T.
    pub fn check(&self) -> Result<(), ReferenceError> {
        let (n, t, d) = (self.queries, self.rows, self.head_dim);
        group(self.q_heads, self.kv_heads)?;
        if n == 0 || d == 0 {
            return value("q", format!("there are {n} queries of {d} dimensions"));
        }
        shape("q", self.q.len(), &[self.q_heads, n, d])?;
        shape("k", self.k.len(), &[self.kv_heads, t + n, d])?;
        if self.sink > t {
            return value("sink", format!("{} is more than the {t} rows before the repeating text", self.sink));
        }
        if self.start > t {
            return value("start", format!("{} is beyond the {t} rows before the repeating text", self.start));
        }
        if self.len > t - self.start {
            return value(
                "len",
                format!("{} rows from start {} on end beyond the {t} before the repeating text", self.len, self.start),
            );
        }
        Ok(())
    }
}

/// Scores `[Hk, len]` of the chunk's rows: the largest weight that any query of any query head gives each (KVzip, arXiv
/// 2505.23416).
///
/// Softmax runs over the first `sink` rows, the chunk and, causally, the repeating text; no other row is seen, and one that
/// is both a sink and of the chunk counts once. Weights are not rounded to a 16-bit type, which the released code does. A query
/// with a NaN or +∞ among its logits has NaN weights, which count as the least.
///
/// # Errors
/// As [`RepeatInput::check`].
pub fn score_repeat(i: &RepeatInput<'_>) -> Result<Vec<f32>, ReferenceError> {
    i.check()?;
    let (n, t, d, group) = (i.queries, i.rows, i.head_dim, i.q_heads / i.kv_heads);
    let scale = i.scale.unwrap_or(1.0 / (d as f64).sqrt());
    let chunk = i.start..i.start + i.len;
    // The chunk comes first, so that its weights do.
    let seen: Vec<usize> = chunk.clone().chain((0..i.sink).filter(|row| !chunk.contains(row))).collect();
    let mut scores = Vec::with_capacity(i.kv_heads * i.len);
    for (keys, queries) in i.k.chunks_exact((t + n) * d).zip(i.q.chunks_exact(group * n * d)) {
        let mut best = vec![f64::NAN; i.len];
        for (at, query) in queries.chunks_exact(d).enumerate() {
            let s = at % n;
            let rows = seen.iter().copied().chain(t..=t + s);
            let mut weights: Vec<f64> = rows.map(|row| scale * dot(query, &keys[row * d..][..d])).collect();
            softmax(&mut weights, None);
            best.iter_mut().zip(weights).for_each(|(best, weight)| *best = larger(*best, weight));
        }
        scores.extend(best.iter().map(|&x| x as f32));
    }
    Ok(scores)
}
