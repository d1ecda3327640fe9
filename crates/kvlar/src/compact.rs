//! Rows that are kept, moved together in place: all layers and heads of all sequences in one launch.

use crate::device::Launch;
use crate::error::{aligned, invalid, unsupported};
use crate::paged::within;
use crate::{CompactOrder, Device, Memory, Pool, Result, Rows, Stored, Stream, View, ViewMut, Workspace, WorkspaceSize, abi};

const OP: &str = "compact";

/// What [`CompactPlan`] is made from. An owner is what has rows of its own: a kv head of a layer, or a group of heads or layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactShape {
    /// B.
    pub seqs: usize,
    /// O: owners of a sequence, layer after layer.
    pub owners: usize,
    /// Of a layer; divides O. It matters where each layer has pools of its own ([`CompactPlan::launch_layers`]).
    pub owners_a_layer: usize,
    /// A stored key row: [`crate::Format::stored`]. Scales and zeros that rows share (channel-wise) cannot move.
    pub keys: Stored,
    /// A stored value row; `None` where values lie elsewhere, and move otherwise.
    pub values: Option<Stored>,
    /// Rows that an owner can hold.
    pub max_rows: usize,
    /// Where kept rows go.
    pub order: CompactOrder,
}

/// A validated compaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompactPlan {
    shape: CompactShape,
    launch: Launch,
}

/// Which rows are judged, and by which column of a mask or of scores.
#[derive(Clone, Copy, Debug)]
pub enum Columns<'a> {
    /// All, each by its index.
    Rows,
    /// Those whose position is one of `count` from `first` on, by the distance to it. All others stay: sinks, rows that were
    /// judged before, the recent window.
    Positions {
        /// i32 `[B]`.
        first: View<'a>,
        /// i32 `[B]`; clamped to what a mask or scores have columns for. `None`: as many as those.
        count: Option<View<'a>>,
    },
}

/// Which of the rows that are judged stay.
#[derive(Clone, Copy, Debug)]
pub enum Keep<'a> {
    /// Those that are marked.
    Mask {
        /// u8 `[B, O, columns]`, 0 for those that go.
        mask: View<'a>,
        /// Of an owner.
        columns: usize,
    },
    /// Those at or above a cut of [`crate::TopkPlan`], and its sinks and recent rows.
    Cut {
        /// f32 `[B, O, stride]` by column; `None`: the scores that move along, by row ([`CompactArgs::scores`]).
        scores: Option<View<'a>>,
        /// From one owner's scores to the next one's.
        stride: usize,
        /// T of the selection: columns of an owner.
        columns: usize,
        /// u64, one a set.
        cuts: View<'a>,
        /// Owners that are a set, neighbours of `[B, O]`: O where all layers and heads chose together, 1 where each did alone.
        members: usize,
        /// First columns, which stay.
        sink_rows: usize,
        /// Last columns (of the owner's length, or of `count`), which stay.
        recent_rows: usize,
    },
}

/// Scores that move with their rows.
#[derive(Debug)]
pub struct RowScores<'a> {
    /// f32 `[B, O, stride]`, by row.
    pub scores: ViewMut<'a>,
    /// From one owner's scores to the next one's.
    pub stride: usize,
}

/// Arguments of [`CompactPlan::launch`].
#[derive(Debug)]
pub struct CompactArgs<'a> {
    /// Tables and capacity, indexed by owner ([`Rows::per_head`]), or contiguous. Its lengths and positions are not used.
    pub rows: Rows<'a>,
    /// i32 `[B, O]`: rows held, which become rows left.
    pub lengths: ViewMut<'a>,
    /// Positions of the rows, laid out as `rows` says; they move along.
    pub positions: Option<ViewMut<'a>>,
    /// They move along.
    pub scores: Option<RowScores<'a>>,
    /// Key rows of all owners.
    pub keys: Pool<ViewMut<'a>>,
    /// Value rows; there as the shape says.
    pub values: Option<Pool<ViewMut<'a>>>,
    /// Which rows stay.
    pub keep: Keep<'a>,
    /// Which rows `keep` is asked about.
    pub columns: Columns<'a>,
    /// i32 `[B, O, max_rows]` of the shape: the row that each kept row was; nothing is written behind the rows left.
    pub source: Option<ViewMut<'a>>,
}

