//! budget_layers and budget_heads, from counts.

use super::memory::{int, read, write};
use crate::{LayerBudget, Result, abi};
use kvlar_reference::{LayersInput, budget_layers, largest_remainder};

/// Rows that a set's scores are of.
///
/// # Safety
/// As for [`super::run`].
unsafe fn rows_of(p: &abi::KvlarBudget, set: u64) -> usize {
    let rows = p.row_count as i32;
    let length = || unsafe { int(p.lengths, (set / u64::from(p.length_sets)) as i64) }.clamp(0, rows);
    if p.lengths == 0 { rows as usize } else { length() as usize }
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn layers(p: &abi::KvlarBudget) -> Result<()> {
    let (layers, heads) = (p.layers as usize, p.heads as usize);
    for set in 0..u64::from(p.sets) {
        let rows = unsafe { rows_of(p, set) };
        let at = p.budgets + 4 * set * layers as u64;
        let budgets: Vec<i32> = match p.method {
            abi::KVLAR_BUDGET_DYNAMIC => unsafe { dynamic(p, set, at, rows) },
            _ => {
                let pyramid = p.method == abi::KVLAR_BUDGET_PYRAMID;
                let method = if pyramid { LayerBudget::Pyramid } else { LayerBudget::Uniform };
                let (base, beta) = (p.base as usize, p.beta as usize);
                let i = LayersInput { layers, heads: 0, rows, scores: &[], base, method, r_max: 1.0, interval: 1, beta };
                budget_layers(&i)?
            }
        };
        unsafe { write(at, &budgets) };
        if p.ks != 0 {
            let ks: Vec<i32> = budgets.iter().flat_map(|b| vec![b + p.forced as i32; heads]).collect();
            unsafe { write(p.ks + 4 * set * (layers * heads) as u64, &ks) };
        }
    }
    Ok(())
}

/// # Safety
/// As for [`super::run`].
unsafe fn dynamic(p: &abi::KvlarBudget, set: u64, budgets: u64, rows: usize) -> Vec<i32> {
    let (layers, heads, seen) = (p.layers as usize, p.heads as usize, p.seen as usize);
    let counts: Vec<i32> = unsafe { read(p.counts + 4 * set * (seen * heads) as u64, seen * heads) };
    let counts: Vec<usize> = (0..seen).map(|l| counts[l * heads..][..heads].iter().map(|&c| c as usize).sum()).collect();
    let mut held = vec![(p.most as usize).min(rows); layers];
    let before: Vec<i32> = unsafe { read(budgets, p.known as usize) };
    held.iter_mut().zip(before).for_each(|(held, before)| *held = before as usize);
    let shares = largest_remainder(&counts, p.base as usize * layers);
    held.iter_mut().zip(shares).for_each(|(held, share)| *held = share.min(*held));
    held.into_iter().map(|rows| rows as i32).collect()
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn heads(p: &abi::KvlarBudget) -> Result<()> {
    let heads = u64::from(p.heads);
    for head in 0..u64::from(p.sets) * heads {
        let rows = unsafe { rows_of(p, head / heads) };
        let count = unsafe { int(p.counts, head as i64) };
        let budget = (f64::from(count) * p.head_share + f64::from(p.head_floor)).round_ties_even().min(rows as f64) as i32;
        unsafe { write(p.budgets + 4 * head, &[budget]) };
        if p.ks != 0 {
            unsafe { write(p.ks + 4 * head, &[budget + p.forced as i32]) };
        }
    }
    Ok(())
}
