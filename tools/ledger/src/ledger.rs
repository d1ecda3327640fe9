//! The committed file, what it says of one entry point, and what may not be.

use crate::model::{Attend, LIMIT, MODELLED, Rebuild, arch_number};
use crate::path::Graph;
use crate::sass::{Instruction, Usage};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// `kernels/ledger/static.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// `nvcc 13.0.88`.
    pub compiler: String,
    pub entries: Vec<Facts>,
}

/// An entry point, compiled for an architecture.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    pub entry: String,
    /// `90a`.
    pub arch: String,
    pub registers: u32,
    /// Static shared memory, bytes. From sm_90 on, where there is any, it includes the 1 KB of each CTA that CUDA keeps.
    pub shared: u32,
    /// Bytes.
    pub stack: u32,
    /// Bytes.
    pub local: u32,
    /// Bytes.
    pub spill_stores: u32,
    /// Bytes.
    pub spill_loads: u32,
    /// Bytes of keys and values on their way to an SM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_flight: Option<u32>,
    /// Innermost loops that multiply on tensor cores; of attend kernels only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loops: Vec<LoopFacts>,
    /// Of low-rank attention kernels: the loop that rebuilds, turns and scores keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rebuild: Option<RebuildFacts>,
}

/// The fast path of `attend_lowrank/scores.cuh`: 32 rows, 16 rotary pairs, one head, latents held in registers.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RebuildFacts {
    pub instructions: u32,
    /// Issue time of these loops alone over 128K rows of 8 kv heads of 128 dimensions, on the GPU of the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub microseconds: Option<f64>,
}

/// A main loop.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoopFacts {
    /// All of it, slow paths included.
    pub instructions: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tile: Option<PathFacts>,
}

/// The fast path of a tile (`path.rs` says which it is).
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathFacts {
    /// Of one tile.
    pub instructions: u32,
    pub per_16_rows: f64,
    /// Issue time in percent of the byte floor, on the GPU of the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub issue_percent: Option<f64>,
}

impl Facts {
    /// Errors: a loop or a path that should be there and isn't.
    pub fn measure(entry: &str, arch: &str, usage: Usage, spills: (u32, u32), body: Vec<Instruction>) -> Result<Facts, String> {
        let Usage { registers, shared, stack, local } = usage;
        let mut facts = Facts {
            entry: entry.into(),
            arch: arch.into(),
            registers,
            shared,
            stack,
            local,
            spill_stores: spills.0,
            spill_loads: spills.1,
            in_flight: None,
            loops: Vec::new(),
            rebuild: None,
        };
        if let Some(rebuild) = Rebuild::of(entry) {
            let place = |e: String| format!("{entry} sm_{arch}: {e}");
            let graph = Graph::new(body).map_err(place)?;
            let paths = graph.main_loops().into_iter().filter_map(|l| Some(graph.fast_path(&l, rebuild.work())?.len() as u32));
            let none = || place("no main loop has a path that rebuilds 16 pairs of a head".into());
            let instructions = paths.min().ok_or_else(none)?;
            let microseconds = (arch == MODELLED).then(|| (rebuild.microseconds(instructions) * 10.0).round() / 10.0);
            facts.rebuild = Some(RebuildFacts { instructions, microseconds });
            return Ok(facts);
        }
        let Some(attend) = Attend::of(entry) else { return Ok(facts) };
        let attend = attend?;
        let place = |e: String| format!("{entry} sm_{arch}: {e}");
        let graph = Graph::new(body).map_err(place)?;
        for main in graph.main_loops() {
            let tile = graph.fast_path(&main, attend.work()).map(|path| {
                let instructions = path.len() as u32;
                let per_16_rows = 16.0 * f64::from(instructions) / f64::from(attend.rows());
                let issue = attend.issue_percent(per_16_rows);
                let issue_percent = (arch == MODELLED).then(|| (issue * 10.0).round() / 10.0);
                PathFacts { instructions, per_16_rows, issue_percent }
            });
            facts.loops.push(LoopFacts { instructions: graph.size(&main), tile });
        }
        if facts.fast_path().is_none() {
            let (loops, need) = (facts.loops.len(), attend.work());
            return Err(place(format!("of {loops} main loops none has a path that does the work of one tile: {need:?}")));
        }
        facts.in_flight = Some(attend.in_flight(arch));
        Ok(facts)
    }

