//! Whether a plan fits together.

use super::{Factors, PLAN_FORMAT, Plan, Side};
use crate::config::check_multiple;

/// What is wrong with a plan, if anything.
pub(super) fn problem(plan: &Plan) -> Option<String> {
    if plan.format != PLAN_FORMAT {
        return Some(format!("format {}; this build writes {PLAN_FORMAT}", plan.format));
    }
    if let Err(e) = plan.model.checked().and_then(|_| check_multiple(plan.config.multiple())) {
        return Some(e.to_string());
    }
    if plan.layers.len() != plan.model.layers {
        return Some(format!("{} layers; its model has {}", plan.layers.len(), plan.model.layers));
    }
    let shape = plan.model.layer;
    for (l, layer) in plan.layers.iter().enumerate() {
        for (name, side, dim) in [("keys", &layer.keys, shape.head_dim), ("values", &layer.values, shape.value_dim)] {
            let p = match side {
                Side::Dense => None,
                Side::LowRank(f) => factors(f, shape.kv_heads, dim, plan.config.multiple()),
                Side::Quantized(q) => q.problem(shape.kv_heads, dim),
            };
            if let Some(p) = p {
                return Some(format!("layer {l}, {name}: {p}"));
            }
        }
    }
    None
}

/// What is wrong with the groups and rank, which tensor shapes follow from.
pub(super) fn layout(groups: &[Vec<usize>], rank: usize, heads: usize, dim: usize, multiple: usize) -> Option<String> {
    let mut seen = vec![false; heads];
    for h in groups.iter().flatten() {
        match seen.get_mut(*h) {
            None => return Some(format!("kv head {h} of {heads} is in a group")),
            Some(s) if *s => return Some(format!("kv head {h} is in two groups")),
            Some(s) => *s = true,
        }
    }
    if let Some(h) = seen.iter().position(|s| !s) {
        return Some(format!("kv head {h} is in no group"));
    }
    let size = groups[0].len();
    if size == 0 || groups.iter().any(|g| g.len() != size) {
        return Some("groups are of different sizes".into());
    }
    let full = (size * dim).next_multiple_of(multiple);
    if rank == 0 || rank > full {
        return Some(format!("rank {rank} is outside 1..={full} ({size} heads x {dim}, padded)"));
    }
    None
}

fn factors(f: &Factors, heads: usize, dim: usize, multiple: usize) -> Option<String> {
    if let Some(p) = layout(&f.groups, f.rank, heads, dim, multiple) {
        return Some(p);
    }
    let size = f.groups[0].len();
    let parts = [
        ("basis", Some(&f.basis), heads * dim * f.rank),
        ("encoder", Some(&f.encoder), f.groups.len() * f.rank * size * dim),
        ("mean", f.mean.as_ref(), heads * dim),
    ];
    for (name, values, expected) in parts {
        let Some(values) = values else { continue };
        if values.len() != expected {
            return Some(format!("{name} has {} numbers instead of {expected}", values.len()));
        }
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Some(format!("{name} holds {} (number {at})", values[at]));
        }
    }
    None
}
