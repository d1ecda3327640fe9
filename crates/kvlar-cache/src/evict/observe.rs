//! What a step shows of a layer, and the scores that it gives rows.

use super::batch::EvictingBatch;
use super::cache::EvictingCache;
use super::policy::{Scorer, WindowScore};
use crate::error::invalid;
use crate::{BatchShape, Result, SeqId};
use kvlar::{
    GateWeights, Pooling, ReduceArgs, ReduceShape, Reduction, ScoreArgs, ScoreGateArgs, ScoreReduction, ScoreShape, ScoredRows,
    Stream, Strides, View, ViewMut, WorkspaceSize,
};

/// What a layer's attention takes in a step, of the batch's shape.
#[derive(Clone, Copy, Debug, Default)]
pub struct Observed<'a> {
    /// `[seqs, Hq, new_rows, d]`, rotated, in the cache's type; policies that score by attention need it.
    pub q: Option<View<'a>>,
    /// `None`: dense, as above.
    pub q_strides: Option<Strides>,
    /// `[seqs, new_rows, D]` in the cache's type: the input of the layer's attention, behind its norm; policies with gates need
    /// it.
    pub hidden: Option<View<'a>>,
    /// Whether a prompt is being read, whose last tokens' attention SnapKV and its kin score by; else they do nothing.
    pub prompt: bool,
}

impl EvictingCache {
    /// Whether [`observe`](Self::observe) has anything to do in a step of a prompt, or while decoding.
    pub fn observes(&self, prompt: bool) -> bool {
        match self.policy.scorer {
            Scorer::Age | Scorer::Keys(_) | Scorer::Given => false,
            Scorer::Window(_) => prompt,
            Scorer::Column | Scorer::LastQuery | Scorer::Gate(_) => true,
        }
    }

    /// Enqueues the scores that a layer's rows get from what a step shows of it, after its [`append`](Self::append): one launch
    /// a sequence with gates, two with attention; one more where keys are codes, and one where the heads of a layer share rows.
    ///
    /// # Errors
    /// [`crate::CacheError::Invalid`] for a layer that does not exist, a batch without a step, or without what the policy needs;
    /// [`crate::CacheError::Device`].
    pub fn observe(&mut self, stream: &Stream, batch: &mut EvictingBatch, layer: usize, seen: Observed<'_>) -> Result<()> {
        self.check_step(batch, layer)?;
        if !self.observes(seen.prompt) {
            return Ok(());
        }
        let active: Vec<_> = batch.turn.new.iter().enumerate().map(|(i, &(seq, tokens))| (i, seq, tokens)).collect();
        for of in active.into_iter().filter(|(.., tokens)| *tokens > 0) {
            match self.policy.scorer {
                Scorer::Gate(_) => self.score_by_gate(stream, batch, layer, of, &seen)?,
                _ => self.score_by_attention(stream, batch, layer, of, &seen)?,
            }
        }
        Ok(())
    }

