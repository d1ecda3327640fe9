//! The cache: device memory, sequences, steps.

use crate::batch::{Batch, BatchShape};
use crate::error::invalid;
use crate::layer::{Layer, native};
use crate::pages::PageBook;
use crate::sequence::Sequence;
use crate::{CacheConfig, CacheError, Result};
use kvlar::{AppendArgs, AttendArgs, Device, LowrankArgs, Rope, Segment, Stream, Strides, View, ViewMut};
use kvlar_calibrate::Plan;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names a sequence of one cache; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// What a cache holds at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Sequences.
    pub sequences: usize,
    /// Pages of the pool.
    pub pages: usize,
    /// Of them, owned by no sequence.
    pub free: usize,
    /// Of them, owned by several.
    pub shared: usize,
    /// Bytes that the pool allocated on the device.
    pub bytes: usize,
    /// Of them, in pages that some sequence owns.
    pub used_bytes: usize,
}

/// A page that was copied because another sequence owns it too.
struct Copied {
    seq: SeqId,
    index: usize,
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

/// Pages of fixed capacity and the sequences in them.
#[derive(Debug)]
pub struct Cache {
    /// Batches know their cache by it.
    id: u64,
    device: Device,
    config: CacheConfig,
    layers: Vec<Layer>,
    book: PageBook,
    sequences: BTreeMap<SeqId, Sequence>,
    next_id: u64,
}

impl Cache {
    /// Allocates the whole pool.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a bad configuration, [`CacheError::Device`] if memory runs out or there is no kernel.
    pub fn new(device: &Device, config: CacheConfig) -> Result<Self> {
        config.check()?;
        let layers = (0..config.layers).map(|_| Layer::token_wise(device, &config)).collect::<Result<_>>()?;
        Ok(Self::of(device, config, layers))
    }

    /// Allocates a pool for rows as a plan says, and uploads its matrices. `config.codec` is not used: dense layers keep the type of the model. Sink and recent
    /// rows of the plan are not kept apart: all rows are latents.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] also for a plan of another number of layers, heads or dimensions.
    pub fn planned(device: &Device, stream: &Stream, config: CacheConfig, plan: &Plan) -> Result<Self> {
        config.check()?;
        let config = CacheConfig { codec: native(config.dtype), ..config };
        if plan.layers.len() != config.layers {
            return invalid("plan", format!("it is for {} layers, the cache has {}", plan.layers.len(), config.layers));
        }
        let layers = plan.layers.iter().map(|l| Layer::planned(device, stream, &config, l)).collect::<Result<_>>()?;
        Ok(Self::of(device, config, layers))
    }

    fn of(device: &Device, config: CacheConfig, layers: Vec<Layer>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (id, book) = (NEXT.fetch_add(1, Ordering::Relaxed), PageBook::new(config.pages));
        Self { id, device: device.clone(), config, layers, book, sequences: BTreeMap::new(), next_id: 0 }
    }

    /// Bytes that one token takes, in all layers, with scales and padding.
    pub fn bytes_per_token(&self) -> usize {
        self.layers.iter().map(Layer::token_bytes).sum()
    }

    /// Bytes that do not grow with tokens or sequences: bases, encoders, means.
    pub fn fixed_bytes(&self) -> usize {
        self.layers.iter().map(Layer::fixed_bytes).sum()
    }

    /// What it was made from.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Pages and bytes.
    pub fn usage(&self) -> Usage {
        let bytes: usize = self.layers.iter().map(|l| l.keys.1.len() + l.values.1.len()).sum();
        let (pages, free) = (self.book.capacity(), self.book.free());
        let used_bytes = bytes / pages * (pages - free);
        Usage { sequences: self.sequences.len(), pages, free, shared: self.book.shared(), bytes, used_bytes }
    }

    /// An empty sequence.
    pub fn create(&mut self) -> SeqId {
        self.insert(Sequence::default())
    }

