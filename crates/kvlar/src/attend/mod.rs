//! Attention of a few query rows over cached rows.

mod cut;
mod plan;
mod shape;
mod tiling;
mod work;

pub use cut::{AttendCutPlan, AttendCutShape, CutArgs};
pub(crate) use plan::SCHEDULE;
pub use plan::{AttendArgs, AttendPlan, Segment};
pub use shape::{AttendShape, Schedule, SegmentShape};
pub use work::WorkList;
pub(crate) use work::work_list_bytes;

/// Rows of a cache may lie in this many segments.
pub const MAX_SEGMENTS: usize = crate::abi::KVLAR_MAX_SEGMENTS as usize;

/// The activation type of an attend kernel (`Some(None)` where its parameters say it); `None` for other entry points.
pub(crate) fn dtype_of(entry: &str) -> Option<Option<crate::Dtype>> {
    tiling::Tiling::dtype_of(entry)
}

/// The activation type of an attend_cut kernel; `None` for other entry points.
pub(crate) fn cut_dtype_of(entry: &str) -> Option<crate::Dtype> {
    tiling::Tiling::cut_dtype_of(entry)
}
