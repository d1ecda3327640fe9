//! What attention over a store differs by from attention over an exact one, layer by layer.

use super::evaluate::{CHUNK, end_of_prompt};
use super::{Llama, Logits};
use crate::store::most_at_once;
use crate::{KvShape, KvStore, Moment, Result};
use candle_core::{Device, Tensor};

/// Errors of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LayerError {
    /// Σ ‖o − o*‖² and Σ ‖o*‖² over the outputs of attention.
    squares: [f64; 2],
    /// Σ over heads and queries of the variance of logit errors, and of how many.
    noise: Option<(f64, usize)>,
}

impl LayerError {
    /// √(Σ‖o − o*‖² / Σ‖o*‖²); 0 where both are 0.
    pub fn attention(&self) -> f64 {
        relative(self.squares)
    }

    /// Logit noise: the standard deviation of scale · q·k − scale · q·k* over the rows that a query sees, k being a key as
    /// stored and k* that of the exact store; root mean square over heads and queries. A shift of all of a query's logits is
    /// none. Above some 0.3 a loss in tasks is to be expected (it multiplies weights by random factors of e^noise).
    /// `None`: a store cannot give its keys. NaN if a logit is.
    pub fn logit_noise(&self) -> Option<f64> {
        self.noise.map(|(sum, n)| (sum / n.max(1) as f64).sqrt())
    }
}

/// Errors of all layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AttentionError {
    /// Layer by layer.
    pub layers: Vec<LayerError>,
}

impl AttentionError {
    /// √(Σ‖o − o*‖² / Σ‖o*‖²), the sums over all layers.
    pub fn relative(&self) -> f64 {
        relative(self.layers.iter().fold([0.0; 2], |sum, l| [sum[0] + l.squares[0], sum[1] + l.squares[1]]))
    }

    /// The noise of the layer where it is largest; NaN if it is NaN anywhere, `None` if a layer has none.
    pub fn largest_noise(&self) -> Option<f64> {
        let all: Option<Vec<f64>> = self.layers.iter().map(LayerError::logit_noise).collect();
        all?.into_iter().reduce(|a, b| if a.is_nan() || a > b { a } else { b })
    }

    /// Adds what was measured on another text.
    pub fn add(&mut self, other: &Self) {
        if self.layers.is_empty() {
            self.layers.clone_from(&other.layers);
            return;
        }
        for (l, o) in self.layers.iter_mut().zip(&other.layers) {
            l.squares = [l.squares[0] + o.squares[0], l.squares[1] + o.squares[1]];
            l.noise = l.noise.zip(o.noise).map(|((a, n), (b, m))| (a + b, n + m));
        }
    }
}

fn relative([lost, all]: [f64; 2]) -> f64 {
    if lost == 0.0 { 0.0 } else { (lost / all).sqrt() }
}

/// Two stores fed the same rows and queries; the model goes on with the first one's results.
struct Compared<'a> {
    exact: &'a mut dyn KvStore,
    other: &'a mut dyn KvStore,
    shape: KvShape,
    layers: Vec<LayerError>,
    /// Tokens of the step that has begun.
    step: usize,
    /// Tokens from which logits are compared next: reading all keys back takes longer than a short step.
    next: usize,
    /// Whether those of this step are.
    noisy: bool,
}

