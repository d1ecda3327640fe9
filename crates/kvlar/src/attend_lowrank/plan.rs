//! Plans and launches of low-rank attention.

use super::layout::Layout;
use super::sets::HeadSets;
use super::shape::{Latents, LowrankShape, LowrankValues};
use super::tiling::Tiling;
use crate::attend::work_list_bytes;
use crate::device::Launch;
use crate::error::invalid;
use crate::paged::within;
use crate::workspace::WorkspaceSize;
use crate::{
    AttendArgs, Codec, Device, Error, Format, Memory, Result, Rope, Segment, Stored, Stream, View, WorkList, Workspace, abi,
};

/// A validated low-rank attention. `Copy`, holds no handles; reusable across layers of its shape, steps and graph replays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowrankPlan {
    pub(super) shape: LowrankShape,
    pub(super) tiling: Tiling,
    pub(super) launch: Launch,
    pub(super) layout: Layout,
    pub(super) slices: usize,
    pub(super) slice_width: usize,
    pub(super) query_tiles: usize,
    pub(super) units: usize,
    pub(super) slots: usize,
    pub(super) own_cell_tiles: usize,
}

/// What a work list depends on: layers of other ranks may share it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ScheduleKey {
    units: usize,
    query_tiles: usize,
    columns: usize,
    heads_per_tile: usize,
    slices: usize,
    own_cell_tiles: usize,
    ctas: u32,
    /// How many, and which sizes.
    sets: (usize, u64),
    heads: (usize, usize, usize),
    window: u32,
    segments: [Option<(usize, bool)>; crate::MAX_SEGMENTS],
}

/// The matrices that make keys and values of latents.
#[derive(Clone, Copy, Debug)]
pub struct Bases<'a> {
    /// `[Hk, d, rk]` (or `[B, Hk, d, rk]`): the type of q; f16 for [`Latents::Int8`] and [`Latents::Int4`]; i8 for [`Latents::Int8Basis`].
    pub keys: View<'a>,
    /// Whether each sequence has its own.
    pub keys_per_seq: bool,
    /// f32 `[Hk, padded d / 2]` (or a sequence each): a scale a rotary pair, for [`Latents::Int8Basis`] alone. Where there is a
    /// mean, a pair's must be above its largest |mean| / 2^22 (f16 holds keys divided by 128 times it); 0 loses the mean.
    pub key_scales: Option<View<'a>>,
    /// f32 `[Hk, d]`; as the shape says.
    pub key_mean: Option<View<'a>>,
    /// `[Hk, dv, rv]` (or `[B, Hk, dv, rv]`), the type of q; `None` for dense values.
    pub values: Option<View<'a>>,
    /// Whether each sequence has its own.
    pub values_per_seq: bool,
}

/// Arguments of [`LowrankPlan::launch`].
#[derive(Debug)]
pub struct LowrankArgs<'a> {
    /// As for dense attention. In latent segments, `keys` and `values` are pools of latents whose heads are latent groups
    /// (dense values: kv heads); tables and positions are indexed by key group, lengths by kv head. Heads of a group may
    /// hold different numbers of latent rows, but the same number in segments before them (unless positions are stored;
    /// reported as a bad length otherwise). Rows and bases of the heads of a set must be finite: heads share tiles, and a
    /// NaN or infinity of one reaches the others.
    pub attend: AttendArgs<'a>,
    /// Bases and mean.
    pub bases: Bases<'a>,
    /// How rebuilt keys are rotated; `None`: not at all.
    pub rope: Option<Rope<'a>>,
    /// Which heads read which latents.
    pub sets: &'a HeadSets,
}

const SCHEDULE: Launch = Launch { entry: "kvlar_attend_lowrank_schedule", grid: 1, block: 1024, shared_bytes: 0 };

impl LowrankPlan {
    /// What it was made from.
    pub fn shape(&self) -> &LowrankShape {
        &self.shape
    }

