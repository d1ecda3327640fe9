//! The cache: device memory, sequences, steps.

use crate::batch::{Batch, BatchShape};
use crate::error::invalid;
use crate::exact::ExactShape;
use crate::layer::{Layer, native};
use crate::pages::PageBook;
use crate::quantized::{QuantizedLayer, exact_shape, planned_formats};
use crate::sequence::{Books, Kind, Sequence};
use crate::{CacheConfig, CacheError, Result};
use kvlar::{Device, Stream};
use kvlar_calibrate::Plan;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names a sequence of one cache; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(u64);

impl SeqId {
    pub(crate) fn new(id: u64) -> Self {
        Self(id)
    }
}

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
    /// Pages of 16 rows for those that stay exact beside latents; 0 where none do.
    pub exact_pages: usize,
    /// Of them, owned by no sequence.
    pub exact_free: usize,
    /// Bytes that both pools allocated on the device.
    pub bytes: usize,
    /// Of them, in pages that some sequence owns.
    pub used_bytes: usize,
}

/// Pages of fixed capacity and the sequences in them.
#[derive(Debug)]
pub struct Cache {
    /// Batches know their cache by it.
    pub(crate) id: u64,
    device: Device,
    pub(crate) config: CacheConfig,
    pub(crate) exact: ExactShape,
    pub(crate) layers: Vec<Layer>,
    pub(crate) books: Books,
    pub(crate) sequences: BTreeMap<SeqId, Sequence>,
    next_id: u64,
}

impl Cache {
    /// Allocates the whole pool.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a bad configuration, [`CacheError::Device`] if memory runs out or there is no kernel.
    pub fn new(device: &Device, config: CacheConfig) -> Result<Self> {
        config.check()?;
        let formats = [config.keys, config.values];
        let mut exact = ExactShape::default();
        if formats.iter().any(|f| f.codec.dense().is_none()) {
            exact = exact_shape(&config, asked(&config, config.sink_rows, config.recent_rows), &[formats], true)?;
        }
        let layer = |_| match exact.encodes() {
            true => Layer::quantized(device, &config, &exact, QuantizedLayer::of(config.keys, config.values)),
            false => Layer::token_wise(device, &config),
        };
        let layers = (0..config.layers).map(layer).collect::<Result<_>>()?;
        Ok(Self::of(device, config, exact, layers))
    }

    /// Allocates a pool for rows as a plan says, and uploads its matrices and codebooks, which it waits for: any stream may
    /// use the cache. `config.keys`, `config.values` and their exact rows are not used: dense layers keep the type of the
    /// model, layers of codes each their own formats. Sink and recent rows of the plan stay exact beside latents and codes,
    /// for `config.max_seqs` sequences ([`Cache::exact_rows`]). Whether the plan was fitted to the model is for
    /// [`Plan::check_model`] to say.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] also for a plan of another number of layers, kv heads or dimensions, whatever its layers keep;
    /// [`CacheError::Device`] also for formats without kernels.
    pub fn planned(device: &Device, stream: &Stream, config: CacheConfig, plan: &Plan) -> Result<Self> {
        config.check()?;
        let own = native(config.dtype).into();
        let config = CacheConfig { keys: own, values: own, ..config };
        check_shape(&config, plan)?;
        let formats = planned_formats(&config, plan)?;
        let all = formats.len() == config.layers;
        let exact = exact_shape(&config, asked(&config, plan.sink_rows, plan.recent_rows), &formats, all)?;
        let planned = |l| Layer::planned(device, stream, &config, &exact, l, plan);
        let layers = (0..config.layers).map(planned).collect::<Result<Vec<_>>>()?;
        stream.synchronize()?;
        let lowrank = layers.iter().any(|l| l.lowrank.is_some());
        Ok(Self::of(device, config, if lowrank || exact.encodes() { exact } else { ExactShape::default() }, layers))
    }

    fn of(device: &Device, config: CacheConfig, exact: ExactShape, layers: Vec<Layer>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let exact_pages = config.max_seqs * exact.pages_per_seq();
        let books = Books { rows: PageBook::new(config.pages), exact: PageBook::new(exact_pages) };
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { id, device: device.clone(), config, exact, layers, books, sequences: BTreeMap::new(), next_id: 0 }
    }

