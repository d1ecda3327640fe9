//! Rows in pages: random block tables over poisoned pools, and where each row lies in them.

use crate::Lab;
use kvlar::{Buffer, Codec, Format, Pool, Rows, Stored, View};
use kvlar_reference::testing::Rng;
use kvlar_reference::{
    Codebooks, EncodedRow, Storage, decode_channels, decode_fp8, decode_pq, decode_row, encode_channels, encode_fp8, encode_pq,
    encode_row, hadamard,
};

/// How rows are laid out; the number is the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[seq][head][row]`.
    Contiguous,
    /// `[page][row][head]`; no room for scales, so dense rows only.
    Nhd(usize),
    /// `[page][head][row]`.
    Hnd(usize),
    /// `[page][row]`, a table for each head.
    PerHead(usize),
}

/// Rows of B × Hk heads with their tables, lengths and positions, on the host.
#[derive(Clone, Debug)]
pub struct Pages {
    pub layout: Layout,
    pub seqs: usize,
    pub heads: usize,
    pub capacity: usize,
    /// `[B]` or `[B, Hk]`.
    pub lengths: Vec<i32>,
    /// `[B][head?][page]`; -7 where no row needs the page.
    pub table: Vec<i32>,
    pub page_count: usize,
    /// Of stored rows; 0xff.. (−1) elsewhere.
    pub positions: Option<Vec<i32>>,
}

impl Pages {
    /// Random pages for the given lengths (`[B]` or `[B, Hk]`), some spare.
    pub fn new(rng: &mut Rng, layout: Layout, seqs: usize, heads: usize, capacity: usize, lengths: &[usize]) -> Self {
        let mut pages = Self {
            layout,
            seqs,
            heads,
            capacity,
            lengths: lengths.iter().map(|&n| n as i32).collect(),
            table: Vec::new(),
            page_count: 1,
            positions: None,
        };
        let Some(page_rows) = pages.page_rows() else { return pages };
        let tables = if matches!(layout, Layout::PerHead(_)) { seqs * heads } else { seqs };
        let per_table = capacity.div_ceil(page_rows);
        pages.page_count = tables * per_table + 2;
        let order = rng.permutation(pages.page_count);
        for t in 0..tables {
            let rows = if tables == seqs {
                (0..heads).map(|h| pages.length(t, h)).max()
            } else {
                Some(pages.length(t / heads, t % heads))
            };
            let used = rows.unwrap_or(0).div_ceil(page_rows);
            pages.table.extend((0..per_table).map(|p| if p < used { order[t * per_table + p] as i32 } else { -7 }));
        }
        pages
    }

    pub fn page_rows(&self) -> Option<usize> {
        match self.layout {
            Layout::Contiguous => None,
            Layout::Nhd(n) | Layout::Hnd(n) | Layout::PerHead(n) => Some(n),
        }
    }

    /// Gives the table pages for all of the capacity: rows may be appended anywhere.
    pub fn with_full_table(mut self, rng: &mut Rng) -> Self {
        let order = rng.permutation(self.page_count);
        for (i, page) in self.table.iter_mut().enumerate() {
            *page = order[i] as i32;
        }
        self
    }

    pub fn length(&self, seq: usize, head: usize) -> usize {
        let per_head = self.lengths.len() != self.seqs;
        self.lengths[if per_head { seq * self.heads + head } else { seq }] as usize
    }

    /// Page and row within it.
    fn place(&self, seq: usize, head: usize, row: usize) -> (usize, usize) {
        let Some(page_rows) = self.page_rows() else { return (0, row) };
        let per_table = self.capacity.div_ceil(page_rows);
        let table = if matches!(self.layout, Layout::PerHead(_)) { seq * self.heads + head } else { seq };
        (self.table[table * per_table + row / page_rows] as usize, row % page_rows)
    }

