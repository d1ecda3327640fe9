//! score_column.

use super::{Heads, device};
use crate::backend::Backend;
use crate::op::case::{Case, Output};
use crate::op::{Result, input};
use kvlar::ScoreShape;
use kvlar_reference::{ColumnInput, score_column};

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let Heads { seqs, q_heads, kv_heads, queries, rows, head_dim, q, k, scale, dtype } = Heads::read(case)?;
    if queries != rows {
        return input(format!("q has {queries} rows a head and k {rows}; every row has a query"));
    }
    case.finish()?;
    let i = ColumnInput { seqs, q_heads, kv_heads, rows, head_dim, q: &q, k: &k, scale: Some(scale) };
    i.check()?;
    let scores = match backend {
        Backend::Reference => score_column(&i)?,
        // Without rows there is no query either.
        _ if rows == 0 => Vec::new(),
        _ => {
            let shape = ScoreShape::column(dtype, seqs, (q_heads, kv_heads), rows, head_dim);
            let tensors = device::Tensors { q: &q, k: &k, lse: None, span: None };
            device::scores(ScoreShape { scale: scale as f32, ..shape }, &tensors, backend)?
        }
    };
    Ok(Output::default().floats("scores", &[seqs, kv_heads, rows], &scores))
}