/// Addresses of pools that each layer has for itself.
#[derive(Clone, Copy, Debug)]
pub struct LayerPools<'a> {
    /// u64 `[O / owners_a_layer]`: addresses of key pools.
    pub keys: View<'a>,
    /// Likewise of value pools; there as the shape says.
    pub values: Option<View<'a>>,
}

impl CompactShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for rows that share scales, or are larger than a CTA moves at a time (32 KB);
    /// [`crate::Error::Invalid`] for row sizes that are no multiples of 16 bytes (scales and zeros: 4), owners that do not
    /// divide, too many rows.
    pub fn plan(&self, _: &Device) -> Result<CompactPlan> {
        for (arg, stored) in [("keys", Some(self.keys)), ("values", self.values)] {
            let Some(Stored { row, params, params_rows }) = stored else { continue };
            if params_rows != 1 {
                return unsupported(OP, format!("{arg} whose scales {params_rows} rows share: decode them first"));
            }
            if row == 0 || !row.is_multiple_of(16) || !params.is_multiple_of(4) {
                let what = format!("rows of {row} bytes with {params} of scales; they are multiples of 16 and 4");
                return invalid(arg, what);
            }
        }
        let [rows, params] = [|s: &Stored| s.row, |s: &Stored| s.params]
            .map(|of| of(&self.keys).saturating_add(self.values.as_ref().map_or(0, of)));
        if rows > LARGEST_ROW || params > LARGEST_PARAMS {
            return unsupported(OP, format!("{rows} bytes a row and {params} of scales: {LARGEST_ROW} and {LARGEST_PARAMS} are"));
        }
        if self.owners_a_layer == 0 || !self.owners.is_multiple_of(self.owners_a_layer) {
            return invalid("owners_a_layer", format!("{} does not divide {} owners", self.owners_a_layer, self.owners));
        }
        if self.max_rows > 1 << 30 || self.seqs.saturating_mul(self.owners) > i32::MAX as usize {
            let [b, o, t] = [self.seqs, self.owners, self.max_rows];
            return invalid("max_rows", format!("{b} sequences of {o} owners with {t} rows are too many for one launch"));
        }
        let entry = match self.order {
            CompactOrder::Keep => "kvlar_compact",
            CompactOrder::Any => "kvlar_compact_any",
        };
        let grid = (self.seqs * self.owners) as u32;
        Ok(CompactPlan { shape: *self, launch: Launch { entry, grid, block: 256, shared_bytes: 0 } })
    }
}

/// Bytes of a row's codes, and of its scales and zeros, that a CTA of `kernels/compact/compact.cu` moves at a time (position and
/// score beside the latter).
const LARGEST_ROW: usize = 256 * 8 * 16;
const LARGEST_PARAMS: usize = 256 * 4 * 4 - 8;

impl CompactPlan {
    /// What it was made from.
    pub fn shape(&self) -> &CompactShape {
        &self.shape
    }

