//! A sequence's tokens and the pages that hold them.

use crate::exact::{EXACT_PAGE_ROWS, ExactShape};
use crate::pages::PageBook;
use std::collections::VecDeque;

/// Rows next to each other, in pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageList {
    /// Position of the first page's first row.
    pub first: usize,
    pub pages: VecDeque<u32>,
}

/// What a list is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All rows: token-wise, or as latents.
    All,
    /// The first rows, exact.
    Sinks,
    /// The last rows, exact.
    Recent,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::All, Self::Sinks, Self::Recent];

    /// Whether its pages are those of exact rows.
    pub fn is_exact(self) -> bool {
        self != Self::All
    }
}

/// The pages of a sequence. The lists' first rows: 0, 0, and (recent) the first row behind the sinks whose page is held, at
/// a page boundary. Attention reads latents of the rows before [`Held::exact_from`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    lists: [PageList; 3],
}

/// A step that has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Tokens that it brings.
    adding: usize,
    /// Of each list, how to take it back.
    before: [Before; 3],
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Before {
    first: usize,
    /// Pages that left at the front.
    left: Vec<u32>,
    /// Pages that stayed.
    stayed: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub held: Held,
    /// Tokens held.
    pub rows: usize,
    /// Of them, never to be taken back.
    pub committed: usize,
    pub step: Option<Step>,
}

/// Rows that a step encodes: those that leave the view of exact rows.
pub(crate) struct Packing<'a> {
    /// Position of the first row of `pages`.
    pub source_first: usize,
    /// Positions.
    pub from: usize,
    pub to: usize,
    /// Pages that held the last rows before the step.
    pub pages: Vec<u32>,
    /// Whose they are.
    pub of: &'a Sequence,
}

/// What a step does to one list.
pub(crate) struct Growth {
    pub kind: Kind,
    /// Pages that leave at the front.
    pub leave: usize,
    /// Where the list begins then.
    first: usize,
    /// Pages that come.
    pub come: usize,
    /// Pages that stay, but are written: entries from here on, counted after the others left.
    pub written: usize,
}

impl Held {
    pub fn new(exact: &ExactShape) -> Self {
        let mut held = Self::default();
        held.list_mut(Kind::Recent).first = exact.sinks;
        held
    }

    pub fn list(&self, kind: Kind) -> &PageList {
        &self.lists[kind as usize]
    }

    pub fn list_mut(&mut self, kind: Kind) -> &mut PageList {
        &mut self.lists[kind as usize]
    }

    /// Pages with their kinds.
    pub fn pages(&self) -> impl Iterator<Item = (Kind, u32)> {
        Kind::ALL.into_iter().flat_map(|kind| self.list(kind).pages.iter().map(move |&page| (kind, page)))
    }

    /// The first row behind the sinks that attention reads as it was given, where `total` are held. Only rows taken back
    /// beyond the rollback make it later than [`ExactShape::start`].
    pub fn exact_from(&self, exact: &ExactShape, total: usize) -> usize {
        exact.start(total).max(self.list(Kind::Recent).first).min(total)
    }

    /// Pages before the view's, where `total` rows are held.
    pub fn older_pages(&self, exact: &ExactShape, total: usize) -> usize {
        let list = self.list(Kind::Recent);
        (exact.start(total).saturating_sub(list.first) / EXACT_PAGE_ROWS).min(list.pages.len())
    }

    /// Where the recent list begins once pages that cannot be needed any more leave it, and how many those are.
    fn leaving(&self, exact: &ExactShape, total: usize, committed: usize) -> (usize, usize) {
        let list = self.list(Kind::Recent);
        if !exact.keeps_recent() {
            return (list.first, 0);
        }
        let first = exact.keep_from(total, committed).max(list.first);
        (first, ((first - list.first) / EXACT_PAGE_ROWS).min(list.pages.len()))
    }

    /// Gives back the exact rows' pages that only lengths below `committed` would need.
    fn forget(&mut self, exact: &ExactShape, total: usize, committed: usize, books: &mut Books) {
        let (first, leave) = self.leaving(exact, total, committed);
        let list = self.list_mut(Kind::Recent);
        list.first = first;
        list.pages.drain(..leave).for_each(|page| books.of(Kind::Recent).release(page));
    }

    /// What a step from `rows` to `total` rows does, `committed` of which stay.
    fn growth(&self, exact: &ExactShape, page_rows: usize, (rows, total): (usize, usize), committed: usize) -> [Growth; 3] {
        let view = exact.start(total).max(self.leaving(exact, total, committed).0).min(total);
        // Rows that leave the view are written where all rows are, beside those that come.
        let viewed = self.exact_from(exact, rows);
        let leave_from = if exact.encodes() && view > viewed { viewed } else { rows };
        Kind::ALL.map(|kind| {
            let list = self.list(kind);
            let held = list.pages.len();
            // Latents are a sink's rows behind: their first row is the first that is no sink.
            let (first, leave, end, from, page_rows) = match kind {
                Kind::All => (0, 0, exact.listed_rows(view, total), leave_from.saturating_sub(exact.sinks), page_rows),
                Kind::Sinks => (0, 0, total.min(exact.sinks), rows, EXACT_PAGE_ROWS),
                Kind::Recent => {
                    let (first, leave) = self.leaving(exact, total, committed);
                    (first, leave, if exact.keeps_recent() { total } else { 0 }, rows.max(first), EXACT_PAGE_ROWS)
                }
            };
            let stay = held - leave;
            let come = end.saturating_sub(first).div_ceil(page_rows).saturating_sub(stay);
            let written = if total == rows { stay } else { ((from - first) / page_rows).min(stay) };
            Growth { kind, leave, first, come, written }
        })
    }

