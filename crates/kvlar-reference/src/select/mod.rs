//! Choosing rows by score: the k best, the fewest of a softmax mass, the best of all layers and heads.
//!
//! The order of rows is total: NaN < −∞ < finite < +∞, −0 = +0, ties to the lower index. A choice is a [`Cut`], one number,
//! from which rows, masks and counts follow; sinks and recent rows are chosen by where they are ([`Forced`]).

mod cut;
mod threshold;
mod topk;
mod topp;

pub use cut::{Cut, ordered_key, ordered_row};
pub use threshold::{Chosen, ThresholdInput, ThresholdRule, threshold};
pub use topk::{TopK, TopkInput, topk};
pub use topp::{Resolve, TopP, ToppInput, topp};

use crate::error::{ReferenceError, value};

/// Rows that are kept whatever they score: the first and the last of a length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forced {
    /// First rows.
    pub sink_rows: usize,
    /// Last rows.
    pub recent_rows: usize,
}

impl Forced {
    /// Whether it keeps that row of `length` rows.
    pub fn keeps(self, row: usize, length: usize) -> bool {
        row < self.sink_rows || row >= length.saturating_sub(self.recent_rows)
    }

    /// How many of `length` rows it keeps: one that is both a sink and recent counts once.
    pub fn count(self, length: usize) -> usize {
        self.sink_rows.saturating_add(self.recent_rows).min(length)
    }
}

/// Refuses more scores than indices of 32 bits can tell apart.
pub(crate) fn check_count(tensor: &'static str, count: usize) -> Result<(), ReferenceError> {
    if count <= i32::MAX as usize { Ok(()) } else { value(tensor, format!("{count} of them are too many to be ordered")) }
}
