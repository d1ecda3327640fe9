//! What was measured of each method: as text, and as JSON.

use anyhow::{Context, Result};
use kvlar_candle::llama::Protocol;
use serde::{Serialize, Serializer};
use std::path::Path;

/// Questions of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct RecallResult {
    /// Of the task.
    pub task: String,
    /// Asked.
    pub questions: usize,
    /// Answered right in every token.
    pub recalled: usize,
}

impl RecallResult {
    /// Share recalled.
    pub fn share(&self) -> f64 {
        self.recalled as f64 / self.questions.max(1) as f64
    }
}

/// What the table calls a protocol.
fn name_of(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Context => "before the question",
        Protocol::Question => "with the question",
    }
}

fn protocol_name<S: Serializer>(protocol: &Protocol, s: S) -> std::result::Result<S::Ok, S::Error> {
    s.serialize_str(name_of(*protocol))
}

/// A line of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The method.
    pub method: String,
    /// One line about it.
    pub about: String,
    /// When what is let go of was: before the question was seen, or with it in the window.
    #[serde(serialize_with = "protocol_name")]
    pub protocol: Protocol,
    /// Bytes a token, over all layers, with scales and padding.
    pub bytes_per_token: f64,
    /// Of the bf16 cache.
    pub kept: f64,
    /// On held-out text: the second half of each window through the store.
    pub perplexity: Option<f64>,
    /// Each task.
    pub recall: Vec<RecallResult>,
    /// Relative, against the full cache in bf16.
    pub attention_error: Option<f64>,
    /// Logit noise of the layer where it is largest.
    pub logit_noise: Option<f64>,
    /// The same two, of each layer.
    pub layers: Vec<LayerRow>,
    /// Tokens a second of this engine on this machine.
    pub decode_rate: Option<f64>,
}

/// What one layer's stored keys and values cost; null where a number is not finite.
#[derive(Clone, Debug, Serialize)]
pub struct LayerRow {
    /// Which.
    pub layer: usize,
    /// Relative error of its attention, against the full cache in bf16.
    pub attention_error: f64,
    /// Standard deviation of what its logits differ by from the full cache's; none where the stored keys cannot be read.
    pub logit_noise: Option<f64>,
}

/// A method that the device has no kernel for.
#[derive(Clone, Debug, Serialize)]
pub struct Unsupported {
    /// The method.
    pub method: String,
    /// One line about it.
    pub about: String,
    /// What there is no kernel for.
    pub why: String,
}

/// Everything that one run measured.
#[derive(Debug, Serialize)]
pub struct Table {
    /// The checkpoint's folder name.
    pub model: String,
    /// What ran the cache's ops.
    pub backend: String,
    /// One a method.
    pub rows: Vec<Row>,
    /// Methods that could not be measured on this backend.
    pub unsupported: Vec<Unsupported>,
}

impl Table {
    /// Prints it, columns aligned.
    pub fn print(&self) {
        let percent = |x: f64| format!("{:.1} %", 100.0 * x);
        let number = |x: Option<f64>, digits: usize| x.map_or("-".into(), |x| format!("{x:.digits$}"));
        let tasks: Vec<&str> = self.rows.first().map_or(Vec::new(), |r| r.recall.iter().map(|t| t.task.as_str()).collect());
        let mut head = ["method", "compressed", "bytes/token", "kept", "perplexity"].map(String::from).to_vec();
        head.extend(tasks.iter().map(|t| t.to_string()));
        head.extend(["attention error".into(), "logit noise".into(), "decode tok/s".into()]);
        let mut lines = vec![head];
        for r in &self.rows {
            let compressed = name_of(r.protocol).to_string();
            let (bytes, kept) = (format!("{:.0}", r.bytes_per_token), percent(r.kept));
            let mut line = vec![r.method.clone(), compressed, bytes, kept, number(r.perplexity, 3)];
            line.extend(r.recall.iter().map(|t| percent(t.share())));
            line.extend([number(r.attention_error, 5), number(r.logit_noise, 3), number(r.decode_rate, 1)]);
            lines.push(line);
        }
        let columns = lines[0].len();
        let widths: Vec<usize> = (0..columns).map(|c| lines.iter().map(|l| l[c].len()).max().unwrap_or(0)).collect();
        for line in &lines {
            let cells: Vec<String> = line
                .iter()
                .zip(&widths)
                .enumerate()
                .map(|(i, (x, w))| if i == 0 { format!("{x:<w$}") } else { format!("{x:>w$}") })
                .collect();
            println!("{}", cells.join("  "));
        }
        for u in &self.unsupported {
            println!("{}: not measured on this backend: {}", u.method, u.why);
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_json(&self, path: &Path) -> Result<()> {
        std::fs::write(path, serde_json::to_string_pretty(self)? + "\n").with_context(|| path.display().to_string())
    }
}