    /// Bytes that one token takes, in all layers, with scales and padding; rows that stay exact take more
    /// ([`Cache::sequence_bytes`]).
    pub fn bytes_per_token(&self) -> usize {
        self.layers.iter().map(|l| l.rows.token_bytes()).sum()
    }

    /// Bytes that a sequence's tokens take, in all layers, with scales and padding, exact rows included, also those that are
    /// held for rollback; shared pages are counted in each sequence.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn sequence_bytes(&self, seq: SeqId) -> Result<usize> {
        let s = self.get(seq)?;
        let (rows, sinks) = (s.total(), s.total().min(self.exact.sinks));
        let held = if self.exact.keeps_recent() { rows.saturating_sub(s.held.list(Kind::Recent).first) } else { 0 };
        let encoded = s.held.exact_from(&self.exact, rows) - sinks;
        let of = |l: &Layer| {
            let listed = match (&l.lowrank, &l.quantized, &l.exact) {
                (Some(_), ..) => rows - sinks,
                (_, Some(_), Some(_)) => encoded,
                _ => rows,
            };
            listed * l.rows.token_bytes() + l.exact.as_ref().map_or(0, |s| (sinks + held) * s.token_bytes())
        };
        Ok(self.layers.iter().map(of).sum())
    }

    /// Which rows attention reads as they were given, in layers of latents or codes: the first so many, and those from a
    /// position on. Of T rows these are the first `sinks` that were asked for and, if `recent` of them are not 0 or rows are
    /// encoded in groups, those from sinks + ⌊max(T − recent − sinks, 0) / group⌋ · group on, group being 16 or the rows that
    /// share a scale: up to a group less one row more than asked for, whatever the sequence held before. Only where more
    /// than [`CacheConfig::rollback_rows`] tokens were taken back does it begin later. During a step: as it will be at its
    /// end.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn exact_rows(&self, seq: SeqId) -> Result<(usize, usize)> {
        let s = self.get(seq)?;
        Ok((s.total().min(self.exact.sinks), s.held.exact_from(&self.exact, s.total())))
    }

    /// How many tokens [`Cache::truncate`] takes back as if they had never been: [`CacheConfig::rollback_rows`] where recent
    /// rows stay exact, any number elsewhere (`usize::MAX`).
    pub fn rollback_rows(&self) -> usize {
        if self.exact.keeps_recent() { self.config.rollback_rows } else { usize::MAX }
    }

    /// Bytes that do not grow with tokens or sequences: bases, encoders, means, codebooks.
    pub fn fixed_bytes(&self) -> usize {
        self.layers.iter().map(Layer::fixed_bytes).sum()
    }

    /// What it was made from.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// Pages and bytes.
    pub fn usage(&self) -> Usage {
        let (pages, free) = (self.books.rows.capacity(), self.books.rows.free());
        let (exact, free_exact) = (self.books.exact.capacity(), self.books.exact.free());
        let rows_bytes: usize = self.layers.iter().map(|l| l.rows.bytes()).sum();
        let exact_bytes: usize = self.layers.iter().filter_map(|l| l.exact.as_ref()).map(|s| s.bytes()).sum();
        let used_bytes = rows_bytes / pages * (pages - free) + exact_bytes / exact.max(1) * (exact - free_exact);
        Usage {
            sequences: self.sequences.len(),
            pages,
            free,
            shared: self.books.rows.shared(),
            exact_pages: exact,
            exact_free: free_exact,
            bytes: rows_bytes + exact_bytes,
            used_bytes,
        }
    }

    /// An empty sequence.
    pub fn create(&mut self) -> SeqId {
        self.insert(Sequence::new(&self.exact))
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
    pub(crate) fn idle(&mut self, seq: SeqId) -> Result<&mut Sequence> {
        let s = self.sequences.get_mut(&seq).ok_or(CacheError::UnknownSequence(seq))?;
        if s.step.is_some() { Err(CacheError::Busy(seq)) } else { Ok(s) }
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
        copy.held.pages().for_each(|(kind, page)| self.books.of(kind).share(page));
        Ok(self.insert(copy))
    }

    /// Forgets a sequence and frees the pages that no other owns.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::Busy`].
    pub fn remove(&mut self, seq: SeqId) -> Result<()> {
        self.idle(seq)?;
        if let Some(s) = self.sequences.remove(&seq) {
            s.held.pages().for_each(|(kind, page)| self.books.of(kind).release(page));
        }
        Ok(())
    }

    /// Takes tokens back, to `rows`. What follows is bit for bit as if they had never been, if the sequence has not held more
    /// than [`Cache::rollback_rows`] tokens more. Where it has, rows that were forgotten stay latents or codes: fewer of the
    /// last ones are exact ([`Cache::exact_rows`]) until enough others have come. Codes of a group stay together.
    ///
    /// # Errors
    /// [`CacheError::Committed`] below what was committed; [`CacheError::Invalid`] above what is held;
    /// [`CacheError::PartOfGroup`] within a group that was encoded longer ago than [`Cache::rollback_rows`].
    pub fn truncate(&mut self, seq: SeqId, rows: usize) -> Result<()> {
        let (exact, page_rows) = (self.exact, self.config.page_rows);
        let s = self.idle(seq)?;
        if rows > s.rows {
            return invalid("rows", format!("cannot truncate {} tokens to {rows}", s.rows));
        }
        if rows < s.committed {
            return Err(CacheError::Committed { seq, rows, committed: s.committed });
        }
        if let Some(whole) = s.whole_groups(&exact, rows) {
            return Err(CacheError::PartOfGroup { seq, rows, whole });
        }
        if let Some(s) = self.sequences.get_mut(&seq) {
            s.truncate(&exact, page_rows, rows, &mut self.books);
        }
        Ok(())
    }

    /// Declares the first `rows` tokens final: they are never truncated, and may be packed or evicted. What was held only to
    /// take them back is given up at once.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for more tokens than are held, or fewer than were committed.
    pub fn commit(&mut self, seq: SeqId, rows: usize) -> Result<()> {
        let exact = self.exact;
        let s = self.idle(seq)?;
        if rows > s.rows || rows < s.committed {
            return invalid("rows", format!("cannot commit {rows}: {} tokens are held, {} committed", s.rows, s.committed));
        }
        if let Some(s) = self.sequences.get_mut(&seq) {
            s.commit(&exact, rows, &mut self.books);
        }
        Ok(())
    }

    /// Tables and scratch for steps of some shape.
    ///
    /// # Errors
    /// [`CacheError::Device`] for a shape without a kernel, or if memory runs out.
    pub fn batch(&self, shape: BatchShape) -> Result<Batch> {
        Batch::new(&self.device, self.id, self.config, self.exact, shape, &self.layers)
    }
}

/// Exact rows as they are asked for, before formats have their say.
fn asked(config: &CacheConfig, sinks: usize, recent: usize) -> ExactShape {
    let most = config.max_rows;
    let rollback = config.rollback_rows.min(most);
    ExactShape { sinks: sinks.min(most), recent: recent.min(most), rollback, ..ExactShape::default() }
}

/// Refuses a plan for other layers than the cache's.
pub(crate) fn check_shape(config: &CacheConfig, plan: &Plan) -> Result<()> {
    if plan.layers.len() != config.layers {
        return invalid("plan", format!("it is for {} layers, the cache has {}", plan.layers.len(), config.layers));
    }
    let (shape, &CacheConfig { kv_heads, head_dim, value_dim, .. }) = (plan.model.layer, config);
    if (shape.kv_heads, shape.head_dim, shape.value_dim) != (kv_heads, head_dim, value_dim) {
        return invalid(
            "plan",
            format!(
                "it is for {} kv heads with keys of {} and values of {} dimensions; the cache has {kv_heads} of {head_dim} and \
                 {value_dim}",
                shape.kv_heads, shape.head_dim, shape.value_dim
            ),
        );
    }
    Ok(())
}
