//! Results files, and what of them enters the ledger of GPU runs.

use crate::{read_json, write_json};
use kvlar_kernels::simt::DRIVER_DEVICE;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

/// Adds the results of benches to a results file; those of an op replace the ones it has of that op.
///
/// # Errors
/// If a file cannot be read, is no results, or cannot be written.
pub fn collect(results: &Path, files: &[PathBuf]) -> Result<(), String> {
    let mut json = if results.exists() { read_json(results)? } else { json!({ "runs": [] }) };
    if !json.is_object() {
        return Err(format!("{}: no results file", results.display()));
    }
    let mut new = Vec::new();
    for file in files {
        let of = read_json(file)?;
        if !of["op"].is_string() {
            return Err(format!("{}: no results of an op", file.display()));
        }
        new.push(of);
    }
    let known = json["benches"].as_array().cloned().unwrap_or_default();
    json["benches"] = Value::Array(collected(known, new));
    write_json(results, &json)
}

fn collected(known: Vec<Value>, new: Vec<Value>) -> Vec<Value> {
    let kept = known.into_iter().filter(|k| new.iter().all(|n| n["op"] != k["op"])).collect::<Vec<_>>();
    kept.into_iter().chain(new).collect()
}

/// Adds a results file's runs to the ledger, which holds what passed.
///
/// # Errors
/// As [`collect`]; and if a run has failures, lacks something, or is there already.
pub fn append(results: &Path, ledger: &Path) -> Result<(), String> {
    let (from, mut to) = (read_json(results)?, read_json(ledger)?);
    let runs = from["runs"].as_array().filter(|r| !r.is_empty()).ok_or(format!("{}: no runs", results.display()))?;
    if from["complete"] == false {
        return Err(format!("{}: the run was cut off, and not all of the suite is in it", results.display()));
    }
    let known = to["runs"].as_array_mut().ok_or(format!("{}: no list of runs", ledger.display()))?;
    for run in runs {
        check(run).map_err(|e| format!("{}: {e}", results.display()))?;
        if known.contains(run) {
            return Err(format!("{}: this run is there already", ledger.display()));
        }
        known.push(run.clone());
    }
    write_json(ledger, &to)
}

fn check(run: &Value) -> Result<(), String> {
    let text = |key: &str| run[key].as_str().is_some_and(|s| !s.is_empty());
    let needed = ["gpu", "compute_capability", "driver", "date", "compiler"];
    if let Some(missing) = needed.into_iter().find(|&key| !text(key)) {
        return Err(format!("a run without {missing}"));
    }
    if run["gpu"] == DRIVER_DEVICE {
        return Err("a run without a GPU: its driver was emulated".into());
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

#[cfg(test)]
mod tests {
    use super::*;

    fn run(passed: u64, failed: u64) -> Value {
        json!({
            "gpu": "a GPU", "compute_capability": "9.0", "driver": "1.2", "date": "2026-01-31", "compiler": "nvcc",
            "modules": { "merge_merge": "0123" }, "suite": { "passed": passed, "failed": failed },
        })
    }

    #[test]
    fn only_runs_in_which_all_passed_are_recorded() {
        assert_eq!(check(&run(3, 0)), Ok(()));
        let mut emulated = run(3, 0);
        emulated["gpu"] = json!(DRIVER_DEVICE);
        assert!(check(&emulated).expect_err("no GPU").contains("emulated"));
        assert!(check(&run(0, 0)).is_err() && check(&run(3, 1)).is_err() && check(&json!({})).is_err());
        let folder = tempfile::tempdir().expect("a folder");
        let [results, ledger] = ["results.json", "ledger.json"].map(|name| folder.path().join(name));
        write_json(&ledger, &json!({ "runs": [] })).expect("written");
        write_json(&results, &json!({ "runs": [run(3, 0)], "complete": false })).expect("written");
        assert!(append(&results, &ledger).expect_err("a part").contains("cut off"));
        write_json(&results, &json!({ "runs": [run(3, 0)], "complete": true, "benches": [] })).expect("written");
        append(&results, &ledger).expect("recorded");
        assert!(append(&results, &ledger).expect_err("twice").contains("there already"));
        assert_eq!(read_json(&ledger), Ok(json!({ "runs": [run(3, 0)] })));
    }

    #[test]
    fn an_op_is_collected_once() {
        let bench = |op: &str, n: u32| json!({ "op": op, "n": n });
        let known = vec![bench("attend", 1), bench("peers", 1)];
        let all = collected(known, vec![bench("peers", 2), bench("merge", 2)]);
        assert_eq!(all, [bench("attend", 1), bench("peers", 2), bench("merge", 2)]);
    }

    #[test]
    fn what_is_no_result_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let [results, op] = ["results.json", "merge.json"].map(|name| folder.path().join(name));
        write_json(&op, &json!({ "name": "merge" })).expect("written");
        assert!(collect(&results, std::slice::from_ref(&op)).expect_err("no op").contains("merge.json"));
        write_json(&op, &json!({ "op": "merge" })).expect("written");
        collect(&results, std::slice::from_ref(&op)).expect("collected");
        assert_eq!(read_json(&results), Ok(json!({ "runs": [], "benches": [{ "op": "merge" }] })));
        write_json(&results, &json!([])).expect("written");
        assert!(collect(&results, &[op]).expect_err("a list").contains("results.json"));
    }
}
