//! encode and decode: two names of one op.

use super::attend::{Lab, reference_dtype};
use super::case::{Case, Output};
use super::formats::{Stored, group};
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{Buffer, Dtype, EncodeShape, Pool, Rows};
use kvlar_reference::{Tiers, quantize_rows};

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let x = case.floats("x", 2)?;
    let (n, d) = (x.shape[0], x.shape[1]);
    if d == 0 {
        return input("x has rows of no values");
    }
    let group = group(case)?;
    let stored = Stored::read(case, "codec", None, group, d)?.with_codebooks(case, None, d)?;
    let dtype = case.choice("dtype", &[("f32", Dtype::F32), ("bf16", Dtype::Bf16), ("f16", Dtype::F16)])?;
    case.finish()?;
    let dtype = reference_dtype(dtype);
    let values = dtype.round_all(&x.values);
    let (decoded, bytes) = if backend == Backend::Reference {
        let head = stored.storage().heads(1, d)?;
        let rows = quantize_rows(&values, d, &head[0], Tiers::none(dtype))?;
        (rows.decoded, rows.bytes)
    } else {
        on_device(&values, &stored, n, d, backend)?
    };
    Ok(Output::default().floats("decoded", &[n, d], &decoded).integer("bytes", bytes as i64))
}

/// Decoded rows, and the bytes that they took.
fn on_device(values: &[f32], stored: &Stored, n: usize, d: usize, backend: Backend) -> Result<(Vec<f32>, usize)> {
    let format = stored.launched()?;
    let lab = Lab::open(backend, Dtype::Bf16)?;
    let plan = EncodeShape { format, dtype: Dtype::F32, seqs: 1, heads: 1, rows: n, dim: d }.plan(&lab.device)?;
    if n == 0 {
        return Ok((Vec::new(), 0));
    }
    let x = lab.upload(values)?;
    let (row, params) = (format.row_bytes(d), format.params_bytes(d));
    let tables = stored.upload_tables(&lab)?;
    let tables = tables.as_ref().map(Buffer::view);
    let mut held = lab.device.alloc(n * (row + params))?;
    let mut out = lab.device.alloc(4 * n * d)?;
    let rows = Rows::contiguous(None, n);
    plan.encode(&lab.stream, x.view(), &rows, &pool(held.view_mut(), n, row, params), tables)?;
    plan.decode(&lab.stream, &rows, &pool(held.view(), n, row, params), tables, &mut out.view_mut())?;
    Ok((lab.download(&out)?, n * (row + params)))
}

/// `n` rows, then their scales and zeros.
fn pool<M: kvlar::Memory>(data: M, n: usize, row: usize, params: usize) -> Pool<M> {
    Pool { params_offset: n * row, params_stride: params, ..Pool::contiguous(data, 1, n, row) }
}
