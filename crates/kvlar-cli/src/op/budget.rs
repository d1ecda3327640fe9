//! budget_layers, budget_heads.

use super::case::{Case, Output};
use super::formats::required;
use super::{Result, input, no_kernel};
use crate::backend::Backend;
use kvlar_reference::{HeadsInput, LayerBudget, LayersInput};

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
    let budgets = match backend {
        Backend::Reference => kvlar_reference::budget_layers(&i)?,
        Backend::Simt | Backend::Cuda => return no_kernel("budget_layers"),
    };
    Ok(Output::default().ints("budgets", &[layers], &budgets))
}

pub fn budget_heads(case: &mut Case, backend: Backend) -> Result<Output> {
    let scores = case.floats("scores", 2)?;
    let [heads, rows] = scores.shape[..] else { return input("scores") };
    let i = HeadsInput { heads, rows, scores: &scores.values, base: required(case, "base")?, alpha: case.scalar("alpha", 0.5)? };
    case.dtype()?; // every op takes it; scores are always f32
    case.finish()?;
    let budgets = match backend {
        Backend::Reference => kvlar_reference::budget_heads(&i)?,
        Backend::Simt | Backend::Cuda => return no_kernel("budget_heads"),
    };
    Ok(Output::default().ints("budgets", &[heads], &budgets))
}
