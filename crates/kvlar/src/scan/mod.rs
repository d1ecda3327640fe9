//! Logits, log-sum-exps and scores of cached rows: what selection needs.

mod kernel;
mod plan;
mod select;
mod shape;
#[cfg(test)]
mod tests;

pub(crate) use plan::method;
pub use plan::{ScanArgs, ScanPlan};
pub use select::{ScanSelectPlan, ScanSelectShape, SelectArgs};
pub use shape::ScanShape;

/// Bins of a histogram of scores. They are in the order of scores, NaN < −∞ < finite < +∞, −0 = +0: the upper 11 bits of the f32,
/// made unsigned (0 for NaN; all bits turned for negative numbers; the sign bit set for others).
pub const SCORE_BINS: usize = crate::abi::KVLAR_SCORE_BINS as usize;
