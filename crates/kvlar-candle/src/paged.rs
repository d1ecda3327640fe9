//! A store in pages, `kvlar_cache`: token-wise rows, or what a plan says.

use crate::{KvShape, KvStore, Result};
use candle_core::{DType, Tensor};
use half::{bf16, f16};
use kvlar::{Backend, Buffer, Codec, Device, Dtype, Format, Rope, Stream, Strides};
use kvlar_cache::{Batch, BatchShape, Cache, CacheConfig, NewRows, Queries, SeqId};
use kvlar_calibrate::Plan;
use std::collections::BTreeMap;

/// What a [`PagedStore`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreConfig {
    /// Type of queries, keys and values on the device.
    pub dtype: Dtype,
    /// Of stored keys.
    pub keys: Format,
    /// Of stored values: quantized where keys are.
    pub values: Format,
    /// First tokens that stay as they are, where others are quantized.
    pub sink_rows: usize,
    /// Last tokens that do, at least.
    pub recent_rows: usize,
    /// Most tokens.
    pub max_rows: usize,
    /// Tokens a page.
    pub page_rows: usize,
    /// How many tokens can be taken back as if they had never been, where recent rows stay exact
    /// ([`KvStore::rollback`]). Exact rows are held for so many tokens more; 0 does for text that is only continued.
    pub rollback_rows: usize,
}

impl StoreConfig {
    /// The full cache, as engines keep it; up to 64 tokens can be taken back.
    pub fn bf16(max_rows: usize) -> Self {
        Self::of(Codec::Bf16, Codec::Bf16, max_rows)
    }

    /// Rows of those formats, beside queries in bf16; up to 64 tokens can be taken back.
    pub fn of(keys: impl Into<Format>, values: impl Into<Format>, max_rows: usize) -> Self {
        let (keys, values) = (keys.into(), values.into());
        Self { dtype: Dtype::Bf16, keys, values, sink_rows: 0, recent_rows: 0, max_rows, page_rows: 64, rollback_rows: 64 }
    }
}

/// New tokens a step at most; longer steps are the engine's to cut.
const MAX_STEP: usize = 1 << 16;

/// One sequence in a `kvlar_cache::Cache`.
#[derive(Debug)]
pub struct PagedStore {
    stream: Stream,
    cache: Cache,
    seq: SeqId,
    shape: KvShape,
    config: StoreConfig,
    inv_freq: Buffer,
    /// Tables and scratch, one for each number of new tokens that has occurred.
    batches: BTreeMap<usize, Batch>,
    step: usize,
    /// Of an attention; a prefill is none.
    max_step: usize,
}

impl PagedStore {
    /// An empty store with room for `config.max_rows` tokens.
    ///
    /// # Errors
    /// If memory runs out, or there is no kernel for the shape.
    pub fn new(device: &Device, shape: &KvShape, config: StoreConfig) -> Result<Self> {
        let stream = device.stream()?;
        let cache = Cache::new(device, cache_config(shape, config))?;
        Self::of(device, shape, config, stream, cache, usize::MAX)
    }

    /// An empty store whose layers are kept as a plan says; `config.keys` and `config.values` are not used.
    ///
    /// # Errors
    /// As for [`PagedStore::new`]; also for a plan of other layers, heads or dimensions. A plan of another model of the same
    /// sizes is not noticed here: that is for [`Plan::check_model`].
    pub fn planned(device: &Device, shape: &KvShape, config: StoreConfig, plan: &Plan) -> Result<Self> {
        let stream = device.stream()?;
        let cache = Cache::planned(device, &stream, cache_config(shape, config), plan)?;
        let latents = plan.layers.iter().any(|l| l.keys.factors().or(l.values.factors()).is_some());
        let max_step = if latents && device.backend() != Backend::Reference { kvlar::MAX_QUERY_ROWS } else { usize::MAX };
        Self::of(device, shape, config, stream, cache, max_step)
    }

    fn of(
        device: &Device,
        shape: &KvShape,
        config: StoreConfig,
        stream: Stream,
        mut cache: Cache,
        max_step: usize,
    ) -> Result<Self> {
        let mut inv_freq = device.alloc(4 * shape.rope.inv_freq.len())?;
        stream.upload(&mut inv_freq, 0, bytemuck::cast_slice(&shape.rope.inv_freq))?;
        let seq = cache.create();
        Ok(Self { stream, cache, seq, shape: shape.clone(), config, inv_freq, batches: BTreeMap::new(), step: 0, max_step })
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Uploads f32 `[n, heads, d]` rounded to the store's type.
    fn upload(&self, x: &Tensor) -> Result<Buffer> {
        let bytes = to_bytes(x, self.config.dtype)?;
        let mut buffer = self.stream.device().alloc(bytes.len())?;
        self.stream.upload(&mut buffer, 0, &bytes)?;
        Ok(buffer)
    }
}

impl KvStore for PagedStore {
    fn max_step(&self) -> usize {
        self.max_step
    }

