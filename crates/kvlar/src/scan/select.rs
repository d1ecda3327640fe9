//! Scans that also select: scores, and the cut of each (sequence, kv head), in one launch where that can be.

use super::{ScanArgs, ScanPlan, ScanShape};
use crate::error::invalid;
use crate::paged::within;
use crate::select::ROW_OF_A_CTA;
use crate::{Device, Ks, Memory, Result, Rows, Stream, TopkPlan, TopkShape, ViewMut, WorkList, Workspace, WorkspaceSize, abi};

/// What [`ScanSelectPlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScanSelectShape {
    /// The scan; it has scores.
    pub scan: ScanShape,
    /// How many rows of each (sequence, kv head) are kept at most, sinks and recent rows counted.
    pub k: usize,
    /// First rows, which are always kept.
    pub sink_rows: usize,
    /// Last rows of a length, which are always kept.
    pub recent_rows: usize,
}

/// A validated scan with a selection. `Copy`, holds no handles; reusable across layers, steps and graph replays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScanSelectPlan {
    scan: ScanPlan,
    topk: TopkPlan,
    /// Whether the scan finds the cuts.
    fused: bool,
}

/// What [`ScanSelectPlan::launch`] takes beside the scan's arguments.
#[derive(Debug)]
pub struct SelectArgs<'a> {
    /// How many are kept, of all or of each (sequence, kv head); `None`: the shape's k, which is the most.
    pub ks: Option<Ks<'a>>,
    /// u64 `[B, Hk]`: the cut of each, as [`TopkPlan`] finds it in the scores.
    pub cuts: ViewMut<'a>,
}

impl ScanSelectShape {
    /// The `k` best rows of each kv head.
    pub fn new(scan: ScanShape, k: usize) -> Self {
        Self { scan, k, sink_rows: 0, recent_rows: 0 }
    }

    /// Validates, and picks the kernels.
    ///
    /// # Errors
    /// Those of [`ScanShape::plan`] and [`TopkShape::plan`]; [`crate::Error::Invalid`] for a scan without scores.
    pub fn plan(&self, device: &Device) -> Result<ScanSelectPlan> {
        if self.scan.scores.is_none() {
            return invalid("scan", "there are no scores to select by");
        }
        let (sink_rows, recent_rows, heads) = (self.sink_rows, self.recent_rows, self.scan.seqs * self.scan.kv_heads);
        let topk = TopkShape { sink_rows, recent_rows, ..TopkShape::new(heads, self.scan.rows, self.k) }.plan(device)?;
        // A cut is read off the histogram, whether or not that is an output.
        let counting = ScanShape { histogram: true, ..self.scan }.plan(device)?;
        let fused = counting.reduce.is_none() && self.scan.rows <= ROW_OF_A_CTA;
        Ok(ScanSelectPlan { scan: if fused { counting } else { self.scan.plan(device)? }, topk, fused })
    }
}

impl ScanSelectPlan {
    /// The scan, which makes the work list ([`ScanPlan::work_list`], [`ScanPlan::schedule`]).
    pub fn scan(&self) -> &ScanPlan {
        &self.scan
    }

    /// Whether one launch does it all: scores are not made of logits, and there are up to 32K rows.
    pub fn is_one_launch(&self) -> bool {
        self.fused
    }

    /// Scratch that launches need.
    pub fn workspace(&self) -> WorkspaceSize {
        if self.fused { self.scan.workspace() } else { self.scan.workspace().max(self.topk.workspace()) }
    }

    /// Enqueues the scan and the selection. Lengths must be those that the work list was built from.
    ///
    /// # Errors
    /// As [`ScanPlan::launch`]; [`crate::Error::Bounds`] and [`crate::Error::Alignment`] for cuts or ks that do not fit the plan;
    /// [`crate::Error::Invalid`] without scores, and in several launches for lengths that are neither `[B]` nor `[B, Hk]`.
    pub fn launch(
        &self,
        stream: &Stream,
        scan: &mut ScanArgs<'_>,
        select: &mut SelectArgs<'_>,
        work: &WorkList,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let heads = self.topk.shape().batch;
        within("cuts", &select.cuts, 8 * heads, 8)?;
        let (ks, k_stride) = Ks::checked(&select.ks, heads)?;
        let Some(scores) = scan.scores.as_ref().map(Memory::address) else {
            return invalid("scores", "the selection needs them");
        };
        let mut params = abi::KvlarTopk { scores, ks, k_stride, cuts: select.cuts.address(), ..self.topk.bare_params() };
        if self.fused {
            return self.scan.launch_with(stream, scan, work, workspace, params);
        }
        params.length_rows = self.length_rows(&scan.rows)? as u32;
        params.lengths = scan.rows.lengths.map_or(0, |x| x.address());
        params.histogram = scan.histogram.as_ref().map_or(0, Memory::address);
        let scratch = workspace.scratch(self.workspace())?;
        self.topk.put_scratch(&mut params, (scratch.zeroed, scratch.scratch));
        self.scan.launch(stream, scan, work, workspace)?;
        // SAFETY: every address was checked against the shape, by the scan or above.
        unsafe { self.topk.launch_raw(stream, &params) }
    }

    /// Heads that share a length.
    fn length_rows(&self, rows: &Rows<'_>) -> Result<usize> {
        let heads = self.scan.shape.kv_heads;
        match (rows.length_seq_stride, rows.length_head_stride) {
            (1, 0) => Ok(heads),
            (seq, 1) if seq == heads => Ok(1),
            _ if self.topk.shape().batch <= 1 => Ok(1),
            (seq, head) => invalid("lengths", format!("strides of {seq} and {head}: here they are [B] or [B, Hk]")),
        }
    }
}
