//! A sequence whose heads hold different numbers of rows.

use super::store::RowStore;

/// The rows of one owner: row i is row i % page_rows of page i / page_rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct OwnerRows {
    pub rows: usize,
    pub pages: Vec<u32>,
}

/// A step that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// Tokens that it brings.
    pub adding: usize,
    /// Owners that got pages, and how many.
    pub came: Vec<(usize, usize)>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sequence {
    /// Of all stores.
    pub owners: Vec<OwnerRows>,
    /// Tokens that were ever appended and not taken back: the position of the next one.
    pub tokens: usize,
    /// Of them, never to be taken back: these alone are ever evicted.
    pub committed: usize,
    /// Tokens of a prompt that were judged once and for all.
    pub judged: usize,
    /// Tokens whose scores need not wait any more, and where those that wait begin.
    pub settled: usize,
    pub staged_from: usize,
    /// Tokens at the last eviction while decoding.
    pub evicted_at: usize,
    /// Whether each owner's rows are in the order of their positions.
    pub unordered: bool,
    /// Where its scores are.
    pub slot: usize,
    /// Changes whenever a page list does.
    pub version: u64,
    pub step: Option<Step>,
    /// An eviction has been enqueued whose result is not known yet.
    pub evicting: bool,
}

impl Sequence {
    /// Tokens that a step which has begun brings.
    pub fn adding(&self) -> usize {
        self.step.as_ref().map_or(0, |s| s.adding)
    }

    /// Most rows of an owner.
    pub fn most_rows(&self) -> usize {
        self.owners.iter().map(|o| o.rows).max().unwrap_or(0)
    }

    /// Gives an owner's pages beyond its rows back.
    pub fn shrink(&mut self, stores: &mut [RowStore]) {
        for store in stores {
            let owners = self.owners.iter_mut().skip(store.first_owner).take(store.owners());
            for owner in owners {
                let keep = owner.rows.div_ceil(store.page_rows).min(owner.pages.len());
                owner.pages.drain(keep..).for_each(|page| store.book.release(page));
            }
        }
    }

    /// Ends a step: its tokens stay, or its pages go back.
    pub fn end_step(&mut self, keep: bool, stores: &mut [RowStore]) {
        let Some(step) = self.step.take() else { return };
        if keep {
            self.tokens += step.adding;
            self.owners.iter_mut().for_each(|o| o.rows += step.adding);
            return;
        }
        for (owner, came) in step.came {
            let Some(store) = store_of(stores, owner) else { continue };
            let pages = &mut self.owners[owner].pages;
            pages.drain(pages.len() - came..).for_each(|page| store.book.release(page));
        }
    }
}

/// The store that an owner's rows are in.
pub(super) fn store_of(stores: &mut [RowStore], owner: usize) -> Option<&mut RowStore> {
    stores.iter_mut().find(|s| (s.first_owner..s.first_owner + s.owners()).contains(&owner))
}
