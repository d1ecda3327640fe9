//! What gates are taught: how much the model looks back at each token while it repeats the text (KVzip, arXiv 2505.23416).
//!
//! Forward passes alone: one over the context, then one over each chunk of it, after a prompt that asks to repeat it, with the
//! whole context in the cache. A token's score in a layer and kv head is the largest attention weight that any query of the
//! repeating text, of any query head of the group, gives it. Softmax runs over the prefix, the chunk and the repeating text
//! alone, so that the cost of scores grows with the context, not with its square.

use super::capture::{Forgetful, flat};
use super::{Llama, Logits};
use crate::{EngineError, Result};
use candle_core::{D, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use serde::{Deserialize, Serialize};

/// Queries whose weights exist at a time: `[Hq, rows, prefix + chunk + repeating text]` floats.
const ROWS: usize = 256;

/// How a model is asked to repeat its context. The texts are tokenized as they are: nothing is known here of a chat template,
/// whose marks of turns go into `end` (and into the prefix of [`Llama::repeat_scores`]) if a model wants them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepeatConfig {
    /// Tokens of a chunk; the last one of a context may be shorter.
    pub chunk: usize,
    /// Tokens of the chunk before that are quoted where the next one begins.
    pub quoted: usize,
    /// Asks for the first chunk.
    pub first: String,
    /// Asks for a later one; the quoted tokens follow.
    pub next: String,
    /// Between the question and the chunk.
    pub end: String,
}

impl Default for RepeatConfig {
    /// The released prompts, without a chat template.
    fn default() -> Self {
        Self {
            chunk: 2000,
            quoted: 8,
            first: "\n\nRepeat the previous context exactly.".into(),
            next: "\n\nRepeat the part of the previous context exactly, starting with ".into(),
            end: "\n\n".into(),
        }
    }
}

/// Prompts as tokens.
struct Prompts {
    first: Vec<u32>,
    next: Vec<u32>,
    end: Vec<u32>,
}

impl Prompts {
    fn new(model: &Llama, config: &RepeatConfig) -> Result<Self> {
        if config.chunk == 0 {
            return Err(EngineError::Input("chunks of 0 tokens: a context is repeated in chunks of at least one".into()));
        }
        let [first, next, end] = [&config.first, &config.next, &config.end].map(|text| model.encode(text));
        Ok(Self { first: first?, next: next?, end: end? })
    }

    /// Tokens before a chunk at most.
    fn longest(&self, config: &RepeatConfig) -> usize {
        self.first.len().max(self.next.len() + config.quoted) + self.end.len()
    }

    /// What is run for the chunk of `context` from `start` on.
    fn input(&self, context: &[u32], start: usize, len: usize, quoted: usize) -> Vec<u32> {
        let question = if start == 0 { &self.first } else { &self.next };
        let quoted = &context[start.saturating_sub(quoted)..start];
        [question, quoted, &self.end, &context[start..start + len]].concat()
    }
}

/// A layer of the context.
struct Cached {
    hidden: Vec<f32>,
    /// Rotated, `[prefix + T, Hk, d]`.
    keys: Tensor,
    values: Tensor,
}

impl Llama {
    /// The longest context that [`Llama::repeat_scores`] takes after a prefix of so many tokens: with its repeated chunk and the
    /// prompt it fills the positions that the model was trained for.
    ///
    /// # Errors
    /// [`EngineError::Input`] if there is no room for one, or for chunks of 0 tokens.
    pub fn longest_repeated(&self, prefix: usize, config: &RepeatConfig) -> Result<usize> {
        let around = prefix + Prompts::new(self, config)?.longest(config);
        let room = self.most_rows().saturating_sub(around);
        match room.saturating_sub(config.chunk).max(room / 2) {
            0 => Err(EngineError::Input(format!(
                "prefix and prompts are {around} tokens: there is no room for a context and its repetition in {}",
                self.most_rows()
            ))),
            n => Ok(n),
        }
    }

    /// Rows that a token may attend to: no more can be repeated.
    fn most_rows(&self) -> usize {
        let c = self.config();
        if c.window > 0 { c.max_positions.min(c.window as usize) } else { c.max_positions }
    }

