//! `kvlar calibrate`, and what the demonstration and the evaluation share of it: one run of the model over calibration
//! windows, from which any number of plans are fitted.

mod arguments;
mod gates;
mod pq;
#[cfg(test)]
mod tests;

pub use arguments::Arguments;
pub use pq::plan as pq_plan;

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use kvlar_calibrate::{
    Budget, LayerShape, ModelShape, Moments, PairLayout, Plan, RecalkvConfig, Report, RopePairs, ValueFit, Weighting, Weights,
};
use kvlar_candle::EngineError;
use kvlar_candle::llama::{Fisher, Llama};
use kvlar_reference::RopeLayout;
use serde::Serialize;
use std::cell::OnceCell;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What one run of the model over calibration windows gives. Importances and weights are taken when the first plan needs
/// them, and kept.
pub struct Calibration<'a> {
    model: &'a Llama,
    windows: &'a [Vec<u32>],
    shape: ModelShape,
    fingerprint: String,
    moments: Vec<Moments>,
    importance: OnceCell<Vec<[f64; 2]>>,
    out: OnceCell<Vec<Vec<f32>>>,
    values: OnceCell<Vec<Vec<f32>>>,
}

impl<'a> Calibration<'a> {
    /// Of which model.
    pub fn model(&self) -> &'a Llama {
        self.model
    }

    /// Of which windows of tokens.
    pub fn windows(&self) -> &'a [Vec<u32>] {
        self.windows
    }
}

/// Sizes of a model, as fitting wants them.
pub fn shape(model: &Llama) -> ModelShape {
    let c = model.config();
    ModelShape {
        layers: c.layers,
        layer: LayerShape { q_heads: c.heads, kv_heads: c.kv_heads, head_dim: c.head_dim, value_dim: c.head_dim },
        hidden: c.hidden,
        rope: RopePairs {
            rotary_dim: c.rope.rotary_dim(),
            layout: match c.rope.layout {
                RopeLayout::Half => PairLayout::Half,
                RopeLayout::Interleaved => PairLayout::Interleaved,
            },
        },
    }
}

/// Runs the windows through the exact model and gathers each layer's second moments.
///
/// # Errors
/// For no windows, tokens that the model does not have, and activations that are not finite, naming window and layer.
pub fn calibrate<'a>(model: &'a Llama, windows: &'a [Vec<u32>]) -> Result<Calibration<'a>> {
    let shape = shape(model);
    if windows.is_empty() {
        bail!("calibration needs at least one window of tokens");
    }
    let mut moments = (0..shape.layers).map(|_| Moments::new(shape.layer)).collect::<kvlar_calibrate::Result<Vec<_>>>()?;
    let bar = progress("activations", windows.len());
    for (i, window) in windows.iter().enumerate() {
        let observe = |layer: usize, q: &[f32], k: &[f32], v: &[f32]| {
            moments[layer].add(q, k, v).map_err(|e| EngineError::Input(format!("layer {layer}: {e}")))
        };
        model.capture(window, observe).with_context(|| format!("window {i}"))?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(Calibration {
        model,
        windows,
        shape,
        fingerprint: model.fingerprint()?,
        moments,
        importance: OnceCell::new(),
        out: OnceCell::new(),
        values: OnceCell::new(),
    })
}

/// Fits a plan. The first one with a proportional budget runs the model over the windows once more, for importances.
///
/// # Errors
/// For settings that the model cannot have, and gradients that are not finite, naming window and layer.
pub fn plan(calibration: &Calibration<'_>, config: &RecalkvConfig) -> Result<(Plan, Report)> {
    let c = calibration;
    config.check(&c.shape)?;
    let layers = |weight: fn(&Llama, usize) -> kvlar_candle::Result<Vec<f32>>| {
        (0..c.shape.layers).map(|l| Ok(weight(c.model, l)?)).collect::<Result<Vec<_>>>()
    };
    let importance = match config.budget {
        Budget::Proportional => Some(once(&c.importance, || importance(c.model, c.windows))?.as_slice()),
        _ => None,
    };
    let out = match config.weighting_values {
        Weighting::Output => Some(once(&c.out, || layers(Llama::out_weight))?.as_slice()),
        _ => None,
    };
    let values = match config.values {
        ValueFit::Closed => None,
        _ => Some(once(&c.values, || layers(Llama::value_weight))?.as_slice()),
    };
    let bar = progress("fitting", c.shape.layers);
    let fitted = kvlar_calibrate::fit(
        config,
        &c.shape,
        &c.fingerprint,
        &c.moments,
        importance,
        Weights { out, values },
        &mut |done, of| {
            bar.set_length(of as u64);
            bar.set_position(done as u64);
        },
    );
    bar.finish_and_clear();
    Ok(fitted?)
}

/// What the cell holds; `make` fills it the first time.
fn once<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(made) = cell.get() {
        return Ok(made);
    }
    let made = make()?;
    Ok(cell.get_or_init(|| made))
}

