//! score_window, score_column and score_repeat: their two passes.

use super::attend::place_or_first;
use super::memory::{dense, int, read, write};
use super::rows::{HeadRows, report};
use crate::{Codec, Dtype, Error, Format, Result, abi};
use kvlar_reference::{HeadReduction, Pool, RepeatInput, RowReduction, WindowColumns, WindowInput, score_repeat, score_window};
use std::ops::Range;

/// # Safety
/// As for [`super::run`].
pub unsafe fn score(entry: &str, p: &abi::KvlarScore) -> Result<()> {
    let dtype = if entry.contains("_f16_") { Dtype::F16 } else { Dtype::Bf16 };
    for index in 0..i64::from(p.seqs * p.kv_heads) {
        let head = unsafe { Head::new(p, dtype, index) };
        match entry.contains("_lse_") {
            true => unsafe { head.put_lse()? },
            false => unsafe { head.put_scores()? },
        }
    }
    Ok(())
}

/// One (sequence, kv head): as `kernels/score/head.cuh` has it.
struct Head<'a> {
    p: &'a abi::KvlarScore,
    dtype: Dtype,
    /// Of all (sequence, kv head)s.
    index: i64,
    rows: HeadRows<'a>,
    length: usize,
    /// Row of query 0; negative where there is no such row.
    first_query: i64,
    /// Queries whose rows there are.
    live: Range<usize>,
    sink: usize,
    chunk: Range<usize>,
}

impl<'a> Head<'a> {
    /// # Safety
    /// As for [`super::run`].
    unsafe fn new(p: &'a abi::KvlarScore, dtype: Dtype, index: i64) -> Self {
        let (seq, head) = (index / i64::from(p.kv_heads), index % i64::from(p.kv_heads));
        let rows = HeadRows { rows: &p.rows, pool: &p.keys, seq, head, status: p.status };
        let length = unsafe { rows.length(0) };
        let first_query = if p.from_start == 1 { 0 } else { length as i64 - i64::from(p.query_rows) };
        let live_end = (length as i64 - first_query).min(i64::from(p.query_rows)).max(0) as usize;
        let live = ((-first_query).max(0) as usize).min(live_end)..live_end;
        let (mut sink, mut chunk) = (length, 0..0);
        if p.columns == abi::KVLAR_COLUMNS_CHUNK {
            let own = first_query.max(0);
            let [sinks, start, len] = std::array::from_fn(|i| i64::from(unsafe { int(p.spans, 3 * seq + i as i64) }));
            let from = start.clamp(0, own);
            let rows = len.clamp(0, (own - from).min(i64::from(p.row_count)));
            (sink, chunk) = (sinks.clamp(0, own) as usize, from as usize..(from + rows) as usize);
            if (sink as i64, from, rows) != (sinks, start, len) {
                unsafe { report(p.status, abi::KVLAR_STATUS_BAD_LENGTH) };
            }
        }
        Self { p, dtype, index, rows, length, first_query, live, sink, chunk }
    }

    fn dim(&self) -> usize {
        self.p.head_dim as usize
    }

    fn is_chunked(&self) -> bool {
        self.p.columns == abi::KVLAR_COLUMNS_CHUNK
    }

    fn sees(&self, row: usize, query: usize) -> bool {
        let own = self.first_query.max(0) as usize;
        row <= query && (!self.is_chunked() || row < self.sink || self.chunk.contains(&row) || row >= own)
    }

