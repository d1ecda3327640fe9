//! reduce.

use super::case::{Case, Output, expect};
use super::formats::required;
use super::{OpError, Result, input};
use crate::backend::Backend;
use kvlar_reference::{ReduceInput, Reduction};

/// No kernel reduces outside of a scan yet.
fn on_device(_: &ReduceInput<'_>, _: Backend) -> Result<Vec<f32>> {
    Err(OpError::Unsupported("reduce runs on the reference only".into()))
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
