//! merge.

use super::case::{Case, Output, expect};
use super::lab::Lab;
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{Dtype, MergeShape};

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let (parts, lse) = (case.floats("out", 4)?, case.floats("lse", 3)?);
    case.dtype()?; // every op takes it; partial results are always f32
    case.finish()?;
    let [n, b, hq, dv] = parts.shape[..] else { return input("out") };
    expect("lse", &lse.shape, &[n, b, hq])?;
    if n == 0 || dv == 0 {
        return input(format!("out is {:?}: there is nothing to merge", parts.shape));
    }
    let rows = b * hq;
    let (out, merged) = if backend == Backend::Reference || rows == 0 {
        kvlar_reference::merge(&parts.values, &lse.values, n, rows, dv)?
    } else {
        let lab = Lab::open(backend, Dtype::Bf16)?;
        let (p, l) = (lab.upload(&parts.values)?, lab.upload(&lse.values)?);
        let (mut out, mut merged) = (lab.device.alloc(4 * rows * dv)?, lab.device.alloc(4 * rows)?);
        let plan = MergeShape { parts: n, rows, dim: dv }.plan(&lab.device)?;
        plan.launch(&lab.stream, p.view(), l.view(), &mut out.view_mut(), &mut merged.view_mut())?;
        (lab.download(&out)?, lab.download(&merged)?)
    };
    Ok(Output::default().floats("out", &[b, hq, dv], &out).floats("lse", &[b, hq], &merged))
}
