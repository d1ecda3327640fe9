//! project and append_lowrank.

use super::memory::{dense, int, store_dense, write};
use super::rows::{HeadRows, Place, codec, dtype, report};
use crate::{Codec, Dtype, Result, abi};
use kvlar_reference::encode_row;

/// A projection's matrices, as numbers.
struct Encoder<'a> {
    p: &'a abi::KvlarProjection,
    dtype: Dtype,
    matrix: Vec<f32>,
    offset: Vec<f32>,
}

impl<'a> Encoder<'a> {
    /// # Safety
    /// As for [`super::run`].
    unsafe fn read(p: &'a abi::KvlarProjection, dtype: Dtype) -> Self {
        let (groups, rank, width) = (p.groups as usize, p.rank as usize, (p.size * p.dim) as usize);
        let matrix = unsafe { dense(p.encoder, 0, groups * rank * width, dtype) };
        let offset =
            if p.offset == 0 { vec![0.0; groups * rank] } else { unsafe { dense(p.offset, 0, groups * rank, Dtype::F32) } };
        Self { p, dtype, matrix, offset }
    }

    /// The latent of one row, summed in f64.
    ///
    /// # Safety
    /// As for [`super::run`].
    unsafe fn latent(&self, seq: i64, group: i64, row: i64) -> Vec<f32> {
        let p = self.p;
        let (size, dim, rank) = (i64::from(p.size), p.dim as usize, p.rank as usize);
        let mut x = Vec::with_capacity(size as usize * dim);
        for i in 0..size {
            let head = i64::from(unsafe { int(p.members, group * size + i) });
            let at = seq * p.x_seq_stride + head * p.x_head_stride + row * p.x_row_stride;
            x.extend(unsafe { dense(p.x, at, dim, self.dtype) });
        }
        let first = group as usize * rank;
        let rows = self.matrix[first * x.len()..].chunks_exact(x.len().max(1)).zip(&self.offset[first..]).take(rank);
        rows.map(|(e, &offset)| {
            let sum: f64 = e.iter().zip(&x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            (sum - f64::from(offset)) as f32
        })
        .collect()
    }
}

fn rows_of(seqs: u32, groups: u32, rows: u32) -> impl Iterator<Item = (i64, i64, i64)> {
    let all = i64::from(seqs) * i64::from(groups) * i64::from(rows);
    let (groups, rows) = (i64::from(groups), i64::from(rows));
    (0..all).map(move |i| (i / rows / groups, i / rows % groups, i % rows))
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn project(p: &abi::KvlarProject) -> Result<()> {
    let out = dtype(p.out_dtype)?;
    let encoder = unsafe { Encoder::read(&p.projection, dtype(p.dtype)?) };
    for (seq, group, row) in rows_of(p.seqs, p.projection.groups, p.rows) {
        let at = seq * p.out_seq_stride + group * p.out_group_stride + row * p.out_row_stride;
        unsafe { store_dense(p.out, at, &encoder.latent(seq, group, row), out) };
    }
    Ok(())
}

/// # Safety
/// As for [`super::run`].
pub unsafe fn append_lowrank(p: &abi::KvlarAppendLowrank) -> Result<()> {
    let dtype = dtype(p.dtype)?;
    let mut writes_positions = true; // the first side that there is
    for side in p.sides.iter().filter(|s| s.mode != abi::KVLAR_SIDE_NONE) {
        let from = &side.projection;
        let encoder = (side.mode == abi::KVLAR_SIDE_PROJECT).then(|| unsafe { Encoder::read(from, dtype) });
        for (seq, group, row) in rows_of(p.seqs, from.groups, p.new_rows) {
            let Some(place) = (unsafe { place(p, seq, group, row) }) else { continue };
            let x = match &encoder {
                Some(encoder) => unsafe { encoder.latent(seq, group, row) },
                None => {
                    let at = seq * from.x_seq_stride + group * from.x_head_stride + row * from.x_row_stride;
                    unsafe { dense(from.x, at, from.rank as usize, dtype) }
                }
            };
            unsafe { store(side, seq, group, place, &x, codec(side.codec)?)? };
            if writes_positions && p.rows.positions != 0 {
                let rows = HeadRows { rows: &p.rows, pool: &side.pool, seq, head: group, status: p.status };
                let position = unsafe { int(p.positions, seq * i64::from(p.new_rows) + row) };
                unsafe { write(p.rows.positions.wrapping_add_signed(4 * rows.position_at(place)), &[position]) };
            }
        }
        writes_positions = false;
    }
    Ok(())
}

/// Where a new row goes on both sides; `None` if it is skipped, or its slot or page is bad (reported).
///
/// # Safety
/// As for [`super::run`].
unsafe fn place(p: &abi::KvlarAppendLowrank, seq: i64, group: i64, row: i64) -> Option<Place> {
    let slot = u32::try_from(unsafe { int(p.slots, seq * p.slot_seq_stride + row) }).ok()?;
    if slot >= p.rows.max_rows {
        unsafe { report(p.status, abi::KVLAR_STATUS_BAD_SLOT) };
        return None;
    }
    let sides = p.sides.iter().filter(|s| s.mode != abi::KVLAR_SIDE_NONE);
    let mut places = sides.map(|s| {
        let rows = HeadRows { rows: &p.rows, pool: &s.pool, seq, head: group, status: p.status };
        unsafe { rows.place(slot as usize) }
    });
    let first = places.next()??;
    if places.any(|place| place.is_none()) { None } else { Some(first) }
}

/// Encodes a row of values with one scale and zero, and writes it with its padding.
///
/// # Safety
/// As for [`super::run`].
unsafe fn store(side: &abi::KvlarLatentSide, seq: i64, group: i64, place: Place, x: &[f32], codec: Codec) -> Result<()> {
    let mut row = encode_row(x, codec.reference(), x.len())?;
    row.codes.resize(codec.row_bytes(side.stored as usize), 0);
    let pool = &side.pool;
    let page = pool.data.wrapping_add_signed(seq * pool.seq_stride + group * pool.head_stride + place.page * pool.page_stride);
    let in_page = place.in_page as u64;
    unsafe {
        write(page + in_page * u64::from(pool.row_stride), &row.codes);
        write(page + u64::from(pool.params_offset) + in_page * u64::from(pool.params_stride), &row.params);
    }
    Ok(())
}