    fn score_by_attention(
        &mut self,
        stream: &Stream,
        batch: &mut EvictingBatch,
        layer: usize,
        (i, seq, tokens): (usize, SeqId, usize),
        seen: &Observed<'_>,
    ) -> Result<()> {
        let Some(q) = seen.q else { return invalid("q", "the policy scores by attention") };
        let BatchShape { q_heads, new_rows, .. } = batch.turn.shape;
        let Some(shape) = self.attention_shape(&batch.turn.shape, tokens) else { return Ok(()) };
        let plan = shape.plan(&self.device)?;
        let s = self.get(seq)?;
        let (slot, most) = (s.slot, s.most_rows() + s.adding());
        let (owners, first_owner, max_rows) = (self.owners(), self.owners_of(layer).start, self.config.max_rows);
        let of = &self.layers[layer];
        let store = &self.stores[of.store];
        let (mut keys, _, _) = store.pools();
        let mut rows = batch.tables[of.store].rows_of(of.index, i)?;
        if let (Some([format, _]), Some(decoded)) = (self.encoded(layer), &mut batch.decoded_keys) {
            (rows, keys) = decoded.decode(stream, rows, most, &keys, format)?;
        }
        // The last queries of the sequence's.
        let strides = seen.q_strides.unwrap_or(Strides::heads_first(q_heads, new_rows, self.config.head_dim));
        let first = i * strides.seq + (tokens - shape.queries) * strides.row;
        let q = q.slice(first * self.config.dtype.bytes()..kvlar::Memory::bytes(&q))?;
        let at = 4 * (slot * owners + first_owner) * max_rows;
        if store.owners_a_layer == 1 && self.config.kv_heads > 1 {
            // Heads share rows: each has its scores, then they have one.
            let reduce = self.heads_to_layer(max_rows).plan(&self.device)?;
            let heads = &mut batch.head_scores;
            let mut args = ScoreArgs { q_strides: Some(strides), ..ScoreArgs::new(q, rows, keys, heads.view_mut()) };
            plan.launch(stream, &mut args, &mut batch.workspace)?;
            let end = at + 4 * max_rows;
            let mut args = ReduceArgs {
                logits: heads.view(),
                lse: None,
                lengths: None,
                lengths_per_head: false,
                scores: self.scores.view_mut().slice(at..end)?,
                histogram: None,
            };
            return Ok(reduce.launch(stream, &mut args, &mut batch.workspace)?);
        }
        let end = at + 4 * store.owners_a_layer * max_rows;
        let mut args = ScoreArgs {
            q_strides: Some(strides),
            score_stride: Some(max_rows),
            ..ScoreArgs::new(q, rows, keys, self.scores.view_mut().slice(at..end)?)
        };
        Ok(plan.launch(stream, &mut args, &mut batch.workspace)?)
    }

    /// One launch a sequence, and one more where the heads of a layer share rows.
    fn score_by_gate(
        &mut self,
        stream: &Stream,
        batch: &mut EvictingBatch,
        layer: usize,
        (i, seq, tokens): (usize, SeqId, usize),
        seen: &Observed<'_>,
    ) -> Result<()> {
        let Some(hidden) = seen.hidden else { return invalid("hidden", "the policy scores by gates") };
        let s = self.get(seq)?;
        let (owners, first_owner) = (self.owners(), self.owners_of(layer).start);
        let (staged, column) = (self.config.staged, s.tokens - s.staged_from);
        let at = 4 * ((s.slot * owners + first_owner) * staged + column);
        let weights = &self.gates[layer];
        let dim = weights.shape(1, 1, 1).hidden_dim;
        let first = 2 * i * batch.turn.shape.new_rows * dim;
        let hidden = hidden.slice(first..kvlar::Memory::bytes(&hidden))?;
        let plan = weights.shape(1, tokens, tokens).plan(&self.device)?;
        let owners_a_layer = self.stores[self.layers[layer].store].owners_a_layer;
        if owners_a_layer == 1 && self.config.kv_heads > 1 {
            let reduce = self.heads_to_layer(tokens).plan(&self.device)?;
            let mut args = gate_args(hidden, weights, batch.head_scores.view_mut());
            plan.launch(stream, &mut args, &mut batch.workspace)?;
            let mut args = ReduceArgs {
                logits: batch.head_scores.view(),
                lse: None,
                lengths: None,
                lengths_per_head: false,
                scores: self.staged.view_mut().slice(at..at + 4 * tokens)?,
                histogram: None,
            };
            return Ok(reduce.launch(stream, &mut args, &mut batch.workspace)?);
        }
        let end = at + 4 * ((owners_a_layer - 1) * staged + tokens);
        let scores = self.staged.view_mut().slice(at..end)?;
        let mut args = gate_args(hidden, weights, scores);
        args.score_strides = Some([owners_a_layer * staged, staged]);
        Ok(plan.launch(stream, &mut args, &mut batch.workspace)?)
    }