    /// Element of the positions of a row.
    pub fn position_index(&self, seq: usize, head: usize, row: usize) -> usize {
        let (page, in_page) = self.place(seq, head, row);
        match self.page_rows() {
            None => seq * self.capacity + row,
            Some(page_rows) => page * page_rows + in_page,
        }
    }

    /// Stores positions of all rows held, as `f(seq, head, row)` says.
    pub fn with_positions(mut self, f: impl Fn(usize, usize, usize) -> i32) -> Self {
        let mut positions = vec![-1; self.position_count()];
        for (seq, head) in (0..self.seqs).flat_map(|s| (0..self.heads).map(move |h| (s, h))) {
            for row in 0..self.length(seq, head) {
                positions[self.position_index(seq, head, row)] = f(seq, head, row);
            }
        }
        self.positions = Some(positions);
        self
    }

    pub fn position_count(&self) -> usize {
        self.page_rows().map_or(self.seqs * self.capacity, |rows| self.page_count * rows)
    }

    /// Of contiguous rows, with their scales: a multiple of 16.
    fn head_bytes(&self, stored: Stored) -> usize {
        stored.bytes(self.capacity).next_multiple_of(16)
    }

    /// Bytes of a pool for such rows.
    pub fn pool_bytes(&self, rows: &RowFormat, dim: usize) -> usize {
        let stored = rows.format.stored(dim);
        match self.layout {
            Layout::Contiguous => self.seqs * self.heads * self.head_bytes(stored),
            Layout::PerHead(n) => self.page_count * stored.bytes(n),
            Layout::Nhd(n) | Layout::Hnd(n) => self.page_count * self.heads * stored.bytes(n),
        }
    }

    /// The pool over `data`.
    pub fn pool<M: kvlar::Memory>(&self, data: M, rows: &RowFormat, dim: usize) -> Pool<M> {
        let stored = rows.format.stored(dim);
        match self.layout {
            Layout::Contiguous => {
                let mut pool = Pool::contiguous(data, self.heads, self.capacity, stored.row);
                pool.head_stride = self.head_bytes(stored);
                pool.seq_stride = self.heads * pool.head_stride;
                (pool.params_offset, pool.params_stride) = (self.capacity * stored.row, stored.params);
                pool
            }
            Layout::Nhd(n) => Pool::nhd(data, self.page_count, n, self.heads, stored.row),
            Layout::Hnd(n) => Pool::pages(data, self.page_count, n, self.heads, stored),
            Layout::PerHead(n) => Pool { head_stride: 0, ..Pool::pages(data, self.page_count, n, 1, stored) },
        }
    }

    /// Bytes from the pool's start: of a row's codes, and of its scales and zeros.
    fn offsets(&self, (seq, head, row): (usize, usize, usize), rows: &RowFormat, dim: usize) -> (usize, usize) {
        let stored = rows.format.stored(dim);
        let (page, in_page) = self.place(seq, head, row);
        let within = |start: usize, rows: usize| {
            let params = in_page / stored.params_rows * stored.params;
            (start + in_page * stored.row, start + rows * stored.row + params)
        };
        match self.layout {
            Layout::Contiguous => within((seq * self.heads + head) * self.head_bytes(stored), self.capacity),
            Layout::Nhd(n) => (((page * n + in_page) * self.heads + head) * stored.row, 0),
            Layout::Hnd(n) => within((page * self.heads + head) * stored.bytes(n), n),
            Layout::PerHead(n) => within(page * stored.bytes(n), n),
        }
    }

    /// Writes a row into a pool's bytes, by the reference's codec; gives what it decodes to.
    pub fn store(&self, pool: &mut [u8], at: (usize, usize, usize), x: &[f32], rows: &RowFormat) -> Vec<f32> {
        let (codes, params) = self.offsets(at, rows, x.len());
        let row = rows.encode(at.1, x);
        pool[codes..codes + row.codes.len()].copy_from_slice(&row.codes);
        pool[params..params + row.params.len()].copy_from_slice(&row.params);
        rows.decode(at.1, &row.codes, &row.params, x.len())
    }

