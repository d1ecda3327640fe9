//! `kvlar eval`, and the measuring that the demonstration shares.

use crate::backend;
use crate::methods::{self, Method, Room};
use crate::table::{LayerRow, RecallResult, Row, Table, Unsupported};
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use kvlar::{Backend, Device};
use kvlar_candle::EngineError;
use kvlar_candle::llama::{
    AttentionError, LayerError, Llama, Logits, RecallTask, attention_error, longest_question, perplexity, recall,
};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(clap::Args)]
pub struct Arguments {
    /// Folder of a Hugging Face checkpoint (config.json, tokenizer.json, safetensors).
    #[arg(long)]
    model: PathBuf,
    /// A text file for perplexity.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Recall tasks: lines of {"context", "questions": [{"question", "answer"}]}; may be given several times.
    #[arg(long)]
    recall: Vec<PathBuf>,
    /// A text to calibrate on, other than --text: adds the methods that need calibration.
    #[arg(long)]
    calibration: Option<PathBuf>,
    /// A plan file of `kvlar calibrate`: adds it as a method; may be given several times.
    #[arg(long)]
    plan: Vec<PathBuf>,
    /// A gate file of `kvlar calibrate --method fast-kvzip`: adds Fast KVzip, which lets go of tokens.
    #[arg(long)]
    gates: Option<PathBuf>,
    /// Methods, separated by commas; all of them by default.
    #[arg(long, value_delimiter = ',')]
    method: Vec<String>,
    /// What runs the cache; the best there is by default.
    #[arg(long)]
    backend: Option<backend::Backend>,
    /// Tokens of a perplexity window.
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// Windows of the text; all by default.
    #[arg(long)]
    windows: Option<usize>,
    /// Contexts of each recall task; all by default.
    #[arg(long)]
    contexts: Option<usize>,
    /// Where table.json and chart.svg go.
    #[arg(long, default_value = "kvlar-output")]
    output: PathBuf,
}

/// What is measured.
pub struct Work {
    /// Windows of tokens for perplexity.
    pub windows: Vec<Vec<u32>>,
    /// Recall tasks by name.
    pub tasks: Vec<(String, Vec<RecallTask>)>,
    /// Tokens decoded for the rate; 0 = not measured.
    pub decode_tokens: usize,
}

impl Work {
    /// Steps that the progress bar counts, a method.
    fn steps(&self) -> usize {
        2 * self.windows.len() + self.tasks.iter().map(|t| t.1.len()).sum::<usize>() + usize::from(self.decode_tokens > 0)
    }
}

/// Cuts a text into windows, each beginning with the beginning-of-text token.
pub fn windows(model: &Llama, text: &str, window: usize, most: usize) -> Result<Vec<Vec<u32>>> {
    let bos: Vec<u32> = model.config().bos.into_iter().collect();
    if window < bos.len() + 2 || window > model.config().max_positions {
        bail!("a window of {window} tokens: the model takes {} to {}", bos.len() + 2, model.config().max_positions);
    }
    let tokens = model.encode(text)?;
    let all = tokens.chunks_exact(window - bos.len()).take(most).map(|w| bos.iter().chain(w).copied().collect());
    let all: Vec<Vec<u32>> = all.collect();
    if all.is_empty() {
        bail!("the text has {} tokens, a window takes {window}", tokens.len());
    }
    Ok(all)
}

/// A bar of so many steps; its message says what is going on.
pub fn progress(steps: usize) -> ProgressBar {
    let bar = ProgressBar::new(steps as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:<34} {bar:30} {pos}/{len} {elapsed} (eta {eta})") {
        bar.set_style(style);
    }
    bar
}