    /// What an engine found a layer's tokens to be worth, by kv head, f32 `[Hk, tokens]`: KVzip's scores. A layer whose heads keep
    /// the same tokens goes by the largest. Nothing may have been evicted.
    ///
    /// # Errors
    /// [`crate::CacheError::UnknownSequence`], [`crate::CacheError::Busy`]; [`crate::CacheError::Invalid`] for a layer that does
    /// not exist, another number of scores, a sequence that tokens were evicted from, a policy that scores by itself;
    /// [`crate::CacheError::Device`].
    pub fn set_scores(&mut self, stream: &Stream, seq: SeqId, layer: usize, scores: &[f32]) -> Result<()> {
        let s = self.idle(seq)?;
        if !matches!(self.policy.scorer, Scorer::Given) {
            return invalid("scores", "the policy scores by itself");
        }
        if layer >= self.layers.len() {
            return invalid("layer", format!("{layer} of {}", self.layers.len()));
        }
        let (heads, tokens) = (self.config.kv_heads, s.tokens);
        if scores.len() != heads * tokens {
            return invalid("scores", format!("{} of {heads} heads and {tokens} tokens", scores.len()));
        }
        let owners = self.owners_of(layer);
        if owners.clone().any(|o| s.owners[o].rows != tokens) {
            return invalid("scores", "some tokens were evicted");
        }
        let (all, max_rows, slot) = (self.owners(), self.config.max_rows, s.slot);
        for (i, owner) in owners.clone().enumerate() {
            let of = |head: usize| &scores[head * tokens..(head + 1) * tokens];
            let largest: Vec<f32>;
            let own = if owners.len() == heads {
                of(i)
            } else {
                let best = |t: usize| (0..heads).map(|h| of(h)[t]).fold(f32::NAN, f32::max);
                largest = (0..tokens).map(best).collect();
                &largest
            };
            stream.upload(&mut self.scores, 4 * (slot * all + owner) * max_rows, bytemuck::cast_slice(own))?;
        }
        Ok(())
    }

    /// Attention that `tokens` new tokens of one sequence pay to its rows, as the policy scores it; `None` where it does not.
    pub(super) fn attention_shape(&self, batch: &BatchShape, tokens: usize) -> Option<ScoreShape> {
        let c = &self.config;
        let heads = (batch.q_heads, c.kv_heads);
        let of = |queries| {
            let shape = ScoreShape::window(c.dtype, 1, heads, queries, c.max_rows, c.head_dim);
            let scale = batch.scale.unwrap_or(shape.scale);
            let (pool, over_heads) = (Pooling::None, ScoreReduction::Mean);
            ScoreShape { scale, scored: ScoredRows::All, over_rows: ScoreReduction::Sum, pool, over_heads, fill: false, ..shape }
        };
        match self.policy.scorer {
            Scorer::Window(WindowScore { rows, over_rows, pool, over_heads }) => {
                Some(ScoreShape { scored: ScoredRows::Prefix, over_rows, pool, over_heads, ..of(rows.min(tokens)) })
            }
            Scorer::Column => Some(ScoreShape { accumulate: Some(1.0), ..of(tokens) }),
            Scorer::LastQuery => Some(of(1)),
            Scorer::Age | Scorer::Keys(_) | Scorer::Given | Scorer::Gate(_) => None,
        }
    }

    /// Scores of kv heads to one a layer, where heads share rows: the mean (TOVA), or the largest of a cache group.
    pub(super) fn heads_to_layer(&self, columns: usize) -> ReduceShape {
        let method = if self.policy.by_layer() { Reduction::MeanLogit } else { Reduction::MaxLogit };
        ReduceShape { seqs: 1, q_heads: self.config.kv_heads, kv_heads: 1, rows: columns, method, fill: false, histogram: false }
    }

    /// Scratch for the scores of steps of some shape.
    pub(super) fn observing_workspace(&self, batch: &BatchShape) -> Result<WorkspaceSize> {
        let mut size = WorkspaceSize::default();
        if let Some(gate) = self.gates.first() {
            // Some tokens are shared out over CTAs, many are not.
            for tokens in (1..=batch.new_rows.min(256)).chain([batch.new_rows]) {
                size = size.max(gate.shape(1, tokens, tokens).plan(&self.device)?.workspace());
            }
        }
        for tokens in 1..=batch.new_rows {
            let Some(shape) = self.attention_shape(batch, tokens) else { break };
            size = size.max(shape.plan(&self.device)?.workspace());
            if matches!(self.policy.scorer, Scorer::Window(w) if tokens >= w.rows) || self.policy.by_layer() {
                break; // more tokens have no more queries
            }
        }
        Ok(size)
    }
}

fn gate_args<'a>(hidden: View<'a>, weights: &'a GateWeights, scores: ViewMut<'a>) -> ScoreGateArgs<'a> {
    ScoreGateArgs { hidden, hidden_strides: None, weights, scores, score_strides: None, first_columns: None, counts: None }
}