    fn insert(&mut self, sequence: Sequence) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        id
    }

    fn get(&self, seq: SeqId) -> Result<&Sequence> {
        self.sequences.get(&seq).ok_or(CacheError::UnknownSequence(seq))
    }

    /// A sequence that no batch is at work on.
    fn idle(&mut self, seq: SeqId) -> Result<&mut Sequence> {
        let s = self.sequences.get_mut(&seq).ok_or(CacheError::UnknownSequence(seq))?;
        if s.busy { Err(CacheError::Busy(seq)) } else { Ok(s) }
    }

    /// Tokens held.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn len(&self, seq: SeqId) -> Result<usize> {
        Ok(self.get(seq)?.rows)
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// A sequence with the same tokens. It shares all pages; a shared page is copied before either writes into it.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::Busy`].
    pub fn fork(&mut self, seq: SeqId) -> Result<SeqId> {
        let copy = self.idle(seq)?.clone();
        copy.pages.iter().for_each(|&page| self.book.share(page));
        Ok(self.insert(copy))
    }

    /// Forgets a sequence and frees the pages that no other owns.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::Busy`].
    pub fn remove(&mut self, seq: SeqId) -> Result<()> {
        self.idle(seq)?;
        if let Some(s) = self.sequences.remove(&seq) {
            s.pages.iter().for_each(|&page| self.book.release(page));
        }
        Ok(())
    }

    /// Takes tokens back, to `rows`.
    ///
    /// # Errors
    /// [`CacheError::Committed`] below what was committed; [`CacheError::Invalid`] above what is held.
    pub fn truncate(&mut self, seq: SeqId, rows: usize) -> Result<()> {
        let page_rows = self.config.page_rows;
        let s = self.idle(seq)?;
        if rows > s.rows {
            return invalid("rows", format!("cannot truncate {} tokens to {rows}", s.rows));
        }
        if rows < s.committed {
            return Err(CacheError::Committed { seq, rows, committed: s.committed });
        }
        s.rows = rows;
        if let Some(s) = self.sequences.get_mut(&seq) {
            s.shrink(rows, &mut self.book, page_rows);
        }
        Ok(())
    }

    /// Declares the first `rows` tokens final: they are never truncated, and may be packed or evicted.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for more tokens than are held, or fewer than were committed.
    pub fn commit(&mut self, seq: SeqId, rows: usize) -> Result<()> {
        let s = self.idle(seq)?;
        if rows > s.rows || rows < s.committed {
            return invalid("rows", format!("cannot commit {rows}: {} tokens are held, {} committed", s.rows, s.committed));
        }
        s.committed = rows;
        Ok(())
    }

    /// Tables and scratch for steps of some shape.
    ///
    /// # Errors
    /// [`CacheError::Device`] for a shape without a kernel, or if memory runs out.
    pub fn batch(&self, shape: BatchShape) -> Result<Batch> {
        Batch::new(&self.device, self.id, self.config, shape, &self.layers)
    }

