//! A store that lets go of tokens: `kvlar_cache::EvictingCache`.

use crate::steps::{Steps, max_step};
use crate::{EngineError, KvShape, KvStore, Moment, Result};
use candle_core::Tensor;
use kvlar::{Codec, Device, Dtype, Format, Stream};
use kvlar_cache::{EvictingCache, EvictingConfig, Evictor, Policy, Prompt, Scorer, SeqId};
use kvlar_calibrate::Plan;

/// What an [`EvictingStore`] is made from.
#[derive(Clone, Debug)]
pub struct EvictingStoreConfig {
    /// Type of queries, keys and values on the device.
    pub dtype: Dtype,
    /// Of stored keys; not used beside a plan.
    pub keys: Format,
    /// Of stored values, likewise.
    pub values: Format,
    /// Most rows of a head: of a prompt before anything goes.
    pub max_rows: usize,
    /// Rows a page of one head. Small pages leave less of the last one empty.
    pub page_rows: usize,
    /// Tokens of a prompt that are read at a time, where what goes goes chunk by chunk.
    pub prompt_chunk: usize,
    /// What goes, and when.
    pub policy: Policy,
}

impl EvictingStoreConfig {
    /// Rows in bf16, in pages of 16; prompts in chunks of 16,000 tokens (Fast KVzip).
    pub fn bf16(max_rows: usize, policy: Policy) -> Self {
        let own = Codec::Bf16.into();
        Self { dtype: Dtype::Bf16, keys: own, values: own, max_rows, page_rows: 16, prompt_chunk: 16_000, policy }
    }
}

/// One sequence in a `kvlar_cache::EvictingCache`, and copies of it at its marks.
#[derive(Debug)]
pub struct EvictingStore {
    steps: Steps<EvictingCache>,
    evictor: Evictor,
    seq: SeqId,
    marks: Vec<SeqId>,
    /// Tokens of a prompt that are read at a time.
    prompt_chunk: usize,
    max_step: usize,
}

/// A sequence, its copy at a mark, and one more on the way from one to the other.
const SEQUENCES: usize = 3;

impl EvictingStore {
    /// An empty store.
    ///
    /// # Errors
    /// If memory runs out, there is no kernel, or the policy contradicts itself or the model.
    pub fn new(device: &Device, shape: &KvShape, config: EvictingStoreConfig) -> Result<Self> {
        let cache = EvictingCache::new(device, cache_config(shape, &config), config.policy.clone())?;
        Self::of(cache, device.stream()?, shape, &config, usize::MAX)
    }

    /// An empty store whose rows are as a plan says.
    ///
    /// # Errors
    /// As for [`EvictingStore::new`]; also for a plan of other layers, heads or dimensions.
    pub fn planned(device: &Device, shape: &KvShape, config: EvictingStoreConfig, plan: &Plan) -> Result<Self> {
        let stream = device.stream()?;
        let cache = EvictingCache::planned(device, &stream, cache_config(shape, &config), config.policy.clone(), plan)?;
        Self::of(cache, stream, shape, &config, max_step(device, plan))
    }

    fn of(
        mut cache: EvictingCache,
        stream: Stream,
        shape: &KvShape,
        config: &EvictingStoreConfig,
        max_step: usize,
    ) -> Result<Self> {
        let (seq, evictor) = (cache.create()?, cache.evictor()?);
        let prompt_chunk = if config.policy.prompt == Prompt::EachChunk { config.prompt_chunk } else { usize::MAX };
        Ok(Self {
            steps: Steps::new(cache, stream, shape, config.dtype)?,
            evictor,
            seq,
            marks: Vec::new(),
            prompt_chunk,
            max_step,
        })
    }

    /// The cache.
    pub fn cache(&self) -> &EvictingCache {
        &self.steps.cache
    }

    /// Its sequence.
    pub fn sequence(&self) -> SeqId {
        self.seq
    }
}

fn cache_config(shape: &KvShape, config: &EvictingStoreConfig) -> EvictingConfig {
    let of = EvictingConfig {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        value_dim: shape.head_dim,
        dtype: config.dtype,
        keys: config.keys,
        values: config.values,
        page_rows: config.page_rows,
        pages: 1,
        max_rows: config.max_rows,
        max_seqs: SEQUENCES,
        staged: config.max_rows,
    };
    EvictingConfig { pages: 2 * of.pages_of(config.max_rows), ..of }
}

impl KvStore for EvictingStore {
    fn max_step(&self) -> usize {
        self.max_step
    }

    fn prompt_chunk(&self) -> usize {
        self.prompt_chunk
    }

    fn len(&self) -> usize {
        self.cache().len(self.seq).unwrap_or(0)
    }

    fn begin(&mut self, new: usize) -> Result<()> {
        let most = self.cache().config().max_rows;
        self.steps.begin(self.seq, new, most)
    }

    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.steps.append(layer, k, v)
    }

    fn observe(&mut self, layer: usize, hidden: &Tensor, q: &Tensor, prompt: bool) -> Result<()> {
        self.steps.observe(layer, hidden, q, prompt)
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

    fn evict(&mut self, moment: Moment) -> Result<()> {
        let Steps { cache, stream, .. } = &mut self.steps;
        cache.commit(self.seq, cache.len(self.seq)?)?;
        cache.evict(stream, &mut self.evictor, self.seq, moment)?;
        Ok(cache.collect(stream, &mut self.evictor, self.seq)?)
    }

    fn wants_scores(&self) -> bool {
        matches!(self.cache().policy().scorer, Scorer::Given)
    }

    fn give_scores(&mut self, layer: usize, scores: &[f32]) -> Result<()> {
        Ok(self.steps.cache.set_scores(&self.steps.stream, self.seq, layer, scores)?)
    }

    fn mark(&mut self) -> Result<usize> {
        // One at a time: there is room for so many copies.
        for seq in self.marks.drain(..) {
            self.steps.cache.remove(seq)?;
        }
        self.marks.push(self.steps.cache.fork(&self.steps.stream, self.seq)?);
        Ok(0)
    }

    fn return_to(&mut self, mark: usize) -> Result<()> {
        let Some(&marked) = self.marks.get(mark) else { return Err(EngineError::Input(format!("no mark {mark}"))) };
        let copy = self.steps.cache.fork(&self.steps.stream, marked)?;
        self.steps.cache.remove(std::mem::replace(&mut self.seq, copy))?;
        Ok(())
    }

    fn bytes(&self) -> usize {
        self.cache().sequence_bytes(self.seq).unwrap_or(0) + self.cache().fixed_bytes()
    }
}
