//! What a process that crashed, or ran out of time, has left of an op's results.

use crate::ceiling::CopyCeiling;
use crate::read_json;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The beginning of an op's results.
#[derive(Debug, Default)]
pub(crate) struct Earlier {
    pub ceiling: Option<CopyCeiling>,
    pub results: Vec<Value>,
}

impl Earlier {
    /// `None` where there is no file, or it is whole, or of something else than `head`.
    pub fn read(path: &Path, op: &str, head: &Map<String, Value>) -> Option<Self> {
        Self::of(&read_json(path).ok()?, op, head)
    }

    fn of(json: &Value, op: &str, head: &Map<String, Value>) -> Option<Self> {
        if json["op"] != op || json["complete"] != false || head.iter().any(|(key, value)| json[key] != *value) {
            return None;
        }
        let mut results = json["results"].as_array()?.clone();
        if let Some(name) = json["running"].as_str() {
            results.push(json!({ "name": name, "skipped": "an earlier run ended while it ran" }));
        }
        let ceiling = &json["copy_ceiling"];
        let ceiling = ceiling["bytes"].as_u64().zip(ceiling["microseconds"].as_f64());
        let ceiling = ceiling.map(|(bytes, us)| CopyCeiling { bytes: bytes as usize, seconds: us * 1e-6 });
        Some(Self { ceiling, results })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unfinished_results_of_the_same_machine_are_gone_on_with() {
        let head = json!({ "gpu": "a GPU", "driver": "1.2" }).as_object().cloned().expect("an object");
        let file = json!({
            "op": "merge", "gpu": "a GPU", "driver": "1.2", "complete": false, "running": "b",
            "copy_ceiling": { "bytes": 8, "microseconds": 2.0 }, "results": [{ "name": "a", "bytes": 1 }],
        });
        let earlier = Earlier::of(&file, "merge", &head).expect("results");
        assert_eq!(earlier.ceiling.map(|c| c.rate()), Some(4e6));
        assert_eq!(earlier.results[0]["name"], "a");
        assert!(earlier.results[1]["name"] == "b" && earlier.results[1]["skipped"].is_string());
        assert!(Earlier::of(&file, "scan", &head).is_none());
        for (key, other) in [("complete", json!(true)), ("gpu", json!("another")), ("driver", json!(null))] {
            let mut changed = file.clone();
            changed[key] = other;
            assert!(Earlier::of(&changed, "merge", &head).is_none(), "{key}");
        }
    }
}
