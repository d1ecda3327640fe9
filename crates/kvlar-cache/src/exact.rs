//! Rows that layers also, or for now, keep as they are: the first of a sequence (sinks) and the last (recent rows).
//!
//! Which rows are exact is a view: it begins at [`ExactShape::start`], which the number of rows alone decides, wherever a
//! sequence has been before. It begins at fixed positions behind the sinks, [`ExactShape::group`] rows apart, which is why up
//! to a group less one row more than asked for are exact. In low-rank layers every row behind the sinks becomes a latent in
//! the step that brings it; in layers of codes a group is encoded in the step whose view begins behind it (KIVI's residual,
//! arXiv 2402.02750 §3.2). Pages are held for longer than the view needs them, so that a sequence that gives tokens back
//! finds the view of its new length whole.

/// Rows a page of exact rows: the kernel's tile.
pub(crate) const EXACT_PAGE_ROWS: usize = 16;

/// How many rows stay exact; 0 where no layer keeps any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExactShape {
    pub sinks: usize,
    pub recent: usize,
    /// Rows that may be taken back without loss.
    pub rollback: usize,
    /// Rows that leave the view together: a multiple of [`EXACT_PAGE_ROWS`].
    pub group: usize,
    /// What becomes of rows that leave it.
    pub leaving: Leaving,
}

/// What becomes of rows that leave the view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// They are elsewhere already.
    Nothing,
    /// Some layers encode them then; others have had them all along.
    EncodedInSome,
    /// All layers encode them then: until they do, nothing else holds them.
    EncodedInAll,
}

impl Default for ExactShape {
    fn default() -> Self {
        Self { sinks: 0, recent: 0, rollback: 0, group: EXACT_PAGE_ROWS, leaving: Leaving::Nothing }
    }
}

impl ExactShape {
    /// Whether any do.
    pub fn any(&self) -> bool {
        self.sinks > 0 || self.keeps_recent()
    }

    /// Whether some of the last rows do.
    pub fn keeps_recent(&self) -> bool {
        self.recent > 0 || self.encodes()
    }

    /// Whether some layer encodes rows that leave the view.
    pub fn encodes(&self) -> bool {
        self.leaving != Leaving::Nothing
    }

    pub fn sink_pages(&self) -> usize {
        self.sinks.div_ceil(EXACT_PAGE_ROWS)
    }

    /// Pages of the view at most: the first group of it may have but one row that is still asked for.
    pub fn recent_pages(&self) -> usize {
        self.last_pages(0)
    }

    /// Pages before the view that are held for rollback.
    pub fn older_pages(&self) -> usize {
        if self.keeps_recent() { self.rollback.div_ceil(self.group) * (self.group / EXACT_PAGE_ROWS) } else { 0 }
    }

    fn last_pages(&self, rollback: usize) -> usize {
        if self.keeps_recent() { (self.recent + rollback + self.group - 1).div_ceil(EXACT_PAGE_ROWS) } else { 0 }
    }

    /// Entries of a sequence's table: sinks, the view, what is before it.
    pub fn table_pages(&self) -> usize {
        self.sink_pages() + self.recent_pages() + self.older_pages()
    }

    /// Pages of the last rows that a step may find.
    pub fn source_pages(&self) -> usize {
        self.last_pages(self.rollback)
    }

    /// Pages that a sequence takes at most: until a step is finished, what it pushes out is kept beside what it brings.
    pub fn pages_per_seq(&self) -> usize {
        self.sink_pages() + 2 * self.last_pages(self.rollback)
    }

    /// The first row behind the sinks that is exact where `total` are held; `total` or more where none is.
    pub fn start(&self, total: usize) -> usize {
        if !self.keeps_recent() {
            return total.max(self.sinks);
        }
        let others = total.saturating_sub(self.recent).saturating_sub(self.sinks);
        self.sinks + others / self.group * self.group
    }

    /// The first row whose page must be held where `total` are, of which `committed` stay: the least start of all lengths
    /// that may still come back.
    pub fn keep_from(&self, total: usize, committed: usize) -> usize {
        self.start(total.saturating_sub(self.rollback).max(committed))
    }

    /// The first page boundary at or behind `row`.
    pub fn boundary(&self, row: usize) -> usize {
        self.sinks + row.saturating_sub(self.sinks).next_multiple_of(EXACT_PAGE_ROWS)
    }

    /// The first row of the group that `row` is in.
    pub fn group_start(&self, row: usize) -> usize {
        self.sinks + row.saturating_sub(self.sinks) / self.group * self.group
    }

    /// Rows of the list of all rows where attention reads exact ones from `from` on, of `total`.
    pub fn listed_rows(&self, from: usize, total: usize) -> usize {
        if self.leaving == Leaving::EncodedInAll { from.saturating_sub(self.sinks) } else { total }
    }
}
