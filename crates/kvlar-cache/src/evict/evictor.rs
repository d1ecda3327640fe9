//! Evictions: rows are scored, some are chosen, the others' room is given back.

use super::cache::EvictingCache;
use super::decoded::DecodedRows;
use super::policy::{Scorer, Sharing};
use super::select::{Keep, Moment, Task};
use super::step::check_free;
use super::store::RowStore;
use crate::error::invalid;
use crate::step::take;
use crate::tables::upload;
use crate::{CacheError, Result, SeqId};
use kvlar::{
    BudgetHeadsArgs, BudgetHeadsShape, BudgetLayersArgs, BudgetLayersShape, Buffer, Columns, CompactArgs, CompactOrder,
    CompactPlan, CompactShape, Ks, LayerBudget, ProtectArgs, ProtectShape, RowScores, Rows, ScoreKeysArgs, ScoreKeysShape,
    StagedScores, Stream, TopkArgs, TopkShape, View, Workspace, WorkspaceSize,
};

/// Tables and scratch of evictions, of one sequence at a time; one serves all sequences of a stream.
#[derive(Debug)]
pub struct Evictor {
    cache: u64,
    /// Page tables of each store, `[owners][max_pages]`.
    pages: Vec<Buffer>,
    /// i32 `[owners]`.
    lengths: Buffer,
    /// i32: first of the recent rows, and of what is judged or staged; rows before the recent ones.
    marks: [Buffer; 3],
    /// f32 `[owners][max_rows]`.
    protected: Buffer,
    /// u8, likewise.
    mask: Buffer,
    /// i32 `[owners]`, of rows, and of layers or heads before those that stay in any case.
    ks: Buffer,
    budgets: Buffer,
    /// Of each store: in order, and filling holes.
    compact: Vec<[CompactPlan; 2]>,
    /// A layer's keys and values as scores take them, where they are codes.
    decoded: [Option<DecodedRows>; 2],
    workspace: Workspace,
}

impl Evictor {
    /// Scratch and the status word of its launches.
    pub fn workspace(&self) -> &Workspace {
        &self.workspace
    }
}

impl EvictingCache {
    /// Scratch for evictions.
    ///
    /// # Errors
    /// [`CacheError::Device`] if memory runs out, or for sizes without a kernel.
    pub fn evictor(&self) -> Result<Evictor> {
        let (device, c, owners) = (&self.device, &self.config, self.owners());
        let all = owners * c.max_rows;
        let compact = |s: &RowStore| {
            let ([keys, values], owners, owners_a_layer, max_rows) = (s.stored(), s.owners(), s.owners_a_layer, c.max_rows);
            let values = Some(values);
            let shape = |order| CompactShape { seqs: 1, owners, owners_a_layer, keys, values, max_rows, order };
            Ok([shape(CompactOrder::Keep).plan(device)?, shape(CompactOrder::Any).plan(device)?])
        };
        let words = |n: usize| device.alloc(4 * n);
        Ok(Evictor {
            cache: self.id,
            pages: self.stores.iter().map(|s| words(s.owners() * c.max_pages())).collect::<kvlar::Result<_>>()?,
            lengths: words(owners)?,
            marks: [words(1)?, words(1)?, words(1)?],
            protected: words(all)?,
            mask: device.alloc(owners * c.max_rows.max(c.staged))?,
            ks: words(owners)?,
            budgets: words(owners)?,
            compact: self.stores.iter().map(compact).collect::<Result<_>>()?,
            decoded: if self.policy.scores_late() { self.decoded_rows()? } else { [None, None] },
            workspace: Workspace::new(device, self.evicting_workspace()?)?,
        })
    }

    fn evicting_workspace(&self) -> Result<WorkspaceSize> {
        let (c, owners) = (&self.config, self.owners());
        let rows = c.max_rows.max(c.staged);
        // What stays in any case is among the floors.
        let floor = match self.policy.sharing {
            Sharing::All { floor, .. } if floor > 0 => rows,
            _ => 0,
        };
        let set = TopkShape { members: owners, floor, ..TopkShape::new(1, rows, owners * rows) };
        let each = TopkShape::new(owners, c.max_rows, c.max_rows);
        let mut size = set.plan(&self.device)?.workspace().max(each.plan(&self.device)?.workspace());
        if let Some(shape) = self.budget_layers(c.max_rows, c.max_rows, 0) {
            size = size.max(shape.plan(&self.device)?.workspace());
        }
        if let Some(shape) = self.budget_heads(c.max_rows, c.max_rows, 0) {
            size = size.max(shape.plan(&self.device)?.workspace());
        }
        if let Some(shape) = self.score_keys() {
            size = size.max(shape.plan(&self.device)?.workspace());
        }
        Ok(size)
    }

