//! Writing new rows as latents: project, encode, store, keys and values in one launch.

use crate::append::check_dim;
use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::paged::within;
use crate::project::{Division, MAX_RANK, check_projection, variant};
use crate::{
    Codec, Device, Dtype, Memory, Pool, Projection, Result, Rows, Stored, Stream, Strides, View, ViewMut, Workspace,
    WorkspaceSize, abi, padded_rank,
};

/// What becomes of new keys, or of new values. `codec` is the type of the rows, or int8 with one scale and zero a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SideShape {
    /// Nothing: another launch writes them.
    None,
    /// Rows are projected to latents, stored in rows of [`padded_rank`] values.
    Project {
        /// Hk.
        kv_heads: usize,
        /// d; a multiple of 8 up to 256.
        head_dim: usize,
        /// n: latent groups.
        groups: usize,
        /// kv heads a group.
        size: usize,
        /// r: up to 4096 and size · d.
        rank: usize,
        /// Of the stored latents.
        codec: Codec,
    },
    /// Latents come ready-made (encoders folded into the weights), and are stored in rows of [`padded_rank`] values.
    Latent {
        /// n.
        groups: usize,
        /// r: up to 4096.
        rank: usize,
        /// Of the stored latents.
        codec: Codec,
    },
    /// Rows of each kv head are stored as they are.
    Dense {
        /// Hk.
        kv_heads: usize,
        /// d; a multiple of 8 up to 256.
        head_dim: usize,
        /// Of the stored rows.
        codec: Codec,
    },
}

/// What [`AppendLowrankPlan`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendLowrankShape {
    /// Type of rows, latents and encoders: bf16 or f16.
    pub dtype: Dtype,
    /// B.
    pub seqs: usize,
    /// New rows a sequence.
    pub new_rows: usize,
    /// Keys, before RoPE.
    pub keys: SideShape,
    /// Values.
    pub values: SideShape,
}

/// Arguments of one side; as its shape says.
#[derive(Debug)]
pub enum SideArgs<'a> {
    /// [`SideShape::None`].
    None,
    /// [`SideShape::Project`].
    Project {
        /// Rows, encoder and groups.
        from: Projection<'a>,
        /// Pages of latents: its heads are groups.
        pool: Pool<ViewMut<'a>>,
    },
    /// [`SideShape::Latent`] and [`SideShape::Dense`].
    Store {
        /// `[B, groups, new_rows, r]`, or `[B, Hk, new_rows, d]`.
        x: View<'a>,
        /// `None`: dense, as above. They may be any number of elements.
        x_strides: Option<Strides>,
        /// Pages: its heads are groups, or kv heads.
        pool: Pool<ViewMut<'a>>,
    },
}

/// Arguments of [`AppendLowrankPlan::launch`].
#[derive(Debug)]
pub struct AppendLowrankArgs<'a> {
    /// Keys.
    pub keys: SideArgs<'a>,
    /// Values.
    pub values: SideArgs<'a>,
    /// i32 `[B, new_rows]`; `None` where `row_positions` is.
    pub positions: Option<View<'a>>,
    /// Row that each goes to, i32 `[B, new_rows]`; negative = skip.
    pub slots: View<'a>,
    /// Tables and capacity; tables are indexed by group. Lengths are not read, positions not written (see `row_positions`).
    /// Groups with pages of their own are those of keys and of values alike.
    pub rows: Rows<'a>,
    /// Where the rows' positions are stored, laid out as `rows` says; `None`: nowhere.
    pub row_positions: Option<ViewMut<'a>>,
}

/// A validated append of latents. `Copy`, holds no handles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AppendLowrankPlan {
    shape: AppendLowrankShape,
    launch: Launch,
    sides: [SidePlan; 2],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct SidePlan {
    division: Division,
    ctas: usize,
    groups: usize,
    /// Values a row, and with padding.
    rank: usize,
    stored: usize,
    /// f32 values and counters.
    scratch: (usize, usize),
}

