//! Scores of sinks and recent rows, out of a threshold's reach.

use crate::compact::owned;
use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::{Device, Memory, Result, Rows, Stream, View, ViewMut, Workspace, WorkspaceSize, abi};

/// What [`ProtectPlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProtectShape {
    /// B.
    pub seqs: usize,
    /// O: owners of a sequence, as [`crate::CompactShape`] has it.
    pub owners: usize,
    /// T: columns of the scores.
    pub rows: usize,
    /// Rows at positions below it are sinks.
    pub sink_positions: i32,
    /// What sinks and recent rows score: +∞, or 1 as Fast KVzip has it in decode (arXiv 2601.17668).
    pub value: f32,
    /// Columns beyond a length get −∞; else they are left as they are.
    pub fill: bool,
}

/// A validated protection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProtectPlan {
    shape: ProtectShape,
    launch: Launch,
    blocks: usize,
}

/// Arguments of [`ProtectPlan::launch`].
#[derive(Debug)]
pub struct ProtectArgs<'a> {
    /// Positions and tables, indexed by owner; its lengths are not used.
    pub rows: Rows<'a>,
    /// Pages that ids may name; 1 where rows are contiguous.
    pub page_count: usize,
    /// i32 `[B, O]`: rows held.
    pub lengths: View<'a>,
    /// f32 `[B, O, score_stride]`, by row; those of staged rows are written.
    pub scores: ViewMut<'a>,
    /// From one owner's scores to the next one's, T or more.
    pub score_stride: usize,
    /// i32 `[B]`: the first position of the recent window; `None`: there is none.
    pub recent_from: Option<View<'a>>,
    /// Scores that wait for their rows.
    pub staged: Option<StagedScores<'a>>,
    /// f32 `[B, O, T]`: scores, but those of sinks and recent rows.
    pub protected: ViewMut<'a>,
}

/// Scores by position, of tokens that were scored before it was known which row each owner keeps them in.
#[derive(Clone, Copy, Debug)]
pub struct StagedScores<'a> {
    /// f32 `[B, O, stride]`; column c is the score of the row at position `from` + c.
    pub scores: View<'a>,
    /// i32 `[B]`: the position of column 0.
    pub from: View<'a>,
    /// Columns; rows beyond them keep their scores.
    pub columns: usize,
    /// From one owner's scores to the next one's.
    pub stride: usize,
}

/// Rows a CTA of `kernels/compact/protect.cu`.
const ROWS: usize = 1024;

impl ProtectShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] for too many rows.
    pub fn plan(&self, _: &Device) -> Result<ProtectPlan> {
        let blocks = self.rows.div_ceil(ROWS);
        let grid = self.seqs.saturating_mul(self.owners).saturating_mul(blocks);
        if self.rows > 1 << 30 || grid > i32::MAX as usize || self.seqs.saturating_mul(self.owners) > i32::MAX as usize {
            let [b, o, t] = [self.seqs, self.owners, self.rows];
            return invalid("rows", format!("{b} sequences of {o} owners with {t} rows are too many for one launch"));
        }
        let launch = Launch { entry: "kvlar_protect", grid: grid as u32, block: 256, shared_bytes: 0 };
        Ok(ProtectPlan { shape: *self, launch, blocks })
    }
}

impl ProtectPlan {
    /// What it was made from.
    pub fn shape(&self) -> &ProtectShape {
        &self.shape
    }

    /// Enqueues one launch; none without rows.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut ProtectArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        if self.launch.grid == 0 {
            return Ok(());
        }
        let s = &self.shape;
        let all = s.seqs * s.owners;
        let rows = Rows { lengths: None, ..args.rows };
        rows.check("rows", s.seqs, (s.owners, s.owners), args.page_count)?;
        if rows.max_rows < s.rows {
            return invalid("rows", format!("{} columns of scores for at most {} rows", s.rows, rows.max_rows));
        }
        if args.page_count > u32::MAX as usize {
            return invalid("page_count", format!("{} is above 2^32", args.page_count));
        }
        within("lengths", &args.lengths, 4 * all, 4)?;
        owned("scores", &args.scores, all, args.score_stride, s.rows, 4)?;
        owned("protected", &args.protected, all, s.rows, s.rows, 4)?;
        if let Some(recent) = &args.recent_from {
            within("recent_from", recent, 4 * s.seqs, 4)?;
        }
        if let Some(staged) = &args.staged {
            owned("staged scores", &staged.scores, all, staged.stride, staged.columns, 4)?;
            within("staged from", &staged.from, 4 * s.seqs, 4)?;
        }
        let bare = self.bare_params();
        let params = abi::KvlarProtect {
            rows: abi::KvlarRows {
                lengths: args.lengths.address(),
                length_seq_stride: bare.rows.length_seq_stride,
                length_head_stride: bare.rows.length_head_stride,
                ..rows.abi()
            },
            scores: args.scores.address(),
            protected_scores: args.protected.address(),
            recent: args.recent_from.map_or(0, |x| x.address()),
            staged: args.staged.map_or(0, |x| x.scores.address()),
            staged_from: args.staged.map_or(0, |x| x.from.address()),
            staged_stride: args.staged.map_or(0, |x| x.stride as i64),
            staged_count: args.staged.map_or(0, |x| x.columns.min(u32::MAX as usize) as u32),
            status: workspace.scratch(WorkspaceSize::default())?.status,
            stride: args.score_stride as i64,
            page_count: args.page_count as u32,
            ..bare
        };
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// The parameter struct with everything that follows from the shape; addresses are 0, strides those of dense scores and
    /// lengths.
    pub fn bare_params(&self) -> abi::KvlarProtect {
        let s = &self.shape;
        abi::KvlarProtect {
            rows: abi::KvlarRows { length_seq_stride: s.owners as i64, length_head_stride: 1, ..Default::default() },
            stride: s.rows as i64,
            protected_stride: s.rows as i64,
            sink_positions: s.sink_positions,
            value: s.value,
            seqs: s.seqs as u32,
            owners: s.owners as u32,
            row_count: s.rows as u32,
            fill: s.fill.into(),
            blocks: self.blocks as u32,
            ..Default::default()
        }
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`ProtectPlan::bare_params`] fills in all that is neither an address nor a stride), and its
    /// addresses are valid on the stream's device until the launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarProtect) -> Result<()> {
        if self.launch.grid == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(self.launch, params) }
    }
}
