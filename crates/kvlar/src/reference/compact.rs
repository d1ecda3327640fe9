//! compact and protect.

use super::memory::{int, read, write};
use super::rows::{HeadRows, Place, report};
use crate::{Result, abi};
use kvlar_reference::{CompactOrder, ordered_row, row_sources};

/// An owner's rows.
struct Owner<'a> {
    p: &'a abi::KvlarCompact,
    keys: HeadRows<'a>,
    /// In `[seqs][owners]`.
    index: u64,
    base: [u64; 2],
}

/// Where a pool's rows of the owner begin.
///
/// # Safety
/// As for [`super::run`].
unsafe fn base(p: &abi::KvlarCompact, pool: &abi::KvlarPool, layers: u64, seq: i64, owner: i64) -> u64 {
    let (layer, head) = (owner / i64::from(p.owners_a_layer), owner % i64::from(p.owners_a_layer));
    let data = if layers == 0 { pool.data } else { unsafe { read::<u64>(layers + 8 * layer as u64, 1)[0] } };
    data.wrapping_add_signed(seq * pool.seq_stride + head * pool.head_stride)
}

impl Owner<'_> {
    /// Rows held.
    ///
    /// # Safety
    /// As for [`super::run`].
    unsafe fn length(&self) -> usize {
        let held = unsafe { read::<i32>(self.length_at(), 1)[0] };
        let length = held.clamp(0, self.p.rows.max_rows as i32);
        if held != length {
            unsafe { report(self.p.status, abi::KVLAR_STATUS_BAD_LENGTH) };
        }
        length as usize
    }

    fn length_at(&self) -> u64 {
        let r = &self.p.rows;
        let at = self.keys.seq * r.length_seq_stride + self.keys.head * r.length_head_stride;
        self.p.lengths.wrapping_add_signed(4 * at)
    }

    /// 1 for each row that is kept.
    ///
    /// # Safety
    /// As for [`super::run`].
    unsafe fn kept(&self, length: usize) -> Vec<u8> {
        let k = &self.p.keep;
        let (mut first, mut columns) = (0u32, length as u32);
        if k.first != 0 {
            first = unsafe { int(k.first, self.keys.seq) } as u32;
            columns = k.columns;
            if k.counts != 0 {
                columns = unsafe { int(k.counts, self.keys.seq) }.clamp(0, k.columns as i32) as u32;
            }
        }
        let at = |address: u64, column: u32, bytes: i64| {
            address.wrapping_add_signed(bytes * (self.index as i64 * k.stride + i64::from(column)))
        };
        let members = u64::from(k.members);
        let cut = if k.mask == 0 { unsafe { read::<u64>(k.cuts + 8 * (self.index / members), 1)[0] } } else { 0 };
        let before = (self.index % members) as u32 * k.columns;
        let kept = |row: usize| {
            let mut column = row as u32;
            if k.first != 0 {
                if self.p.rows.positions != 0 {
                    let Some(place) = (unsafe { self.keys.place(row) }) else { return true };
                    column = unsafe { int(self.p.rows.positions, self.keys.position_at(place)) } as u32;
                }
                column = column.wrapping_sub(first);
                if column >= columns {
                    return true;
                }
            }
            if k.mask != 0 {
                return unsafe { read::<u8>(at(k.mask, column, 1), 1)[0] } != 0;
            }
            let score = unsafe { read::<f32>(at(k.scores, column, 4), 1)[0] };
            let forced = column < k.sink_rows || column >= columns - columns.min(k.recent_rows);
            forced || ordered_row(score, before.wrapping_add(column)) >= cut
        };
        (0..length).map(|row| kept(row).into()).collect()
    }

    /// Addresses and sizes of all that belongs to a row.
    fn parts(&self, row: usize, place: Place) -> Vec<(u64, usize)> {
        let p = self.p;
        let mut parts = Vec::new();
        let sides = [(&p.keys, p.key_bytes, p.key_params), (&p.values, p.value_bytes, p.value_params)];
        for ((pool, bytes, params), base) in sides.into_iter().zip(self.base) {
            let page = base.wrapping_add_signed(place.page * pool.page_stride);
            let in_page = place.in_page as u64;
            parts.push((page + in_page * u64::from(pool.row_stride), bytes as usize));
            let first = page + u64::from(pool.params_offset);
            parts.push((first + in_page * u64::from(pool.params_stride), params as usize));
        }
        if p.rows.positions != 0 {
            parts.push((p.rows.positions.wrapping_add_signed(4 * self.keys.position_at(place)), 4));
        }
        if p.scores != 0 {
            parts.push((p.scores + 4 * (self.index * p.score_stride as u64 + row as u64), 4));
        }
        parts
    }

    /// # Safety
    /// As for [`super::run`].
    unsafe fn move_row(&self, from: usize, to: usize) {
        let (source, target) = unsafe { (self.keys.place(from), self.keys.place(to)) };
        let (Some(source), Some(target)) = (source, target) else { return };
        for ((source, bytes), (target, _)) in self.parts(from, source).into_iter().zip(self.parts(to, target)) {
            unsafe { write(target, &read::<u8>(source, bytes)) };
        }
    }
}

