//! A store that lets go of tokens: `kvlar_cache::EvictingCache`.

use crate::paged::{no_step, rope_of, to_bytes};
use crate::{EngineError, KvShape, KvStore, Moment, Result};
use candle_core::Tensor;
use kvlar::{Backend, Buffer, Codec, Device, Dtype, Format, Stream, Strides};
use kvlar_cache::{
    BatchShape, EvictingBatch, EvictingCache, EvictingConfig, Evictor, NewRows, Observed, Policy, Queries, Scorer, SeqId,
};
use kvlar_calibrate::Plan;
use std::collections::BTreeMap;

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
    stream: Stream,
    cache: EvictingCache,
    evictor: Evictor,
    seq: SeqId,
    marks: Vec<SeqId>,
    shape: KvShape,
    config: EvictingStoreConfig,
    inv_freq: Buffer,
    /// Tables and scratch, one for each number of new tokens that has occurred.
    batches: BTreeMap<usize, EvictingBatch>,
    step: usize,
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
        Self::of(device, shape, config, cache, usize::MAX)
    }

    /// An empty store whose rows are as a plan says.
    ///
    /// # Errors
    /// As for [`EvictingStore::new`]; also for a plan of other layers, heads or dimensions.
    pub fn planned(device: &Device, shape: &KvShape, config: EvictingStoreConfig, plan: &Plan) -> Result<Self> {
        let stream = device.stream()?;
        let cache = EvictingCache::planned(device, &stream, cache_config(shape, &config), config.policy.clone(), plan)?;
        let latents = plan.layers.iter().any(|l| l.keys.factors().or(l.values.factors()).is_some());
        let max_step = if latents && device.backend() != Backend::Reference { kvlar::MAX_QUERY_ROWS } else { usize::MAX };
        Self::of(device, shape, config, cache, max_step)
    }

    fn of(
        device: &Device,
        shape: &KvShape,
        config: EvictingStoreConfig,
        mut cache: EvictingCache,
        max_step: usize,
    ) -> Result<Self> {
        let stream = device.stream()?;
        let mut inv_freq = device.alloc(4 * shape.rope.inv_freq.len())?;
        stream.upload(&mut inv_freq, 0, bytemuck::cast_slice(&shape.rope.inv_freq))?;
        let (seq, evictor) = (cache.create()?, cache.evictor()?);
        let (shape, batches) = (shape.clone(), BTreeMap::new());
        Ok(Self { stream, cache, evictor, seq, marks: Vec::new(), shape, config, inv_freq, batches, step: 0, max_step })
    }

    /// The cache.
    pub fn cache(&self) -> &EvictingCache {
        &self.cache
    }

    /// Its sequence.
    pub fn sequence(&self) -> SeqId {
        self.seq
    }

    fn upload(&self, x: &Tensor) -> Result<Buffer> {
        let bytes = to_bytes(x, self.config.dtype)?;
        let mut buffer = self.stream.device().alloc(bytes.len())?;
        self.stream.upload(&mut buffer, 0, &bytes)?;
        Ok(buffer)
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
        match self.config.policy.prompt {
            kvlar_cache::Prompt::EachChunk => self.config.prompt_chunk,
            _ => usize::MAX,
        }
    }

    fn len(&self) -> usize {
        self.cache.len(self.seq).unwrap_or(0)
    }

    fn begin(&mut self, new: usize) -> Result<()> {
        if new == 0 || new > self.config.max_rows {
            return Err(EngineError::Input(format!("a step of {new} tokens")));
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

    fn observe(&mut self, layer: usize, hidden: &Tensor, q: &Tensor, prompt: bool) -> Result<()> {
        if !self.cache.observes(prompt) {
            return Ok(());
        }
        let (hidden, q) = (self.upload(hidden)?, self.upload(q)?);
        let q_strides = Some(Strides::rows_first(self.shape.q_heads, self.step, self.shape.head_dim));
        let seen = Observed { q: Some(q.view()), q_strides, hidden: Some(hidden.view()), prompt };
        let Some(batch) = self.batches.get_mut(&self.step) else { return Err(no_step()) };
        self.cache.observe(&self.stream, batch, layer, seen)?;
        Ok(self.stream.synchronize()?)
    }

    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let (heads, d) = (self.shape.q_heads, self.shape.head_dim);
        let input = self.upload(q)?;
        let mut out = self.stream.device().alloc(4 * self.step * heads * d)?;
        let strides = Some(Strides::rows_first(heads, self.step, d));
        let queries = Queries {
            q: input.view(),
            q_strides: strides,
            out: out.view_mut(),
            out_strides: strides,
            lse: None,
            sink_logits: None,
            rope: Some(rope_of(&self.shape, &self.inv_freq)),
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

    fn evict(&mut self, moment: Moment) -> Result<()> {
        self.cache.commit(self.seq, self.cache.len(self.seq)?)?;
        self.cache.evict(&self.stream, &mut self.evictor, self.seq, moment)?;
        Ok(self.cache.collect(&self.stream, &mut self.evictor, self.seq)?)
    }

    fn wants_scores(&self) -> bool {
        matches!(self.config.policy.scorer, Scorer::Given)
    }

    fn give_scores(&mut self, layer: usize, scores: &[f32]) -> Result<()> {
        Ok(self.cache.set_scores(&self.stream, self.seq, layer, scores)?)
    }

    fn mark(&mut self) -> Result<usize> {
        // One at a time: there is room for so many copies.
        for seq in self.marks.drain(..) {
            self.cache.remove(seq)?;
        }
        self.marks.push(self.cache.fork(&self.stream, self.seq)?);
        Ok(0)
    }

    fn return_to(&mut self, mark: usize) -> Result<()> {
        let Some(&marked) = self.marks.get(mark) else { return Err(EngineError::Input(format!("no mark {mark}"))) };
        let copy = self.cache.fork(&self.stream, marked)?;
        self.cache.remove(std::mem::replace(&mut self.seq, copy))?;
        Ok(())
    }

    fn bytes(&self) -> usize {
        self.cache.sequence_bytes(self.seq).unwrap_or(0) + self.cache.fixed_bytes()
    }
}
