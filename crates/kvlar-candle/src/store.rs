//! What an engine needs of a KV cache.

use crate::{EngineError, Result};
use candle_core::Tensor;
pub use kvlar_cache::Moment;

/// Sizes that a model's cache has.
#[derive(Clone, Debug, PartialEq)]
pub struct KvShape {
    /// L.
    pub layers: usize,
    /// Hq.
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// d.
    pub head_dim: usize,
    /// 0 = off.
    pub window: u32,
    /// How keys are rotated.
    pub rope: kvlar_reference::Rope,
}

/// The keys and values of one sequence, kept in some form. A step is `begin`, then `append` and (but for a prefill, whose
/// attention is exact and the engine's own) `attend` of each layer in turn, then `finish`.
pub trait KvStore {
    /// Tokens held.
    fn len(&self) -> usize;

    /// Whether no tokens are held.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Starts a step of `new` tokens.
    ///
    /// # Errors
    /// If there is no room; the store is as before.
    fn begin(&mut self, new: usize) -> Result<()>;

    /// Stores a layer's new rows: k before RoPE and v, f32 `[new, Hk, d]`.
    ///
    /// # Errors
    /// If the device refuses.
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()>;

    /// Attention of the new tokens' queries (rotated, f32 `[new, Hq, d]`) over all tokens: f32 `[new, Hq, d]`.
    ///
    /// # Errors
    /// If the device refuses.
    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor>;

    /// What a layer's attention takes of the new tokens, after [`KvStore::append`] and before any attention: its input behind the
    /// norm, f32 `[new, D]`, and the queries (rotated), f32 `[new, Hq, d]`; `prompt`: they are of a prompt. Stores that judge
    /// tokens by it listen.
    ///
    /// # Errors
    /// If the device refuses.
    fn observe(&mut self, _layer: usize, _hidden: &Tensor, _q: &Tensor, _prompt: bool) -> Result<()> {
        Ok(())
    }

    /// Between steps: lets go of what the store does not keep. Tokens before it cannot be taken back then.
    ///
    /// # Errors
    /// If the device refuses.
    fn evict(&mut self, _moment: Moment) -> Result<()> {
        Ok(())
    }

    /// Tokens of a prompt that are read at a time, where [`KvStore::evict`] lets go of some after each chunk.
    fn prompt_chunk(&self) -> usize {
        usize::MAX
    }

    /// Whether the store waits for [`KvStore::give_scores`] before it lets go of a prompt's tokens.
    fn wants_scores(&self) -> bool {
        false
    }

    /// What the tokens of a prompt are worth in a layer, by kv head, `[Hk, tokens]`.
    ///
    /// # Errors
    /// [`EngineError::Input`] from a store that does not want them.
    fn give_scores(&mut self, _layer: usize, _scores: &[f32]) -> Result<()> {
        Err(EngineError::Input("scores for a store that does not want any".into()))
    }

    /// Remembers the store as it is, for [`KvStore::return_to`]. By default its length.
    ///
    /// # Errors
    /// If there is no room.
    fn mark(&mut self) -> Result<usize> {
        Ok(self.len())
    }

    /// As it was at a mark, which stays.
    ///
    /// # Errors
    /// [`EngineError::Input`] for what is no mark; by default, as [`KvStore::truncate`].
    fn return_to(&mut self, mark: usize) -> Result<()> {
        self.truncate(mark)
    }

    /// Most new tokens that [`KvStore::attend`] takes at a time; the engine cuts longer steps.
    fn max_step(&self) -> usize {
        usize::MAX
    }

    /// How many tokens [`KvStore::truncate`] takes back as if they had never been, counted from the most held. Where more
    /// are, what follows may differ: the store keeps less of the tokens before them.
    fn rollback(&self) -> usize {
        usize::MAX
    }

    /// Ends a step.
    ///
    /// # Errors
    /// If no step has begun.
    fn finish(&mut self) -> Result<()>;

    /// Ends a step that failed as if it had not begun.
    fn cancel(&mut self);

    /// Takes tokens back, to `rows`; without a trace if they are no more than [`KvStore::rollback`].
    ///
    /// # Errors
    /// If there are fewer, or some of the others cannot be taken back.
    fn truncate(&mut self, rows: usize) -> Result<()>;

    /// Bytes that the tokens held take, with scales, padding, bases and tables.
    fn bytes(&self) -> usize;

    /// A layer's keys as attention sees them, after RoPE: f32 `[tokens, Hk, d]`; during a step with those that it has
    /// appended. `None`: the store cannot give them. For measurements, not for speed.
    ///
    /// # Errors
    /// If the device fails.
    fn decoded_keys(&self, _layer: usize) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}

/// Most tokens that [`crate::llama::Llama::extend`] takes at once: those of as many steps as can be taken back if one fails.
#[cfg(feature = "llama")]
pub(crate) fn most_at_once(store: &dyn KvStore) -> usize {
    let most = store.max_step();
    (store.rollback() / most.max(1)).saturating_add(1).saturating_mul(most)
}
