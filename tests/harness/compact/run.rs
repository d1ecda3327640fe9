//! Launches of compact and protect over a case's memories.

use super::{CompactCase, Judge, Layout, Memories, Span};
use crate::Lab;
use kvlar::{
    Buffer, Columns, CompactArgs, Device, Keep, LayerPools, ProtectArgs, ProtectShape, RowScores, Rows, StagedScores, Status,
    Stream, Workspace,
};
use kvlar_reference::testing::Rng;

/// Without positions and lengths.
fn rows_of<'a>(c: &CompactCase, table: &'a Buffer) -> kvlar::Result<Rows<'a>> {
    let (capacity, per, table) = (c.shape.max_rows, c.pages_of_table(), table.view());
    let rows = match c.layout {
        Layout::Contiguous => Rows::contiguous(None, capacity),
        Layout::Owned(n) => Rows::per_head(table, c.shape.owners, per, table, n)?,
        Layout::Shared(n) => Rows::block_table(table, per, table, n)?,
    };
    let stride = c.position_stride();
    Ok(Rows {
        max_rows: capacity,
        position_seq_stride: c.shape.owners * stride,
        position_head_stride: stride,
        lengths: None,
        ..rows
    })
}

/// A case on a device.
#[derive(Debug)]
pub struct CompactRun {
    case: CompactCase,
    keys: Vec<Buffer>,
    values: Vec<Buffer>,
    positions: Buffer,
    pub scores: Buffer,
    pub lengths: Buffer,
    source: Buffer,
    table: Buffer,
    /// The mask, or scores of a cut.
    pub marks: Buffer,
    cuts: Buffer,
    first: Buffer,
    count: Buffer,
    /// Of the layers' pools.
    pub addresses: [Buffer; 2],
    workspace: Workspace,
}

impl CompactRun {
    pub fn new(lab: &Lab, case: &CompactCase) -> Self {
        let (before, table) = (case.before(), case.damaged_table());
        let (marks, cuts) = match &case.judge {
            Judge::Mask(mask) => (lab.upload(mask), lab.upload::<u64>(&[])),
            Judge::Cut { scores, cuts, .. } => (lab.upload(scores.as_deref().unwrap_or(&[])), lab.upload(cuts)),
        };
        let (first, count) = match &case.span {
            Some(Span { first, count }) => (lab.upload(first), lab.upload(count.as_deref().unwrap_or(&[]))),
            None => (lab.upload::<i32>(&[]), lab.upload::<i32>(&[])),
        };
        let pools = |all: &[Vec<u8>]| all.iter().map(|bytes| lab.upload(bytes)).collect::<Vec<_>>();
        let (keys, values) = (pools(&before.keys), pools(&before.values));
        let addresses = [&keys, &values].map(|all| lab.upload(&all.iter().map(Buffer::address).collect::<Vec<u64>>()));
        Self {
            keys,
            values,
            positions: lab.upload(&before.positions),
            scores: lab.upload(&before.scores),
            lengths: lab.upload(&before.lengths),
            source: lab.upload(&before.source),
            table: lab.upload(&table),
            marks,
            cuts,
            first,
            count,
            addresses,
            workspace: Workspace::new(&lab.device, kvlar::WorkspaceSize::default()).expect("a workspace"),
            case: case.clone(),
        }
    }

    pub fn launch(&mut self, lab: &Lab) {
        self.try_launch(&lab.device, &lab.stream, |_| ()).expect("a launch");
    }

    /// Replaces what a replay judges by.
    pub fn set_mask(&mut self, lab: &Lab, mask: &[u8]) {
        lab.stream.upload(&mut self.marks, 0, mask).expect("an upload");
    }

    /// Tables, and where positions are.
    pub fn rows(&self) -> kvlar::Result<Rows<'_>> {
        let positions = self.case.positions.as_ref().map(|_| self.positions.view());
        Ok(Rows { positions, ..rows_of(&self.case, &self.table)? })
    }

    /// Rows of the first pools.
    pub fn set_rows(&mut self, lab: &Lab, keys: &[u8], values: &[u8]) {
        (self.keys[0], self.values[0]) = (lab.upload(keys), lab.upload(values));
    }

    /// With changed arguments.
    pub fn try_launch(
        &mut self,
        device: &Device,
        stream: &Stream,
        change: impl FnOnce(&mut CompactArgs<'_>),
    ) -> kvlar::Result<()> {
        let c = &self.case;
        let plan = c.shape.plan(device)?;
        let rows = rows_of(c, &self.table)?;
        let keep = match &c.judge {
            Judge::Mask(_) => Keep::Mask { mask: self.marks.view(), columns: c.columns },
            &Judge::Cut { ref scores, stride, members, sink_rows, recent_rows, .. } => Keep::Cut {
                scores: scores.as_ref().map(|_| self.marks.view()),
                stride,
                columns: c.columns,
                cuts: self.cuts.view(),
                members,
                sink_rows,
                recent_rows,
            },
        };
        let columns = match &c.span {
            None => Columns::Rows,
            Some(span) => {
                let count = span.count.as_ref().map(|_| self.count.view());
                Columns::Positions { first: self.first.view(), count }
            }
        };
        let mut args = CompactArgs {
            rows,
            lengths: self.lengths.view_mut(),
            positions: c.positions.as_ref().map(|_| self.positions.view_mut()),
            scores: c.scores.as_ref().map(|_| RowScores { scores: self.scores.view_mut(), stride: c.score_stride }),
            keys: c.pool(self.keys[0].view_mut(), c.shape.keys),
            values: c.shape.values.map(|stored| c.pool(self.values[0].view_mut(), stored)),
            keep,
            columns,
            source: Some(self.source.view_mut()),
        };
        change(&mut args);
        if !c.layered {
            return plan.launch(stream, &mut args, &mut self.workspace);
        }
        let [keys, values] = self.addresses.each_ref().map(Buffer::view);
        let layers = LayerPools { keys, values: c.shape.values.map(|_| values) };
        // SAFETY: addresses of this run's buffers, all of one size.
        unsafe { plan.launch_layers(stream, &mut args, layers, &mut self.workspace) }
    }

    pub fn status(&self, lab: &Lab) -> Status {
        self.workspace.status(&lab.stream).expect("a status")
    }

    /// All memories as they are now.
    pub fn now(&self, lab: &Lab) -> Memories {
        let pools = |all: &[Buffer]| all.iter().map(|b| lab.download::<u8>(b)).collect();
        Memories {
            keys: pools(&self.keys),
            values: pools(&self.values),
            positions: lab.download(&self.positions),
            scores: lab.download(&self.scores),
            lengths: lab.download(&self.lengths),
            source: lab.download(&self.source),
        }
    }

    pub fn compare(&self, lab: &Lab, expected: &Memories, what: &CompactCase) {
        let now = self.now(lab);
        let text = || {
            let CompactCase { shape, layout, lengths, seed, .. } = what;
            format!("{shape:?} {layout:?} lengths {lengths:?} seed {seed}")
        };
        assert_eq!(now.lengths, expected.lengths, "lengths of {}", text());
        assert_eq!(now.source, expected.source, "sources of {}", text());
        assert_eq!(now.positions, expected.positions, "positions of {}", text());
        assert_eq!(now.scores, expected.scores, "scores of {}", text());
        assert!(now.keys == expected.keys, "keys of {}", text());
        assert!(now.values == expected.values, "values of {}", text());
    }
}

