//! A gate's scores and their derivatives, for a batch of tokens at once. Projections are f32 matrix products; what follows is
//! in f64.
//!
//! ```text
//! q = W_q x + b_q                  q̂ = q · r(q)   q' = w_q q̂         r(x) = 1 / √(mean x² + ε)
//! k = W_k x                        k̂ = k · r(k)   k' = w_k k̂
//! l = q'·k' / √D' + b              c_s = q'·base_s / √D'
//! p_g = 1 / (1 + Σ_s e^(c_s − l))  p = mean over g
//! ```

use super::{Gate, GateShape};
use crate::error::{Result, finite, shape};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// Under the root of both norms, whatever the model's own.
const EPSILON: f64 = 1e-6;
/// The least that a logarithm counts as.
const LEAST_LOG: f64 = -100.0;
/// The least that p (1 − p) is divided as.
const LEAST_VARIANCE: f64 = 1e-12;

/// Binary cross-entropy of a prediction and a target between 0 and 1.
pub(super) fn cross_entropy(p: f64, y: f64) -> f64 {
    -(y * p.ln().max(LEAST_LOG) + (1.0 - y) * (1.0 - p).ln().max(LEAST_LOG))
}

/// Loss of hidden states [T, D] against scores [H, T], the sum over heads of the mean over tokens of the binary
/// cross-entropy (soft targets, logarithms no less than −100), and its derivatives by the gate's tensors, in a gate's shape.
///
/// # Errors
/// As [`Gate::check`]; [`Error::Shape`](crate::Error::Shape) and [`Error::NotFinite`](crate::Error::NotFinite) for hidden states
/// or scores that do not do.
pub fn loss_and_gradients(gate: &Gate, hidden: &[f32], scores: &[f32]) -> Result<(f64, Gate)> {
    gate.check()?;
    let (d, h) = (gate.shape.hidden, gate.shape.kv_heads);
    let tokens = hidden.len() / d;
    shape("hidden", "[T, D]", tokens * d, hidden.len())?;
    shape("scores", "[H, T]", h * tokens, scores.len())?;
    finite("hidden", hidden, d)?;
    finite("scores", scores, tokens)?;
    let targets: Vec<f32> = (0..tokens * h).map(|i| scores[i % h * tokens + i / h]).collect();
    let mut gradients = Gate::zeros(gate.shape);
    let loss = Network::default().backward(gate, hidden, &targets, &mut gradients);
    Ok((loss, gradients))
}

/// Memory of a pass, kept from batch to batch.
#[derive(Default)]
pub(super) struct Network {
    q: Vec<f32>,
    k: Vec<f32>,
    by_q: Vec<f32>,
    by_k: Vec<f32>,
}

impl Network {
    /// Scores [n, H] of hidden states `x` [n, D].
    pub(super) fn forward(&mut self, gate: &Gate, x: &[f32]) -> Vec<f64> {
        self.project(gate, x);
        let GateShape { kv_heads, group, gate_dim, .. } = gate.shape;
        let mut head = Head::new(gate.shape);
        let rows = self.q.chunks_exact(group * gate_dim).zip(self.k.chunks_exact(gate_dim));
        rows.enumerate().map(|(i, (q, k))| head.forward(gate, i % kv_heads, q, k)).collect()
    }

    /// The loss of hidden states `x` [n, D] and targets `y` [n, H], and its gradients.
    pub(super) fn backward(&mut self, gate: &Gate, x: &[f32], y: &[f32], gradients: &mut Gate) -> f64 {
        self.project(gate, x);
        let GateShape { hidden, kv_heads, group, gate_dim, .. } = gate.shape;
        let n = y.len() / kv_heads;
        self.by_q.resize(self.q.len(), 0.0);
        self.by_k.resize(self.k.len(), 0.0);
        let (mut head, mut sums, mut loss) = (Head::new(gate.shape), Sums::new(gate), 0.0);
        for (i, &y) in y.iter().enumerate() {
            let (h, y) = (i % kv_heads, f64::from(y));
            let (at_q, at_k) = (i * group * gate_dim..(i + 1) * group * gate_dim, i * gate_dim..(i + 1) * gate_dim);
            let p = head.forward(gate, h, &self.q[at_q.clone()], &self.k[at_k.clone()]);
            loss += cross_entropy(p, y) / n as f64;
            let by_p = (p - y) / (p * (1.0 - p)).max(LEAST_VARIANCE) / n as f64;
            head.backward(gate, h, by_p, &mut sums, &mut self.by_q[at_q], &mut self.by_k[at_k]);
        }
        transposed_product(&self.by_q, x, n, [kv_heads * group * gate_dim, hidden], &mut gradients.q_proj);
        transposed_product(&self.by_k, x, n, [kv_heads * gate_dim, hidden], &mut gradients.k_proj);
        let mut by_bias = vec![0.0; gradients.q_bias.len()];
        for row in self.by_q.chunks_exact(by_bias.len()) {
            by_bias.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        let Gate { q_bias, q_norm, k_norm, k_base, b, .. } = gradients;
        for (out, sum) in
            [(q_bias, &by_bias), (q_norm, &sums.q_norm), (k_norm, &sums.k_norm), (k_base, &sums.k_base), (b, &sums.b)]
        {
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out = *sum as f32);
        }
        loss
    }

