//! Codebooks of a model's keys.

use super::{progress, shape};
use anyhow::{Context, Result, bail};
use kvlar_calibrate::{KeySample, Plan, PqConfig, PqReport};
use kvlar_candle::EngineError;
use kvlar_candle::llama::Llama;

/// Runs the windows through the exact model, gathers a sample of each layer's keys and fits codebooks to it.
///
/// Keys are taken after RoPE, at the positions of their window: that is what a cache stores, since scores are read from
/// codes without a word about positions.
///
/// # Errors
/// For settings that the model cannot have, no windows, fewer rows than centroids, and keys that are not finite, naming
/// window and layer.
pub fn plan(model: &Llama, windows: &[Vec<u32>], config: &PqConfig) -> Result<(Plan, PqReport)> {
    let shape = shape(model);
    config.check(&shape)?;
    if windows.is_empty() {
        bail!("calibration needs at least one window of tokens");
    }
    let (heads, d) = (shape.layer.kv_heads, shape.layer.head_dim);
    let sample = |layer| KeySample::new(heads, d, config.rows, config.seed, layer);
    let mut samples = (0..shape.layers).map(sample).collect::<kvlar_calibrate::Result<Vec<_>>>()?;
    let bar = progress("keys", windows.len());
    for (i, window) in windows.iter().enumerate() {
        let observe = |layer: usize, _: &[f32], k: &[f32], _: &[f32]| {
            samples[layer].add(&model.rotate_keys(k)?).map_err(|e| EngineError::Input(format!("layer {layer}: {e}")))
        };
        model.capture(window, observe).with_context(|| format!("window {i}"))?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let bar = progress("codebooks", shape.layers);
    let fitted = kvlar_calibrate::fit_pq(config, &shape, &model.fingerprint()?, &samples, &mut |done, _| {
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    Ok(fitted?)
}
