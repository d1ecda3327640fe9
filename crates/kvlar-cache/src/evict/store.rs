//! Layers whose rows are stored alike, and the pool that they share.

use crate::Result;
use crate::layer::RowFormat;
use crate::pages::PageBook;
use kvlar::{Buffer, Device, Memory, Pool, Stored, Stream, View, ViewMut};

/// One pool of pages for all layers of one format, with the position of each row.
///
/// Who has rows of its own is an owner: a kv head of a layer, or a layer whose heads keep the same tokens.
#[derive(Debug)]
pub(super) struct RowStore {
    keys: Side,
    values: Side,
    pub positions: Buffer,
    pub book: PageBook,
    pub layers: Vec<usize>,
    /// Of a layer: its kv heads, or 1.
    pub owners_a_layer: usize,
    /// The first, among those of all stores.
    pub first_owner: usize,
    pub page_rows: usize,
}

/// Formats of a layer's rows, of one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerRows {
    pub formats: [RowFormat; 2],
    pub owners: usize,
}

impl LayerRows {
    /// All heads of the layer in pages of its own.
    pub fn shared(self) -> Self {
        let formats = self.formats.map(|f| RowFormat { heads: f.heads * self.owners, ..f });
        Self { formats, owners: 1 }
    }
}

/// Keys or values.
#[derive(Debug)]
struct Side {
    format: RowFormat,
    pages: usize,
    page_rows: usize,
    data: Buffer,
}

impl Side {
    fn new(device: &Device, format: RowFormat, pages: usize, page_rows: usize) -> Result<Self> {
        let data = device.alloc(pages * page_bytes(format, page_rows))?;
        Ok(Self { format, pages, page_rows, data })
    }
}

/// Bytes of a head's row with its scales, where rows of several heads lie side by side.
fn unit(format: RowFormat) -> usize {
    let Stored { row, params, .. } = format.format.stored(format.dim);
    (row + params).next_multiple_of(16)
}

fn page_bytes(format: RowFormat, page_rows: usize) -> usize {
    match format.heads {
        1 => format.bytes(page_rows).next_multiple_of(16),
        heads => page_rows * heads * unit(format),
    }
}

/// What moves when an owner's row does.
fn stored(format: RowFormat) -> Stored {
    match format.heads {
        1 => format.format.stored(format.dim),
        heads => Stored::row_wise(heads * unit(format), 0),
    }
}

/// `[page][row]` of one head, or `[page][row][head]`: all that an owner keeps of a token lies side by side, so that it moves at
/// once.
fn pool<M: Memory>(format: RowFormat, (pages, page_rows): (usize, usize), data: M) -> Pool<M> {
    let of_head = format.format.stored(format.dim);
    match format.heads {
        1 => Pool { head_stride: 0, ..Pool::pages(data, pages, page_rows, 1, of_head) },
        heads => {
            let (head_stride, row_stride) = (unit(format), heads * unit(format));
            let page_stride = page_rows * row_stride;
            let (params_offset, params_stride) = (of_head.row, row_stride);
            Pool { data, seq_stride: 0, head_stride, page_stride, row_stride, params_offset, params_stride, page_count: pages }
        }
    }
}

impl RowStore {
    pub fn new(
        device: &Device,
        pages: usize,
        page_rows: usize,
        rows: LayerRows,
        layers: Vec<usize>,
        first_owner: usize,
    ) -> Result<Self> {
        let [keys, values] = rows.formats;
        Ok(Self {
            keys: Side::new(device, keys, pages, page_rows)?,
            values: Side::new(device, values, pages, page_rows)?,
            positions: device.alloc(4 * pages * page_rows)?,
            book: PageBook::new(pages),
            layers,
            owners_a_layer: rows.owners,
            first_owner,
            page_rows,
        })
    }

    /// Owners of all its layers.
    pub fn owners(&self) -> usize {
        self.layers.len() * self.owners_a_layer
    }

    /// Whether an owner's rows are those of several kv heads, or of latents.
    pub fn is_shared(&self) -> bool {
        self.keys.format.heads > 1 || self.values.format.heads > 1
    }

    /// Bytes of a page: keys, values, their scales, positions.
    pub fn page_bytes(&self) -> usize {
        self.bytes() / self.book.capacity().max(1)
    }

    pub fn bytes(&self) -> usize {
        self.keys.data.len() + self.values.data.len() + self.positions.len()
    }

    pub fn copy_page(&mut self, stream: &Stream, from: u32, to: u32) -> Result<()> {
        for buffer in [&mut self.keys.data, &mut self.values.data, &mut self.positions] {
            let bytes = buffer.len() / self.book.capacity();
            let first = from as usize * bytes;
            stream.copy_within(buffer, first..first + bytes, to as usize * bytes)?;
        }
        Ok(())
    }

    /// Keys, values, positions.
    pub fn pools(&self) -> (Pool<View<'_>>, Pool<View<'_>>, View<'_>) {
        fn of(s: &Side) -> Pool<View<'_>> {
            pool(s.format, (s.pages, s.page_rows), s.data.view())
        }
        (of(&self.keys), of(&self.values), self.positions.view())
    }

    /// Likewise, to write.
    pub fn pools_mut(&mut self) -> (Pool<ViewMut<'_>>, Pool<ViewMut<'_>>, ViewMut<'_>) {
        fn of(s: &mut Side) -> Pool<ViewMut<'_>> {
            pool(s.format, (s.pages, s.page_rows), s.data.view_mut())
        }
        (of(&mut self.keys), of(&mut self.values), self.positions.view_mut())
    }

    /// Rows of owners, as they move.
    pub fn stored(&self) -> [Stored; 2] {
        [stored(self.keys.format), stored(self.values.format)]
    }

    /// Likewise, where they are.
    pub fn moving(&mut self) -> (Pool<ViewMut<'_>>, Pool<ViewMut<'_>>, ViewMut<'_>) {
        let (keys, values, positions) = self.pools_mut();
        (Pool { head_stride: 0, ..keys }, Pool { head_stride: 0, ..values }, positions)
    }
}
