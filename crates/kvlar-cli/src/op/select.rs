//! topk, topp, threshold.

use super::case::{Case, Floats, Output};
use super::formats::required;
use super::lab::Lab;
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{Dtype, TopkArgs, TopkShape, ToppArgs, ToppShape, Workspace};
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

/// What a device selects.
struct Selected {
    /// `[R, k]`; none for sets of several rows.
    rows: Vec<i32>,
    counts: Vec<i32>,
    mask: Vec<u8>,
}

/// `stride`: from one row of scores to the next.
fn on_device(shape: TopkShape, scores: &[f32], stride: usize, lengths: Option<&[i32]>, backend: Backend) -> Result<Selected> {
    let lab = Lab::open(backend, Dtype::Bf16)?;
    let plan = shape.plan(&lab.device)?;
    let (all, one) = (shape.batch * shape.members, shape.members == 1);
    let scores = lab.upload(scores)?;
    let lengths = lengths.map(|l| lab.upload(l)).transpose()?;
    let mut listed = lab.device.alloc(if one { 4 * shape.batch * shape.k } else { 0 })?;
    let (mut counts, mut mask) = (lab.device.alloc(4 * all)?, lab.device.alloc(all * shape.rows)?);
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let mut args = TopkArgs {
        scores: scores.view(),
        score_stride: Some(stride),
        lengths: lengths.as_ref().map(|l| l.view()),
        length_rows: 1,
        histogram: None,
        ks: None,
        cuts: None,
        counts: Some(counts.view_mut()),
        selected: one.then(|| listed.view_mut()),
        mask: Some(mask.view_mut()),
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    let mut read = Selected { rows: vec![0; listed.len() / 4], counts: vec![0; all], mask: vec![0; all * shape.rows] };
    lab.stream.download(&listed, 0, bytemuck::cast_slice_mut(&mut read.rows))?;
    lab.stream.download(&counts, 0, bytemuck::cast_slice_mut(&mut read.counts))?;
    lab.stream.download(&mask, 0, &mut read.mask)?;
    Ok(read)
}

/// Mask, counts and mass.
fn mass_on_device(i: &ToppInput<'_>, backend: Backend) -> Result<(Vec<u8>, Vec<i32>, Vec<f32>)> {
    let lab = Lab::open(backend, Dtype::Bf16)?;
    let Forced { sink_rows, recent_rows } = i.forced;
    let ToppInput { batch, rows, top_p, k_min, k_max, resolve, .. } = *i;
    let plan = ToppShape { batch, rows, top_p, k_min, k_max, sink_rows, recent_rows, resolve }.plan(&lab.device)?;
    let logits = lab.upload(i.logits)?;
    let lengths = i.lengths.map(|l| lab.upload(l)).transpose()?;
    let (mut counts, mut mass) = (lab.device.alloc(4 * batch)?, lab.device.alloc(4 * batch)?);
    let mut mask = lab.device.alloc(batch * rows)?;
    let mut args = ToppArgs {
        lengths: lengths.as_ref().map(|l| l.view()),
        counts: Some(counts.view_mut()),
        mass: Some(mass.view_mut()),
        mask: Some(mask.view_mut()),
        ..ToppArgs::new(logits.view())
    };
    plan.launch(&lab.stream, &mut args)?;
    let (mut kept, mut read) = (vec![0; batch * rows], vec![0; batch]);
    lab.stream.download(&mask, 0, &mut kept)?;
    lab.stream.download(&counts, 0, bytemuck::cast_slice_mut(&mut read))?;
    Ok((kept, read, lab.download(&mass)?))
}

pub fn topk(case: &mut Case, backend: Backend) -> Result<Output> {
    let Lists { dims: [batch, rows], scores, lengths, forced } = Lists::read(case, "scores")?;
    let k = required(case, "k")?;
    case.finish()?;
    let i = TopkInput { batch, rows, scores: &scores, lengths: lengths.as_deref(), k, forced };
    let mut r = kvlar_reference::topk(&i)?; // on a device too: it says what is wrong with the input
    if backend != Backend::Reference {
        let Forced { sink_rows, recent_rows } = forced;
        // A plan asks of k what the longest row that may come asks: here it is known.
        let longest = lengths.iter().flatten().max().map_or(rows, |&length| length as usize);
        let shape = TopkShape { sink_rows, recent_rows, ..TopkShape::new(batch, longest, k) };
        let selected = on_device(shape, &scores, rows, lengths.as_deref(), backend)?;
        (r.rows, r.counts) = (selected.rows, selected.counts);
    }
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
    let mut r = kvlar_reference::topp(&i)?; // on a device too: it says what is wrong with the input
    if backend != Backend::Reference {
        (r.mask, r.counts, r.mass) = mass_on_device(&i, backend)?;
    }
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
    let mut r = kvlar_reference::threshold(&i)?;
    if backend != Backend::Reference {
        let strict = i.rule == ThresholdRule::Strict;
        // The strict rule keeps what is above the score of place keep - 1.
        let k = if strict { i.keep.max(1) } else { i.keep };
        let shape = TopkShape { members: layers * heads, strict, floor: i.floor, ..TopkShape::new(1, rows, k) };
        if !scores.values.is_empty() {
            let selected = on_device(shape, &scores.values, rows, None, backend)?;
            (r.mask, r.lengths) = (selected.mask, selected.counts);
        }
    }
    Ok(Output::default().bytes("mask", &scores.shape, r.mask).ints("lengths", &[layers, heads], &r.lengths))
}
