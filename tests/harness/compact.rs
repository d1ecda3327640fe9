//! Cases of compact: whole memories before and after, byte by byte.

mod run;

pub use run::{CompactRun, check_protected, check_staged};

use crate::Lab;
use kvlar::{CompactOrder, CompactShape, Pool, Status, Stored};
use kvlar_reference::ordered_row;
use kvlar_reference::testing::Rng;

/// How rows are laid out; the number is the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[seq][owner][row]`.
    Contiguous,
    /// Each owner has pages of its own.
    Owned(usize),
    /// `[page][owner][row]`: owners share tables, and have no positions.
    Shared(usize),
}

/// Which rows are kept.
#[derive(Clone, Debug)]
pub enum Judge {
    /// `[B, O, columns]`.
    Mask(Vec<u8>),
    Cut {
        /// `[B, O, stride]`; `None`: those that move.
        scores: Option<Vec<f32>>,
        stride: usize,
        cuts: Vec<u64>,
        members: usize,
        sink_rows: usize,
        recent_rows: usize,
    },
}

/// Positions that are judged.
#[derive(Clone, Debug)]
pub struct Span {
    pub first: Vec<i32>,
    pub count: Option<Vec<i32>>,
}

#[derive(Clone, Debug)]
pub struct CompactCase {
    pub shape: CompactShape,
    pub layout: Layout,
    /// `[B, O]`.
    pub lengths: Vec<i32>,
    pub judge: Judge,
    pub columns: usize,
    pub span: Option<Span>,
    /// `[B, O, capacity]` by row.
    pub positions: Option<Vec<i32>>,
    /// `[B, O, score_stride]` by row.
    pub scores: Option<Vec<f32>>,
    pub score_stride: usize,
    /// Each layer has pools of its own.
    pub layered: bool,
    /// Of an owner, pages that a launch finds to be none: `(owner, page of its table)`.
    pub bad: Vec<(usize, usize)>,
    pub seed: u64,
}

/// All that a launch may write.
#[derive(Clone, Debug, PartialEq)]
pub struct Memories {
    pub keys: Vec<Vec<u8>>,
    pub values: Vec<Vec<u8>>,
    pub positions: Vec<i32>,
    pub scores: Vec<u32>,
    pub lengths: Vec<i32>,
    pub source: Vec<i32>,
}

/// Left by nobody.
const UNTOUCHED: i32 = -77;