impl KvStore for Compared<'_> {
    fn len(&self) -> usize {
        self.exact.len()
    }
    fn begin(&mut self, new: usize) -> Result<()> {
        self.exact.begin(new)?;
        self.other.begin(new).inspect_err(|_| self.exact.cancel())?;
        self.step = new;
        self.noisy = self.len() >= self.next;
        if self.noisy {
            self.next = self.len() + CHUNK;
        }
        Ok(())
    }
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.exact.append(layer, k, v)?;
        self.other.append(layer, k, v)
    }
    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.exact.attend(layer, q)?, self.other.attend(layer, q)?);
        let noise = if self.noisy { Some(self.noise(layer, q)?) } else { None };
        let sums = &mut self.layers[layer];
        sums.squares[0] += f64::from((&b - &a)?.sqr()?.sum_all()?.to_scalar::<f32>()?);
        sums.squares[1] += f64::from(a.sqr()?.sum_all()?.to_scalar::<f32>()?);
        if let Some(noise) = noise {
            sums.noise = sums.noise.zip(noise).map(|((a, n), (b, m))| (a + b, n + m));
        }
        Ok(a)
    }
    fn observe(&mut self, layer: usize, hidden: &Tensor, q: &Tensor, prompt: bool) -> Result<()> {
        self.exact.observe(layer, hidden, q, prompt)?;
        self.other.observe(layer, hidden, q, prompt)
    }
    fn evict(&mut self, moment: Moment) -> Result<()> {
        self.exact.evict(moment)?;
        self.other.evict(moment)
    }
    fn prompt_chunk(&self) -> usize {
        self.other.prompt_chunk()
    }
    fn wants_scores(&self) -> bool {
        self.other.wants_scores()
    }
    fn give_scores(&mut self, layer: usize, scores: &[f32]) -> Result<()> {
        self.other.give_scores(layer, scores)
    }
    fn max_step(&self) -> usize {
        self.exact.max_step().min(self.other.max_step())
    }
    fn rollback(&self) -> usize {
        self.exact.rollback().min(self.other.rollback())
    }
    fn finish(&mut self) -> Result<()> {
        self.exact.finish()?;
        self.other.finish()
    }
    fn cancel(&mut self) {
        self.exact.cancel();
        self.other.cancel();
    }
    fn truncate(&mut self, rows: usize) -> Result<()> {
        self.exact.truncate(rows)?;
        self.other.truncate(rows)
    }
    fn bytes(&self) -> usize {
        self.other.bytes()
    }
}

impl Compared<'_> {
    /// Σ over heads and queries of the variance of logit errors, and how many those are.
    fn noise(&self, layer: usize, q: &Tensor) -> Result<Option<(f64, usize)>> {
        let (Some(exact), Some(stored)) = (self.exact.decoded_keys(layer)?, self.other.decoded_keys(layer)?) else {
            return Ok(None);
        };
        let KvShape { q_heads, kv_heads, head_dim, window, .. } = self.shape;
        let (new, total, group) = (self.step, self.len() + self.step, q_heads / kv_heads);
        // The difference first: logits are large, their errors are not.
        let errors: Vec<f32> = stored.iter().zip(&exact).map(|(k, exact)| k - exact).collect();
        let errors = Tensor::from_vec(errors, (total, kv_heads, head_dim), &Device::Cpu)?;
        let errors = errors.permute((1, 2, 0))?.contiguous()?;
        let q = q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, group * new, head_dim))?;
        let logits = q.matmul(&errors)?.flatten_all()?.to_vec1::<f32>()?;
        let (scale, mut sum) = (1.0 / (head_dim as f64).sqrt(), 0.0);
        for (i, row) in logits.chunks_exact(total).enumerate() {
            let position = total - new + i % new;
            let hidden = if window > 0 { (position + 1).saturating_sub(window as usize) } else { 0 };
            sum += variance(&row[hidden..=position]) * scale * scale;
        }
        Ok(Some((sum, q_heads * new)))
    }
}

/// Mean squared deviation from the mean.
fn variance(x: &[f32]) -> f64 {
    let n = x.len().max(1) as f64;
    let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
    x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n
}

/// Errors of attention for the second half of `tokens` after a prefill of the first: `other` against `exact`, both of which
/// see the same rows and queries. Both must be empty. Logit noise is measured on the steps that bring every 64th token.
///
/// # Errors
/// What the model or a store refuses.
pub fn attention_error(
    model: &Llama,
    exact: &mut dyn KvStore,
    other: &mut dyn KvStore,
    tokens: &[u32],
) -> Result<AttentionError> {
    let (context, rest) = tokens.split_at(tokens.len() / 2);
    let shape = model.kv_shape();
    let layers = vec![LayerError { squares: [0.0; 2], noise: Some((0.0, 0)) }; shape.layers];
    let mut both = Compared { exact, other, shape, layers, step: 0, next: 0, noisy: false };
    model.prefill(&mut both, context, Logits::Last)?;
    end_of_prompt(model, &mut both, context)?;
    // The prefill attends without a store.
    both.next = context.len();
    for chunk in rest.chunks(CHUNK.min(most_at_once(&both))) {
        model.extend(&mut both, chunk, Logits::Last)?;
        both.evict(Moment::Decode)?;
    }
    Ok(AttentionError { layers: both.layers })
}

#[cfg(test)]
#[path = "attention_error/tests.rs"]
mod tests;
