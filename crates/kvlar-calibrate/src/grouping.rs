//! Which kv heads share a latent: HSR (arXiv 2505.24357 §3.1), its released greedy rule, and the search for what it wants.

use crate::config::Grouping;
use crate::error::{Result, config};
use std::collections::HashMap;

/// Kv heads of each group.
pub type Groups = Vec<Vec<usize>>;

/// [`best`] tries every partition up to this many (16 heads in pairs are 2,027,025) …
pub const PARTITION_LIMIT: f64 = 2_100_000.0;
/// … if they are made of no more than this many different groups, each of which costs an eigendecomposition.
pub const GROUP_LIMIT: f64 = 1_000.0;
/// Different groups that the descent of [`best`] looks at before it settles.
pub const DESCENT_LIMIT: usize = 4_000;

/// Heads in order.
pub fn natural(heads: &[usize], size: usize) -> Groups {
    heads.chunks(size.max(1)).map(<[usize]>::to_vec).collect()
}

/// Ascending inside, ordered by first member.
pub fn canonical(mut groups: Groups) -> Groups {
    groups.iter_mut().for_each(|g| g.sort_unstable());
    groups.sort_unstable();
    groups
}

/// Refuses groups of a size that does not divide the heads.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config).
pub fn check_size(heads: usize, size: usize) -> Result<()> {
    if size == 0 || heads == 0 || !heads.is_multiple_of(size) {
        return config("size", format!("groups of {size} do not divide {heads} kv heads"));
    }
    Ok(())
}

/// Refuses groups that are not a partition of `heads` heads into groups of one size.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) naming the head.
pub fn check_partition(groups: &[Vec<usize>], heads: usize) -> Result<()> {
    let mut seen = vec![false; heads];
    let size = groups.first().map_or(0, Vec::len);
    if groups.iter().any(|g| g.len() != size || size == 0) {
        return config("groups", "they are not all of one size");
    }
    for h in groups.iter().flatten() {
        match seen.get_mut(*h) {
            None => return config("groups", format!("kv head {h} is not one of {heads}")),
            Some(true) => return config("groups", format!("kv head {h} is in two groups; they must partition the heads")),
            Some(s) => *s = true,
        }
    }
    match seen.iter().position(|s| !s) {
        Some(h) => config("groups", format!("kv head {h} is in no group; they must partition the heads")),
        None => Ok(()),
    }
}

/// Groups by one of the rules, [`canonical`], none with heads of two of the `shards` equal ranges of heads. `cost` is what
/// [`best`] minimizes; the greedy rule takes the `similarity` [heads, heads].
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) if shards do not divide the heads or `size` those of a shard; what `cost`
/// returns.
pub fn group(
    rule: Grouping,
    similarity: &[f64],
    heads: usize,
    size: usize,
    shards: usize,
    cost: &dyn Fn(&[usize]) -> Result<f64>,
) -> Result<Groups> {
    if shards == 0 || !heads.is_multiple_of(shards) {
        return config("shards", format!("{shards} does not divide {heads} kv heads"));
    }
    crate::error::shape("similarity", "[heads, heads]", heads * heads, similarity.len())?;
    let per_shard = heads / shards;
    let mut all = Groups::new();
    for first in (0..heads).step_by(per_shard.max(1)) {
        let own: Vec<usize> = (first..first + per_shard).collect();
        check_size(own.len(), size)?;
        let by_rule = || {
            let block: Vec<f64> = own.iter().flat_map(|i| own.iter().map(move |j| similarity[i * heads + j])).collect();
            let mut groups = greedy(&block, own.len(), size)?;
            groups.iter_mut().flatten().for_each(|h| *h += first);
            Ok(groups)
        };
        all.extend(match rule {
            Grouping::Natural => natural(&own, size),
            Grouping::Greedy => by_rule()?,
            Grouping::Best => best(&own, size, &[by_rule()?], cost)?,
        });
    }
    Ok(canonical(all))
}

