//! Plans and launches of scans.

use super::kernel::{Kernel, Way};
use super::{SCORE_BINS, ScanShape};
use crate::attend::{SCHEDULE, work_list_bytes};
use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::workspace::WorkspaceSize;
use crate::{
    Device, Error, Memory, Pool, ReducePlan, Reduction, Result, Rows, Stream, Strides, Tables, View, ViewMut, WorkList,
    Workspace, abi,
};

/// A validated scan. `Copy`, holds no handles; reusable across layers, steps and graph replays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScanPlan {
    pub(super) shape: ScanShape,
    pub(super) kernel: Kernel,
    pub(super) grid: u32,
    /// Tiles of query heads a kv head.
    pub(super) query_tiles: usize,
    /// (sequence, kv head, query tile)s.
    pub(super) units: usize,
    /// Partial results that may be in flight.
    pub(super) slots: usize,
    pub(super) own_cell_tiles: usize,
    /// A second launch, which makes scores of logits.
    pub(super) reduce: Option<ReducePlan>,
}

/// Arguments of [`ScanPlan::launch`].
#[derive(Debug)]
pub struct ScanArgs<'a> {
    /// `[B, Hq, d]`, rotated.
    pub q: View<'a>,
    /// Of `[B, Hq, 1, d]`; `None`: dense, as above.
    pub q_strides: Option<Strides>,
    /// Which rows; lengths are required, positions are not read.
    pub rows: Rows<'a>,
    /// Their keys.
    pub keys: Pool<View<'a>>,
    /// Scales of fp8 rows, codebooks of pq rows: as [`Tables`] says.
    pub tables: Option<View<'a>>,
    /// f32 `[B, Hk, T]`, in the order of NaN < −∞ < finite.
    pub scores: Option<ViewMut<'a>>,
    /// f32 `[B, Hq, T]`: there as the shape says.
    pub logits: Option<ViewMut<'a>>,
    /// f32 `[B, Hq]`: ln Σ exp(logit) over the rows held.
    pub lse: Option<ViewMut<'a>>,
    /// u32 `[B, Hk, SCORE_BINS]`: how many scores of rows held are in each bin; there as the shape says, with `scores`.
    pub histogram: Option<ViewMut<'a>>,
}

/// Both parameter structs of a scan.
#[derive(Clone, Copy, Debug)]
struct Both {
    scan: abi::KvlarScan,
    reduce: Option<abi::KvlarReduce>,
}

/// Bytes of the parts of a workspace.
struct Parts {
    counters: usize,
    reduce: WorkspaceSize,
    counts: usize,
    partials: usize,
    logits: usize,
    lse: usize,
}

impl ScanPlan {
    /// What it was made from.
    pub fn shape(&self) -> &ScanShape {
        &self.shape
    }

