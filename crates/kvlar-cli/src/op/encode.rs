//! encode and decode: two names of one op.

use super::attend::{Lab, reference_dtype};
use super::case::{Case, Output};
use super::{OpError, Result, input};
use crate::backend::Backend;
use kvlar::{Codec, Dtype, EncodeShape, Pool, Rows};

/// Codecs that `OPS.md` names and no backend has yet.
const PLANNED: &[&str] = &["fp8", "int4", "int2", "pq"];

/// The codec that a key names.
pub fn codec(case: &mut Case, key: &str, default: Option<&str>) -> Result<Codec> {
    let Some(text) = case.text(key).or(default.map(String::from)) else { return input(format!("no key {key}")) };
    match text.as_str() {
        "bf16" => Ok(Codec::Bf16),
        "f16" => Ok(Codec::F16),
        "int8" => Ok(Codec::Int8),
        other => {
            let (base, suffixed) = other.split_once(['-', '+']).map_or((other, false), |(b, _)| (b, true));
            if PLANNED.contains(&base) || (suffixed && base == "int8") {
                return Err(OpError::Unsupported(format!("{key} {other}")));
            }
            input(format!("{key}: {other:?} is not a codec"))
        }
    }
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let x = case.floats("x", 2)?;
    let (n, d) = (x.shape[0], x.shape[1]);
    if d == 0 {
        return input("x has rows of no values");
    }
    let codec = codec(case, "codec", None)?;
    let group: usize = case.scalar("group", d)?;
    if group == 0 || !d.is_multiple_of(group) {
        return input(format!("group: {group} does not divide {d}"));
    }
    let dtype = case.choice("dtype", &[("f32", Dtype::F32), ("bf16", Dtype::Bf16), ("f16", Dtype::F16)])?;
    case.finish()?;
    let values = reference_dtype(dtype).round_all(&x.values);
    let decoded = if backend == Backend::Reference {
        let mut all = Vec::with_capacity(values.len());
        for row in values.chunks_exact(d) {
            let r = kvlar_reference::encode_row(row, codec.reference(), group)?;
            all.extend(kvlar_reference::decode_row(&r.codes, &r.params, d, codec.reference(), group)?);
        }
        all
    } else {
        on_device(&values, codec, group, n, d, backend)?
    };
    let bytes = codec.reference().stored_bytes(n, d, group);
    Ok(Output::default().floats("decoded", &[n, d], &decoded).integer("bytes", bytes as i64))
}

fn on_device(values: &[f32], codec: Codec, group: usize, n: usize, d: usize, backend: Backend) -> Result<Vec<f32>> {
    let lab = Lab::open(backend, Dtype::Bf16)?;
    let plan = EncodeShape { codec, group, dtype: Dtype::F32, seqs: 1, heads: 1, rows: n, dim: d }.plan(&lab.device)?;
    if n == 0 {
        return Ok(Vec::new());
    }
    let x = lab.upload(values)?;
    let (row, params) = (codec.row_bytes(d), codec.params_bytes(d, group));
    let mut stored = lab.device.alloc(n * (row + params))?;
    let mut out = lab.device.alloc(4 * n * d)?;
    let rows = Rows::contiguous(None, n);
    plan.encode(&lab.stream, x.view(), &rows, &pool(stored.view_mut(), n, row, params))?;
    plan.decode(&lab.stream, &rows, &pool(stored.view(), n, row, params), &mut out.view_mut())?;
    lab.download(&out)
}

/// `n` rows, then their scales and zeros.
fn pool<M: kvlar::Memory>(data: M, n: usize, row: usize, params: usize) -> Pool<M> {
    Pool { params_offset: n * row, params_stride: params, ..Pool::contiguous(data, 1, n, row) }
}
