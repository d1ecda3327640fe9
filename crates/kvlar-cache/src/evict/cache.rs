//! The cache: pools, sequences, what they hold.

use super::EvictingConfig;
use super::policy::{Policy, Scorer};
use super::sequence::Sequence;
use super::store::{LayerRows, RowStore};
use crate::cache::{SeqId, Usage};
use crate::error::invalid;
use crate::layer::{LowrankLayer, native};
use crate::quantized::QuantizedLayer;
use crate::{CacheError, Result};
use kvlar::{Buffer, Device, GateWeights, Stream};
use kvlar_calibrate::{Plan, Side};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a layer needs beside its rows.
#[derive(Debug)]
pub(super) struct EvictingLayer {
    /// Index of its store.
    pub store: usize,
    /// Which of the store's layers it is.
    pub index: usize,
    pub lowrank: Option<LowrankLayer>,
    pub quantized: Option<QuantizedLayer>,
}

/// A cache whose heads hold rows of their own, so that each can be evicted by itself.
///
/// A page holds rows of one kv head of one layer, and the position of each; every (sequence, layer, head) has a page table
/// and a length. Rows that a [`Policy`] lets go of are removed physically: what stays moves together, and pages that
/// empty go back to the pool. Layers whose heads share latents are evicted as a whole.
///
/// A step is as in [`crate::Cache`]: [`begin`](Self::begin); for each layer [`append`](Self::append),
/// [`observe`](Self::observe) (where the policy scores what it sees) and [`attend`](Self::attend);
/// [`finish`](Self::finish) or [`cancel`](Self::cancel). Between steps, [`evict`](Self::evict).
#[derive(Debug)]
pub struct EvictingCache {
    pub(super) id: u64,
    pub(super) device: Device,
    pub(super) config: EvictingConfig,
    pub(super) policy: Policy,
    pub(super) layers: Vec<EvictingLayer>,
    pub(super) stores: Vec<RowStore>,
    /// Gates of the layers, where the policy has some.
    pub(super) gates: Vec<GateWeights>,
    /// f32 `[max_seqs][owners][max_rows]`: what rows are worth.
    pub(super) scores: Buffer,
    /// f32 `[max_seqs][owners][staged]`: by position, of tokens whose rows are not known or judged yet; empty without gates.
    pub(super) staged: Buffer,
    pub(super) sequences: BTreeMap<SeqId, Sequence>,
    free_slots: Vec<usize>,
    next_id: u64,
}

impl EvictingCache {
    /// Allocates the pool, for rows of the configuration's formats.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for a bad configuration or policy, [`CacheError::Device`] if memory runs out or there is no
    /// kernel.
    pub fn new(device: &Device, config: EvictingConfig, policy: Policy) -> Result<Self> {
        config.check()?;
        let formats = config.rows();
        let layer = |_| (LayerRows { formats, owners: config.kv_heads }, None, None);
        Self::of(device, config, policy, (0..config.layers).map(layer).collect())
    }

    /// Likewise, for rows as a plan of `kvlar-calibrate` says, whose matrices it uploads and waits for; `config.keys` and
    /// `config.values` are not used. Layers of latents are evicted as a whole: their heads share rows.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] also for a plan of other layers, heads or dimensions, or one that keeps sinks or recent rows
    /// exact (evicted rows have one format); [`CacheError::Device`] also for formats without kernels.
    pub fn planned(device: &Device, stream: &Stream, config: EvictingConfig, policy: Policy, plan: &Plan) -> Result<Self> {
        let own = native(config.dtype).into();
        let config = EvictingConfig { keys: own, values: own, ..config };
        config.check()?;
        let shared = config.shared(config.pages);
        crate::cache::check_shape(&shared, plan)?;
        if plan.sink_rows + plan.recent_rows > 0 {
            let (sinks, recent) = (plan.sink_rows, plan.recent_rows);
            return invalid(
                "plan",
                format!("{sinks} sinks and {recent} recent rows stay exact: rows that are evicted have one format"),
            );
        }
        let mut layers = Vec::new();
        for l in 0..config.layers {
            if let Some(quantized) = QuantizedLayer::planned(device, stream, &shared, l, plan)? {
                let [keys, values] = quantized.formats;
                let of = EvictingConfig { keys, values, ..config };
                of.check()?;
                layers.push((LayerRows { formats: of.rows(), owners: config.kv_heads }, None, Some(quantized)));
            } else if plan.layers[l].keys == Side::Dense && plan.layers[l].values == Side::Dense {
                layers.push((LayerRows { formats: config.rows(), owners: config.kv_heads }, None, None));
            } else {
                let (lowrank, formats) = LowrankLayer::planned(device, stream, &shared, l, plan)?;
                layers.push((LayerRows { formats, owners: 1 }, Some(lowrank), None));
            }
        }
        stream.synchronize()?;
        Self::of(device, config, policy, layers)
    }

