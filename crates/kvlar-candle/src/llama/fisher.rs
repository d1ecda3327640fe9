//! How much the language-model loss depends on each layer's keys and values: the importances that rank budgets follow.
//!
//! ReCalKV (arXiv 2505.24357), as its released code takes it from Palu: for each `k_proj` and `v_proj` matrix, the mean
//! over its elements of √(mean over windows of gradient²) — the root, not the empirical Fisher information itself. Two
//! things differ from that code. The loss is that of the next token; the released scripts shift the labels once more than
//! they should and score the token after it. And a window is a batch of one, so that memory does not grow with the batch.

use super::Llama;
use super::model::{Layer, Linear};
use crate::{EngineError, Result};
use candle_core::backprop::GradStore;
use candle_core::{D, Device, Tensor, Var};
use candle_nn::ops::{log_softmax, rms_norm_slow, silu};

/// Rows whose logits exist at a time: `[rows, vocab]` floats, a few times.
const LOSS_ROWS: usize = 256;

/// Query rows that attend at a time, to the keys up to the last of them: half the work and memory of a square.
const SCORE_ROWS: usize = 256;

/// Derivatives of one window's loss.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Mean of −ln p over the window's tokens but the first.
    pub loss: f64,
    /// Of each layer, by W_k and by W_v: `[hidden, Hk·d]`, the transposes of the checkpoint's.
    pub layers: Vec<[Tensor; 2]>,
}

/// Importances of keys and values, gathered window by window.
#[derive(Debug, Default)]
pub struct Fisher {
    /// Of each layer, Σ over windows of gradient².
    squares: Vec<[Tensor; 2]>,
    windows: usize,
}

impl Fisher {
    /// Of no windows yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Windows added.
    pub fn windows(&self) -> usize {
        self.windows
    }

    /// Adds the gradients of one window; all windows must be the same model's. Returns the window's loss.
    ///
    /// # Errors
    /// As [`Llama::gradients`], and [`EngineError::Input`] for a loss or a gradient that is not finite; nothing is added then.
    pub fn add(&mut self, model: &Llama, tokens: &[u32]) -> Result<f64> {
        let Gradients { loss, layers } = model.gradients(tokens)?;
        if !loss.is_finite() {
            return Err(EngineError::Input(format!("the loss is {loss}; weights or activations of the model are not finite")));
        }
        let mut squares = Vec::new();
        // From the last layer, as derivatives pass from layer to layer: what is not finite is named where it begins.
        for (i, [k, v]) in layers.iter().enumerate().rev() {
            let mut pair = [k.sqr()?, v.sqr()?];
            for (x, name) in pair.iter().zip(["k_proj", "v_proj"]) {
                if !x.sum_all()?.to_scalar::<f32>()?.is_finite() {
                    let problem = format!("layer {i}: the loss has no finite gradient by {name}; its square overflows f32");
                    return Err(EngineError::Input(problem));
                }
            }
            if let Some(sums) = self.squares.get(i) {
                pair = [(&pair[0] + &sums[0])?, (&pair[1] + &sums[1])?];
            }
            squares.push(pair);
        }
        squares.reverse();
        self.squares = squares;
        self.windows += 1;
        Ok(loss)
    }

    /// Of each layer, the importance of `[keys, values]`: mean over elements of √(mean over windows of gradient²). Empty
    /// if no window was added.
    ///
    /// # Errors
    /// If tensor arithmetic fails.
    pub fn importance(&self) -> Result<Vec<[f64; 2]>> {
        let of = |sums: &Tensor| -> Result<f64> {
            let root = (sums / self.windows as f64)?.sqrt()?;
            Ok(f64::from(root.mean_all()?.to_scalar::<f32>()?))
        };
        self.squares.iter().map(|[k, v]| Ok([of(k)?, of(v)?])).collect()
    }
}

/// The derivative by a variable; zeros where nothing depends on it.
fn take(grads: &mut GradStore, var: &Var) -> Result<Tensor> {
    Ok(match grads.remove(var) {
        Some(g) => g.detach(),
        None => var.zeros_like()?.detach(),
    })
}

impl Llama {
    /// The language-model loss of one window of n tokens, and its derivatives by every layer's W_k and W_v.
    ///
    /// Only the layers' inputs (L · n · D floats) are kept on the way up; on the way down each layer is run once more, so
    /// that one layer's graph exists at a time: some five times Hq · n² floats.
    ///
    /// # Errors
    /// [`EngineError::Input`] for fewer than two tokens or a token beyond the vocabulary.
    pub fn gradients(&self, tokens: &[u32]) -> Result<Gradients> {
        if tokens.len() < 2 {
            return Err(EngineError::Input(format!("a loss of {} tokens: it needs two", tokens.len())));
        }
        self.check_tokens(tokens)?;
        let mut x = self.embedding.index_select(&Tensor::new(tokens, &Device::Cpu)?, 0)?;
        let mut inputs = Vec::new();
        for layer in &self.layers {
            inputs.push(x.clone());
            x = self.differentiable(layer, &x, &layer.k.weight, &layer.v.weight)?;
        }
        let (loss, mut upstream) = self.loss(&x, tokens)?;
        let mut layers = Vec::new();
        for (layer, input) in self.layers.iter().zip(inputs).rev() {
            let [x, k, v] = [&input, &layer.k.weight, &layer.v.weight].map(Var::from_tensor);
            let (x, k, v) = (x?, k?, v?);
            // Its derivatives are the loss's own: those of this layer's output, times the loss's by that output.
            let y = (self.differentiable(layer, &x, &k, &v)? * &upstream)?.sum_all()?;
            let mut grads = y.backward()?;
            layers.push([take(&mut grads, &k)?, take(&mut grads, &v)?]);
            upstream = take(&mut grads, &x)?;
        }
        layers.reverse();
        Ok(Gradients { loss, layers })
    }

