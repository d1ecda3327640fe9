//! fit_codebooks: fitting runs on the CPU, whatever the backend.

use super::case::{Case, Output};
use super::formats::required;
use super::{Result, input};
use crate::backend::Backend;
use kvlar_calibrate::CodebookConfig;
use kvlar_reference::Dtype;

pub fn fit_codebooks(case: &mut Case, _: Backend) -> Result<Output> {
    let k = case.floats("k", 3)?;
    let (heads, d) = (k.shape[1], k.shape[2]);
    let defaults = CodebookConfig::new(required(case, "m")?);
    let config = CodebookConfig {
        centroids: case.scalar("c", defaults.centroids)?,
        rounds: case.scalar("rounds", defaults.rounds)?,
        seed: case.scalar("seed", defaults.seed)?,
        ..defaults
    };
    let dtype = case.choice("dtype", &[("f32", Dtype::F32), ("bf16", Dtype::Bf16), ("f16", Dtype::F16)])?;
    case.finish()?;
    if k.shape.contains(&0) {
        return input(format!("k is {:?}: there is nothing to fit to", k.shape));
    }
    let fitted = kvlar_calibrate::fit_codebooks(&dtype.round_all(&k.values), heads, d, &config)?;
    let error: Vec<f32> = fitted.error.iter().map(|e| *e as f32).collect();
    let shape = [heads, config.subvectors, config.centroids, d / config.subvectors];
    Ok(Output::default().floats("codebooks", &shape, &fitted.values).floats("error", &[heads], &error))
}