    /// Scores of the T tokens of `context`, which comes after `prefix` (the beginning-of-text token, a system prompt): hands each
    /// layer, from the first to the last, to `observer(layer, hidden, scores)`, hidden being the input of the layer's attention,
    /// after its norm, `[T, D]`, and scores `[Hk, T]`, row-major f32, in 0 to 1. Keys, values and hidden states of all layers
    /// exist at a time, T · L · (2 · Hk · d + D) floats.
    ///
    /// # Errors
    /// [`EngineError::Input`] for a context without tokens or beyond [`Llama::longest_repeated`], chunks of 0 tokens, a token
    /// beyond the vocabulary; what the observer returns, which ends the run.
    pub fn repeat_scores(
        &self,
        prefix: &[u32],
        context: &[u32],
        config: &RepeatConfig,
        mut observer: impl FnMut(usize, &[f32], &[f32]) -> Result<()>,
    ) -> Result<()> {
        let prompts = Prompts::new(self, config)?;
        let longest = self.longest_repeated(prefix.len(), config)?;
        if context.is_empty() || context.len() > longest {
            return Err(EngineError::Input(format!(
                "a context of {} tokens: the model can repeat 1 to {longest}",
                context.len()
            )));
        }
        let layers = self.prefilled(prefix, context)?;
        let kv_heads = self.config().kv_heads;
        let mut scores = vec![vec![0f32; kv_heads * context.len()]; layers.len()];
        for start in (0..context.len()).step_by(config.chunk) {
            let len = config.chunk.min(context.len() - start);
            let input = prompts.input(context, start, len, config.quoted);
            let mut store = Forgetful { before: prefix.len() + context.len() };
            self.step(&mut store, &input, Logits::Last, |_, [q, k, v], store, layer| {
                let own = self.rotate(k, store.len())?;
                let Cached { keys, values, .. } = &layers[layer];
                let parts = [&keys.narrow(0, 0, prefix.len())?, &keys.narrow(0, prefix.len() + start, len)?, &own];
                let weights = self.largest_weights(q, &Tensor::cat(&parts, 0)?, prefix.len(), len)?;
                for (head, row) in flat(&weights)?.chunks_exact(len).enumerate() {
                    scores[layer][head * context.len() + start..][..len].copy_from_slice(row);
                }
                self.exact_attention(q, &Tensor::cat(&[keys, &own], 0)?, &Tensor::cat(&[values, v], 0)?)
            })?;
        }
        layers.iter().zip(&scores).enumerate().try_for_each(|(l, (cached, scores))| observer(l, &cached.hidden, scores))
    }

    fn prefilled(&self, prefix: &[u32], context: &[u32]) -> Result<Vec<Cached>> {
        let mut layers = Vec::new();
        self.step(&mut Forgetful::default(), &[prefix, context].concat(), Logits::Last, |hidden, [q, k, v], _, _| {
            let keys = self.rotate(k, 0)?;
            let attended = self.exact_attention(q, &keys, v)?;
            let hidden = flat(&hidden.narrow(0, prefix.len(), context.len())?)?;
            layers.push(Cached { hidden, keys, values: v.clone() });
            Ok(attended)
        })?;
        Ok(layers)
    }

    /// Of q `[n, Hq, d]` over keys `[sinks + len + n, Hk, d]`, both rotated, the last n keys the queries' own: the largest weight
    /// of each of the `len` keys after the sinks, `[Hk, len]`.
    fn largest_weights(&self, q: &Tensor, keys: &Tensor, sinks: usize, len: usize) -> Result<Tensor> {
        let c = self.config();
        let (n, group) = (q.dim(0)?, c.heads / c.kv_heads);
        let keys = keys.permute((1, 2, 0))?.contiguous()?;
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        let mut largest: Option<Tensor> = None;
        for first in (0..n).step_by(ROWS) {
            let rows = ROWS.min(n - first);
            let last = sinks + len + first + rows;
            // [Hk, group · rows, d] against [Hk, d, last].
            let q = q.narrow(0, first, rows)?.transpose(0, 1)?.reshape((c.kv_heads, group * rows, c.head_dim))?;
            let logits = (q.matmul(&keys.narrow(2, 0, last)?.contiguous()?)? * scale)?;
            let seen = |row: usize| sinks + len + row;
            let mask =
                (first..first + rows).flat_map(|row| (0..last).map(move |t| if t > seen(row) { f32::NEG_INFINITY } else { 0.0 }));
            let mask = Tensor::from_vec(mask.collect::<Vec<_>>(), (1, 1, rows, last), &Device::Cpu)?;
            let logits = logits.reshape((c.kv_heads, group, rows, last))?.broadcast_add(&mask)?;
            let weights = softmax_last_dim(&logits)?.narrow(D::Minus1, sinks, len)?;
            let most = weights.contiguous()?.reshape((c.kv_heads, group * rows, len))?.max(1)?;
            largest = Some(match largest {
                Some(before) => before.maximum(&most)?,
                None => most,
            });
        }
        largest.ok_or_else(|| EngineError::Input("nothing is repeated".into()))
    }
}
