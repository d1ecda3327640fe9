//! The order of scored rows as that of integers.

use super::Forced;

/// A score's place in NaN < −∞ < finite < +∞, −0 = +0, as that of unsigned integers; `kernels/device/order.cuh` has the same.
///
/// NaN is 0, −∞ 0x007fffff, 0 is 0x80000000, +∞ 0xff800000.
pub fn ordered_key(score: f32) -> u32 {
    if score.is_nan() {
        return 0;
    }
    let bits = if score == 0.0 { 0 } else { score.to_bits() };
    if bits >> 31 == 1 { !bits } else { bits | 1 << 31 }
}

/// A scored row's place among all as an integer: the key of its score in the upper half, its index with all bits turned in the
/// lower, so that of equal scores the lower index is the greater. No two rows have the same.
pub fn ordered_row(score: f32, index: u32) -> u64 {
    u64::from(ordered_key(score)) << 32 | u64::from(!index)
}

/// Where rows are cut off: those whose [`ordered_row`] is at least this are kept.
///
/// This is all that a selection has to hand on: who reads a row and its score knows whether it is kept, and rows, masks and
/// counts follow. Forced rows and lengths are judged by where a row is, not by the cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut(pub u64);

impl Cut {
    /// Keeps every row.
    pub const ALL: Self = Self(0);
    /// Keeps none: no score's key has all bits set.
    pub const NONE: Self = Self(u64::MAX);

    /// Keeps the `count` greatest of some [`ordered_row`]s: [`Cut::NONE`] for 0, [`Cut::ALL`] for all of them or more, else
    /// the least that is kept.
    pub fn of_best(mut rows: Vec<u64>, count: usize) -> Self {
        rows.sort_unstable_by(|a, b| b.cmp(a));
        match count {
            0 => Self::NONE,
            n if n >= rows.len() => Self::ALL,
            n => Self(rows[n - 1]),
        }
    }

    /// Keeps what is above a score, whatever its index; nothing that is equal to it.
    pub fn above(score: f32) -> Self {
        // The largest key is that of +∞, so the next one exists.
        Self(u64::from(ordered_key(score) + 1) << 32)
    }

    /// Whether it keeps that row.
    pub fn keeps(self, score: f32, index: u32) -> bool {
        ordered_row(score, index) >= self.0
    }

    /// The rows that it keeps, ascending, of as many as there are scores; forced ones among them.
    pub fn rows(self, scores: &[f32], forced: Forced) -> Vec<usize> {
        let kept = |row: usize| forced.keeps(row, scores.len()) || self.keeps(scores[row], row as u32);
        (0..scores.len()).filter(|&row| kept(row)).collect()
    }
}

/// [`ordered_row`]s of the rows that are not forced.
pub(super) fn unforced(scores: &[f32], forced: Forced) -> Vec<u64> {
    let free = (0..scores.len()).filter(|&row| !forced.keeps(row, scores.len()));
    free.map(|row| ordered_row(scores[row], row as u32)).collect()
}
