//! Steps: room for new tokens, their rows, attention over them.

use crate::batch::Batch;
use crate::cache::{Cache, SeqId};
use crate::error::invalid;
use crate::layer::Layer;
use crate::pages::PageBook;
use crate::quantized::{QuantizedLayer, Writing};
use crate::sequence::Kind;
use crate::turn::check_layer;
use crate::{CacheError, Result};
use kvlar::{AppendArgs, AppendGroupsArgs, AttendArgs, LowrankArgs, Pool, Rope, Rows, Segment, Stream, Strides, View, ViewMut};
use std::collections::BTreeMap;

/// A page that was copied because another sequence owns it too.
struct Copied {
    seq: SeqId,
    kind: Kind,
    shared: u32,
    own: u32,
}

/// New rows of a layer: k before RoPE and v, of the batch's shape.
#[derive(Clone, Copy, Debug)]
pub struct NewRows<'a> {
    /// `[seqs, Hk, new_rows, d]`.
    pub k: View<'a>,
    /// `None`: dense, as above.
    pub k_strides: Option<Strides>,
    /// `[seqs, Hk, new_rows, dv]`.
    pub v: View<'a>,
    /// `None`: dense, as above.
    pub v_strides: Option<Strides>,
}

/// Queries of a layer and where their results go, of the batch's shape.
#[derive(Debug)]
pub struct Queries<'a> {
    /// `[seqs, Hq, new_rows, d]`, rotated.
    pub q: View<'a>,
    /// `None`: dense, as above.
    pub q_strides: Option<Strides>,
    /// `[seqs, Hq, new_rows, dv]`; 0 for padding rows.
    pub out: ViewMut<'a>,
    /// `None`: dense, as above.
    pub out_strides: Option<Strides>,
    /// f32 `[seqs, Hq, new_rows]`.
    pub lse: Option<ViewMut<'a>>,
    /// f32 `[Hq]`: an extra logit in the denominator.
    pub sink_logits: Option<View<'a>>,
    /// How keys are rotated: where they are low rank they are rotated as they are rebuilt.
    pub rope: Option<Rope<'a>>,
}

impl Cache {
    /// Starts a step: makes room for new tokens, copies shared pages that they fall into, and uploads the tables.
    /// Not for captured graphs.
    ///
    /// # Errors
    /// [`CacheError::OutOfPages`], [`CacheError::TooLong`], [`CacheError::UnknownSequence`], [`CacheError::Busy`] (also for
    /// a batch in use), [`CacheError::Invalid`] for more sequences or tokens than the batch was made for.
    pub fn begin(&mut self, stream: &Stream, batch: &mut Batch, new: &[(SeqId, usize)]) -> Result<()> {
        batch.turn.check_new(self.id, new)?;
        for &(seq, tokens) in new {
            let max = self.config.max_rows;
            let rows = self.idle(seq)?.rows + tokens;
            if rows > max {
                return Err(CacheError::TooLong { seq, rows, max });
            }
        }
        self.check_pages(new)?;
        // From here on only the device can fail; then the books are put back.
        let mut copies = Vec::new();
        let result = self.grow(stream, new, &mut copies).and_then(|()| {
            let sequences = new.iter().filter_map(|(seq, _)| self.sequences.get(seq));
            batch.tables.fill(stream, &self.config, &sequences.collect::<Vec<_>>())
        });
        if let Err(e) = result {
            self.undo(new, &copies);
            return Err(e);
        }
        batch.turn.new = new.to_vec();
        batch.lowrank_work.iter_mut().for_each(|(_, scheduled)| *scheduled = false);
        batch.rows.begin();
        Ok(())
    }

    /// Whether there are enough free pages for a step. Of a shared page that all owners write into, one keeps the original.
    fn check_pages(&mut self, new: &[(SeqId, usize)]) -> Result<()> {
        let (mut needed, mut writers) = ([0, 0], BTreeMap::new());
        for &(seq, rows) in new {
            let Some(s) = self.sequences.get(&seq) else { continue };
            for g in s.growth(&self.exact, self.config.page_rows, rows) {
                needed[usize::from(g.kind.is_exact())] += g.come;
                for &page in s.held.list(g.kind).pages.range(g.leave + g.written..) {
                    writers.entry((g.kind.is_exact(), page)).or_insert((g.kind, 0)).1 += 1;
                }
            }
        }
        for ((exact, page), (kind, n)) in writers {
            needed[usize::from(exact)] += n.min(self.books.of(kind).owners(page) - 1);
        }
        let of = [("pages", &self.books.rows), ("pages of exact rows", &self.books.exact)];
        for (needed, (of, book)) in needed.into_iter().zip(of) {
            let (free, capacity) = (book.free(), book.capacity());
            if needed > free {
                return Err(CacheError::OutOfPages { of, needed, free, capacity });
            }
        }
        Ok(())
    }

