//! Attention of the last queries, over all rows before them.

use super::{attention_sums, group};
use crate::error::{ReferenceError, shape, value};
use crate::reduce::larger;

/// How the rows of a window become one score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowReduction {
    /// Their sum (DynamicKV).
    #[default]
    Sum,
    /// Their mean (SnapKV).
    Mean,
}

/// Pooling of a head's scores along the rows before the window: stride 1, padding kernel / 2, the kernel odd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// None.
    None,
    /// Mean over a kernel, divided by the whole kernel at the borders too: padding counts as 0.
    Avg(usize),
    /// Largest in a kernel; padding does not count.
    Max(usize),
}

impl Default for Pool {
    fn default() -> Self {
        Self::Avg(7)
    }
}

impl Pool {
    fn check(self) -> Result<(), ReferenceError> {
        match self {
            Self::Avg(kernel) | Self::Max(kernel) if kernel.is_multiple_of(2) => value("kernel", format!("{kernel} is not odd")),
            _ => Ok(()),
        }
    }

    fn apply(self, scores: &[f64]) -> Vec<f64> {
        let (Self::Avg(kernel) | Self::Max(kernel)) = self else { return scores.to_vec() };
        let half = kernel / 2;
        let around = |t: usize| &scores[t.saturating_sub(half)..t.saturating_add(half + 1).min(scores.len())];
        let pooled = |t: usize| match self {
            Self::Max(_) => around(t).iter().copied().fold(f64::NAN, larger),
            _ => around(t).iter().sum::<f64>() / kernel as f64,
        };
        (0..scores.len()).map(pooled).collect()
    }
}

/// How the query heads of a kv head become one score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadReduction {
    /// Their mean.
    #[default]
    Mean,
    /// The largest.
    Max,
    /// Their sum.
    Sum,
}

impl HeadReduction {
    /// Scores `[n]` of the heads `[G][n]`.
    pub(super) fn apply(self, heads: &[Vec<f64>]) -> Vec<f32> {
        let rows = heads.first().map_or(0, Vec::len);
        let reduced = |t: usize| {
            let scores = heads.iter().map(|head| head[t]);
            match self {
                Self::Mean => scores.sum::<f64>() / heads.len() as f64,
                Self::Max => scores.fold(f64::NAN, larger),
                Self::Sum => scores.sum(),
            }
        };
        (0..rows).map(|t| reduced(t) as f32).collect()
    }
}

/// Which rows get a score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WindowColumns {
    /// Those before the window.
    #[default]
    Prefix,
    /// All: the window's own too, pooled with the others.
    All,
}

/// Inputs of [`score_window`]; names and defaults as in `OPS.md`.
#[derive(Clone, Debug, Default)]
pub struct WindowInput<'a> {
    /// B.
    pub seqs: usize,
    /// Hq.
    pub q_heads: usize,
    /// Hk; divides Hq.
    pub kv_heads: usize,
    /// W, above 0.
    pub window: usize,
    /// T, the window's rows among them.
    pub rows: usize,
    /// d.
    pub head_dim: usize,
    /// `[B, Hq, W, d]`, rotated: queries of the last W rows.
    pub q: &'a [f32],
    /// `[B, Hk, T, d]`, rotated.
    pub k: &'a [f32],
    /// `[B, Hq, W]`: lse of the queries over all rows that they see, if it is known.
    pub lse: Option<&'a [f32]>,
    /// Default 1 / √d.
    pub scale: Option<f64>,
    /// First: over the window.
    pub row_reduction: RowReduction,
    /// Then: along the rows, each query head by itself.
    pub pool: Pool,
    /// Last: over the query heads of a kv head.
    pub head_reduction: HeadReduction,
    /// Which rows get a score.
    pub columns: WindowColumns,
}

impl WindowInput<'_> {
    /// Rows that get a score: T − W, or T.
    pub fn scored(&self) -> usize {
        match self.columns {
            WindowColumns::Prefix => self.rows - self.window,
            WindowColumns::All => self.rows,
        }
    }

    /// Checks sizes and values.
    ///
    /// # Errors
    /// A tensor of the wrong size, heads that do not divide, no window or one of more than T rows, an even kernel.
    pub fn check(&self) -> Result<(), ReferenceError> {
        let (w, t, d) = (self.window, self.rows, self.head_dim);
        group(self.q_heads, self.kv_heads)?;
        if w == 0 || w > t || d == 0 {
            return value("q", format!("{w} queries of {d} dimensions are not the last of {t} rows"));
        }
        shape("q", self.q.len(), &[self.seqs, self.q_heads, w, d])?;
        shape("k", self.k.len(), &[self.seqs, self.kv_heads, t, d])?;
        if let Some(lse) = self.lse {
            shape("lse", lse.len(), &[self.seqs, self.q_heads, w])?;
        }
        self.pool.check()
    }
}

/// Scores `[B, Hk, T − W]` of the rows before the window, by the attention that they get from it (SnapKV, arXiv 2404.14469;
/// DynamicKV, arXiv 2412.14838); or `[B, Hk, T]` of all rows.
///
/// Queries of the window see all rows before it and its own rows up to themselves; what they give to the latter is in the
/// denominator only, unless all rows get a score. A NaN or +∞ among the logits of a query makes all its weights NaN; with a given lse that weight alone, as
/// exp(logit − lse) is. In a maximum NaN is the least, a sum or mean with one is NaN. An lse of −∞ says that a query saw nothing: it adds 0.
///
/// # Errors
/// As [`WindowInput::check`].
pub fn score_window(i: &WindowInput<'_>) -> Result<Vec<f32>, ReferenceError> {
    i.check()?;
    let (w, t, d, group) = (i.window, i.rows, i.head_dim, i.q_heads / i.kv_heads);
    let scale = i.scale.unwrap_or(1.0 / (d as f64).sqrt());
    let mut scores = Vec::with_capacity(i.seqs * i.kv_heads * i.scored());
    for (kv, keys) in i.k.chunks_exact(t * d).enumerate() {
        let pooled = |head: usize| {
            let lse = i.lse.map(|lse| &lse[head * w..][..w]);
            let mut sums = attention_sums(&i.q[head * w * d..][..w * d], keys, d, scale, lse);
            sums.truncate(i.scored());
            if i.row_reduction == RowReduction::Mean {
                sums.iter_mut().for_each(|x| *x /= w as f64);
            }
            i.pool.apply(&sums)
        };
        let heads: Vec<Vec<f64>> = (kv * group..(kv + 1) * group).map(pooled).collect();
        scores.extend(i.head_reduction.apply(&heads));
    }
    Ok(scores)
}