    /// Likewise all rows of a (sequence, head) from its first on, `dim` values each. Channel-wise, the last group may have
    /// fewer rows than the others.
    pub fn store_all(&self, pool: &mut [u8], (seq, head): (usize, usize), x: &[f32], dim: usize, rows: &RowFormat) -> Vec<f32> {
        let f = &rows.format;
        if !f.codec.is_channel_wise() {
            return x.chunks(dim).enumerate().flat_map(|(r, row)| self.store(pool, (seq, head, r), row, rows)).collect();
        }
        let (group, bits) = (f.group_of(dim), f.codec.reference().bits());
        let turn = |x: &[f32]| match f.hadamard {
            true => x.chunks(dim).flat_map(|row| hadamard(row).expect("a power of two")).collect(),
            false => x.to_vec(),
        };
        let mut decoded = Vec::new();
        for (i, part) in x.chunks(group * dim).enumerate() {
            let coded = encode_channels(&turn(part), dim, bits).expect("a group");
            for (r, codes) in coded.codes.chunks(f.row_bytes(dim)).enumerate() {
                let (to, params) = self.offsets((seq, head, i * group + r), rows, dim);
                pool[to..to + codes.len()].copy_from_slice(codes);
                pool[params..params + coded.params.len()].copy_from_slice(&coded.params);
            }
            decoded.extend(turn(&decode_channels(&coded.codes, &coded.params, dim, bits).expect("a group")));
        }
        decoded
    }

    /// Reads a row from a pool's bytes.
    pub fn load(&self, pool: &[u8], at: (usize, usize, usize), dim: usize, rows: &RowFormat) -> Vec<f32> {
        let (codes, params) = self.offsets(at, rows, dim);
        rows.decode(at.1, &pool[codes..codes + rows.sizes(dim).0], &pool[params..], dim)
    }

    /// Overwrites a row with the poison, as if it had not been written.
    pub fn poison(&self, pool: &mut [u8], at: (usize, usize, usize), dim: usize, rows: &RowFormat) {
        let (codes, params) = self.offsets(at, rows, dim);
        let sizes = rows.sizes(dim);
        pool[codes..codes + sizes.0].fill(0xff);
        pool[params..params + sizes.1].fill(0xff);
    }
}

/// How rows are encoded, with what all rows of a head share.
#[derive(Clone, Debug, PartialEq)]
pub struct RowFormat {
    pub format: Format,
    /// Of fp8 rows, a head each; 1 where there are none.
    pub scales: Vec<f32>,
    /// Of pq rows, `[head][m][c][d/m]`.
    pub codebooks: Vec<f32>,
}

impl<F: Into<Format>> From<F> for RowFormat {
    fn from(format: F) -> Self {
        Self { format: format.into(), scales: Vec::new(), codebooks: Vec::new() }
    }
}

impl RowFormat {
    /// Bytes of a row's codes, and of its scales and zeros.
    pub fn sizes(&self, dim: usize) -> (usize, usize) {
        (self.format.row_bytes(dim), self.format.params_bytes(dim))
    }

    /// With random codebooks, where the format has any.
    pub fn with_codebooks(mut self, heads: usize, dim: usize) -> Self {
        let mut rng = Rng::new(dim as u64);
        self.codebooks = rng.normals(self.format.codebook_bytes(heads, dim) / 4, 1.0);
        self
    }

