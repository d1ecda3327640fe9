//! Ranks of every layer's keys and values.

use crate::budget::{self, Candidate, Cost};
use crate::config::{Budget, RecalkvConfig};
use crate::error::{Result, config as refuse};
use crate::grouping::Groups;
use crate::shape::ModelShape;

/// What a side was given.
#[derive(Clone, Debug)]
pub(super) struct Dealt {
    /// Rank of a group; `None` = dense.
    pub rank: Option<usize>,
    /// Its groups, if they are known by now.
    pub groups: Option<Groups>,
}

/// Costs of [keys, values].
pub(super) fn costs(config: &RecalkvConfig, model: &ModelShape) -> [Cost; 2] {
    let layer = model.layer;
    let cost = |size: usize, dim: usize, latent| Cost { groups: layer.kv_heads / size, full: size * dim, latent };
    [cost(config.key_group, layer.head_dim, config.latent_keys), cost(config.value_group, layer.value_dim, config.latent_values)]
}

/// Ranks of [keys, values] that one attention can read: quantized values need key latents of their kind, so that keys which
/// would stay dense beside them are latents of full rank.
fn beside(config: &RecalkvConfig, costs: [Cost; 2], [keys, values]: [Option<usize>; 2]) -> [Option<usize>; 2] {
    let quantized = values.is_some() && config.latent_values.is_quantized();
    let full = || costs[0].full.next_multiple_of(config.multiple);
    [keys.or_else(|| quantized.then(full)), values]
}

/// Ranks that do not depend on the data: [keys, values] of each layer, `None` = dense.
pub(super) fn dealt(
    config: &RecalkvConfig,
    model: &ModelShape,
    importance: Option<&[[f64; 2]]>,
) -> Result<Vec<[Option<usize>; 2]>> {
    let costs = costs(config, model);
    let sparing = |c: Cost, rank: usize| (!c.is_dense(rank)).then_some(rank);
    let same = |rank: [Option<usize>; 2]| Ok(vec![beside(config, costs, rank); model.layers]);
    match config.budget {
        Budget::Fixed { keys, values } => {
            let padded = |c: Cost, rank: usize| sparing(c, rank.next_multiple_of(config.multiple));
            same([padded(costs[0], keys), padded(costs[1], values)])
        }
        Budget::Uniform | Budget::Spectral => {
            let share = |c: Cost| {
                if config.kept >= 1.0 { None } else { sparing(c, c.rank_for(config.kept * c.dense() as f64, config.multiple)) }
            };
            same(costs.map(share))
        }
        Budget::Proportional => {
            let Some(importance) = importance else { return refuse("importance", "a proportional budget needs it") };
            let full: Vec<usize> = (0..model.layers).flat_map(|_| costs.map(|c| c.groups * c.full)).collect();
            let flat: Vec<f64> = importance.iter().flatten().copied().collect();
            let ranks = budget::proportional(&flat, &full, budget::budget(config.kept, full.iter().sum()))?;
            let side = |c: Cost, dealt: usize| {
                if dealt >= c.groups * c.full {
                    return None;
                }
                // The released code divides a layer's rank by its groups as integers. A rank is worth its 16-bit bytes.
                let bytes = 2 * (dealt / c.groups) * c.groups;
                sparing(c, c.rank_for(bytes as f64, config.multiple))
            };
            Ok(ranks.chunks_exact(2).map(|r| beside(config, costs, [side(costs[0], r[0]), side(costs[1], r[1])])).collect())
        }
    }
}

/// Ranks from the spectra of every layer's [keys, values], whose groups are settled.
pub(super) fn spectral(
    config: &RecalkvConfig,
    model: &ModelShape,
    candidates: Vec<[(Candidate, Groups); 2]>,
) -> Result<Vec<[Dealt; 2]>> {
    let bytes = config.kept * (model.layers * model.layer.dense_bytes()) as f64;
    let (flat, groups): (Vec<_>, Vec<_>) = candidates.into_iter().flatten().unzip();
    let ranks = budget::spectral(&flat, bytes, config.multiple)?;
    let mut groups = groups.into_iter().map(Some);
    let mut layers = Vec::with_capacity(model.layers);
    for (ranks, pair) in ranks.chunks_exact(2).zip(flat.chunks_exact(2)) {
        let sparing = |i: usize| (!pair[i].cost.is_dense(ranks[i])).then_some(ranks[i]);
        let sides = beside(config, costs(config, model), [sparing(0), sparing(1)]);
        layers.push(sides.map(|rank| Dealt { rank, groups: groups.next().flatten() }));
    }
    Ok(layers)
}
