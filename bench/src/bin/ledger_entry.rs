//! Entries of `kernels/ledger/gpu.json`: which kernels, compiled how, were run on which GPU, and how that went.
//!
//! * `ledger_entry entry --passed N --failed N [--gpu NAME] [--driver VERSION] [--date DATE] [--sanitizer TOOL=RESULT]…
//!   [--failed-test NAME]…` prints a results file: the entry under `runs`, the rest beside it. It speaks of the kernels
//!   that are embedded in this very program, so build it with what was tested.
//! * `ledger_entry collect RESULTS FILE…` adds the results of benches to a results file; those of an op replace the ones it
//!   has of that op.
//! * `ledger_entry append RESULTS LEDGER` adds a results file's runs to the ledger; runs with failures are refused.

use kvlar_kernels::MODULES;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "usage: ledger_entry entry --passed N --failed N [--gpu NAME] [--driver VERSION] [--date DATE]
                          [--sanitizer TOOL=RESULT]... [--failed-test NAME]...
       ledger_entry collect RESULTS FILE...
       ledger_entry append RESULTS LEDGER";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["entry", options @ ..] => entry(options).map(|json| println!("{}", pretty(&json))),
        ["collect", results, files @ ..] => collect(results.as_ref(), files),
        ["append", results, ledger] => append(results.as_ref(), ledger.as_ref()),
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ledger_entry: {e}");
            ExitCode::from(2)
        }
    }
}

/// What was said on the command line.
#[derive(Debug, Default)]
struct Options {
    passed: Option<u64>,
    failed: Option<u64>,
    gpu: Option<String>,
    driver: Option<String>,
    date: Option<String>,
    sanitizer: Map<String, Value>,
    failed_tests: Vec<String>,
}

impl Options {
    fn parse(options: &[&str]) -> Result<Self, String> {
        let mut all = Self::default();
        for pair in options.chunks(2) {
            let [name, value] = pair else { return Err(format!("{} needs a value\n{USAGE}", pair[0])) };
            let count = || value.parse::<u64>().map(Some).map_err(|_| format!("{name}: {value:?} is not a count"));
            // An empty value is one that a script could not find out.
            let text = || Some(value.to_string()).filter(|v| !v.is_empty());
            match *name {
                "--passed" => all.passed = count()?,
                "--failed" => all.failed = count()?,
                "--gpu" => all.gpu = text(),
                "--driver" => all.driver = text(),
                "--date" => all.date = text(),
                "--failed-test" => all.failed_tests.push(value.to_string()),
                "--sanitizer" => {
                    let (tool, result) = value.split_once('=').ok_or(format!("{name}: {value:?} is not TOOL=RESULT"))?;
                    all.sanitizer.insert(tool.into(), result.into());
                }
                _ => return Err(format!("{name} is unknown\n{USAGE}")),
            }
        }
        Ok(all)
    }
}

fn entry(options: &[&str]) -> Result<Value, String> {
    let o = Options::parse(options)?;
    let (Some(passed), Some(failed)) = (o.passed, o.failed) else { return Err(format!("counts are missing\n{USAGE}")) };
    let Some(first) = MODULES.first() else { return Err("this build has no kernels: build it with --features cuda".into()) };
    let (gpu, driver) = match (o.gpu, o.driver) {
        (Some(gpu), Some(driver)) => (gpu, driver),
        (gpu, driver) => {
            let device = kvlar::Device::cuda(0).map_err(|e| e.to_string())?;
            let driver = driver.or_else(kvlar_bench::driver_version).unwrap_or_default();
            (gpu.unwrap_or_else(|| device.info().name.clone()), driver)
        }
    };
    let modules: Map<String, Value> = MODULES.iter().map(|m| (m.name.into(), m.source_hash.into())).collect();
    let mut results = json!({
        "runs": [{
            "gpu": gpu,
            "driver": driver,
            "date": o.date.unwrap_or_else(kvlar_bench::today),
            "compiler": first.compiler,
            "modules": modules,
            "suite": { "passed": passed, "failed": failed },
        }],
    });
    if !o.failed_tests.is_empty() {
        results["failed_tests"] = json!(o.failed_tests);
    }
    if !o.sanitizer.is_empty() {
        results["sanitizer"] = Value::Object(o.sanitizer);
    }
    Ok(results)
}

