//! The best rows of all layers and heads together.

use super::check_count;
use super::cut::{Cut, ordered_key, ordered_row};
use crate::error::{ReferenceError, shape, value};

/// How [`threshold`] reads `keep`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ThresholdRule {
    /// Exactly so many.
    #[default]
    Exact,
    /// Those above the score of place keep − 1, the best having place 0: one fewer, and none of those that tie with it (the
    /// released Fast KVzip, arXiv 2601.17668).
    Strict,
}

/// Inputs of [`threshold`]; names and defaults as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct ThresholdInput<'a> {
    /// L.
    pub layers: usize,
    /// H.
    pub heads: usize,
    /// T.
    pub rows: usize,
    /// `[L, H, T]`.
    pub scores: &'a [f32],
    /// How many of all are kept.
    pub keep: usize,
    /// How that is read.
    pub rule: ThresholdRule,
    /// Best rows of each (layer, head) that are kept first and counted; 0 with [`ThresholdRule::Strict`].
    pub floor: usize,
}

/// What [`threshold`] chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// `[L, H, T]`: 1 where a row is kept.
    pub mask: Vec<u8>,
    /// `[L, H]`: how many of each are.
    pub lengths: Vec<i32>,
    /// `[L, H]`: what keeps the same rows, by [`ordered_row`] with the index (layer · H + head) · T + row.
    pub cuts: Vec<Cut>,
}

/// The `keep` best of all scores, ties to the lower (layer, head, row); no (layer, head) is left fewer than its `floor` best.
///
/// # Errors
/// A tensor of the wrong size, more to keep than there is, floors that are more than that, a floor with the strict rule.
pub fn threshold(i: &ThresholdInput<'_>) -> Result<Chosen, ReferenceError> {
    let (heads, all) = (i.layers * i.heads, i.scores.len());
    shape("scores", all, &[i.layers, i.heads, i.rows])?;
    check_count("scores", all)?;
    if i.keep > all {
        return value("keep", format!("{} is more than the {all} scores", i.keep));
    }
    if i.rule == ThresholdRule::Strict && i.floor > 0 {
        return value("floor", format!("{} with the strict rule; it must be 0", i.floor));
    }
    if i.floor.saturating_mul(heads) > i.keep {
        return value("floor", format!("{} rows of each of {heads} heads are more than the {} kept", i.floor, i.keep));
    }
    let ordered: Vec<u64> = i.scores.iter().enumerate().map(|(at, &x)| ordered_row(x, at as u32)).collect();
    let of_head = |head: usize| &ordered[head * i.rows..][..i.rows];
    let floors: Vec<Cut> = (0..heads).map(|head| Cut::of_best(of_head(head).to_vec(), i.floor)).collect();
    let shared = match i.rule {
        ThresholdRule::Exact => {
            let beyond = |(head, floor): (usize, &Cut)| {
                let floor = floor.0;
                of_head(head).iter().copied().filter(move |&row| row < floor)
            };
            Cut::of_best(floors.iter().enumerate().flat_map(beyond).collect(), i.keep - i.floor * heads)
        }
        ThresholdRule::Strict => strict(i.scores, i.keep),
    };
    // A head's rows have the same order alone as among all, so the cut that keeps more of them keeps what the other does.
    let cuts: Vec<Cut> = floors.iter().map(|&floor| floor.min(shared)).collect();
    let (mut mask, mut lengths) = (Vec::with_capacity(all), Vec::with_capacity(heads));
    for (head, cut) in cuts.iter().enumerate() {
        mask.extend(of_head(head).iter().map(|&row| u8::from(row >= cut.0)));
        lengths.push(mask[head * i.rows..].iter().map(|&kept| i32::from(kept)).sum());
    }
    Ok(Chosen { mask, lengths, cuts })
}

/// Above the score of place max(keep − 1, 0).
fn strict(scores: &[f32], keep: usize) -> Cut {
    let mut best = scores.to_vec();
    best.sort_by_key(|&x| std::cmp::Reverse(ordered_key(x)));
    best.get(keep.saturating_sub(1)).map_or(Cut::NONE, |&x| Cut::above(x))
}
