//! score_repeat.

use super::{device, divides, scale, sizes};
use crate::backend::Backend;
use crate::op::case::{Case, Output};
use crate::op::formats::required;
use crate::op::lab::reference_dtype;
use crate::op::{Result, input};
use kvlar::ScoreShape;
use kvlar_reference::{RepeatInput, score_repeat};

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let (q, k) = (case.floats("q", 3)?, case.floats("k", 3)?);
    let ([q_heads, queries, head_dim], [kv_heads, all_rows, key_dim]) = (sizes(&q.shape), sizes(&k.shape));
    if head_dim != key_dim {
        return input(format!("q has rows of {head_dim} dimensions, k of {key_dim}"));
    }
    divides(q_heads, kv_heads, head_dim)?;
    let Some(rows) = all_rows.checked_sub(queries) else {
        return input(format!("k has {all_rows} rows a head, less than the {queries} of q, which are its last"));
    };
    let (sink, start, len) = (required(case, "sink")?, required(case, "start")?, required(case, "len")?);
    let dtype = case.dtype()?;
    let scale = scale(case, head_dim)?;
    case.finish()?;
    let round = |x: &[f32]| reference_dtype(dtype).round_all(x);
    let (q, k) = (round(&q.values), round(&k.values));
    let i = RepeatInput { q_heads, kv_heads, queries, rows, head_dim, q: &q, k: &k, sink, start, len, scale: Some(scale) };
    i.check()?;
    let scores = match backend {
        Backend::Reference => score_repeat(&i)?,
        _ => {
            let shape = ScoreShape::repeat(dtype, 1, (q_heads, kv_heads), queries, len, all_rows, head_dim);
            let tensors = device::Tensors { q: &q, k: &k, lse: None, span: Some([sink, start, len]) };
            device::scores(ScoreShape { scale: scale as f32, ..shape }, &tensors, backend)?
        }
    };
    Ok(Output::default().floats("scores", &[kv_heads, len], &scores))
}
