//! What calibration takes of a model: queries, keys and values of a text, weights, and which model it is.

use super::{Llama, Logits};
use crate::{EngineError, KvStore, Result};
use candle_core::{Device, Tensor};

/// A store that keeps nothing, though it may say that it holds tokens: attention is the model's own.
#[derive(Default)]
pub(super) struct Forgetful {
    /// Tokens that came before: where positions go on from.
    pub(super) before: usize,
}

impl KvStore for Forgetful {
    fn len(&self) -> usize {
        self.before
    }
    fn begin(&mut self, new: usize) -> Result<()> {
        if new == 0 { Err(EngineError::Input("a window without tokens".into())) } else { Ok(()) }
    }
    fn append(&mut self, _layer: usize, _k: &Tensor, _v: &Tensor) -> Result<()> {
        Ok(())
    }
    fn attend(&mut self, _layer: usize, _q: &Tensor) -> Result<Tensor> {
        Err(EngineError::Input("attention over a store that keeps nothing".into()))
    }
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
    fn cancel(&mut self) {}
    fn truncate(&mut self, _rows: usize) -> Result<()> {
        Ok(())
    }
    fn bytes(&self) -> usize {
        0
    }
}

/// A tensor's numbers, row-major.
pub(super) fn flat(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.flatten_all()?.to_vec1()?)
}

/// Numbers of one tensor that a fingerprint takes in at most, evenly spaced.
const SAMPLES: usize = 4096;

impl Llama {
    /// Runs one window of n tokens from position 0 through the exact model and hands each layer, from the first to the
    /// last, to `observer(layer, q, k, v)`: q `[n, Hq, d]` rotated; k `[n, Hk, d]` before RoPE and after the key norm, if
    /// the model has one; v `[n, Hk, d]`; biases included, row-major f32. One layer's rows exist at a time.
    ///
    /// # Errors
    /// [`EngineError::Input`] for a window without tokens or a token beyond the vocabulary; what the observer returns, which
    /// ends the run.
    pub fn capture(&self, tokens: &[u32], mut observer: impl FnMut(usize, &[f32], &[f32], &[f32]) -> Result<()>) -> Result<()> {
        self.step(&mut Forgetful::default(), tokens, Logits::Last, |_, [q, k, v], _, layer| {
            observer(layer, &flat(q)?, &flat(k)?, &flat(v)?)?;
            self.exact_attention(q, &self.rotate(k, 0)?, v)
        })?;
        Ok(())
    }

    /// Runs one window of n tokens likewise and hands `observer(layer, hidden)` each layer's input of attention, after its norm:
    /// `[n, D]`, what gates score tokens by.
    ///
    /// # Errors
    /// As [`Llama::capture`].
    pub fn capture_hidden(&self, tokens: &[u32], mut observer: impl FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        self.step(&mut Forgetful::default(), tokens, Logits::Last, |hidden, [q, k, v], _, layer| {
            observer(layer, &flat(hidden)?)?;
            self.exact_attention(q, &self.rotate(k, 0)?, v)
        })?;
        Ok(())
    }

    /// Keys of n tokens from position 0, k `[n, Hk, d]` before RoPE, as quantized caches keep them: after it.
    ///
    /// # Errors
    /// [`EngineError::Input`] for a part of a row.
    pub fn rotate_keys(&self, k: &[f32]) -> Result<Vec<f32>> {
        let c = self.config();
        let width = c.kv_heads * c.head_dim;
        if !k.len().is_multiple_of(width) {
            return Err(EngineError::Input(format!("{} numbers are no rows of {width}", k.len())));
        }
        let k = Tensor::from_slice(k, (k.len() / width, c.kv_heads, c.head_dim), &Device::Cpu)?;
        Ok(self.rotate(&k, 0)?.flatten_all()?.to_vec1()?)
    }

    /// W_o of a layer, `[hidden, Hq·d]`, row-major.
    ///
    /// # Errors
    /// [`EngineError::Input`] for a layer that the model does not have.
    pub fn out_weight(&self, layer: usize) -> Result<Vec<f32>> {
        let out = &self.layer(layer)?.out;
        Ok(out.weight.t()?.flatten_all()?.to_vec1()?)
    }

    /// W_v of a layer, `[Hk·d, hidden]`, row-major, without its bias.
    ///
    /// # Errors
    /// [`EngineError::Input`] for a layer that the model does not have.
    pub fn value_weight(&self, layer: usize) -> Result<Vec<f32>> {
        let v = &self.layer(layer)?.v;
        Ok(v.weight.t()?.flatten_all()?.to_vec1()?)
    }

    /// Which model this is, for plan files: `family-LxD-hash`, the same on every machine and for every way to store the same
    /// numbers. The hash (64-bit FNV-1a) covers the sizes, RoPE, and of every tensor up to 4,096 evenly spaced numbers as
    /// f32. It tells models and fine-tunings apart; it is no proof that every weight is the same, nor a defence against
    /// someone who wants two models to look alike.
    ///
    /// # Errors
    /// If tensor arithmetic fails.
    pub fn fingerprint(&self) -> Result<String> {
        let c = self.config();
        let mut hash = Fnv::new();
        let family = format!("{:?}", c.family).to_lowercase();
        hash.add(family.as_bytes());
        let sizes = [c.vocab, c.hidden, c.intermediate, c.layers, c.heads, c.kv_heads, c.head_dim, c.window as usize];
        sizes.iter().for_each(|n| hash.add(&(*n as u64).to_le_bytes()));
        hash.add(&c.eps.to_le_bytes());
        hash.add(&[u8::from(c.tied), u8::from(c.qkv_bias), u8::from(c.out_bias), u8::from(c.mlp_bias)]);
        hash.add(format!("{:?}", c.rope.layout).to_lowercase().as_bytes());
        let rope = c.rope.inv_freq.iter().chain([&c.rope.attention_factor]);
        rope.for_each(|x| hash.add(&x.to_le_bytes()));
        hash.sample(&self.embedding)?;
        for l in &self.layers {
            for linear in [&l.q, &l.k, &l.v, &l.out, &l.gate, &l.up, &l.down] {
                hash.sample(&linear.weight)?;
                linear.bias.iter().try_for_each(|b| hash.sample(b))?;
            }
            let norms = [&l.input_norm, &l.mlp_norm].into_iter().chain(l.qk_norms.iter().flat_map(|(q, k)| [q, k]));
            norms.into_iter().try_for_each(|n| hash.sample(n))?;
        }
        hash.sample(&self.norm)?;
        hash.sample(&self.head.weight)?;
        Ok(format!("{family}-{}x{}-{:016x}", c.layers, c.hidden, hash.0))
    }
}

/// FNV-1a of 64 bits: fixed for good, unlike the standard library's hasher.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn sample(&mut self, x: &Tensor) -> Result<()> {
        let n = x.elem_count();
        let count = n.min(SAMPLES);
        let ids: Vec<u32> = (0..count).map(|i| (i * n / count) as u32).collect();
        let picked = x.flatten_all()?.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?;
        picked.to_vec1::<f32>()?.iter().for_each(|v| self.add(&v.to_le_bytes()));
        Ok(())
    }
}