    /// The shortest among its loops.
    pub fn fast_path(&self) -> Option<PathFacts> {
        self.loops.iter().filter_map(|l| l.tile).min_by_key(|p| p.instructions)
    }

    fn title(&self) -> String {
        format!("{} sm_{}", self.entry, self.arch)
    }

    fn key(&self) -> (&str, u32, &str) {
        (&self.entry, arch_number(&self.arch), &self.arch)
    }
}

/// What was found: errors, and what is worth saying beside them.
#[derive(Debug, Default)]
pub struct Findings {
    pub errors: Vec<String>,
    pub notes: Vec<String>,
}

impl Findings {
    /// What may not be, whatever is committed.
    pub fn judge(&mut self, facts: &Facts) {
        let bytes = [
            ("spill_stores", facts.spill_stores),
            ("spill_loads", facts.spill_loads),
            ("stack", facts.stack),
            ("local", facts.local),
        ];
        for (name, n) in bytes.into_iter().filter(|b| b.1 > 0) {
            self.errors.push(format!("{}: {name}: {n} bytes, must be 0", facts.title()));
        }
        let Some(Ok(attend)) = Attend::of(&facts.entry) else { return };
        let Some(percent) = facts.fast_path().and_then(|p| p.issue_percent).filter(|p| *p > LIMIT) else { return };
        let text =
            format!("{}: issuing the instructions of tiles takes {percent} % of the time to read their bytes", facts.title());
        if attend.is_limited() {
            self.errors.push(format!("{text}; at most {LIMIT} % is allowed"));
        } else {
            self.notes.push(text);
        }
    }

    /// Differences between the committed ledger and what was measured for `archs`.
    pub fn compare(&mut self, committed: &Ledger, actual: &Ledger, archs: &[String]) {
        if committed.compiler != actual.compiler {
            let (then, now) = (&committed.compiler, &actual.compiler);
            self.errors.push(format!("compiler: committed {then}, actual {now}: figures of two compilers can't be compared"));
            return;
        }
        for old in committed.entries.iter().filter(|f| archs.contains(&f.arch)) {
            if !actual.entries.iter().any(|f| f.key() == old.key()) {
                self.errors.push(format!("{}: committed, but not among the kernels", old.title()));
            }
        }
        for new in &actual.entries {
            let Some(old) = committed.entries.iter().find(|f| f.key() == new.key()) else {
                self.errors.push(format!("{}: not in the ledger", new.title()));
                continue;
            };
            let value = |facts: &Facts| serde_json::to_value(facts).unwrap_or_default();
            differences("", Some(&value(old)), Some(&value(new)), &mut |field, committed, actual| {
                self.errors.push(format!("{}: {field}: committed {committed}, actual {actual}", new.title()));
            });
        }
    }
}

fn differences(path: &str, old: Option<&Value>, new: Option<&Value>, report: &mut impl FnMut(&str, String, String)) {
    let inside = |name: &str| if path.is_empty() { name.to_string() } else { format!("{path}.{name}") };
    match (old, new) {
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            for name in a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))) {
                differences(&inside(name), a.get(name), b.get(name), report);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            for i in 0..a.len().max(b.len()) {
                differences(&inside(&i.to_string()), a.get(i), b.get(i), report);
            }
        }
        (a, b) if a == b => {}
        (a, b) => {
            let text = |v: Option<&Value>| v.map_or_else(|| "nothing".into(), Value::to_string);
            report(path, text(a), text(b));
        }
    }
}

impl Ledger {
    /// Sorted by entry and architecture.
    pub fn new(compiler: String, mut entries: Vec<Facts>) -> Ledger {
        entries.sort_by(|a, b| a.key().cmp(&b.key()));
        Ledger { compiler, entries }
    }