    fn score_keys(&self) -> Option<ScoreKeysShape> {
        let c = &self.config;
        let Scorer::Keys(method) = self.policy.scorer else { return None };
        let (seqs, kv_heads, max_rows) = (1, c.kv_heads, c.max_rows);
        let (head_dim, value_dim) = (c.head_dim, c.value_dim);
        Some(ScoreKeysShape { dtype: c.dtype, method, seqs, kv_heads, max_rows, head_dim, value_dim, fill: false })
    }

    /// Of `rows` rows that compete, `base` of a head on average; layers of one store.
    fn budget_layers(&self, rows: usize, base: usize, forced_rows: usize) -> Option<BudgetLayersShape> {
        let heads = self.stores.first().map_or(0, |s| s.owners_a_layer);
        let of = |method| {
            let shape = BudgetLayersShape::new(method, [1, self.config.layers, heads], rows, base);
            BudgetLayersShape { forced_rows, ..shape }
        };
        match self.policy.sharing {
            Sharing::Pyramid { beta } => Some(BudgetLayersShape { beta, ..of(LayerBudget::Pyramid) }),
            Sharing::Dynamic { r_max, interval } => Some(BudgetLayersShape { r_max, interval, ..of(LayerBudget::DynamicKv) }),
            Sharing::Each | Sharing::Heads { .. } | Sharing::All { .. } => None,
        }
    }

    fn budget_heads(&self, rows: usize, base: usize, forced_rows: usize) -> Option<BudgetHeadsShape> {
        let heads = self.stores.first().map_or(0, |s| s.owners_a_layer);
        let Sharing::Heads { alpha } = self.policy.sharing else { return None };
        let shape = BudgetHeadsShape::new([1, self.config.layers, heads], rows, base);
        Some(BudgetHeadsShape { alpha, forced_rows, ..shape })
    }

    /// Enqueues what the policy does at this moment: scores that take stored rows, the choice, and one compaction of all
    /// layers and heads. No step and no other eviction of the sequence can begin until [`collect`](Self::collect). `false`:
    /// nothing goes, nothing was enqueued. Tokens behind the last [`commit`](Self::commit) stay.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`], [`CacheError::Busy`]; [`CacheError::OutOfPages`] where pages that other sequences own
    /// too must be copied first; [`CacheError::Invalid`] for another cache's evictor; [`CacheError::Device`]. The sequence is
    /// as before.
    pub fn evict(&mut self, stream: &Stream, evictor: &mut Evictor, seq: SeqId, moment: Moment) -> Result<bool> {
        if evictor.cache != self.id {
            return invalid("evictor", "was made for another cache");
        }
        let s = self.idle(seq)?;
        let (tokens, due) = (s.tokens, moment == Moment::Decode && self.due(s));
        let Some(task) = self.task(s, moment) else {
            if let Some(s) = self.sequences.get_mut(&seq).filter(|_| due) {
                s.evicted_at = tokens; // nothing to go is as good
            }
            return Ok(false);
        };
        self.own_pages(stream, seq)?;
        let s = self.get(seq)?;
        let lengths: Vec<i32> = s.owners.iter().map(|o| o.rows as i32).collect();
        upload(stream, &mut evictor.lengths, &lengths)?;
        for (store, pages) in self.stores.iter().zip(&mut evictor.pages) {
            let width = self.config.max_pages();
            let mut table = vec![0i32; store.owners() * width];
            for (to, owner) in table.chunks_mut(width).zip(&s.owners[store.first_owner..]) {
                to.iter_mut().zip(&owner.pages).for_each(|(to, &page)| *to = page as i32);
            }
            upload(stream, pages, &table)?;
        }
        let fill_holes = self.policy.fill_holes && moment == Moment::Decode && s.committed == s.tokens;
        let (slot, staged_from, most) = (s.slot, s.staged_from, s.most_rows());
        upload(stream, &mut evictor.marks[0], &[tokens as i32])?;
        upload(stream, &mut evictor.marks[1], &[staged_from as i32])?;
        let columns = match &task {
            Task::Judge { from, to, keep, strict, floor } => {
                self.judge(stream, evictor, slot, (*from, *to, staged_from), (*keep, *strict, *floor))?;
                if self.policy.decode.is_some() {
                    // What stays competes again while decoding, by the same scores.
                    self.protect(stream, evictor, slot, most, f32::INFINITY)?;
                }
                Some(to - from)
            }
            Task::Compete { recent_from, keep } => {
                self.score_stored(stream, evictor, (slot, most))?;
                self.choose(stream, evictor, seq, *recent_from, keep)?;
                None
            }
        };
        if let Task::Judge { from, .. } = task {
            upload(stream, &mut evictor.marks[1], &[from as i32])?;
        }
        self.compact(stream, evictor, slot, (columns.is_some(), columns.unwrap_or(most)), fill_holes)?;
        if let Some(s) = self.sequences.get_mut(&seq) {
            s.evicting = true;
            s.unordered |= fill_holes;
            s.evicted_at = tokens;
            match task {
                Task::Judge { to, .. } => (s.judged, s.settled) = (to, to),
                Task::Compete { .. } => s.settled = s.committed,
            }
        }
        Ok(true)
    }