/// Measures methods. One that the device has no kernel for is named with the reason, and left out of the rows.
pub fn measure(model: &Llama, device: &Device, methods: &[&Method], work: &Work) -> Result<(Vec<Row>, Vec<Unsupported>)> {
    let bar = progress(methods.len() * work.steps());
    let one = |method: &&Method| measure_one(model, device, method, work, &bar);
    // Most of a method on the CPU is the model, a token at a time: methods side by side use more cores than one does.
    let results: Vec<Result<Row>> = match device.backend() {
        Backend::Reference => methods.par_iter().map(one).collect(),
        _ => methods.iter().map(one).collect(),
    };
    let (mut rows, mut unsupported) = (Vec::new(), Vec::new());
    for (method, row) in methods.iter().zip(results) {
        // Rates alone are of one method at a time.
        match row.and_then(|row| Ok(Row { decode_rate: rate(model, device, method, work, &bar)?, ..row })) {
            Ok(row) => rows.push(row),
            Err(e) if e.downcast_ref().is_some_and(EngineError::is_unsupported) => {
                let (method, about) = (method.name.clone(), method.about.clone());
                unsupported.push(Unsupported { method, about, why: format!("{e:#}") });
            }
            Err(e) => return Err(e.context(method.name.clone())),
        }
    }
    bar.finish_and_clear();
    Ok((rows, unsupported))
}

/// Tokens that a method's store must have room for.
fn room(model: &Llama, work: &Work) -> usize {
    model.config().max_positions.max(work.windows.iter().map(Vec::len).max().unwrap_or(0))
}

fn rate(model: &Llama, device: &Device, method: &Method, work: &Work, bar: &ProgressBar) -> Result<Option<f64>> {
    if work.decode_tokens == 0 {
        return Ok(None);
    }
    bar.set_message(format!("{}: decode rate", method.name));
    let room = Room { tokens: room(model, work), rollback: 0 };
    let rate = decode_rate(model, &mut *(method.store)(device, &model.kv_shape(), room)?, work)?;
    bar.inc(1);
    Ok(Some(rate))
}

/// All but the decode rate.
fn measure_one(model: &Llama, device: &Device, method: &Method, work: &Work, bar: &ProgressBar) -> Result<Row> {
    let shape = model.kv_shape();
    let tokens = room(model, work);
    let full = 2.0 * (shape.layers * shape.kv_heads * 2 * shape.head_dim) as f64;
    let store = |rollback: usize| (method.store)(device, &shape, Room { tokens, rollback });
    let mut bytes_per_token = 0.0;
    let (mut nll, mut count) = (0.0, 0);
    bar.set_message(format!("{}: perplexity", method.name));
    for w in &work.windows {
        let mut s = store(0)?;
        let (sum, n) = perplexity(model, &mut *s, w)?;
        (nll, count) = (nll + sum, count + n);
        bytes_per_token = s.bytes() as f64 / s.len() as f64;
        bar.inc(1);
    }
    let mut results = Vec::new();
    for (name, tasks) in &work.tasks {
        bar.set_message(format!("{}: {name}", method.name));
        let mut result = RecallResult { task: name.clone(), questions: 0, recalled: 0 };
        for task in tasks {
            let mut s = store(longest_question(model, task)?)?;
            let r = recall(model, &mut *s, task, method.protocol)?;
            result.questions += r.questions;
            result.recalled += r.recalled;
            bytes_per_token = r.bytes_per_token;
            bar.inc(1);
        }
        results.push(result);
    }
    bar.set_message(format!("{}: attention error", method.name));
    let (mut squares, mut errors) = (0.0, AttentionError::default());
    for w in &work.windows {
        let mut exact = (methods::full().store)(device, &shape, Room { tokens, rollback: 0 })?;
        let error = attention_error(model, &mut *exact, &mut *store(0)?, w)?;
        squares += error.relative().powi(2);
        errors.add(&error);
        bar.inc(1);
    }
    let windows = work.windows.len();
    Ok(Row {
        method: method.name.clone(),
        about: method.about.clone(),
        protocol: method.protocol,
        bytes_per_token,
        kept: bytes_per_token / full,
        perplexity: (count > 0).then(|| (nll / count as f64).exp()),
        recall: results,
        attention_error: (windows > 0).then(|| (squares / windows as f64).sqrt()),
        logit_noise: errors.largest_noise(),
        layers: layers(&errors),
        decode_rate: None,
    })
}

