//! Steps of an evicting cache: room for new tokens, their rows, attention over what is held.

use super::batch::{EvictingBatch, PlanKind};
use super::cache::EvictingCache;
use super::sequence::{Step, store_of};
use super::store::RowStore;
use crate::cache::SeqId;
use crate::error::invalid;
use crate::quantized::QuantizedLayer;
use crate::step::take;
use crate::tables::upload;
use crate::turn::check_layer;
use crate::{BatchShape, CacheError, NewRows, Queries, Result};
use kvlar::{AppendArgs, AttendArgs, LowrankArgs, Rope, Segment, Stream};
use std::collections::BTreeMap;

/// A page that was copied because another sequence owns it too: entry `index` of an owner's list.
struct Copied {
    seq: SeqId,
    owner: usize,
    index: usize,
    shared: u32,
}

impl EvictingCache {
    /// Starts a step: makes room for new tokens, copies shared pages that they fall into, and uploads what has changed of the
    /// tables. Not for captured graphs.
    ///
    /// # Errors
    /// [`CacheError::OutOfPages`], [`CacheError::TooLong`], [`CacheError::UnknownSequence`], [`CacheError::Busy`] (also for a
    /// batch in use, and until an eviction was [collected](Self::collect)), [`CacheError::Invalid`] for more sequences or
    /// tokens than the batch was made for.
    pub fn begin(&mut self, stream: &Stream, batch: &mut EvictingBatch, new: &[(SeqId, usize)]) -> Result<()> {
        batch.turn.check_new(self.id, new)?;
        for &(seq, tokens) in new {
            let (s, max) = (self.idle(seq)?, self.config.max_rows);
            let rows = s.most_rows() + tokens;
            if rows > max {
                return Err(CacheError::TooLong { seq, rows, max });
            }
            let (waiting, staged) = (s.tokens + tokens - s.staged_from, self.config.staged);
            if !self.gates.is_empty() && waiting > staged {
                let what = format!("scores of {waiting} would wait, the cache was made for {staged}: evict first");
                return invalid("new tokens", what);
            }
            if s.tokens + tokens > i32::MAX as usize {
                return invalid("new tokens", "positions beyond 2^31 - 1");
            }
        }
        self.check_pages(new)?;
        // From here on only the device can fail; then the books are put back.
        let mut copies = Vec::new();
        let result = self.grow(stream, new, &mut copies).and_then(|()| self.fill(stream, batch, new));
        if let Err(e) = result {
            self.undo(new, &copies);
            return Err(e);
        }
        batch.turn.new = new.to_vec();
        batch.layers.iter_mut().for_each(|l| l.scheduled = false);
        Ok(())
    }

    /// Whether each pool has enough free pages for a step. Of a shared page that all owners write into, one keeps the
    /// original.
    fn check_pages(&self, new: &[(SeqId, usize)]) -> Result<()> {
        for store in &self.stores {
            let (mut needed, mut writers) = (0, BTreeMap::new());
            for (seq, tokens) in new {
                let Some(s) = self.sequences.get(seq) else { continue };
                for owner in &s.owners[store.first_owner..][..store.owners()] {
                    needed += (owner.rows + tokens).div_ceil(store.page_rows) - owner.pages.len();
                    if let Some(page) = written(owner.rows, *tokens, store.page_rows).and_then(|i| owner.pages.get(i)) {
                        *writers.entry(*page).or_insert(0) += 1;
                    }
                }
            }
            needed += writers.into_iter().map(|(page, n)| usize::min(n, store.book.owners(page) - 1)).sum::<usize>();
            check_free(store, needed)?;
        }
        Ok(())
    }

