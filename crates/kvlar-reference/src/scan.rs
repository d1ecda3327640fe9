//! Logits of every cached row, over encoded keys.

use crate::Dtype;
use crate::attend::{check_lengths, dot, length_of};
use crate::error::{ReferenceError, shape, value};
use crate::storage::{Storage, Tiers, quantize_heads};

/// Inputs of [`scan`]; names and defaults as in `OPS.md`.
#[derive(Clone, Debug)]
pub struct ScanInput<'a> {
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
    /// `[B, Hq, d]`, rotated.
    pub q: &'a [f32],
    /// `[B, Hk, T, d]`, rotated.
    pub k: &'a [f32],
    /// How keys are stored.
    pub keys: Storage<'a>,
    /// `[B]` or `[B, Hk]`; default T.
    pub lengths: Option<&'a [i32]>,
    /// Default 1/√d.
    pub scale: Option<f64>,
}

/// What a scan gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Scanned {
    /// `[B, Hq, T]`; −∞ beyond a length.
    pub logits: Vec<f32>,
    /// `[B, Hq]`: the natural log of Σ exp(logit) over the rows of a length; −∞ for none.
    pub lse: Vec<f32>,
    /// `[B, Hk, T, d]`: keys as they are read; 0 beyond a length.
    pub k_decoded: Vec<f32>,
}

/// logit = scale · q·decode(encode(k)) of every row (HCAttention, arXiv 2507.19823 §3), in f64.
///
/// # Errors
/// A tensor of the wrong size, heads that do not divide, a length outside 0..=T; a format, scales or codebooks that do not fit
/// ([`Storage::heads`]).
pub fn scan(i: &ScanInput<'_>) -> Result<Scanned, ReferenceError> {
    let (dims, d) = ([i.seqs, i.kv_heads, i.rows], i.head_dim);
    if i.kv_heads == 0 || !i.q_heads.is_multiple_of(i.kv_heads) {
        return value("q", format!("{} query heads are not a multiple of {} kv heads", i.q_heads, i.kv_heads));
    }
    shape("q", i.q.len(), &[i.seqs, i.q_heads, d])?;
    shape("k", i.k.len(), &[i.seqs, i.kv_heads, i.rows, d])?;
    check_lengths(i.lengths, dims)?;
    let keys = quantize_heads(i.k, (dims, d), &i.keys, Tiers::none(Dtype::F32), i.lengths)?.decoded;
    let scale = i.scale.unwrap_or(1.0 / (d as f64).sqrt());
    let mut out = Scanned { logits: Vec::with_capacity(i.seqs * i.q_heads * i.rows), lse: Vec::new(), k_decoded: Vec::new() };
    for (b, head) in (0..i.seqs).flat_map(|b| (0..i.q_heads).map(move |h| (b, h))) {
        let h = head / (i.q_heads / i.kv_heads);
        let n = length_of(i.lengths, dims, b, h);
        let q = &i.q[(b * i.q_heads + head) * d..][..d];
        let rows = keys[(b * i.kv_heads + h) * i.rows * d..][..n * d].chunks_exact(d);
        let logits: Vec<f64> = rows.map(|key| scale * dot(q, key)).collect();
        out.lse.push(log_sum_exp(&logits) as f32);
        out.logits.extend(logits.iter().map(|&x| x as f32));
        out.logits.resize(out.logits.len() + i.rows - n, f32::NEG_INFINITY);
    }
    Ok(Scanned { k_decoded: keys, ..out })
}

/// ln Σ exp(x); NaN if there is one.
pub(crate) fn log_sum_exp(x: &[f64]) -> f64 {
    let top = x.iter().fold(f64::NEG_INFINITY, |top, &x| if top.is_nan() || x.is_nan() { f64::NAN } else { top.max(x) });
    if top == f64::NEG_INFINITY { top } else { top + x.iter().map(|x| (x - top).exp()).sum::<f64>().ln() }
}