const OP: &str = "append_lowrank";
const ENTRIES: [[&str; 2]; 2] = [
    ["kvlar_append_lowrank_bf16_m16", "kvlar_append_lowrank_bf16_m64"],
    ["kvlar_append_lowrank_f16_m16", "kvlar_append_lowrank_f16_m64"],
];

impl SideShape {
    /// How its rows are stored; `None` for no rows.
    pub fn codec(&self) -> Option<Codec> {
        match *self {
            Self::None => None,
            Self::Project { codec, .. } | Self::Latent { codec, .. } | Self::Dense { codec, .. } => Some(codec),
        }
    }

    /// Rows a token that it writes: groups, or kv heads.
    pub fn groups(&self) -> usize {
        match *self {
            Self::None => 0,
            Self::Project { groups, .. } | Self::Latent { groups, .. } => groups,
            Self::Dense { kv_heads, .. } => kv_heads,
        }
    }

    /// Values of a stored row, with padding.
    pub fn stored(&self) -> usize {
        match *self {
            Self::None => 0,
            Self::Project { rank, .. } | Self::Latent { rank, .. } => padded_rank(rank),
            Self::Dense { head_dim, .. } => head_dim,
        }
    }

    /// Bytes of a stored row, and of its scale and zero.
    pub fn row_bytes(&self) -> (usize, usize) {
        let n = self.stored();
        self.codec().map_or((0, 0), |c| (c.row_bytes(n), if n == 0 { 0 } else { c.params_bytes(n, n) }))
    }

    fn plan(&self, arg: &'static str, dtype: Dtype, tokens: usize, warps: usize) -> Result<SidePlan> {
        let (groups, stored) = (self.groups(), self.stored());
        if let Some(codec) = self.codec()
            && !codec.reference().is_integer()
            && Some(codec) != dtype.into()
        {
            return unsupported(OP, format!("{codec:?} {arg} of {dtype} rows: int8 and {dtype} are"));
        }
        if *self != Self::None && groups == 0 {
            return invalid(arg, "no groups: leave the side out (SideShape::None)");
        }
        let stores = SidePlan { ctas: groups * tokens.div_ceil(warps), groups, stored, ..SidePlan::default() };
        Ok(match *self {
            Self::None => SidePlan::default(),
            Self::Latent { rank, .. } => {
                if rank == 0 {
                    return invalid(arg, "latents of rank 0");
                }
                if rank > MAX_RANK {
                    return unsupported(OP, format!("{arg} of rank {rank}: up to {MAX_RANK} are"));
                }
                SidePlan { rank, ..stores }
            }
            Self::Dense { head_dim, .. } => {
                check_dim(OP, "head_dim", head_dim)?;
                SidePlan { rank: head_dim, ..stores }
            }
            Self::Project { kv_heads, head_dim, size, rank, codec, .. } => {
                check_projection(OP, kv_heads, head_dim, groups, size, rank)?;
                if rank > size * head_dim {
                    return invalid(
                        arg,
                        format!("rank {rank} of {size} kv heads of {head_dim}: latents would be longer than rows"),
                    );
                }
                let division = Division::new(tokens, groups, size * head_dim, rank, codec == Codec::Int8);
                let scratch = if codec == Codec::Int8 { division.scratch() } else { (0, 0) };
                SidePlan { division, ctas: division.ctas(), groups, rank, stored, scratch }
            }
        })
    }
}

