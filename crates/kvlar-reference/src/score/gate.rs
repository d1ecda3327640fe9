//! The gate of Fast KVzip: importance of a token from its hidden state alone.

use crate::Dtype;
use crate::error::{ReferenceError, shape, value};

/// Under the root of both norms, whatever the model's own.
const EPSILON: f64 = 1e-6;

/// A layer's gate; tensors as the released files name and shape them.
#[derive(Clone, Copy, Debug)]
pub struct Gate<'a> {
    /// D, above 0.
    pub hidden_dim: usize,
    /// H, above 0.
    pub kv_heads: usize,
    /// G: query heads a kv head, above 0.
    pub group: usize,
    /// D': the gate's own dimension, above 0.
    pub gate_dim: usize,
    /// S: learned sink keys, above 0.
    pub sinks: usize,
    /// `q_proj.weight` `[H·G·D', D]`: row (h·G + g)·D' + j.
    pub q_proj: &'a [f32],
    /// `q_proj.bias` `[H·G·D']`.
    pub q_bias: &'a [f32],
    /// `k_proj.weight` `[H·D', D]`.
    pub k_proj: &'a [f32],
    /// `q_norm.weight` `[D']`, of all heads.
    pub q_norm: &'a [f32],
    /// `k_norm.weight` `[D']`, of all heads.
    pub k_norm: &'a [f32],
    /// `k_base` `[H, 1, S, D']`: sink keys, not normalised.
    pub k_base: &'a [f32],
    /// `b` `[H, 1, G]`, added to the logit of the token's own key.
    pub b: &'a [f32],
}

impl Gate<'_> {
    /// Checks sizes and values.
    ///
    /// # Errors
    /// A tensor of the wrong size, a size of 0, a weight that is not finite.
    pub fn check(&self) -> Result<(), ReferenceError> {
        let Self { hidden_dim: d, kv_heads: h, group: g, gate_dim, sinks, .. } = *self;
        for (name, size) in
            [("hidden", d), ("k_proj.weight", h), ("q_proj.weight", g), ("q_norm.weight", gate_dim), ("k_base", sinks)]
        {
            if size == 0 {
                return value(name, "it has a dimension of 0");
            }
        }
        let tensors: [(&'static str, &[f32], &[usize]); 7] = [
            ("q_proj.weight", self.q_proj, &[h * g * gate_dim, d]),
            ("q_proj.bias", self.q_bias, &[h * g * gate_dim]),
            ("k_proj.weight", self.k_proj, &[h * gate_dim, d]),
            ("q_norm.weight", self.q_norm, &[gate_dim]),
            ("k_norm.weight", self.k_norm, &[gate_dim]),
            ("k_base", self.k_base, &[h, 1, sinks, gate_dim]),
            ("b", self.b, &[h, 1, g]),
        ];
        for (name, values, expected) in tensors {
            shape(name, values.len(), expected)?;
            if let Some(bad) = values.iter().find(|x| !x.is_finite()) {
                return value(name, format!("{bad} is not finite"));
            }
        }
        Ok(())
    }
}

/// `x` as a tensor of type `dtype` holds it; f32 stands for no rounding at all.
fn rounded(x: f64, dtype: Dtype) -> f64 {
    if dtype == Dtype::F32 { x } else { f64::from(dtype.round(x as f32)) }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A head's projection of a token: weights `[D', D]`, biases `[D']` if it has them.
fn project(x: &[f32], weights: &[f32], bias: Option<&[f32]>, dtype: Dtype) -> Vec<f64> {
    let row = |(j, row): (usize, &[f32])| crate::attend::dot(x, row) + bias.map_or(0.0, |bias| f64::from(bias[j]));
    weights.chunks_exact(x.len()).enumerate().map(row).map(|x| rounded(x, dtype)).collect()
}

/// RMS norm; the normalised value is rounded before it is multiplied.
fn normalised(x: &[f64], weights: &[f32], dtype: Dtype) -> Vec<f64> {
    let rms = (dot(x, x) / x.len() as f64 + EPSILON).sqrt();
    x.iter().zip(weights).map(|(x, &w)| rounded(x / rms, dtype) * f64::from(w)).collect()
}

/// Scores `[H, T]` of hidden states `[T, D]`, which are what the layer's attention takes (after its input norm): the softmax
/// weight of the token's own key against the gate's sink keys, mean over the group (Fast KVzip, arXiv 2601.17668; its released
/// inference code, which adds b once, to the logit).
///
/// Tensors are taken as they are; projections and normalised values are rounded to `dtype`, for f32 not at all. A hidden row
/// that is not finite scores 0, and so does a token in a head where a projection is not finite in `dtype`.
///
/// # Errors
/// As [`Gate::check`]; hidden states that are no whole rows.
pub fn score_gate(hidden: &[f32], gate: &Gate<'_>, dtype: Dtype) -> Result<Vec<f32>, ReferenceError> {
    gate.check()?;
    if !hidden.len().is_multiple_of(gate.hidden_dim) {
        return value("hidden", format!("{} values are no rows of {}", hidden.len(), gate.hidden_dim));
    }
    let tokens = || hidden.chunks_exact(gate.hidden_dim);
    let score = |head: usize, x: &[f32]| if x.iter().all(|x| x.is_finite()) { head_score(gate, head, x, dtype) } else { 0.0 };
    Ok((0..gate.kv_heads).flat_map(|head| tokens().map(move |x| score(head, x) as f32)).collect())
}

fn head_score(gate: &Gate<'_>, head: usize, x: &[f32], dtype: Dtype) -> f64 {
    let (d, dim, group) = (gate.hidden_dim, gate.gate_dim, gate.group);
    let sinks: Vec<f64> = gate.k_base[head * gate.sinks * dim..][..gate.sinks * dim].iter().copied().map(f64::from).collect();
    let key = project(x, &gate.k_proj[head * dim * d..][..dim * d], None, dtype);
    let key = normalised(&key, gate.k_norm, dtype);
    let root = (dim as f64).sqrt();
    let weight = |query_head: usize| {
        let (first, bias) = (query_head * dim, &gate.q_bias[query_head * dim..][..dim]);
        let query = project(x, &gate.q_proj[first * d..][..dim * d], Some(bias), dtype);
        let query = normalised(&query, gate.q_norm, dtype);
        let own = dot(&query, &key) / root + f64::from(gate.b[query_head]);
        // Where this overflows the weight is 0.
        1.0 / (1.0 + sinks.chunks_exact(dim).map(|sink| (dot(&query, sink) / root - own).exp()).sum::<f64>())
    };
    let mean = (head * group..(head + 1) * group).map(weight).sum::<f64>() / group as f64;
    if mean.is_nan() { 0.0 } else { mean }
}