fn layers(errors: &AttentionError) -> Vec<LayerRow> {
    let row = |(layer, l): (usize, &LayerError)| LayerRow { layer, attention_error: l.attention(), logit_noise: l.logit_noise() };
    errors.layers.iter().enumerate().map(row).collect()
}

/// Tokens a second, one at a time, after the first window's first half.
fn decode_rate(model: &Llama, store: &mut dyn kvlar_candle::KvStore, work: &Work) -> Result<f64> {
    let tokens = work.windows.first().context("a decode rate needs a text")?;
    let (context, rest) = tokens.split_at(tokens.len() / 2);
    model.prefill(store, context, Logits::Last)?;
    let rest = &rest[..work.decode_tokens.min(rest.len())];
    let start = Instant::now();
    for t in rest {
        model.extend(store, &[*t], Logits::Last)?;
    }
    Ok(rest.len() as f64 / start.elapsed().as_secs_f64())
}

/// Prints, and writes table.json and chart.svg.
pub fn report(table: &Table, output: &Path) -> Result<()> {
    table.print();
    std::fs::create_dir_all(output).with_context(|| output.display().to_string())?;
    table.write_json(&output.join("table.json"))?;
    crate::chart::draw(table, &output.join("chart.svg"))?;
    println!("\nwritten: {}, {}", output.join("table.json").display(), output.join("chart.svg").display());
    Ok(())
}

/// What the table calls a device.
pub fn describe(device: &Device) -> String {
    format!("{:?} ({})", device.backend(), device.info().name).to_lowercase()
}

pub fn read_tasks(path: &Path, most: usize) -> Result<(String, Vec<RecallTask>)> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let tasks = RecallTask::parse(&text).with_context(|| path.display().to_string())?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    Ok((name, tasks.into_iter().take(most).collect()))
}

pub fn run(a: &Arguments) -> Result<()> {
    if a.text.is_none() && a.recall.is_empty() {
        bail!("nothing to measure: give --text, --recall, or both");
    }
    let device = match a.backend {
        Some(b) => b.open()?,
        None => backend::Backend::best().1,
    };
    let model = Llama::load(&a.model)?;
    let mut work = Work { windows: Vec::new(), tasks: Vec::new(), decode_tokens: 0 };
    if let Some(path) = &a.text {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        work.windows = windows(&model, &text, a.window, a.windows.unwrap_or(usize::MAX))?;
        work.decode_tokens = 32;
    }
    for path in &a.recall {
        work.tasks.push(read_tasks(path, a.contexts.unwrap_or(usize::MAX))?);
    }
    let mut all = methods::uncalibrated();
    all.extend(methods::evicting_by_attention());
    // Not every context leaves room for its repetition: where it is asked for.
    all.extend(a.method.iter().any(|m| m == "kvzip-30").then(methods::repeated));
    if let Some(path) = &a.gates {
        all.extend(methods::gated(&methods::read_gates(path, &model)?, None));
    }
    for path in &a.plan {
        all.push(methods::from_file(path, &model.fingerprint()?)?);
    }
    // Before the long part, too.
    methods::check_names(&all)?;
    if let Some(path) = &a.calibration {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let windows = windows(&model, &text, a.window, usize::MAX).with_context(|| path.display().to_string())?;
        all.extend(methods::calibrated(&crate::calibrate::calibrate(&model, &windows)?)?);
    }
    methods::check_names(&all)?;
    let chosen: Vec<&Method> = if a.method.is_empty() {
        all.iter().collect()
    } else {
        a.method.iter().map(|n| methods::find(&all, n)).collect::<Result<_>>()?
    };
    let (rows, unsupported) = measure(&model, &device, &chosen, &work)?;
    let name = a.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
    report(&Table { model: name, backend: describe(&device), rows, unsupported }, &a.output)
}