    /// The loss of the last layer's output, and its derivative by that output.
    fn loss(&self, x: &Tensor, tokens: &[u32]) -> Result<(f64, Tensor)> {
        let predicted = tokens.len() - 1;
        let (mut loss, mut parts) = (0.0, Vec::new());
        for first in (0..predicted).step_by(LOSS_ROWS) {
            let rows = LOSS_ROWS.min(predicted - first);
            let x = Var::from_tensor(&x.narrow(0, first, rows)?)?;
            let logits = self.head.apply(&rms_norm_slow(&x, &self.norm, self.config().eps as f32)?)?;
            let next = Tensor::new(&tokens[first + 1..][..rows], x.device())?.unsqueeze(1)?;
            let nll = (log_softmax(&logits, D::Minus1)?.gather(&next, 1)?.sum_all()? * (-1.0 / predicted as f64))?;
            loss += f64::from(nll.to_scalar::<f32>()?);
            let mut grads = nll.backward()?;
            parts.push(take(&mut grads, &x)?);
        }
        // Nothing is predicted from the last token.
        parts.push(x.narrow(0, predicted, 1)?.zeros_like()?);
        Ok((loss, Tensor::cat(&parts, 0)?))
    }

    /// One layer on `[n, D]` from position 0, in operations that have derivatives; the model's own, faster ones do not.
    fn differentiable(&self, layer: &Layer, x: &Tensor, wk: &Tensor, wv: &Tensor) -> Result<Tensor> {
        let c = self.config();
        let (n, eps) = (x.dim(0)?, c.eps as f32);
        let h = rms_norm_slow(x, &layer.input_norm, eps)?;
        let heads = |weight: &Tensor, bias: &Option<Tensor>, count: usize| -> Result<Tensor> {
            let linear = Linear { weight: weight.clone(), bias: bias.clone() };
            Ok(linear.apply(&h)?.reshape((n, count, c.head_dim))?)
        };
        let mut q = heads(&layer.q.weight, &layer.q.bias, c.heads)?;
        let mut k = heads(wk, &layer.k.bias, c.kv_heads)?;
        let v = heads(wv, &layer.v.bias, c.kv_heads)?;
        if let Some((q_norm, k_norm)) = &layer.qk_norms {
            q = rms_norm_slow(&q, q_norm, eps)?;
            k = rms_norm_slow(&k, k_norm, eps)?;
        }
        let (q, k) = (self.rotate(&q, 0)?, self.rotate(&k, 0)?);
        let attended = self.differentiable_attention(&q, &k, &v)?.flatten_from(1)?;
        let x = (x + layer.out.apply(&attended)?)?;
        let h = rms_norm_slow(&x, &layer.mlp_norm, eps)?;
        let gated = (silu(&layer.gate.apply(&h)?)? * layer.up.apply(&h)?)?;
        Ok((x + layer.down.apply(&gated)?)?)
    }

    /// Causal attention of q `[n, Hq, d]`, k (rotated) and v `[n, Hk, d]`.
    fn differentiable_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let c = self.config();
        let (n, group) = (q.dim(0)?, c.heads / c.kv_heads);
        let (keys, values) = (k.permute((1, 2, 0))?.contiguous()?, v.transpose(0, 1)?.contiguous()?);
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        let mut parts = Vec::new();
        for first in (0..n).step_by(SCORE_ROWS) {
            let rows = SCORE_ROWS.min(n - first);
            let last = first + rows;
            // [Hk, group · rows, d] against [Hk, d, last].
            let q = q.narrow(0, first, rows)?.transpose(0, 1)?.contiguous()?.reshape((c.kv_heads, group * rows, c.head_dim))?;
            let scores = (q.matmul(&keys.narrow(2, 0, last)?.contiguous()?)? * scale)?;
            let scores = scores.reshape((c.kv_heads, group, rows, last))?.broadcast_add(&self.mask(first, rows)?)?;
            let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.reshape((c.kv_heads, group * rows, last))?;
            let out = weights.matmul(&values.narrow(1, 0, last)?.contiguous()?)?;
            parts.push(out.reshape((c.heads, rows, c.head_dim))?.transpose(0, 1)?.contiguous()?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// What is added to the scores of some queries, `[rows, first + rows]`: −∞ where a query does not see a key.
    fn mask(&self, first: usize, rows: usize) -> Result<Tensor> {
        let (window, last) = (self.config().window as usize, first + rows);
        let hidden = |row: usize, t: usize| t > row || (window > 0 && row - t >= window);
        let mask = (first..last).flat_map(|row| (0..last).map(move |t| if hidden(row, t) { f32::NEG_INFINITY } else { 0.0 }));
        Ok(Tensor::from_vec(mask.collect::<Vec<f32>>(), (rows, last), &Device::Cpu)?)
    }
}
