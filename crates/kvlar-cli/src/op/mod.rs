//! `kvlar op`: one op on tensors from a file, as `OPS.md` defines it.
//!
//! Exit status: 0 done; 2 the input is wrong (the message names what); 3 the backend has no kernel for it
//! (`unsupported`); 1 anything else. The output file is written whole or not at all.

mod append;
mod attend;
mod attend_lowrank;
mod attend_quantized;
mod attention;
mod budget;
mod case;
mod codebooks;
mod compact;
mod encode;
mod fit;
mod formats;
mod lab;
mod merge;
mod project;
mod reduce;
mod scan;
mod score;
mod select;

use crate::backend::Backend;
use case::{Case, Output};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub struct Arguments {
    /// The op: attend, attend_lowrank, attend_quantized, append, encode, decode, merge, project, scan, reduce, topk, topp,
    /// threshold, score_window, score_column, score_gate, score_keys, score_repeat, budget_layers, budget_heads, compact,
    /// group_heads, fit_lowrank, fit_values, fit_codebooks, budget_ranks.
    name: String,
    /// What executes it.
    #[arg(long, value_enum, default_value = "reference")]
    backend: Backend,
    /// Input tensors; scalars are strings in the file's metadata.
    #[arg(long = "in")]
    input: PathBuf,
    /// Where the outputs go.
    #[arg(long)]
    out: PathBuf,
    /// A scalar, key=value; wins over the file's.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

/// Why an op did not run.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// The input is wrong.
    #[error("{0}")]
    Input(String),
    /// The backend has no kernel for it.
    #[error("unsupported: {0}")]
    Unsupported(String),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl From<kvlar::Error> for OpError {
    fn from(e: kvlar::Error) -> Self {
        match e {
            kvlar::Error::Unsupported { .. } => Self::Unsupported(e.to_string()),
            kvlar::Error::Invalid { .. } => Self::Input(e.to_string()),
            _ => Self::Other(e.to_string()),
        }
    }
}

impl From<kvlar_reference::ReferenceError> for OpError {
    fn from(e: kvlar_reference::ReferenceError) -> Self {
        Self::Input(e.to_string())
    }
}

pub type Result<T> = std::result::Result<T, OpError>;

pub fn input<T>(text: impl Into<String>) -> Result<T> {
    Err(OpError::Input(text.into()))
}

fn execute(a: &Arguments) -> Result<()> {
    let op: fn(&mut Case, Backend) -> Result<Output> = match a.name.as_str() {
        "attend" => attend::run,
        "attend_lowrank" => attend_lowrank::run,
        "attend_quantized" => attend_quantized::run,
        "append" => append::run,
        "encode" | "decode" => encode::run,
        "merge" => merge::run,
        "project" => project::run,
        "scan" => scan::run,
        "reduce" => reduce::run,
        "topk" => select::topk,
        "topp" => select::topp,
        "threshold" => select::threshold,
        "budget_layers" => budget::budget_layers,
        "budget_heads" => budget::budget_heads,
        "compact" => compact::run,
        "score_window" => score::window,
        "score_column" => score::column,
        "score_gate" => score::gate,
        "score_keys" => score::keys,
        "score_repeat" => score::repeat,
        "group_heads" => fit::group_heads,
        "fit_lowrank" => fit::fit_lowrank,
        "fit_values" => fit::fit_values,
        "fit_codebooks" => codebooks::fit_codebooks,
        "budget_ranks" => fit::budget_ranks,
        other => return input(format!("no op {other:?} (see `kvlar op --help`)")),
    };
    let mut case = Case::read(&a.input, &a.set)?;
    let output = op(&mut case, a.backend)?;
    output.write(&a.out)
}

pub fn run(a: &Arguments) -> ExitCode {
    let status = match execute(a) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kvlar op {}: {e}", a.name);
            match e {
                OpError::Input(_) => 2,
                OpError::Unsupported(_) => 3,
                OpError::Other(_) => 1,
            }
        }
    };
    ExitCode::from(status)
}
