//! Gates of Fast KVzip: scores of repetition, and the gates that are taught them.

use super::{Arguments, progress, shape};
use anyhow::{Context, Result, bail};
use kvlar_calibrate::gate::{GateMeasures, GateReport, GateSample, GateTraining, Gates, measure_gates, train_gates};
use kvlar_candle::EngineError;
use kvlar_candle::llama::{Llama, RepeatConfig};
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// Tokens of a context unless said otherwise, where the model has room for as many: an engine on the CPU takes its time.
const USUAL_CONTEXT: usize = 8192;

/// Options of this method alone.
#[derive(clap::Args)]
pub struct GateArguments {
    /// fast-kvzip: updates of each gate [default: 5000].
    #[arg(long)]
    steps: Option<usize>,
    /// fast-kvzip: tokens of an update [default: 1000].
    #[arg(long)]
    batch: Option<usize>,
    /// fast-kvzip: learning rate of SGD [default: 0.2].
    #[arg(long)]
    rate: Option<f64>,
    /// fast-kvzip: tokens that the model repeats at a time to score them [default: 2000].
    #[arg(long)]
    chunk: Option<usize>,
    /// fast-kvzip: a text to measure the gates on that they are not trained on, besides tokens held out.
    #[arg(long)]
    check: Option<PathBuf>,
}

impl GateArguments {
    /// An option that was given.
    pub fn given(&self) -> Option<&'static str> {
        let given = [
            ("--steps", self.steps.is_some()),
            ("--batch", self.batch.is_some()),
            ("--rate", self.rate.is_some()),
            ("--chunk", self.chunk.is_some()),
            ("--check", self.check.is_some()),
        ];
        given.into_iter().find(|(_, given)| *given).map(|(name, _)| name)
    }
}

/// Settings of the method.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Of the scores.
    pub repeat: RepeatConfig,
    /// Of the gates.
    pub training: GateTraining,
}

impl Config {
    fn of(a: &Arguments) -> Result<Self> {
        let (mut repeat, mut training) = (RepeatConfig::default(), GateTraining::default());
        repeat.chunk = a.gates.chunk.unwrap_or(repeat.chunk);
        training.steps = a.gates.steps.unwrap_or(training.steps);
        training.batch = a.gates.batch.unwrap_or(training.batch);
        training.rate = a.gates.rate.unwrap_or(training.rate);
        training.seed = a.seed.unwrap_or(training.seed);
        training.check()?;
        Ok(Self { repeat, training })
    }
}

/// What training achieved.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    trained: GateReport,
    /// On a text of its own.
    check: Option<GateMeasures>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.trained)?;
        match &self.check {
            Some(check) => write!(f, "\n\n{} tokens of another text:\n{check}", check.tokens),
            None => Ok(()),
        }
    }
}

/// Scores windows of tokens, each of which begins with the beginning-of-text token if the model has one: a sample a layer.
///
/// # Errors
/// For windows that the model cannot repeat, and activations that are not finite, naming window and layer.
pub fn samples(model: &Llama, windows: &[Vec<u32>], config: &RepeatConfig) -> Result<Vec<Option<GateSample>>> {
    let c = model.config();
    let sample = |_| GateSample::new(c.hidden, c.kv_heads, c.heads / c.kv_heads).map(Some);
    let mut samples = (0..c.layers).map(sample).collect::<kvlar_calibrate::Result<Vec<_>>>()?;
    let bar = progress("scores", windows.len());
    for (i, window) in windows.iter().enumerate() {
        let (prefix, context) = window.split_at(usize::from(c.bos.is_some()));
        let observe = |layer: usize, hidden: &[f32], scores: &[f32]| match &mut samples[layer] {
            Some(s) => s.add(hidden, scores).map_err(|e| EngineError::Input(format!("layer {layer}: {e}"))),
            None => Ok(()),
        };
        model.repeat_scores(prefix, context, config, observe).with_context(|| format!("window {i}"))?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(samples)
}

/// Trains gates for a model.
///
/// # Errors
/// For settings and samples that do not go together.
pub fn train(model: &Llama, samples: &[Option<GateSample>], config: &GateTraining) -> Result<(Gates, GateReport)> {
    let bar = progress("gates", model.config().layers * config.steps);
    let trained = train_gates(config, &model.fingerprint()?, samples, &|done, _| bar.set_position(done as u64));
    bar.finish_and_clear();
    Ok(trained?)
}

pub fn run(a: &Arguments, model: &Llama, text: &str, path: &Path) -> Result<()> {
    let config = Config::of(a)?;
    let prefix = usize::from(model.config().bos.is_some());
    let longest = prefix + model.longest_repeated(prefix, &config.repeat)?;
    let window = a.window.unwrap_or(longest.min(USUAL_CONTEXT));
    if window > longest {
        bail!("a window of {window} tokens: the model has room for {longest} and for repeating --chunk {}", config.repeat.chunk);
    }
    let cut = |text: &str, path: &Path| {
        crate::eval::windows(model, text, window, a.windows).with_context(|| path.display().to_string())
    };
    let windows = cut(text, path)?;
    let check = match &a.gates.check {
        Some(path) => Some(cut(&std::fs::read_to_string(path).with_context(|| path.display().to_string())?, path)?),
        None => None,
    };
    let (gates, trained) = train(model, &samples(model, &windows, &config.repeat)?, &config.training)?;
    gates.check_model(&model.fingerprint()?, &shape(model))?;
    let check = match check {
        Some(windows) => Some(measure_gates(&gates, &samples(model, &windows, &config.repeat)?)?),
        None => None,
    };
    gates.write(&a.out())?;
    let of = super::Origin { method: &a.method, fingerprint: gates.fingerprint(), text: path, windows: windows.len(), window };
    super::write_report(a, of, &config, &Report { trained, check })
}