    /// The kernel's entry point.
    pub fn entry(&self) -> &'static str {
        self.launch.entry
    }

    /// Whether bases are resident in shared memory, kv heads that a CTA serves at a time, and its warps.
    pub fn residency(&self) -> (bool, usize, usize) {
        (self.layout.shared.resident != 0, self.layout.heads_per_tile, self.layout.shared.warp_count as usize)
    }

    fn latent_width(&self) -> usize {
        if self.shape.value_rank() > 0 { self.shape.value_rank() } else { self.shape.attend.value_dim }
    }

    /// Scratch that launches need.
    pub fn workspace(&self) -> WorkspaceSize {
        let width = self.shape.attend.value_dim + self.latent_width() + 2 * (1 + self.slices);
        WorkspaceSize { zeroed: 4 * self.units, scratch: 4 * self.slots * self.tiling.columns * width }
    }

    /// Bytes of a work list.
    pub fn work_list_bytes(&self) -> usize {
        work_list_bytes(abi::KVLAR_LOWRANK_WORK_RECORD, self.launch.grid, self.units)
    }

    /// Memory for a work list of this plan.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn work_list(&self, device: &Device) -> Result<WorkList> {
        WorkList::new(device, self.work_list_bytes())
    }

    /// Whether a layer of the other plan may use this one's work list: they differ in ranks and in which heads a set has, not in how many.
    pub fn shares_work_list(&self, other: &Self) -> bool {
        self.schedule_key() == other.schedule_key()
    }

    pub(crate) fn schedule_key(&self) -> ScheduleKey {
        let a = &self.shape.attend;
        let mut segments = [None; crate::MAX_SEGMENTS];
        for (to, (from, latent)) in segments.iter_mut().zip(a.segments.iter().zip(self.shape.latent_segments)) {
            *to = from.map(|s| (s.max_rows, latent));
        }
        ScheduleKey {
            units: self.units,
            query_tiles: self.query_tiles,
            columns: self.tiling.columns,
            heads_per_tile: self.layout.heads_per_tile,
            slices: self.slices,
            own_cell_tiles: self.own_cell_tiles,
            ctas: self.launch.grid,
            sets: (self.shape.sets.count, self.shape.sets.sizes_hash),
            heads: (a.q_heads, a.kv_heads, a.query_rows),
            window: a.window,
            segments,
        }
    }

    /// Enqueues the making of the work list from the lengths (and positions) of `args`: once a step. Layers whose plans
    /// differ in ranks, bases and groups alone may share it, if all heads of a sequence hold the same rows.
    ///
    /// # Errors
    /// Those of [`LowrankPlan::launch`].
    pub fn schedule(
        &self,
        stream: &Stream,
        args: &LowrankArgs<'_>,
        work: &mut WorkList,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let params = self.params(args, work, workspace)?;
        // SAFETY: every address was checked against the shape.
        unsafe { self.schedule_raw(stream, &params)? };
        work.built_for_lowrank(self.schedule_key(), args.attend.position_sources());
        Ok(())
    }

    /// Enqueues one launch. Lengths, stored positions and query positions must be those that the work list was built from.
    ///
    /// # Errors
    /// [`Error::Bounds`], [`Error::Alignment`], [`Error::Invalid`] for arguments that do not fit the plan;
    /// [`Error::Mismatch`] for a work list that was not built for it.
    pub fn launch(&self, stream: &Stream, args: &mut LowrankArgs<'_>, work: &WorkList, workspace: &mut Workspace) -> Result<()> {
        if !work.is_built_for_lowrank(self.schedule_key(), args.attend.position_sources()) {
            return Err(Error::Mismatch { arg: "work list", what: "plan (call schedule first)" });
        }
        let params = self.params(args, work, workspace)?;
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// Enqueues [`LowrankPlan::schedule`] with the caller's own parameter struct, for engines with their own tensors.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`LowrankPlan::bare_params`] fills in all that is not an address or a stride), and
    /// its addresses are valid on the stream's device until the launch has run.
    pub unsafe fn schedule_raw(&self, stream: &Stream, params: &abi::KvlarAttendLowrank) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.units == 0 { Ok(()) } else { unsafe { stream.enqueue(SCHEDULE, params) } }
    }

    /// Enqueues [`LowrankPlan::launch`] with the caller's own parameter struct.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// As for [`LowrankPlan::schedule_raw`]; the work list was built by it from the same lengths and positions.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarAttendLowrank) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.units == 0 { Ok(()) } else { unsafe { stream.enqueue(self.launch, params) } }
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0.
    pub fn bare_params(&self) -> abi::KvlarAttendLowrank {
        let (s, a) = (&self.shape, &self.shape.attend);
        let mut attend = a.bare_params();
        attend.query_tiles = self.query_tiles as u32;
        attend.slots = self.slots as u32;
        attend.own_cell_tiles = self.own_cell_tiles as u32;
        attend.ctas = self.launch.grid;
        attend.columns = self.tiling.columns as u32;
        attend.units = self.units as u32;
        let value_codec = match s.values {
            LowrankValues::Dense => Option::<Codec>::from(a.dtype).unwrap_or(Codec::Bf16),
            LowrankValues::Latent { codec, .. } => codec,
        };
        for (to, latent) in attend.segments.iter_mut().zip(s.latent_segments).take(a.segments().count()) {
            to.tile_rows = if latent { super::layout::LATENT_ROWS } else { super::layout::EXACT_ROWS } as u32;
            if latent {
                to.key_format.group = s.key_rank as u32;
                let width = if s.value_rank() > 0 { s.value_rank() } else { a.value_dim };
                to.value_format = Format::from(value_codec).abi(width, 0);
            }
            to.latent = if latent { latent_abi(s.latents) } else { abi::KVLAR_LATENT_NONE };
        }
        abi::KvlarAttendLowrank {
            attend,
            rope: abi::KvlarRope { attention_factor: 1.0, layout: abi::KVLAR_ROPE_NONE, ..Default::default() },
            set_count: s.sets.count as u32,
            heads_per_tile: self.layout.heads_per_tile as u32,
            key_rank: s.key_rank as u32,
            value_rank: s.value_rank() as u32,
            slices: self.slices as u32,
            slice_width: self.slice_width as u32,
            padded_dim: a.head_dim.next_multiple_of(32) as u32,
            latent: latent_abi(s.latents),
            shared: self.layout.shared,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    /// Checks the arguments and gives the kernel's parameter struct.
    ///
    /// # Errors
    /// Those of [`LowrankPlan::launch`].
    pub fn params(&self, args: &LowrankArgs<'_>, work: &WorkList, workspace: &Workspace) -> Result<abi::KvlarAttendLowrank> {
        let (s, a) = (&self.shape, &self.shape.attend);
        work.fits(self.work_list_bytes())?;
        let scratch = workspace.scratch(self.workspace())?;
        let mut p = self.bare_params();
        a.fill(&args.attend, &mut p.attend)?;
        for ((segment, shape), (latent, to)) in
            args.attend.segments.iter().zip(a.segments()).zip(s.latent_segments.iter().zip(&mut p.attend.segments))
        {
            if *latent { self.latent_segment(segment, shape.max_rows, to)? } else { a.segment(segment, shape, to)? }
        }
        p.attend.work = work.address();
        p.attend.partials = scratch.scratch;
        p.attend.counters = scratch.zeroed;
        p.attend.status = scratch.status;
        if args.sets.shape != s.sets {
            return invalid("sets", format!("{:?} instead of {:?}", args.sets.shape, s.sets));
        }
        p.sets = args.sets.buffer.address();
        self.bases(&args.bases, &mut p)?;
        if let Some(rope) = &args.rope {
            p.rope = rope.abi(a.head_dim)?;
        }
        Ok(p)
    }

    fn bases(&self, b: &Bases<'_>, p: &mut abi::KvlarAttendLowrank) -> Result<()> {
        let (s, a) = (&self.shape, &self.shape.attend);
        let element = if s.latents == Latents::Int8Basis { 1 } else { 2 };
        let seqs = |per_seq: bool| if per_seq { a.seqs } else { 1 };
        let each = a.kv_heads * a.head_dim * s.key_rank;
        within("key basis", &b.keys, seqs(b.keys_per_seq) * each * element, 16)?;
        p.key_basis = b.keys.address();
        p.key_basis_seq_stride = if b.keys_per_seq { each as i64 } else { 0 };
        if b.key_scales.is_some() != (s.latents == Latents::Int8Basis) {
            return invalid("key_scales", "an int8 basis has scales, others have none");
        }
        if let Some(scales) = &b.key_scales {
            let each = a.kv_heads * a.head_dim.next_multiple_of(32) / 2;
            within("key_scales", scales, 4 * seqs(b.keys_per_seq) * each, 8)?;
            p.key_scales = scales.address();
            p.key_scales_seq_stride = if b.keys_per_seq { each as i64 } else { 0 };
        }
        if b.key_mean.is_some() != s.key_mean {
            return invalid(
                "key_mean",
                format!("the shape says {}", if s.key_mean { "that keys have a mean" } else { "that they have none" }),
            );
        }
        if let Some(mean) = &b.key_mean {
            within("key_mean", mean, 4 * a.kv_heads * a.head_dim, 4)?;
            p.key_mean = mean.address();
        }
        if b.values.is_some() != (s.values != LowrankValues::Dense) {
            return invalid("value basis", "latent values have one, dense values have none");
        }
        if let Some(values) = &b.values {
            let each = a.kv_heads * a.value_dim * s.value_rank();
            within("value basis", values, 2 * seqs(b.values_per_seq) * each, 16)?;
            p.value_basis = values.address();
            p.value_basis_seq_stride = if b.values_per_seq { each as i64 } else { 0 };
        }
        Ok(())
    }

    fn latent_segment(&self, from: &Segment<'_>, max_rows: usize, to: &mut abi::KvlarSegment) -> Result<()> {
        let (s, a) = (&self.shape, &self.shape.attend);
        if from.rows.lengths.is_none() {
            return invalid("rows", "attend needs lengths");
        }
        if from.rows.positions.is_some() && !s.stored_positions {
            return invalid("rows", "they have stored positions; the shape says that none of the latent rows do");
        }
        if from.rows.max_rows > max_rows {
            return invalid("rows", format!("{} rows in a segment planned for {max_rows}", from.rows.max_rows));
        }
        let key_codec = s.latents.codec(Option::<Codec>::from(a.dtype).unwrap_or(Codec::Bf16));
        let (value_codec, value_heads, values) = match s.values {
            LowrankValues::Dense => (Option::<Codec>::from(a.dtype).unwrap_or(Codec::Bf16), a.kv_heads, a.value_dim),
            LowrankValues::Latent { rank, codec } => (codec, s.sets.value_groups, rank),
        };
        from.rows.check("rows", a.seqs, (s.sets.key_groups, a.kv_heads), from.keys.page_count.min(from.values.page_count))?;
        let stored = |codec: Codec, n: usize| Stored::row_wise(codec.row_bytes(n), codec.params_bytes(n, n));
        let (k, v) = (stored(key_codec, s.key_rank), stored(value_codec, values));
        from.keys.check("key latents", &from.rows, a.seqs, s.sets.key_groups, k)?;
        from.values.check("values", &from.rows, a.seqs, value_heads, v)?;
        to.rows = from.rows.abi();
        to.keys = from.keys.abi();
        to.values = from.values.abi();
        Ok(())
    }
}

fn latent_abi(latents: Latents) -> u32 {
    match latents {
        Latents::Dtype => abi::KVLAR_LATENT_DTYPE,
        Latents::Int8 | Latents::Int4 => abi::KVLAR_LATENT_INT8,
        Latents::Int8Basis => abi::KVLAR_LATENT_INT8_BASIS,
    }
}