/// The rule of ReCalKV's released code, quirks included, on a similarity [heads, heads].
///
/// Pairs by descending similarity, ties in lexicographic order. Two heads without a group both go to the first group with
/// any room, even if only one fits; a head whose partner has a group joins it if there is room. Heads left over, last
/// first, fill groups in order; groups that are too large give their last heads to the first with room. So the best two
/// disjoint pairs end in one group whenever it has room for both, alike or not.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) if `size` does not divide the heads.
pub fn greedy(similarity: &[f64], heads: usize, size: usize) -> Result<Groups> {
    check_size(heads, size)?;
    crate::error::shape("similarity", "[heads, heads]", heads * heads, similarity.len())?;
    let mut groups: Groups = vec![Vec::new(); heads / size];
    let mut group_of: Vec<Option<usize>> = vec![None; heads];
    let mut pairs: Vec<(usize, usize)> = (0..heads).flat_map(|i| (i + 1..heads).map(move |j| (i, j))).collect();
    pairs.sort_by(|a, b| similarity[b.0 * heads + b.1].total_cmp(&similarity[a.0 * heads + a.1]));
    for (i, j) in pairs {
        let (to, joining) = match (group_of[i], group_of[j]) {
            (None, None) => (groups.iter().position(|g| g.len() < size), vec![i, j]),
            (Some(g), None) => ((groups[g].len() < size).then_some(g), vec![j]),
            (None, Some(g)) => ((groups[g].len() < size).then_some(g), vec![i]),
            (Some(_), Some(_)) => (None, Vec::new()),
        };
        let Some(g) = to else { continue };
        for h in joining {
            groups[g].push(h);
            group_of[h] = Some(g);
        }
    }
    let mut left: Vec<usize> = (0..heads).filter(|h| group_of[*h].is_none()).collect();
    for g in &mut groups {
        while g.len() < size
            && let Some(h) = left.pop()
        {
            g.push(h);
        }
    }
    for g in 0..groups.len() {
        while groups[g].len() > size {
            let (Some(h), Some(to)) = (groups[g].pop(), groups.iter().position(|x| x.len() < size)) else { break };
            groups[to].push(h);
        }
    }
    Ok(groups)
}

/// How many ways there are to put `heads` heads into groups of `size` (infinite where f64 ends).
pub fn partition_count(heads: usize, size: usize) -> f64 {
    if size == 0 || !heads.is_multiple_of(size) {
        return 0.0;
    }
    (1..=heads / size).map(|g| choose(g * size - 1, size - 1)).product()
}

/// Binomial coefficient.
fn choose(n: usize, k: usize) -> f64 {
    (0..k).map(|i| (n - i) as f64 / (i + 1) as f64).product::<f64>().round()
}

/// Every partition of `heads` into groups of `size`, in lexicographic order.
pub fn partitions(heads: &[usize], size: usize) -> Vec<Groups> {
    let Some((first, rest)) = heads.split_first() else { return vec![Vec::new()] };
    if size == 0 || !heads.len().is_multiple_of(size) {
        return Vec::new();
    }
    let mut all = Vec::new();
    for others in subsets(rest, size - 1) {
        let remaining: Vec<usize> = rest.iter().copied().filter(|h| !others.contains(h)).collect();
        let group: Vec<usize> = std::iter::once(*first).chain(others).collect();
        for tail in partitions(&remaining, size) {
            all.push(std::iter::once(group.clone()).chain(tail).collect());
        }
    }
    all
}

/// Subsets of `k` of some heads, in lexicographic order.
fn subsets(of: &[usize], k: usize) -> Vec<Vec<usize>> {
    if k == 0 {
        return vec![Vec::new()];
    }
    let starts = of.iter().enumerate();
    starts
        .flat_map(|(i, h)| subsets(&of[i + 1..], k - 1).into_iter().map(move |rest| std::iter::once(*h).chain(rest).collect()))
        .collect()
}

/// What a group costs; asked once for each group. Groups are ascending.
struct Costs<'a> {
    cost: &'a dyn Fn(&[usize]) -> Result<f64>,
    known: HashMap<Vec<usize>, f64>,
}

impl Costs<'_> {
    fn of(&mut self, group: &[usize]) -> Result<f64> {
        let mut key = group.to_vec();
        key.sort_unstable();
        if let Some(c) = self.known.get(&key) {
            return Ok(*c);
        }
        let c = (self.cost)(&key)?;
        self.known.insert(key, c);
        Ok(c)
    }

    fn total(&mut self, groups: &[Vec<usize>]) -> Result<f64> {
        groups.iter().map(|g| self.of(g)).sum()
    }
}

