//! Attention over low-rank keys: latents, rebuilt and rotated in registers.

mod arithmetic;
mod layout;
mod plan;
mod sets;
mod shape;
mod tiling;

pub use arithmetic::{Arithmetic, Bound};
pub use plan::{Bases, LowrankArgs, LowrankPlan};
pub use sets::HeadSets;
pub use shape::{Latents, LowrankShape, LowrankValues, MAX_QUERY_ROWS, SetsShape};

pub(crate) use plan::ScheduleKey;

/// Latents are stored in multiples of this many values; lower ranks are padded with zeros.
pub const RANK_MULTIPLE: usize = 32;

/// Values that a latent row of this rank takes, with its padding.
pub const fn padded_rank(rank: usize) -> usize {
    rank.next_multiple_of(RANK_MULTIPLE)
}

/// The activation type of an attend_lowrank kernel; `None` for other entry points.
pub(crate) fn dtype_of(entry: &str) -> Option<crate::Dtype> {
    tiling::Tiling::dtype_of(entry)
}

#[cfg(test)]
mod tests;