    /// The kernel's entry point.
    pub fn entry(&self) -> &'static str {
        self.kernel.entry
    }

    /// Launches of one [`ScanPlan::launch`]: 2 where scores need the lse of all rows, or a group has more heads than a tile.
    pub fn launches(&self) -> usize {
        1 + usize::from(self.reduce.is_some())
    }

    fn parts(&self) -> Parts {
        let s = &self.shape;
        let (heads, queries) = (s.seqs * s.kv_heads, s.seqs * s.q_heads);
        let reduced = self.reduce.is_some();
        Parts {
            counters: 4 * self.units,
            reduce: self.reduce.map_or(WorkspaceSize::default(), |r| r.workspace()),
            counts: if s.histogram && !reduced { 4 * SCORE_BINS * heads } else { 0 },
            partials: 8 * self.slots * self.kernel.columns,
            logits: if reduced && !s.logits { 4 * queries * s.rows } else { 0 },
            lse: if reduced { 4 * queries } else { 0 },
        }
    }

    /// Scratch that launches need: where there is a second launch, room for the logits too, unless they are an output.
    pub fn workspace(&self) -> WorkspaceSize {
        let p = self.parts();
        WorkspaceSize { zeroed: p.counters + p.reduce.zeroed + p.counts, scratch: p.partials + p.logits + p.lse }
    }

    /// Bytes of a work list.
    pub fn work_list_bytes(&self) -> usize {
        work_list_bytes(abi::KVLAR_WORK_RECORD, self.grid, self.units)
    }

    /// Memory for a work list of this plan.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn work_list(&self, device: &Device) -> Result<WorkList> {
        WorkList::new(device, self.work_list_bytes())
    }

    /// Enqueues the making of the work list from the lengths of `args`: once a step, before the launches of all layers that
    /// have these lengths.
    ///
    /// # Errors
    /// Those of [`ScanPlan::launch`].
    pub fn schedule(&self, stream: &Stream, args: &ScanArgs<'_>, work: &mut WorkList, workspace: &mut Workspace) -> Result<()> {
        let params = self.params(args, work, workspace)?.scan;
        if self.units > 0 {
            // SAFETY: every address was checked against the shape.
            unsafe { stream.enqueue(SCHEDULE, &params.attend)? };
        }
        work.built_for_scan(*self);
        Ok(())
    }

    /// Enqueues one launch or two. Lengths must be those that the work list was built from.
    ///
    /// # Errors
    /// [`Error::Bounds`], [`Error::Alignment`], [`Error::Invalid`] for arguments that do not fit the plan;
    /// [`Error::Mismatch`] for a work list that was not built for it.
    pub fn launch(&self, stream: &Stream, args: &mut ScanArgs<'_>, work: &WorkList, workspace: &mut Workspace) -> Result<()> {
        self.launch_with(stream, args, work, workspace, abi::KvlarTopk::default())
    }

    /// A launch that also finds cuts, if `select` has any.
    pub(super) fn launch_with(
        &self,
        stream: &Stream,
        args: &mut ScanArgs<'_>,
        work: &WorkList,
        workspace: &mut Workspace,
        select: abi::KvlarTopk,
    ) -> Result<()> {
        if !work.is_built_for_scan(self) {
            return Err(Error::Mismatch { arg: "work list", what: "plan (call schedule first)" });
        }
        let mut params = self.params(args, work, workspace)?;
        if self.units == 0 {
            return Ok(());
        }
        params.scan.select = select;
        // SAFETY: every address was checked against the shape.
        unsafe {
            self.launch_raw(stream, &params.scan)?;
            match (self.reduce, params.reduce) {
                (Some(plan), Some(params)) => plan.launch_raw(stream, &params),
                _ => Ok(()),
            }
        }
    }

    /// Enqueues [`ScanPlan::schedule`] with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`ScanPlan::bare_params`] fills in all that is not an address or a stride), and its
    /// addresses are valid on the stream's device until the launch has run.
    pub unsafe fn schedule_raw(&self, stream: &Stream, params: &abi::KvlarScan) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.units == 0 { Ok(()) } else { unsafe { stream.enqueue(SCHEDULE, &params.attend) } }
    }

    /// Enqueues the scan with the caller's own parameter struct; a second launch ([`ScanPlan::launches`]) is
    /// [`ReducePlan::launch_raw`], over its logits and lse.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// As for [`ScanPlan::schedule_raw`]; the work list was built by it from the same lengths.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarScan) -> Result<()> {
        if self.units == 0 {
            return Ok(());
        }
        let Kernel { entry, warps, shared, .. } = self.kernel;
        let launch = Launch { entry, grid: self.grid, block: 32 * warps as u32, shared_bytes: shared.bytes as u32 };
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(launch, params) }
    }

    fn params(&self, args: &ScanArgs<'_>, work: &WorkList, workspace: &Workspace) -> Result<Both> {
        let s = &self.shape;
        work.fits(self.work_list_bytes())?;
        let scratch = workspace.scratch(self.workspace())?;
        self.check(args)?;
        let parts = self.parts();
        let address = |x: &Option<ViewMut<'_>>| x.as_ref().map_or(0, Memory::address);
        let q = args.q_strides.unwrap_or(Strides::heads_first(s.q_heads, 1, s.head_dim));
        let tables = Tables { keys: args.tables, values: args.tables };
        let mut scan = self.bare_params();
        let segment = &mut scan.attend.segments[0];
        segment.rows = Rows { positions: None, ..args.rows }.abi();
        segment.keys = args.keys.abi();
        [segment.key_format.tables, _] = tables.addresses(s.kv_heads, [(s.keys, s.head_dim); 2])?;
        scan.attend.q = args.q.address();
        (scan.attend.q_seq_stride, scan.attend.q_head_stride, scan.attend.q_row_stride) = q.abi();
        scan.attend.lse = address(&args.lse);
        scan.attend.work = work.address();
        scan.attend.partials = scratch.scratch;
        scan.attend.counters = scratch.zeroed;
        scan.attend.status = scratch.status;
        scan.logits = address(&args.logits);
        scan.scores = address(&args.scores);
        let Some(plan) = &self.reduce else {
            scan.histogram = address(&args.histogram);
            scan.counts = scratch.zeroed + parts.counters as u64;
            return Ok(Both { scan, reduce: None });
        };
        if scan.scores == 0 {
            return Ok(Both { scan, reduce: None });
        }
        scan.scores = 0;
        if scan.logits == 0 {
            scan.fill = 0; // nobody reads scratch beyond a length
            scan.logits = scratch.scratch + parts.partials as u64;
        }
        if scan.attend.lse == 0 && s.scores == Some(Reduction::MaxProb) {
            scan.attend.lse = scratch.scratch + (parts.partials + parts.logits) as u64;
        }
        let rows = &scan.attend.segments[0].rows;
        let reduce = abi::KvlarReduce {
            logits: scan.logits,
            lse: scan.attend.lse,
            scores: address(&args.scores),
            histogram: address(&args.histogram),
            lengths: rows.lengths,
            length_seq_stride: rows.length_seq_stride,
            length_head_stride: rows.length_head_stride,
            ..plan.with_scratch(scratch.zeroed + parts.counters as u64)
        };
        Ok(Both { scan, reduce: Some(reduce) })
    }

    /// Everything but the tables.
    fn check(&self, args: &ScanArgs<'_>) -> Result<()> {
        let s = &self.shape;
        let q = args.q_strides.unwrap_or(Strides::heads_first(s.q_heads, 1, s.head_dim));
        q.check("q", &args.q, s.dtype, [s.seqs, s.q_heads, 1, s.head_dim])?;
        if args.rows.lengths.is_none() {
            return invalid("rows", "scan needs lengths");
        }
        if args.rows.max_rows > s.rows {
            return invalid("rows", format!("{} rows in a scan planned for {}", args.rows.max_rows, s.rows));
        }
        let rows = Rows { positions: None, ..args.rows };
        rows.check("rows", s.seqs, (s.kv_heads, s.kv_heads), args.keys.page_count)?;
        args.keys.check("keys", &args.rows, s.seqs, s.kv_heads, s.keys.stored(s.head_dim))?;
        let given = [
            ("scores", &args.scores, s.scores.is_some(), s.seqs * s.kv_heads * s.rows),
            ("logits", &args.logits, s.logits, s.seqs * s.q_heads * s.rows),
            ("lse", &args.lse, true, s.seqs * s.q_heads),
            ("histogram", &args.histogram, s.histogram, s.seqs * s.kv_heads * SCORE_BINS),
        ];
        for (arg, memory, planned, elements) in given {
            match memory {
                Some(_) if !planned => return invalid(arg, "the shape has none"),
                Some(memory) => within(arg, memory, 4 * elements, 4)?,
                None if arg == "logits" && planned => return invalid(arg, "the shape has them"),
                None => {}
            }
        }
        if args.histogram.is_some() && args.scores.is_none() {
            return invalid("histogram", "there are no scores to count");
        }
        Ok(())
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0.
    pub fn bare_params(&self) -> abi::KvlarScan {
        let (s, k) = (&self.shape, &self.kernel);
        let mut attend = abi::KvlarAttend {
            scale: s.scale,
            segment_count: 1,
            seqs: s.seqs as u32,
            kv_heads: s.kv_heads as u32,
            group: s.group() as u32,
            query_rows: 1,
            head_dim: s.head_dim as u32,
            query_tiles: self.query_tiles as u32,
            slots: self.slots as u32,
            own_cell_tiles: self.own_cell_tiles as u32,
            ctas: self.grid,
            columns: k.columns as u32,
            units: self.units as u32,
            stages: k.stages as u32,
            stage_bytes: k.stage_bytes as u32,
            q_dtype: s.dtype.abi(),
            key_codec: s.keys.codec.abi(),
            rotated_keys: s.keys.hadamard.into(),
            ..bytemuck::Zeroable::zeroed()
        };
        attend.segments[0].key_format = s.keys.abi(s.head_dim, 0);
        attend.segments[0].tile_rows = k.tile_rows as u32;
        attend.segments[0].stage_key_params = k.stage_params as u32;
        abi::KvlarScan {
            attend,
            row_count: s.rows as u32,
            method: method(s.scores.unwrap_or(Reduction::MaxLogit)),
            fill: s.fill.into(),
            shared_bins: k.shared.bins as u32,
            shared_tables: k.shared.tables as u32,
            shared_queries: k.shared.queries as u32,
            code_log: k.code_log as u32,
            table_heads: if let Way::Tables(heads) = k.way { heads as u32 } else { 0 },
            ..bytemuck::Zeroable::zeroed()
        }
    }
}

/// As kernels know it.
pub(crate) fn method(reduction: Reduction) -> u32 {
    match reduction {
        Reduction::MeanLogit => abi::KVLAR_SCORE_MEAN_LOGIT,
        Reduction::MaxLogit => abi::KVLAR_SCORE_MAX_LOGIT,
        Reduction::MaxProb => abi::KVLAR_SCORE_MAX_PROB,
    }
}
