//! encode and decode: two names of one op.

use super::case::{Case, Output};
use super::formats::{Stored, group};
use super::lab::{Lab, reference_dtype};
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
        on_device(&values, &stored, (n, d), dtype, backend)?
    };
    Ok(Output::default().floats("decoded", &[n, d], &decoded).integer("bytes", bytes as i64))
}

/// Decoded rows, and the bytes that they took.
fn on_device(
    values: &[f32],
    stored: &Stored,
    (n, d): (usize, usize),
    dtype: kvlar_reference::Dtype,
    backend: Backend,
) -> Result<(Vec<f32>, usize)> {
    let format = stored.launched()?;
    let lab = Lab::open(backend, Dtype::Bf16)?;
    // Channel-wise, what is left after the whole groups stays as it is.
    let group = if format.codec.is_channel_wise() { format.group_of(d) } else { 1 };
    let left = n % group;
    let plan = EncodeShape { format, dtype: Dtype::F32, seqs: 1, heads: 1, rows: n - left, dim: d }.plan(&lab.device)?;
    let bytes = stored.storage().format.stored_bytes(n, d, dtype, 0);
    if n == left {
        return Ok((values.to_vec(), bytes));
    }
    let tables = stored.upload_tables(&lab)?;
    let tables = tables.as_ref().map(Buffer::view);
    let (x, held_bytes) = (lab.upload(&values[..(n - left) * d])?, format.stored(d));
    let mut held = lab.device.alloc(held_bytes.bytes(n - left))?;
    let mut out = lab.device.alloc(4 * (n - left) * d)?;
    let rows = Rows::contiguous(None, n - left);
    plan.encode(&lab.stream, x.view(), &rows, &pool(held.view_mut(), n - left, held_bytes), tables)?;
    plan.decode(&lab.stream, &rows, &pool(held.view(), n - left, held_bytes), tables, &mut out.view_mut())?;
    let mut decoded: Vec<f32> = lab.download(&out)?;
    decoded.extend_from_slice(&values[(n - left) * d..]);
    Ok((decoded, bytes))
}

/// `n` rows, then their scales and zeros.
fn pool<M: kvlar::Memory>(data: M, n: usize, stored: kvlar::Stored) -> Pool<M> {
    Pool { params_offset: n * stored.row, params_stride: stored.params, ..Pool::contiguous(data, 1, n, stored.row) }
}