    /// Starts a step: makes room for new tokens, copies shared pages that they fall into, and uploads the tables.
    /// Not for captured graphs.
    ///
    /// # Errors
    /// [`CacheError::OutOfPages`], [`CacheError::TooLong`], [`CacheError::UnknownSequence`], [`CacheError::Busy`] (also for
    /// a batch in use), [`CacheError::Invalid`] for more sequences or tokens than the batch was made for.
    pub fn begin(&mut self, stream: &Stream, batch: &mut Batch, new: &[(SeqId, usize)]) -> Result<()> {
        if let Some(&(seq, _)) = batch.active.first() {
            return Err(CacheError::Busy(seq));
        }
        if batch.cache != self.id {
            return invalid("batch", "was made for another cache");
        }
        let BatchShape { seqs, new_rows, .. } = batch.shape;
        if new.len() > seqs {
            return invalid("sequences", format!("{} in a batch of {seqs}", new.len()));
        }
        for (i, &(seq, rows)) in new.iter().enumerate() {
            let max = self.config.max_rows;
            let s = self.idle(seq)?;
            if s.rows + rows > max {
                return Err(CacheError::TooLong { seq, rows: s.rows + rows, max });
            }
            if rows > new_rows {
                return invalid("new tokens", format!("{rows} in a batch of {new_rows}"));
            }
            if new[..i].iter().any(|(other, _)| *other == seq) {
                return Err(CacheError::Busy(seq));
            }
        }
        let (needed, free, capacity) = (self.pages_needed(new), self.book.free(), self.book.capacity());
        if needed > free {
            return Err(CacheError::OutOfPages { needed, free, capacity });
        }
        // From here on only the device can fail; then the books are put back.
        let mut copies = Vec::new();
        let result = self.grow(stream, new, &mut copies).and_then(|()| {
            let sequences = new.iter().filter_map(|(seq, n)| self.sequences.get(seq).map(|s| (s.pages.as_slice(), s.rows, *n)));
            batch.fill(stream, &sequences.collect::<Vec<_>>())
        });
        if let Err(e) = result {
            self.undo(new, &copies);
            return Err(e);
        }
        batch.active = new.to_vec();
        Ok(())
    }

    /// Free pages that a step takes. Of a shared page that all owners write into, one keeps the original.
    fn pages_needed(&self, new: &[(SeqId, usize)]) -> usize {
        let page_rows = self.config.page_rows;
        let mut writers = BTreeMap::new();
        let mut needed = 0;
        for (s, rows) in new.iter().filter_map(|(seq, n)| self.sequences.get(seq).map(|s| (s, *n))).filter(|(_, n)| *n > 0) {
            needed += (s.rows + rows).div_ceil(page_rows).saturating_sub(s.pages.len());
            if let Some(page) = s.shared_tail(&self.book, page_rows) {
                *writers.entry(page).or_insert(0) += 1;
            }
        }
        needed + writers.iter().map(|(&page, &n)| n.min(self.book.owners(page) - 1)).sum::<usize>()
    }

    fn take_page(&mut self) -> Result<u32> {
        let capacity = self.book.capacity();
        self.book.take().ok_or(CacheError::OutOfPages { needed: 1, free: 0, capacity })
    }

    fn grow(&mut self, stream: &Stream, new: &[(SeqId, usize)], copies: &mut Vec<Copied>) -> Result<()> {
        let page_rows = self.config.page_rows;
        for &(seq, rows) in new {
            let Some(s) = self.sequences.get_mut(&seq) else { continue };
            (s.busy, s.adding) = (true, rows);
            let (index, held) = (s.rows / page_rows, s.pages.len());
            let missing = if rows == 0 { 0 } else { (s.rows + rows).div_ceil(page_rows).saturating_sub(held) };
            let shared = s.shared_tail(&self.book, page_rows).filter(|_| rows > 0);
            if let Some(shared) = shared {
                let own = self.take_page()?;
                self.book.release(shared);
                copies.push(Copied { seq, index, shared, own });
                copy_page(stream, &self.config, &mut self.layers, shared as usize, own as usize)?;
            }
            let pages: Vec<u32> = (0..missing).map(|_| self.take_page()).collect::<Result<_>>()?;
            let Some(s) = self.sequences.get_mut(&seq) else { continue };
            if let (Some(_), Some(copied)) = (shared, copies.last()) {
                s.pages[index] = copied.own;
            }
            s.pages.extend(pages);
        }
        Ok(())
    }

    /// Puts the books back to before [`Cache::grow`].
    fn undo(&mut self, new: &[(SeqId, usize)], copies: &[Copied]) {
        for c in copies {
            self.book.share(c.shared);
            self.book.release(c.own);
            if let Some(s) = self.sequences.get_mut(&c.seq) {
                s.pages[c.index] = c.shared;
            }
        }
        for (seq, _) in new {
            if let Some(s) = self.sequences.get_mut(seq) {
                (s.busy, s.adding) = (false, 0);
                s.shrink(s.rows, &mut self.book, self.config.page_rows);
            }
        }
    }