/// What a launch of `kvlar_compact` or `kvlar_compact_any` does.
///
/// # Safety
/// As for [`super::run`].
pub unsafe fn compact(p: &abi::KvlarCompact, order: CompactOrder) -> Result<()> {
    // Pages are those that both pools have.
    let page_count = if p.value_bytes == 0 { p.keys.page_count } else { p.keys.page_count.min(p.values.page_count) };
    let pool = abi::KvlarPool { page_count, ..p.keys };
    for index in 0..u64::from(p.seqs) * u64::from(p.owners) {
        let (seq, head) = ((index / u64::from(p.owners)) as i64, (index % u64::from(p.owners)) as i64);
        let base = unsafe { [base(p, &p.keys, p.key_layers, seq, head), base(p, &p.values, p.value_layers, seq, head)] };
        let keys = HeadRows { rows: &p.rows, pool: &pool, seq, head, status: p.status };
        let owner = Owner { p, keys, index, base };
        let kept = unsafe { owner.kept(owner.length()) };
        let sources = row_sources(&kept, order);
        for (to, &from) in sources.iter().enumerate() {
            if to != from {
                unsafe { owner.move_row(from, to) };
            }
        }
        unsafe { write(owner.length_at(), &[sources.len() as i32]) };
        if p.source != 0 {
            let sources: Vec<i32> = sources.into_iter().map(|row| row as i32).collect();
            unsafe { write(p.source + 4 * index * p.source_stride as u64, &sources) };
        }
    }
    Ok(())
}

/// What a launch of `kvlar_protect` does.
///
/// # Safety
/// As for [`super::run`].
pub unsafe fn protect(p: &abi::KvlarProtect) -> Result<()> {
    let pool = abi::KvlarPool { page_count: p.page_count, ..Default::default() };
    for index in 0..u64::from(p.seqs) * u64::from(p.owners) {
        let (seq, head) = ((index / u64::from(p.owners)) as i64, (index % u64::from(p.owners)) as i64);
        // Lengths are clamped to the columns.
        let rows = abi::KvlarRows { max_rows: p.row_count, ..p.rows };
        let owner = HeadRows { rows: &rows, pool: &pool, seq, head, status: p.status };
        let length = unsafe { owner.length(0) };
        let recent = if p.recent == 0 { None } else { Some(unsafe { int(p.recent, seq) }) };
        let mut given: Vec<f32> = unsafe { read(p.scores + 4 * index * p.stride as u64, length) };
        let from = if p.staged == 0 { 0 } else { i64::from(unsafe { int(p.staged_from, seq) }) };
        let mut out = Vec::with_capacity(p.row_count as usize);
        for (row, score) in given.iter_mut().enumerate() {
            let position = match rows.positions {
                0 => Some(row as i32),
                at => unsafe { owner.place(row).map(|place| int(at, owner.position_at(place))) },
            };
            let is_protected = position.is_some_and(|x| x < p.sink_positions || recent.is_some_and(|r| x >= r));
            let column = position.map_or(-1, |x| i64::from(x) - from);
            if p.staged != 0 && (0..i64::from(p.staged_count)).contains(&column) {
                let at = p.staged + 4 * (index * p.staged_stride as u64 + column as u64);
                *score = unsafe { read::<f32>(at, 1)[0] };
            }
            out.push(if is_protected { p.value } else { *score });
        }
        unsafe { write(p.scores + 4 * index * p.stride as u64, &given) };
        if p.fill == 1 {
            out.resize(p.row_count as usize, f32::NEG_INFINITY);
        }
        unsafe { write(p.protected_scores + 4 * index * p.protected_stride as u64, &out) };
    }
    Ok(())
}
