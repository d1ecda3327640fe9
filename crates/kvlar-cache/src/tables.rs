//! What the device knows of a step's sequences.

use crate::exact::{EXACT_PAGE_ROWS, ExactShape};
use crate::sequence::{Kind, Sequence};
use crate::{CacheConfig, Result};
use kvlar::{Buffer, Device, Rows, Stream, View};
use std::collections::VecDeque;
use std::ops::Range;

/// Tables of a step's sequences; padding rows have slot −1 and position −1, from which nothing is visible.
#[derive(Debug)]
pub(crate) struct Tables {
    seqs: usize,
    new_rows: usize,
    pages: Buffer,
    lengths: Buffer,
    /// Of the new tokens.
    pub positions: Buffer,
    /// Where token-wise layers put them.
    pub slots: Buffer,
    /// Where some layer keeps exact rows beside latents or codes.
    pub exact: Option<ExactTables>,
}

/// Tables of layers that keep exact rows: sinks, latents or codes from there on, recent rows.
#[derive(Debug)]
pub(crate) struct ExactTables {
    shape: ExactShape,
    /// Of a sequence: pages of sinks, those of recent rows that attention reads, those before them.
    pages: Buffer,
    sink_lengths: Buffer,
    latent_lengths: Buffer,
    recent_lengths: Buffer,
    /// Where latents of new tokens go; a sink has none.
    pub latent_slots: Buffer,
    /// Where new tokens go as they are; −1 for those that neither list holds.
    pub slots: Buffer,
    /// What the step encodes, and the pages that it comes from: see [`kvlar::AppendGroupsArgs`].
    packing: Buffer,
    source: Buffer,
}

impl Tables {
    pub fn new(device: &Device, config: &CacheConfig, exact: ExactShape, seqs: usize, new_rows: usize) -> Result<Self> {
        let words = |n: usize| device.alloc(4 * n);
        let exact = match exact.any() {
            true => Some(ExactTables {
                shape: exact,
                pages: words(seqs * exact.table_pages())?,
                sink_lengths: words(seqs)?,
                latent_lengths: words(seqs)?,
                recent_lengths: words(seqs)?,
                latent_slots: words(seqs * new_rows)?,
                slots: words(seqs * new_rows)?,
                packing: words(seqs * 4)?,
                source: words((seqs * exact.source_pages()).max(1))?,
            }),
            false => None,
        };
        Ok(Self {
            seqs,
            new_rows,
            pages: words(seqs * config.max_pages())?,
            lengths: words(seqs)?,
            positions: words(seqs * new_rows)?,
            slots: words(seqs * new_rows)?,
            exact,
        })
    }

    pub fn bytes(&self) -> usize {
        let Self { pages, lengths, positions, slots, exact, .. } = self;
        let exact = exact.iter().flat_map(|e| {
            let lengths = [&e.sink_lengths, &e.latent_lengths, &e.recent_lengths];
            [&e.pages, &e.latent_slots, &e.slots, &e.packing, &e.source].into_iter().chain(lengths).map(Buffer::len)
        });
        [pages, lengths, positions, slots].map(Buffer::len).into_iter().chain(exact).sum()
    }

    /// All rows, token-wise.
    pub fn rows(&self, config: &CacheConfig) -> Result<Rows<'_>> {
        self.rows_of(config, &self.lengths)
    }

    /// Rows as latents, or as codes where others are exact.
    pub fn latents(&self, config: &CacheConfig) -> Result<Rows<'_>> {
        self.rows_of(config, self.exact.as_ref().map_or(&self.lengths, |e| &e.latent_lengths))
    }

    /// Slots of new latents.
    pub fn latent_slots(&self) -> View<'_> {
        self.exact.as_ref().map_or(&self.slots, |e| &e.latent_slots).view()
    }

    fn rows_of<'a>(&'a self, config: &CacheConfig, lengths: &'a Buffer) -> Result<Rows<'a>> {
        let rows = Rows::block_table(self.pages.view(), config.max_pages(), lengths.view(), config.page_rows)?;
        Ok(Rows { max_rows: config.max_rows, ..rows })
    }

    /// Uploads those of a step: of sequences in which it has begun.
    pub fn fill(&mut self, stream: &Stream, config: &CacheConfig, sequences: &[&Sequence]) -> Result<()> {
        let (seqs, new_rows, max_pages) = (self.seqs, self.new_rows, config.max_pages());
        let (mut pages, mut lengths) = (vec![0i32; seqs * max_pages], vec![0i32; seqs]);
        let mut positions = vec![-1i32; seqs * new_rows];
        for (i, seq) in sequences.iter().enumerate() {
            write_pages(&mut pages[i * max_pages..], &seq.held.list(Kind::All).pages, 0..usize::MAX);
            lengths[i] = seq.total() as i32;
            for (to, position) in positions[i * new_rows..].iter_mut().zip(seq.rows..seq.total()) {
                *to = position as i32;
            }
        }
        upload(stream, &mut self.pages, &pages)?;
        upload(stream, &mut self.lengths, &lengths)?;
        upload(stream, &mut self.positions, &positions)?;
        // A row's slot is its position: nothing has been evicted.
        upload(stream, &mut self.slots, &positions)?;
        match &mut self.exact {
            Some(exact) => exact.fill(stream, seqs, new_rows, sequences),
            None => Ok(()),
        }
    }
}

