//! budget_layers, budget_heads.

use super::case::{Case, Output};
use super::formats::required;
use super::lab::Lab;
use super::{Result, input};
use crate::backend::Backend;
use kvlar::{BudgetHeadsArgs, BudgetHeadsShape, BudgetLayersArgs, BudgetLayersShape, Buffer, Dtype, Workspace};
use kvlar_reference::{HeadsInput, LayerBudget, LayersInput};

fn read(lab: &Lab, budgets: &Buffer) -> Result<Vec<i32>> {
    let mut values = vec![0; budgets.len() / 4];
    lab.stream.download(budgets, 0, bytemuck::cast_slice_mut(&mut values))?;
    Ok(values)
}

fn layers_on_device(i: &LayersInput<'_>, backend: Backend) -> Result<Vec<i32>> {
    let lab = Lab::open(backend, Dtype::Bf16)?;
    let shape = BudgetLayersShape::new(i.method, [1, i.layers, i.heads], i.rows, i.base);
    let plan = BudgetLayersShape { r_max: i.r_max, interval: i.interval, beta: i.beta, ..shape }.plan(&lab.device)?;
    let (scores, mut budgets) = (lab.upload(i.scores)?, lab.device.alloc(4 * i.layers)?);
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let mut args = BudgetLayersArgs {
        scores: Some(scores.view()),
        score_stride: None,
        lengths: None,
        histogram: None,
        budgets: budgets.view_mut(),
        ks: None,
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    read(&lab, &budgets)
}

fn heads_on_device(i: &HeadsInput<'_>, backend: Backend) -> Result<Vec<i32>> {
    let lab = Lab::open(backend, Dtype::Bf16)?;
    let shape = BudgetHeadsShape::new([1, 1, i.heads], i.rows, i.base);
    let plan = BudgetHeadsShape { alpha: i.alpha, ..shape }.plan(&lab.device)?;
    let (scores, mut budgets) = (lab.upload(i.scores)?, lab.device.alloc(4 * i.heads)?);
    let mut workspace = Workspace::new(&lab.device, plan.workspace())?;
    let mut args = BudgetHeadsArgs {
        scores: scores.view(),
        score_stride: None,
        lengths: None,
        histogram: None,
        budgets: budgets.view_mut(),
        ks: None,
    };
    plan.launch(&lab.stream, &mut args, &mut workspace)?;
    read(&lab, &budgets)
}

pub fn budget_layers(case: &mut Case, backend: Backend) -> Result<Output> {
    let scores = case.floats("scores", 3)?;
    let [layers, heads, rows] = scores.shape[..] else { return input("scores") };
    let base = required(case, "base")?;
    let method = match case.text("method").as_deref() {
        Some("dynamickv") => LayerBudget::DynamicKv,
        Some("pyramid") => LayerBudget::Pyramid,
        Some("uniform") => LayerBudget::Uniform,
        Some(other) => return input(format!("method: {other:?} is none of dynamickv, pyramid, uniform")),
        None => return input("no key method"),
    };
    // All are keys of the op, whatever the method reads.
    let (r_max, interval, beta) = (case.scalar("r_max", 10.0)?, case.scalar("interval", 4)?, case.scalar("beta", 20)?);
    case.dtype()?; // every op takes it; scores are always f32
    case.finish()?;
    let i = LayersInput { layers, heads, rows, scores: &scores.values, base, method, r_max, interval, beta };
    let mut budgets = kvlar_reference::budget_layers(&i)?; // on a device too: it says what is wrong with the input
    if backend != Backend::Reference {
        budgets = layers_on_device(&i, backend)?;
    }
    Ok(Output::default().ints("budgets", &[layers], &budgets))
}

pub fn budget_heads(case: &mut Case, backend: Backend) -> Result<Output> {
    let scores = case.floats("scores", 2)?;
    let [heads, rows] = scores.shape[..] else { return input("scores") };
    let i = HeadsInput { heads, rows, scores: &scores.values, base: required(case, "base")?, alpha: case.scalar("alpha", 0.5)? };
    case.dtype()?; // every op takes it; scores are always f32
    case.finish()?;
    let mut budgets = kvlar_reference::budget_heads(&i)?; // as above
    if backend != Backend::Reference {
        budgets = heads_on_device(&i, backend)?;
    }
    Ok(Output::default().ints("budgets", &[heads], &budgets))
}