    fn of(
        device: &Device,
        config: EvictingConfig,
        policy: Policy,
        layers: Vec<(LayerRows, Option<LowrankLayer>, Option<QuantizedLayer>)>,
    ) -> Result<Self> {
        policy.check(&config)?;
        let layers: Vec<_> =
            layers.into_iter().map(|(rows, l, q)| (if policy.by_layer() { rows.shared() } else { rows }, l, q)).collect();
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut kinds: Vec<(LayerRows, Vec<usize>)> = Vec::new();
        for (l, (rows, ..)) in layers.iter().enumerate() {
            match kinds.iter_mut().find(|(kind, _)| kind == rows) {
                Some((_, of)) => of.push(l),
                None => kinds.push((*rows, vec![l])),
            }
        }
        let all: usize = kinds.iter().map(|(rows, of)| rows.owners * of.len()).sum();
        let (mut stores, mut first_owner) = (Vec::new(), 0);
        for (rows, of) in kinds {
            let owners = rows.owners * of.len();
            let pages = (config.pages as u64 * owners as u64 / all as u64) as usize;
            if pages == 0 {
                return invalid("pages", format!("{} are not one for each kind of rows", config.pages));
            }
            stores.push(RowStore::new(device, pages, config.page_rows, rows, of, first_owner)?);
            first_owner += owners;
        }
        let place = |l: usize| -> Option<(usize, usize)> {
            stores.iter().enumerate().find_map(|(s, store)| Some((s, store.layers.iter().position(|&x| x == l)?)))
        };
        let mut placed = Vec::new();
        for (l, (_, lowrank, quantized)) in layers.into_iter().enumerate() {
            let Some((store, index)) = place(l) else { return invalid("layers", "a layer without rows") };
            placed.push(EvictingLayer { store, index, lowrank, quantized });
        }
        check_policy(&policy, &placed, &stores)?;
        let gates = gate_weights(device, &policy, &config)?;
        let staged = if gates.is_empty() { 0 } else { config.staged };
        let scores = |columns: usize| device.alloc(4 * config.max_seqs * all * columns);
        let (scores, staged) = (scores(config.max_rows)?, scores(staged)?);
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            device: device.clone(),
            config,
            policy,
            layers: placed,
            stores,
            gates,
            scores,
            staged,
            sequences: BTreeMap::new(),
            free_slots: (0..config.max_seqs).rev().collect(),
            next_id: 0,
        })
    }

    /// What it was made from.
    pub fn config(&self) -> &EvictingConfig {
        &self.config
    }

    /// What it lets go of.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Owners of all stores.
    pub(super) fn owners(&self) -> usize {
        self.stores.iter().map(RowStore::owners).sum()
    }

    /// Bytes that do not grow: bases, encoders, means, codebooks, gates.
    pub fn fixed_bytes(&self) -> usize {
        let of = |l: &EvictingLayer| {
            l.lowrank.as_ref().map_or(0, LowrankLayer::bytes) + l.quantized.as_ref().map_or(0, QuantizedLayer::bytes)
        };
        self.layers.iter().map(of).sum::<usize>() + self.gates.iter().map(GateWeights::bytes).sum::<usize>()
    }

    /// Pages and bytes of all pools. There are no pages of exact rows.
    pub fn usage(&self) -> Usage {
        let sum = |of: &dyn Fn(&RowStore) -> usize| self.stores.iter().map(of).sum::<usize>();
        Usage {
            sequences: self.sequences.len(),
            pages: sum(&|s| s.book.capacity()),
            free: sum(&|s| s.book.free()),
            shared: sum(&|s| s.book.shared()),
            exact_pages: 0,
            exact_free: 0,
            bytes: sum(&RowStore::bytes),
            used_bytes: sum(&|s| s.page_bytes() * (s.book.capacity() - s.book.free())),
        }
    }

    /// Bytes that a sequence takes: its pages, with scales, positions and what of the last page is empty, and the scores of
    /// its rows. Shared pages are counted in each sequence.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn sequence_bytes(&self, seq: SeqId) -> Result<usize> {
        let s = self.get(seq)?;
        let pages = |store: &RowStore| -> usize {
            s.owners[store.first_owner..][..store.owners()].iter().map(|o| o.pages.len()).sum::<usize>() * store.page_bytes()
        };
        let rows: usize = s.owners.iter().map(|o| o.rows).sum();
        Ok(self.stores.iter().map(pages).sum::<usize>() + if self.policy.persistent_scores() { 4 * rows } else { 0 })
    }

    /// Rows that each kv head of a layer holds; a layer whose heads share latents has one number for all.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`]; [`CacheError::Invalid`] for a layer that does not exist.
    pub fn rows(&self, seq: SeqId, layer: usize) -> Result<Vec<usize>> {
        let s = self.get(seq)?;
        if layer >= self.layers.len() {
            return invalid("layer", format!("{layer} of {}", self.layers.len()));
        }
        Ok(self.owners_of(layer).map(|o| s.owners[o].rows + s.adding()).collect())
    }

    /// The owners of a layer's rows.
    pub(super) fn owners_of(&self, layer: usize) -> std::ops::Range<usize> {
        let l = &self.layers[layer];
        let store = &self.stores[l.store];
        let first = store.first_owner + l.index * store.owners_a_layer;
        first..first + store.owners_a_layer
    }

    /// An empty sequence.
    ///
    /// # Errors
    /// [`CacheError::OutOfPages`] for more sequences than [`EvictingConfig::max_seqs`].
    pub fn create(&mut self) -> Result<SeqId> {
        let slot = self.take_slot()?;
        let owners = vec![Default::default(); self.owners()];
        Ok(self.insert(Sequence { owners, slot, ..Sequence::default() }))
    }

    fn take_slot(&mut self) -> Result<usize> {
        let capacity = self.config.max_seqs;
        self.free_slots.pop().ok_or(CacheError::OutOfPages { of: "sequences", needed: 1, free: 0, capacity })
    }

    fn insert(&mut self, sequence: Sequence) -> SeqId {
        let id = SeqId::new(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        id
    }

    pub(super) fn get(&self, seq: SeqId) -> Result<&Sequence> {
        self.sequences.get(&seq).ok_or(CacheError::UnknownSequence(seq))
    }

    /// A sequence that nothing is at work on.
    pub(super) fn idle(&self, seq: SeqId) -> Result<&Sequence> {
        let s = self.get(seq)?;
        if s.step.is_some() || s.evicting { Err(CacheError::Busy(seq)) } else { Ok(s) }
    }

    /// Tokens that a sequence has seen, evicted ones included: the position of the next.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`].
    pub fn len(&self, seq: SeqId) -> Result<usize> {
        Ok(self.get(seq)?.tokens)
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// A sequence with the same rows, scores and past. It shares all pages; a shared page is copied before either writes into
    /// it, or evicts from it.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::Busy`], [`CacheError::OutOfPages`] for more sequences than
    /// [`EvictingConfig::max_seqs`], [`CacheError::Device`].
    pub fn fork(&mut self, stream: &Stream, seq: SeqId) -> Result<SeqId> {
        let copy = self.idle(seq)?.clone();
        let slot = self.take_slot()?;
        if let Err(e) = self.copy_scores(stream, copy.slot, slot) {
            self.free_slots.push(slot);
            return Err(e);
        }
        for store in &mut self.stores {
            let owners = &copy.owners[store.first_owner..][..store.owners()];
            owners.iter().flat_map(|o| &o.pages).for_each(|&page| store.book.share(page));
        }
        Ok(self.insert(Sequence { slot, ..copy }))
    }

    /// Scores that stay with their rows, or wait for them.
    fn copy_scores(&mut self, stream: &Stream, from: usize, to: usize) -> Result<()> {
        let persistent = self.policy.persistent_scores();
        for scores in [Some(&mut self.scores).filter(|_| persistent), Some(&mut self.staged)].into_iter().flatten() {
            let bytes = scores.len() / self.config.max_seqs;
            if bytes > 0 {
                stream.copy_within(scores, from * bytes..(from + 1) * bytes, to * bytes)?;
            }
        }
        Ok(())
    }

    /// Forgets a sequence and frees the pages that no other owns.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::Busy`].
    pub fn remove(&mut self, seq: SeqId) -> Result<()> {
        self.idle(seq)?;
        if let Some(mut s) = self.sequences.remove(&seq) {
            s.owners.iter_mut().for_each(|o| o.rows = 0);
            s.shrink(&mut self.stores);
            self.free_slots.push(s.slot);
        }
        Ok(())
    }

    /// Takes tokens back, to `tokens` seen: exactly as if they had never been. Tokens behind the last commit were never
    /// evicted, so that each head gives up as many rows.
    ///
    /// # Errors
    /// [`CacheError::Committed`] below what was committed; [`CacheError::Invalid`] above what was seen;
    /// [`CacheError::UnknownSequence`], [`CacheError::Busy`].
    pub fn truncate(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        let s = self.idle(seq)?;
        if tokens > s.tokens {
            return invalid("tokens", format!("cannot truncate {} tokens to {tokens}", s.tokens));
        }
        if tokens < s.committed {
            return Err(CacheError::Committed { seq, rows: tokens, committed: s.committed });
        }
        if let Some(s) = self.sequences.get_mut(&seq) {
            let less = s.tokens - tokens;
            s.tokens = tokens;
            s.evicted_at = s.evicted_at.min(tokens);
            s.owners.iter_mut().for_each(|o| o.rows -= less);
            s.shrink(&mut self.stores);
            s.version += 1;
        }
        Ok(())
    }

    /// Declares the first `tokens` tokens final: they are never truncated, and may be evicted.
    ///
    /// # Errors
    /// [`CacheError::Invalid`] for more tokens than were seen, or fewer than were committed; [`CacheError::UnknownSequence`],
    /// [`CacheError::Busy`].
    pub fn commit(&mut self, seq: SeqId, tokens: usize) -> Result<()> {
        let s = self.idle(seq)?;
        if tokens > s.tokens || tokens < s.committed {
            return invalid("tokens", format!("cannot commit {tokens}: {} were seen, {} committed", s.tokens, s.committed));
        }
        if let Some(s) = self.sequences.get_mut(&seq) {
            s.committed = tokens;
        }
        Ok(())
    }
}

/// Refuses a policy that these rows have no scores or budgets for.
fn check_policy(policy: &Policy, layers: &[EvictingLayer], stores: &[RowStore]) -> Result<()> {
    let unsupported = |what: &str| Err(kvlar::Error::Unsupported { op: "evicting cache", what: what.into() }.into());
    if policy.reads_rows() && layers.iter().any(|l| l.lowrank.is_some()) {
        return unsupported("scores by attention or by keys of latents: gates score any rows");
    }
    if policy.shares_layers() && (stores.len() > 1 || stores.iter().any(RowStore::is_shared)) {
        return unsupported("layers or heads that share a budget where layers are stored differently, or their heads as one");
    }
    Ok(())
}

/// The gates of all layers, packed.
fn gate_weights(device: &Device, policy: &Policy, config: &EvictingConfig) -> Result<Vec<GateWeights>> {
    let Scorer::Gate(gates) = &policy.scorer else { return Ok(Vec::new()) };
    let stream = device.stream()?;
    let weights = |layer| match gates.layer(layer) {
        Some(gate) => Ok(GateWeights::new(device, &stream, &gate.view(), config.dtype)?),
        None => invalid("gates", format!("layer {layer} has none")),
    };
    let all = (0..config.layers).map(weights).collect();
    // They are read on other streams.
    stream.synchronize()?;
    all
}
