//! The kvlar program. Without arguments: the demonstration on the bundled model.

mod assets;
mod backend;
mod calibrate;
mod chart;
mod demo;
mod eval;
mod generate;
mod info;
mod methods;
mod op;
mod table;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "kvlar", version, about = "Compressed KV caches: demonstration, evaluation, generation, single ops")]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Compare every method on the bundled model (the default).
    Demo(demo::Arguments),
    /// Compare methods on a checkpoint and texts of your own.
    Eval(eval::Arguments),
    /// Fit a method to a model and a text: writes a plan file.
    Calibrate(Box<calibrate::Arguments>),
    /// Continue a prompt.
    Generate(generate::Arguments),
    /// Run one op on tensors from a safetensors file.
    Op(op::Arguments),
    /// Device, architectures, entry points, ledger.
    Info(info::Arguments),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command.unwrap_or(Command::Demo(demo::Arguments::default())) {
        Command::Demo(a) => demo::run(&a),
        Command::Eval(a) => eval::run(&a),
        Command::Calibrate(a) => calibrate::run(&a),
        Command::Generate(a) => generate::run(&a),
        Command::Op(a) => return op::run(&a),
        Command::Info(a) => info::run(&a),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kvlar: {e:#}");
            ExitCode::FAILURE
        }
    }
}