    fn grow(&mut self, stream: &Stream, new: &[(SeqId, usize)], copies: &mut Vec<Copied>) -> Result<()> {
        for &(seq, tokens) in new {
            let Some(s) = self.sequences.get_mut(&seq) else { continue };
            let step = s.step.insert(Step { adding: tokens, came: Vec::new() });
            for store in &mut self.stores {
                let first = store.first_owner;
                for (o, owner) in s.owners[first..][..store.owners()].iter_mut().enumerate() {
                    if let Some(index) = written(owner.rows, tokens, store.page_rows).filter(|&i| i < owner.pages.len()) {
                        let shared = owner.pages[index];
                        if store.book.is_shared(shared) {
                            let own = take(&mut store.book)?;
                            store.book.release(shared);
                            owner.pages[index] = own;
                            copies.push(Copied { seq, owner: first + o, index, shared });
                            s.version += 1;
                            store.copy_page(stream, shared, own)?;
                        }
                    }
                    let come = (owner.rows + tokens).div_ceil(store.page_rows) - owner.pages.len();
                    if come > 0 {
                        s.version += 1;
                        step.came.push((first + o, 0));
                    }
                    for _ in 0..come {
                        owner.pages.push(take(&mut store.book)?);
                        if let Some(came) = step.came.last_mut() {
                            came.1 += 1;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn fill(&mut self, stream: &Stream, batch: &mut EvictingBatch, new: &[(SeqId, usize)]) -> Result<()> {
        let BatchShape { seqs, new_rows, .. } = batch.turn.shape;
        let sequences: Vec<_> = new.iter().filter_map(|(seq, _)| Some((*seq, self.sequences.get(seq)?))).collect();
        for (store, tables) in self.stores.iter().zip(&mut batch.tables) {
            tables.fill(stream, store.first_owner, &sequences)?;
        }
        // From a position of -1 nothing is visible.
        let mut positions = vec![-1i32; seqs * new_rows];
        for (i, (_, s)) in sequences.iter().enumerate() {
            let to = &mut positions[i * new_rows..][..s.adding()];
            to.iter_mut().zip(s.tokens..).for_each(|(to, position)| *to = position as i32);
        }
        upload(stream, &mut batch.positions, &positions)
    }

    /// Puts the books back to before [`EvictingCache::grow`].
    fn undo(&mut self, new: &[(SeqId, usize)], copies: &[Copied]) {
        for (seq, _) in new {
            if let Some(s) = self.sequences.get_mut(seq) {
                s.end_step(false, &mut self.stores);
                s.version += 1;
            }
        }
        for c in copies {
            let (Some(store), Some(s)) = (store_of(&mut self.stores, c.owner), self.sequences.get_mut(&c.seq)) else { continue };
            let page = &mut s.owners[c.owner].pages[c.index];
            store.book.share(c.shared);
            store.book.release(std::mem::replace(page, c.shared));
        }
    }

    /// Enqueues the writing of a layer's new rows and their positions; padding rows are not stored. One launch.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a layer that does not exist or a batch without a step; [`CacheError::Device`].
    pub fn append(
        &mut self,
        stream: &Stream,
        batch: &mut EvictingBatch,
        layer: usize,
        new: NewRows<'_>,
        rope: Option<Rope<'_>>,
    ) -> Result<()> {
        self.check_step(batch, layer)?;
        let of = &self.layers[layer];
        let store = &mut self.stores[of.store];
        let slots_per_head = store.owners_a_layer > 1;
        let (keys, values, row_positions) = store.pools_mut();
        let tables = &batch.tables[of.store];
        let slots = tables.slots(of.index)?;
        let rows = tables.rows(of.index, None)?;
        match (&batch.layers[layer].kind, &of.lowrank) {
            (PlanKind::Rows(plans), _) => {
                let mut args = AppendArgs {
                    k: new.k,
                    k_strides: new.k_strides,
                    v: new.v,
                    v_strides: new.v_strides,
                    positions: batch.positions.view(),
                    slots,
                    slots_per_head,
                    rope,
                    rows,
                    row_positions: Some(row_positions),
                    keys,
                    values,
                    key_scores: None,
                    tables: of.quantized.as_ref().map(QuantizedLayer::tables).unwrap_or_default(),
                };
                Ok(plans.0.launch(stream, &mut args, &mut batch.workspace)?)
            }
            (PlanKind::Lowrank(plans), Some(lowrank)) => {
                let mut args = lowrank.append_args(&new, rows, slots, (keys, values));
                args.positions = Some(batch.positions.view());
                args.row_positions = Some(row_positions);
                Ok(plans.0.launch(stream, &mut args, &mut batch.workspace)?)
            }
            (PlanKind::Lowrank(_), None) => invalid("batch", "was made for another cache"),
        }
    }

    /// Enqueues a layer's attention of the new tokens over the rows that its heads hold, the new ones included: two launches,
    /// of which the first makes the layer's work list.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a layer that does not exist or a batch without a step; [`CacheError::Device`].
    pub fn attend(&self, stream: &Stream, batch: &mut EvictingBatch, layer: usize, args: Queries<'_>) -> Result<()> {
        self.check_step(batch, layer)?;
        let of = &self.layers[layer];
        let (keys, values, positions) = self.stores[of.store].pools();
        let rows = batch.tables[of.store].rows(of.index, Some(positions))?;
        let shared = of.quantized.as_ref().map(QuantizedLayer::tables).unwrap_or_default();
        let segments = [Segment { rows, keys, values, tables: shared }];
        let rope = args.rope;
        let mut args = AttendArgs {
            q: args.q,
            q_strides: args.q_strides,
            out: args.out,
            out_strides: args.out_strides,
            lse: args.lse,
            segments: &segments,
            q_positions: Some(batch.positions.view()),
            sink_logits: args.sink_logits,
        };
        let plans = &mut batch.layers[layer];
        let Some(work) = &mut plans.work else {
            let most = kvlar::MAX_QUERY_ROWS;
            return invalid("new tokens", format!("a low-rank layer attends from up to {most} of them at a time"));
        };
        match (&plans.kind, &of.lowrank) {
            (PlanKind::Rows(of), _) => {
                let attend = &of.1;
                if !plans.scheduled {
                    attend.schedule(stream, &args, work, &mut batch.workspace)?;
                }
                attend.launch(stream, &mut args, work, &mut batch.workspace)?;
            }
            (PlanKind::Lowrank(of), Some(lowrank)) => {
                let Some(attend) = &of.1 else { return invalid("batch", "was made for another cache") };
                let mut args = LowrankArgs { attend: args, bases: lowrank.bases(), rope, sets: lowrank.sets() };
                if !plans.scheduled {
                    attend.schedule(stream, &args, work, &mut batch.workspace)?;
                }
                attend.launch(stream, &mut args, work, &mut batch.workspace)?;
            }
            _ => return invalid("batch", "was made for another cache"),
        }
        plans.scheduled = true;
        Ok(())
    }

    /// Finishes a step: its tokens are part of their sequences.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a batch without a step of this cache; a step of another cache goes on.
    pub fn finish(&mut self, batch: &mut EvictingBatch) -> Result<()> {
        self.end(batch, true)
    }

    /// Ends a step as if it had not begun: its tokens are forgotten. Pages that it copied because others own them too stay
    /// copied.
    ///
    /// # Errors
    /// As for [`EvictingCache::finish`].
    pub fn cancel(&mut self, batch: &mut EvictingBatch) -> Result<()> {
        self.end(batch, false)
    }

    fn end(&mut self, batch: &mut EvictingBatch, keep: bool) -> Result<()> {
        batch.turn.check(self.id)?;
        for (seq, _) in batch.turn.new.drain(..) {
            if let Some(s) = self.sequences.get_mut(&seq) {
                s.end_step(keep, &mut self.stores);
                s.version += u64::from(!keep);
            }
        }
        Ok(())
    }

    pub(super) fn check_step(&self, batch: &EvictingBatch, layer: usize) -> Result<()> {
        check_layer(layer, self.layers.len())?;
        batch.turn.check(self.id)
    }
}

/// The page that is there already and that new rows fall into.
fn written(rows: usize, new: usize, page_rows: usize) -> Option<usize> {
    (new > 0 && !rows.is_multiple_of(page_rows)).then_some(rows / page_rows)
}

/// That a pool has so many free pages.
pub(super) fn check_free(store: &RowStore, needed: usize) -> Result<()> {
    let (free, capacity) = (store.book.free(), store.book.capacity());
    if needed > free { Err(CacheError::OutOfPages { of: "pages", needed, free, capacity }) } else { Ok(()) }
}
