//! attend.

use super::attention::{Attention, Dims, attend};
use super::case::{Case, Output};
use super::lab::Lab;
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{AttendShape, Buffer, Codec, Dtype, Pool, Rows, Schedule, Segment, SegmentShape, View};
use kvlar_reference::Attended;

/// Everything that the op reads, checked.
struct Inputs {
    attention: Attention,
    page_size: usize,
    schedule: Schedule,
}

impl Inputs {
    fn read(case: &mut Case) -> Result<Self> {
        let attention = Attention::read(case)?;
        let page_size: usize = case.scalar("page_size", 64)?;
        if page_size != 0 && (!page_size.is_power_of_two() || !(16..=1 << 20).contains(&page_size)) {
            return input(format!("page_size: {page_size} is neither 0 nor a power of two from 16 to 2^20"));
        }
        let schedule = case.choice("schedule", &[("balanced", Schedule::Balanced), ("own", Schedule::Own)])?;
        case.finish()?;
        Ok(Self { attention, page_size, schedule })
    }

    /// Rows of a page; all of them where rows are contiguous.
    fn page_rows(&self) -> usize {
        if self.page_size == 0 { self.attention.dims.t.max(1) } else { self.page_size }
    }

    /// Pages of each sequence lie scattered over the pool, as a cache's do: in reverse order here.
    fn table(&self) -> Vec<i32> {
        let pages = self.attention.dims.b * self.attention.dims.t.max(1).div_ceil(self.page_rows());
        (0..pages as i32).rev().collect()
    }

    /// `[B, Hk, T, dim]` as pages `[page][head][row]`.
    fn paged(&self, x: &[f32], dim: usize) -> Vec<f32> {
        let Dims { b, hk, t, .. } = self.attention.dims;
        if self.page_size == 0 {
            let padding = if t == 0 { b * hk * dim } else { 0 }; // the capacity is at least one row
            return x.iter().copied().chain(std::iter::repeat_n(f32::NAN, padding)).collect();
        }
        let (page_rows, table) = (self.page_rows(), self.table());
        let per_seq = table.len() / b.max(1);
        let mut pool = vec![f32::NAN; table.len() * hk * page_rows * dim];
        for (row, from) in x.chunks_exact(dim).enumerate() {
            let (seq, head, row) = (row / t / hk, row / t % hk, row % t);
            let page = table[seq * per_seq + row / page_rows] as usize;
            pool[((page * hk + head) * page_rows + row % page_rows) * dim..][..dim].copy_from_slice(from);
        }
        pool
    }

    /// The pool of keys or values, as [`Inputs::paged`] lays it out; `pages` a sequence.
    fn pool<'a>(&self, data: View<'a>, pages: usize, dim: usize) -> Pool<View<'a>> {
        let Dims { b, hk, t, .. } = self.attention.dims;
        if self.page_size == 0 {
            Pool::contiguous(data, hk, t.max(1), 2 * dim)
        } else {
            Pool::hnd(data, b * pages, self.page_rows(), hk, 2 * dim, 0)
        }
    }

    /// Positions laid out as the rows are.
    fn stored_positions(&self) -> Option<Vec<i32>> {
        let Dims { b, t, .. } = self.attention.dims;
        let given = self.attention.common.positions.as_ref()?;
        let at = |seq: usize, row: usize| given[if given.len() == t && b * t != t { row } else { seq * t + row }];
        if self.page_size == 0 {
            let positions: Vec<i32> =
                (0..b).flat_map(|seq| (0..t).map(move |row| (seq, row))).map(|(seq, row)| at(seq, row)).collect();
            return Some(if t == 0 { vec![0; b] } else { positions });
        }
        let (page_rows, table) = (self.page_rows(), self.table());
        let mut stored = vec![0; table.len() * page_rows];
        for (seq, row) in (0..b).flat_map(|s| (0..t).map(move |r| (s, r))) {
            stored[table[seq * (table.len() / b) + row / page_rows] as usize * page_rows + row % page_rows] = at(seq, row);
        }
        Some(stored)
    }
}

fn on_device(i: &Inputs, backend: Backend) -> Result<Attended> {
    let Dims { b, hq, hk, s, t, d, dv } = i.attention.dims;
    let lab = Lab::open(backend, i.attention.common.dtype)?;
    let codec = if i.attention.common.dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 };
    let max_rows = t.max(1);
    let shape = AttendShape {
        value_dim: dv,
        scale: i.attention.common.scale as f32,
        softcap: i.attention.common.softcap as f32,
        window: i.attention.common.window,
        schedule: i.schedule,
        ..AttendShape::new(i.attention.common.dtype, b, (hq, hk), s.max(1), d, SegmentShape::new(codec, max_rows))
    };
    let plan = shape.plan(&lab.device)?;
    if b * hq * s == 0 {
        return Ok(Attended { out: Vec::new(), lse: Vec::new() });
    }
    let table = lab.upload(&i.table())?;
    let lengths = lab.upload(i.attention.common.lengths.as_deref().unwrap_or(&vec![t as i32; b]))?;
    let positions = i.stored_positions().map(|p| lab.upload(&p)).transpose()?;
    let (page_rows, pages) = (i.page_rows(), i.table().len() / b);
    let mut rows = if i.page_size == 0 {
        Rows::contiguous(Some(lengths.view()), max_rows)
    } else {
        Rows { max_rows, ..Rows::block_table(table.view(), pages, lengths.view(), page_rows)? }
    };
    if i.attention.common.lengths.as_ref().is_some_and(|l| l.len() != b) {
        (rows.length_seq_stride, rows.length_head_stride) = (hk, 1);
    }
    rows.positions = positions.as_ref().map(Buffer::view);
    rows.position_seq_stride = if i.page_size == 0 { max_rows } else { 0 };
    let (keys, values) = (
        lab.upload_as(&i.paged(&i.attention.k, d), i.attention.common.dtype)?,
        lab.upload_as(&i.paged(&i.attention.v, dv), i.attention.common.dtype)?,
    );
    let segments = [Segment {
        rows,
        keys: i.pool(keys.view(), pages, d),
        values: i.pool(values.view(), pages, dv),
        tables: Default::default(),
    }];
    attend(&lab, &plan, &i.attention, &segments)
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let i = Inputs::read(case)?;
    let Dims { b, hq, s, dv, .. } = i.attention.dims;
    let r = if backend == Backend::Reference { kvlar_reference::attend(&i.attention.input())? } else { on_device(&i, backend)? };
    Ok(Output::default().floats("out", &[b, hq, s, dv], &r.out).floats("lse", &[b, hq, s], &r.lse))
}
