//! score_window.

use super::{Heads, device};
use crate::backend::Backend;
use crate::op::case::{Case, Output, expect};
use crate::op::{Result, input};
use kvlar::{Pooling, ScoreReduction, ScoreShape, ScoredRows};
use kvlar_reference::{HeadReduction, Pool, RowReduction, WindowColumns, WindowInput, score_window};

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let heads = Heads::read(case)?;
    let Heads { seqs, q_heads, kv_heads, queries: window, rows, head_dim, ref q, ref k, scale, dtype } = heads;
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
    let columns = case.choice("columns", &[("prefix", WindowColumns::Prefix), ("all", WindowColumns::All)])?;
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
        columns,
    };
    i.check()?;
    let scores = match backend {
        Backend::Reference => score_window(&i)?,
        _ => {
            let shape = ScoreShape {
                scale: scale as f32,
                scored: if columns == WindowColumns::All { ScoredRows::All } else { ScoredRows::Prefix },
                over_rows: if row_reduction == RowReduction::Mean { ScoreReduction::Mean } else { ScoreReduction::Sum },
                pool: match pool {
                    Pool::None => Pooling::None,
                    Pool::Avg(kernel) => Pooling::Avg(kernel),
                    Pool::Max(kernel) => Pooling::Max(kernel),
                },
                over_heads: match head_reduction {
                    HeadReduction::Mean => ScoreReduction::Mean,
                    HeadReduction::Max => ScoreReduction::Max,
                    HeadReduction::Sum => ScoreReduction::Sum,
                },
                ..ScoreShape::window(dtype, seqs, (q_heads, kv_heads), window, rows, head_dim)
            };
            device::scores(shape, &device::Tensors { q, k, lse: i.lse, span: None }, backend)?
        }
    };
    Ok(Output::default().floats("scores", &[seqs, kv_heads, i.scored()], &scores))
}
