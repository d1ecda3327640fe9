//! Plans and launches of attention.

use super::tiling::Tiling;
use super::work::{BuiltFor, PositionSources, work_list_bytes};
use super::{AttendShape, SegmentShape, WorkList};
use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::workspace::WorkspaceSize;
use crate::{Device, Error, Memory, Pool, Result, Rows, Stream, Strides, Tables, View, ViewMut, Workspace, abi};

/// A validated attention. `Copy`, holds no handles; reusable across layers, steps and graph replays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttendPlan {
    pub(super) shape: AttendShape,
    pub(super) tiling: Tiling,
    pub(super) launch: Launch,
    pub(super) query_tiles: usize,
    /// (sequence, kv head, query tile)s.
    pub(super) units: usize,
    /// Partial results that may be in flight.
    pub(super) slots: usize,
    pub(super) own_cell_tiles: usize,
    /// Tiles of a warp's ring, and bytes of each.
    pub(super) stages: usize,
    pub(super) stage_bytes: usize,
    /// A segment of quantized rows, if there are any: all have its formats.
    pub(super) quantized: Option<SegmentShape>,
}

/// Rows of one storage format, as [`super::SegmentShape`] says.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Which rows; lengths are required.
    pub rows: Rows<'a>,
    /// Their keys.
    pub keys: Pool<View<'a>>,
    /// Their values.
    pub values: Pool<View<'a>>,
    /// Of fp8 rows.
    pub tables: Tables<'a>,
}

/// Arguments of [`AttendPlan::launch`].
#[derive(Debug)]
pub struct AttendArgs<'a> {
    /// `[B, Hq, S, d]`, rotated.
    pub q: View<'a>,
    /// `None`: dense, as above.
    pub q_strides: Option<Strides>,
    /// `[B, Hq, S, dv]`.
    pub out: ViewMut<'a>,
    /// `None`: dense, as above.
    pub out_strides: Option<Strides>,
    /// f32 `[B, Hq, S]`: ln Σ exp(logit).
    pub lse: Option<ViewMut<'a>>,
    /// As many as the shape has.
    pub segments: &'a [Segment<'a>],
    /// i32 `[B, S]`; `None`: the positions of the last S rows.
    pub q_positions: Option<View<'a>>,
    /// f32 `[Hq]`: an extra logit in the denominator.
    pub sink_logits: Option<View<'a>>,
}

impl AttendArgs<'_> {
    /// What says where rows and queries are: tiles that no query can see were left out accordingly.
    pub(crate) fn position_sources(&self) -> PositionSources {
        let stored = self.segments.iter().enumerate().filter(|(_, s)| s.rows.positions.is_some());
        PositionSources { stored: stored.fold(0, |bits, (i, _)| bits | 1 << i), queries: self.q_positions.is_some() }
    }
}

/// Makes a work list.
pub(crate) const SCHEDULE: Launch = Launch { entry: "kvlar_attend_schedule", grid: 1, block: 1024, shared_bytes: 0 };

impl AttendPlan {
    /// What it was made from.
    pub fn shape(&self) -> &AttendShape {
        &self.shape
    }

