//! attend_lowrank.

use super::attend::{Cached, attend_cached, load_exact, place_or_first, position_of};
use super::memory::{dense, int, read};
use super::rows::HeadRows;
use super::write::rope;
use crate::{Dtype, Result, abi};
use kvlar_reference::expand_row;
use rayon::prelude::*;

/// # Safety
/// As for [`super::run`].
pub unsafe fn attend_lowrank(p: &abi::KvlarAttendLowrank, q_dtype: Dtype) -> Result<()> {
    let mut heads = Vec::new();
    for set in 0..i64::from(p.set_count) {
        let [key_group, value_group, count, first] = [0, 1, 2, 3].map(|i| unsafe { int(p.sets, 4 * set + i) });
        for i in 0..count {
            let head = unsafe { int(p.sets, 4 * i64::from(p.set_count) + i64::from(first + i)) };
            heads.push((i64::from(head), i64::from(key_group), i64::from(value_group)));
        }
    }
    let seqs = 0..i64::from(p.attend.seqs);
    let pairs: Vec<_> = seqs.flat_map(|s| heads.iter().map(move |&h| (s, h))).collect();
    pairs.into_par_iter().try_for_each(|(seq, head)| unsafe { attend_head(p, q_dtype, seq, head) })
}

/// # Safety
/// As for [`super::run`].
unsafe fn attend_head(p: &abi::KvlarAttendLowrank, q_dtype: Dtype, seq: i64, head: (i64, i64, i64)) -> Result<()> {
    let mut all = Cached { keys: Vec::new(), values: Vec::new(), positions: Vec::new() };
    for segment in &p.attend.segments[..p.attend.segment_count as usize] {
        if segment.latent == abi::KVLAR_LATENT_NONE {
            unsafe { load_exact(&p.attend, segment, seq, head.0, &mut all)? };
        } else {
            unsafe { load_latent(p, segment, q_dtype, seq, head, &mut all)? };
        }
    }
    unsafe { attend_cached(&p.attend, q_dtype, seq, head.0, &all) }
}

/// A kv head's key basis `[d, rk]`, as numbers.
///
/// # Safety
/// As for [`super::run`].
unsafe fn key_basis(p: &abi::KvlarAttendLowrank, q_dtype: Dtype, seq: i64, head: i64) -> Vec<f32> {
    let (d, rank) = (p.attend.head_dim as usize, p.key_rank as usize);
    let at = seq * p.key_basis_seq_stride + head * (d * rank) as i64;
    match p.latent {
        abi::KVLAR_LATENT_INT8_BASIS => {
            let codes = unsafe { read::<i8>(p.key_basis.wrapping_add_signed(at), d * rank) };
            let half = p.padded_dim as usize / 2;
            let scales = p.key_scales.wrapping_add_signed(4 * (seq * p.key_scales_seq_stride + head * half as i64));
            let scales = unsafe { read::<f32>(scales, half) };
            let rotary = kvlar_reference::RotaryPairs {
                rotary_dim: p.rope.rotary_dim as usize,
                half: p.rope.layout != abi::KVLAR_ROPE_INTERLEAVED,
            };
            let scale = |dim: usize| scales[rotary.pair_of(dim)];
            codes.iter().enumerate().map(|(i, &c)| f32::from(c) * scale(i / rank)).collect()
        }
        abi::KVLAR_LATENT_INT8 => unsafe { dense(p.key_basis, at, d * rank, Dtype::F16) },
        _ => unsafe { dense(p.key_basis, at, d * rank, q_dtype) },
    }
}

/// # Safety
/// As for [`super::run`].
unsafe fn load_latent(
    p: &abi::KvlarAttendLowrank,
    segment: &abi::KvlarSegment,
    q_dtype: Dtype,
    seq: i64,
    (head, key_group, value_group): (i64, i64, i64),
    all: &mut Cached,
) -> Result<()> {
    let a = &p.attend;
    let (d, dv, rank, value_rank) = (a.head_dim as usize, a.value_dim as usize, p.key_rank as usize, p.value_rank as usize);
    let keys = HeadRows { rows: &segment.rows, pool: &segment.keys, seq, head: key_group, status: a.status };
    let values = HeadRows { pool: &segment.values, ..keys };
    let value_head = if value_rank == 0 { head } else { value_group };
    let length = unsafe { HeadRows { head, ..keys }.length(0) };
    let basis = unsafe { key_basis(p, q_dtype, seq, head) };
    let value_basis = if value_rank == 0 {
        Vec::new()
    } else {
        let at = seq * p.value_basis_seq_stride + head * (dv * value_rank) as i64;
        unsafe { dense(p.value_basis, at, dv * value_rank, q_dtype) }
    };
    let mean = (p.key_mean != 0).then(|| unsafe { dense(p.key_mean, head * d as i64, d, Dtype::F32) });
    let rope = unsafe { rope(&p.rope) };
    let first = all.positions.len();
    for row in 0..length {
        let place = unsafe { place_or_first(&keys, row) };
        let value_place = unsafe { place_or_first(&values, row) };
        let position = unsafe { position_of(&keys, place, first + row) };
        let z = unsafe { keys.load(place, &segment.key_format, rank)? };
        all.keys.extend(rope.rotate(&expand_row(&basis, &z, mean.as_deref(), d), i64::from(position)));
        // The table and page ids are the key group's; the rows are the value group's (or the kv head's).
        let width = if value_rank == 0 { dv } else { value_rank };
        let z = unsafe { HeadRows { head: value_head, ..values }.load(value_place, &segment.value_format, width)? };
        if value_rank == 0 {
            all.values.extend(z);
        } else {
            all.values.extend(expand_row(&value_basis, &z, None, dv));
        }
        all.positions.push(position);
    }
    Ok(())
}