fn importance(model: &Llama, windows: &[Vec<u32>]) -> Result<Vec<[f64; 2]>> {
    let bar = progress("importances", windows.len());
    let mut fisher = Fisher::new();
    for (i, window) in windows.iter().enumerate() {
        fisher.add(model, window).with_context(|| format!("window {i}"))?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(fisher.importance()?)
}

fn progress(what: &'static str, steps: usize) -> ProgressBar {
    let bar = crate::eval::progress(steps);
    bar.set_message(format!("calibration: {what}"));
    bar
}

/// Where a plan or gates come from.
#[derive(Serialize)]
struct Origin<'a> {
    method: &'a str,
    fingerprint: &'a str,
    text: &'a Path,
    windows: usize,
    window: usize,
}

/// What is written beside them: settings and report are those of the method.
#[derive(Serialize)]
struct Summary<'a, C: Serialize, R: Serialize> {
    #[serde(flatten)]
    of: Origin<'a>,
    config: &'a C,
    report: &'a R,
}

pub fn run(a: &Arguments) -> Result<()> {
    let start = Instant::now();
    a.check()?;
    let (folder, text_path) = sources(a)?;
    let text = std::fs::read_to_string(&text_path).with_context(|| text_path.display().to_string())?;
    if text.trim().is_empty() {
        bail!("{}: the text is empty; give at least one window of it", text_path.display());
    }
    let model = Llama::load(folder)?;
    let shape = shape(&model);
    let window = a.window.unwrap_or(1024);
    let windows = || crate::eval::windows(&model, &text, window, a.windows).with_context(|| text_path.display().to_string());
    // Settings are checked before the long part.
    match a.method.as_str() {
        "fast-kvzip" => gates::run(a, &model, &text, &text_path)?,
        "pq" => {
            let config = a.pq(&shape.layer)?;
            config.check(&shape)?;
            let windows = windows()?;
            let (plan, report) = pq_plan(&model, &windows, &config)?;
            write(a, &plan, (&text_path, windows.len(), window), &config, &report)?;
        }
        _ => {
            let config = a.config(&shape.layer)?;
            config.check(&shape)?;
            let windows = windows()?;
            let (plan, report) = plan(&calibrate(&model, &windows)?, &config)?;
            write(a, &plan, (&text_path, windows.len(), window), &config, &report)?;
        }
    }
    println!("took {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Writes a plan and its report, and prints the report.
fn write<C: Serialize, R: Serialize + Display>(
    a: &Arguments,
    plan: &Plan,
    (text, windows, window): (&Path, usize, usize),
    config: &C,
    report: &R,
) -> Result<()> {
    plan.write(&a.out())?;
    let of = Origin { method: &plan.method, fingerprint: &plan.fingerprint, text, windows, window };
    write_report(a, of, config, report)
}

/// Writes the report of what was written, and prints it.
fn write_report<C: Serialize, R: Serialize + Display>(a: &Arguments, of: Origin<'_>, config: &C, report: &R) -> Result<()> {
    println!("{report}");
    let beside = report_path(&a.out());
    let text = serde_json::to_string_pretty(&Summary { of, config, report })? + "\n";
    write_whole(&beside, text.as_bytes()).with_context(|| beside.display().to_string())?;
    println!("\nwritten: {}, {}", a.out().display(), beside.display());
    Ok(())
}

/// Where the report of a plan goes: plans with names of their own have reports of their own.
fn report_path(plan: &Path) -> PathBuf {
    if plan.extension().is_some_and(|e| e == "safetensors") {
        return plan.with_extension("report.json");
    }
    let mut name = plan.as_os_str().to_owned();
    name.push(".report.json");
    name.into()
}

/// Writes beside the file and renames, so that it is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let written = std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, path));
    written.inspect_err(|_| {
        let _ = std::fs::remove_file(&part);
    })
}

/// The checkpoint's folder and the text: given, or bundled.
fn sources(a: &Arguments) -> Result<(PathBuf, PathBuf)> {
    Ok(match (&a.model, &a.text) {
        (Some(model), Some(text)) => (model.clone(), text.clone()),
        (Some(_), None) => bail!("--model needs --text: what to calibrate on, such as a few thousand lines that it would see"),
        (None, text) => {
            let assets = crate::assets::folder()?;
            let usual = if a.method == "fast-kvzip" { "gates.txt" } else { "calibration.txt" };
            let text = text.clone().unwrap_or_else(|| assets.join(usual));
            (assets.join("tiny-llama"), text)
        }
    })
}
