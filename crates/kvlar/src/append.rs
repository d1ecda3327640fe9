//! Writing new rows: rotate, encode, store, in one launch.

use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::paged::within;
use crate::{
    Codec, Device, Dtype, Format, KeyScores, Memory, Pool, Result, RopeLayout, Rows, Stream, Strides, Tables, View, ViewMut,
    Workspace, WorkspaceSize, abi,
};

/// Largest head dimension of stored rows.
pub(crate) const MAX_DIM: usize = 256;

/// What [`AppendPlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AppendShape {
    /// Type of k and v: bf16 or f16.
    pub dtype: Dtype,
    /// Of key rows.
    pub key_format: Format,
    /// Of value rows.
    pub value_format: Format,
    /// B.
    pub seqs: usize,
    /// Hk.
    pub kv_heads: usize,
    /// New rows a sequence.
    pub new_rows: usize,
    /// d; a multiple of 8 up to 256.
    pub head_dim: usize,
    /// dv; likewise.
    pub value_dim: usize,
}

/// How keys are rotated, on the device.
#[derive(Clone, Copy, Debug)]
pub struct Rope<'a> {
    /// f32 `[rotary_dim / 2]`.
    pub inv_freq: View<'a>,
    /// Dimensions that are rotated; the rest stays.
    pub rotary_dim: usize,
    /// Which make a pair.
    pub layout: RopeLayout,
    /// Multiplies cos and sin.
    pub attention_factor: f32,
}

impl Rope<'_> {
    /// Checks it against a head dimension.
    pub(crate) fn abi(&self, head_dim: usize) -> Result<abi::KvlarRope> {
        if self.rotary_dim == 0 {
            return Ok(abi::KvlarRope { attention_factor: 1.0, layout: abi::KVLAR_ROPE_NONE, ..Default::default() });
        }
        if self.rotary_dim > head_dim || !self.rotary_dim.is_multiple_of(2) {
            return invalid("rotary_dim", format!("{} is not an even number up to head_dim {head_dim}", self.rotary_dim));
        }
        within("inv_freq", &self.inv_freq, 2 * self.rotary_dim, 4)?;
        Ok(abi::KvlarRope {
            inv_freq: self.inv_freq.address(),
            attention_factor: self.attention_factor,
            rotary_dim: self.rotary_dim as u32,
            layout: match self.layout {
                RopeLayout::Half => abi::KVLAR_ROPE_HALF,
                RopeLayout::Interleaved => abi::KVLAR_ROPE_INTERLEAVED,
            },
            ..Default::default()
        })
    }
}

/// Arguments of [`AppendPlan::launch`].
#[derive(Debug)]
pub struct AppendArgs<'a> {
    /// `[B, Hk, new_rows, d]` before RoPE.
    pub k: View<'a>,
    /// `None`: dense, as above.
    pub k_strides: Option<Strides>,
    /// `[B, Hk, new_rows, dv]`.
    pub v: View<'a>,
    /// `None`: dense, as above.
    pub v_strides: Option<Strides>,
    /// i32 `[B, new_rows]`.
    pub positions: View<'a>,
    /// Row that each goes to, i32 `[B, new_rows]` or `[B, Hk, new_rows]`; negative = skip.
    pub slots: View<'a>,
    /// Whether `slots` has an entry for each head.
    pub slots_per_head: bool,
    /// `None`: keys are stored as they come.
    pub rope: Option<Rope<'a>>,
    /// Tables and capacity. Its lengths are not read; its positions are not written (see `row_positions`).
    pub rows: Rows<'a>,
    /// Where the rows' positions are stored, laid out as `rows` says; `None`: nowhere.
    pub row_positions: Option<ViewMut<'a>>,
    /// Key rows.
    pub keys: Pool<ViewMut<'a>>,
    /// Value rows.
    pub values: Pool<ViewMut<'a>>,
    /// Of fp8 and pq rows.
    pub tables: Tables<'a>,
    /// What else is written about new keys; `None`: nothing.
    pub key_scores: Option<KeyScores<'a>>,
}

/// A validated append.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AppendPlan {
    shape: AppendShape,
    launch: Launch,
}

pub(crate) fn check_dim(op: &'static str, name: &'static str, dim: usize) -> Result<()> {
    if dim == 0 || !dim.is_multiple_of(8) || dim > MAX_DIM {
        return unsupported(op, format!("{name} {dim}: multiples of 8 up to {MAX_DIM} are"));
    }
    Ok(())
}