    fn grow(&mut self, stream: &Stream, new: &[(SeqId, usize)], copies: &mut Vec<Copied>) -> Result<()> {
        for &(seq, rows) in new {
            let Some(s) = self.sequences.get_mut(&seq) else { continue };
            let growth = s.growth(&self.exact, self.config.page_rows, rows);
            s.begin_step(rows, &growth);
            for g in growth {
                let book = self.books.of(g.kind);
                let list = &mut s.held.list_mut(g.kind).pages;
                for page in list.range_mut(g.written..) {
                    if !book.is_shared(*page) {
                        continue;
                    }
                    let (shared, own) = (*page, take(book)?);
                    book.release(shared);
                    *page = own;
                    copies.push(Copied { seq, kind: g.kind, shared, own });
                    for store in self.layers.iter_mut().filter_map(|l| l.store_mut(g.kind)) {
                        store.copy_page(stream, shared as usize, own as usize)?;
                    }
                }
                for _ in 0..g.come {
                    list.push_back(take(book)?);
                }
            }
        }
        Ok(())
    }

    /// Puts the books back to before [`Cache::grow`].
    fn undo(&mut self, new: &[(SeqId, usize)], copies: &[Copied]) {
        for (seq, _) in new {
            if let Some(s) = self.sequences.get_mut(seq) {
                s.end_step(false, &mut self.books);
            }
        }
        for c in copies {
            self.books.of(c.kind).share(c.shared);
            self.books.of(c.kind).release(c.own);
            if let Some(s) = self.sequences.get_mut(&c.seq) {
                s.held.list_mut(c.kind).pages.iter_mut().filter(|p| **p == c.own).for_each(|p| *p = c.shared);
            }
        }
    }

    /// Enqueues the writing of a layer's new rows, and the encoding of those that leave the exact ones; padding rows are not
    /// stored. One launch, two where a low-rank layer keeps exact rows too.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a layer that does not exist or a batch without a step; [`CacheError::Device`].
    pub fn append(
        &mut self,
        stream: &Stream,
        batch: &mut Batch,
        layer: usize,
        new: NewRows<'_>,
        rope: Option<Rope<'_>>,
    ) -> Result<()> {
        self.check_step(batch, layer)?;
        let config = &self.config;
        let Batch { tables, workspace, .. } = batch;
        let as_given = |slots, rows, pools: (Pool<_>, Pool<_>)| AppendArgs {
            k: new.k,
            k_strides: new.k_strides,
            v: new.v,
            v_strides: new.v_strides,
            positions: tables.positions.view(),
            slots,
            slots_per_head: false,
            rope,
            rows,
            row_positions: None,
            keys: pools.0,
            values: pools.1,
            tables: Default::default(),
            key_scores: None,
        };
        let Layer { rows, exact, lowrank, quantized } = &mut self.layers[layer];
        let (Some(lowrank), Some(plans)) = (lowrank, batch.lowrank[layer]) else {
            let shared = quantized.as_ref().map(QuantizedLayer::tables).unwrap_or_default();
            let Some(plans) = batch.rows.of(layer) else { return invalid("layer", "the batch has no plan of it") };
            if let (Writing::Groups(plan), Some(exact), Some(t)) = (&plans.append, exact, &tables.exact) {
                let append = as_given(t.slots.view(), t.rows()?, exact.pools_mut());
                let ((keys, values), (packing, source, source_pages)) = (rows.pools_mut(), t.packing());
                let rows = tables.latents(config)?;
                let mut args = AppendGroupsArgs { append, rows, keys, values, tables: shared, source, source_pages, packing };
                return Ok(plan.launch(stream, &mut args, workspace)?);
            }
            let Writing::Encoded(plan) = &plans.append else { return invalid("layer", "it has no exact rows to encode") };
            let mut args = as_given(tables.slots.view(), tables.rows(config)?, rows.pools_mut());
            args.tables = shared;
            return Ok(plan.launch(stream, &mut args, workspace)?);
        };
        let mut args = lowrank.append_args(&new, tables.latents(config)?, tables.latent_slots(), rows.pools_mut());
        plans.append.launch(stream, &mut args, workspace)?;
        if let (Some(exact), Some(plan), Some(t)) = (exact, &batch.append_exact, &tables.exact) {
            plan.launch(stream, &mut as_given(t.slots.view(), t.rows()?, exact.pools_mut()), workspace)?;
        }
        Ok(())
    }