impl CompactCase {
    /// Random rows with positions and scores, all of them kept.
    pub fn new(seed: u64, stored: Stored, layout: Layout, lengths: &[i32], capacity: usize) -> Self {
        let all = lengths.len();
        let shape = CompactShape {
            seqs: 1,
            owners: all,
            owners_a_layer: all.max(1),
            keys: stored,
            values: Some(stored),
            max_rows: capacity,
            order: CompactOrder::Keep,
        };
        let mut rng = Rng::new(seed);
        let positions = (0..all).flat_map(|_| {
            let mut at = 0;
            let gaps: Vec<i32> = (0..capacity).map(|_| 1 + rng.below(3) as i32).collect();
            gaps.into_iter().map(move |gap| {
                at += gap;
                at - 1
            })
        });
        let positions: Vec<i32> = positions.collect();
        let score_stride = capacity + 3;
        Self {
            shape,
            layout,
            lengths: lengths.to_vec(),
            judge: Judge::Mask(vec![1; all * capacity]),
            columns: capacity,
            span: None,
            positions: (!matches!(layout, Layout::Shared(_))).then_some(positions),
            scores: Some(Rng::new(seed + 1).normals(all * score_stride, 2.0)),
            score_stride,
            layered: false,
            bad: Vec::new(),
            seed,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Four owners of two sequences, with many equal scores; a set's cut is one of them.
    pub fn with_cuts(seed: u64, stored: Stored, layout: Layout, members: usize) -> Self {
        let mut case = Self::new(seed, stored, layout, &[100, 37, 64, 120], 128).owners(2, 1);
        let mut rng = Rng::new(seed);
        let (columns, stride) = (130, 133);
        // Few values: ties.
        let scores: Vec<f32> = (0..4 * stride).map(|_| [f32::NAN, -0.0, 0.0, 1.0, 2.0, f32::INFINITY][rng.below(6)]).collect();
        let cuts = (0..4 / members).map(|set| {
            let (member, column) = (rng.below(members), rng.below(100));
            ordered_row(scores[(set * members + member) * stride + column], (member * columns + column) as u32)
        });
        let cuts = cuts.collect();
        case.columns = columns;
        case.judge = Judge::Cut { scores: Some(scores), stride, cuts, members, sink_rows: 2, recent_rows: 5 };
        case
    }

    /// `seqs` of the owners, in layers of `owners_a_layer`.
    pub fn owners(mut self, seqs: usize, owners_a_layer: usize) -> Self {
        let owners = self.lengths.len() / seqs;
        self.shape = CompactShape { seqs, owners, owners_a_layer, ..self.shape };
        self
    }

    /// Keeps rows of `owner` for which `f(owner, row)` holds.
    pub fn mask(mut self, f: impl Fn(usize, usize) -> bool) -> Self {
        let all = self.lengths.len();
        let columns = self.columns;
        self.judge = Judge::Mask((0..all * columns).map(|i| f(i / columns, i % columns).into()).collect());
        self
    }

    /// Keeps about `percent` of 100.
    pub fn random_mask(self, percent: usize) -> Self {
        let mut rng = Rng::new(self.seed + 2);
        let count = self.lengths.len() * self.columns;
        let mask: Vec<bool> = (0..count).map(|_| rng.below(100) < percent).collect();
        let columns = self.columns;
        self.mask(|owner, row| mask[owner * columns + row])
    }

    pub fn any(mut self) -> Self {
        self.shape.order = CompactOrder::Any;
        self
    }

    fn heads(&self) -> usize {
        if self.layered { self.shape.owners_a_layer } else { self.shape.owners }
    }

    fn layers(&self) -> usize {
        if self.layered { self.shape.owners / self.shape.owners_a_layer } else { 1 }
    }

    fn pages_of_table(&self) -> usize {
        match self.layout {
            Layout::Contiguous => 1,
            Layout::Owned(n) | Layout::Shared(n) => self.shape.max_rows.div_ceil(n),
        }
    }

    /// Page ids that a table may have; of a layer's pools where each has its own.
    pub fn page_count(&self) -> usize {
        let tables = match self.layout {
            Layout::Contiguous => return 1,
            Layout::Owned(_) => self.shape.seqs * self.heads(),
            Layout::Shared(_) => self.shape.seqs,
        };
        tables * self.pages_of_table() + 2
    }

    /// `[B, O or 1, pages]`: −7 where no row held needs the page.
    pub fn table(&self) -> Vec<i32> {
        let (per, mut rng) = (self.pages_of_table(), Rng::new(self.seed + 3));
        let (tables, page_rows) = match self.layout {
            Layout::Contiguous => return Vec::new(),
            Layout::Owned(n) => (self.lengths.len(), n),
            Layout::Shared(n) => (self.shape.seqs, n),
        };
        let each = self.lengths.len() / tables.max(1);
        let orders: Vec<Vec<usize>> = (0..self.layers()).map(|_| rng.permutation(self.page_count())).collect();
        let mut taken = vec![0; orders.len()];
        let mut table = Vec::new();
        for t in 0..tables {
            let layer = if self.layered { t % self.shape.owners / self.shape.owners_a_layer } else { 0 };
            let longest = (0..each).map(|o| self.lengths[t * each + o].clamp(0, self.shape.max_rows as i32)).max();
            let used = (longest.unwrap_or(0) as usize).div_ceil(page_rows);
            for page in 0..per {
                table.push(if page < used { orders[layer][taken[layer]] as i32 } else { -7 });
                taken[layer] += 1;
            }
        }
        table
    }

    /// As a launch finds it.
    fn damaged_table(&self) -> Vec<i32> {
        let mut table = self.table();
        for (i, &(owner, page)) in self.bad.iter().enumerate() {
            table[owner * self.pages_of_table() + page] = [-1, self.page_count() as i32, i32::MAX, i32::MIN][i % 4];
        }
        table
    }

    pub fn is_on_bad_page(&self, owner: usize, row: usize) -> bool {
        self.bad.contains(&(owner, row / self.page(Stored::row_wise(16, 0)).0))
    }

    /// The row's page and place in it.
    fn place(&self, table: &[i32], owner: usize, row: usize) -> (usize, usize) {
        let per = self.pages_of_table();
        match self.layout {
            Layout::Contiguous => (0, row),
            Layout::Owned(n) => (table[owner * per + row / n] as usize, row % n),
            Layout::Shared(n) => (table[owner / self.shape.owners * per + row / n] as usize, row % n),
        }
    }

    /// Rows of a page, and its bytes for one owner.
    fn page(&self, stored: Stored) -> (usize, usize) {
        let rows = match self.layout {
            Layout::Contiguous => self.shape.max_rows,
            Layout::Owned(n) | Layout::Shared(n) => n,
        };
        (rows, stored.bytes(rows).next_multiple_of(16))
    }

    fn pool_bytes(&self, stored: Stored) -> usize {
        let page = self.page(stored).1;
        match self.layout {
            Layout::Contiguous => self.shape.seqs * self.heads() * page,
            Layout::Owned(_) => self.page_count() * page,
            Layout::Shared(_) => self.page_count() * self.heads() * page,
        }
    }

    fn pool<M: kvlar::Memory>(&self, data: M, stored: Stored) -> Pool<M> {
        let (rows, bytes) = self.page(stored);
        match self.layout {
            Layout::Contiguous => {
                let seq_stride = self.heads() * bytes;
                let params = (rows * stored.row, stored.params);
                Pool {
                    seq_stride,
                    head_stride: bytes,
                    params_offset: params.0,
                    params_stride: params.1,
                    ..Pool::contiguous(data, self.heads(), rows, stored.row)
                }
            }
            Layout::Owned(n) => Pool { head_stride: 0, ..Pool::pages(data, self.page_count(), n, 1, stored) },
            Layout::Shared(n) => Pool::pages(data, self.page_count(), n, self.heads(), stored),
        }
    }

    /// Where a row's codes and scales are: layer and bytes.
    fn offsets(&self, table: &[i32], stored: Stored, owner: usize, row: usize) -> (usize, usize, usize) {
        let (seq, of_seq) = (owner / self.shape.owners, owner % self.shape.owners);
        let (layer, head) = (of_seq / self.heads(), of_seq % self.heads());
        let (page, in_page) = self.place(table, owner, row);
        let (rows, bytes) = self.page(stored);
        let start = bytes
            * match self.layout {
                Layout::Contiguous => seq * self.heads() + head,
                Layout::Owned(_) => page,
                Layout::Shared(_) => page * self.heads() + head,
            };
        (layer, start + in_page * stored.row, start + rows * stored.row + in_page * stored.params)
    }

    fn position_stride(&self) -> usize {
        match self.layout {
            Layout::Contiguous => self.shape.max_rows,
            Layout::Owned(n) if self.layered => self.page_count() * n,
            Layout::Owned(_) | Layout::Shared(_) => 0,
        }
    }

    fn position_index(&self, table: &[i32], owner: usize, row: usize) -> usize {
        let (page, in_page) = self.place(table, owner, row);
        owner * self.position_stride() + page * self.page(Stored::row_wise(16, 0)).0 + in_page
    }

    fn position_count(&self) -> usize {
        match self.layout {
            Layout::Contiguous => self.lengths.len() * self.shape.max_rows,
            Layout::Owned(n) if self.layered => self.lengths.len() * self.page_count() * n,
            Layout::Owned(n) | Layout::Shared(n) => self.page_count() * n,
        }
    }

    /// Before the launch: random bytes.
    pub fn before(&self) -> Memories {
        let mut rng = Rng::new(self.seed + 4);
        let table = self.table();
        let mut pools = |stored: Option<Stored>| -> Vec<Vec<u8>> {
            let bytes = stored.map_or(0, |s| self.pool_bytes(s));
            (0..self.layers()).map(|_| (0..bytes).map(|_| rng.below(256) as u8).collect()).collect()
        };
        let (keys, values) = (pools(Some(self.shape.keys)), pools(self.shape.values));
        let mut positions = vec![UNTOUCHED; self.positions.as_ref().map_or(0, |_| self.position_count())];
        if let Some(given) = &self.positions {
            for owner in 0..self.lengths.len() {
                for row in 0..self.length(owner) {
                    positions[self.position_index(&table, owner, row)] = given[owner * self.shape.max_rows + row];
                }
            }
        }
        Memories {
            keys,
            values,
            positions,
            scores: self.scores.iter().flatten().map(|x| x.to_bits()).collect(),
            lengths: self.lengths.clone(),
            source: vec![UNTOUCHED; self.lengths.len() * self.shape.max_rows],
        }
    }

    pub fn length(&self, owner: usize) -> usize {
        self.lengths[owner].clamp(0, self.shape.max_rows as i32) as usize
    }

    /// Whether a row stays.
    pub fn is_kept(&self, owner: usize, row: usize) -> bool {
        let (mut column, mut columns) = (row, self.length(owner));
        if let Some(Span { first, count }) = &self.span {
            if self.positions.is_some() && self.is_on_bad_page(owner, row) {
                return true; // where it stands is not known
            }
            let seq = owner / self.shape.owners;
            columns = count.as_ref().map_or(self.columns, |c| c[seq].clamp(0, self.columns as i32) as usize);
            let position = self.positions.as_ref().map_or(row as i32, |p| p[owner * self.shape.max_rows + row]);
            let from_first = i64::from(position) - i64::from(first[seq]);
            if from_first < 0 || from_first >= columns as i64 {
                return true;
            }
            column = from_first as usize;
        }
        match &self.judge {
            Judge::Mask(mask) => mask[owner * self.columns + column] != 0,
            Judge::Cut { scores, stride, cuts, members, sink_rows, recent_rows } => {
                let score = match scores {
                    Some(scores) => scores[owner * stride + column],
                    None => self.scores.as_ref().expect("scores")[owner * self.score_stride + column],
                };
                let place = ordered_row(score, (owner % members * self.columns + column) as u32);
                column < *sink_rows || column + recent_rows >= columns || place >= cuts[owner / members]
            }
        }
    }

    /// Which row comes to each place of an owner, worked out one row at a time.
    pub fn sources(&self, owner: usize) -> Vec<usize> {
        let mut kept: Vec<usize> = (0..self.length(owner)).filter(|&row| self.is_kept(owner, row)).collect();
        if self.shape.order == CompactOrder::Keep {
            return kept;
        }
        let (left, mut placed) = (kept.len(), Vec::new());
        for place in 0..left {
            let row = if self.is_kept(owner, place) { place } else { kept.pop().expect("a row behind") };
            placed.push(row);
        }
        placed
    }

    /// After the launch.
    pub fn after(&self) -> Memories {
        self.after_all(&self.before())
    }

    /// After a launch that finds these.
    pub fn after_all(&self, before: &Memories) -> Memories {
        let table = self.table();
        let mut after = before.clone();
        for owner in 0..self.lengths.len() {
            let sources = self.sources(owner);
            after.lengths[owner] = sources.len() as i32;
            for (to, from) in sources.into_iter().enumerate() {
                after.source[owner * self.shape.max_rows + to] = from as i32;
                if to != from && (self.is_on_bad_page(owner, from) || self.is_on_bad_page(owner, to)) {
                    continue;
                }
                let (values, stored) = (self.shape.values, self.shape.keys);
                copy_row(&mut after.keys, &before.keys, stored, |row| self.offsets(&table, stored, owner, row), from, to);
                if let Some(stored) = values {
                    copy_row(&mut after.values, &before.values, stored, |row| self.offsets(&table, stored, owner, row), from, to);
                }
                if self.positions.is_some() {
                    let at = |row| self.position_index(&table, owner, row);
                    after.positions[at(to)] = before.positions[at(from)];
                }
                if self.scores.is_some() {
                    after.scores[owner * self.score_stride + to] = before.scores[owner * self.score_stride + from];
                }
            }
        }
        after
    }

    /// Launches, and compares all memories; gives the lengths.
    pub fn check(&self, lab: &Lab) -> Vec<i32> {
        let (lengths, status) = self.check_all(lab);
        assert!(status.is_clean(), "status of {self:?}");
        lengths
    }

    /// Likewise, and what the kernel had to clamp or skip.
    pub fn check_all(&self, lab: &Lab) -> (Vec<i32>, Status) {
        let mut run = CompactRun::new(lab, self);
        run.launch(lab);
        let expected = self.after();
        run.compare(lab, &expected, self);
        (expected.lengths, run.status(lab))
    }
}

fn copy_row(
    to: &mut [Vec<u8>],
    from: &[Vec<u8>],
    stored: Stored,
    offsets: impl Fn(usize) -> (usize, usize, usize),
    source: usize,
    target: usize,
) {
    let ((layer, from_codes, from_params), (_, to_codes, to_params)) = (offsets(source), offsets(target));
    to[layer][to_codes..][..stored.row].copy_from_slice(&from[layer][from_codes..][..stored.row]);
    to[layer][to_params..][..stored.params].copy_from_slice(&from[layer][from_params..][..stored.params]);
}
