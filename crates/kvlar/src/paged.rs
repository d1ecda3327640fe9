//! Where rows are: the safe faces of `KvlarRows` and `KvlarPool`.

use crate::error::{aligned, invalid};
use crate::{Error, Memory, Result, Stored, View, abi};

/// Page size of contiguous rows: one page holds them all.
const CONTIGUOUS_LOG2: u32 = 30;

/// Which rows each (sequence, head) holds. Strides are elements; a head stride of 0 shares one entry among heads.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Page ids, i32 `[seq][head?][page]`; `None`: page p of the sequence is page p of its pool.
    pub table: Option<View<'a>>,
    /// Of the table.
    pub table_seq_stride: usize,
    /// Of the table.
    pub table_head_stride: usize,
    /// Rows held, i32 `[seq][head?]`. Attend needs it.
    pub lengths: Option<View<'a>>,
    /// Of the lengths.
    pub length_seq_stride: usize,
    /// Of the lengths.
    pub length_head_stride: usize,
    /// Position of each row, i32 `[seq?][head?][page][row in page]`; `None`: the row's index. Append writes it.
    pub positions: Option<View<'a>>,
    /// Of the positions; 0 where page ids are global.
    pub position_seq_stride: usize,
    /// Of the positions.
    pub position_head_stride: usize,
    /// log2 of the rows a page; at least 4.
    pub page_rows_log2: u32,
    /// Rows that a (sequence, head) can hold.
    pub max_rows: usize,
}

impl<'a> Rows<'a> {
    /// Rows next to each other, row r at row r of the pool; `lengths` is `[seq]`.
    pub fn contiguous(lengths: Option<View<'a>>, max_rows: usize) -> Self {
        Self {
            table: None,
            table_seq_stride: 0,
            table_head_stride: 0,
            lengths,
            length_seq_stride: 1,
            length_head_stride: 0,
            positions: None,
            position_seq_stride: 0,
            position_head_stride: 0,
            page_rows_log2: CONTIGUOUS_LOG2,
            max_rows,
        }
    }

    /// One block table a sequence, shared by all heads (vLLM): `table [seq][pages]`, `lengths [seq]`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a page size that is no power of two of at least 16.
    pub fn block_table(table: View<'a>, pages: usize, lengths: View<'a>, page_rows: usize) -> Result<Self> {
        let page_rows_log2 = log2(page_rows)?;
        let rows = Self::contiguous(Some(lengths), pages * page_rows);
        Ok(Self { table: Some(table), table_seq_stride: pages, page_rows_log2, ..rows })
    }

    /// A table and a length for each head: `table [seq][head][pages]`, `lengths [seq][head]`.
    ///
    /// # Errors
    /// As for [`Rows::block_table`].
    pub fn per_head(table: View<'a>, heads: usize, pages: usize, lengths: View<'a>, page_rows: usize) -> Result<Self> {
        let rows = Self::block_table(table, heads * pages, lengths, page_rows)?;
        Ok(Self {
            table_head_stride: pages,
            length_seq_stride: heads,
            length_head_stride: 1,
            max_rows: pages * page_rows,
            ..rows
        })
    }

    /// Pages that a (sequence, head) can have.
    pub fn max_pages(&self) -> usize {
        self.max_rows.div_ceil(1 << self.page_rows_log2)
    }

    /// `heads`: that tables and positions are indexed by, and that lengths are.
    pub(crate) fn check(&self, arg: &'static str, seqs: usize, heads: (usize, usize), page_count: usize) -> Result<()> {
        let (owners, heads) = heads;
        if !(4..=30).contains(&self.page_rows_log2) {
            return invalid(arg, format!("pages of 2^{} rows; they hold 16 to 2^30", self.page_rows_log2));
        }
        if self.max_rows > i32::MAX as usize / 2 {
            return invalid(arg, format!("{} rows are more than 2^30", self.max_rows));
        }
        if let Some(table) = self.table {
            let need = reach(seqs, self.table_seq_stride, owners, self.table_head_stride).saturating_add(self.max_pages());
            within("page table", &table, need.saturating_mul(4), 4)?;
        } else if self.max_pages() > page_count {
            return invalid(arg, format!("{} rows need {} pages, the pool has {page_count}", self.max_rows, self.max_pages()));
        }
        if let Some(lengths) = self.lengths {
            let need = reach(seqs, self.length_seq_stride, heads, self.length_head_stride).saturating_add(1);
            within("lengths", &lengths, need.saturating_mul(4), 4)?;
        }
        if let Some(positions) = self.positions {
            let last = if self.table.is_some() { page_count.saturating_mul(1 << self.page_rows_log2) } else { self.max_rows };
            let need = reach(seqs, self.position_seq_stride, owners, self.position_head_stride).saturating_add(last);
            within("positions", &positions, need.saturating_mul(4), 4)?;
        }
        Ok(())
    }

