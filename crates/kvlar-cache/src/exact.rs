//! Rows that low-rank layers also keep as they are: the first of a sequence (sinks) and the last (recent rows).
//!
//! Every row behind the sinks becomes a latent in the step that brings it, so an exact row leaves by being forgotten: no
//! copy, no second look at it. Recent rows leave page by page, which is why up to a page less one row more than asked for
//! stay exact.

/// Rows a page of exact rows: the kernel's tile.
pub(crate) const EXACT_PAGE_ROWS: usize = 16;

/// How many rows stay exact; 0 and 0 where no layer is low rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ExactShape {
    pub sinks: usize,
    pub recent: usize,
}

impl ExactShape {
    /// Whether any do.
    pub fn any(&self) -> bool {
        self.sinks + self.recent > 0
    }

    pub fn sink_pages(&self) -> usize {
        self.sinks.div_ceil(EXACT_PAGE_ROWS)
    }

    /// Pages of recent rows: the first of them may have but one that is still asked for.
    pub fn recent_pages(&self) -> usize {
        if self.recent == 0 { 0 } else { (self.recent + EXACT_PAGE_ROWS - 1).div_ceil(EXACT_PAGE_ROWS) }
    }

    /// Entries of a sequence's table: sinks, then recent rows.
    pub fn table_pages(&self) -> usize {
        self.sink_pages() + self.recent_pages()
    }

    /// Pages that a sequence takes at most: until a step is finished, what it pushes out is kept beside what it brings.
    pub fn pages_per_seq(&self) -> usize {
        self.sink_pages() + 2 * self.recent_pages()
    }

    /// Rows before it need not stay exact once `total` are held.
    fn keep_from(&self, total: usize) -> usize {
        total.saturating_sub(self.recent).max(self.sinks)
    }

    /// The recent rows' first after a step to `total` rows, and how many pages they leave, where they began at `first` in
    /// `pages` pages.
    pub fn advance(&self, first: usize, pages: usize, total: usize) -> (usize, usize) {
        let keep = self.keep_from(total);
        let left = (keep.saturating_sub(first) / EXACT_PAGE_ROWS).min(pages);
        let first = first + left * EXACT_PAGE_ROWS;
        (if left == pages { first.max(keep) } else { first }, left)
    }
}