    /// Waits for a sequence's eviction: how many rows each head holds decides which pages come back. Nothing without one.
    ///
    /// # Errors
    /// [`CacheError::UnknownSequence`]; [`CacheError::Device`].
    pub fn collect(&mut self, stream: &Stream, evictor: &mut Evictor, seq: SeqId) -> Result<()> {
        if !self.get(seq)?.evicting {
            return Ok(());
        }
        let mut lengths = vec![0i32; self.owners()];
        stream.download(&evictor.lengths, 0, bytemuck::cast_slice_mut(&mut lengths))?;
        if let Some(s) = self.sequences.get_mut(&seq) {
            for (owner, rows) in s.owners.iter_mut().zip(lengths) {
                owner.rows = rows as usize;
            }
            s.shrink(&mut self.stores);
            s.version += 1;
            s.evicting = false;
        }
        self.rebase(stream, seq)
    }

    /// Scores that wait move to the front, once those before them were judged or have become their rows'.
    fn rebase(&mut self, stream: &Stream, seq: SeqId) -> Result<()> {
        if self.staged.is_empty() {
            return Ok(());
        }
        let (owners, width) = (self.owners(), self.config.staged);
        let s = self.get(seq)?;
        let (slot, from) = (s.slot, s.staged_from);
        let to = s.settled.max(from);
        let waiting = s.tokens - to;
        if to == from || waiting > to - from {
            return Ok(()); // later, when the ranges do not overlap
        }
        for owner in 0..owners {
            let first = 4 * (slot * owners + owner) * width;
            let source = first + 4 * (to - from)..first + 4 * (to - from + waiting);
            stream.copy_within(&mut self.staged, source, first)?;
        }
        if let Some(s) = self.sequences.get_mut(&seq) {
            s.staged_from = to;
        }
        Ok(())
    }

    /// Copies pages that other sequences own too: rows move in them.
    fn own_pages(&mut self, stream: &Stream, seq: SeqId) -> Result<()> {
        let Some(s) = self.sequences.get_mut(&seq) else { return Err(CacheError::UnknownSequence(seq)) };
        for store in &self.stores {
            let pages = s.owners[store.first_owner..][..store.owners()].iter().flat_map(|o| &o.pages);
            check_free(store, pages.filter(|&&p| store.book.is_shared(p)).count())?;
        }
        for store in &mut self.stores {
            let (first, count) = (store.first_owner, store.owners());
            for page in s.owners[first..][..count].iter_mut().flat_map(|o| &mut o.pages) {
                if store.book.is_shared(*page) {
                    let own = take(&mut store.book)?;
                    if let Err(e) = store.copy_page(stream, *page, own) {
                        store.book.release(own);
                        return Err(e);
                    }
                    store.book.release(std::mem::replace(page, own));
                    s.version += 1;
                }
            }
        }
        Ok(())
    }

    /// Marks which columns of what is judged stay, by scores that wait.
    fn judge(
        &mut self,
        stream: &Stream,
        evictor: &mut Evictor,
        slot: usize,
        (from, to, staged_from): (usize, usize, usize),
        (keep, strict, floor): (usize, bool, usize),
    ) -> Result<()> {
        let (owners, staged, n) = (self.owners(), self.config.staged, to - from);
        let k = if strict { keep } else { keep.max(floor.min(n) * owners) };
        let shape = TopkShape { members: owners, strict, floor, ..TopkShape::new(1, n, k) };
        let first = 4 * (slot * owners * staged + from - staged_from);
        let mut args = TopkArgs::new(self.staged.view().slice(first..self.staged.len())?);
        args.score_stride = Some(staged);
        args.mask = Some(evictor.mask.view_mut());
        Ok(shape.plan(&self.device)?.launch(stream, &mut args, &mut evictor.workspace)?)
    }