impl AppendLowrankShape {
    /// Validates.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a type, codec, head dimension or rank without a kernel, [`crate::Error::Invalid`] for
    /// sizes that contradict each other.
    pub fn plan(&self, device: &Device) -> Result<AppendLowrankPlan> {
        for codec in [self.keys.codec(), self.values.codec()].into_iter().flatten() {
            codec.check_latent(OP, device)?;
        }
        let tokens = self.seqs.saturating_mul(self.new_rows);
        let entry = variant(OP, self.dtype, tokens, ENTRIES)?;
        if self.keys == SideShape::None && self.values == SideShape::None {
            return invalid("keys", "neither keys nor values are written");
        }
        let warps = if Division::few(tokens) { 9 } else { 8 };
        let sides = [self.keys.plan("keys", self.dtype, tokens, warps)?, self.values.plan("values", self.dtype, tokens, warps)?];
        let grid = sides[0].ctas + sides[1].ctas;
        if grid > i32::MAX as usize {
            return invalid("new_rows", format!("{grid} CTAs are too many for one launch"));
        }
        let launch = Launch { entry, grid: grid as u32, block: 32 * warps as u32, shared_bytes: 0 };
        Ok(AppendLowrankPlan { shape: *self, launch, sides })
    }
}

/// Strides of rows that are copied: any, as long as all rows are there.
fn check_rows(x: &View<'_>, strides: &Strides, dtype: Dtype, shape: [usize; 4]) -> Result<()> {
    within("x", x, strides.elements(shape).saturating_mul(dtype.bytes()), dtype.bytes())
}

impl AppendLowrankPlan {
    /// What it was made from.
    pub fn shape(&self) -> &AppendLowrankShape {
        &self.shape
    }

