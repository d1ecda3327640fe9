//! Scores from keys and values alone: no queries, no attention.

use crate::error::{ReferenceError, shape, value};
use crate::scan::log_sum_exp;

/// What a row is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyMethod {
    /// −‖k‖₂ (Devoto et al., arXiv 2406.11430).
    L2Norm,
    /// −cos(k, mean of k / ‖k‖ over all rows) (KeyDiff, arXiv 2504.15364).
    KeyDiff,
    /// Rank in its lag of how much the channels of k and v scatter, in the ranges of the next lag (LagKV, arXiv 2504.04704).
    LagKv,
    /// ‖v‖₂ / ‖k‖₂ (PagedEviction, arXiv 2509.04377).
    ValueKeyRatio,
}

impl KeyMethod {
    /// Whether it reads values.
    pub fn needs_values(self) -> bool {
        matches!(self, Self::LagKv | Self::ValueKeyRatio)
    }
}

/// Inputs of [`score_keys`]; names as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct KeysInput<'a> {
    /// B.
    pub seqs: usize,
    /// Hk.
    pub kv_heads: usize,
    /// T.
    pub rows: usize,
    /// d, above 0.
    pub head_dim: usize,
    /// dv, above 0.
    pub value_dim: usize,
    /// `[B, Hk, T, d]`.
    pub k: &'a [f32],
    /// `[B, Hk, T, dv]`, where the method needs it ([`KeyMethod::needs_values`]); else it is not read.
    pub v: Option<&'a [f32]>,
    /// How.
    pub method: KeyMethod,
}

impl KeysInput<'_> {
    /// Checks sizes.
    ///
    /// # Errors
    /// A tensor of the wrong size, rows of no dimensions (`LagKv`: of less than 2, which have no unbiased deviation), no v where
    /// it is needed.
    pub fn check(&self) -> Result<(), ReferenceError> {
        let rows_of = |name, x: &[f32], dim| {
            let least = if self.method == KeyMethod::LagKv { 2 } else { 1 };
            if dim < least {
                return value(name, format!("its rows have {dim} dimensions; they must have at least {least}"));
            }
            shape(name, x.len(), &[self.seqs, self.kv_heads, self.rows, dim])
        };
        rows_of("k", self.k, self.head_dim)?;
        match self.v {
            Some(v) => rows_of("v", v, self.value_dim),
            None if self.method.needs_values() => value("v", "the method needs it"),
            None => Ok(()),
        }
    }
}

