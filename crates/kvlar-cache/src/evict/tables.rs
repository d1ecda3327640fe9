//! What the device knows of a step's sequences, of the layers of one store.

use super::sequence::Sequence;
use super::store::RowStore;
use crate::tables::upload;
use crate::{Result, SeqId};
use kvlar::{Buffer, Device, Rows, Stream, View};

/// Page tables, lengths and slots, `[layer][seq][owner]`.
#[derive(Debug)]
pub(super) struct StoreTables {
    seqs: usize,
    new_rows: usize,
    owners: usize,
    layers: usize,
    max_pages: usize,
    max_rows: usize,
    page_rows: usize,
    pages: Buffer,
    lengths: Buffer,
    slots: Buffer,
    /// What `pages` holds, so that a step uploads what has changed alone.
    mirror: Vec<i32>,
    /// Whose pages those of each sequence of the batch are, and as of when.
    known: Vec<Option<(SeqId, u64)>>,
}

impl StoreTables {
    pub fn new(
        device: &Device,
        store: &RowStore,
        (seqs, new_rows): (usize, usize),
        (max_rows, max_pages): (usize, usize),
    ) -> Result<Self> {
        let (layers, owners) = (store.layers.len(), store.owners_a_layer);
        let all = layers * seqs * owners;
        Ok(Self {
            seqs,
            new_rows,
            owners,
            layers,
            max_pages,
            max_rows,
            page_rows: store.page_rows,
            pages: device.alloc(4 * all * max_pages)?,
            lengths: device.alloc(4 * all)?,
            slots: device.alloc((4 * all * new_rows).max(4))?,
            mirror: vec![0; all * max_pages],
            known: vec![None; seqs],
        })
    }

    pub fn bytes(&self) -> usize {
        self.pages.len() + self.lengths.len() + self.slots.len()
    }

    /// Uploads those of a step: of sequences in which it has begun.
    pub fn fill(&mut self, stream: &Stream, first_owner: usize, sequences: &[(SeqId, &Sequence)]) -> Result<()> {
        let all = self.layers * self.seqs * self.owners;
        let (mut lengths, mut slots) = (vec![0i32; all], vec![-1i32; all * self.new_rows]);
        for (i, (_, s)) in sequences.iter().enumerate() {
            for layer in 0..self.layers {
                for owner in 0..self.owners {
                    let at = (layer * self.seqs + i) * self.owners + owner;
                    let held = s.owners[first_owner + layer * self.owners + owner].rows;
                    lengths[at] = (held + s.adding()) as i32;
                    let slots = &mut slots[at * self.new_rows..][..s.adding()];
                    slots.iter_mut().zip(held..).for_each(|(to, slot)| *to = slot as i32);
                }
            }
        }
        upload(stream, &mut self.lengths, &lengths)?;
        upload(stream, &mut self.slots, &slots)?;
        for (i, (id, s)) in sequences.iter().enumerate() {
            if self.known[i] != Some((*id, s.version)) {
                self.known[i] = None;
                self.fill_pages(stream, i, first_owner, s)?;
                self.known[i] = Some((*id, s.version));
            }
        }
        Ok(())
    }

    /// Of each owner, the entries that are not what the device holds.
    fn fill_pages(&mut self, stream: &Stream, i: usize, first_owner: usize, s: &Sequence) -> Result<()> {
        for layer in 0..self.layers {
            for owner in 0..self.owners {
                let at = ((layer * self.seqs + i) * self.owners + owner) * self.max_pages;
                let pages = &s.owners[first_owner + layer * self.owners + owner].pages;
                let differs = |p: &usize| self.mirror[at + p] != pages[*p] as i32;
                let Some(first) = (0..pages.len()).find(differs) else { continue };
                for (to, &page) in self.mirror[at + first..].iter_mut().zip(&pages[first..]) {
                    *to = page as i32;
                }
                let changed = &self.mirror[at + first..at + pages.len()];
                stream.upload(&mut self.pages, 4 * (at + first), bytemuck::cast_slice(changed))?;
            }
        }
        Ok(())
    }

    /// The rows of one of its layers.
    pub fn rows<'a>(&'a self, layer: usize, positions: Option<View<'a>>) -> Result<Rows<'a>> {
        let first = layer * self.seqs * self.owners;
        let table = self.pages.view().slice(4 * first * self.max_pages..self.pages.len())?;
        let lengths = self.lengths.view().slice(4 * first..self.lengths.len())?;
        let rows = match self.owners {
            1 => Rows::block_table(table, self.max_pages, lengths, self.page_rows)?,
            owners => Rows::per_head(table, owners, self.max_pages, lengths, self.page_rows)?,
        };
        Ok(Rows { max_rows: self.max_rows, positions, ..rows })
    }

    /// Those of one sequence of the batch.
    pub fn rows_of(&self, layer: usize, seq: usize) -> Result<Rows<'_>> {
        let rows = self.rows(layer, None)?;
        let first = seq * self.owners;
        let table = rows.table.map(|t| t.slice(4 * first * self.max_pages..kvlar::Memory::bytes(&t))).transpose()?;
        let lengths = rows.lengths.map(|l| l.slice(4 * first..kvlar::Memory::bytes(&l))).transpose()?;
        Ok(Rows { table, lengths, ..rows })
    }

    /// Where a layer's new rows go, `[seqs, owners, new_rows]`.
    pub fn slots(&self, layer: usize) -> Result<View<'_>> {
        let first = 4 * layer * self.seqs * self.owners * self.new_rows;
        Ok(self.slots.view().slice(first..self.slots.len())?)
    }
}
