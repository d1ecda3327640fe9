//! What is known of the kernels on each architecture, as a table.

use kvlar_kernels::SOURCES;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;

/// Columns, and the compute capabilities that they are of: GPUs of one machine code.
const ARCHITECTURES: [(&str, &[&str]); 4] = [
    ("sm_80 to sm_89", &["8.0", "8.6", "8.7", "8.9"]),
    ("sm_90", &["9.0"]),
    ("sm_100, sm_103, sm_110", &["10.0", "10.3", "11.0"]),
    ("sm_120, sm_121", &["12.0", "12.1"]),
];
const NEVER: &str = "emulated only";

/// A Markdown table of kernel families and architectures: the GPUs on which the suite has passed with the sources as they
/// are, else that there was none.
///
/// # Errors
/// If a run of the ledger lacks its compute capability, or has one that no column is of.
pub fn support_table(ledger: &Value) -> Result<String, String> {
    let runs = ledger["runs"].as_array().ok_or("the ledger has no list of runs")?;
    for run in runs {
        let capability = run["compute_capability"].as_str().ok_or("a run of the ledger has no compute_capability")?;
        if !ARCHITECTURES.iter().any(|(_, of)| of.contains(&capability)) {
            return Err(format!("the ledger has a run of compute capability {capability:?}, of which the table has no column"));
        }
    }
    let mut families: Vec<&str> = SOURCES.iter().map(|s| s.family).collect();
    families.dedup();
    let mut table = String::from("| kernels |");
    ARCHITECTURES.iter().for_each(|(name, _)| _ = write!(table, " {name} |"));
    table += "\n|---|";
    table += &"---|".repeat(ARCHITECTURES.len());
    table += "\n";
    for family in families {
        _ = write!(table, "| `{family}` |");
        for (_, capabilities) in ARCHITECTURES {
            let mut gpus: Vec<&str> = Vec::new();
            for run in runs.iter().filter(|run| capabilities.iter().any(|c| run["compute_capability"] == *c)) {
                let gpu = run["gpu"].as_str().unwrap_or("a GPU");
                if passed_with(run, family) && !gpus.contains(&gpu) {
                    gpus.push(gpu);
                }
            }
            let cell = if gpus.is_empty() { NEVER.into() } else { format!("verified on {}", gpus.join(", ")) };
            _ = write!(table, " {cell} |");
        }
        table += "\n";
    }
    Ok(table)
}

/// Whether all modules of a family were in a run as they would be compiled now, and nothing failed.
fn passed_with(run: &Value, family: &str) -> bool {
    let compiler = run["compiler"].as_str().unwrap_or_default();
    let same = |recipe: &str, hash: &Value| hash.as_str().is_some_and(|h| h == source_hash(recipe, compiler));
    let mut modules = SOURCES.iter().filter(|s| s.family == family);
    run["suite"]["failed"].as_u64() == Some(0) && modules.all(|s| same(s.recipe, &run["modules"][s.module]))
}

fn source_hash(recipe: &str, compiler: &str) -> String {
    let digest = Sha256::digest(format!("{recipe} {compiler}"));
    digest[..8].iter().fold(String::new(), |mut s, b| {
        _ = write!(s, "{b:02x}");
        s
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    fn run(changed: &str) -> Value {
        let hash = |s: &kvlar_kernels::Source| if s.family == changed { "0".into() } else { source_hash(s.recipe, "nvcc 1") };
        let modules: Map<String, Value> = SOURCES.iter().map(|s| (s.module.into(), hash(s).into())).collect();
        let suite = json!({ "passed": 3, "failed": 0 });
        json!({ "gpu": "Some GPU", "compute_capability": "8.9", "compiler": "nvcc 1", "modules": modules, "suite": suite })
    }

    fn row(table: &str, family: &str) -> String {
        table.lines().find(|l| l.starts_with(&format!("| `{family}` |"))).expect(family).into()
    }

    #[test]
    fn verified_are_families_whose_sources_are_those_of_a_run() {
        let table = support_table(&json!({ "runs": [run("merge"), run("merge")] })).expect("a table");
        let never = format!(" {NEVER} |");
        assert_eq!(row(&table, "merge"), format!("| `merge` |{}", never.repeat(4)));
        assert_eq!(row(&table, "scan"), format!("| `scan` | verified on Some GPU |{}", never.repeat(3)));
        let mut failed = run("");
        failed["suite"]["failed"] = json!(1);
        let table = support_table(&json!({ "runs": [failed] })).expect("a table");
        assert!(!table.contains("verified"));
    }

    #[test]
    fn a_run_of_an_unknown_architecture_is_an_error() {
        let mut unknown = run("");
        unknown["compute_capability"] = json!("7.5");
        assert!(support_table(&json!({ "runs": [unknown] })).expect_err("no column").contains("7.5"));
        assert!(support_table(&json!({ "runs": [{}] })).is_err() && support_table(&json!({})).is_err());
    }

    /// The two ways to a hash, in builds that have both.
    #[test]
    fn hashes_are_those_of_the_build() {
        for m in kvlar_kernels::MODULES.iter().filter(|m| m.archs == ["80", "90a"]) {
            let source = SOURCES.iter().find(|s| s.module == m.name).expect("a source");
            assert_eq!(source_hash(source.recipe, m.compiler), m.source_hash, "{}", m.name);
        }
    }
}
