//! Caches of random rows in random pages.

use crate::Rig;
use kvlar::{Buffer, Codec, Format, Memory, Pool, Result, Rows};
use kvlar_reference::encode_row;

/// Rows a page of kvlar's own.
pub const HEAD_PAGE_ROWS: usize = 64;
/// Pages of one head that differ from each other; more are copies.
const DISTINCT_PAGES: usize = 128;

/// As names of cases have it: `bf16`.
pub fn codec_name(codec: Codec) -> String {
    format!("{codec:?}").to_lowercase()
}

/// Encoded random rows, in pages of one head: 64 rows, then their scales and zeros.
pub struct RowBlock {
    bytes: Vec<u8>,
    page_bytes: usize,
}

impl RowBlock {
    /// Rows of `dim` values with one scale each; `pages` are as many as will be stored.
    pub fn new(rig: &Rig, codec: Codec, dim: usize, pages: usize) -> Self {
        let mut bytes = Vec::new();
        for _ in 0..pages.min(DISTINCT_PAGES) {
            let encode = |_| encode_row(&rig.with_rng(|rng| rng.normals(dim, 1.0)), codec.reference(), dim).expect("one group");
            let rows: Vec<_> = (0..HEAD_PAGE_ROWS).map(encode).collect();
            bytes.extend(rows.iter().flat_map(|r| &r.codes));
            bytes.extend(rows.iter().flat_map(|r| &r.params));
        }
        Self { bytes, page_bytes: HEAD_PAGE_ROWS * (codec.row_bytes(dim) + codec.params_bytes(dim, dim)) }
    }

    /// Rows of one byte a code, `codes` of them and then padding to 16: `code(row, i)` is the i-th of a row.
    pub fn of_codes(codes: usize, pages: usize, code: impl Fn(usize, usize) -> u8) -> Self {
        let row_bytes = codes.next_multiple_of(16);
        let rows = pages.min(DISTINCT_PAGES) * HEAD_PAGE_ROWS;
        let byte = |row: usize, i: usize| if i < codes { code(row, i) } else { 0 };
        let bytes = (0..rows).flat_map(|row| (0..row_bytes).map(move |i| (row, i))).map(|(row, i)| byte(row, i)).collect();
        Self { bytes, page_bytes: HEAD_PAGE_ROWS * row_bytes }
    }

    /// A buffer of `pages` pages of one head.
    ///
    /// # Errors
    /// Those of allocation and copy.
    pub fn fill(&self, rig: &Rig, pages: usize) -> Result<Buffer> {
        rig.repeated(&self.bytes, pages * self.page_bytes)
    }
}

/// Which pages the rows of B sequences are in: in random order, the pages of a sequence shared by all heads.
pub struct Pages {
    table: Option<Buffer>,
    lengths: Buffer,
    per_seq: usize,
    /// Pages of all sequences.
    pub count: usize,
}

impl Pages {
    /// Pages for sequences of these lengths, each with room for the longest.
    ///
    /// # Errors
    /// Those of allocation and copy.
    pub fn new(rig: &Rig, lengths: &[usize], contiguous: bool) -> Result<Self> {
        let per_seq = lengths.iter().copied().max().unwrap_or(0).div_ceil(HEAD_PAGE_ROWS);
        let count = per_seq * lengths.len();
        let order: Vec<i32> = rig.with_rng(|rng| rng.permutation(count)).into_iter().map(|p| p as i32).collect();
        let lengths: Vec<i32> = lengths.iter().map(|&n| n as i32).collect();
        let table = if contiguous { None } else { Some(rig.upload(&order)?) };
        Ok(Self { table, lengths: rig.upload(&lengths)?, per_seq, count })
    }

    /// As launchers want them.
    pub fn rows(&self) -> Rows<'_> {
        let lengths = self.lengths.view();
        match &self.table {
            Some(table) => Rows::block_table(table.view(), self.per_seq, lengths, HEAD_PAGE_ROWS).expect("a page size"),
            None => Rows::contiguous(Some(lengths), self.per_seq * HEAD_PAGE_ROWS),
        }
    }

    /// The rows' bytes: `[page][head][row]`, or `[seq][head][row]` where rows are contiguous (dense codecs alone).
    pub fn pool<M: Memory>(&self, data: M, heads: usize, format: impl Into<Format>, dim: usize) -> Pool<M> {
        let format = format.into();
        let (row, params) = (format.row_bytes(dim), format.params_bytes(dim));
        match self.table {
            Some(_) => Pool::hnd(data, self.count, HEAD_PAGE_ROWS, heads, row, params),
            None => Pool::contiguous(data, heads, self.per_seq * HEAD_PAGE_ROWS, row),
        }
    }
}
