//! Caches of random rows in random pages.

use crate::Rig;
use kvlar::{Buffer, Codec, Format, Memory, Pool, Result, Rows};
use kvlar_reference::{encode_channels, encode_row};

/// Rows a page of kvlar's own.
pub const HEAD_PAGE_ROWS: usize = 64;
/// Pages of one head that differ from each other; more are copies.
const DISTINCT_PAGES: usize = 128;

/// As names of cases have it: `bf16`.
pub fn codec_name(codec: Codec) -> String {
    codec.reference().to_string()
}

/// Likewise: `int4+hadamard`, `int2-g32`.
pub fn format_name(format: Format) -> String {
    format!("{}{}", format.reference(), format.group.map_or(String::new(), |g| format!("-g{g}")))
}

/// Encoded random rows, in pages of one head: 64 rows, then their scales and zeros.
pub struct RowBlock {
    bytes: Vec<u8>,
    page_bytes: usize,
}

impl RowBlock {
    /// Rows of `dim` values, channel-wise ones in groups that a page holds; `pages` are as many as will be stored.
    pub fn new(rig: &Rig, format: impl Into<Format>, dim: usize, pages: usize) -> Self {
        let format = format.into();
        let (codec, group) = (format.codec.reference(), format.group_of(dim));
        let mut bytes = Vec::new();
        for _ in 0..pages.min(DISTINCT_PAGES) {
            let values = rig.with_rng(|rng| rng.normals(HEAD_PAGE_ROWS * dim, 1.0));
            let (codes, params): (Vec<_>, Vec<_>) = if codec.is_channel_wise() {
                let encode = |rows| encode_channels(rows, dim, codec.bits()).expect("a group");
                values.chunks(group * dim).map(encode).map(|g| (g.codes, g.params)).unzip()
            } else {
                let encode = |row| encode_row(row, codec, group).expect("whole groups");
                values.chunks(dim).map(encode).map(|r| (r.codes, r.params)).unzip()
            };
            bytes.extend(codes.concat());
            bytes.extend(params.concat());
        }
        Self { bytes, page_bytes: format.stored(dim).bytes(HEAD_PAGE_ROWS) }
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
        match self.table {
            Some(_) => Pool::pages(data, self.count, HEAD_PAGE_ROWS, heads, format.stored(dim)),
            None => Pool::contiguous(data, heads, self.per_seq * HEAD_PAGE_ROWS, format.row_bytes(dim)),
        }
    }
}
