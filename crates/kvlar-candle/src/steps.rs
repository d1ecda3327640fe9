//! Steps of one sequence in a cache of `kvlar_cache`: what its stores have in common.

use crate::{EngineError, KvShape, Result};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use kvlar::{Backend, Buffer, Device, Dtype, Rope, Stream, Strides};
use kvlar_cache::{Batch, BatchShape, Cache, EvictingBatch, EvictingCache, NewRows, Observed, Queries, SeqId};
use kvlar_calibrate::Plan;
use std::collections::BTreeMap;

/// A cache that takes tokens in steps.
pub(crate) trait StepCache {
    /// Tables and scratch of steps of some shape.
    type Batch;

    fn batch(&self, shape: BatchShape) -> kvlar_cache::Result<Self::Batch>;
    fn begin(&mut self, stream: &Stream, batch: &mut Self::Batch, new: &[(SeqId, usize)]) -> kvlar_cache::Result<()>;
    fn append(
        &mut self,
        stream: &Stream,
        batch: &mut Self::Batch,
        layer: usize,
        new: NewRows<'_>,
        rope: Option<Rope<'_>>,
    ) -> kvlar_cache::Result<()>;
    fn attend(&self, stream: &Stream, batch: &mut Self::Batch, layer: usize, args: Queries<'_>) -> kvlar_cache::Result<()>;
    fn finish(&mut self, batch: &mut Self::Batch) -> kvlar_cache::Result<()>;
    fn cancel(&mut self, batch: &mut Self::Batch) -> kvlar_cache::Result<()>;
}

/// The methods of both caches have these names.
macro_rules! step_cache {
    ($cache:ty, $batch:ty) => {
        impl StepCache for $cache {
            type Batch = $batch;

            fn batch(&self, shape: BatchShape) -> kvlar_cache::Result<$batch> {
                <$cache>::batch(self, shape)
            }
            fn begin(&mut self, stream: &Stream, batch: &mut $batch, new: &[(SeqId, usize)]) -> kvlar_cache::Result<()> {
                <$cache>::begin(self, stream, batch, new)
            }
            fn append(
                &mut self,
                stream: &Stream,
                batch: &mut $batch,
                layer: usize,
                new: NewRows<'_>,
                rope: Option<Rope<'_>>,
            ) -> kvlar_cache::Result<()> {
                <$cache>::append(self, stream, batch, layer, new, rope)
            }
            fn attend(&self, stream: &Stream, batch: &mut $batch, layer: usize, args: Queries<'_>) -> kvlar_cache::Result<()> {
                <$cache>::attend(self, stream, batch, layer, args)
            }
            fn finish(&mut self, batch: &mut $batch) -> kvlar_cache::Result<()> {
                <$cache>::finish(self, batch)
            }
            fn cancel(&mut self, batch: &mut $batch) -> kvlar_cache::Result<()> {
                <$cache>::cancel(self, batch)
            }
        }
    };
}

step_cache!(Cache, Batch);
step_cache!(EvictingCache, EvictingBatch);

/// A cache, the stream of its launches, and the step that goes on.
#[derive(Debug)]
pub(crate) struct Steps<C: StepCache> {
    pub cache: C,
    pub stream: Stream,
    pub shape: KvShape,
    /// Of queries, keys and values on the device.
    dtype: Dtype,
    inv_freq: Buffer,
    /// One for each number of new tokens that has occurred.
    batches: BTreeMap<usize, C::Batch>,
    new: usize,
}

impl<C: StepCache> Steps<C> {
    pub fn new(cache: C, stream: Stream, shape: &KvShape, dtype: Dtype) -> Result<Self> {
        let mut inv_freq = stream.device().alloc(4 * shape.rope.inv_freq.len())?;
        stream.upload(&mut inv_freq, 0, bytemuck::cast_slice(&shape.rope.inv_freq))?;
        Ok(Self { cache, stream, shape: shape.clone(), dtype, inv_freq, batches: BTreeMap::new(), new: 0 })
    }

    /// f32 values, rounded to the store's type.
    fn upload(&self, x: &Tensor) -> Result<Buffer> {
        let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        let bits: Vec<u16> = match self.dtype {
            Dtype::F16 => values.iter().map(|&x| f16::from_f32(x).to_bits()).collect(),
            _ => values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect(),
        };
        let mut buffer = self.stream.device().alloc(2 * bits.len())?;
        self.stream.upload(&mut buffer, 0, bytemuck::cast_slice(&bits))?;
        Ok(buffer)
    }

