//! Results: lines for people, a JSON file for everything else.

use crate::ceiling::CopyCeiling;
use crate::earlier::Earlier;
use crate::{Rig, gpu, today, write_json};
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// The value below which a fraction `p` of `x` lies; 0 for none.
pub(crate) fn percentile(x: &mut [f64], p: f64) -> f64 {
    x.sort_by(f64::total_cmp);
    x.get((p * x.len().saturating_sub(1) as f64).round() as usize).copied().unwrap_or(0.0)
}

/// A timed case.
#[derive(Debug)]
pub(crate) struct Measurement {
    pub name: String,
    pub parameters: Value,
    /// One launch moves.
    pub bytes: usize,
    /// And does, where nothing is read.
    pub operations: usize,
    pub sets: usize,
    pub launches_a_replay: usize,
    /// Whether the sets together exceed the L2 twice, so that every launch reads memory.
    pub cold: bool,
    /// Of one launch: a mean over some replays each.
    pub seconds: Vec<f64>,
}

/// All of an op. Its file is written anew before and after each case: what a crash or a limit of time costs is one case.
pub(crate) struct Report<'a> {
    op: &'static str,
    rig: &'a Rig,
    /// Whether times mean something.
    timed: bool,
    /// Where results are kept, if they are.
    path: Option<PathBuf>,
    ceiling: Option<CopyCeiling>,
    lines: Vec<String>,
    results: Vec<Value>,
    /// The case that a crash would be of.
    running: Option<String>,
    /// Whether there is anything to keep.
    began: bool,
}

impl<'a> Report<'a> {
    /// With `KVLAR_BENCH_RESUME`, what a process that did not come to an end has left is gone on with.
    pub fn new(op: &'static str, rig: &'a Rig, timed: bool) -> Self {
        let path = folder(rig, timed).map(|folder| folder.join(format!("{op}.json")));
        let resumed = std::env::var("KVLAR_BENCH_RESUME").is_ok_and(|v| !v.is_empty());
        let earlier = path.as_deref().filter(|_| resumed).and_then(|path| Earlier::read(path, op, &head(rig)));
        let (began, earlier) = (earlier.is_some(), earlier.unwrap_or_default());
        let (lines, running) = (Vec::new(), None);
        let mut report = Self { op, rig, timed, path, ceiling: earlier.ceiling, lines, results: earlier.results, running, began };
        if began {
            report.line(format!("{op}: goes on behind {} results of an earlier run", report.results.len()));
        }
        report
    }

    fn line(&mut self, line: String) {
        println!("{line}");
        self.lines.push(line);
    }

    /// Whether there is a result of the case already.
    pub fn has(&self, name: &str) -> bool {
        self.results.iter().any(|r| r["name"] == name)
    }

    /// A case is about to run. The first one waits for the ceiling, so that a filter saves that too.
    pub fn begin(&mut self, name: &str) {
        if self.timed && self.ceiling.is_none() {
            let (c, info) = (CopyCeiling::measure(self.rig), self.rig.device.info());
            self.line(format!("{}, {} SMs, timed by {}", info.name, info.sm_count, self.rig.clock()));
            self.line(format!("copy ceiling: {} ({} read and written)", rate(c.rate()), size(c.bytes)));
            self.ceiling = Some(c);
        }
        (self.began, self.running) = (true, Some(name.into()));
        self.flush(false);
    }

    pub fn skip(&mut self, name: &str, why: &str) {
        self.results.push(json!({ "name": name, "skipped": why }));
        self.line(format!("{}/{name}: skipped: {why}", self.op));
    }

    pub fn add(&mut self, m: Measurement) {
        let op = self.op;
        self.running = None;
        let mut result = json!({
            "name": m.name,
            "parameters": m.parameters,
            "bytes": m.bytes,
            "sets": m.sets,
            "launches_a_replay": m.launches_a_replay,
            "samples": m.seconds.len(),
        });
        let Some(ceiling) = self.ceiling else {
            let how = if self.rig.is_emulated() { "ran emulated, not a speed" } else { "ran, not timed" };
            self.line(format!("{op}/{}: {how} ({} a launch)", m.name, size(m.bytes)));
            self.results.push(result);
            return self.flush(false);
        };
        let mut seconds = m.seconds;
        let [p10, p50, p90] = [0.1, 0.5, 0.9].map(|p| percentile(&mut seconds, p));
        result["microseconds"] = json!({ "p10": p10 * 1e6, "p50": p50 * 1e6, "p90": p90 * 1e6 });
        if m.operations > 0 {
            let rate = m.operations as f64 / p50;
            self.line(format!("{op}/{}: {:.2} µs, {:.1} T operations/s", m.name, p50 * 1e6, rate / 1e12));
            result["operations_per_second"] = json!(rate);
            self.results.push(result);
            return self.flush(false);
        }
        let speed = m.bytes as f64 / p50;
        let percent = 100.0 * speed / ceiling.rate();
        let warm = if m.cold { "" } else { ", in part from L2" };
        self.line(format!(
            "{op}/{}: {:.2} µs (p10 {:.2}, p90 {:.2}), {}, {}, {percent:.1} % of the copy ceiling{warm}",
            m.name,
            p50 * 1e6,
            p10 * 1e6,
            p90 * 1e6,
            size(m.bytes),
            rate(speed)
        ));
        result["bytes_per_second"] = json!(speed);
        result["percent_of_copy_ceiling"] = json!(percent);
        result["cold_l2"] = json!(m.cold);
        self.results.push(result);
        self.flush(false);
    }