    /// The kernel's entry point.
    pub fn entry(&self) -> &'static str {
        self.launch.entry
    }

    /// Scratch that launches need.
    pub fn workspace(&self) -> WorkspaceSize {
        let columns = self.tiling.columns;
        WorkspaceSize { zeroed: 4 * self.units, scratch: 4 * self.slots * columns * (self.shape.value_dim + 2) }
    }

    /// Bytes of a work list.
    pub fn work_list_bytes(&self) -> usize {
        work_list_bytes(abi::KVLAR_WORK_RECORD, self.launch.grid, self.units)
    }

    /// Memory for a work list of this plan.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn work_list(&self, device: &Device) -> Result<WorkList> {
        WorkList::new(device, self.work_list_bytes())
    }

    /// Enqueues the making of the work list from the lengths (and positions) of `args`: once a step, before the launches
    /// of all layers that have these lengths.
    ///
    /// # Errors
    /// Those of [`AttendPlan::launch`].
    pub fn schedule(&self, stream: &Stream, args: &AttendArgs<'_>, work: &mut WorkList, workspace: &mut Workspace) -> Result<()> {
        let params = self.params(args, work, workspace)?;
        if self.units > 0 {
            // SAFETY: every address was checked against the shape.
            unsafe { stream.enqueue(SCHEDULE, &params)? };
        }
        work.built_for = Some(BuiltFor::Attend(*self, args.position_sources()));
        Ok(())
    }

    /// Enqueues one launch. Lengths, stored positions and query positions must be those that the work list was built from.
    ///
    /// # Errors
    /// [`Error::Bounds`], [`Error::Alignment`], [`Error::Invalid`] for arguments that do not fit the plan;
    /// [`Error::Mismatch`] for a work list that was not built for it.
    pub fn launch(&self, stream: &Stream, args: &mut AttendArgs<'_>, work: &WorkList, workspace: &mut Workspace) -> Result<()> {
        if work.built_for != Some(BuiltFor::Attend(*self, args.position_sources())) {
            return Err(Error::Mismatch { arg: "work list", what: "plan (call schedule first)" });
        }
        let params = self.params(args, work, workspace)?;
        if self.units == 0 {
            return Ok(());
        }
        // SAFETY: every address was checked against the shape.
        unsafe { stream.enqueue(self.launch, &params) }
    }

    /// Enqueues [`AttendPlan::schedule`] with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`AttendPlan::bare_params`] fills in all that is not an address or a stride), and its
    /// addresses are valid on the stream's device until the launch has run.
    pub unsafe fn schedule_raw(&self, stream: &Stream, params: &abi::KvlarAttend) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.units == 0 { Ok(()) } else { unsafe { stream.enqueue(SCHEDULE, params) } }
    }

    /// Enqueues [`AttendPlan::launch`] with the caller's own parameter struct.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// As for [`AttendPlan::schedule_raw`]; the work list was built by it from the same lengths and positions.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarAttend) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.units == 0 { Ok(()) } else { unsafe { stream.enqueue(self.launch, params) } }
    }

    /// Checks the arguments and gives the kernel's parameter struct.
    ///
    /// # Errors
    /// Those of [`AttendPlan::launch`].
    pub fn params(&self, args: &AttendArgs<'_>, work: &WorkList, workspace: &Workspace) -> Result<abi::KvlarAttend> {
        let s = &self.shape;
        work.fits(self.work_list_bytes())?;
        let scratch = workspace.scratch(self.workspace())?;
        let mut params = self.bare_params();
        s.fill(args, &mut params)?;
        for ((segment, shape), to) in args.segments.iter().zip(s.segments()).zip(&mut params.segments) {
            s.segment(segment, shape, to)?;
        }
        params.work = work.address();
        params.partials = scratch.scratch;
        params.counters = scratch.zeroed;
        params.status = scratch.status;
        Ok(params)
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0.
    pub fn bare_params(&self) -> abi::KvlarAttend {
        let mut params = self.shape.bare_params();
        params.query_tiles = self.query_tiles as u32;
        params.slots = self.slots as u32;
        params.own_cell_tiles = self.own_cell_tiles as u32;
        params.ctas = self.launch.grid;
        params.columns = self.tiling.columns as u32;
        params.units = self.units as u32;
        params.stages = self.stages as u32;
        params.stage_bytes = self.stage_bytes as u32;
        params.q_dtype = self.shape.dtype.abi();
        if let Some(quantized) = self.quantized {
            params.key_codec = quantized.keys.codec.abi();
            params.value_codec = quantized.values.codec.abi();
            params.rotated_keys = quantized.keys.hadamard.into();
            params.int8_queries = self.shape.int8_queries.into();
        }
        for (segment, to) in self.shape.segments().zip(&mut params.segments) {
            let stage = self.tiling.stage(&segment);
            to.tile_rows = self.tiling.tile_rows(&segment) as u32;
            to.stage_values = stage.values as u32;
            to.stage_key_params = stage.key_params as u32;
            to.stage_value_params = stage.value_params as u32;
            to.stage_positions = stage.positions as u32;
        }
        params
    }
}

