//! attend.

use super::memory::{dense, int, read, store_dense, write};
use super::rows::{HeadRows, Place, dtype};
use crate::{Dtype, Result, abi};
use kvlar_reference::{HeadQuery, Masking, attend_row, hadamard, ordered_row};
use rayon::prelude::*;

/// A (sequence, kv head)'s rows, decoded, segment after segment.
pub(super) struct Cached {
    pub keys: Vec<f32>,
    pub values: Vec<f32>,
    pub positions: Vec<i32>,
}

/// As `attend`, without the rows of one segment that its scores do not select.
///
/// # Safety
/// As for [`super::run`].
pub unsafe fn attend_cut(p: &abi::KvlarAttendCut, q_dtype: Dtype) -> Result<()> {
    let pairs = p.attend.seqs * p.attend.kv_heads;
    (0..pairs).into_par_iter().try_for_each(|i| unsafe { attend_selected(p, q_dtype, i) })
}

/// The `index`-th (sequence, kv head).
///
/// # Safety
/// As for [`super::run`].
unsafe fn attend_selected(p: &abi::KvlarAttendCut, q_dtype: Dtype, index: u32) -> Result<()> {
    let (seq, head) = (i64::from(index / p.attend.kv_heads), i64::from(index % p.attend.kv_heads));
    let cut = unsafe { read::<u64>(p.cuts + 8 * u64::from(index), 1)[0] };
    let mut all = Cached { keys: Vec::new(), values: Vec::new(), positions: Vec::new() };
    let mut selected = Cached { keys: Vec::new(), values: Vec::new(), positions: Vec::new() };
    let (d, dv) = (p.attend.head_dim as usize, p.attend.value_dim as usize);
    for (i, segment) in p.attend.segments[..p.attend.segment_count as usize].iter().enumerate() {
        let first = all.positions.len();
        unsafe { load_exact(&p.attend, segment, seq, head, &mut all)? };
        let length = all.positions.len() - first;
        let at = (p.scores as i64 + 4 * i64::from(index) * p.score_stride) as u64;
        let scores = if i == p.segment as usize { unsafe { read::<f32>(at, length) } } else { Vec::new() };
        for row in 0..length {
            let seen = scores.get(row).is_none_or(|&score| {
                row < p.sink_rows as usize || row + p.recent_rows as usize >= length || ordered_row(score, row as u32) >= cut
            });
            if seen {
                let row = first + row;
                selected.keys.extend_from_slice(&all.keys[row * d..][..d]);
                selected.values.extend_from_slice(&all.values[row * dv..][..dv]);
                selected.positions.push(all.positions[row]);
            }
        }
    }
    unsafe { attend_rows(&p.attend, q_dtype, (seq, head), &selected, &all.positions) }
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn attend(p: &abi::KvlarAttend, q_dtype: Dtype) -> Result<()> {
    let pairs = p.seqs * p.kv_heads;
    (0..pairs)
        .into_par_iter()
        .try_for_each(|i| unsafe { attend_head(p, q_dtype, i64::from(i / p.kv_heads), i64::from(i % p.kv_heads)) })
}

/// # Safety
/// As for [`super::run`].
unsafe fn attend_head(p: &abi::KvlarAttend, q_dtype: Dtype, seq: i64, kv_head: i64) -> Result<()> {
    let cached = unsafe { load(p, seq, kv_head)? };
    unsafe { attend_cached(p, q_dtype, seq, kv_head, &cached) }
}

/// Every query of one kv head over its decoded rows.
///
/// # Safety
/// As for [`super::run`].
pub(super) unsafe fn attend_cached(p: &abi::KvlarAttend, q_dtype: Dtype, seq: i64, kv_head: i64, cached: &Cached) -> Result<()> {
    unsafe { attend_rows(p, q_dtype, (seq, kv_head), cached, &cached.positions) }
}

/// Every query of one kv head over some of its rows; `held`: the positions of all of them.
///
/// # Safety
/// As for [`super::run`].
unsafe fn attend_rows(
    p: &abi::KvlarAttend,
    q_dtype: Dtype,
    (seq, kv_head): (i64, i64),
    cached: &Cached,
    held: &[i32],
) -> Result<()> {
    let (d, dv) = (p.head_dim as usize, p.value_dim as usize);
    let out_dtype = dtype(p.out_dtype)?;
    let masking = Masking { scale: f64::from(p.scale), softcap: f64::from(p.softcap), window: i64::from(p.window) };
    let (group, rows) = (i64::from(p.group), i64::from(p.query_rows));
    let (mut logits, mut out) = (Vec::new(), vec![0f64; dv]);
    for (head, s) in (0..group).flat_map(|g| (0..rows).map(move |s| (kv_head * group + g, s))) {
        let row = |s: i64| unsafe { dense(p.q, seq * p.q_seq_stride + head * p.q_head_stride + s * p.q_row_stride, d, q_dtype) };
        let q = if p.int8_queries == 1 { in_8_bits(p, (0..rows).map(row).collect(), s as usize)? } else { row(s) };
        let position = match p.q_positions {
            0 => {
                let row = held.len() as i64 - rows + s;
                usize::try_from(row).map_or(row, |row| i64::from(held[row]))
            }
            address => i64::from(unsafe { int(address, seq * rows + s) }),
        };
        let sink = (p.sink_logits != 0).then(|| unsafe { read::<f32>(p.sink_logits + 4 * head as u64, 1)[0] });
        let query = HeadQuery { q: &q, position, sink };
        let lse = attend_row(query, &cached.keys, &cached.values, &cached.positions, masking, &mut logits, &mut out);
        let result: Vec<f32> = out.iter().map(|&x| x as f32).collect();
        let at = seq * p.out_seq_stride + head * p.out_head_stride + s * p.out_row_stride;
        unsafe { store_dense(p.out, at, &result, out_dtype) };
        if p.lse != 0 {
            let at = ((seq * i64::from(p.kv_heads) * group + head) * rows + s) as u64;
            unsafe { write(p.lse + 4 * at, &[lse as f32]) };
        }
    }
    Ok(())
}

/// Query `s` of a head's `rows`, rounded to 8 bits with one scale for all of them; rotated (and back) where keys are.
fn in_8_bits(p: &abi::KvlarAttend, rows: Vec<Vec<f32>>, s: usize) -> Result<Vec<f32>> {
    let turn = |x: Vec<f32>| if p.rotated_keys == 1 { Ok(hadamard(&x)?) } else { Result::Ok(x) };
    let rows: Vec<Vec<f32>> = rows.into_iter().map(turn).collect::<Result<_>>()?;
    let values = || rows.iter().flatten();
    let scale = values().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
    let scale = if values().all(|x| x.is_finite()) { scale } else { f32::NAN };
    let code = |x: &f32| if scale == 0.0 { 0.0 } else { (x / scale).round_ties_even() * scale };
    turn(rows[s].iter().map(code).collect())
}

/// # Safety
/// As for [`super::run`].
unsafe fn load(p: &abi::KvlarAttend, seq: i64, head: i64) -> Result<Cached> {
    let mut all = Cached { keys: Vec::new(), values: Vec::new(), positions: Vec::new() };
    for segment in &p.segments[..p.segment_count as usize] {
        unsafe { load_exact(p, segment, seq, head, &mut all)? };
    }
    Ok(all)
}

/// Adds a segment's rows of one kv head.
///
/// # Safety
/// As for [`super::run`].
pub(super) unsafe fn load_exact(
    p: &abi::KvlarAttend,
    segment: &abi::KvlarSegment,
    seq: i64,
    head: i64,
    all: &mut Cached,
) -> Result<()> {
    let (d, dv) = (p.head_dim as usize, p.value_dim as usize);
    let keys = HeadRows { rows: &segment.rows, pool: &segment.keys, seq, head, status: p.status };
    let values = HeadRows { pool: &segment.values, ..keys };
    let length = unsafe { keys.length(0) };
    let first = all.positions.len();
    for row in 0..length {
        let place = unsafe { place_or_first(&keys, row) };
        let value_place = unsafe { place_or_first(&values, row) };
        all.keys.extend(unsafe { keys.load(place, &segment.key_format, d)? });
        all.values.extend(unsafe { values.load(value_place, &segment.value_format, dv)? });
        all.positions.push(unsafe { position_of(&keys, place, first + row) });
    }
    Ok(())
}

/// A bad page id reads page 0, as the kernels do.
///
/// # Safety
/// As for [`super::run`].
pub(super) unsafe fn place_or_first(rows: &HeadRows<'_>, row: usize) -> Place {
    let in_page = (row & ((1 << rows.rows.page_rows_log2) - 1)) as i64;
    unsafe { rows.place(row) }.unwrap_or(Place { page: 0, in_page })
}

/// A row's stored position, or its index.
///
/// # Safety
/// As for [`super::run`].
pub(super) unsafe fn position_of(rows: &HeadRows<'_>, place: Place, index: usize) -> i32 {
    match rows.rows.positions {
        0 => index as i32,
        address => unsafe { int(address, rows.position_at(place)) },
    }
}