    /// The fastest case that reads memory.
    fn fastest(&self) -> Option<(f64, &str)> {
        let cold = self.results.iter().filter(|r| r["cold_l2"] == true);
        let rates = cold.filter_map(|r| Some((r["bytes_per_second"].as_f64()?, r["name"].as_str()?)));
        rates.max_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Prints all times again, together, and writes the file: `left` cases had no more time, `filtered` ones were not asked
    /// for.
    pub fn finish(mut self, left: usize, filtered: usize) {
        // Of a filter that names nothing of this op there is nothing to say.
        if !self.began && filtered > 0 {
            return;
        }
        if let (Some(c), Some((speed, name))) = (self.ceiling, self.fastest()) {
            let percent = 100.0 * speed / c.rate();
            self.lines.push(format!("fastest {}: {} by {name}, {percent:.1} % of the copy ceiling", self.op, rate(speed)));
        }
        if left > 0 {
            self.lines.push(format!("{}: out of time, {left} cases are left", self.op));
        }
        if self.timed || left > 0 {
            println!("\n{}", self.lines.join("\n"));
        }
        self.flush(left == 0);
        if let Some(path) = &self.path {
            println!("written: {}", path.display());
        }
    }

    fn flush(&self, complete: bool) {
        let Some(path) = &self.path else { return };
        if let Err(e) = write_json(path, &self.json(complete)) {
            eprintln!("{e}");
        }
    }

    fn json(&self, complete: bool) -> Value {
        // The program's folder is the machine's business.
        let program = std::env::args().next().map(PathBuf::from);
        let program = program.and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        let command: Vec<String> = program.into_iter().chain(std::env::args().skip(1)).collect();
        let mut json = json!({ "op": self.op });
        json.as_object_mut().expect("an object").extend(head(self.rig));
        json["date"] = json!(today());
        json["command"] = json!(command);
        json["clock"] = json!(self.rig.clock());
        json["complete"] = json!(complete);
        if let Some(running) = &self.running {
            json["running"] = json!(running);
        }
        if self.rig.is_emulated() {
            json["emulated"] = json!("the launches ran; their times are not a speed and are left out");
        }
        if let Some(c) = self.ceiling {
            json["copy_ceiling"] = json!({ "bytes": c.bytes, "microseconds": c.seconds * 1e6, "bytes_per_second": c.rate() });
        }
        if let Some((speed, name)) = self.fastest() {
            json["fastest"] = json!({ "name": name, "bytes_per_second": speed });
        }
        json["results"] = Value::Array(self.results.clone());
        json
    }
}

/// What results must share to be gone on with.
fn head(rig: &Rig) -> Map<String, Value> {
    let (emulated, info) = (rig.is_emulated(), rig.device.info());
    let gpu = if emulated { Value::Null } else { json!(info.name) };
    let driver = if emulated { Value::Null } else { json!(gpu::driver_version()) };
    [("gpu".to_string(), gpu), ("driver".to_string(), driver)].into_iter().collect()
}

/// Emulated results are kept only where they are asked for, those of criterion's test mode nowhere.
fn folder(rig: &Rig, timed: bool) -> Option<PathBuf> {
    if !timed && !rig.is_emulated() {
        return None;
    }
    if let Some(folder) = std::env::var_os("KVLAR_BENCH_OUT") {
        return Some(folder.into());
    }
    if rig.is_emulated() {
        return None;
    }
    // cargo says where the package is, and runs benches there; without cargo the folder is relative.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").map_or(PathBuf::from("bench"), PathBuf::from);
    Some(package.join("results"))
}

pub(crate) fn size(bytes: usize) -> String {
    let x = bytes as f64;
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..1_000_000 => format!("{:.1} kB", x / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", x / 1e6),
        _ => format!("{:.2} GB", x / 1e9),
    }
}

fn rate(bytes_per_second: f64) -> String {
    if bytes_per_second < 1e12 {
        return format!("{:.1} GB/s", bytes_per_second / 1e9);
    }
    format!("{:.2} TB/s", bytes_per_second / 1e12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few_values() {
        let mut x = [3.0, 1.0, 2.0];
        assert_eq!([0.0, 0.5, 1.0].map(|p| percentile(&mut x, p)), [1.0, 2.0, 3.0]);
        assert_eq!(percentile(&mut [], 0.5), 0.0);
    }

    #[test]
    fn sizes_are_decimal() {
        assert_eq!([size(9_999), size(16_777_216), rate(4.3e12)], ["9999 B", "16.8 MB", "4.30 TB/s"]);
    }
}
