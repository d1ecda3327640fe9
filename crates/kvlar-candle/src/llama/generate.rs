//! Continuing a text.

use super::evaluate::end_of_prompt;
use super::{Llama, Logits};
use crate::{EngineError, KvStore, Moment, Result};
use candle_core::Tensor;
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The likeliest.
    Greedy,
    /// At random, by softmax(logits / temperature), among the fewest tokens whose probability reaches top_p.
    Random {
        /// Above 0.
        temperature: f32,
        /// Above 0, up to 1.
        top_p: f32,
        /// Same seed, same text.
        seed: u64,
    },
}

/// Chooses tokens.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    rng: StdRng,
}

impl Sampler {
    /// # Errors
    /// [`EngineError::Input`] for a temperature or top_p outside its range.
    pub fn new(sampling: Sampling) -> Result<Self> {
        let mut seed = 0;
        if let Sampling::Random { temperature, top_p, seed: s } = sampling {
            if !(temperature > 0.0 && temperature.is_finite()) {
                return Err(EngineError::Input(format!("temperature {temperature} is not above 0")));
            }
            if !(top_p > 0.0 && top_p <= 1.0) {
                return Err(EngineError::Input(format!("top_p {top_p} is not above 0 and at most 1")));
            }
            seed = s;
        }
        Ok(Self { sampling, rng: StdRng::seed_from_u64(seed) })
    }

    /// The next token, from logits `[1, vocab]`.
    ///
    /// # Errors
    /// [`EngineError::Input`] if no logit is a number.
    pub fn next(&mut self, logits: &Tensor) -> Result<u32> {
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        let mut order: Vec<usize> = (0..logits.len()).filter(|&i| !logits[i].is_nan()).collect();
        let broken = || EngineError::Input("the model's logits are not numbers".into());
        let best = order.iter().copied().max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a))).ok_or_else(broken)?;
        let Sampling::Random { temperature, top_p, .. } = self.sampling else { return Ok(best as u32) };
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let weight = |&i: &usize| f64::from((logits[i] - logits[best]) / temperature).exp();
        let total: f64 = order.iter().map(weight).sum();
        let mut kept = 0.0;
        let enough = order.iter().position(|i| {
            kept += weight(i) / total;
            kept >= f64::from(top_p)
        });
        order.truncate(enough.map_or(order.len(), |n| n + 1));
        let choice = WeightedIndex::new(order.iter().map(weight)).map_err(|_| broken())?;
        Ok(order[choice.sample(&mut self.rng)] as u32)
    }
}

/// Continues a prompt by up to `max_new` tokens, until an end-of-text token; `piece` sees each bit of text as it comes.
/// Returns the new text.
///
/// # Errors
/// [`EngineError::Input`] for an empty prompt or bad sampling; what the store refuses, such as a full cache.
pub fn generate(
    model: &Llama,
    store: &mut dyn KvStore,
    prompt: &str,
    max_new: usize,
    sampling: Sampling,
    mut piece: impl FnMut(&str),
) -> Result<String> {
    let mut sampler = Sampler::new(sampling)?;
    let tokens = model.prompt(prompt)?;
    if tokens.is_empty() {
        return Err(EngineError::Input("the prompt has no tokens".into()));
    }
    let mut logits = model.prefill(store, &tokens, Logits::Last)?;
    end_of_prompt(model, store, &tokens)?;
    let (mut new, mut shown) = (Vec::new(), String::new());
    while new.len() < max_new {
        let token = sampler.next(&logits)?;
        if model.config().eos.contains(&token) {
            break;
        }
        new.push(token);
        let text = model.decode(&new)?;
        // A character may need several tokens: wait until it is whole.
        if let Some(more) = text.strip_prefix(shown.as_str()).filter(|m| !m.is_empty() && !m.ends_with('\u{fffd}')) {
            piece(more);
            shown = text;
        }
        if new.len() < max_new {
            logits = model.extend(store, &[token], Logits::Last)?;
            store.evict(Moment::Decode)?;
        }
    }
    model.decode(&new)
}
