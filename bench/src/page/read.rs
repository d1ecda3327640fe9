//! Results files, as the benches and the peers write them.

use crate::read_json;
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Of one op, or of the peers.
#[derive(Clone, Debug, Deserialize)]
pub struct OpFile {
    pub op: String,
    /// `None` where nothing ran on a GPU.
    pub gpu: Option<String>,
    pub driver: Option<String>,
    pub date: String,
    #[serde(default = "whole")]
    pub complete: bool,
    pub emulated: Option<String>,
    pub read_ceiling: Option<Ceiling>,
    pub copy_ceiling: Option<Ceiling>,
    #[serde(default)]
    pub results: Vec<CaseResult>,
}

fn whole() -> bool {
    true
}

/// What memory can do, measured in the run.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Ceiling {
    pub bytes_per_second: f64,
}

/// A case that was timed, or that was not.
#[derive(Clone, Debug, Deserialize)]
pub struct CaseResult {
    pub name: String,
    #[serde(default)]
    pub parameters: Value,
    pub bytes: Option<u64>,
    pub microseconds: Option<Percentiles>,
    pub bytes_per_second: Option<f64>,
    /// Of what multiplies and reads nothing.
    pub operations_per_second: Option<f64>,
    /// Whether memory was read, rather than caches; absent where nothing was timed.
    pub cold_l2: Option<bool>,
    /// Why there is no time.
    pub skipped: Option<String>,
}

/// Of a launch's time.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
pub struct Percentiles {
    pub p10: f64,
    pub p50: f64,
    pub p90: f64,
}

/// All of some files, each op once.
pub fn read(files: &[PathBuf]) -> Result<Vec<OpFile>, String> {
    let mut all: Vec<(OpFile, &Path)> = Vec::new();
    for path in files {
        for of in read_file(path)? {
            if let Some((_, other)) = all.iter().find(|(known, _)| known.op == of.op) {
                return Err(format!("{}: {} is in {} too", path.display(), of.op, other.display()));
            }
            all.push((of, path));
        }
    }
    Ok(all.into_iter().map(|(of, _)| of).collect())
}

fn read_file(path: &Path) -> Result<Vec<OpFile>, String> {
    let json = read_json(path)?;
    let parsed = match (&json["op"], &json["benches"], &json["runs"]) {
        (Value::String(_), ..) => vec![op_file(json, path, "")?],
        (_, Value::Array(benches), _) => {
            let each = benches.iter().enumerate();
            each.map(|(i, bench)| op_file(bench.clone(), path, &format!("benches[{i}]: "))).collect::<Result<_, _>>()?
        }
        (Value::Null, Value::Null, Value::Array(_)) => Vec::new(),
        _ => return Err(format!("{}: neither results of an op (`op`) nor a collection of them (`benches`)", path.display())),
    };
    for of in &parsed {
        check(of).map_err(|e| format!("{}: {}{e}", path.display(), of.op))?;
    }
    Ok(parsed)
}

fn op_file(json: Value, path: &Path, place: &str) -> Result<OpFile, String> {
    serde_json::from_value(json).map_err(|e| format!("{}: {place}{e}", path.display()))
}

/// What is divided by is not zero.
fn check(of: &OpFile) -> Result<(), String> {
    let sound = |x: f64| x.is_finite() && x > 0.0;
    for (name, ceiling) in [("read_ceiling", of.read_ceiling), ("copy_ceiling", of.copy_ceiling)] {
        if let Some(c) = ceiling.filter(|c| !sound(c.bytes_per_second)) {
            return Err(format!(": {name} is {} bytes a second", c.bytes_per_second));
        }
    }
    for case in &of.results {
        let Some(us) = case.microseconds else { continue };
        if let Some(bad) = [us.p10, us.p50, us.p90].into_iter().find(|&x| !sound(x)) {
            return Err(format!("/{}: a time of {bad} microseconds", case.name));
        }
    }
    Ok(())
}
