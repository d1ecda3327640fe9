//! Choosing rows by score, on the device: the k largest of each row of scores, or of a set of them together, or the fewest that
//! hold a share of the softmax mass, as a cut.
//!
//! A cut is one u64 a set. With `key` the order-preserving integer of a score (NaN < −∞ < finite < +∞, −0 = +0;
//! `kernels/device/order.cuh`) and `i` its index in the set, a score is kept if and only if `key << 32 | !i` is at or above the
//! cut, or it is among the first or last of its row that are always kept. Lists, masks and counts are derived from it on request.

mod topk;
mod topp;

pub(crate) use topk::ROW_OF_A_CTA;
pub use topk::{TopkArgs, TopkPlan, TopkShape};
pub use topp::{ToppArgs, ToppPlan, ToppShape};

use crate::paged::within;
use crate::{Memory, Result, View};

/// How many rows are kept, where device memory says it.
#[derive(Clone, Copy, Debug)]
pub enum Ks<'a> {
    /// One i32 for all sets.
    One(View<'a>),
    /// i32 `[R]`.
    Each(View<'a>),
}

impl Ks<'_> {
    /// Address, and i32s from that of a row to that of the next.
    pub(crate) fn checked(ks: &Option<Ks<'_>>, rows: usize) -> Result<(u64, i64)> {
        match ks {
            None => Ok((0, 0)),
            Some(Ks::One(one)) => within("ks", one, 4, 4).map(|()| (one.address(), 0)),
            Some(Ks::Each(each)) => within("ks", each, 4 * rows, 4).map(|()| (each.address(), 1)),
        }
    }
}