    /// Scores of the rows that are there, where they are made of those: one launch a layer, or two, beside those that decode.
    fn score_stored(&mut self, stream: &Stream, evictor: &mut Evictor, (slot, most): (usize, usize)) -> Result<()> {
        let Some(shape) = self.score_keys() else { return Ok(()) };
        let (owners, max_rows) = (self.owners(), self.config.max_rows);
        let plan = shape.plan(&self.device)?;
        for layer in 0..self.layers.len() {
            let first_owner = self.owners_of(layer).start;
            let of = &self.layers[layer];
            let store = &self.stores[of.store];
            let local = of.index * store.owners_a_layer;
            let lengths = evictor.lengths.view().slice(4 * first_owner..evictor.lengths.len())?;
            let held = owner_rows(store, &evictor.pages[of.store], lengths, local, (max_rows, self.config.max_pages()))?;
            let (mut rows, (mut keys, mut values, _)) = (held, store.pools());
            if let (Some([of_keys, of_values]), [decoded_keys, decoded_values]) = (self.encoded(layer), &mut evictor.decoded) {
                if let Some(decoded) = decoded_keys {
                    (rows, keys) = decoded.decode(stream, held, most, &keys, of_keys)?;
                }
                if let Some(decoded) = decoded_values {
                    (_, values) = decoded.decode(stream, held, most, &values, of_values)?;
                }
            }
            let at = 4 * (slot * owners + first_owner) * max_rows;
            let mut args = ScoreKeysArgs {
                rows,
                keys,
                values: self.policy.reads_values().then_some(values),
                scores: self.scores.view_mut().slice(at..at + 4 * store.owners_a_layer * max_rows)?,
                score_strides: Some([store.owners_a_layer * max_rows, max_rows]),
                sums: kvlar::KeySums::Own,
            };
            plan.launch(stream, &mut args, &mut evictor.workspace)?;
        }
        Ok(())
    }

    /// Marks which rows stay, of all.
    fn choose(&mut self, stream: &Stream, evictor: &mut Evictor, seq: SeqId, recent_from: usize, keep: &Keep) -> Result<()> {
        let (owners, max_rows) = (self.owners(), self.config.max_rows);
        let s = self.get(seq)?;
        let (slot, most, recent) = (s.slot, s.most_rows(), s.tokens - recent_from);
        let alike = s.owners.iter().all(|o| o.rows == most);
        upload(stream, &mut evictor.marks[0], &[recent_from as i32])?;
        let scores_at = 4 * slot * owners * max_rows;
        // Layers and heads share budgets of the rows before the recent ones.
        if let Keep::Shared { tokens, forced } = keep {
            let before = most.saturating_sub(recent);
            upload(stream, &mut evictor.marks[2], &[before as i32])?;
            let base = tokens.saturating_sub(*forced);
            let (scores, max_rows) = if alike {
                (self.scores.view().slice(scores_at..scores_at + 4 * owners * max_rows)?, max_rows)
            } else {
                // Some hold fewer: what they do not hold, or do not compete with, is worth nothing.
                self.protect(stream, evictor, slot, most, f32::NEG_INFINITY)?;
                (evictor.protected.view(), most)
            };
            let (budgets, ks) = (evictor.budgets.view_mut(), Some(evictor.ks.view_mut()));
            if let Some(shape) = self.budget_layers(before, base, *forced) {
                let (scores, score_stride, lengths) = (Some(scores), Some(max_rows), Some(evictor.marks[2].view()));
                let mut args = BudgetLayersArgs { scores, score_stride, lengths, histogram: None, budgets, ks };
                shape.plan(&self.device)?.launch(stream, &mut args, &mut evictor.workspace)?;
            } else if let Some(shape) = self.budget_heads(before, base, *forced) {
                let (score_stride, lengths) = (Some(max_rows), Some(evictor.marks[2].view()));
                let mut args = BudgetHeadsArgs { scores, score_stride, lengths, histogram: None, budgets, ks };
                shape.plan(&self.device)?.launch(stream, &mut args, &mut evictor.workspace)?;
            }
        }
        self.protect(stream, evictor, slot, most, f32::INFINITY)?;
        if let Keep::Each(each) = keep {
            let each: Vec<i32> = each.iter().map(|&k| k as i32).collect();
            upload(stream, &mut evictor.ks, &each)?;
        }
        let shape = match keep {
            Keep::Each(_) | Keep::Shared { .. } => TopkShape::new(owners, most, most),
            Keep::All { rows, strict, floor } => {
                let k = if *strict { *rows } else { (*rows).max(floor * owners) };
                TopkShape { members: owners, strict: *strict, floor: *floor, ..TopkShape::new(1, most, k) }
            }
        };
        let mut args = TopkArgs::new(evictor.protected.view());
        args.lengths = Some(evictor.lengths.view());
        args.ks = (!matches!(keep, Keep::All { .. })).then(|| Ks::Each(evictor.ks.view()));
        args.mask = Some(evictor.mask.view_mut());
        Ok(shape.plan(&self.device)?.launch(stream, &mut args, &mut evictor.workspace)?)
    }