    fn project(&mut self, gate: &Gate, x: &[f32]) {
        let GateShape { hidden, kv_heads, group, gate_dim, .. } = gate.shape;
        product(x, &gate.q_proj, hidden, kv_heads * group * gate_dim, &mut self.q);
        product(x, &gate.k_proj, hidden, kv_heads * gate_dim, &mut self.k);
        for row in self.q.chunks_exact_mut(gate.q_bias.len()) {
            row.iter_mut().zip(&gate.q_bias).for_each(|(q, bias)| *q += bias);
        }
    }
}

/// x [n, width] times the transpose of weights [rows, width]: [n, rows].
fn product(x: &[f32], weights: &[f32], width: usize, rows: usize, out: &mut Vec<f32>) {
    let n = x.len() / width;
    out.resize(n * rows, 0.0);
    let (x, weights) = (MatRef::from_row_major_slice(x, n, width), MatRef::from_row_major_slice(weights, rows, width));
    matmul(MatMut::from_row_major_slice_mut(out, n, rows), Accum::Replace, x, weights.transpose(), 1.0, Par::Seq);
}

/// The transpose of `by` [n, rows] times x [n, width].
fn transposed_product(by: &[f32], x: &[f32], n: usize, [rows, width]: [usize; 2], out: &mut [f32]) {
    let (by, x) = (MatRef::from_row_major_slice(by, n, rows), MatRef::from_row_major_slice(x, n, width));
    matmul(MatMut::from_row_major_slice_mut(out, rows, width), Accum::Replace, by.transpose(), x, 1.0, Par::Seq);
}

/// Σ over tokens of derivatives by the small tensors.
struct Sums {
    q_norm: Vec<f64>,
    k_norm: Vec<f64>,
    k_base: Vec<f64>,
    b: Vec<f64>,
}

impl Sums {
    fn new(gate: &Gate) -> Self {
        let [q_norm, k_norm, k_base, b] = [&gate.q_norm, &gate.k_norm, &gate.k_base, &gate.b].map(|x| vec![0.0; x.len()]);
        Self { q_norm, k_norm, k_base, b }
    }
}

/// A vector before and after its norm.
#[derive(Clone)]
struct Normed {
    /// 1 / the root of the mean square.
    inverse: f64,
    hat: Vec<f64>,
    out: Vec<f64>,
    /// The derivative by `out`.
    by: Vec<f64>,
}

impl Normed {
    fn new(dim: usize) -> Self {
        Self { inverse: 0.0, hat: vec![0.0; dim], out: vec![0.0; dim], by: vec![0.0; dim] }
    }

    fn forward(&mut self, x: &[f32], weights: &[f32]) {
        let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
        self.inverse = 1.0 / (squares / x.len() as f64 + EPSILON).sqrt();
        for (i, (x, w)) in x.iter().zip(weights).enumerate() {
            self.hat[i] = f64::from(*x) * self.inverse;
            self.out[i] = self.hat[i] * f64::from(*w);
        }
    }

    /// From the derivative by `out` to those by the weights, which are added up, and by x.
    fn backward(&self, weights: &[f32], by_weights: &mut [f64], by_x: &mut [f32]) {
        let mut mean = 0.0;
        for (i, w) in weights.iter().enumerate() {
            by_weights[i] += self.by[i] * self.hat[i];
            mean += f64::from(*w) * self.by[i] * self.hat[i] / weights.len() as f64;
        }
        for (i, w) in weights.iter().enumerate() {
            by_x[i] = (self.inverse * (f64::from(*w) * self.by[i] - self.hat[i] * mean)) as f32;
        }
    }
}

/// One kv head of one token.
struct Head {
    k: Normed,
    q: Vec<Normed>,
    /// p_g.
    own: Vec<f64>,
    /// Softmax of c over the sinks, [G, S].
    sinks: Vec<f64>,
}

impl Head {
    fn new(shape: GateShape) -> Self {
        let normed = Normed::new(shape.gate_dim);
        let (own, sinks) = (vec![0.0; shape.group], vec![0.0; shape.group * shape.sinks]);
        Self { k: normed.clone(), q: vec![normed; shape.group], own, sinks }
    }

