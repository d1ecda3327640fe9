//! A store in pages, `kvlar_cache`: token-wise rows, or what a plan says.

use crate::steps::{Steps, max_step};
use crate::{KvShape, KvStore, Result};
use candle_core::Tensor;
use kvlar::{Codec, Device, Dtype, Format, Stream};
use kvlar_cache::{Cache, CacheConfig, SeqId};
use kvlar_calibrate::Plan;

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
    steps: Steps<Cache>,
    seq: SeqId,
    /// Of an attention; a prefill is none.
    max_step: usize,
}

impl PagedStore {
    /// An empty store with room for `config.max_rows` tokens.
    ///
    /// # Errors
    /// If memory runs out, or there is no kernel for the shape.
    pub fn new(device: &Device, shape: &KvShape, config: StoreConfig) -> Result<Self> {
        let cache = Cache::new(device, cache_config(shape, config))?;
        Self::of(cache, device.stream()?, (shape, config.dtype), usize::MAX)
    }

    /// An empty store whose layers are kept as a plan says; `config.keys` and `config.values` are not used.
    ///
    /// # Errors
    /// As for [`PagedStore::new`]; also for a plan of other layers, heads or dimensions. A plan of another model of the same
    /// sizes is not noticed here: that is for [`Plan::check_model`].
    pub fn planned(device: &Device, shape: &KvShape, config: StoreConfig, plan: &Plan) -> Result<Self> {
        let stream = device.stream()?;
        let cache = Cache::planned(device, &stream, cache_config(shape, config), plan)?;
        Self::of(cache, stream, (shape, config.dtype), max_step(device, plan))
    }

    fn of(mut cache: Cache, stream: Stream, (shape, dtype): (&KvShape, Dtype), max_step: usize) -> Result<Self> {
        let seq = cache.create();
        Ok(Self { steps: Steps::new(cache, stream, shape, dtype)?, seq, max_step })
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.steps.cache
    }
}

impl KvStore for PagedStore {
    fn max_step(&self) -> usize {
        self.max_step
    }

    fn rollback(&self) -> usize {
        self.cache().rollback_rows()
    }

    fn len(&self) -> usize {
        self.cache().len(self.seq).unwrap_or(0)
    }

    fn begin(&mut self, new: usize) -> Result<()> {
        self.steps.begin(self.seq, new, MAX_STEP)
    }

    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.steps.append(layer, k, v)
    }

    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        self.steps.attend(layer, q)
    }

    fn finish(&mut self) -> Result<()> {
        self.steps.finish()
    }

    fn cancel(&mut self) {
        self.steps.cancel();
    }

    fn truncate(&mut self, rows: usize) -> Result<()> {
        Ok(self.steps.cache.truncate(self.seq, rows)?)
    }

    fn bytes(&self) -> usize {
        self.cache().sequence_bytes(self.seq).unwrap_or(0) + self.cache().fixed_bytes()
    }

    fn decoded_keys(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        let Steps { cache, stream, shape, .. } = &self.steps;
        match cache.decoded_keys(stream, self.seq, layer, &shape.rope).map_err(crate::EngineError::from) {
            Ok(keys) => Ok(Some(keys)),
            // Rows that attention reads, but no decoder.
            Err(e) if e.is_unsupported() => Ok(None),
            Err(e) => Err(e),
        }
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