    fn rollback(&self) -> usize {
        self.cache.rollback_rows()
    }

    fn len(&self) -> usize {
        self.cache.len(self.seq).unwrap_or(0)
    }

    fn begin(&mut self, new: usize) -> Result<()> {
        if new == 0 || new > MAX_STEP {
            return Err(crate::EngineError::Input(format!("a step of {new} tokens")));
        }
        if !self.batches.contains_key(&new) {
            // Prefills come in all lengths: keep the small ones, which recur.
            self.batches.retain(|&n, _| n <= 64);
            let shape = BatchShape { window: self.shape.window, ..BatchShape::new(1, new, self.shape.q_heads) };
            self.batches.insert(new, self.cache.batch(shape)?);
        }
        if let Some(batch) = self.batches.get_mut(&new) {
            self.cache.begin(&self.stream, batch, &[(self.seq, new)])?;
            self.step = new;
        }
        Ok(())
    }

    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = (self.upload(k)?, self.upload(v)?);
        let strides = Some(Strides::rows_first(self.shape.kv_heads, self.step, self.shape.head_dim));
        let rope = rope_of(&self.shape, &self.inv_freq);
        let rows = NewRows { k: k.view(), k_strides: strides, v: v.view(), v_strides: strides };
        let Some(batch) = self.batches.get_mut(&self.step) else { return Err(no_step()) };
        self.cache.append(&self.stream, batch, layer, rows, Some(rope))?;
        // The uploads end with this call.
        Ok(self.stream.synchronize()?)
    }

    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let (heads, d) = (self.shape.q_heads, self.shape.head_dim);
        let input = self.upload(q)?;
        let mut out = self.stream.device().alloc(4 * self.step * heads * d)?;
        let strides = Some(Strides::rows_first(heads, self.step, d));
        let rope = rope_of(&self.shape, &self.inv_freq);
        let queries = Queries {
            q: input.view(),
            q_strides: strides,
            out: out.view_mut(),
            out_strides: strides,
            lse: None,
            sink_logits: None,
            rope: Some(rope),
        };
        let Some(batch) = self.batches.get_mut(&self.step) else { return Err(no_step()) };
        self.cache.attend(&self.stream, batch, layer, queries)?;
        let mut values = vec![0f32; self.step * heads * d];
        self.stream.download(&out, 0, bytemuck::cast_slice_mut(&mut values))?;
        Ok(Tensor::from_vec(values, (self.step, heads, d), q.device())?)
    }

    fn finish(&mut self) -> Result<()> {
        let Some(batch) = self.batches.get_mut(&self.step) else { return Err(no_step()) };
        self.step = 0;
        Ok(self.cache.finish(batch)?)
    }

    fn cancel(&mut self) {
        if let Some(batch) = self.batches.get_mut(&self.step) {
            // Without a step there is nothing to cancel.
            let _ = self.cache.cancel(batch);
        }
        self.step = 0;
    }

    fn truncate(&mut self, rows: usize) -> Result<()> {
        Ok(self.cache.truncate(self.seq, rows)?)
    }

    fn bytes(&self) -> usize {
        self.cache.sequence_bytes(self.seq).unwrap_or(0) + self.cache.fixed_bytes()
    }

    fn decoded_keys(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        match self.cache.decoded_keys(&self.stream, self.seq, layer, &self.shape.rope).map_err(crate::EngineError::from) {
            Ok(keys) => Ok(Some(keys)),
            // Rows that attention reads, but no decoder.
            Err(e) if e.is_unsupported() => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// f32 values rounded to a store's type.
pub(crate) fn to_bytes(x: &Tensor, dtype: Dtype) -> Result<Vec<u8>> {
    let values = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let bits: Vec<u16> = match dtype {
        Dtype::F16 => values.iter().map(|&x| f16::from_f32(x).to_bits()).collect(),
        _ => values.iter().map(|&x| bf16::from_f32(x).to_bits()).collect(),
    };
    Ok(bytemuck::cast_slice(&bits).to_vec())
}

pub(crate) fn rope_of<'a>(shape: &KvShape, inv_freq: &'a Buffer) -> Rope<'a> {
    Rope {
        inv_freq: inv_freq.view(),
        rotary_dim: shape.rope.rotary_dim(),
        layout: shape.rope.layout,
        attention_factor: shape.rope.attention_factor,
    }
}

fn cache_config(shape: &KvShape, config: StoreConfig) -> CacheConfig {
    CacheConfig {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        value_dim: shape.head_dim,
        dtype: config.dtype,
        keys: config.keys,
        values: config.values,
        sink_rows: config.sink_rows,
        recent_rows: config.recent_rows,
        page_rows: config.page_rows,
        pages: config.max_rows.div_ceil(config.page_rows).max(1),
        max_rows: config.max_rows,
        max_seqs: 1,
        rollback_rows: config.rollback_rows,
    }
}

pub(crate) fn no_step() -> crate::EngineError {
    crate::EngineError::Input("no step has begun".into())
}
