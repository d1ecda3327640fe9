//! How many rows each layer, or each kv head of a layer, may keep.

use crate::error::{ReferenceError, shape, value};
use crate::select::{Cut, check_count, ordered_row};

/// How [`budget_layers`] shares out rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerBudget {
    /// By where the best scores are (DynamicKV, arXiv 2412.14838): [`dynamickv_rounds`].
    DynamicKv,
    /// By depth (PyramidKV, arXiv 2406.02069): evenly falling, from 2 base − base/beta rows in the first layer to base/beta in
    /// the last; from P to 2 base − P where there are fewer rows.
    Pyramid,
    /// The same for each.
    Uniform,
}

/// Inputs of [`budget_layers`]; names and defaults as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct LayersInput<'a> {
    /// L.
    pub layers: usize,
    /// H.
    pub heads: usize,
    /// P: rows that scores are of, those that are always kept left out.
    pub rows: usize,
    /// `[L, H, P]`.
    pub scores: &'a [f32],
    /// Rows of a head, on average over layers.
    pub base: usize,
    /// How.
    pub method: LayerBudget,
    /// DynamicKV: a layer keeps at most this times `base`, from the start. Default 10.
    pub r_max: f64,
    /// DynamicKV: layers between two rounds. Default 4.
    pub interval: usize,
    /// PyramidKV: how many times less than `base` the last layer keeps. Default 20.
    pub beta: usize,
}

/// Rows `[L]` that each head of a layer keeps, of P. They sum to at most `base` · L; what a layer has no rows for is not handed
/// on to others.
///
/// # Errors
/// A tensor of the wrong size or too large to be ordered, a `base` above i32, an `r_max` that is not a finite number above 0,
/// an `interval` of 0 or a `beta` outside 1..=2²⁰ (what kernels can count exactly); whatever the method is.
pub fn budget_layers(i: &LayersInput<'_>) -> Result<Vec<i32>, ReferenceError> {
    check(i)?;
    let uniform = || vec![i.base.min(i.rows); i.layers];
    let budgets = match i.method {
        LayerBudget::DynamicKv => dynamickv_rounds(i)?.pop().unwrap_or_default(),
        LayerBudget::Pyramid if i.base < i.rows && i.layers > 1 => pyramid(i),
        LayerBudget::Pyramid | LayerBudget::Uniform => uniform(),
    };
    Ok(budgets.into_iter().map(|rows| rows as i32).collect())
}

fn check(i: &LayersInput<'_>) -> Result<(), ReferenceError> {
    shape("scores", i.scores.len(), &[i.layers, i.heads, i.rows])?;
    check_sizes(i.scores.len().max(i.rows), i.base)?;
    if !(i.r_max > 0.0 && i.r_max.is_finite()) {
        return value("r_max", format!("{} is not a finite number above 0", i.r_max));
    }
    if i.interval == 0 {
        return value("interval", "0; it must be at least 1");
    }
    if i.beta == 0 || i.beta > 1 << 20 {
        return value("beta", format!("{} is outside 1..=1048576", i.beta));
    }
    Ok(())
}

fn check_sizes(scores: usize, base: usize) -> Result<(), ReferenceError> {
    check_count("scores", scores)?;
    if base <= i32::MAX as usize { Ok(()) } else { value("base", format!("{base} is more than rows can be")) }
}

/// Budgets of the layers seen so far after each round of DynamicKV; the last, of all layers, are the result.
///
/// A layer starts with min(⌊r_max · base⌋, P). After every `interval` layers, and after the last, the n seen share the rows of
/// the whole model, base · L, in proportion to how many of the base · H · n best scores of all n are each one's
/// ([`best_counts`]), by [`largest_remainder`]. No layer's budget grows again: what it let go is gone. So the first rounds are
/// loose, and the last is tight.
///
/// The released code differs where it is wrong: it floors shares several times and gives what is left to the last layer,
/// leaves the layers behind the last whole interval as they were, and lets a budget exceed what a layer still holds.
///
/// # Errors
/// As [`budget_layers`].
pub fn dynamickv_rounds(i: &LayersInput<'_>) -> Result<Vec<Vec<usize>>, ReferenceError> {
    check(i)?;
    let layer = i.heads * i.rows;
    let mut held: Vec<usize> = Vec::new();
    let mut rounds = Vec::new();
    for first in (0..i.layers).step_by(i.interval) {
        let seen = first.saturating_add(i.interval).min(i.layers);
        held.resize(seen, ((i.r_max * i.base as f64).floor() as usize).min(i.rows));
        let counts = best_counts(&i.scores[..seen * layer], seen, i.base.saturating_mul(i.heads * seen));
        let shares = largest_remainder(&counts, i.base * i.layers);
        held.iter_mut().zip(shares).for_each(|(held, share)| *held = share.min(*held));
        rounds.push(held.clone());
    }
    Ok(rounds)
}