/// What plans of dense and of low-rank attention share.
impl AttendShape {
    /// The part of the parameter struct that is the shape's.
    pub(crate) fn bare_params(&self) -> abi::KvlarAttend {
        let mut params = abi::KvlarAttend {
            scale: self.scale,
            softcap: self.softcap,
            window: self.window as i32,
            segment_count: self.segments().count() as u32,
            seqs: self.seqs as u32,
            kv_heads: self.kv_heads as u32,
            group: self.group() as u32,
            query_rows: self.query_rows as u32,
            head_dim: self.head_dim as u32,
            value_dim: self.value_dim as u32,
            out_dtype: self.out_dtype.abi(),
            ..bytemuck::Zeroable::zeroed()
        };
        for (segment, to) in self.segments().zip(&mut params.segments) {
            to.key_format = segment.keys.abi(self.head_dim, 0);
            to.value_format = segment.values.abi(self.value_dim, 0);
        }
        params
    }

    /// Checks everything but segments, and fills in its addresses and strides.
    pub(crate) fn fill(&self, args: &AttendArgs<'_>, params: &mut abi::KvlarAttend) -> Result<()> {
        let q = args.q_strides.unwrap_or(Strides::heads_first(self.q_heads, self.query_rows, self.head_dim));
        let out = args.out_strides.unwrap_or(Strides::heads_first(self.q_heads, self.query_rows, self.value_dim));
        q.check("q", &args.q, self.dtype, [self.seqs, self.q_heads, self.query_rows, self.head_dim])?;
        out.check("out", &args.out, self.out_dtype, [self.seqs, self.q_heads, self.query_rows, self.value_dim])?;
        if let Some(lse) = &args.lse {
            within("lse", lse, 4 * self.seqs * self.q_heads * self.query_rows, 4)?;
        }
        if let Some(positions) = &args.q_positions {
            within("q_positions", positions, 4 * self.seqs * self.query_rows, 4)?;
        }
        if let Some(sinks) = &args.sink_logits {
            within("sink_logits", sinks, 4 * self.q_heads, 4)?;
        }
        if args.segments.len() != self.segments().count() {
            return invalid("segments", format!("{} instead of {}", args.segments.len(), self.segments().count()));
        }
        params.q = args.q.address();
        (params.q_seq_stride, params.q_head_stride, params.q_row_stride) = q.abi();
        params.out = args.out.address();
        (params.out_seq_stride, params.out_head_stride, params.out_row_stride) = out.abi();
        params.lse = args.lse.as_ref().map_or(0, Memory::address);
        params.q_positions = args.q_positions.map_or(0, |x| x.address());
        params.sink_logits = args.sink_logits.map_or(0, |x| x.address());
        Ok(())
    }

    /// Checks a segment of rows of each kv head.
    pub(crate) fn segment(&self, from: &Segment<'_>, shape: SegmentShape, to: &mut abi::KvlarSegment) -> Result<()> {
        if from.rows.lengths.is_none() {
            return invalid("rows", "attend needs lengths");
        }
        if from.rows.max_rows > shape.max_rows {
            return invalid("rows", format!("{} rows in a segment planned for {}", from.rows.max_rows, shape.max_rows));
        }
        from.rows.check("rows", self.seqs, (self.kv_heads, self.kv_heads), from.keys.page_count.min(from.values.page_count))?;
        from.keys.check("keys", &from.rows, self.seqs, self.kv_heads, shape.keys.stored(self.head_dim))?;
        from.values.check("values", &from.rows, self.seqs, self.kv_heads, shape.values.stored(self.value_dim))?;
        to.rows = from.rows.abi();
        to.keys = from.keys.abi();
        to.values = from.values.abi();
        [to.key_format.tables, to.value_format.tables] =
            from.tables.addresses(self.kv_heads, [(shape.keys, self.head_dim), (shape.values, self.value_dim)])?;
        Ok(())
    }
}
