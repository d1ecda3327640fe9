//! Attention over the rows that a selection keeps, decided in the kernel from their scores.

use super::work::BuiltFor;
use super::{AttendArgs, AttendPlan, AttendShape, WorkList};
use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::paged::within;
use crate::{Device, Error, Memory, Result, Stream, View, Workspace, abi};

/// What [`AttendCutPlan`] is made from. Start from [`AttendCutShape::new`] and change fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttendCutShape {
    /// The attention; its segments hold rows of the type of q.
    pub attend: AttendShape,
    /// The segment that scores are of; rows of the others are all visible.
    pub segment: usize,
    /// Its first rows, which are always visible.
    pub sink_rows: usize,
    /// Its last rows, which are always visible.
    pub recent_rows: usize,
}

/// A validated attention over selected rows. `Copy`, holds no handles; reusable across layers, steps and graph replays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttendCutPlan {
    attend: AttendPlan,
    launch: Launch,
    segment: usize,
    sink_rows: usize,
    recent_rows: usize,
}

/// What [`AttendCutPlan::launch`] takes beside the arguments of attention.
#[derive(Clone, Copy, Debug)]
pub struct CutArgs<'a> {
    /// f32 `[B, Hk, score_stride]`: of the segment's rows, as [`crate::ScanSelectPlan`] and [`crate::ReducePlan`] write them.
    pub scores: View<'a>,
    /// Scores from a kv head to the next: the columns that the scan has.
    pub score_stride: usize,
    /// u64 `[B, Hk]`: as [`crate::ScanSelectPlan`] and [`crate::TopkPlan`] (of one row a set) find them.
    pub cuts: View<'a>,
}

impl AttendCutShape {
    /// Of the first segment; no rows are always visible.
    pub fn new(attend: AttendShape) -> Self {
        Self { attend, segment: 0, sink_rows: 0, recent_rows: 0 }
    }

    /// Validates, and picks the kernel.
    ///
    /// # Errors
    /// Those of [`AttendShape::plan`]; [`Error::Unsupported`] for segments of quantized rows; [`Error::Invalid`] for a segment
    /// that there is not, and for more rows than 2^30 that are always visible.
    pub fn plan(&self, device: &Device) -> Result<AttendCutPlan> {
        let attend = self.attend.plan(device)?;
        let Some(entry) = attend.tiling.cut_entry(self.attend.dtype) else {
            return unsupported("attend_cut", "quantized rows (rows of the type of q are)");
        };
        if self.segment >= self.attend.segments().count() {
            return invalid("segment", format!("{} of {} segments", self.segment, self.attend.segments().count()));
        }
        for (name, rows) in [("sink_rows", self.sink_rows), ("recent_rows", self.recent_rows)] {
            if rows > 1 << 30 {
                return invalid(name, format!("{rows} rows are more than 2^30"));
            }
        }
        let launch = Launch { entry, ..attend.launch };
        let Self { segment, sink_rows, recent_rows, .. } = *self;
        Ok(AttendCutPlan { attend, launch, segment, sink_rows, recent_rows })
    }
}

impl AttendCutPlan {
    /// The attention over all rows, which makes the work list ([`AttendPlan::work_list`], [`AttendPlan::schedule`]) and says
    /// the workspace ([`AttendPlan::workspace`]): layers that attend to everything share both.
    pub fn attend(&self) -> &AttendPlan {
        &self.attend
    }

    /// The kernel's entry point.
    pub fn entry(&self) -> &'static str {
        self.launch.entry
    }

    /// Enqueues one launch: a row of the segment is visible if its score's rank is at or above the cut (NaN < −∞ < finite < +∞,
    /// of equal scores the lower row first), or it is one of the first or last ones; masks hold as in attention. Lengths, stored
    /// positions and query positions must be those that the work list was built from. Scores and cuts are read from the device.
    ///
    /// Pages without a selected row are not read: bad ids of theirs may not be reported.
    ///
    /// # Errors
    /// Those of [`AttendPlan::launch`]; [`Error::Bounds`] and [`Error::Alignment`] for scores and cuts that do not fit;
    /// [`Error::Invalid`] for a score stride below the segment's rows.
    pub fn launch(
        &self,
        stream: &Stream,
        args: &mut AttendArgs<'_>,
        cut: &CutArgs<'_>,
        work: &WorkList,
        workspace: &mut Workspace,
    ) -> Result<()> {
        if work.built_for != Some(BuiltFor::Attend(self.attend, args.position_sources())) {
            return Err(Error::Mismatch { arg: "work list", what: "plan (call schedule of its attend first)" });
        }
        let params = self.params(args, cut, work, workspace)?;
        if self.attend.units == 0 {
            return Ok(());
        }
        // SAFETY: every address was checked against the shape.
        unsafe { stream.enqueue(self.launch, &params) }
    }

    /// Enqueues [`AttendCutPlan::launch`] with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`AttendCutPlan::bare_params`] fills in all that is not an address or a stride), its
    /// addresses are valid on the stream's device until the launch has run, and the work list was built by
    /// [`AttendPlan::schedule_raw`] from the same lengths and positions.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarAttendCut) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.attend.units == 0 { Ok(()) } else { unsafe { stream.enqueue(self.launch, params) } }
    }

    /// Checks the arguments and gives the kernel's parameter struct.
    ///
    /// # Errors
    /// Those of [`AttendCutPlan::launch`].
    pub fn params(
        &self,
        args: &AttendArgs<'_>,
        cut: &CutArgs<'_>,
        work: &WorkList,
        workspace: &Workspace,
    ) -> Result<abi::KvlarAttendCut> {
        let attend = self.attend.params(args, work, workspace)?;
        let (rows, heads) = (args.segments[self.segment].rows.max_rows, self.attend.shape.seqs * self.attend.shape.kv_heads);
        if cut.score_stride < rows || cut.score_stride > 1 << 40 {
            return invalid("score_stride", format!("{} for {rows} rows", cut.score_stride));
        }
        let scores = if heads == 0 { 0 } else { (heads - 1) * cut.score_stride + rows };
        within("scores", &cut.scores, 4 * scores, 4)?;
        within("cuts", &cut.cuts, 8 * heads, 8)?;
        let (scores, cuts, score_stride) = (cut.scores.address(), cut.cuts.address(), cut.score_stride as i64);
        Ok(abi::KvlarAttendCut { attend, scores, cuts, score_stride, ..self.bare_params() })
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0.
    pub fn bare_params(&self) -> abi::KvlarAttendCut {
        abi::KvlarAttendCut {
            attend: self.attend.bare_params(),
            segment: self.segment as u32,
            sink_rows: self.sink_rows as u32,
            recent_rows: self.recent_rows as u32,
            ..bytemuck::Zeroable::zeroed()
        }
    }
}
