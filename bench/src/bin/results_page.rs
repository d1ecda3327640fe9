//! Draws results of benches: `results_page [--out FOLDER] [FILE…]`.

use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Writes README.md and a figure an op, from results of the benches on a GPU")]
struct Arguments {
    /// Where to.
    #[arg(long, default_value = "bench/results")]
    out: PathBuf,
    /// Results: results.json of a GPU bundle, or OP.json; without any, all JSON files of the folder.
    files: Vec<PathBuf>,
}

fn main() -> ExitCode {
    let Arguments { out, mut files } = Arguments::parse();
    if files.is_empty() {
        let entries = std::fs::read_dir(&out).into_iter().flatten().flatten().map(|entry| entry.path());
        files.extend(entries.filter(|path| path.extension().is_some_and(|e| e == "json")));
        files.sort();
    }
    match kvlar_bench::results_page(&files, &out) {
        Ok(ops) => {
            let drawn = if ops.is_empty() { "nothing: there are no times of a GPU".into() } else { ops.join(", ") };
            println!("drawn: {drawn}\nwritten: {}", out.join("README.md").display());
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("results_page: {e}");
            ExitCode::from(2)
        }
    }
}
