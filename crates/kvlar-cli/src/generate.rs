//! `kvlar generate`.

use crate::backend::Backend;
use crate::methods::{self, Room};
use anyhow::{Context, Result};
use kvlar_candle::llama::{Llama, Sampling};
use std::io::Write;
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Arguments {
    /// What to continue.
    prompt: String,
    /// Folder of a Hugging Face checkpoint; the bundled model by default.
    #[arg(long)]
    model: Option<PathBuf>,
    /// How the cache is kept; bf16 by default.
    #[arg(long, conflicts_with = "plan")]
    method: Option<String>,
    /// A plan file of `kvlar calibrate`: keep the cache as it says.
    #[arg(long)]
    plan: Option<PathBuf>,
    /// New tokens at most.
    #[arg(long, default_value_t = 100)]
    tokens: usize,
    /// Above 0: sample at this temperature. 0: the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Sample among the fewest tokens whose probability reaches this.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Of the sampling.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// What runs the cache; the best there is by default.
    #[arg(long)]
    backend: Option<Backend>,
}

pub fn run(a: &Arguments) -> Result<()> {
    let device = match a.backend {
        Some(b) => b.open()?,
        None => Backend::best().1,
    };
    let folder = match &a.model {
        Some(folder) => folder.clone(),
        None => crate::assets::folder()?.join("tiny-llama"),
    };
    let model = Llama::load(folder)?;
    let mut all = methods::uncalibrated();
    if let Some(path) = &a.plan {
        all.push(methods::from_file(path, &model.fingerprint()?)?);
    }
    let method = match &a.method {
        Some(name) => methods::find(&all, name)?,
        None if a.plan.is_some() => &all[all.len() - 1],
        None => &all[0],
    };
    let sampling = if a.temperature == 0.0 {
        Sampling::Greedy
    } else {
        Sampling::Random { temperature: a.temperature, top_p: a.top_p, seed: a.seed }
    };
    let room = Room { tokens: model.prompt(&a.prompt)?.len() + a.tokens, rollback: 0 };
    let mut store = (method.store)(&device, &model.kv_shape(), room)?;
    print!("{}", a.prompt);
    let flush = |piece: &str| {
        print!("{piece}");
        let _ = std::io::stdout().flush();
    };
    kvlar_candle::llama::generate(&model, &mut *store, &a.prompt, a.tokens, sampling, flush).context("generation stopped")?;
    println!();
    Ok(())
}
