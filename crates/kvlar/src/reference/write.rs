//! append, encode and decode.

use super::memory::{dense, int, read, store_dense, write};
use super::rows::{HeadRows, Place, codec, dtype, report};
use crate::{Result, abi};
use kvlar_reference::{Rope, RopeLayout};

/// # Safety
/// As for [`super::run`].
pub(super) unsafe fn rope(r: &abi::KvlarRope) -> Rope {
    if r.layout == abi::KVLAR_ROPE_NONE {
        return Rope::none();
    }
    let layout = if r.layout == abi::KVLAR_ROPE_HALF { RopeLayout::Half } else { RopeLayout::Interleaved };
    let inv_freq = unsafe { super::memory::read::<f32>(r.inv_freq, r.rotary_dim as usize / 2) };
    Rope { inv_freq, attention_factor: r.attention_factor, layout }
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn append(p: &abi::KvlarAppend) -> Result<()> {
    let (d, dv, n) = (p.head_dim as usize, p.value_dim as usize, i64::from(p.new_rows));
    let dtype = dtype(p.dtype)?;
    let rope = unsafe { rope(&p.rope) };
    for (seq, head) in pairs(p.seqs, p.kv_heads) {
        let keys = HeadRows { rows: &p.rows, pool: &p.key_pool, seq, head, status: p.status };
        let values = HeadRows { pool: &p.value_pool, ..keys };
        for row in 0..n {
            let slot = unsafe { int(p.slots, seq * p.slot_seq_stride + head * p.slot_head_stride + row) };
            let Ok(slot) = u32::try_from(slot) else { continue };
            if slot >= p.rows.max_rows {
                unsafe { report(p.status, abi::KVLAR_STATUS_BAD_SLOT) };
                continue;
            }
            let Some(place) = (unsafe { keys.place(slot as usize) }) else { continue };
            if unsafe { values.place(slot as usize) }.is_none() {
                continue;
            }
            let position = unsafe { int(p.positions, seq * n + row) };
            let k = unsafe { dense(p.k, seq * p.k_seq_stride + head * p.k_head_stride + row * p.k_row_stride, d, dtype) };
            let v = unsafe { dense(p.v, seq * p.v_seq_stride + head * p.v_head_stride + row * p.v_row_stride, dv, dtype) };
            let k = rope.rotate(&k, i64::from(position));
            unsafe { score_new_key(p, &k, (seq, head), slot)? };
            unsafe { keys.store(place, &k, &p.key_format)? };
            unsafe { values.store(place, &v, &p.value_format)? };
            if p.rows.positions != 0 {
                unsafe { write(p.rows.positions.wrapping_add_signed(4 * keys.position_at(place)), &[position]) };
            }
        }
    }
    Ok(())
}

/// What is asked for of a new key, as it is stored where that is dense, else as its type holds it.
///
/// # Safety
/// As for [`super::run`].
unsafe fn score_new_key(p: &abi::KvlarAppend, key: &[f32], (seq, head): (i64, i64), slot: u32) -> Result<()> {
    let stored = codec(p.key_format.codec)?.dense().map_or_else(|| dtype(p.dtype), Ok)?;
    let key: Vec<f32> = key.iter().map(|&x| if stored == crate::Dtype::F16 { f16_of(x) } else { bf16_of(x) }).collect();
    if p.key_scores != 0 {
        let norm = key.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let at = seq * p.key_score_seq_stride + head * p.key_score_head_stride + i64::from(slot);
        unsafe { write(p.key_scores.wrapping_add_signed(4 * at), &[-norm as f32]) };
    }
    if p.key_sums != 0 {
        let at = p.key_sums + 4 * (seq * i64::from(p.kv_heads) + head) as u64 * key.len() as u64;
        let mut sums: Vec<f64> = unsafe { read::<f32>(at, key.len()) }.into_iter().map(f64::from).collect();
        super::score_gate::add_direction(&mut sums, &key);
        unsafe { write(at, &sums.into_iter().map(|x| x as f32).collect::<Vec<_>>()) };
    }
    Ok(())
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn append_groups(p: &abi::KvlarAppendGroups) -> Result<()> {
    let pack_rows = i64::from(p.pack_rows);
    for (seq, head) in pairs(p.exact.seqs, p.exact.kv_heads) {
        let [before, source_first, first, count] = [0, 1, 2, 3].map(|i| i64::from(unsafe { int(p.packing, 4 * seq + i) }));
        for pack in 0..(count / pack_rows).min(i64::from(p.max_packs)) {
            let first = first + pack * pack_rows;
            if first + pack_rows > i64::from(p.rows.max_rows) {
                unsafe { report(p.exact.status, abi::KVLAR_STATUS_BAD_SLOT) };
                continue;
            }
            let keys = HeadRows { rows: &p.rows, pool: &p.key_pool, seq, head, status: p.exact.status };
            let values = HeadRows { pool: &p.value_pool, ..keys };
            let (Some(place), Some(_)) = (unsafe { keys.place(first as usize) }, unsafe { values.place(first as usize) }) else {
                continue;
            };
            for (to, format, is_values) in [(keys, &p.key_format, false), (values, &p.value_format, true)] {
                let row = |row| unsafe { packed_row(p, (seq, head), (before, source_first), row, is_values) };
                let rows: Vec<Vec<f32>> = (first..first + pack_rows).map(row).collect::<Result<_>>()?;
                if codec(format.codec)?.is_channel_wise() {
                    let dim = rows.first().map_or(0, Vec::len);
                    unsafe { to.store_group(place, &rows.concat(), format, dim)? };
                    continue;
                }
                for (i, x) in rows.iter().enumerate() {
                    let place = Place { in_page: place.in_page + i as i64, ..place };
                    unsafe { to.store(place, x, format)? };
                }
            }
        }
    }
    unsafe { append(&p.exact) }
}

/// A row that is encoded: of this step, rounded as if it had been stored, or of an earlier one.
///
/// # Safety
/// As for [`super::run`].
unsafe fn packed_row(
    p: &abi::KvlarAppendGroups,
    (seq, head): (i64, i64),
    (before, source_first): (i64, i64),
    row: i64,
    values: bool,
) -> Result<Vec<f32>> {
    let (e, dtype) = (&p.exact, dtype(p.exact.dtype)?);
    if row >= before {
        let row = row - before;
        if values {
            return Ok(unsafe {
                dense(e.v, seq * e.v_seq_stride + head * e.v_head_stride + row * e.v_row_stride, e.value_dim as usize, dtype)
            });
        }
        let at = seq * e.k_seq_stride + head * e.k_head_stride + row * e.k_row_stride;
        let k = unsafe { dense(e.k, at, e.head_dim as usize, dtype) };
        let position = unsafe { int(e.positions, seq * i64::from(e.new_rows) + row) };
        let rotated = unsafe { rope(&e.rope) }.rotate(&k, i64::from(position));
        return Ok(rotated.into_iter().map(|x| if dtype == crate::Dtype::F16 { f16_of(x) } else { bf16_of(x) }).collect());
    }
    let (pool, format, dim) = match values {
        true => (&e.value_pool, &e.value_format, e.value_dim as usize),
        false => (&e.key_pool, &e.key_format, e.head_dim as usize),
    };
    let (index, log2) = (row - source_first, e.rows.page_rows_log2);
    let page = i64::from(unsafe { int(p.source, seq * i64::from(p.source_pages) + (index >> log2)) });
    if page < 0 || page >= i64::from(pool.page_count) {
        unsafe { report(e.status, abi::KVLAR_STATUS_BAD_PAGE) };
        return Ok(vec![0.0; dim]);
    }
    let place = Place { page, in_page: index & ((1 << log2) - 1) };
    unsafe { HeadRows { rows: &e.rows, pool, seq, head, status: e.status }.load(place, format, dim) }
}

fn bf16_of(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

fn f16_of(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn encode(p: &abi::KvlarTranscode) -> Result<()> {
    let dtype = dtype(p.dtype)?;
    for (seq, head) in pairs(p.seqs, p.heads) {
        let rows = HeadRows { rows: &p.rows, pool: &p.pool, seq, head, status: p.status };
        for row in 0..i64::from(p.row_count) {
            let Some(place) = (unsafe { rows.place(row as usize) }) else { continue };
            let at = seq * p.x_seq_stride + head * p.x_head_stride + row * p.x_row_stride;
            unsafe { rows.store(place, &dense(p.x, at, p.dim as usize, dtype), &p.format)? };
        }
    }
    Ok(())
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn encode_groups(p: &abi::KvlarTranscode) -> Result<()> {
    let (dtype, group) = (dtype(p.dtype)?, i64::from(p.format.group));
    for (seq, head) in pairs(p.seqs, p.heads) {
        let rows = HeadRows { rows: &p.rows, pool: &p.pool, seq, head, status: p.status };
        for first in (0..i64::from(p.row_count)).step_by(group as usize) {
            let Some(place) = (unsafe { rows.place(first as usize) }) else { continue };
            let row = |row: i64| unsafe {
                dense(p.x, seq * p.x_seq_stride + head * p.x_head_stride + row * p.x_row_stride, p.dim as usize, dtype)
            };
            let x: Vec<f32> = (first..first + group).flat_map(row).collect();
            unsafe { rows.store_group(place, &x, &p.format, p.dim as usize)? };
        }
    }
    Ok(())
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn decode(p: &abi::KvlarTranscode) -> Result<()> {
    let dtype = dtype(p.dtype)?;
    for (seq, head) in pairs(p.seqs, p.heads) {
        let rows = HeadRows { rows: &p.rows, pool: &p.pool, seq, head, status: p.status };
        let length = unsafe { rows.length(p.row_count as usize) };
        let rows_written = if p.held_only != 0 { length.min(p.row_count as usize) as i64 } else { i64::from(p.row_count) };
        for row in 0..rows_written {
            let mut x = vec![0f32; p.dim as usize];
            if (row as usize) < length
                && let Some(place) = unsafe { rows.place(row as usize) }
            {
                x = unsafe { rows.load(place, &p.format, p.dim as usize)? };
            }
            let at = seq * p.x_seq_stride + head * p.x_head_stride + row * p.x_row_stride;
            unsafe { store_dense(p.x, at, &x, dtype) };
        }
    }
    Ok(())
}

fn pairs(seqs: u32, heads: u32) -> impl Iterator<Item = (i64, i64)> {
    (0..i64::from(seqs)).flat_map(move |s| (0..i64::from(heads)).map(move |h| (s, h)))
}