    /// Enqueues one launch; none without owners.
    ///
    /// Rows beyond those left stay as they are. A row on a page that is none of the pool's does not move, nor does one that
    /// would move to such a page; the status word says so.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut CompactArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        if self.launch.grid == 0 {
            return Ok(());
        }
        let params = self.params(args, self.shape.owners, workspace)?;
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// Likewise where each layer has its own pools: those of the arguments are the first layer's, and all have its strides.
    ///
    /// # Errors
    /// Likewise.
    ///
    /// # Safety
    /// The addresses in `layers` are those of pools like the arguments', which nothing else uses until the launch has run.
    pub unsafe fn launch_layers(
        &self,
        stream: &Stream,
        args: &mut CompactArgs<'_>,
        layers: LayerPools<'_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        if self.launch.grid == 0 {
            return Ok(());
        }
        let count = self.shape.owners / self.shape.owners_a_layer;
        within("key layers", &layers.keys, 8 * count, 8)?;
        let value_layers = match (&layers.values, self.shape.values) {
            (Some(values), Some(_)) => within("value layers", values, 8 * count, 8).map(|()| values.address())?,
            (None, None) => 0,
            _ => return invalid("value layers", "there where the shape has values"),
        };
        let params = abi::KvlarCompact {
            key_layers: layers.keys.address(),
            value_layers,
            owners_a_layer: self.shape.owners_a_layer as u32,
            ..self.params(args, self.shape.owners_a_layer, workspace)?
        };
        // SAFETY: as above; the addresses of layers are the caller's promise.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// `heads`: owners that the pools are indexed by.
    fn params(&self, args: &mut CompactArgs<'_>, heads: usize, workspace: &Workspace) -> Result<abi::KvlarCompact> {
        let s = &self.shape;
        let all = s.seqs * s.owners;
        let rows = Rows { lengths: None, positions: args.positions.as_ref().map(ViewMut::as_view), ..args.rows };
        if rows.max_rows > s.max_rows {
            return invalid("rows", format!("{} are more than the shape's {}", rows.max_rows, s.max_rows));
        }
        let page_count = args.values.as_ref().map_or(args.keys.page_count, |v| v.page_count.min(args.keys.page_count));
        rows.check("rows", s.seqs, (s.owners, s.owners), page_count)?;
        let own = rows.position_head_stride != 0 || (rows.table.is_some() && rows.table_head_stride != 0);
        if rows.positions.is_some() && s.owners > 1 && !own {
            return invalid("positions", "owners share them: each needs pages or positions of its own");
        }
        if rows.positions.is_some() && s.seqs > 1 && rows.table.is_none() && rows.position_seq_stride == 0 {
            return invalid("positions", "sequences share them: each needs positions of its own");
        }
        args.keys.check("keys", &rows, s.seqs, heads, s.keys)?;
        let values = match (&args.values, s.values) {
            (Some(pool), Some(stored)) => pool.check("values", &rows, s.seqs, heads, stored).map(|()| pool.abi())?,
            (None, None) => abi::KvlarPool::default(),
            _ => return invalid("values", "there where the shape has them"),
        };
        within("lengths", &args.lengths, 4 * all, 4)?;
        let (scores, score_stride) = match &args.scores {
            None => (0, 0),
            Some(RowScores { scores, stride }) => {
                owned("scores", scores, all, *stride, rows.max_rows, 4)?;
                (scores.address(), *stride as i64)
            }
        };
        if let Some(source) = &args.source {
            within("source", source, 4 * all * s.max_rows, 4)?;
        }
        let bare = self.bare_params();
        Ok(abi::KvlarCompact {
            rows: abi::KvlarRows {
                length_seq_stride: bare.rows.length_seq_stride,
                length_head_stride: bare.rows.length_head_stride,
                ..rows.abi()
            },
            keys: args.keys.abi(),
            values,
            keep: self.keep(args, scores, score_stride)?,
            lengths: args.lengths.address(),
            scores,
            score_stride,
            source: args.source.as_ref().map_or(0, Memory::address),
            status: workspace.scratch(WorkspaceSize::default())?.status,
            ..bare
        })
    }

    fn keep(&self, args: &CompactArgs<'_>, row_scores: u64, row_stride: i64) -> Result<abi::KvlarKeep> {
        let (seqs, all, max_rows) = (self.shape.seqs, self.shape.seqs * self.shape.owners, args.rows.max_rows);
        let by_row = matches!(args.columns, Columns::Rows);
        let (arg, columns) = match args.keep {
            Keep::Mask { columns, .. } => ("mask", columns),
            Keep::Cut { columns, .. } => ("cut", columns),
        };
        if by_row && columns < max_rows {
            return invalid(arg, format!("{columns} columns for {max_rows} rows"));
        }
        if columns > 1 << 30 {
            return invalid(arg, format!("{columns} columns are more than 2^30"));
        }
        let (first, counts) = match &args.columns {
            Columns::Rows => (0, 0),
            Columns::Positions { first, count } => {
                within("first", first, 4 * seqs, 4)?;
                if let Some(count) = count {
                    within("count", count, 4 * seqs, 4)?;
                }
                (first.address(), count.map_or(0, |c| c.address()))
            }
        };
        let of_columns = abi::KvlarKeep { first, counts, columns: columns as u32, members: 1, ..Default::default() };
        match args.keep {
            Keep::Mask { mask, .. } => {
                within("mask", &mask, all * columns, 1)?;
                Ok(abi::KvlarKeep { mask: mask.address(), stride: columns as i64, ..of_columns })
            }
            Keep::Cut { scores, stride, cuts, members, sink_rows, recent_rows, .. } => {
                if members == 0 || !all.is_multiple_of(members) {
                    return invalid("members", format!("sets of {members} owners where there are {all}"));
                }
                if members.saturating_mul(columns) > 1 << 32 {
                    return invalid("members", format!("{members} owners with {columns} columns are too many for a set"));
                }
                within("cuts", &cuts, 8 * (all / members), 8)?;
                let (scores, stride) = match scores {
                    Some(scores) => {
                        owned("cut scores", &scores, all, stride, columns, 4)?;
                        (scores.address(), stride as i64)
                    }
                    None if row_scores == 0 || !by_row => {
                        return invalid("cut scores", "none are given, and none move with the rows, or columns are not rows");
                    }
                    None => (row_scores, row_stride),
                };
                Ok(abi::KvlarKeep {
                    scores,
                    stride,
                    cuts: cuts.address(),
                    members: members as u32,
                    sink_rows: sink_rows.min(columns) as u32,
                    recent_rows: recent_rows.min(columns) as u32,
                    ..of_columns
                })
            }
        }
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0, but those of lengths
    /// `[B, O]` and sources `[B, O, max_rows]`.
    pub fn bare_params(&self) -> abi::KvlarCompact {
        let s = &self.shape;
        let values = s.values.unwrap_or(Stored::row_wise(0, 0));
        abi::KvlarCompact {
            rows: abi::KvlarRows {
                length_seq_stride: s.owners as i64,
                length_head_stride: 1,
                max_rows: s.max_rows as u32,
                ..Default::default()
            },
            keep: abi::KvlarKeep { members: 1, ..Default::default() },
            source_stride: s.max_rows as i64,
            seqs: s.seqs as u32,
            owners: s.owners as u32,
            owners_a_layer: s.owners as u32,
            key_bytes: s.keys.row as u32,
            value_bytes: values.row as u32,
            key_params: s.keys.params as u32,
            value_params: values.params as u32,
            ..Default::default()
        }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`CompactPlan::bare_params`] fills in all that is neither an address nor a stride), and its
    /// addresses are valid on the stream's device until the launch has run. Owners have positions of their own.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarCompact) -> Result<()> {
        if self.launch.grid == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(self.launch, params) }
    }
}

/// Checks `count` values of `bytes` bytes for each of `all` owners, `stride` apart.
pub(crate) fn owned(
    arg: &'static str,
    memory: &impl Memory,
    all: usize,
    stride: usize,
    count: usize,
    bytes: usize,
) -> Result<()> {
    if stride < count && all > 1 {
        return invalid(arg, format!("a stride of {stride} for {count} of each owner"));
    }
    aligned(arg, memory.address(), bytes)?;
    if all == 0 { Ok(()) } else { within(arg, memory, bytes * ((all - 1) * stride + count), bytes) }
}