fn collect(results: &Path, files: &[&str]) -> Result<(), String> {
    let mut json = if results.exists() { read(results)? } else { json!({ "runs": [] }) };
    let new = files.iter().map(|file| read(file.as_ref())).collect::<Result<Vec<_>, _>>()?;
    let known = json["benches"].as_array().cloned().unwrap_or_default();
    json["benches"] = Value::Array(collected(known, new));
    write(results, &json)
}

fn collected(known: Vec<Value>, new: Vec<Value>) -> Vec<Value> {
    let kept = known.into_iter().filter(|k| new.iter().all(|n| n["op"] != k["op"])).collect::<Vec<_>>();
    kept.into_iter().chain(new).collect()
}

fn append(results: &Path, ledger: &Path) -> Result<(), String> {
    let (from, mut to) = (read(results)?, read(ledger)?);
    let runs = from["runs"].as_array().filter(|r| !r.is_empty()).ok_or(format!("{}: no runs", results.display()))?;
    let known = to["runs"].as_array_mut().ok_or(format!("{}: no list of runs", ledger.display()))?;
    for run in runs {
        check(run)?;
        if known.contains(run) {
            return Err(format!("{}: this run is there already", ledger.display()));
        }
        known.push(run.clone());
    }
    write(ledger, &to)
}

/// The ledger holds what passed.
fn check(run: &Value) -> Result<(), String> {
    let text = |key: &str| run[key].as_str().is_some_and(|s| !s.is_empty());
    if let Some(missing) = ["gpu", "driver", "date", "compiler"].into_iter().find(|&key| !text(key)) {
        return Err(format!("a run without {missing}"));
    }
    if run["modules"].as_object().is_none_or(Map::is_empty) {
        return Err("a run without modules".into());
    }
    match (run["suite"]["passed"].as_u64(), run["suite"]["failed"].as_u64()) {
        (Some(1..), Some(0)) => Ok(()),
        (passed, failed) => Err(format!(
            "{} tests passed and {} failed: only a run in which all pass is recorded",
            passed.unwrap_or(0),
            failed.map_or("?".into(), |n| n.to_string())
        )),
    }
}

fn read(path: &Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
}

fn write(path: &Path, json: &Value) -> Result<(), String> {
    std::fs::write(path, pretty(json)).map_err(|e| format!("{}: {e}", path.display()))
}

fn pretty(json: &Value) -> String {
    serde_json::to_string_pretty(json).expect("JSON") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(passed: u64, failed: u64) -> Value {
        let (gpu, modules) = ("a GPU", json!({ "merge_merge": "0123" }));
        let suite = json!({ "passed": passed, "failed": failed });
        json!({ "gpu": gpu, "driver": "1.2", "date": "2026-01-31", "compiler": "nvcc", "modules": modules, "suite": suite })
    }

    #[test]
    fn only_runs_in_which_all_passed_are_recorded() {
        assert_eq!(check(&run(3, 0)), Ok(()));
        assert!(check(&run(0, 0)).is_err() && check(&run(3, 1)).is_err() && check(&json!({})).is_err());
    }

    #[test]
    fn an_op_is_collected_once() {
        let bench = |op: &str, n: u32| json!({ "op": op, "n": n });
        let known = vec![bench("attend", 1), bench("peers", 1)];
        let all = collected(known, vec![bench("peers", 2), bench("merge", 2)]);
        assert_eq!(all, [bench("attend", 1), bench("peers", 2), bench("merge", 2)]);
    }

    #[test]
    fn options_are_read_and_refused() {
        let o =
            Options::parse(&["--passed", "3", "--failed", "0", "--gpu", "", "--sanitizer", "memcheck=clean"]).expect("options");
        assert_eq!((o.passed, o.failed, o.gpu), (Some(3), Some(0), None));
        assert_eq!(o.sanitizer["memcheck"], "clean");
        for bad in [&["--passed"][..], &["--passed", "x"], &["--unknown", "1"], &["--sanitizer", "x"]] {
            assert!(Options::parse(bad).is_err(), "{bad:?}");
        }
    }
}