impl AppendShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a head dimension or type without a kernel, [`crate::Error::Invalid`] for a group
    /// that does not divide.
    pub fn plan(&self, _: &Device) -> Result<AppendPlan> {
        check_dim("append", "head_dim", self.head_dim)?;
        check_dim("append", "value_dim", self.value_dim)?;
        self.key_format.check("key format", self.head_dim)?;
        self.value_format.check("value format", self.value_dim)?;
        if let Some(format) = [self.key_format, self.value_format].into_iter().find(|f| f.codec.is_channel_wise()) {
            return unsupported("append", format!("{:?} rows: they are encoded a group at a time", format.codec));
        }
        if self.dtype == Dtype::F32 {
            return unsupported("append", "type f32: bf16 and f16 are");
        }
        let rows = self.seqs * self.kv_heads * self.new_rows;
        // The four warps of a CTA share a row of product quantization, and take one each of others.
        let shared = [self.key_format, self.value_format].iter().any(|f| f.codec == Codec::Pq);
        let grid = if shared { rows } else { rows.div_ceil(4) };
        if grid > i32::MAX as usize {
            return invalid("new_rows", format!("{rows} rows are too many for one launch"));
        }
        Ok(AppendPlan { shape: *self, launch: Launch { entry: "kvlar_append", grid: grid as u32, block: 128, shared_bytes: 0 } })
    }
}

impl AppendPlan {
    /// What it was made from.
    pub fn shape(&self) -> &AppendShape {
        &self.shape
    }

    /// Enqueues one launch; none if there are no rows.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan;
    /// [`crate::Error::Unsupported`] for several new rows a sequence beside [`KeyScores::direction_sums`].
    pub fn launch(&self, stream: &Stream, args: &mut AppendArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        let params = self.params(args, workspace)?;
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// Checks the arguments and gives the kernel's parameter struct.
    ///
    /// # Errors
    /// Those of [`AppendPlan::launch`].
    pub fn params(&self, args: &mut AppendArgs<'_>, workspace: &mut Workspace) -> Result<abi::KvlarAppend> {
        let s = &self.shape;
        let (tokens, heads) = (s.seqs * s.new_rows, s.kv_heads);
        let k_strides = args.k_strides.unwrap_or(Strides::heads_first(heads, s.new_rows, s.head_dim));
        let v_strides = args.v_strides.unwrap_or(Strides::heads_first(heads, s.new_rows, s.value_dim));
        k_strides.check("k", &args.k, s.dtype, [s.seqs, heads, s.new_rows, s.head_dim])?;
        v_strides.check("v", &args.v, s.dtype, [s.seqs, heads, s.new_rows, s.value_dim])?;
        within("positions", &args.positions, tokens * 4, 4)?;
        within("slots", &args.slots, tokens * 4 * if args.slots_per_head { heads } else { 1 }, 4)?;
        let rows = Rows { positions: args.row_positions.as_ref().map(|p| p.as_view()), ..args.rows };
        rows.check("rows", s.seqs, (heads, heads), args.keys.page_count.min(args.values.page_count))?;
        let [key_scales, value_scales] =
            args.tables.addresses(heads, [(s.key_format, s.head_dim), (s.value_format, s.value_dim)])?;
        args.keys.check("keys", &args.rows, s.seqs, heads, s.key_format.stored(s.head_dim))?;
        args.values.check("values", &args.rows, s.seqs, heads, s.value_format.stored(s.value_dim))?;
        let none = abi::KvlarRope { attention_factor: 1.0, layout: abi::KVLAR_ROPE_NONE, ..Default::default() };
        let rope = args.rope.map_or(Ok(none), |r| r.abi(s.head_dim))?;
        let scratch = workspace.scratch(WorkspaceSize::default())?;
        let n = s.new_rows as i64;
        let (k_seq_stride, k_head_stride, k_row_stride) = k_strides.abi();
        let (v_seq_stride, v_head_stride, v_row_stride) = v_strides.abi();
        let mut params = abi::KvlarAppend {
            rows: rows.abi(),
            key_pool: args.keys.abi(),
            value_pool: args.values.abi(),
            k: args.k.address(),
            k_seq_stride,
            k_head_stride,
            k_row_stride,
            v: args.v.address(),
            v_seq_stride,
            v_head_stride,
            v_row_stride,
            positions: args.positions.address(),
            slots: args.slots.address(),
            slot_seq_stride: if args.slots_per_head { heads as i64 * n } else { n },
            slot_head_stride: if args.slots_per_head { n } else { 0 },
            rope,
            status: scratch.status,
            key_format: s.key_format.abi(s.head_dim, key_scales),
            value_format: s.value_format.abi(s.value_dim, value_scales),
            seqs: s.seqs as u32,
            kv_heads: heads as u32,
            new_rows: s.new_rows as u32,
            head_dim: s.head_dim as u32,
            value_dim: s.value_dim as u32,
            dtype: s.dtype.abi(),
            ..Default::default()
        };
        if let Some(scores) = &args.key_scores {
            scores.put(&mut params, heads, rows.max_rows)?;
        }
        Ok(params)
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors and strides.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan's shape, and its addresses and strides are valid on the stream's device until the
    /// launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarAppend) -> Result<()> {
        if self.launch.grid == 0 {
            return Ok(());
        }
        let scored = params.key_scores != 0 || params.key_sums != 0;
        let entry = if scored { "kvlar_append_scored" } else { self.launch.entry };
        // SAFETY: the caller's promise.
        unsafe { stream.enqueue(Launch { entry, ..self.launch }, params) }
    }
}