    /// A step of 1 to `most` tokens.
    pub fn begin(&mut self, seq: SeqId, new: usize, most: usize) -> Result<()> {
        if new == 0 || new > most {
            return Err(EngineError::Input(format!("a step of {new} tokens")));
        }
        if !self.batches.contains_key(&new) {
            // Prefills come in all lengths: keep the small ones, which recur.
            self.batches.retain(|&n, _| n <= 64);
            let shape = BatchShape { window: self.shape.window, ..BatchShape::new(1, new, self.shape.q_heads) };
            self.batches.insert(new, self.cache.batch(shape)?);
        }
        if let Some(batch) = self.batches.get_mut(&new) {
            self.cache.begin(&self.stream, batch, &[(seq, new)])?;
            self.new = new;
        }
        Ok(())
    }

    /// As [`crate::KvStore::append`].
    pub fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = (self.upload(k)?, self.upload(v)?);
        let strides = Some(Strides::rows_first(self.shape.kv_heads, self.new, self.shape.head_dim));
        let rows = NewRows { k: k.view(), k_strides: strides, v: v.view(), v_strides: strides };
        let rope = rope_of(&self.shape, &self.inv_freq);
        let batch = self.batches.get_mut(&self.new).ok_or_else(no_step)?;
        self.cache.append(&self.stream, batch, layer, rows, Some(rope))?;
        // The uploads end with this call.
        Ok(self.stream.synchronize()?)
    }

    /// As [`crate::KvStore::attend`].
    pub fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let (heads, d) = (self.shape.q_heads, self.shape.head_dim);
        let input = self.upload(q)?;
        let mut out = self.stream.device().alloc(4 * self.new * heads * d)?;
        let strides = Some(Strides::rows_first(heads, self.new, d));
        let queries = Queries {
            q: input.view(),
            q_strides: strides,
            out: out.view_mut(),
            out_strides: strides,
            lse: None,
            sink_logits: None,
            rope: Some(rope_of(&self.shape, &self.inv_freq)),
        };
        let batch = self.batches.get_mut(&self.new).ok_or_else(no_step)?;
        self.cache.attend(&self.stream, batch, layer, queries)?;
        let mut values = vec![0f32; self.new * heads * d];
        self.stream.download(&out, 0, bytemuck::cast_slice_mut(&mut values))?;
        Ok(Tensor::from_vec(values, (self.new, heads, d), q.device())?)
    }

    pub fn finish(&mut self) -> Result<()> {
        let batch = self.batches.get_mut(&self.new).ok_or_else(no_step)?;
        self.new = 0;
        Ok(self.cache.finish(batch)?)
    }

    pub fn cancel(&mut self) {
        if let Some(batch) = self.batches.get_mut(&self.new) {
            // Without a step there is nothing to cancel.
            let _ = self.cache.cancel(batch);
        }
        self.new = 0;
    }
}

impl Steps<EvictingCache> {
    /// As [`crate::KvStore::observe`].
    pub fn observe(&mut self, layer: usize, hidden: &Tensor, q: &Tensor, prompt: bool) -> Result<()> {
        if !self.cache.observes(prompt) {
            return Ok(());
        }
        let (hidden, q) = (self.upload(hidden)?, self.upload(q)?);
        let q_strides = Some(Strides::rows_first(self.shape.q_heads, self.new, self.shape.head_dim));
        let seen = Observed { q: Some(q.view()), q_strides, hidden: Some(hidden.view()), prompt };
        let batch = self.batches.get_mut(&self.new).ok_or_else(no_step)?;
        self.cache.observe(&self.stream, batch, layer, seen)?;
        Ok(self.stream.synchronize()?)
    }
}

/// New tokens that a plan's attention takes at a time.
pub(crate) fn max_step(device: &Device, plan: &Plan) -> usize {
    let latents = plan.layers.iter().any(|l| l.keys.factors().or(l.values.factors()).is_some());
    if latents && device.backend() != Backend::Reference { kvlar::MAX_QUERY_ROWS } else { usize::MAX }
}

fn rope_of<'a>(shape: &KvShape, inv_freq: &'a Buffer) -> Rope<'a> {
    Rope {
        inv_freq: inv_freq.view(),
        rotary_dim: shape.rope.rotary_dim(),
        layout: shape.rope.layout,
        attention_factor: shape.rope.attention_factor,
    }
}

fn no_step() -> EngineError {
    EngineError::Input("no step has begun".into())
}