    /// The score of a token in a head, from its projections q [G, D'] and k [D'].
    fn forward(&mut self, gate: &Gate, head: usize, q: &[f32], k: &[f32]) -> f64 {
        let GateShape { group, gate_dim, sinks, .. } = gate.shape;
        let root = (gate_dim as f64).sqrt();
        let base = &gate.k_base[head * sinks * gate_dim..][..sinks * gate_dim];
        self.k.forward(k, &gate.k_norm);
        for (g, q) in q.chunks_exact(gate_dim).enumerate() {
            let normed = &mut self.q[g];
            normed.forward(q, &gate.q_norm);
            let dot: f64 = normed.out.iter().zip(&self.k.out).map(|(q, k)| q * k).sum();
            let logit = dot / root + f64::from(gate.b[head * group + g]);
            let weights = &mut self.sinks[g * sinks..][..sinks];
            let mut largest = f64::NEG_INFINITY;
            for (c, key) in weights.iter_mut().zip(base.chunks_exact(gate_dim)) {
                *c = normed.out.iter().zip(key).map(|(q, k)| q * f64::from(*k)).sum::<f64>() / root;
                largest = largest.max(*c);
            }
            weights.iter_mut().for_each(|c| *c = (*c - largest).exp());
            let sum: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|c| *c /= sum);
            self.own[g] = 1.0 / (1.0 + (largest + sum.ln() - logit).exp());
        }
        self.own.iter().sum::<f64>() / group as f64
    }

    /// After [`Self::forward`] of the same token: from the derivative by the score to those by q, k and the small tensors.
    fn backward(&mut self, gate: &Gate, head: usize, by_p: f64, sums: &mut Sums, by_q: &mut [f32], by_k: &mut [f32]) {
        let GateShape { group, gate_dim, sinks, .. } = gate.shape;
        let root = (gate_dim as f64).sqrt();
        let at = head * sinks * gate_dim;
        self.k.by.fill(0.0);
        for (g, by_q) in by_q.chunks_exact_mut(gate_dim).enumerate() {
            let own = self.own[g];
            let by_logit = by_p / group as f64 * own * (1.0 - own);
            sums.b[head * group + g] += by_logit;
            let normed = &mut self.q[g];
            for j in 0..gate_dim {
                normed.by[j] = by_logit / root * self.k.out[j];
                self.k.by[j] += by_logit / root * normed.out[j];
            }
            for (s, weight) in self.sinks[g * sinks..][..sinks].iter().enumerate() {
                let by_sink = -by_logit * weight / root;
                let keys = at + s * gate_dim..at + (s + 1) * gate_dim;
                for (by, key) in normed.by.iter_mut().zip(&gate.k_base[keys.clone()]) {
                    *by += by_sink * f64::from(*key);
                }
                for (sum, q) in sums.k_base[keys].iter_mut().zip(&normed.out) {
                    *sum += by_sink * q;
                }
            }
            normed.backward(&gate.q_norm, &mut sums.q_norm, by_q);
        }
        self.k.backward(&gate.k_norm, &mut sums.k_norm, by_k);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropies_are_those_worked_out_by_hand() {
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-7, "{a} and {b}");
        near(cross_entropy(0.8, 0.3), 1.193_549_6);
        near(cross_entropy(0.2, 0.3), 0.639_031_9);
        // Logarithms are cut off.
        near(cross_entropy(0.0, 1.0), 100.0);
        near(cross_entropy(1.0, 0.25), 75.0);
        near(cross_entropy(0.0, 0.0), 0.0);
    }

    /// A batch's scores are the reference's.
    #[test]
    fn scores_are_those_of_the_reference() {
        let shape = GateShape { hidden: 9, kv_heads: 3, group: 2, gate_dim: 4, sinks: 3 };
        let mut gate = Gate::init(shape, 1, 0).unwrap();
        gate.k_base.iter_mut().enumerate().for_each(|(i, x)| *x = (i as f32 * 0.7).sin());
        gate.b[3] = 2.0;
        let x: Vec<f32> = (0..9 * 11).map(|i| (i as f32 * 1.3).cos()).collect();
        let expected = gate.score(&x, kvlar_reference::Dtype::F32).unwrap();
        for (i, p) in Network::default().forward(&gate, &x).into_iter().enumerate() {
            assert!((p - f64::from(expected[i % 3 * 11 + i / 3])).abs() < 1e-6);
        }
        // A sink far above the token's own key: 0, not NaN.
        gate.k_base.fill(f32::MAX);
        assert!(Network::default().forward(&gate, &x).iter().all(|p| (0.0..=1.0).contains(p)));
    }
}