impl ExactTables {
    fn fill(&mut self, stream: &Stream, seqs: usize, new_rows: usize, sequences: &[&Sequence]) -> Result<()> {
        let (width, sinks) = (self.shape.table_pages(), self.shape.sinks);
        let recent_page = self.shape.sink_pages();
        let older_page = recent_page + self.shape.recent_pages();
        let mut pages = vec![0i32; seqs * width];
        let [mut sink_lengths, mut latent_lengths, mut recent_lengths] = [(); 3].map(|()| vec![0i32; seqs]);
        let [mut latent_slots, mut slots] = [(); 2].map(|()| vec![-1i32; seqs * new_rows]);
        for (i, seq) in sequences.iter().enumerate() {
            let total = seq.total();
            let (list, from) = (seq.held.list(Kind::Recent), seq.held.exact_from(&self.shape, total));
            let older = seq.held.older_pages(&self.shape, total);
            let table = &mut pages[i * width..(i + 1) * width];
            write_pages(table, &seq.held.list(Kind::Sinks).pages, 0..usize::MAX);
            write_pages(&mut table[recent_page..older_page], &list.pages, older..usize::MAX);
            write_pages(&mut table[older_page..], &list.pages, 0..older);
            sink_lengths[i] = total.min(sinks) as i32;
            latent_lengths[i] = from.saturating_sub(sinks) as i32;
            recent_lengths[i] = if self.shape.keeps_recent() { (total - from) as i32 } else { 0 };
            for (s, position) in (seq.rows..total).enumerate() {
                let to = i * new_rows + s;
                if position < sinks {
                    slots[to] = position as i32;
                    continue;
                }
                latent_slots[to] = (position - sinks) as i32;
                if self.shape.keeps_recent() && position >= list.first {
                    let page = (position - list.first) / EXACT_PAGE_ROWS;
                    let entry = if page < older { older_page + page } else { recent_page + page - older };
                    slots[to] = (entry * EXACT_PAGE_ROWS + (position - list.first) % EXACT_PAGE_ROWS) as i32;
                }
            }
        }
        upload(stream, &mut self.pages, &pages)?;
        upload(stream, &mut self.sink_lengths, &sink_lengths)?;
        upload(stream, &mut self.latent_lengths, &latent_lengths)?;
        upload(stream, &mut self.recent_lengths, &recent_lengths)?;
        upload(stream, &mut self.latent_slots, &latent_slots)?;
        upload(stream, &mut self.slots, &slots)?;
        if self.shape.encodes() { self.fill_packing(stream, seqs, sequences) } else { Ok(()) }
    }

    fn fill_packing(&mut self, stream: &Stream, seqs: usize, sequences: &[&Sequence]) -> Result<()> {
        let (width, sinks) = (self.shape.source_pages(), self.shape.sinks);
        let (mut packing, mut source) = (vec![0i32; seqs * 4], vec![-1i32; (seqs * width).max(1)]);
        for (i, p) in sequences.iter().enumerate().filter_map(|(i, s)| Some((i, s.packing(&self.shape)?))) {
            let behind = |row: usize| row as i32 - sinks as i32;
            let (from, to) = (behind(p.from).max(0), behind(p.to).max(0));
            packing[4 * i..4 * i + 4].copy_from_slice(&[behind(p.of.rows), behind(p.source_first), from, to - from]);
            source[i * width..].iter_mut().zip(&p.pages).for_each(|(to, &page)| *to = page as i32);
        }
        upload(stream, &mut self.packing, &packing)?;
        upload(stream, &mut self.source, &source)
    }

    /// What the step encodes, and from where: pages and how many of a sequence.
    pub fn packing(&self) -> (View<'_>, View<'_>, usize) {
        (self.packing.view(), self.source.view(), self.shape.source_pages())
    }

    /// Sinks, recent rows and those before them: what new rows are written to.
    pub fn rows(&self) -> Result<Rows<'_>> {
        let pages = self.shape.table_pages();
        Ok(Rows::block_table(self.pages.view(), pages, self.sink_lengths.view(), EXACT_PAGE_ROWS)?)
    }

    /// The first rows; `None` if they are not kept.
    pub fn sinks(&self) -> Result<Option<Rows<'_>>> {
        self.part(0, self.shape.sink_pages(), &self.sink_lengths)
    }

    /// The last rows; `None` if they are not kept.
    pub fn recent(&self) -> Result<Option<Rows<'_>>> {
        self.part(self.shape.sink_pages(), self.shape.recent_pages(), &self.recent_lengths)
    }

    fn part<'a>(&'a self, from: usize, pages: usize, lengths: &'a Buffer) -> Result<Option<Rows<'a>>> {
        if pages == 0 {
            return Ok(None);
        }
        let table = self.pages.view().slice(4 * from..self.pages.len())?;
        let rows = Rows::block_table(table, self.shape.table_pages(), lengths.view(), EXACT_PAGE_ROWS)?;
        Ok(Some(Rows { max_rows: pages * EXACT_PAGE_ROWS, ..rows }))
    }
}

/// Pages of a list in a range, as far as there are any.
fn write_pages(to: &mut [i32], pages: &VecDeque<u32>, range: Range<usize>) {
    let pages = pages.iter().skip(range.start).take(range.len());
    to.iter_mut().zip(pages).for_each(|(to, &page)| *to = page as i32);
}

pub(crate) fn upload(stream: &Stream, to: &mut Buffer, words: &[i32]) -> Result<()> {
    Ok(stream.upload(to, 0, bytemuck::cast_slice(words))?)
}