    /// Keys `[length, d]`; 0 where no query sees any.
    ///
    /// # Safety
    /// As for [`super::run`].
    unsafe fn keys(&self) -> Result<Vec<f32>> {
        let codec = if self.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 };
        let format = Format::from(codec).abi(self.dim(), 0);
        let mut keys = Vec::with_capacity(self.length * self.dim());
        for row in 0..self.length {
            if self.sees(row, self.length) {
                keys.extend(unsafe { self.rows.load(place_or_first(&self.rows, row), &format, self.dim())? });
            } else {
                keys.resize(keys.len() + self.dim(), 0.0);
            }
        }
        Ok(keys)
    }

    /// Queries `[live, d]` of a query head of the group.
    ///
    /// # Safety
    /// As for [`super::run`].
    unsafe fn queries(&self, g: usize) -> Vec<f32> {
        let (p, head) = (self.p, self.rows.head * i64::from(self.p.group) + g as i64);
        let at = |s: usize| self.rows.seq * p.q_seq_stride + head * p.q_head_stride + s as i64 * p.q_row_stride;
        self.live.clone().flat_map(|s| unsafe { dense(p.q, at(s), self.dim(), self.dtype) }).collect()
    }

    fn lse_address(&self, g: usize) -> u64 {
        self.p.lse + 4 * (self.index as u64 * u64::from(self.p.group) + g as u64) * u64::from(self.p.query_rows)
    }

    /// # Safety
    /// As for [`super::run`].
    unsafe fn put_lse(&self) -> Result<()> {
        let (p, d, keys) = (self.p, self.dim(), unsafe { self.keys()? });
        for g in 0..p.group as usize {
            let mut lse = vec![f32::NEG_INFINITY; p.query_rows as usize];
            for (query, s) in unsafe { self.queries(g) }.chunks_exact(d).zip(self.live.clone()) {
                let at = (self.first_query + s as i64) as usize;
                let dot = |key: &[f32]| query.iter().zip(key).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
                let seen = keys.chunks_exact(d).enumerate().filter(|(row, _)| self.sees(*row, at));
                let logits: Vec<f64> = seen.map(|(_, key)| f64::from(p.scale) * dot(key)).collect();
                lse[s] = super::scan::log_sum_exp(&logits) as f32;
            }
            unsafe { write(self.lse_address(g), &lse) };
        }
        Ok(())
    }

    /// # Safety
    /// As for [`super::run`].
    unsafe fn put_scores(&self) -> Result<()> {
        let p = self.p;
        let mut scores = unsafe { self.scores()? };
        let at = p.scores + 4 * (self.index * p.score_stride) as u64;
        if p.accumulate == 1 {
            let known = match p.previous {
                0 => self.first_query,
                address => i64::from(unsafe {
                    int(address, self.rows.seq * p.previous_seq_stride + self.rows.head * p.previous_head_stride)
                }),
            };
            let known = known.clamp(0, scores.len() as i64) as usize;
            let old = unsafe { read::<f32>(at, known) };
            scores.iter_mut().zip(old).for_each(|(new, old)| *new = p.decay.mul_add(old, *new));
        }
        if p.fill == 1 {
            scores.resize(p.row_count as usize, f32::NEG_INFINITY);
        }
        unsafe { write(at, &scores) };
        Ok(())
    }

    /// New scores of the rows that get one.
    ///
    /// # Safety
    /// As for [`super::run`].
    unsafe fn scores(&self) -> Result<Vec<f32>> {
        let (p, d, group, window) = (self.p, self.dim(), self.p.group as usize, self.live.len());
        let all = p.columns == abi::KVLAR_COLUMNS_ALL;
        if self.length == 0 || window == 0 || (!all && self.first_query <= 0) {
            return Ok(Vec::new());
        }
        let keys = unsafe { self.keys()? };
        let q: Vec<f32> = (0..group).flat_map(|g| unsafe { self.queries(g) }).collect();
        if self.is_chunked() {
            let i = RepeatInput {
                q_heads: group,
                kv_heads: 1,
                queries: window,
                rows: self.length - window,
                head_dim: d,
                q: &q,
                k: &keys,
                sink: self.sink,
                start: self.chunk.start,
                len: self.chunk.len(),
                scale: Some(p.scale.into()),
            };
            return Ok(score_repeat(&i)?);
        }
        let own = |g: usize| unsafe { read::<f32>(self.lse_address(g) + 4 * self.live.start as u64, window) };
        let lse: Vec<f32> = (0..group).flat_map(own).collect();
        let mut scores = score_window(&WindowInput {
            seqs: 1,
            q_heads: group,
            kv_heads: 1,
            window,
            rows: self.length,
            head_dim: d,
            q: &q,
            k: &keys,
            lse: Some(&lse),
            scale: Some(p.scale.into()),
            row_reduction: if p.over_rows == abi::KVLAR_REDUCE_MEAN { RowReduction::Mean } else { RowReduction::Sum },
            pool: pool(p)?,
            head_reduction: match p.over_heads {
                abi::KVLAR_REDUCE_MEAN => HeadReduction::Mean,
                abi::KVLAR_REDUCE_MAX => HeadReduction::Max,
                _ => HeadReduction::Sum,
            },
            columns: if all { WindowColumns::All } else { WindowColumns::Prefix },
        })?;
        scores.truncate(p.row_count as usize);
        Ok(scores)
    }
}

fn pool(p: &abi::KvlarScore) -> Result<Pool> {
    let kernel = 2 * p.pool_half as usize + 1;
    match p.pool {
        abi::KVLAR_POOL_NONE => Ok(Pool::None),
        abi::KVLAR_POOL_AVG => Ok(Pool::Avg(kernel)),
        abi::KVLAR_POOL_MAX => Ok(Pool::Max(kernel)),
        other => Err(Error::Reference(format!("no pooling {other}"))),
    }
}