    /// Enqueues the writing of a layer's new rows; padding rows are not stored.
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
        let plans = batch.lowrank[layer];
        let Layer { keys, values, lowrank } = &mut self.layers[layer];
        let rows = batch.tables.rows(config)?;
        let pools = (keys.0.pool(config, keys.1.view_mut()), values.0.pool(config, values.1.view_mut()));
        if let (Some(lowrank), Some(plans)) = (lowrank, plans) {
            let mut args = lowrank.append_args(&new, rows, batch.tables.slots.view(), pools.0, pools.1);
            return Ok(plans.append.launch(stream, &mut args, &mut batch.workspace)?);
        }
        let mut args = AppendArgs {
            k: new.k,
            k_strides: new.k_strides,
            v: new.v,
            v_strides: new.v_strides,
            positions: batch.tables.positions.view(),
            slots: batch.tables.slots.view(),
            slots_per_head: false,
            rope,
            rows,
            row_positions: None,
            keys: pools.0,
            values: pools.1,
        };
        Ok(batch.append.launch(stream, &mut args, &mut batch.workspace)?)
    }

    /// Enqueues a layer's attention of the new tokens over all tokens of their sequences, the new ones included. The
    /// first call of a step enqueues the work list too.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a layer that does not exist or a batch without a step; [`CacheError::Device`].
    pub fn attend(&self, stream: &Stream, batch: &mut Batch, layer: usize, args: Queries<'_>) -> Result<()> {
        self.check_step(batch, layer)?;
        let config = &self.config;
        let Layer { keys, values, lowrank } = &self.layers[layer];
        let segments = [Segment {
            rows: batch.tables.rows(config)?,
            keys: keys.0.pool(config, keys.1.view()),
            values: values.0.pool(config, values.1.view()),
        }];
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
        if !batch.scheduled {
            batch.attend.schedule(stream, &args, &mut batch.work, &mut batch.workspace)?;
            batch.scheduled = true;
        }
        Ok(batch.attend.launch(stream, &mut args, &batch.work, &mut batch.workspace)?)
    }

    /// Finishes a step: its tokens are part of their sequences.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a batch without a step.
    pub fn finish(&mut self, batch: &mut Batch) -> Result<()> {
        self.end(batch, true)
    }

    /// Ends a step as if it had not begun: its tokens are forgotten.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a batch without a step.
    pub fn cancel(&mut self, batch: &mut Batch) -> Result<()> {
        self.end(batch, false)
    }

    fn end(&mut self, batch: &mut Batch, keep: bool) -> Result<()> {
        if batch.active.is_empty() {
            return invalid("batch", "no step has begun");
        }
        for (seq, _) in batch.active.drain(..) {
            let Some(s) = self.sequences.get_mut(&seq) else { continue };
            s.rows += if keep { s.adding } else { 0 };
            (s.busy, s.adding) = (false, 0);
            s.shrink(s.rows, &mut self.book, self.config.page_rows);
        }
        Ok(())
    }

    fn check_step(&self, batch: &Batch, layer: usize) -> Result<()> {
        if layer >= self.layers.len() {
            return invalid("layer", format!("{layer} of {}", self.layers.len()));
        }
        if batch.active.is_empty() || batch.cache != self.id {
            return invalid("batch", "no step of this cache has begun");
        }
        Ok(())
    }
}

fn copy_page(stream: &Stream, config: &CacheConfig, layers: &mut [Layer], from: usize, to: usize) -> Result<()> {
    for layer in layers {
        for (format, buffer) in [&mut layer.keys, &mut layer.values] {
            let bytes = config.page_rows * format.token_bytes();
            stream.copy_within(buffer, from * bytes..(from + 1) * bytes, to * bytes)?;
        }
    }
    Ok(())
}
