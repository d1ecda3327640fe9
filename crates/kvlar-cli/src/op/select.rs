//! topk, topp, threshold.

use super::case::{Case, Floats, Output};
use super::formats::required;
use super::{Result, input, no_kernel};
use crate::backend::Backend;
use kvlar_reference::{Forced, Resolve, ThresholdInput, ThresholdRule, TopkInput, ToppInput};

/// What topk and topp share: scores of R lists of T rows, how long each is, and the rows that are kept anyway.
struct Lists {
    /// R, T.
    dims: [usize; 2],
    scores: Vec<f32>,
    lengths: Option<Vec<i32>>,
    forced: Forced,
}

impl Lists {
    fn read(case: &mut Case, scores: &str) -> Result<Self> {
        let Floats { shape, values } = case.floats(scores, 2)?;
        let [r, t] = shape[..] else { return input(scores) };
        let lengths = case.ints("lengths", &[&[r]])?;
        let forced = Forced { sink_rows: case.scalar("sink_rows", 0)?, recent_rows: case.scalar("recent_rows", 0)? };
        case.dtype()?; // every op takes it; scores are always f32
        Ok(Self { dims: [r, t], scores: values, lengths, forced })
    }
}

pub fn topk(case: &mut Case, backend: Backend) -> Result<Output> {
    let Lists { dims: [batch, rows], scores, lengths, forced } = Lists::read(case, "scores")?;
    let k = required(case, "k")?;
    case.finish()?;
    let i = TopkInput { batch, rows, scores: &scores, lengths: lengths.as_deref(), k, forced };
    let r = match backend {
        Backend::Reference => kvlar_reference::topk(&i)?,
        Backend::Simt | Backend::Cuda => return no_kernel("topk"),
    };
    Ok(Output::default().ints("rows", &[batch, k], &r.rows).ints("counts", &[batch], &r.counts))
}

pub fn topp(case: &mut Case, backend: Backend) -> Result<Output> {
    let Lists { dims: [batch, rows], scores, lengths, forced } = Lists::read(case, "logits")?;
    let i = ToppInput {
        batch,
        rows,
        logits: &scores,
        lengths: lengths.as_deref(),
        top_p: case.scalar("top_p", 0.9)?,
        k_min: case.scalar("k_min", 1)?,
        k_max: case.scalar("k_max", rows)?,
        forced,
        resolve: case.choice("resolve", &[("exact", Resolve::Exact), ("bin", Resolve::Bin)])?,
    };
    case.finish()?;
    let r = match backend {
        Backend::Reference => kvlar_reference::topp(&i)?,
        Backend::Simt | Backend::Cuda => return no_kernel("topp"),
    };
    let out = Output::default().bytes("mask", &[batch, rows], r.mask);
    Ok(out.ints("counts", &[batch], &r.counts).floats("mass", &[batch], &r.mass))
}

pub fn threshold(case: &mut Case, backend: Backend) -> Result<Output> {
    let scores = case.floats("scores", 3)?;
    let [layers, heads, rows] = scores.shape[..] else { return input("scores") };
    let i = ThresholdInput {
        layers,
        heads,
        rows,
        scores: &scores.values,
        keep: required(case, "keep")?,
        rule: case.choice("rule", &[("exact", ThresholdRule::Exact), ("strict", ThresholdRule::Strict)])?,
        floor: case.scalar("floor", 0)?,
    };
    case.dtype()?; // every op takes it; scores are always f32
    case.finish()?;
    let r = match backend {
        Backend::Reference => kvlar_reference::threshold(&i)?,
        Backend::Simt | Backend::Cuda => return no_kernel("threshold"),
    };
    Ok(Output::default().bytes("mask", &scores.shape, r.mask).ints("lengths", &[layers, heads], &r.lengths))
}