    /// The kernel's entry point.
    pub fn entry(&self) -> &'static str {
        self.launch.entry
    }

    /// Scratch that a launch needs: none but for int8 latents of few tokens, of which several CTAs have parts.
    pub fn workspace(&self) -> WorkspaceSize {
        let [k, v] = self.sides.map(|s| s.scratch);
        WorkspaceSize { zeroed: 4 * (k.1 + v.1), scratch: 4 * (k.0 + v.0) }
    }

    /// Enqueues one launch; none if there are no rows.
    ///
    /// # Errors
    /// [`crate::Error::Bounds`], [`crate::Error::Alignment`], [`crate::Error::Invalid`] for arguments that do not fit the plan.
    pub fn launch(&self, stream: &Stream, args: &mut AppendLowrankArgs<'_>, workspace: &mut Workspace) -> Result<()> {
        let params = self.params(args, workspace)?;
        // SAFETY: every address was checked against the shape.
        unsafe { self.launch_raw(stream, &params) }
    }

    /// Checks the arguments and gives the kernel's parameter struct.
    ///
    /// # Errors
    /// Those of [`AppendLowrankPlan::launch`].
    pub fn params(&self, args: &AppendLowrankArgs<'_>, workspace: &Workspace) -> Result<abi::KvlarAppendLowrank> {
        let s = &self.shape;
        let tokens = s.seqs * s.new_rows;
        let rows = Rows { positions: args.row_positions.as_ref().map(|p| p.as_view()), ..args.rows };
        if args.positions.is_some() != rows.positions.is_some() {
            return invalid("positions", "they come with row_positions, where they are stored, or not at all");
        }
        if let Some(positions) = &args.positions {
            within("positions", positions, 4 * tokens, 4)?;
        }
        within("slots", &args.slots, 4 * tokens, 4)?;
        let [k, v] = self.sides.map(|s| s.groups);
        let own_pages = rows.table_head_stride != 0 || rows.position_head_stride != 0;
        if own_pages && k != v && k != 0 && v != 0 {
            return invalid("rows", format!("{k} groups of keys and {v} of values cannot have pages of their own"));
        }
        let scratch = workspace.scratch(self.workspace())?;
        let mut p = abi::KvlarAppendLowrank {
            positions: args.positions.map_or(0, |p| p.address()),
            slots: args.slots.address(),
            slot_seq_stride: s.new_rows as i64,
            status: scratch.status,
            ..self.bare_params()
        };
        self.side(0, &args.keys, &rows, &mut p.sides[0])?;
        self.side(1, &args.values, &rows, &mut p.sides[1])?;
        let pages = p.sides.iter().filter(|s| s.mode != abi::KVLAR_SIDE_NONE).map(|s| s.pool.page_count as usize).min();
        rows.check("rows", s.seqs, (k.max(v), 0), pages.unwrap_or(0))?;
        p.rows = rows.abi();
        p.sides[0].scratch = scratch.scratch;
        p.sides[0].counters = scratch.zeroed;
        p.sides[1].scratch = scratch.scratch + 4 * self.sides[0].scratch.0 as u64;
        p.sides[1].counters = scratch.zeroed + 4 * self.sides[0].scratch.1 as u64;
        Ok(p)
    }

    fn side(&self, which: usize, args: &SideArgs<'_>, rows: &Rows<'_>, to: &mut abi::KvlarLatentSide) -> Result<()> {
        let (s, arg) = (&self.shape, ["keys", "values"][which]);
        let (shape, plan) = ([s.keys, s.values][which], &self.sides[which]);
        let (seqs, n) = (s.seqs, s.new_rows);
        let pool = match (shape, args) {
            (SideShape::None, SideArgs::None) => return Ok(()),
            (SideShape::Project { kv_heads, head_dim, groups, size, rank, .. }, SideArgs::Project { from, pool }) => {
                to.projection = from.abi(s.dtype, [seqs, kv_heads, n, head_dim], [groups, size, rank], &plan.division)?;
                pool
            }
            (SideShape::Latent { .. } | SideShape::Dense { .. }, SideArgs::Store { x, x_strides, pool }) => {
                let strides = x_strides.unwrap_or(Strides::heads_first(plan.groups, n, plan.rank));
                check_rows(x, &strides, s.dtype, [seqs, plan.groups, n, plan.rank])?;
                to.projection.x = x.address();
                (to.projection.x_seq_stride, to.projection.x_head_stride, to.projection.x_row_stride) = strides.abi();
                pool
            }
            _ => return invalid(arg, format!("the shape says {shape:?}, the arguments are of another kind")),
        };
        let (row, params) = shape.row_bytes();
        pool.check(arg, rows, seqs, plan.groups, Stored::row_wise(row, params))?;
        to.pool = pool.abi();
        Ok(())
    }

    /// The parameter struct with everything that follows from the shape; addresses and strides are 0.
    pub fn bare_params(&self) -> abi::KvlarAppendLowrank {
        let s = &self.shape;
        let mut p = abi::KvlarAppendLowrank {
            seqs: s.seqs as u32,
            new_rows: s.new_rows as u32,
            dtype: s.dtype.abi(),
            ..Default::default()
        };
        for (to, (shape, plan)) in p.sides.iter_mut().zip([s.keys, s.values].into_iter().zip(&self.sides)) {
            let (mode, size, dim) = match shape {
                SideShape::None => continue,
                SideShape::Project { size, head_dim, .. } => (abi::KVLAR_SIDE_PROJECT, size, head_dim),
                SideShape::Latent { .. } | SideShape::Dense { .. } => (abi::KVLAR_SIDE_STORE, 0, 0),
            };
            to.projection = plan.division.bare([plan.groups, size, dim, plan.rank]);
            to.mode = mode;
            to.codec = shape.codec().map_or(0, Codec::abi);
            to.stored = plan.stored as u32;
            to.ctas = plan.ctas as u32;
        }
        p
    }

    /// Enqueues with the caller's own parameter struct, for engines with their own tensors and strides.
    ///
    /// # Errors
    /// Those of the launch.
    ///
    /// # Safety
    /// `params` agrees with the plan ([`AppendLowrankPlan::bare_params`] fills in all that is not an address or a stride), and
    /// its addresses and strides are valid on the stream's device until the launch has run.
    pub unsafe fn launch_raw(&self, stream: &Stream, params: &abi::KvlarAppendLowrank) -> Result<()> {
        // SAFETY: the caller's promise.
        if self.launch.grid == 0 { Ok(()) } else { unsafe { stream.enqueue(self.launch, params) } }
    }
}
