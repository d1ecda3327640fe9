//! `kvlar eval` from outside, on a tiny checkpoint: plans beside the other methods, on every backend.

use crate::case::backends;
use crate::checkpoint::{Checkpoint, Variant};
use kvlar_calibrate::{FitConfig, LayerPlan, Plan, QuantizedFormat, Side};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A folder with a text, recall tasks and plans of a checkpoint.
struct Lab {
    checkpoint: Checkpoint,
    dir: tempfile::TempDir,
}

impl Lab {
    fn new(theta: f64) -> Self {
        let checkpoint = Checkpoint::write(&Variant { head_dim: 32, hidden: 96, theta, ..Variant::llama("eval") });
        let dir = tempfile::tempdir().unwrap();
        let words = |n: usize| (0..n).map(|i| format!("t{}", (i * i * 5 + i * 7 + 3) % 37 + 3)).collect::<Vec<_>>().join(" ");
        std::fs::write(dir.path().join("text.txt"), words(200)).unwrap();
        let task = |n: usize| {
            format!(
                r#"{{"context": "{}", "questions": [{{"question": "t8 t9", "answer": "t4"}}, {{"question": "{}", "answer": "t5 t6"}}]}}"#,
                words(n),
                words(12)
            )
        };
        std::fs::write(dir.path().join("short.jsonl"), task(30)).unwrap();
        std::fs::write(dir.path().join("long.jsonl"), task(80)).unwrap();
        Self { checkpoint, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn kvlar(&self, command: &str, more: &[&str]) -> Output {
        let mut kvlar = Command::new(env!("CARGO_BIN_EXE_kvlar"));
        kvlar.arg(command).arg("--model").arg(self.checkpoint.folder()).args(["--text", "text.txt"]).args(more);
        kvlar.current_dir(self.dir.path()).output().unwrap()
    }

    fn calibrate(&self, out: &str, more: &[&str]) {
        std::fs::create_dir_all(self.path(out).parent().unwrap()).unwrap();
        let fixed = ["--window", "60", "--kept", "0.5", "--sinks", "2", "--recent", "8", "--out", out];
        let output = self.kvlar("calibrate", &[&fixed, more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The table, and what was printed.
    #[track_caller]
    fn eval(&self, more: &[&str]) -> (Value, String) {
        let output = self.kvlar("eval", &[&["--window", "56", "--windows", "1", "--output", "results"], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let table = std::fs::read(self.path("results/table.json")).unwrap();
        (serde_json::from_slice(&table).unwrap(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    #[track_caller]
    fn fails(&self, more: &[&str], words: &[&str]) {
        let output = self.kvlar("eval", &[&["--window", "56", "--windows", "1", "--backend", "reference"], more].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(words.iter().all(|w| text.contains(w)), "{text:?} does not say {words:?}");
        assert!(!self.path("kvlar-output").exists());
    }
}

fn names(list: &Value, key: &str) -> Vec<String> {
    list.as_array().unwrap().iter().map(|r| r[key].as_str().unwrap().to_string()).collect()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{row} has no {key}"))
}

#[test]
fn plans_are_measured_on_every_backend() {
    let lab = Lab::new(100.0);
    lab.calibrate("half.safetensors", &[]);
    for backend in backends() {
        let methods = ["bf16", "fp8", "int8", "int4", "int4+hadamard", "k4v2", "kivi-int4", "kivi-int2", "half"];
        let chosen = methods.join(",");
        let files = ["--plan", "half.safetensors", "--recall", "short.jsonl"];
        let (table, text) = lab.eval(&[&files[..], &["--backend", backend, "--method", &chosen]].concat());
        assert_eq!(names(&table["rows"], "method"), methods, "{backend}: {text}");
        assert_eq!(table["unsupported"], Value::Array(Vec::new()));
        let rows = table["rows"].as_array().unwrap();
        for (row, error) in
            rows.iter().zip([0.0..1e-9, 1e-5..0.2, 1e-5..0.05, 1e-3..0.5, 1e-3..0.5, 0.01..1.0, 1e-3..0.5, 0.01..1.0])
        {
            if number(row, "kept") == 1.0 {
                // The last rows stay exact, and these contexts have no others.
                assert_eq!((number(row, "attention_error"), number(row, "logit_noise")), (0.0, 0.0), "{row}");
                continue;
            }
            assert!(error.contains(&number(row, "attention_error")), "{backend}: {row}");
            layers_are_told(row);
            assert!(number(row, "perplexity") > 1.0 && number(row, "decode_rate") > 0.0);
            assert_eq!((row["recall"][0]["task"].as_str(), row["recall"][0]["questions"].as_u64()), (Some("short"), Some(2)));
        }
    }
}

/// Each layer's attention error and logit noise; the largest noise is the row's.
#[track_caller]
fn layers_are_told(row: &Value) {
    let layers = row["layers"].as_array().unwrap();
    assert_eq!(layers.iter().map(|l| l["layer"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1]);
    let noises: Vec<f64> = layers.iter().map(|l| number(l, "logit_noise")).collect();
    assert_eq!(number(row, "logit_noise"), noises[0].max(noises[1]));
    let errors: Vec<f64> = layers.iter().map(|l| number(l, "attention_error")).collect();
    let all = number(row, "attention_error");
    if row["method"] == "bf16" {
        assert_eq!((&noises[..], &errors[..]), (&[0.0, 0.0][..], &[0.0, 0.0][..]));
        return;
    }
    assert!(noises.iter().all(|n| (1e-5..3.0).contains(n)), "{row}");
    assert!(errors[0].min(errors[1]) <= all && all <= errors[0].max(errors[1]), "{row}");
}

/// Plans of token-wise codes are caches of those codes; keys in codebooks are decoded before attention.
#[test]
fn plans_of_codes_are_measured_on_every_backend() {
    let lab = Lab::new(100.0);
    let fixed = ["--method", "pq", "--window", "60", "--centroids", "8", "--rounds", "2", "--out", "pq.safetensors"];
    let output = lab.kvlar("calibrate", &fixed);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut plan = Plan::read(&lab.path("pq.safetensors")).unwrap();
    let side = |format: &str| Side::Quantized(format.parse::<QuantizedFormat>().unwrap().into());
    (plan.method, plan.config) = ("quantized".into(), FitConfig::Chosen);
    plan.layers = vec![LayerPlan { keys: side("int4+hadamard"), values: side("int2") }; 2];
    plan.write(&lab.path("codes.safetensors")).unwrap();
    for backend in backends() {
        let plans = ["--plan", "pq.safetensors", "--plan", "codes.safetensors", "--method", "k4v2,pq,codes"];
        let (table, text) = lab.eval(&[&plans[..], &["--backend", backend]].concat());
        assert_eq!(names(&table["rows"], "method"), ["k4v2", "pq", "codes"], "{text}");
        let [k4v2, codes] = [0, 2].map(|i| &table["rows"][i]);
        for key in ["attention_error", "logit_noise", "perplexity", "bytes_per_token"] {
            assert_eq!(number(k4v2, key), number(codes, key), "{key}");
        }
        layers_are_told(&table["rows"][1]);
        assert!(text.contains("logit noise"), "{text}");
    }
}

/// The method of the table that needs codebooks; with less text than 256 tokens it has fewer centroids.
#[test]
fn calibration_adds_product_quantized_keys() {
    let lab = Lab::new(100.0);
    let words = std::fs::read_to_string(lab.path("text.txt")).unwrap();
    std::fs::write(lab.path("calibration.txt"), words.split(' ').rev().collect::<Vec<_>>().join(" ")).unwrap();
    let more = ["--calibration", "calibration.txt", "--method", "pq-16,recalkv-50", "--backend", "reference"];
    let (table, text) = lab.eval(&more);
    assert_eq!(names(&table["rows"], "method"), ["pq-16", "recalkv-50"], "{text}");
    let pq = &table["rows"][0];
    assert!(pq["about"].as_str().unwrap().contains("16 bytes, each one of 168 centroids"), "{pq}");
    assert!(number(pq, "perplexity") > 1.0 && number(pq, "attention_error") > 0.0, "{pq}");
}

/// One without a kernel is named with the reason; the others are measured.
#[test]
fn methods_without_a_kernel_do_not_end_the_run() {
    let lab = Lab::new(100.0);
    lab.calibrate("narrow.safetensors", &["--latent", "int4"]);
    for backend in backends() {
        let (table, text) = lab.eval(&["--plan", "narrow.safetensors", "--method", "narrow,int8", "--backend", backend]);
        if backend == "reference" {
            assert_eq!(names(&table["rows"], "method"), ["narrow", "int8"]);
            continue;
        }
        assert_eq!(names(&table["rows"], "method"), ["int8"]);
        assert_eq!(names(&table["unsupported"], "method"), ["narrow"]);
        let why = table["unsupported"][0]["why"].as_str().unwrap();
        assert!(why.contains("unsupported") && why.to_lowercase().contains("int4"), "{why}");
        let lines: Vec<&str> = text.lines().filter(|l| l.contains("unsupported")).collect();
        assert!(matches!(&lines[..], [line] if line.starts_with("narrow: ") && line.contains(why)), "{text}");
        // If none can be measured there is still a table that says so.
        let (table, _) = lab.eval(&["--plan", "narrow.safetensors", "--method", "narrow", "--backend", backend]);
        assert_eq!((table["rows"].as_array().unwrap().len(), names(&table["unsupported"], "method").len()), (0, 1));
    }
}

#[test]
fn other_errors_end_the_run() {
    let lab = Lab::new(100.0);
    // More tokens than the model has positions.
    lab.fails(&["--recall", "long.jsonl", "--method", "int8"], &["int8", "tokens", "64"]);
}

/// Whatever methods are chosen, and in whatever order.
#[test]
fn attention_errors_are_against_the_full_cache() {
    let lab = Lab::new(100.0);
    let error = |methods: &str| {
        let (table, _) = lab.eval(&["--method", methods, "--backend", "reference"]);
        let rows = table["rows"].as_array().unwrap().clone();
        let int8 = rows.iter().find(|r| r["method"] == "int8").unwrap();
        number(int8, "attention_error")
    };
    let (all, alone, first) = (error("bf16,int8"), error("int8"), error("int8,bf16"));
    assert!(all > 1e-5);
    assert_eq!((all, all), (alone, first));
}

#[test]
fn a_plan_of_another_model_is_refused() {
    let (lab, other) = (Lab::new(100.0), Lab::new(200.0));
    other.calibrate("theirs.safetensors", &[]);
    let plan = other.path("theirs.safetensors");
    let fingerprint = Plan::read(&plan).unwrap().fingerprint;
    lab.fails(&["--plan", plan.to_str().unwrap()], &["theirs.safetensors", &fingerprint, "this is model"]);
    assert!(Path::new(&plan).exists());
}

#[test]
fn methods_of_one_name_are_refused() {
    let lab = Lab::new(100.0);
    lab.calibrate("a/plan.safetensors", &[]);
    lab.calibrate("b/plan.safetensors", &[]);
    let both = ["--plan", "a/plan.safetensors", "--plan", "b/plan.safetensors"];
    lab.fails(&both, &["\"plan\"", "a/plan.safetensors", "b/plan.safetensors", "rename"]);
    std::fs::rename(lab.path("a/plan.safetensors"), lab.path("int8.safetensors")).unwrap();
    lab.fails(&["--plan", "int8.safetensors"], &["\"int8\"", "keys and values in 8 bits", "int8.safetensors"]);
}
