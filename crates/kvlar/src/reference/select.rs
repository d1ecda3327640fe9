//! topk and topp, of rows and of sets of them.

use super::memory::{int, read, write};
use crate::{Result, abi};
use kvlar_reference::{Cut, Forced, Resolve, ToppInput, ordered_row};

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
        let (columns, members) = (p.row_count as i32, i64::from(p.members));
        let at = row / members * i64::from(p.set_rows) + row % members;
        let shared = at / i64::from(p.length_rows);
        let length = if p.lengths == 0 { columns } else { unsafe { int(p.lengths, shared) }.clamp(0, columns) };
        let scores = unsafe { read(p.scores.wrapping_add_signed(4 * at * p.score_stride), length as usize) };
        let before = (row % members) as u32 * p.row_count;
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

/// Cuts of all sets, and what they keep: what the launches of `kvlar_topk_*` do.
///
/// # Safety
/// As for [`super::run`].
pub unsafe fn sets(p: &abi::KvlarTopk) -> Result<()> {
    for set in 0..u64::from(p.rows / p.members) {
        let first = set * u64::from(p.members);
        let rows: Vec<Row> = (first..first + u64::from(p.members)).map(|row| unsafe { Row::read(p, row as i64) }).collect();
        let floor = |row: u64| if p.floor == 0 { Cut::NONE } else { Cut(unsafe { read(p.cuts + 8 * row, 1) }[0]) };
        let floors: Vec<Cut> = (first..first + u64::from(p.members)).map(floor).collect();
        let cut = unsafe { cut(p, set as i64, &rows, &floors) };
        if p.cuts != 0 && p.floor == 0 {
            unsafe { write(p.cuts + 8 * set, &[cut.0]) };
        }
        for ((row, floor), m) in rows.iter().zip(floors).zip(first..) {
            if p.floor > 0 {
                unsafe { write(p.cuts + 8 * m, &[cut.min(floor).0]) };
            }
            unsafe { put(p, m, &row.kept(cut.min(floor))) };
        }
    }
    Ok(())
}

/// Cuts of all rows, each by itself, and what they keep: what a launch of `kvlar_topk` does.
///
/// # Safety
/// As for [`super::run`].
pub unsafe fn rows(p: &abi::KvlarTopk) -> Result<()> {
    for row in 0..u64::from(p.rows) {
        let scores = unsafe { Row::read(p, row as i64) };
        let cut = unsafe { cut(p, row as i64, std::slice::from_ref(&scores), &[Cut::NONE]) };
        if p.cuts != 0 {
            unsafe { write(p.cuts + 8 * row, &[cut.0]) };
        }
        unsafe { put(p, row, &scores.kept(cut)) };
    }
    Ok(())
}

/// The cut of row `row`, all of whose scores these are.
///
/// # Safety
/// As for [`super::run`].
pub unsafe fn cut_of(p: &abi::KvlarTopk, row: i64, scores: Vec<f32>) -> u64 {
    let row_of = Row { scores, before: 0, sinks: p.sink_rows as usize, recent: p.recent_rows as usize };
    unsafe { cut(p, row, &[row_of], &[Cut::NONE]) }.0
}

/// What keeps the best of a set's rows: of those below their row's floor, if it has one.
///
/// # Safety
/// As for [`super::run`].
unsafe fn cut(p: &abi::KvlarTopk, set: i64, rows: &[Row], floors: &[Cut]) -> Cut {
    let k = if p.ks == 0 { p.k as i32 } else { unsafe { int(p.ks, set * p.k_stride) }.min(p.k as i32) };
    let all = rows.iter().zip(floors).flat_map(|(row, floor)| (0..row.scores.len()).map(move |i| (row, floor, i)));
    let (kept, free): (Vec<_>, Vec<_>) = all.partition(|(row, floor, i)| row.is_forced(*i) || row.place(*i) >= floor.0);
    let mut free: Vec<u64> = free.into_iter().map(|(row, _, i)| row.place(i)).collect();
    let need = (k.max(0) as usize).saturating_sub(kept.len());
    if p.strict == 0 || need == 0 || free.is_empty() {
        return Cut::of_best(free, need);
    }
    free.sort_unstable_by(|a, b| b.cmp(a));
    Cut(((free[need.min(free.len()) - 1] >> 32) + 1) << 32)
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn topp(p: &abi::KvlarTopp) -> Result<()> {
    let limit = |at: i64, own: u32| if p.limits == 0 { own as i32 } else { unsafe { int(p.limits, at) } }.max(0) as usize;
    for row in 0..u64::from(p.rows.rows) {
        let Row { scores, sinks, recent, .. } = unsafe { Row::read(&p.rows, row as i64) };
        let chosen = kvlar_reference::topp(&ToppInput {
            batch: 1,
            rows: scores.len(),
            logits: &scores,
            lengths: None,
            top_p: p.top_p,
            k_min: limit(0, p.k_min),
            k_max: limit(1, p.k_max),
            forced: Forced { sink_rows: sinks, recent_rows: recent },
            resolve: if p.in_bins == 1 { Resolve::Bin } else { Resolve::Exact },
        })?;
        if p.rows.cuts != 0 {
            unsafe { write(p.rows.cuts + 8 * row, &[chosen.cuts[0].0]) };
        }
        if p.mass != 0 {
            unsafe { write(p.mass + 4 * row, &chosen.mass) };
        }
        let kept: Vec<i32> = (0..scores.len()).filter(|&i| chosen.mask[i] != 0).map(|i| i as i32).collect();
        unsafe { put(&p.rows, row, &kept) };
    }
    Ok(())
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
