//! Results: lines for people, a JSON file for everything else.

use crate::ceiling::CopyCeiling;
use crate::{Rig, gpu, today};
use serde_json::{Value, json};
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
    pub sets: usize,
    pub launches_a_replay: usize,
    /// Whether the sets together exceed the L2 twice, so that every launch reads memory.
    pub cold: bool,
    /// Of one launch: a mean over some replays each.
    pub seconds: Vec<f64>,
}

/// All of a process.
pub(crate) struct Report<'a> {
    op: &'static str,
    rig: &'a Rig,
    ceiling: Option<CopyCeiling>,
    lines: Vec<String>,
    results: Vec<Value>,
    fastest: Option<(f64, String)>,
}

impl<'a> Report<'a> {
    pub fn new(op: &'static str, rig: &'a Rig, ceiling: Option<CopyCeiling>) -> Self {
        let mut report = Self { op, rig, ceiling, lines: Vec::new(), results: Vec::new(), fastest: None };
        if let Some(c) = ceiling {
            let info = rig.device.info();
            report.line(format!("{}, {} SMs, timed by {}", info.name, info.sm_count, rig.clock()));
            report.line(format!("copy ceiling: {} ({} read and written)", rate(c.rate()), size(c.bytes)));
        }
        report
    }

    fn line(&mut self, line: String) {
        println!("{line}");
        self.lines.push(line);
    }

    pub fn skip(&mut self, name: &str, why: &str) {
        self.results.push(json!({ "name": name, "skipped": why }));
        self.line(format!("{}/{name}: skipped: {why}", self.op));
    }

    pub fn add(&mut self, m: Measurement) {
        let op = self.op;
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
            return;
        };
        let mut seconds = m.seconds;
        let [p10, p50, p90] = [0.1, 0.5, 0.9].map(|p| percentile(&mut seconds, p));
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
        if m.cold && self.fastest.as_ref().is_none_or(|(best, _)| speed > *best) {
            self.fastest = Some((speed, m.name));
        }
        result["microseconds"] = json!({ "p10": p10 * 1e6, "p50": p50 * 1e6, "p90": p90 * 1e6 });
        result["bytes_per_second"] = json!(speed);
        result["percent_of_copy_ceiling"] = json!(percent);
        result["cold_l2"] = json!(m.cold);
        self.results.push(result);
    }

    /// Prints all times again, together, and writes the file.
    pub fn finish(mut self) {
        if let Some(c) = self.ceiling {
            if let Some((speed, name)) = &self.fastest {
                let percent = 100.0 * speed / c.rate();
                let line = format!("fastest {}: {} by {name}, {percent:.1} % of the copy ceiling", self.op, rate(*speed));
                self.lines.push(line);
            }
            println!("\n{}", self.lines.join("\n"));
        }
        let Some(folder) = self.folder() else { return };
        let path = folder.join(format!("{}.json", self.op));
        let text = serde_json::to_string_pretty(&self.json()).expect("JSON");
        match std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, text + "\n")) {
            Ok(()) => println!("written: {}", path.display()),
            Err(e) => eprintln!("{}: {e}", path.display()),
        }
    }

    /// Emulated results are kept only where they are asked for, those of criterion's test mode nowhere.
    fn folder(&self) -> Option<PathBuf> {
        if self.ceiling.is_none() && !self.rig.is_emulated() {
            return None;
        }
        if let Some(folder) = std::env::var_os("KVLAR_BENCH_OUT") {
            return Some(folder.into());
        }
        if self.rig.is_emulated() {
            return None;
        }
        // cargo says where the package is, and runs benches there; without cargo the folder is relative.
        let package = std::env::var_os("CARGO_MANIFEST_DIR").map_or(PathBuf::from("bench"), PathBuf::from);
        Some(package.join("results"))
    }

    fn json(&self) -> Value {
        let info = self.rig.device.info();
        let emulated = self.rig.is_emulated();
        // The program's folder is the machine's business.
        let program = std::env::args().next().map(PathBuf::from);
        let program = program.and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned()));
        let command: Vec<String> = program.into_iter().chain(std::env::args().skip(1)).collect();
        let mut json = json!({
            "op": self.op,
            "gpu": if emulated { Value::Null } else { json!(info.name) },
            "driver": if emulated { None } else { gpu::driver_version() },
            "date": today(),
            "command": command,
            "clock": self.rig.clock(),
        });
        if emulated {
            json["emulated"] = json!("the launches ran; their times are not a speed and are left out");
        }
        if let Some(c) = self.ceiling {
            json["copy_ceiling"] = json!({ "bytes": c.bytes, "microseconds": c.seconds * 1e6, "bytes_per_second": c.rate() });
        }
        if let Some((speed, name)) = &self.fastest {
            json["fastest"] = json!({ "name": name, "bytes_per_second": speed });
        }
        json["results"] = Value::Array(self.results.clone());
        json
    }
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