    /// A line for each entry and architecture, so that a diff shows what changed.
    pub fn to_text(&self) -> Result<String, serde_json::Error> {
        let lines = self.entries.iter().map(|f| Ok(format!("    {}", serde_json::to_string(f)?)));
        let lines = lines.collect::<Result<Vec<_>, serde_json::Error>>()?.join(",\n");
        Ok(format!("{{\n  \"compiler\": {},\n  \"entries\": [\n{lines}\n  ]\n}}\n", serde_json::to_string(&self.compiler)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(entry: &str, arch: &str, percent: f64) -> Facts {
        let path = PathFacts { instructions: 300, per_16_rows: 300.0, issue_percent: Some(percent) };
        let mut facts =
            Facts::measure("kvlar_append", arch, Usage { registers: 48, ..Usage::default() }, (0, 0), Vec::new()).unwrap();
        facts.entry = entry.into();
        facts.loops = vec![LoopFacts { instructions: 600, tile: Some(path) }];
        facts
    }

    #[test]
    fn text_comes_back_and_is_sorted() {
        let all = [facts("b", "100", 1.0), facts("b", "90a", 1.5), facts("a", "120", 2.0)];
        let text = Ledger::new("nvcc 1".into(), all.to_vec()).to_text().unwrap();
        let again: Ledger = serde_json::from_str(&text).unwrap();
        assert_eq!(again.to_text().unwrap(), text);
        let order: Vec<_> = again.entries.iter().map(|f| (f.entry.as_str(), f.arch.as_str())).collect();
        assert_eq!(order, [("a", "120"), ("b", "90a"), ("b", "100")]);
        assert_eq!(text.lines().count(), 3 + 3 + 2);
    }

    #[test]
    fn differences_name_entry_arch_field_and_both_values() {
        let old = Ledger::new("nvcc 1".into(), vec![facts("a", "80", 1.0), facts("b", "80", 1.0), facts("c", "86", 1.0)]);
        let mut changed = facts("a", "80", 1.0);
        changed.registers = 49;
        changed.loops[0].tile.as_mut().unwrap().instructions = 301;
        let new = Ledger::new("nvcc 1".into(), vec![changed, facts("d", "80", 1.0)]);
        let mut found = Findings::default();
        found.compare(&old, &new, &["80".into()]);
        let expected = [
            "b sm_80: committed, but not among the kernels",
            "a sm_80: registers: committed 48, actual 49",
            "a sm_80: loops.0.tile.instructions: committed 300, actual 301",
            "d sm_80: not in the ledger",
        ];
        assert_eq!(found.errors, expected);
    }

    #[test]
    fn another_compiler_is_one_error() {
        let (old, new) = (Ledger::new("nvcc 1".into(), vec![facts("a", "80", 1.0)]), Ledger::new("nvcc 2".into(), Vec::new()));
        let mut found = Findings::default();
        found.compare(&old, &new, &["80".into()]);
        assert_eq!(found.errors.len(), 1);
        assert!(found.errors[0].contains("committed nvcc 1, actual nvcc 2"));
    }

    #[test]
    fn spills_and_slow_loops_are_errors_whatever_is_committed() {
        let judge = |facts: &Facts| {
            let mut found = Findings::default();
            found.judge(facts);
            (found.errors.len(), found.notes.len())
        };
        assert_eq!(judge(&Facts { spill_loads: 4, stack: 8, ..facts("kvlar_append", "80", 1.0) }), (2, 0));
        assert_eq!(judge(&facts("kvlar_attend_bf16_d128_n8", "90a", 55.0)), (0, 0));
        assert_eq!(judge(&facts("kvlar_attend_bf16_d128_n8", "90a", 55.1)), (1, 0));
        assert_eq!(judge(&facts("kvlar_attend_bf16_d128_n16", "90a", 55.1)), (0, 1));
    }

    #[test]
    fn a_kernel_without_its_loop_is_an_error() {
        let result = Facts::measure("kvlar_attend_bf16_d128_n8", "80", Usage::default(), (0, 0), Vec::new());
        assert!(result.is_err());
    }
}
