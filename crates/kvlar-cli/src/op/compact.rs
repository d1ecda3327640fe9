//! compact.

use super::case::{Case, Output, expect};
use super::lab::{Lab, reference_dtype};
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{
    Codec, Columns, CompactArgs, CompactOrder, CompactShape, Dtype, Format, Keep, Pool, Rows, Stored, Workspace, WorkspaceSize,
};
use kvlar_reference::{CompactInput, Compacted};

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let (k, v) = (case.floats("k", 3)?, case.floats("v", 3)?);
    let [heads, rows, head_dim] = k.shape[..] else { return input("k") };
    let value_dim = v.shape[2];
    expect("v", &v.shape, &[heads, rows, value_dim])?;
    let keep = case.bytes("keep", &[heads, rows])?;
    let Some(positions) = case.ints("positions", &[&[rows]])? else { return input("no tensor positions") };
    let order = case.choice("order", &[("keep", CompactOrder::Keep), ("any", CompactOrder::Any)])?;
    let native = case.dtype()?;
    let dtype = reference_dtype(native);
    case.finish()?;
    let (k, v) = (dtype.round_all(&k.values), dtype.round_all(&v.values));
    let i = CompactInput { heads, rows, head_dim, value_dim, k: &k, v: &v, keep: &keep, positions: &positions, order };
    let mut r = kvlar_reference::compact(&i)?; // on a device too: it says what is wrong with the input
    if backend != Backend::Reference && heads * rows > 0 {
        r = on_device(&i, native, backend)?;
    }
    let kept = r.source.len();
    Ok(Output::default()
        .floats("k", &[kept, head_dim], &r.k)
        .floats("v", &[kept, value_dim], &r.v)
        .ints("lengths", &[heads], &r.lengths)
        .ints("positions", &[kept], &r.positions)
        .ints("source", &[kept], &r.source))
}

/// In pages of each head's own, in reverse order.
fn on_device(i: &CompactInput<'_>, dtype: Dtype, backend: Backend) -> Result<Compacted> {
    /// Rows of a page.
    const PAGE: usize = 16;
    let lab = Lab::open(backend, dtype)?;
    let format = Format::from(Option::<Codec>::from(dtype).unwrap_or(Codec::Bf16));
    let pages = i.rows.div_ceil(PAGE);
    let table: Vec<i32> = (0..(i.heads * pages) as i32).rev().collect();
    let at = |head: usize, row: usize| table[head * pages + row / PAGE] as usize * PAGE + row % PAGE;
    // Rows of any dimension: padded to what a stored row takes.
    let width = |dim: usize| format.row_bytes(dim).max(16) / 2;
    let paged = |x: &[f32], dim: usize| {
        let mut to = vec![0.0; table.len() * PAGE * width(dim)];
        for (row, from) in (0..i.heads * i.rows).zip(x.chunks(dim.max(1))) {
            to[at(row / i.rows, row % i.rows) * width(dim)..][..dim].copy_from_slice(from);
        }
        to
    };
    let mut keys = lab.upload_as(&paged(i.k, i.head_dim), dtype)?;
    let mut values = lab.upload_as(&paged(i.v, i.value_dim), dtype)?;
    let mut positions = vec![0; table.len() * PAGE];
    for (head, row) in (0..i.heads).flat_map(|h| (0..i.rows).map(move |r| (h, r))) {
        positions[at(head, row)] = i.positions[row];
    }
    let (tables, keep) = (lab.upload(&table)?, lab.upload(i.keep)?);
    let (mut positions, mut lengths) = (lab.upload(&positions)?, lab.upload(&vec![i.rows as i32; i.heads])?);
    let mut source = lab.device.alloc(4 * i.heads * i.rows)?;
    let stored = |dim: usize| Stored::row_wise(2 * width(dim), 0);
    let plan = CompactShape {
        seqs: 1,
        owners: i.heads,
        owners_a_layer: i.heads,
        keys: stored(i.head_dim),
        values: Some(stored(i.value_dim)),
        max_rows: i.rows,
        order: i.order,
    }
    .plan(&lab.device)?;
    let mut workspace = Workspace::new(&lab.device, WorkspaceSize::default())?;
    let rows = Rows::per_head(tables.view(), i.heads, pages, tables.view(), PAGE)?;
    let mut args = CompactArgs {
        rows: Rows { lengths: None, max_rows: i.rows, ..rows },
        lengths: lengths.view_mut(),
        positions: Some(positions.view_mut()),
        scores: None,
        keys: Pool::per_head(keys.view_mut(), table.len(), PAGE, 2 * width(i.head_dim), 0),
        values: Some(Pool::per_head(values.view_mut(), table.len(), PAGE, 2 * width(i.value_dim), 0)),
        keep: Keep::Mask { mask: keep.view(), columns: i.rows },
        columns: Columns::Rows,
        source: Some(source.view_mut()),
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    let mut out = Compacted::default();
    let ints = |buffer: &kvlar::Buffer| -> Result<Vec<i32>> {
        let mut to = vec![0i32; buffer.len() / 4];
        lab.stream.download(buffer, 0, bytemuck::cast_slice_mut(&mut to))?;
        Ok(to)
    };
    let halves = |buffer: &kvlar::Buffer| -> Result<Vec<f32>> {
        let mut to = vec![0u16; buffer.len() / 2];
        lab.stream.download(buffer, 0, bytemuck::cast_slice_mut(&mut to))?;
        let value =
            |x: u16| if dtype == Dtype::F16 { half::f16::from_bits(x).to_f32() } else { half::bf16::from_bits(x).to_f32() };
        Ok(to.into_iter().map(value).collect())
    };
    let (positions, sources) = (ints(&positions)?, ints(&source)?);
    let (keys, values) = (halves(&keys)?, halves(&values)?);
    out.lengths = ints(&lengths)?;
    for (head, &length) in out.lengths.iter().enumerate() {
        for row in 0..length as usize {
            let place = at(head, row);
            out.k.extend(&keys[place * width(i.head_dim)..][..i.head_dim]);
            out.v.extend(&values[place * width(i.value_dim)..][..i.value_dim]);
            out.positions.push(positions[place]);
            out.source.push(sources[head * i.rows + row]);
        }
    }
    Ok(out)
}