/// The partition of `heads` into groups of `size` of least Σ `cost`, [`canonical`].
///
/// Exact up to [`PARTITION_LIMIT`] partitions of [`GROUP_LIMIT`] groups (8 heads in groups of 2 or 4, 16 in pairs); beyond
/// that, heads of two groups are swapped as long as it helps, from the natural order and from each of `starts`. Never worse
/// than the natural order or a start; on a tie (up to rounding) those stay.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for a size that does not divide the heads, and what `cost` returns.
pub fn best(heads: &[usize], size: usize, starts: &[Groups], cost: &dyn Fn(&[usize]) -> Result<f64>) -> Result<Groups> {
    check_size(heads.len(), size)?;
    let mut costs = Costs { cost, known: HashMap::new() };
    let mut found = natural(heads, size);
    let mut least = costs.total(&found)?;
    let exact = partition_count(heads.len(), size) <= PARTITION_LIMIT && choose(heads.len(), size) <= GROUP_LIMIT;
    // A gain below rounding is none; otherwise copies of heads would be shuffled at random.
    let clearly = |new: f64, old: f64| new < old - 1e-12 * old.abs();
    for start in starts.iter().cloned().map(canonical) {
        let c = costs.total(&start)?;
        if clearly(c, least) {
            (found, least) = (start, c);
        }
    }
    if exact {
        let mut search = Exact { costs: &mut costs, size, least, found: None, clearly: &clearly };
        search.descend(heads, 0.0, &mut Vec::new())?;
        if let Some(groups) = search.found {
            found = groups;
        }
    } else {
        for start in std::iter::once(natural(heads, size)).chain(starts.iter().cloned()) {
            let (groups, c) = swaps(start, &mut costs, &clearly)?;
            if clearly(c, least) {
                (found, least) = (groups, c);
            }
        }
    }
    Ok(canonical(found))
}

struct Exact<'a, 'c> {
    costs: &'a mut Costs<'c>,
    size: usize,
    least: f64,
    found: Option<Groups>,
    clearly: &'a dyn Fn(f64, f64) -> bool,
}

impl Exact<'_, '_> {
    fn descend(&mut self, heads: &[usize], so_far: f64, groups: &mut Groups) -> Result<()> {
        // Costs are not negative: a partial sum that is no better cannot get better.
        if !(self.clearly)(so_far, self.least) {
            return Ok(());
        }
        let Some((first, rest)) = heads.split_first() else {
            self.least = so_far;
            self.found = Some(groups.clone());
            return Ok(());
        };
        for others in subsets(rest, self.size - 1) {
            let remaining: Vec<usize> = rest.iter().copied().filter(|h| !others.contains(h)).collect();
            let group: Vec<usize> = std::iter::once(*first).chain(others).collect();
            let with = so_far + self.costs.of(&group)?;
            groups.push(group);
            self.descend(&remaining, with, groups)?;
            groups.pop();
        }
        Ok(())
    }
}

/// Swaps heads of two groups as long as it helps.
fn swaps(mut groups: Groups, costs: &mut Costs<'_>, clearly: &dyn Fn(f64, f64) -> bool) -> Result<(Groups, f64)> {
    let mut better = true;
    while better && costs.known.len() < DESCENT_LIMIT {
        better = false;
        for a in 0..groups.len() {
            for b in a + 1..groups.len() {
                better |= swap_between(&mut groups, a, b, costs, clearly)?;
            }
        }
    }
    let total = costs.total(&groups)?;
    Ok((groups, total))
}

fn swap_between(
    groups: &mut Groups,
    a: usize,
    b: usize,
    costs: &mut Costs<'_>,
    clearly: &dyn Fn(f64, f64) -> bool,
) -> Result<bool> {
    let mut better = false;
    for i in 0..groups[a].len() {
        for j in 0..groups[b].len() {
            if costs.known.len() >= DESCENT_LIMIT {
                return Ok(better);
            }
            let (mut left, mut right) = (groups[a].clone(), groups[b].clone());
            std::mem::swap(&mut left[i], &mut right[j]);
            let before = costs.of(&groups[a])? + costs.of(&groups[b])?;
            if clearly(costs.of(&left)? + costs.of(&right)?, before) {
                (groups[a], groups[b], better) = (left, right, true);
            }
        }
    }
    Ok(better)
}