    /// Gives back the pages beyond `rows`.
    fn shrink(&mut self, exact: &ExactShape, page_rows: usize, rows: usize, books: &mut Books) {
        let view = self.exact_from(exact, rows);
        for kind in Kind::ALL {
            let list = self.list_mut(kind);
            let (rows, page_rows) = match kind {
                Kind::All => (exact.listed_rows(view, rows), page_rows),
                Kind::Sinks => (rows.min(exact.sinks), EXACT_PAGE_ROWS),
                Kind::Recent => {
                    // A page that was given up holds none of the rows before `rows`: the next one is the first again.
                    list.first = list.first.min(exact.boundary(rows));
                    (rows.saturating_sub(list.first), EXACT_PAGE_ROWS)
                }
            };
            let keep = rows.div_ceil(page_rows).min(list.pages.len());
            list.pages.drain(keep..).for_each(|page| books.of(kind).release(page));
        }
    }
}

impl Sequence {
    pub fn new(exact: &ExactShape) -> Self {
        Self { held: Held::new(exact), ..Self::default() }
    }

    /// Tokens held once a step that has begun is finished.
    pub fn total(&self) -> usize {
        self.rows + self.step.as_ref().map_or(0, |s| s.adding)
    }

    /// How many of `rows` tokens, to which it may not be truncated, can be kept instead: where rows are encoded in groups, and
    /// what the group of row `rows` was made of is not held any more.
    pub fn whole_groups(&self, exact: &ExactShape, rows: usize) -> Option<usize> {
        let group = exact.group_start(rows);
        let gone = exact.encodes() && rows > group && group < self.held.list(Kind::Recent).first;
        gone.then_some(group)
    }

    /// What a step that has begun encodes; `None` without one.
    pub fn packing(&self, exact: &ExactShape) -> Option<Packing<'_>> {
        let before = &self.step.as_ref()?.before[Kind::Recent as usize];
        let list = self.held.list(Kind::Recent);
        let from = exact.start(self.rows).max(before.first).min(self.rows);
        let to = self.held.exact_from(exact, self.total());
        let pages = before.left.iter().chain(list.pages.iter().take(before.stayed));
        Some(Packing { source_first: before.first, from, to: to.max(from), pages: pages.copied().collect(), of: self })
    }

    pub fn truncate(&mut self, exact: &ExactShape, page_rows: usize, rows: usize, books: &mut Books) {
        self.rows = rows;
        self.held.shrink(exact, page_rows, rows, books);
    }

    pub fn commit(&mut self, exact: &ExactShape, rows: usize, books: &mut Books) {
        self.committed = rows;
        self.held.forget(exact, self.rows, rows, books);
    }

    /// What a step of `adding` tokens does to its pages.
    pub fn growth(&self, exact: &ExactShape, page_rows: usize, adding: usize) -> [Growth; 3] {
        self.held.growth(exact, page_rows, (self.rows, self.rows + adding), self.committed)
    }

    /// Begins a step: pages leave, none come yet.
    pub fn begin_step(&mut self, adding: usize, growth: &[Growth; 3]) {
        let before = growth.each_ref().map(|g| {
            let list = self.held.list_mut(g.kind);
            let first = std::mem::replace(&mut list.first, g.first);
            let left = list.pages.drain(..g.leave).collect();
            Before { first, left, stayed: list.pages.len() }
        });
        self.step = Some(Step { adding, before });
    }

    /// Ends a step: the pages are those it made, or those of before.
    pub fn end_step(&mut self, keep: bool, books: &mut Books) {
        let Some(Step { adding, before }) = self.step.take() else { return };
        self.rows += if keep { adding } else { 0 };
        for (kind, before) in Kind::ALL.into_iter().zip(before) {
            let list = self.held.list_mut(kind);
            if keep {
                before.left.iter().for_each(|&page| books.of(kind).release(page));
            } else {
                list.pages.drain(before.stayed..).for_each(|page| books.of(kind).release(page));
                before.left.iter().rev().for_each(|&page| list.pages.push_front(page));
                list.first = before.first;
            }
        }
    }
}

/// The books of the two pools.
#[derive(Clone, Debug)]
pub(crate) struct Books {
    pub rows: PageBook,
    pub exact: PageBook,
}

impl Books {
    pub fn of(&mut self, kind: Kind) -> &mut PageBook {
        if kind.is_exact() { &mut self.exact } else { &mut self.rows }
    }
}
