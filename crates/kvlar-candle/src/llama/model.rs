//! The model: dense arithmetic of each layer; attention and cache are a store's.

use super::checkpoint::{Weights, read};
use super::config::{Config, Family};
use crate::store::most_at_once;
use crate::{EngineError, KvShape, KvStore, Moment, Result};
use candle_core::{D, Device, Tensor};
use candle_nn::ops::{rms_norm, silu, softmax_last_dim};
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// Which logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// `[1, vocab]`, after the last token.
    Last,
    /// `[n, vocab]`, after each token.
    All,
}

/// A matrix product, with bias.
pub(super) struct Linear {
    /// Transposed: `[in, out]`.
    pub(super) weight: Tensor,
    pub(super) bias: Option<Tensor>,
}

impl Linear {
    fn load(w: &Weights, name: &str, shape: [usize; 2], bias: bool) -> Result<Self> {
        let weight = w.get(&format!("{name}.weight"), &shape)?.t()?.contiguous()?;
        let bias = bias.then(|| w.get(&format!("{name}.bias"), &shape[..1])).transpose()?;
        Ok(Self { weight, bias })
    }

    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        Ok(match &self.bias {
            Some(b) => y.broadcast_add(b)?,
            None => y,
        })
    }
}

pub(super) struct Layer {
    pub(super) input_norm: Tensor,
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) out: Linear,
    pub(super) qk_norms: Option<(Tensor, Tensor)>,
    pub(super) mlp_norm: Tensor,
    pub(super) gate: Linear,
    pub(super) up: Linear,
    pub(super) down: Linear,
}

/// A checkpoint of the Llama family.
pub struct Llama {
    config: Config,
    tokenizer: Tokenizer,
    folder: PathBuf,
    pub(super) embedding: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Tensor,
    pub(super) head: Linear,
}

/// Logits of parts of a text.
fn joined(want: Logits, mut parts: Vec<Tensor>) -> Result<Tensor> {
    match (want, parts.pop()) {
        (Logits::Last, Some(last)) => Ok(last),
        (_, last) => Ok(Tensor::cat(&parts.into_iter().chain(last).collect::<Vec<_>>(), 0)?),
    }
}

/// Query rows of a prefill whose scores exist at a time: `[Hq, rows, T]` floats.
const PREFILL_ROWS: usize = 256;

