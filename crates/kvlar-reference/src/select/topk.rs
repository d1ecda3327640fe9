//! The k best rows.

use super::cut::{Cut, unforced};
use super::{Forced, check_count};
use crate::attend::{check_lengths, length_of};
use crate::error::{ReferenceError, shape, value};

/// Inputs of [`topk`]; names and defaults as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct TopkInput<'a> {
    /// R: each chooses among its own rows.
    pub batch: usize,
    /// T.
    pub rows: usize,
    /// `[R, T]`.
    pub scores: &'a [f32],
    /// `[R]`; default T.
    pub lengths: Option<&'a [i32]>,
    /// How many rows are kept.
    pub k: usize,
    /// Sinks and recent rows; they count towards k.
    pub forced: Forced,
}

/// What [`topk`] chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopK {
    /// `[R, k]`, ascending; −1 behind the last.
    pub rows: Vec<i32>,
    /// `[R]`.
    pub counts: Vec<i32>,
    /// `[R]`: what keeps the same rows, beside those that are forced.
    pub cuts: Vec<Cut>,
}

/// The `k` best rows of each length: sinks, recent rows, then the highest scores; all rows if there are no more than k.
///
/// # Errors
/// A tensor of the wrong size, a length outside 0..=T, a `k` below the number of rows that are forced of some length,
/// more than 2³¹ rows in all.
pub fn topk(i: &TopkInput<'_>) -> Result<TopK, ReferenceError> {
    let dims = [i.batch, 1, i.rows];
    shape("scores", i.scores.len(), &[i.batch, i.rows])?;
    check_count("scores", i.rows)?;
    check_lengths(i.lengths, dims)?;
    if i.batch.saturating_mul(i.k) > i32::MAX as usize {
        return value("k", format!("{} rows of each of {} lists are too many", i.k, i.batch));
    }
    let mut out = TopK { rows: Vec::with_capacity(i.batch * i.k), counts: Vec::new(), cuts: Vec::new() };
    for b in 0..i.batch {
        let length = length_of(i.lengths, dims, b, 0);
        let scores = &i.scores[b * i.rows..][..length];
        let forced = i.forced.count(length);
        if i.k < forced {
            return value("k", format!("{} is less than the {forced} sink and recent rows of length {length}", i.k));
        }
        let cut = Cut::of_best(unforced(scores, i.forced), i.k - forced);
        let rows = cut.rows(scores, i.forced);
        out.counts.push(rows.len() as i32);
        out.rows.extend(rows.iter().map(|&row| row as i32));
        out.rows.resize((b + 1) * i.k, -1);
        out.cuts.push(cut);
    }
    Ok(out)
}
