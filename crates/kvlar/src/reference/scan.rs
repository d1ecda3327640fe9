//! scan and reduce.

use super::attend::place_or_first;
use super::memory::{dense, int, read, write};
use super::rows::{HeadRows, dtype};
use super::select::cut_of;
use crate::scan::SCORE_BINS;
use crate::{Error, Reduction, Result, abi};
use kvlar_reference::{ReduceInput, ordered_key, reduce as reduce_logits};

/// # Safety
/// As for [`super::run`].
pub unsafe fn scan(p: &abi::KvlarScan) -> Result<()> {
    let a = &p.attend;
    for (seq, kv_head) in (0..i64::from(a.seqs)).flat_map(|s| (0..i64::from(a.kv_heads)).map(move |h| (s, h))) {
        unsafe { scan_head(p, seq, kv_head)? };
    }
    Ok(())
}

/// # Safety
/// As for [`super::run`].
unsafe fn scan_head(p: &abi::KvlarScan, seq: i64, kv_head: i64) -> Result<()> {
    let (a, segment) = (&p.attend, &p.attend.segments[0]);
    let (d, group, columns) = (a.head_dim as usize, a.group as usize, p.row_count as usize);
    let rows = HeadRows { rows: &segment.rows, pool: &segment.keys, seq, head: kv_head, status: a.status };
    let length = unsafe { rows.length(0) };
    let mut keys = Vec::with_capacity(length);
    for row in 0..length {
        keys.push(unsafe { rows.load(place_or_first(&rows, row), &segment.key_format, d)? });
    }
    let head = seq * i64::from(a.kv_heads) + kv_head;
    let mut all = Vec::with_capacity(group * length);
    for g in 0..group as i64 {
        let q =
            unsafe { dense(a.q, seq * a.q_seq_stride + (kv_head * group as i64 + g) * a.q_head_stride, d, dtype(a.q_dtype)?) };
        let dot = |key: &Vec<f32>| q.iter().zip(key).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
        let logits: Vec<f64> = keys.iter().map(|key| f64::from(a.scale) * dot(key)).collect();
        let query = head as u64 * group as u64 + g as u64;
        if a.lse != 0 {
            unsafe { write(a.lse + 4 * query, &[log_sum_exp(&logits) as f32]) };
        }
        let logits: Vec<f32> = logits.into_iter().map(|x| x as f32).collect();
        unsafe { put_rows(p.logits, query, columns, &logits, p.fill == 1) };
        all.extend(logits);
    }
    let lse = vec![0.0; group];
    let scores = scores(&all, &lse, (group, length), p.method)?;
    unsafe { put_scores((p.scores, p.histogram), head as u64, columns, &scores, p.fill == 1) };
    if p.select.cuts != 0 {
        unsafe { write(p.select.cuts + 8 * head as u64, &[cut_of(&p.select, head, scores)]) };
    }
    Ok(())
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn reduce(p: &abi::KvlarReduce) -> Result<()> {
    let (group, columns) = (p.group as usize, p.row_count as usize);
    for (seq, kv_head) in (0..i64::from(p.seqs)).flat_map(|s| (0..i64::from(p.kv_heads)).map(move |h| (s, h))) {
        let head = (seq * i64::from(p.kv_heads) + kv_head) as u64;
        let length = match p.lengths {
            0 => columns,
            at => {
                unsafe { int(at, seq * p.length_seq_stride + kv_head * p.length_head_stride) }.clamp(0, columns as i32) as usize
            }
        };
        let first = head * group as u64;
        let row = |g: u64| unsafe { read::<f32>(p.logits + 4 * (first + g) * columns as u64, length) };
        let logits: Vec<f32> = (0..group as u64).flat_map(row).collect();
        let lse = if p.lse == 0 { vec![0.0; group] } else { unsafe { read::<f32>(p.lse + 4 * first, group) } };
        let scores = scores(&logits, &lse, (group, length), p.method)?;
        unsafe { put_scores((p.scores, p.histogram), head, columns, &scores, p.fill == 1) };
    }
    Ok(())
}

/// Scores `[rows]` of a kv head from logits `[group, rows]`.
fn scores(logits: &[f32], lse: &[f32], (group, rows): (usize, usize), method: u32) -> Result<Vec<f32>> {
    let all = [Reduction::MeanLogit, Reduction::MaxLogit, Reduction::MaxProb];
    let Some(method) = all.into_iter().find(|&m| crate::scan::method(m) == method) else {
        return Err(Error::Reference(format!("no method {method}")));
    };
    Ok(reduce_logits(&ReduceInput { seqs: 1, q_heads: group, kv_heads: 1, rows, logits, lse, method })?)
}

/// Writes row `index` of a tensor with so many columns, and −∞ behind its values.
///
/// # Safety
/// `address` is 0, or the row is writable.
unsafe fn put_rows(address: u64, index: u64, columns: usize, values: &[f32], fill: bool) {
    if address == 0 {
        return;
    }
    let at = address + 4 * index * columns as u64;
    unsafe {
        write(at, values);
        if fill {
            write(at + 4 * values.len() as u64, &vec![f32::NEG_INFINITY; columns - values.len()]);
        }
    }
}

/// Scores of kv head `index`, and how many are in each bin.
///
/// # Safety
/// The addresses are 0, or what belongs to the head is writable.
unsafe fn put_scores((scores, histogram): (u64, u64), index: u64, columns: usize, values: &[f32], fill: bool) {
    unsafe { put_rows(scores, index, columns, values, fill) };
    if histogram != 0 {
        let mut counts = vec![0u32; SCORE_BINS];
        values.iter().for_each(|&x| counts[bin(x)] += 1);
        unsafe { write(histogram + 4 * index * SCORE_BINS as u64, &counts) };
    }
}

/// As `kernels/device/order.cuh` has it: the top 11 bits.
fn bin(x: f32) -> usize {
    (ordered_key(x) >> 21) as usize
}

/// ln Σ exp(x); NaN if there is one.
pub fn log_sum_exp(x: &[f64]) -> f64 {
    let top = x.iter().fold(f64::NEG_INFINITY, |top, &x| if top.is_nan() || x.is_nan() { f64::NAN } else { top.max(x) });
    if top == f64::NEG_INFINITY { top } else { top + x.iter().map(|x| (x - top).exp()).sum::<f64>().ln() }
}
