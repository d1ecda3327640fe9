//! Entries of `kernels/ledger/gpu.json`: which kernels, compiled how, were run on which GPU, and how that went.

use clap::Parser;
use kvlar_bench::{append, collect, pretty, support_table};
use kvlar_kernels::{GPU_LEDGER, MODULES};
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(about = "Entries of the ledger of GPU runs, and what it says")]
enum Command {
    /// Print a results file: an entry under `runs`, the rest beside it. It speaks of the kernels that are embedded in this
    /// very program, so build it with what was tested.
    Entry(Entry),
    /// Add the results of benches to a results file; those of an op replace the ones it has of that op.
    Collect { results: PathBuf, files: Vec<PathBuf> },
    /// Add a results file's runs to the ledger; runs with failures are refused, and those that are not whole.
    Append { results: PathBuf, ledger: PathBuf },
    /// Print the table of README.md: what runs on which GPU.
    Table,
}

#[derive(clap::Args, Debug)]
struct Entry {
    /// Tests of the suite that passed.
    #[arg(long)]
    passed: u64,
    /// Tests of the suite that failed.
    #[arg(long)]
    failed: u64,
    /// Its name; asked of GPU 0 if it is not given, as are its driver and its compute capability.
    // An empty value is one that a script could not find out.
    #[arg(long)]
    gpu: Option<String>,
    #[arg(long)]
    driver: Option<String>,
    /// Such as 9.0.
    #[arg(long)]
    compute_capability: Option<String>,
    /// Of the run; today.
    #[arg(long)]
    date: Option<String>,
    /// What a sanitizer found.
    #[arg(long, value_name = "TOOL=RESULT", value_parser = tool_and_result)]
    sanitizer: Vec<(String, String)>,
    #[arg(long, value_name = "NAME")]
    failed_test: Vec<String>,
    /// There is more to come: such a file is not appended to the ledger.
    #[arg(long)]
    incomplete: bool,
}

fn tool_and_result(text: &str) -> Result<(String, String), String> {
    let (tool, result) = text.split_once('=').ok_or("not TOOL=RESULT")?;
    Ok((tool.into(), result.into()))
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Entry(options) => entry(options).map(|json| print!("{}", pretty(&json))),
        Command::Collect { results, files } => collect(&results, &files),
        Command::Append { results, ledger } => append(&results, &ledger),
        Command::Table => table().map(|text| print!("{text}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ledger_entry: {e}");
            ExitCode::from(2)
        }
    }
}

fn entry(o: Entry) -> Result<Value, String> {
    let Some(first) = MODULES.first() else { return Err("this build has no kernels: build it with --features cuda".into()) };
    let given = |text: Option<String>| text.filter(|t| !t.is_empty());
    let (gpu, driver, capability) = match (given(o.gpu), given(o.driver), given(o.compute_capability)) {
        (Some(gpu), Some(driver), Some(capability)) => (gpu, driver, capability),
        (gpu, driver, capability) => {
            let device = kvlar::Device::cuda(0).map_err(|e| e.to_string())?;
            let (info, driver) = (device.info(), driver.or_else(kvlar_bench::driver_version).unwrap_or_default());
            let (major, minor) = info.compute_capability.unwrap_or_default();
            (gpu.unwrap_or_else(|| info.name.clone()), driver, capability.unwrap_or(format!("{major}.{minor}")))
        }
    };
    let modules: Map<String, Value> = MODULES.iter().map(|m| (m.name.into(), m.source_hash.into())).collect();
    let mut results = json!({
        "runs": [{
            "gpu": gpu,
            "compute_capability": capability,
            "driver": driver,
            "date": o.date.unwrap_or_else(kvlar_bench::today),
            "compiler": first.compiler,
            "modules": modules,
            "suite": { "passed": o.passed, "failed": o.failed },
        }],
        "complete": !o.incomplete,
    });
    if !o.failed_test.is_empty() {
        results["failed_tests"] = json!(o.failed_test);
    }
    if !o.sanitizer.is_empty() {
        results["sanitizer"] = o.sanitizer.into_iter().map(|(tool, result)| (tool, Value::from(result))).collect();
    }
    Ok(results)
}

fn table() -> Result<String, String> {
    let ledger = serde_json::from_str(GPU_LEDGER).map_err(|e| format!("the embedded gpu.json: {e}"))?;
    support_table(&ledger)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_and_refused() {
        let parsed = |options: &[&str]| Command::try_parse_from(["ledger_entry", "entry"].iter().chain(options));
        let counts = ["--passed", "3", "--failed", "0"];
        let Ok(Command::Entry(o)) = parsed(&[&counts[..], &["--gpu", "", "--sanitizer", "memcheck=clean"]].concat()) else {
            panic!("an entry")
        };
        assert_eq!((o.passed, o.failed, o.gpu.as_deref(), o.incomplete), (3, 0, Some(""), false));
        assert_eq!(o.sanitizer, [("memcheck".to_string(), "clean".to_string())]);
        for bad in [&["--passed"][..], &["--unknown", "1"], &["--sanitizer", "x"], &["--failed", "1"]] {
            assert!(parsed(&[&counts[..], bad].concat()).is_err(), "{bad:?}");
        }
        assert!(parsed(&[]).is_err() && parsed(&["--passed", "x", "--failed", "0"]).is_err());
    }

    /// Run `cargo run -p kvlar-bench --bin ledger_entry -- table` and put what it prints into README.md.
    #[test]
    fn the_readme_has_the_table_of_the_ledger() {
        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("README.md");
        let table = table().expect("a table");
        assert!(readme.contains(&table), "README.md lacks this table, which `ledger_entry table` prints:\n{table}");
    }
}
