//! score_window.

use super::{Heads, no_kernel};
use crate::backend::Backend;
use crate::op::case::{Case, Output, expect};
use crate::op::{Result, input};
use kvlar_reference::{HeadReduction, Pool, RowReduction, WindowInput, score_window};

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let heads = Heads::read(case)?;
    let Heads { seqs, q_heads, kv_heads, queries: window, rows, head_dim, ref q, ref k, scale } = heads;
    let lse = case.floats_if_any("lse")?;
    if let Some(lse) = &lse {
        expect("lse", &lse.shape, &[seqs, q_heads, window])?;
    }
    // Even where nothing is pooled a kernel that no pooling could have is an error.
    let kernel: usize = case.scalar("kernel", 7)?;
    if kernel.is_multiple_of(2) {
        return input(format!("kernel: {kernel} is not odd"));
    }
    let pool = case.choice("pool", &[("avg", Pool::Avg(kernel)), ("max", Pool::Max(kernel)), ("none", Pool::None)])?;
    let row_reduction = case.choice("rows", &[("sum", RowReduction::Sum), ("mean", RowReduction::Mean)])?;
    let reductions = [("mean", HeadReduction::Mean), ("max", HeadReduction::Max), ("sum", HeadReduction::Sum)];
    let head_reduction = case.choice("reduce", &reductions)?;
    case.finish()?;
    let i = WindowInput {
        seqs,
        q_heads,
        kv_heads,
        window,
        rows,
        head_dim,
        q,
        k,
        lse: lse.as_ref().map(|lse| &lse.values[..]),
        scale: Some(scale),
        row_reduction,
        pool,
        head_reduction,
    };
    i.check()?;
    let scores = match backend {
        Backend::Reference => score_window(&i)?,
        _ => return no_kernel("score_window", backend),
    };
    Ok(Output::default().floats("scores", &[seqs, kv_heads, rows - window], &scores))
}
