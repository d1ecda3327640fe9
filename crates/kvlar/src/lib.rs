//! Safe launchers for the kvlar kernels: what inference engines link.
//!
//! An op is a *shape* (plain data), which [plans](AttendShape::plan) itself for a [`Device`]: all validation happens
//! there, and it picks the kernel, grid and shared memory. A plan is `Copy`, holds no handles and is reused across
//! layers and steps. `launch` only enqueues: no allocation, no synchronization, no read of device memory.
//!
//! ```
//! use kvlar::{Device, EncodeShape, Codec, Dtype, Pool, Rows};
//! let device = Device::reference();
//! let stream = device.stream()?;
//! let x = device.alloc(4 * 64 * 4)?; // 4 rows of 64 values
//! let mut rows = device.alloc(4 * 128)?;
//! let shape = EncodeShape { format: Codec::Bf16.into(), dtype: Dtype::F32, seqs: 1, heads: 1, rows: 4, dim: 64 };
//! let pool = Pool::contiguous(rows.view_mut(), 1, 4, 128);
//! shape.plan(&device)?.encode(&stream, x.view(), &Rows::contiguous(None, 4), &pool, None)?;
//! # Ok::<(), kvlar::Error>(())
//! ```
//!
//! Three devices run one op: [`Device::cuda`], [`Device::simt`] (the same kernels emulated on the CPU) and
//! [`Device::reference`] (plain Rust, which interprets the same parameter structs).

mod append;
mod append_groups;
mod append_lowrank;
mod attend;
mod attend_lowrank;
mod budget;
mod buffer;
mod compact;
mod device;
mod error;
mod formats;
mod merge;
mod paged;
mod project;
mod protect;
mod reduce;
mod reference;
mod scan;
mod score;
mod select;
mod stream;
mod strides;
mod transcode;
mod workspace;

pub use append::{AppendArgs, AppendPlan, AppendShape, Rope};
pub use append_groups::{AppendGroupsArgs, AppendGroupsPlan, AppendGroupsShape};
pub use append_lowrank::{AppendLowrankArgs, AppendLowrankPlan, AppendLowrankShape, SideArgs, SideShape};
pub use attend::{
    AttendArgs, AttendCutPlan, AttendCutShape, AttendPlan, AttendShape, CutArgs, MAX_SEGMENTS, Schedule, Segment, SegmentShape,
    WorkList,
};
pub use attend_lowrank::{
    Arithmetic, Bases, Bound, HeadSets, Latents, LowrankArgs, LowrankPlan, LowrankShape, LowrankValues, MAX_QUERY_ROWS,
    RANK_MULTIPLE, SetsShape, padded_rank,
};
pub use budget::{BudgetHeadsArgs, BudgetHeadsPlan, BudgetHeadsShape, BudgetLayersArgs, BudgetLayersPlan, BudgetLayersShape};
pub use buffer::{Buffer, Memory, View, ViewMut};
pub use compact::{Columns, CompactArgs, CompactPlan, CompactShape, Keep, LayerPools, RowScores};
#[doc(hidden)]
pub use device::Emulation;
pub use device::{Backend, Device, DeviceInfo, SimtOptions};
pub use error::Error;
pub use formats::{Codec, Dtype, Format, Stored, Tables};
pub use kvlar_kernels::params as abi;
pub use kvlar_reference::{CompactOrder, Gate, KeyMethod, LayerBudget, Reduction, Resolve, RopeLayout};
pub use merge::{MergePlan, MergeShape};
pub use paged::{Pool, Rows};
pub use project::{HeadGroups, ProjectPlan, ProjectShape, Projection};
pub use protect::{ProtectArgs, ProtectPlan, ProtectShape, StagedScores};
pub use reduce::{ReduceArgs, ReducePlan, ReduceShape};
pub use scan::{SCORE_BINS, ScanArgs, ScanPlan, ScanSelectPlan, ScanSelectShape, ScanShape, SelectArgs};
pub use score::{
    GateWeights, KeyScores, KeySums, Pooling, ScoreArgs, ScoreGateArgs, ScoreGatePlan, ScoreGateShape, ScoreKeysArgs,
    ScoreKeysPlan, ScoreKeysShape, ScorePlan, ScoreReduction, ScoreShape, ScoredRows,
};
pub use select::{Ks, TopkArgs, TopkPlan, TopkShape, ToppArgs, ToppPlan, ToppShape};
pub use stream::{Graph, Stream};
pub use strides::Strides;
pub use transcode::{EncodeShape, TranscodePlan};
pub use workspace::{Status, Workspace, WorkspaceSize};

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;