/// A line from max to min = 2 base − max that averages `base`, each layer's point rounded so that they sum to base · L.
fn pyramid(i: &LayersInput<'_>) -> Vec<usize> {
    // Budgets times beta and points times beta · (L − 1) are whole. `base` is less than P, L at least 2.
    let (base, rows, beta, steps) = (i.base as u128, i.rows as u128, i.beta as u128, i.layers as u128 - 1);
    let max = (2 * base * beta - base).min(rows * beta);
    let min = 2 * base * beta - max;
    let point = |layer| max * (steps - layer) + min * layer;
    round_to_sum((0..=steps).map(|layer| (point(layer), beta * steps)).collect(), i.base * i.layers)
}

/// `total` shared out in proportion to `counts`: floors of the shares, then one more each for the largest fractions, ties to
/// the lower index. Nothing where all counts are 0.
pub fn largest_remainder(counts: &[usize], total: usize) -> Vec<usize> {
    let sum: usize = counts.iter().sum();
    if sum == 0 {
        return vec![0; counts.len()];
    }
    round_to_sum(counts.iter().map(|&c| (c as u128 * total as u128, sum as u128)).collect(), total)
}

/// Fractions of one denominator that sum to `total`, made whole by largest remainder, ties to the lower index.
fn round_to_sum(fractions: Vec<(u128, u128)>, total: usize) -> Vec<usize> {
    let mut whole: Vec<usize> = fractions.iter().map(|(above, below)| (above / below) as usize).collect();
    let left = total - whole.iter().sum::<usize>();
    let mut order: Vec<usize> = (0..whole.len()).collect();
    order.sort_by_key(|&at| std::cmp::Reverse(fractions[at].0 % fractions[at].1)); // stable
    order[..left].iter().for_each(|&at| whole[at] += 1);
    whole
}

/// How many of the `best` highest scores lie in each of `parts` equal parts; all scores if there are fewer. Their order is
/// that of [`ordered_row`].
pub fn best_counts(scores: &[f32], parts: usize, best: usize) -> Vec<usize> {
    let ordered: Vec<u64> = scores.iter().enumerate().map(|(at, &x)| ordered_row(x, at as u32)).collect();
    let (cut, part) = (Cut::of_best(ordered.clone(), best), scores.len() / parts.max(1));
    (0..parts).map(|p| ordered[p * part..][..part].iter().filter(|&&row| row >= cut.0).count()).collect()
}

/// Inputs of [`budget_heads`]; names and defaults as in `OPS.md`.
#[derive(Clone, Copy, Debug)]
pub struct HeadsInput<'a> {
    /// H.
    pub heads: usize,
    /// P.
    pub rows: usize,
    /// `[H, P]`, of one layer.
    pub scores: &'a [f32],
    /// Rows of a head, on average.
    pub base: usize,
    /// The share of `base` that every head gets, 0..=1.
    pub alpha: f64,
}

/// Rows `[H]` that each head of a layer keeps, of P (AdaKV, arXiv 2407.11550): (1 − alpha) c + ⌊alpha · base⌋, c being how many
/// of the base · H best scores of the layer are the head's ([`best_counts`]).
///
/// Each is rounded alone, halves to even, so their sum may differ from base · H.
///
/// # Errors
/// A tensor of the wrong size or too large to be ordered, a `base` above i32, an `alpha` outside 0..=1.
pub fn budget_heads(i: &HeadsInput<'_>) -> Result<Vec<i32>, ReferenceError> {
    shape("scores", i.scores.len(), &[i.heads, i.rows])?;
    check_sizes(i.scores.len().max(i.rows), i.base)?;
    if !(0.0..=1.0).contains(&i.alpha) {
        return value("alpha", format!("{} is outside 0..=1", i.alpha));
    }
    let counts = best_counts(i.scores, i.heads, i.base.saturating_mul(i.heads));
    let floor = (i.alpha * i.base as f64).floor();
    let budget = |count: usize| (count as f64 * (1.0 - i.alpha) + floor).round_ties_even();
    Ok(counts.into_iter().map(|count| budget(count).min(i.rows as f64) as i32).collect())
}