    /// Enqueues a layer's attention of the new tokens over all tokens of their sequences, the new ones included. The
    /// first call of a step enqueues the work list too. One launch; three where no kernel attends over the formats, so that
    /// all rows are decoded first.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a layer that does not exist or a batch without a step; [`CacheError::Device`].
    pub fn attend(&self, stream: &Stream, batch: &mut Batch, layer: usize, args: Queries<'_>) -> Result<()> {
        self.check_step(batch, layer)?;
        let config = &self.config;
        let Layer { rows, exact, lowrank, quantized } = &self.layers[layer];
        let tables = &batch.tables;
        let shared = quantized.as_ref().map(QuantizedLayer::tables).unwrap_or_default();
        // Rows behind the sinks that are not exact, or all.
        let held = if lowrank.is_none() && exact.is_none() { tables.rows(config)? } else { tables.latents(config)? };
        let decode = batch.rows.of(layer).and_then(|p| p.decode.as_deref());
        if let (Some([keys, values]), Some([k, v])) = (decode, &mut batch.decoded) {
            let pools = rows.pools();
            keys.decode_held(stream, &held, &pools.0, shared.keys, config.dtype, &mut k.view_mut())?;
            values.decode_held(stream, &held, &pools.1, shared.values, config.dtype, &mut v.view_mut())?;
        }
        let body = match (decode, &batch.decoded) {
            (Some(_), Some([k, v])) => {
                let (heads, most, bytes) = (config.kv_heads, config.max_rows, config.dtype.bytes());
                Segment {
                    rows: Rows::contiguous(held.lengths, most),
                    keys: Pool::contiguous(k.view(), heads, most, config.head_dim * bytes),
                    values: Pool::contiguous(v.view(), heads, most, config.value_dim * bytes),
                    tables: Default::default(),
                }
            }
            _ => {
                let (keys, values) = rows.pools();
                Segment { rows: held, keys, values, tables: shared }
            }
        };
        let mut segments = Vec::with_capacity(kvlar::MAX_SEGMENTS);
        if lowrank.is_none() && exact.is_none() {
            segments.push(body);
        } else {
            let exact = exact.as_ref().zip(tables.exact.as_ref());
            // Rows as they were given share nothing.
            let given = |rows, (keys, values): (Pool<_>, Pool<_>)| Segment { rows, keys, values, tables: Default::default() };
            let part = |rows: Option<_>| rows.zip(exact).map(|(rows, (store, _))| given(rows, store.pools()));
            segments.extend(part(exact.map(|(_, t)| t.sinks()).transpose()?.flatten()));
            segments.push(body);
            segments.extend(part(exact.map(|(_, t)| t.recent()).transpose()?.flatten()));
        }
        let rope = args.rope;
        let mut args = AttendArgs {
            q: args.q,
            q_strides: args.q_strides,
            out: args.out,
            out_strides: args.out_strides,
            lse: args.lse,
            segments: &segments,
            q_positions: Some(batch.tables.positions.view()),
            sink_logits: args.sink_logits,
        };
        if let (Some(lowrank), Some(plans)) = (lowrank, batch.lowrank[layer]) {
            let Some(plan) = plans.attend else {
                let most = kvlar::MAX_QUERY_ROWS;
                return invalid("new tokens", format!("a low-rank layer attends from up to {most} of them at a time"));
            };
            let mut args = LowrankArgs { attend: args, bases: lowrank.bases(), rope, sets: lowrank.sets() };
            let (work, scheduled) = &mut batch.lowrank_work[plans.work];
            if !*scheduled {
                plan.schedule(stream, &args, work, &mut batch.workspace)?;
                *scheduled = true;
            }
            return Ok(plan.launch(stream, &mut args, work, &mut batch.workspace)?);
        }
        let Some(plans) = batch.rows.of_mut(layer) else { return invalid("layer", "the batch has no plan of it") };
        if !plans.scheduled {
            plans.attend.schedule(stream, &args, &mut plans.work, &mut batch.workspace)?;
            plans.scheduled = true;
        }
        Ok(plans.attend.launch(stream, &mut args, &plans.work, &mut batch.workspace)?)
    }

    /// Finishes a step: its tokens are part of their sequences.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a batch without a step of this cache; a step of another cache goes on.
    pub fn finish(&mut self, batch: &mut Batch) -> Result<()> {
        self.end(batch, true)
    }

    /// Ends a step as if it had not begun: its tokens are forgotten. Pages that it copied because others own them too stay
    /// copied.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a batch without a step of this cache; a step of another cache goes on.
    pub fn cancel(&mut self, batch: &mut Batch) -> Result<()> {
        self.end(batch, false)
    }

    fn end(&mut self, batch: &mut Batch, keep: bool) -> Result<()> {
        batch.turn.check(self.id)?;
        for (seq, _) in batch.turn.new.drain(..) {
            if let Some(s) = self.sequences.get_mut(&seq) {
                s.end_step(keep, &mut self.books);
            }
        }
        Ok(())
    }

    fn check_step(&self, batch: &Batch, layer: usize) -> Result<()> {
        check_layer(layer, self.layers.len())?;
        batch.turn.check(self.id)
    }
}

pub(crate) fn take(book: &mut PageBook) -> Result<u32> {
    let capacity = book.capacity();
    book.take().ok_or(CacheError::OutOfPages { of: "pages", needed: 1, free: 0, capacity })
}
