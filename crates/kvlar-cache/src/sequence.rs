//! A sequence's pages and tokens.

use crate::pages::PageBook;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sequence {
    pub pages: Vec<u32>,
    /// Tokens held.
    pub rows: usize,
    /// Of them, never to be taken back.
    pub committed: usize,
    /// Tokens that an unfinished batch is adding.
    pub adding: usize,
    /// Whether a batch is at work on it.
    pub busy: bool,
}

impl Sequence {
    /// The last page, if rows would be written into it while another sequence owns it too.
    pub fn shared_tail(&self, book: &PageBook, page_rows: usize) -> Option<u32> {
        let page = *self.pages.get(self.rows / page_rows)?;
        (!self.rows.is_multiple_of(page_rows) && book.is_shared(page)).then_some(page)
    }

    /// Gives back the pages beyond `rows`.
    pub fn shrink(&mut self, rows: usize, book: &mut PageBook, page_rows: usize) {
        for page in self.pages.drain(rows.div_ceil(page_rows)..) {
            book.release(page);
        }
    }
}