/// Scores `[B, Hk, T]`.
///
/// `KeyDiff`: a zero key has cosine 0, and so has every key where the mean is 0. `ValueKeyRatio`: a zero value scores 0, and
/// any other value at a zero key +∞. `LagKv`: the first 4 rows, the last whole lag of 128 and what is left after it score 1;
/// every other row (its place in its lag, counted from the least) / 128, where of equals the lower row stands higher; a
/// channel that is constant in the next lag counts as 0.
///
/// A key or value row that is not finite spoils no other row: `KeyDiff` leaves it out of the mean, `LagKv` out of ranges and
/// denominators and ranks it below the rest of its lag. Its own score is what arithmetic gives, NaN for `KeyDiff`.
///
/// # Errors
/// As [`KeysInput::check`].
pub fn score_keys(i: &KeysInput<'_>) -> Result<Vec<f32>, ReferenceError> {
    i.check()?;
    let mut scores = Vec::with_capacity(i.seqs * i.kv_heads * i.rows);
    for head in 0..i.seqs * i.kv_heads {
        let of = |x: &[f32], dim: usize| -> Vec<Vec<f64>> {
            let rows = x[head * i.rows * dim..][..i.rows * dim].chunks_exact(dim);
            rows.map(|row| row.iter().copied().map(f64::from).collect()).collect()
        };
        let keys = of(i.k, i.head_dim);
        let values = || of(i.v.unwrap_or_default(), i.value_dim);
        let own: Vec<f64> = match i.method {
            KeyMethod::L2Norm => keys.iter().map(|k| -norm(k)).collect(),
            KeyMethod::KeyDiff => keydiff(&keys),
            KeyMethod::LagKv => lagkv(&keys, &values()),
            KeyMethod::ValueKeyRatio => keys.iter().zip(&values()).map(|(k, v)| ratio(norm(v), norm(k))).collect(),
        };
        scores.extend(own.iter().map(|&x| x as f32));
    }
    Ok(scores)
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn is_finite(x: &[f64]) -> bool {
    x.iter().all(|x| x.is_finite())
}

/// 0 / 0 is 0: a value that is nothing is not worth its row.
fn ratio(v: f64, k: f64) -> f64 {
    if v == 0.0 && k == 0.0 { 0.0 } else { v / k }
}

fn keydiff(keys: &[Vec<f64>]) -> Vec<f64> {
    // The sum of directions has the direction of their mean.
    let mut anchor = vec![0.0; keys.first().map_or(0, Vec::len)];
    for key in keys.iter().filter(|key| is_finite(key)) {
        let length = norm(key);
        if length > 0.0 {
            anchor.iter_mut().zip(key).for_each(|(a, x)| *a += x / length);
        }
    }
    let cosine = |key: &Vec<f64>| {
        let (dot, lengths) = (key.iter().zip(&anchor).map(|(a, b)| a * b).sum::<f64>(), norm(key) * norm(&anchor));
        if lengths == 0.0 { 0.0 } else { dot / lengths }
    };
    keys.iter().map(|key| if is_finite(key) { -cosine(key) } else { f64::NAN }).collect()
}

/// Rows at the start that LagKV keeps.
const SINKS: usize = 4;
/// Rows of a lag.
const LAG: usize = 128;

fn lagkv(keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
    let mut scores = vec![1.0; keys.len()];
    let lags = keys.len().saturating_sub(SINKS) / LAG;
    // The last lag has none after it that it could be judged in.
    for start in (0..lags.saturating_sub(1)).map(|lag| SINKS + lag * LAG) {
        let next = start + LAG;
        let of = |rows: &[Vec<f64>]| scatter(&rows[start..next], &rows[next..next + LAG]);
        let both: Vec<f64> = of(keys).iter().zip(of(values)).map(|(k, v)| (k + v) / 2.0).collect();
        for (row, score) in scores[start..next].iter_mut().enumerate() {
            *score = place(&both, row) as f64 / LAG as f64;
        }
    }
    scores
}

/// Softmax over the rows of a lag of the deviation of their channels, each channel in its range over the next lag. NaN for rows
/// that are not finite.
fn scatter(rows: &[Vec<f64>], next: &[Vec<f64>]) -> Vec<f64> {
    let ranges: Vec<(f64, f64)> = (0..rows[0].len())
        .map(|c| {
            let channel = next.iter().filter(|row| is_finite(row)).map(|row| row[c]);
            channel.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
        })
        .collect();
    let scaled = |(&x, &(low, high)): (&f64, &(f64, f64))| if high > low { (x - low) / (high - low) } else { 0.0 };
    let spread = |row: &Vec<f64>| {
        if is_finite(row) { deviation(&row.iter().zip(&ranges).map(scaled).collect::<Vec<_>>()) } else { f64::NAN }
    };
    let spreads: Vec<f64> = rows.iter().map(spread).collect();
    let lse = log_sum_exp(&spreads.iter().copied().filter(|x| !x.is_nan()).collect::<Vec<_>>());
    spreads.iter().map(|x| (x - lse).exp()).collect()
}

/// Unbiased standard deviation.
fn deviation(x: &[f64]) -> f64 {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (x.len() - 1) as f64).sqrt()
}

/// How many stand below `row` in the order of scores (NaN the least, of equals the lower row the higher).
fn place(scores: &[f64], row: usize) -> usize {
    let own = scores[row];
    let below = |other: usize| {
        let score = scores[other];
        let equal = score == own || (score.is_nan() && own.is_nan());
        score < own || (score.is_nan() && !own.is_nan()) || (equal && other > row)
    };
    (0..scores.len()).filter(|&other| below(other)).count()
}