    pub(crate) fn abi(&self) -> abi::KvlarRows {
        let address = |v: Option<View<'_>>| v.map_or(0, |v| v.address());
        abi::KvlarRows {
            table: address(self.table),
            table_seq_stride: self.table_seq_stride as i64,
            table_head_stride: self.table_head_stride as i64,
            lengths: address(self.lengths),
            length_seq_stride: self.length_seq_stride as i64,
            length_head_stride: self.length_head_stride as i64,
            positions: address(self.positions),
            position_seq_stride: self.position_seq_stride as i64,
            position_head_stride: self.position_head_stride as i64,
            page_rows_log2: self.page_rows_log2,
            max_rows: self.max_rows as u32,
        }
    }
}

/// Where the bytes of rows are: row r of page p of head h of sequence s starts at
/// s·seq_stride + h·head_stride + p·page_stride + r·row_stride bytes. Scales and zeros of row r (of group r of rows, where
/// they belong to channels) are at `params_offset` + r·`params_stride` of the same page and head.
#[derive(Clone, Copy, Debug)]
pub struct Pool<M> {
    /// The memory: a [`View`] to read, a [`crate::ViewMut`] to write.
    pub data: M,
    /// Bytes; 0 where page ids are global.
    pub seq_stride: usize,
    /// Bytes.
    pub head_stride: usize,
    /// Bytes.
    pub page_stride: usize,
    /// Bytes.
    pub row_stride: usize,
    /// Bytes from the page's (and head's) start.
    pub params_offset: usize,
    /// Bytes a row, or group of rows.
    pub params_stride: usize,
    /// Pages that ids may name.
    pub page_count: usize,
}

impl<M: Memory> Pool<M> {
    /// `[seq][head][row]` with `row_stride` bytes a row, for [`Rows::contiguous`].
    pub fn contiguous(data: M, heads: usize, max_rows: usize, row_stride: usize) -> Self {
        let head_stride = max_rows * row_stride;
        Self {
            data,
            seq_stride: heads * head_stride,
            head_stride,
            page_stride: 0,
            row_stride,
            params_offset: 0,
            params_stride: 0,
            page_count: 1,
        }
    }

    /// `[page][row][head]`: vLLM's NHD layout, `row_bytes` a head's row.
    pub fn nhd(data: M, page_count: usize, page_rows: usize, heads: usize, row_bytes: usize) -> Self {
        let row_stride = heads * row_bytes;
        let page_stride = page_rows * row_stride;
        Self {
            data,
            seq_stride: 0,
            head_stride: row_bytes,
            page_stride,
            row_stride,
            params_offset: 0,
            params_stride: 0,
            page_count,
        }
    }

    /// `[page][head][row]`: vLLM's HND layout, with `params_bytes` of scales and zeros a row behind each head's rows.
    pub fn hnd(data: M, page_count: usize, page_rows: usize, heads: usize, row_bytes: usize, params_bytes: usize) -> Self {
        let head_stride = page_rows * (row_bytes + params_bytes);
        Self {
            data,
            seq_stride: 0,
            head_stride,
            page_stride: heads * head_stride,
            row_stride: row_bytes,
            params_offset: page_rows * row_bytes,
            params_stride: params_bytes,
            page_count,
        }
    }

    /// `[page][row]`: a page belongs to one head, for [`Rows::per_head`].
    pub fn per_head(data: M, page_count: usize, page_rows: usize, row_bytes: usize, params_bytes: usize) -> Self {
        Self { head_stride: 0, ..Self::hnd(data, page_count, page_rows, 1, row_bytes, params_bytes) }
    }