    /// Of one head.
    fn head_codebooks(&self, head: usize, dim: usize) -> Codebooks<'_> {
        self.all_codebooks(dim).head(head, dim).expect("codebooks of the head")
    }

    /// Of all heads.
    pub fn all_codebooks(&self, dim: usize) -> Codebooks<'_> {
        let f = &self.format;
        Codebooks { subvectors: dim / f.group_of(dim), centroids: f.centroids, values: &self.codebooks }
    }

    fn scale(&self, head: usize) -> f32 {
        self.scales.get(head).copied().unwrap_or(1.0)
    }

    pub fn encode(&self, head: usize, x: &[f32]) -> EncodedRow {
        let f = &self.format;
        let x = if f.hadamard { hadamard(x).expect("a power of two") } else { x.to_vec() };
        let mut codes: Vec<u8> = match f.codec {
            Codec::Fp8 => x.iter().map(|&x| encode_fp8(x, self.scale(head))).collect(),
            Codec::Pq => encode_pq(&x, &self.head_codebooks(head, x.len())).expect("a row"),
            _ => Vec::new(),
        };
        if !codes.is_empty() {
            codes.resize(f.row_bytes(x.len()), 0);
            return EncodedRow { codes, params: Vec::new() };
        }
        encode_row(&x, f.codec.reference(), f.group_of(x.len())).expect("a row")
    }

    fn decode(&self, head: usize, codes: &[u8], params: &[u8], dim: usize) -> Vec<f32> {
        let f = &self.format;
        let x = match f.codec {
            Codec::Fp8 => codes[..dim].iter().map(|&c| decode_fp8(c, self.scale(head))).collect(),
            Codec::Pq => decode_pq(codes, dim, &self.head_codebooks(head, dim)).expect("a row"),
            _ => decode_row(codes, params, dim, f.codec.reference(), f.group_of(dim)).expect("a row"),
        };
        if f.hadamard { hadamard(&x).expect("a power of two") } else { x }
    }

    /// Its scales or codebooks on a device, if it has any.
    pub fn upload(&self, lab: &Lab) -> Option<Buffer> {
        [&self.scales, &self.codebooks].into_iter().find(|table| !table.is_empty()).map(|table| lab.upload(table))
    }

    /// As the reference takes it.
    pub fn storage(&self, dim: usize) -> Storage<'_> {
        Storage {
            format: self.format.reference(),
            scales: (!self.scales.is_empty()).then_some(&self.scales),
            codebooks: (!self.codebooks.is_empty()).then(|| self.all_codebooks(dim)),
        }
    }
}

/// Tables, lengths and positions on a device.
#[derive(Debug)]
pub struct DevicePages {
    table: Option<Buffer>,
    pub lengths: Buffer,
    positions: Option<Buffer>,
    pages: Pages,
}

impl DevicePages {
    pub fn upload(lab: &Lab, pages: &Pages) -> Self {
        Self {
            table: pages.page_rows().map(|_| lab.upload(&pages.table)),
            lengths: lab.upload(&pages.lengths),
            positions: pages.positions.as_ref().map(|p| lab.upload(p)),
            pages: pages.clone(),
        }
    }

    /// The rows as launchers want them.
    pub fn rows(&self) -> Rows<'_> {
        let p = &self.pages;
        let (lengths, table) = (self.lengths.view(), self.table.as_ref().map(Buffer::view));
        let mut rows = match (p.page_rows(), table) {
            (Some(n), Some(table)) => {
                let pages = p.capacity.div_ceil(n);
                let rows = if matches!(p.layout, Layout::PerHead(_)) {
                    Rows::per_head(table, p.heads, pages, lengths, n)
                } else {
                    Rows::block_table(table, pages, lengths, n)
                };
                rows.expect("a page size")
            }
            _ => Rows::contiguous(Some(lengths), p.capacity),
        };
        if p.lengths.len() != p.seqs {
            (rows.length_seq_stride, rows.length_head_stride) = (p.heads, 1);
        } else {
            (rows.length_seq_stride, rows.length_head_stride) = (1, 0);
        }
        rows.max_rows = p.capacity;
        rows.positions = self.position_view();
        rows.position_seq_stride = if p.page_rows().is_none() { p.capacity } else { 0 };
        rows
    }

    fn position_view(&self) -> Option<View<'_>> {
        self.positions.as_ref().map(Buffer::view)
    }
}