/// What protect makes of a case's scores.
pub fn check_protected(lab: &Lab, case: &CompactCase, columns: usize, recent: Option<&[i32]>, fill: bool) -> Status {
    check_staged(lab, case, (columns, fill), recent, None)
}

/// Likewise, where scores of rows at some positions and on wait: the first positions, and how many columns there are.
pub fn check_staged(
    lab: &Lab,
    case: &CompactCase,
    (columns, fill): (usize, bool),
    recent: Option<&[i32]>,
    staged: Option<(&[i32], usize)>,
) -> Status {
    let (all, capacity) = (case.lengths.len(), case.shape.max_rows);
    let (seqs, owners) = (case.shape.seqs, case.shape.owners);
    let shape = ProtectShape { seqs, owners, rows: columns, sink_positions: 4, value: f32::INFINITY, fill };
    let plan = shape.plan(&lab.device).expect("no error");
    let mut run = CompactRun::new(lab, case);
    let mut workspace = Workspace::new(&lab.device, Default::default()).expect("no error");
    let rows = rows_of(case, &run.table).expect("no error");
    let rows = Rows { positions: case.positions.as_ref().map(|_| run.positions.view()), ..rows };
    let (width, stride) = staged.map_or((0, 0), |(_, width)| (width, width + 3));
    let waiting: Vec<f32> = Rng::new(5).normals(all * stride, 1.0);
    let (staged_scores, staged_from) = (lab.upload(&waiting), lab.upload(staged.map_or(&[0][..], |s| s.0)));
    let recent_from = recent.map(|r| lab.upload(r));
    let mut out = lab.poisoned(4 * all * columns);
    let mut args = ProtectArgs {
        rows,
        page_count: case.page_count(),
        lengths: run.lengths.view(),
        scores: run.scores.view_mut(),
        score_stride: case.score_stride,
        recent_from: recent_from.as_ref().map(|r| r.view()),
        staged: staged.map(|_| StagedScores { scores: staged_scores.view(), from: staged_from.view(), columns: width, stride }),
        protected: out.view_mut(),
    };
    plan.launch(&lab.stream, &mut args, &mut workspace).expect("no error");
    let (now, kept) = (lab.download::<u32>(&out), lab.download::<u32>(&run.scores));
    let mut scores: Vec<f32> = case.scores.clone().expect("scores");
    for owner in 0..all {
        let length = (case.lengths[owner].max(0) as usize).min(columns);
        for row in 0..columns {
            let position = case.positions.as_ref().map_or(row as i32, |p| p[owner * capacity + row]);
            let is_known = case.positions.is_none() || !case.is_on_bad_page(owner, row);
            let is_recent = recent.is_some_and(|r| position >= r[owner / owners]);
            let column = staged.map_or(-1, |(from, _)| i64::from(position) - i64::from(from[owner / owners]));
            if row < length && is_known && (0..width as i64).contains(&column) {
                scores[owner * case.score_stride + row] = waiting[owner * stride + column as usize];
            }
            let expected = match (row < length, is_known && (position < 4 || is_recent), fill) {
                (true, true, _) => f32::INFINITY.to_bits(),
                (true, false, _) => scores[owner * case.score_stride + row].to_bits(),
                (false, _, true) => f32::NEG_INFINITY.to_bits(),
                (false, _, false) => u32::MAX,
            };
            assert_eq!(now[owner * columns + row], expected, "owner {owner} row {row} of {columns}");
        }
    }
    let bits: Vec<u32> = scores.iter().map(|x| x.to_bits()).collect();
    assert_eq!(kept[..bits.len()], bits, "scores that stay, or have found their rows");
    workspace.status(&lab.stream).expect("no error")
}
