//! compact.

use super::attend::reference_dtype;
use super::case::{Case, Output, expect};
use super::{Result, input, no_kernel};
use crate::backend::Backend;
use kvlar_reference::{CompactInput, CompactOrder};

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let (k, v) = (case.floats("k", 3)?, case.floats("v", 3)?);
    let [heads, rows, head_dim] = k.shape[..] else { return input("k") };
    let value_dim = v.shape[2];
    expect("v", &v.shape, &[heads, rows, value_dim])?;
    let keep = case.bytes("keep", &[heads, rows])?;
    let Some(positions) = case.ints("positions", &[&[rows]])? else { return input("no tensor positions") };
    let order = case.choice("order", &[("keep", CompactOrder::Keep), ("any", CompactOrder::Any)])?;
    let dtype = reference_dtype(case.dtype()?);
    case.finish()?;
    let (k, v) = (dtype.round_all(&k.values), dtype.round_all(&v.values));
    let i = CompactInput { heads, rows, head_dim, value_dim, k: &k, v: &v, keep: &keep, positions: &positions, order };
    let r = match backend {
        Backend::Reference => kvlar_reference::compact(&i)?,
        Backend::Simt | Backend::Cuda => return no_kernel("compact"),
    };
    let kept = r.source.len();
    Ok(Output::default()
        .floats("k", &[kept, head_dim], &r.k)
        .floats("v", &[kept, value_dim], &r.v)
        .ints("lengths", &[heads], &r.lengths)
        .ints("positions", &[kept], &r.positions)
        .ints("source", &[kept], &r.source))
}