impl Llama {
    /// Loads a folder with `config.json`, `tokenizer.json` and `model.safetensors` (or its index and parts).
    ///
    /// # Errors
    /// An [`EngineError`] that names the file, tensor or field that is missing, broken or contradictory.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join("config.json");
        let config = Config::parse(&path, &read(&path, "a checkpoint needs it")?)?;
        let path = folder.join("tokenizer.json");
        let tokenizer = Tokenizer::from_bytes(read(&path, "a checkpoint needs it")?)
            .map_err(|e| EngineError::BadFile { path: path.clone(), problem: e.to_string() })?;
        let largest = tokenizer.get_vocab(true).values().copied().max().unwrap_or(0) as usize;
        if largest >= config.vocab {
            let problem = format!("token {largest} is beyond config.json's vocab_size {}", config.vocab);
            return Err(EngineError::BadFile { path, problem });
        }
        let w = Weights::open(folder)?;
        let (hidden, d) = (config.hidden, config.head_dim);
        let embedding = w.get("model.embed_tokens.weight", &[config.vocab, hidden])?;
        let head = if config.tied {
            Linear { weight: embedding.t()?.contiguous()?, bias: None }
        } else {
            Linear::load(&w, "lm_head", [config.vocab, hidden], false)?
        };
        let layers = (0..config.layers).map(|i| -> Result<Layer> {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            let (attention, mlp) = (at("self_attn"), at("mlp"));
            let (q_width, kv_width) = (config.heads * d, config.kv_heads * d);
            let qk_norms = if config.family == Family::Qwen3 {
                Some((w.get(&format!("{attention}.q_norm.weight"), &[d])?, w.get(&format!("{attention}.k_norm.weight"), &[d])?))
            } else {
                None
            };
            Ok(Layer {
                input_norm: w.get(&at("input_layernorm.weight"), &[hidden])?,
                q: Linear::load(&w, &format!("{attention}.q_proj"), [q_width, hidden], config.qkv_bias)?,
                k: Linear::load(&w, &format!("{attention}.k_proj"), [kv_width, hidden], config.qkv_bias)?,
                v: Linear::load(&w, &format!("{attention}.v_proj"), [kv_width, hidden], config.qkv_bias)?,
                out: Linear::load(&w, &format!("{attention}.o_proj"), [hidden, q_width], config.out_bias)?,
                qk_norms,
                mlp_norm: w.get(&at("post_attention_layernorm.weight"), &[hidden])?,
                gate: Linear::load(&w, &format!("{mlp}.gate_proj"), [config.intermediate, hidden], config.mlp_bias)?,
                up: Linear::load(&w, &format!("{mlp}.up_proj"), [config.intermediate, hidden], config.mlp_bias)?,
                down: Linear::load(&w, &format!("{mlp}.down_proj"), [hidden, config.intermediate], config.mlp_bias)?,
            })
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            norm: w.get("model.norm.weight", &[hidden])?,
            folder: folder.into(),
            config,
            tokenizer,
            embedding,
            head,
        })
    }

    /// What it was configured as.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Where it was loaded from.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&Layer> {
        let none = || EngineError::Input(format!("no layer {layer}: the model has {}", self.layers.len()));
        self.layers.get(layer).ok_or_else(none)
    }

    /// Sizes of its cache.
    pub fn kv_shape(&self) -> KvShape {
        let c = &self.config;
        KvShape {
            layers: c.layers,
            q_heads: c.heads,
            kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            window: c.window,
            rope: c.rope.clone(),
        }
    }

    /// Tokens of a text, without a beginning-of-text token.
    ///
    /// # Errors
    /// [`EngineError::Input`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, false).map_err(|e| EngineError::Input(format!("tokenizer: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A text's tokens as a prompt: with the beginning-of-text token in front, if there is one.
    ///
    /// # Errors
    /// [`EngineError::Input`].
    pub fn prompt(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.config.bos.into_iter().chain(self.encode(text)?).collect())
    }

    /// The text of tokens.
    ///
    /// # Errors
    /// [`EngineError::Input`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        self.tokenizer.decode(tokens, true).map_err(|e| EngineError::Input(format!("tokenizer: {e}")))
    }

    /// Runs a prompt into an empty store. Attention is exact; what the store keeps is its own affair. A store that lets go of
    /// tokens chunk by chunk ([`KvStore::prompt_chunk`]) reads the chunks behind the first one as it keeps those before.
    ///
    /// # Errors
    /// [`EngineError::Input`] for a store that is not empty or a bad token; what the store refuses. The store is as before, but
    /// for chunks before the one that failed.
    pub fn prefill(&self, store: &mut dyn KvStore, tokens: &[u32], want: Logits) -> Result<Tensor> {
        if !store.is_empty() {
            return Err(EngineError::Input(format!("a prefill into a store that holds {} tokens", store.len())));
        }
        self.check_tokens(tokens)?;
        let prompt = tokens.len();
        let (first, rest) = tokens.split_at(store.prompt_chunk().clamp(1, prompt.max(1)).min(prompt));
        let mut parts = vec![self.step(store, first, want, |hidden, [q, k, v], store, layer| {
            store.observe(layer, hidden, q, true)?;
            self.exact_attention(q, &self.rotate(k, 0)?, v)
        })?];
        store.evict(Moment::Chunk { prompt })?;
        for chunk in rest.chunks(store.prompt_chunk()) {
            parts.push(self.extend_prompt(store, chunk, want)?);
            store.evict(Moment::Chunk { prompt })?;
        }
        joined(want, parts)
    }

    /// Runs further tokens, each of which sees the store's tokens as the store keeps them, and the earlier new ones
    /// likewise. All are kept or, on an error, none: then the store is as before.
    ///
    /// # Errors
    /// [`EngineError::Input`] for a bad token, or more tokens than could be taken back if one of the steps that the store
    /// needs for them failed ([`KvStore::max_step`], [`KvStore::rollback`]); what the store refuses.
    pub fn extend(&self, store: &mut dyn KvStore, tokens: &[u32], want: Logits) -> Result<Tensor> {
        self.extend_as(store, tokens, want, false)
    }

    /// Likewise, tokens of a prompt, such as a question: a store may judge earlier ones by what these attend to.
    ///
    /// # Errors
    /// As [`Llama::extend`].
    pub fn extend_prompt(&self, store: &mut dyn KvStore, tokens: &[u32], want: Logits) -> Result<Tensor> {
        self.extend_as(store, tokens, want, true)
    }

    fn extend_as(&self, store: &mut dyn KvStore, tokens: &[u32], want: Logits, prompt: bool) -> Result<Tensor> {
        let most = store.max_step();
        let run = |store: &mut dyn KvStore, part: &[u32]| {
            self.step(store, part, want, |hidden, [q, _, _], store, layer| {
                store.observe(layer, hidden, q, prompt)?;
                store.attend(layer, q)
            })
        };
        if tokens.len() <= most {
            return run(store, tokens);
        }
        let at_once = most_at_once(store);
        if tokens.len() > at_once {
            return Err(EngineError::Input(format!(
                "{} tokens at once: the store takes {most} a step and could take back {} if one failed; give up to {at_once}, or \
                 make it with more rollback_rows",
                tokens.len(),
                store.rollback()
            )));
        }
        self.check_tokens(tokens)?;
        let first = store.len();
        let mut parts = Vec::new();
        for part in tokens.chunks(most) {
            match run(store, part) {
                Ok(logits) => parts.push(logits),
                Err(e) => {
                    store.truncate(first)?; // all tokens or none
                    return Err(e);
                }
            }
        }
        joined(want, parts)
    }

    pub(super) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|&&t| t as usize >= self.config.vocab) {
            Some(bad) => Err(EngineError::Input(format!("token {bad} is not below the vocabulary's {}", self.config.vocab))),
            None => Ok(()),
        }
    }

    /// Runs tokens; `attention(hidden, [q, k, v], store, layer)` makes the output of a layer's attention `[n, Hq, d]` of its
    /// input `[n, D]` after the norm, q (rotated) `[n, Hq, d]`, k (not rotated) and v `[n, Hk, d]`.
    pub(super) fn step(
        &self,
        store: &mut dyn KvStore,
        tokens: &[u32],
        want: Logits,
        mut attention: impl FnMut(&Tensor, [&Tensor; 3], &mut dyn KvStore, usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.check_tokens(tokens)?;
        let first = store.len();
        store.begin(tokens.len())?;
        let mut run = || -> Result<Tensor> {
            let ids = Tensor::new(tokens, &Device::Cpu)?;
            let mut x = self.embedding.index_select(&ids, 0)?;
            for (i, layer) in self.layers.iter().enumerate() {
                let hidden = rms_norm(&x, &layer.input_norm, self.config.eps as f32)?;
                let (q, k, v) = self.project(layer, &hidden, first)?;
                store.append(i, &k, &v)?;
                let attended = attention(&hidden, [&q, &k, &v], store, i)?.flatten_from(1)?;
                x = (x + layer.out.apply(&attended)?)?;
                let h = rms_norm(&x, &layer.mlp_norm, self.config.eps as f32)?;
                let gated = (silu(&layer.gate.apply(&h)?)? * layer.up.apply(&h)?)?;
                x = (x + layer.down.apply(&gated)?)?;
            }
            if want == Logits::Last {
                x = x.narrow(0, tokens.len() - 1, 1)?;
            }
            self.head.apply(&rms_norm(&x.contiguous()?, &self.norm, self.config.eps as f32)?)
        };
        let result = run();
        match result {
            Ok(logits) => store.finish().map(|()| logits),
            Err(e) => {
                store.cancel();
                Err(e)
            }
        }
    }

    /// q (rotated), k (not rotated) and v, `[n, heads, d]`, of the layer's input `[n, D]` after its norm.
    fn project(&self, layer: &Layer, hidden: &Tensor, first: usize) -> Result<(Tensor, Tensor, Tensor)> {
        let c = &self.config;
        let n = hidden.dim(0)?;
        let heads = |l: &Linear, count: usize| -> Result<Tensor> { Ok(l.apply(hidden)?.reshape((n, count, c.head_dim))?) };
        let (mut q, mut k, v) = (heads(&layer.q, c.heads)?, heads(&layer.k, c.kv_heads)?, heads(&layer.v, c.kv_heads)?);
        if let Some((q_norm, k_norm)) = &layer.qk_norms {
            q = rms_norm(&q, q_norm, c.eps as f32)?;
            k = rms_norm(&k, k_norm, c.eps as f32)?;
        }
        Ok((self.rotate(&q, first)?, k, v))
    }

    /// RoPE of `[n, heads, d]`, whose rows are at positions `first`, `first + 1`, …
    pub(super) fn rotate(&self, x: &Tensor, first: usize) -> Result<Tensor> {
        let rope = &self.config.rope;
        let (n, half, rotary) = (x.dim(0)?, rope.inv_freq.len(), rope.rotary_dim());
        let table = |f: fn(f64) -> f64| -> Result<Tensor> {
            let angle = |p: usize, w: f32| (p as f64) * f64::from(w);
            let factor = f64::from(rope.attention_factor);
            let values = (first..first + n).flat_map(|p| rope.inv_freq.iter().map(move |&w| (factor * f(angle(p, w))) as f32));
            Ok(Tensor::from_vec(values.collect::<Vec<_>>(), (n, 1, half), x.device())?)
        };
        let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
        let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let low = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let high = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        let rest = self.config.head_dim - rotary;
        let parts = if rest > 0 { vec![low, high, x.narrow(D::Minus1, rotary, rest)?] } else { vec![low, high] };
        Ok(Tensor::cat(&parts, D::Minus1)?)
    }

    /// Causal attention in f32 of q `[n, Hq, d]` over k (rotated) and v `[m, Hk, d]`, whose last n rows are the queries' own.
    pub(super) fn exact_attention(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let c = &self.config;
        let (n, group) = (q.dim(0)?, c.heads / c.kv_heads);
        let before = k.dim(0)? - n;
        let (keys, values) = (k.transpose(0, 1)?.contiguous()?, v.transpose(0, 1)?.contiguous()?);
        let scale = 1.0 / (c.head_dim as f64).sqrt();
        let mut parts = Vec::new();
        for first in (0..n).step_by(PREFILL_ROWS) {
            let rows = PREFILL_ROWS.min(n - first);
            let last = before + first + rows;
            // [Hk, group · rows, d] against [Hk, d, last].
            let chunk = q.narrow(0, first, rows)?.transpose(0, 1)?.reshape((c.kv_heads, group * rows, c.head_dim))?;
            let scores = chunk.matmul(&keys.narrow(1, 0, last)?.transpose(1, 2)?)?;
            let hidden = |row: usize, t: usize| t > row || (c.window > 0 && row - t >= c.window as usize);
            let mask: Vec<f32> = (before + first..last)
                .flat_map(|row| (0..last).map(move |t| if hidden(row, t) { f32::NEG_INFINITY } else { 0.0 }))
                .collect();
            let mask = Tensor::from_vec(mask, (1, 1, rows, last), q.device())?;
            let scores = (scores.reshape((c.kv_heads, group, rows, last))? * scale)?.broadcast_add(&mask)?;
            let weights = softmax_last_dim(&scores)?.reshape((c.kv_heads, group * rows, last))?;
            let out = weights.matmul(&values.narrow(1, 0, last)?.contiguous()?)?;
            parts.push(out.reshape((c.heads, rows, c.head_dim))?.transpose(0, 1)?.contiguous()?);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}
