//! Ranks from a budget.

use crate::config::Latent;
use crate::error::{Result, config};

/// `total` ranks dealt out in proportion to `importance`, at most `full` each: floors of the shares of `total`, which need not
/// be whole; then what is left of its whole part, one each in passes by largest remainder (ties to the lower index), skipping
/// full ones (ReCalKV's released `fisher_uniform`; it lets a fractional total hand out a pass too many, this one does not).
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for lengths that differ, negative or non-finite importances, none above 0, or a
/// total that is negative or not finite.
pub fn proportional(importance: &[f64], full: &[usize], total: f64) -> Result<Vec<usize>> {
    if importance.len() != full.len() {
        return config("importance", format!("{} values for {} matrices", importance.len(), full.len()));
    }
    if let Some(x) = importance.iter().find(|x| !x.is_finite() || **x < 0.0) {
        return config("importance", format!("{x} is not a finite number of at least 0"));
    }
    let sum: f64 = importance.iter().sum();
    if sum <= 0.0 || !sum.is_finite() {
        return config("importance", format!("the values sum to {sum}: there is no proportion; use a uniform budget"));
    }
    if !total.is_finite() || total < 0.0 {
        return config("total", format!("{total} ranks cannot be dealt out"));
    }
    let total = snapped(total);
    let shares: Vec<f64> = importance.iter().map(|f| total * f / sum).collect();
    let mut ranks: Vec<usize> = shares.iter().zip(full).map(|(s, f)| (s.floor() as usize).min(*f)).collect();
    let remainder = |i: usize| shares[i] - ranks[i] as f64;
    let mut order: Vec<usize> = (0..full.len()).collect();
    order.sort_by(|a, b| remainder(*b).total_cmp(&remainder(*a)));
    let mut left = (total as usize).min(full.iter().sum()).saturating_sub(ranks.iter().sum());
    while left > 0 {
        order.retain(|&i| ranks[i] < full[i]);
        // As many whole passes at once as go before one of them is full; the last pass may end early.
        let passes = order.iter().map(|&i| full[i] - ranks[i]).fold(left / order.len(), usize::min).max(1);
        for &i in order.iter().take(left) {
            ranks[i] += passes;
            left -= passes;
        }
    }
    Ok(ranks)
}

/// `rank` rounded to the nearest multiple (halves to the even one, as the released code), at least one multiple, at most
/// `full`.
pub fn round(rank: f64, multiple: usize, full: usize) -> usize {
    let steps = (rank / multiple as f64).round_ties_even().max(1.0);
    ((steps as usize).saturating_mul(multiple)).min(full)
}

/// The op `budget_ranks`: `keep` of all ranks, dealt out by [`proportional`], then [`round`]ed; so the sum may differ from
/// the budget.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) as [`proportional`], and for `keep` outside 0..=1, a `multiple` or `full` of 0.
pub fn budget_ranks(importance: &[f64], full: &[usize], keep: f64, multiple: usize) -> Result<Vec<usize>> {
    if !(0.0..=1.0).contains(&keep) {
        return config("keep", format!("{keep} is outside 0..=1"));
    }
    if multiple == 0 {
        return config("multiple", "0 is not a step of ranks");
    }
    if full.contains(&0) {
        return config("full", "a matrix has no rank at all");
    }
    Ok(proportional(importance, full, budget(keep, full.iter().sum()))?
        .iter()
        .zip(full)
        .map(|(r, f)| round(*r as f64, multiple, *f))
        .collect())
}

/// `keep` of `all` ranks: seldom a whole number; what only rounding keeps from one counts as that.
pub fn budget(keep: f64, all: usize) -> f64 {
    snapped(keep * all as f64)
}

/// The nearest whole number where that is within 1e-9, or within rounding of large numbers; else `x`.
fn snapped(x: f64) -> f64 {
    let whole = x.round();
    if (x - whole).abs() <= 1e-9f64.max(1e-12 * x.abs()) { whole } else { x }
}

/// What the rank of one side of one layer costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cost {
    /// Head groups.
    pub groups: usize,
    /// Numbers of a group's row: size · dim.
    pub full: usize,
    /// What a latent is stored as.
    pub latent: Latent,
}

impl Cost {
    /// Bytes of a 16-bit row.
    pub fn dense(&self) -> usize {
        2 * self.groups * self.full
    }

    /// Whether rows at that rank are better kept dense: latents would hold nothing less, or take no fewer bytes.
    pub fn is_dense(&self, rank: usize) -> bool {
        self.groups * self.latent.row_bytes(rank) >= self.dense() || (rank >= self.full && self.latent == Latent::Model)
    }

    /// Stored bytes of a row at that rank.
    pub fn bytes(&self, rank: usize) -> usize {
        if self.is_dense(rank) { self.dense() } else { self.groups * self.latent.row_bytes(rank) }
    }

    /// The stored rank nearest to `bytes` a row, scales taken off: a multiple, at least one, at most all (padded).
    pub fn rank_for(&self, bytes: f64, multiple: usize) -> usize {
        let numbers = (bytes / self.groups as f64 - self.latent.row_overhead() as f64) * 8.0 / self.latent.bits() as f64;
        round(numbers, multiple, self.full.next_multiple_of(multiple))
    }
}

/// One side of one layer, for [`spectral`].
#[derive(Clone, Debug)]
pub struct Candidate {
    /// What its rank costs.
    pub cost: Cost,
    /// Eigenvalues of each group, descending.
    pub spectra: Vec<Vec<f64>>,
}

/// Ranks (a group) for `bytes` a token, by water-filling: each matrix starts at one `multiple`; then the step of `multiple`
/// that saves most discarded energy a byte, relative to its matrix's whole energy, is taken as long as one fits.
///
/// Eigenvalues descend, so a matrix's next step never saves more a byte than its last: where all steps cost alike, taking
/// the best each time leaves the least sum of relative discarded energies. The result costs at most `bytes`, unless one
/// multiple each does already.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for a `multiple` of 0.
pub fn spectral(candidates: &[Candidate], bytes: f64, multiple: usize) -> Result<Vec<usize>> {
    if multiple == 0 {
        return config("multiple", "0 is not a step of ranks");
    }
    let mut ranks = vec![multiple; candidates.len()];
    let mut spent: usize = candidates.iter().map(|c| c.cost.bytes(multiple)).sum();
    loop {
        let mut best: Option<(f64, usize, usize)> = None;
        for (i, c) in candidates.iter().enumerate() {
            let (cost, next) = (c.cost, ranks[i] + multiple);
            if ranks[i] >= cost.full || cost.is_dense(ranks[i]) {
                continue;
            }
            let more = cost.bytes(next).saturating_sub(cost.bytes(ranks[i]));
            let energy: f64 = c.spectra.iter().flatten().sum();
            let saved: f64 = c.spectra.iter().flat_map(|s| s.iter().skip(ranks[i]).take(multiple)).sum();
            if (spent + more) as f64 > bytes || energy <= 0.0 {
                continue;
            }
            let gain = saved / energy / more.max(1) as f64;
            if best.is_none_or(|b| gain > b.0) {
                best = Some((gain, i, more));
            }
        }
        let Some((_, i, more)) = best else { return Ok(ranks) };
        ranks[i] += multiple;
        spent += more;
    }
}
