//! `kvlar`: every method on the bundled model, one table, one chart.

use crate::backend::Backend;
use crate::eval::{Work, describe, measure, read_tasks, report, windows};
use crate::methods::{self, Method};
use crate::table::Table;
use anyhow::{Context, Result};
use kvlar_candle::llama::Llama;
use std::path::PathBuf;
use std::time::Instant;

#[derive(clap::Args)]
pub struct Arguments {
    /// What runs the cache; the best there is by default.
    #[arg(long)]
    backend: Option<Backend>,
    /// Where table.json and chart.svg go.
    #[arg(long, default_value = "kvlar-output")]
    output: PathBuf,
}

impl Default for Arguments {
    fn default() -> Self {
        Self { backend: None, output: "kvlar-output".into() }
    }
}

/// Windows of 1,024 tokens, and contexts of each recall task: enough to see a difference, and short.
const WINDOWS: usize = 1;
const CONTEXTS: usize = 4;
const CALIBRATION_WINDOWS: usize = 16;

pub fn run(a: &Arguments) -> Result<()> {
    let start = Instant::now();
    let assets = crate::assets::folder()?;
    let device = match a.backend {
        Some(b) => b.open()?,
        None => Backend::best().1,
    };
    let model = Llama::load(assets.join("tiny-llama"))?;
    let path = assets.join("text.txt");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut work = Work { windows: windows(&model, &text, 1024, WINDOWS)?, tasks: Vec::new(), decode_tokens: 24 };
    for name in ["needle-500.jsonl", "needle-1000.jsonl", "recall-60.jsonl"] {
        work.tasks.push(read_tasks(&assets.join(name), CONTEXTS)?);
    }
    println!("bundled model tiny-llama (6 layers, 8 query heads, 4 kv heads, head dimension 64); cache on {}", describe(&device));
    let mut all = methods::uncalibrated();
    let path = assets.join("calibration.txt");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let calibration = windows(&model, &text, 1024, CALIBRATION_WINDOWS)?;
    let calibration = crate::calibrate::calibrate(&model, &calibration)?;
    all.extend(methods::calibrated(&calibration)?);
    all.extend(methods::evicting_by_attention());
    all.push(methods::repeated());
    let gates = methods::read_gates(&assets.join("tiny-llama-gates.safetensors"), &model)?;
    all.extend(methods::gated(&gates, Some(methods::latents(&calibration)?)));
    for m in &all {
        println!("  {:<18} {}", m.name, m.about);
    }
    println!();
    let (rows, unsupported) = measure(&model, &device, &all.iter().collect::<Vec<&Method>>(), &work)?;
    let table = Table { model: "tiny-llama".into(), backend: describe(&device), rows, unsupported };
    report(&table, &a.output)?;
    println!("took {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
