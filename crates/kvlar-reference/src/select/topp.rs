//! The fewest rows that hold a share of the softmax mass.

use super::cut::{Cut, unforced};
use super::{Forced, check_count};
use crate::attend::{check_lengths, length_of};
use crate::error::{ReferenceError, shape, value};

/// How exactly [`topp`] finds where to stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resolve {
    /// Row by row.
    #[default]
    Exact,
    /// In steps of 1/16 of a logit below the largest: what one pass over a histogram can tell.
    Bin,
}

/// Inputs of [`topp`]; names and defaults as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct ToppInput<'a> {
    /// R: each chooses among its own rows.
    pub batch: usize,
    /// T.
    pub rows: usize,
    /// `[R, T]`.
    pub logits: &'a [f32],
    /// `[R]`; default T.
    pub lengths: Option<&'a [i32]>,
    /// Share of the softmax mass, 0..=1.
    pub top_p: f64,
    /// Least number of rows, where there are so many.
    pub k_min: usize,
    /// Greatest number of rows; wins over `k_min`, but not over rows that are forced.
    pub k_max: usize,
    /// Sinks and recent rows; they count towards `top_p`, `k_min` and `k_max`.
    pub forced: Forced,
    /// How exactly.
    pub resolve: Resolve,
}

/// What [`topp`] chooses.
#[derive(Clone, Debug, PartialEq)]
pub struct TopP {
    /// `[R, T]`: 1 where a row is kept.
    pub mask: Vec<u8>,
    /// `[R]`.
    pub counts: Vec<i32>,
    /// `[R]`: the softmax mass of what is kept.
    pub mass: Vec<f32>,
    /// `[R]`: what keeps the same rows, beside those that are forced.
    pub cuts: Vec<Cut>,
}

/// Forced rows, then the fewest by descending logit whose softmax mass, with theirs, is at least `top_p` of that of the length.
///
/// Mass is summed in f64; a kernel that sums in f32 may keep some rows more or less, as `OPS.md` bounds it. NaN and −∞ have
/// no mass and are kept only where forced. Logits of +∞ share all of it equally, the limit of softmax.
///
/// # Errors
/// A tensor of the wrong size, a length outside 0..=T, a `top_p` outside 0..=1.
pub fn topp(i: &ToppInput<'_>) -> Result<TopP, ReferenceError> {
    let dims = [i.batch, 1, i.rows];
    shape("logits", i.logits.len(), &[i.batch, i.rows])?;
    check_count("logits", i.rows)?;
    check_lengths(i.lengths, dims)?;
    if !(0.0..=1.0).contains(&i.top_p) {
        return value("top_p", format!("{} is outside 0..=1", i.top_p));
    }
    let mut out = TopP { mask: vec![0; i.batch * i.rows], counts: Vec::new(), mass: Vec::new(), cuts: Vec::new() };
    for b in 0..i.batch {
        let logits = &i.logits[b * i.rows..][..length_of(i.lengths, dims, b, 0)];
        let (count, mass) = fewest(i, logits);
        let cut = Cut::of_best(unforced(logits, i.forced), count);
        let rows = cut.rows(logits, i.forced);
        rows.iter().for_each(|row| out.mask[b * i.rows + row] = 1);
        out.counts.push(rows.len() as i32);
        out.mass.push(mass as f32);
        out.cuts.push(cut);
    }
    Ok(out)
}

/// How many rows are kept beside those that are forced, and the mass of all of them.
fn fewest(i: &ToppInput<'_>, logits: &[f32]) -> (usize, f64) {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max); // of the others where one is NaN
    let weight = |x: f32| {
        if x.is_nan() || x == f32::NEG_INFINITY {
            0.0
        } else if x == top {
            1.0 // also where it is +∞: the difference would be NaN
        } else {
            (f64::from(x) - f64::from(top)).exp()
        }
    };
    let forced = |row: &usize| i.forced.keeps(*row, logits.len());
    let forced_mass = (0..logits.len()).filter(forced).map(|row| weight(logits[row])).fold(0.0, |sum, x| sum + x); // of none: +0
    let free = (0..logits.len()).filter(|row| !forced(row)).map(|row| logits[row]);
    let mut best: Vec<f32> = free.filter(|&x| x > f32::NEG_INFINITY).collect();
    best.sort_by(|a, b| b.total_cmp(a));
    // Mass with the first n of them. The last is the whole, summed in the same order: a `top_p` of 1 is reached.
    let mut masses = vec![forced_mass];
    masses.extend(best.iter().scan(forced_mass, |sum, &x| {
        *sum += weight(x);
        Some(*sum)
    }));
    let whole = masses[best.len()];
    let mut count = masses.iter().position(|&mass| mass >= i.top_p * whole).unwrap_or(best.len());
    if i.resolve == Resolve::Bin {
        // The least number of steps that takes the last of them in; none takes in those that are equal to the largest.
        let steps = |x: f32| if x == top { 0.0 } else { ((f64::from(top) - f64::from(x)) * 16.0).ceil() };
        let last = if count == 0 { 0.0 } else { steps(best[count - 1]) };
        count = best.iter().filter(|&&x| steps(x) <= last).count();
    }
    let forced = i.forced.count(logits.len());
    let count = count.max(i.k_min.saturating_sub(forced)).min(i.k_max.saturating_sub(forced)).min(best.len());
    (count, if whole > 0.0 { masses[count] / whole } else { 0.0 })
}
