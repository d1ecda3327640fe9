//! topk, of rows and of sets of them.

use super::memory::{int, read, write};
use crate::{Result, abi};
use kvlar_reference::{Cut, ordered_row};

/// A row of scores of a set.
struct Row {
    scores: Vec<f32>,
    /// Scores of the set in the rows before.
    before: u32,
    sinks: usize,
    recent: usize,
}

impl Row {
    /// # Safety
    /// As for [`super::run`].
    unsafe fn read(p: &abi::KvlarTopk, row: i64) -> Self {
        let columns = p.row_count as i32;
        let length = if p.lengths == 0 { columns } else { unsafe { int(p.lengths, row) }.clamp(0, columns) };
        let scores = unsafe { read(p.scores.wrapping_add_signed(4 * row * p.score_stride), length as usize) };
        let before = (row % i64::from(p.members)) as u32 * p.row_count;
        Self { scores, before, sinks: p.sink_rows as usize, recent: p.recent_rows as usize }
    }

    fn is_forced(&self, i: usize) -> bool {
        i < self.sinks || i >= self.scores.len().saturating_sub(self.recent)
    }

    fn place(&self, i: usize) -> u64 {
        ordered_row(self.scores[i], self.before + i as u32)
    }

    fn kept(&self, cut: Cut) -> Vec<i32> {
        (0..self.scores.len()).filter(|&i| self.is_forced(i) || self.place(i) >= cut.0).map(|i| i as i32).collect()
    }
}

/// Cuts of all sets, and what they keep: what a launch of `kvlar_topk` does, or all of those for sets.
///
/// # Safety
/// As for [`super::run`].
pub unsafe fn topk(p: &abi::KvlarTopk) -> Result<()> {
    for set in 0..u64::from(p.rows / p.members) {
        let first = (set * u64::from(p.members)) as i64;
        let rows: Vec<Row> = (first..first + i64::from(p.members)).map(|row| unsafe { Row::read(p, row) }).collect();
        let cut = unsafe { cut(p, set as i64, &rows) };
        if p.cuts != 0 {
            unsafe { write(p.cuts + 8 * set, &[cut.0]) };
        }
        for (row, m) in rows.iter().zip(first as u64..) {
            unsafe { put(p, m, &row.kept(cut)) };
        }
    }
    Ok(())
}

/// # Safety
/// As for [`super::run`].
unsafe fn cut(p: &abi::KvlarTopk, set: i64, rows: &[Row]) -> Cut {
    let k = if p.ks == 0 { p.k as i32 } else { unsafe { int(p.ks, set * p.k_stride) }.min(p.k as i32) };
    let all = rows.iter().flat_map(|row| (0..row.scores.len()).map(move |i| (row, i)));
    let (forced, free): (Vec<_>, Vec<_>) = all.partition(|(row, i)| row.is_forced(*i));
    let mut free: Vec<u64> = free.into_iter().map(|(row, i)| row.place(i)).collect();
    let need = (k.max(0) as usize).saturating_sub(forced.len());
    if p.strict == 0 || need == 0 || free.is_empty() {
        return Cut::of_best(free, need);
    }
    free.sort_unstable_by(|a, b| b.cmp(a));
    Cut(((free[need.min(free.len()) - 1] >> 32) + 1) << 32)
}

/// What is asked for of a row.
///
/// # Safety
/// As for [`super::run`].
unsafe fn put(p: &abi::KvlarTopk, row: u64, kept: &[i32]) {
    if p.counts != 0 {
        unsafe { write(p.counts + 4 * row, &[kept.len() as i32]) };
    }
    if p.selected != 0 {
        let mut all = kept.to_vec();
        all.resize(p.k as usize, -1);
        unsafe { write(p.selected + 4 * row * u64::from(p.k), &all) };
    }
    if p.mask != 0 {
        let mut mask = vec![0u8; p.row_count as usize];
        kept.iter().for_each(|&i| mask[i as usize] = 1);
        unsafe { write(p.mask + row * u64::from(p.row_count), &mask) };
    }
}
