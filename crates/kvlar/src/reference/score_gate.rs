//! score_gate and score_keys.

use super::attend::place_or_first;
use super::memory::{dense, int, read, write};
use super::rows::{HeadRows, report};
use crate::{Dtype, Error, Result, abi};
use kvlar_reference::{Gate, KeyMethod, KeysInput, score_gate, score_keys};

/// # Safety
/// As for [`super::run`].
pub unsafe fn gate(p: &abi::KvlarScoreGate, dtype: Dtype) -> Result<()> {
    let (d, heads, group, sinks) = (p.hidden_dim as usize, p.kv_heads as usize, p.group as usize, p.sink_count as usize);
    let (dim, padded) = (16, sinks.next_multiple_of(8));
    let block = dim * d;
    let weights = unsafe { dense(p.weights, 0, heads * (group + 1) * block, dtype) };
    let of_heads = |first: usize, blocks: usize| -> Vec<f32> {
        weights.chunks_exact((group + 1) * block).flat_map(|head| head[first * block..][..blocks * block].to_vec()).collect()
    };
    let parts = unsafe { dense(p.sinks, 0, heads * 3 * padded * dim, dtype) };
    let constants = |at, count| unsafe { read::<f32>(at, count) };
    // Undoes what is folded in: the norms are 1 and the diagonal, the base of exponentials is e.
    let (unit, ln2) = (4.0 * std::f64::consts::LN_2, std::f64::consts::LN_2);
    let scaled = |x: &[f32], factor: f64| x.iter().map(|&x| (f64::from(x) * factor) as f32).collect::<Vec<_>>();
    let sink = |head: usize, i: usize| {
        let part = |part: usize| f64::from(parts[(head * 3 + part) * padded * dim + i]);
        ((part(0) + part(1) + part(2)) * unit) as f32
    };
    let gate = Gate {
        hidden_dim: d,
        kv_heads: heads,
        group,
        gate_dim: dim,
        sinks,
        q_proj: &of_heads(0, group),
        q_bias: &constants(p.bias, heads * group * dim),
        k_proj: &of_heads(group, 1),
        q_norm: &vec![1.0; dim],
        k_norm: &scaled(&constants(p.diagonal, dim), unit),
        k_base: &(0..heads).flat_map(|h| (0..sinks * dim).map(move |i| sink(h, i))).collect::<Vec<_>>(),
        b: &scaled(&constants(p.offsets, heads * group), ln2),
    };
    let reference = if dtype == Dtype::F16 { kvlar_reference::Dtype::F16 } else { kvlar_reference::Dtype::Bf16 };
    for seq in 0..i64::from(p.seqs) {
        let of_seq = |at, default| if at == 0 { default } else { i64::from(unsafe { int(at, seq) }) };
        let (first, count) = (of_seq(p.first_columns, 0), of_seq(p.counts, i64::from(p.rows)).min(i64::from(p.rows)));
        for row in 0..count {
            let column = first + row;
            if column < 0 || column >= i64::from(p.columns) {
                unsafe { report(p.status, abi::KVLAR_STATUS_BAD_SLOT) };
                continue;
            }
            let hidden = unsafe { dense(p.hidden, seq * p.hidden_seq_stride + row * p.hidden_row_stride, d, dtype) };
            for (head, score) in score_gate(&hidden, &gate, reference)?.into_iter().enumerate() {
                let at = seq * p.score_seq_stride + head as i64 * p.score_head_stride + column;
                unsafe { write(p.scores.wrapping_add_signed(4 * at), &[score]) };
            }
        }
    }
    Ok(())
}

/// The launch that sums keys, where `sums` says so, or the one that writes scores.
///
/// # Safety
/// As for [`super::run`].
pub unsafe fn keys(p: &abi::KvlarScoreKeys, dtype: Dtype, sums: bool) -> Result<()> {
    let all = [KeyMethod::L2Norm, KeyMethod::KeyDiff, KeyMethod::LagKv, KeyMethod::ValueKeyRatio];
    let Some(method) = all.into_iter().find(|&m| crate::score::key_method(m) == p.method) else {
        return Err(Error::Reference(format!("no method {}", p.method)));
    };
    let (d, dv) = (p.head_dim as usize, p.value_dim as usize);
    let heads = i64::from(p.kv_heads);
    for (seq, head) in (0..i64::from(p.seqs)).flat_map(|s| (0..heads).map(move |h| (s, h))) {
        let keys = HeadRows { rows: &p.rows, pool: &p.keys, seq, head, status: p.status };
        let values = HeadRows { pool: &p.values, ..keys };
        let length = unsafe { keys.length(p.rows.max_rows as usize) };
        let codec = if dtype == Dtype::F16 { abi::KVLAR_CODEC_F16 } else { abi::KVLAR_CODEC_BF16 };
        let load = |from: &HeadRows<'_>, dim| -> Result<Vec<f32>> {
            let format = abi::KvlarFormat { codec, group: dim as u32, ..Default::default() };
            let mut all = Vec::with_capacity(length * dim);
            for row in 0..length {
                all.extend(unsafe { from.load(place_or_first(from, row), &format, dim)? });
            }
            Ok(all)
        };
        let k = load(&keys, d)?;
        let at_sums = p.sums + 4 * (seq * heads + head) as u64 * d as u64;
        if sums {
            unsafe { write(at_sums, &directions(&k, d)) };
            continue;
        }
        let mut scores = if method == KeyMethod::KeyDiff {
            cosines(&k, &unsafe { read::<f32>(at_sums, d) })
        } else {
            let v = if method.needs_values() { Some(load(&values, dv)?) } else { None };
            let (seqs, kv_heads, head_dim, value_dim) = (1, 1, d, dv);
            score_keys(&KeysInput { seqs, kv_heads, rows: length, head_dim, value_dim, k: &k, v: v.as_deref(), method })?
        };
        if p.fill == 1 {
            scores.resize(p.rows.max_rows as usize, f32::NEG_INFINITY);
        }
        unsafe { write(p.scores.wrapping_add_signed(4 * (seq * p.score_seq_stride + head * p.score_head_stride)), &scores) };
    }
    Ok(())
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// Adds k / ‖k‖ of a key that has a direction.
pub fn add_direction(sum: &mut [f64], key: &[f32]) {
    let length = norm(key);
    if length > 0.0 && length.is_finite() {
        sum.iter_mut().zip(key).for_each(|(sum, &x)| *sum += f64::from(x) / length);
    }
}

fn directions(keys: &[f32], dim: usize) -> Vec<f32> {
    let mut sum = vec![0.0; dim];
    keys.chunks_exact(dim).for_each(|key| add_direction(&mut sum, key));
    sum.into_iter().map(|x| x as f32).collect()
}

fn cosines(keys: &[f32], sum: &[f32]) -> Vec<f32> {
    let score = |key: &[f32]| {
        let (dot, both) = (key.iter().zip(sum).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>(), norm(key) * norm(sum));
        if !norm(key).is_finite() {
            return f32::NAN;
        }
        if both == 0.0 { 0.0 } else { (-dot / both) as f32 }
    };
    keys.chunks_exact(sum.len()).map(score).collect()
}