    /// `[page][head][row]`, the scales and zeros of a head's rows behind them: pages that hold rows of `stored` bytes.
    pub fn pages(data: M, page_count: usize, page_rows: usize, heads: usize, stored: Stored) -> Self {
        let head_stride = stored.bytes(page_rows).next_multiple_of(16);
        Self {
            data,
            seq_stride: 0,
            head_stride,
            page_stride: heads * head_stride,
            row_stride: stored.row,
            params_offset: page_rows * stored.row,
            params_stride: stored.params,
            page_count,
        }
    }

    /// Checks that every row that `rows` can name lies within the memory.
    pub(crate) fn check(&self, arg: &'static str, rows: &Rows<'_>, seqs: usize, heads: usize, stored: Stored) -> Result<()> {
        let Stored { row: row_bytes, params, params_rows } = stored;
        for stride in [self.seq_stride, self.head_stride, self.page_stride, self.row_stride] {
            aligned(arg, stride as u64, 16)?;
        }
        aligned(arg, self.data.address(), 16)?;
        if self.row_stride < row_bytes {
            return invalid(arg, format!("rows of {row_bytes} bytes at a stride of {}", self.row_stride));
        }
        if [self.row_stride, self.params_offset, self.params_stride, self.page_count].iter().any(|&x| x > u32::MAX as usize) {
            return invalid(arg, "a stride or page count above 2^32");
        }
        if params > 0 {
            // Those of channels are copied 16 bytes at a time.
            let align = if params_rows > 1 { 16 } else { 4 };
            aligned(arg, self.params_offset as u64, align)?;
            aligned(arg, self.params_stride as u64, align)?;
            if self.params_stride < params {
                return invalid(arg, format!("{params} bytes of scales and zeros at a stride of {}", self.params_stride));
            }
        }
        if rows.max_rows == 0 || seqs == 0 || heads == 0 {
            return Ok(());
        }
        if self.page_count == 0 {
            return invalid(arg, "no pages");
        }
        let page_rows = 1usize << rows.page_rows_log2;
        if !page_rows.is_multiple_of(params_rows) && (rows.table.is_some() || rows.max_rows > page_rows) {
            return invalid(arg, format!("groups of {params_rows} rows do not fill pages of {page_rows}"));
        }
        // With a table any row of any page may be named; without, the rows in order.
        let (page, row) = match rows.table {
            Some(_) => (self.page_count - 1, page_rows - 1),
            None => ((rows.max_rows - 1) / page_rows, (rows.max_rows - 1) % page_rows),
        };
        let page = reach(seqs, self.seq_stride, heads, self.head_stride).saturating_add(page.saturating_mul(self.page_stride));
        let end = |first: usize, row: usize, stride: usize, bytes: usize| {
            page.saturating_add(first).saturating_add(row.saturating_mul(stride)).saturating_add(bytes)
        };
        let mut need = end(0, row, self.row_stride, row_bytes);
        if params > 0 {
            need = need.max(end(self.params_offset, row / params_rows, self.params_stride, params));
        }
        if need > self.data.bytes() { Err(Error::Bounds { arg, need, have: self.data.bytes() }) } else { Ok(()) }
    }

    pub(crate) fn abi(&self) -> abi::KvlarPool {
        abi::KvlarPool {
            data: self.data.address(),
            seq_stride: self.seq_stride as i64,
            head_stride: self.head_stride as i64,
            page_stride: self.page_stride as i64,
            row_stride: self.row_stride as u32,
            params_offset: self.params_offset as u32,
            params_stride: self.params_stride as u32,
            page_count: self.page_count as u32,
        }
    }
}

fn log2(page_rows: usize) -> Result<u32> {
    if page_rows.is_power_of_two() && page_rows >= 16 {
        return Ok(page_rows.trailing_zeros());
    }
    invalid("page size", format!("{page_rows} rows are not a power of two of at least 16"))
}

/// Offset of the last (sequence, head); what is too large to count is beyond any memory.
fn reach(seqs: usize, seq_stride: usize, heads: usize, head_stride: usize) -> usize {
    let (seq, head) = (seqs.saturating_sub(1).saturating_mul(seq_stride), heads.saturating_sub(1).saturating_mul(head_stride));
    seq.saturating_add(head)
}

/// A dense argument: large enough, and aligned.
pub(crate) fn within(arg: &'static str, memory: &impl Memory, need: usize, align: usize) -> Result<()> {
    if need > memory.bytes() {
        return Err(Error::Bounds { arg, need, have: memory.bytes() });
    }
    aligned(arg, memory.address(), align)
}

#[cfg(test)]
mod tests;