    /// Scores with those of sinks and recent rows replaced, `[owners][columns]`; one launch a store.
    fn protect(&mut self, stream: &Stream, evictor: &mut Evictor, slot: usize, columns: usize, value: f32) -> Result<()> {
        let (owners, max_rows, staged) = (self.owners(), self.config.max_rows, self.config.staged);
        for (store, pages) in self.stores.iter().zip(&evictor.pages) {
            let shape = ProtectShape {
                seqs: 1,
                owners: store.owners(),
                rows: columns,
                sink_positions: self.policy.sinks as i32,
                value,
                fill: true,
            };
            let first = store.first_owner;
            let lengths = evictor.lengths.view().slice(4 * first..evictor.lengths.len())?;
            let rows = owner_rows(store, pages, lengths, 0, (max_rows, self.config.max_pages()))?;
            let rows = Rows { positions: Some(store.positions.view()), ..rows };
            let staged = match self.staged.is_empty() {
                true => None,
                false => {
                    let scores = self.staged.view().slice(4 * (slot * owners + first) * staged..self.staged.len())?;
                    Some(StagedScores { scores, from: evictor.marks[1].view(), columns: staged, stride: staged })
                }
            };
            let at = 4 * (slot * owners + first) * max_rows;
            let mut args = ProtectArgs {
                rows,
                page_count: store.book.capacity(),
                lengths,
                scores: self.scores.view_mut().slice(at..at + 4 * store.owners() * max_rows)?,
                score_stride: max_rows,
                recent_from: Some(evictor.marks[0].view()),
                staged,
                protected: evictor.protected.view_mut().slice(4 * first * columns..4 * (first + store.owners()) * columns)?,
            };
            shape.plan(&self.device)?.launch(stream, &mut args, &mut evictor.workspace)?;
        }
        Ok(())
    }

    /// Moves what stays together, one launch a store. The mask has columns by position, or by row.
    fn compact(
        &mut self,
        stream: &Stream,
        evictor: &mut Evictor,
        slot: usize,
        (by_position, columns): (bool, usize),
        fill_holes: bool,
    ) -> Result<()> {
        let (owners, max_rows, max_pages) = (self.owners(), self.config.max_rows, self.config.max_pages());
        let persistent = self.policy.persistent_scores();
        for (i, store) in self.stores.iter_mut().enumerate() {
            let (first, count) = (store.first_owner, store.owners());
            let capacity = if by_position { max_rows } else { columns };
            let rows = owner_rows(store, &evictor.pages[i], evictor.marks[0].view(), 0, (capacity, max_pages))?;
            let at = 4 * (slot * owners + first) * max_rows;
            let scores = match persistent {
                true => {
                    let scores = self.scores.view_mut().slice(at..at + 4 * count * max_rows)?;
                    Some(RowScores { scores, stride: max_rows })
                }
                false => None,
            };
            let mask = evictor.mask.view().slice(first * columns..evictor.mask.len())?;
            let (keys, values, positions) = store.moving();
            let mut args = CompactArgs {
                rows,
                lengths: evictor.lengths.view_mut().slice(4 * first..4 * (first + count))?,
                positions: Some(positions),
                scores,
                keys,
                values: Some(values),
                keep: kvlar::Keep::Mask { mask, columns },
                columns: match by_position {
                    true => Columns::Positions { first: evictor.marks[1].view(), count: None },
                    false => Columns::Rows,
                },
                source: None,
            };
            evictor.compact[i][usize::from(fill_holes)].launch(stream, &mut args, &mut evictor.workspace)?;
        }
        Ok(())
    }
}

/// Rows of a store's owners from `first` on, of one sequence.
fn owner_rows<'a>(
    store: &RowStore,
    pages: &'a Buffer,
    lengths: View<'a>,
    first: usize,
    (max_rows, max_pages): (usize, usize),
) -> Result<Rows<'a>> {
    let table = pages.view().slice(4 * first * max_pages..pages.len())?;
    let rows = Rows::per_head(table, store.owners(), max_pages, lengths, store.page_rows)?;
    Ok(Rows { max_rows, ..rows })
}
