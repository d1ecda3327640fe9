//! reduce.

use super::case::{Case, Output, expect};
use super::formats::required;
use super::lab::Lab;
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{Dtype, ReduceArgs, ReduceShape, Workspace};
use kvlar_reference::{ReduceInput, Reduction};

fn on_device(i: &ReduceInput<'_>, backend: Backend) -> Result<Vec<f32>> {
    let lab = Lab::open(backend, Dtype::Bf16)?;
    let shape = ReduceShape {
        seqs: i.seqs,
        q_heads: i.q_heads,
        kv_heads: i.kv_heads,
        rows: i.rows,
        method: i.method,
        histogram: false,
        fill: true,
    };
    let plan = shape.plan(&lab.device)?;
    let (logits, lse) = (lab.upload(i.logits)?, lab.upload(i.lse)?);
    let mut scores = lab.device.alloc(4 * i.seqs * i.kv_heads * i.rows)?;
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let mut args = ReduceArgs {
        logits: logits.view(),
        lse: Some(lse.view()),
        lengths: None,
        lengths_per_head: false,
        scores: scores.view_mut(),
        histogram: None,
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    lab.download(&scores)
}

pub fn run(case: &mut Case, backend: Backend) -> Result<Output> {
    let (logits, lse) = (case.floats("logits", 3)?, case.floats("lse", 2)?);
    let [b, hq, t] = logits.shape[..] else { return input("logits") };
    expect("lse", &lse.shape, &[b, hq])?;
    let kv_heads = required(case, "kv_heads")?;
    let method = case.choice(
        "method",
        &[("max_prob", Reduction::MaxProb), ("max_logit", Reduction::MaxLogit), ("mean_logit", Reduction::MeanLogit)],
    )?;
    case.dtype()?; // every op takes it; scores are always f32
    case.finish()?;
    if kv_heads == 0 || hq == 0 || !hq.is_multiple_of(kv_heads) {
        return input(format!("kv_heads: {kv_heads} does not divide {hq} query heads"));
    }
    let i = ReduceInput { seqs: b, q_heads: hq, kv_heads, rows: t, logits: &logits.values, lse: &lse.values, method };
    let scores = if backend == Backend::Reference { kvlar_reference::reduce(&i)? } else { on_device(&i, backend)? };
    Ok(Output::default().floats("scores", &[b, kv_heads, t], &scores))
}
