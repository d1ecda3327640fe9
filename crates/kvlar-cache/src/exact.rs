//! Rows that low-rank layers also keep as they are: the first of a sequence (sinks) and the last (recent rows).
//!
//! Every row behind the sinks becomes a latent in the step that brings it, so which rows are exact is a view: it begins at
//! [`ExactShape::start`], which the number of rows alone decides, wherever a sequence has been before. Pages begin at fixed
//! positions behind the sinks, which is why up to a page less one row more than asked for are exact. Pages are held for
//! longer than the view needs them, so that a sequence that gives tokens back finds the view of its new length whole.

/// Rows a page of exact rows: the kernel's tile.
pub(crate) const EXACT_PAGE_ROWS: usize = 16;

/// How many rows stay exact; 0 where no layer is low rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ExactShape {
    pub sinks: usize,
    pub recent: usize,
    /// Rows that may be taken back without loss.
    pub rollback: usize,
}

impl ExactShape {
    /// Whether any do.
    pub fn any(&self) -> bool {
        self.sinks + self.recent > 0
    }

    pub fn sink_pages(&self) -> usize {
        self.sinks.div_ceil(EXACT_PAGE_ROWS)
    }

    /// Pages of the view at most: the first of them may have but one row that is still asked for.
    pub fn recent_pages(&self) -> usize {
        self.last_pages(0)
    }

    /// Pages before the view that are held for rollback.
    pub fn older_pages(&self) -> usize {
        if self.recent == 0 { 0 } else { self.rollback.div_ceil(EXACT_PAGE_ROWS) }
    }

    fn last_pages(&self, rollback: usize) -> usize {
        if self.recent == 0 { 0 } else { (self.recent + rollback + EXACT_PAGE_ROWS - 1).div_ceil(EXACT_PAGE_ROWS) }
    }

    /// Entries of a sequence's table: sinks, the view, what is before it.
    pub fn table_pages(&self) -> usize {
        self.sink_pages() + self.recent_pages() + self.older_pages()
    }

    /// Pages that a sequence takes at most: until a step is finished, what it pushes out is kept beside what it brings.
    pub fn pages_per_seq(&self) -> usize {
        self.sink_pages() + 2 * self.last_pages(self.rollback)
    }

    /// The first row behind the sinks that is exact where `total` are held; `total` or more where none is.
    pub fn start(&self, total: usize) -> usize {
        if self.recent == 0 {
            return total.max(self.sinks);
        }
        let latents = total.saturating_sub(self.recent).saturating_sub(self.sinks);
        self.sinks + latents / EXACT_PAGE_ROWS * EXACT_PAGE_ROWS
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
}
