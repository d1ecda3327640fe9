//! `kvlar calibrate --method fast-kvzip` from outside: a model and a text in, gates and a report out, errors that name what is
//! wrong.

use kvlar_calibrate::gate::Gates;
use kvlar_calibrate::{LayerShape, ModelShape, PairLayout, RopePairs};
use kvlar_reference::Dtype;
use serde_json::{Value, json};
use std::process::{Command, Output};

const ASSETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets");

struct Run {
    output: Output,
    dir: tempfile::TempDir,
}

/// Runs in a folder of its own.
fn bare(arguments: &[&str]) -> Run {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("short.txt"), "too short").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvlar"));
    command.args(["calibrate", "--method", "fast-kvzip"]).args(arguments);
    let output = command.current_dir(dir.path()).env("KVLAR_ASSETS", ASSETS).output().unwrap();
    Run { output, dir }
}

/// Runs with few short windows, in two chunks each.
fn run(arguments: &[&str]) -> Run {
    let few = [["--window", "60"], ["--windows", "3"], ["--chunk", "40"], ["--steps", "20"], ["--batch", "100"]];
    let others = few.into_iter().filter(|[name, _]| !arguments.contains(name));
    bare(&[&others.flatten().collect::<Vec<_>>(), arguments].concat())
}

impl Run {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned() + &String::from_utf8_lossy(&self.output.stderr)
    }

    #[track_caller]
    fn gates(&self) -> Gates {
        assert!(self.output.status.success(), "{}", self.text());
        Gates::read(&self.dir.path().join("gates.safetensors")).unwrap()
    }

    fn report(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.dir.path().join("gates.report.json")).unwrap()).unwrap()
    }

    /// Exit status 1, a message with these words, and no file.
    #[track_caller]
    fn fails(&self, words: &[&str]) {
        assert_eq!(self.output.status.code(), Some(1), "{}", self.text());
        let text = String::from_utf8_lossy(&self.output.stderr).into_owned();
        for w in words {
            assert!(text.contains(w), "{text:?} does not say {w:?}");
        }
        let left = std::fs::read_dir(self.dir.path()).unwrap().count();
        assert_eq!(left, 1, "something was left behind");
    }
}

fn bundled() -> ModelShape {
    let layer = LayerShape { q_heads: 8, kv_heads: 4, head_dim: 64, value_dim: 64 };
    ModelShape { layers: 6, layer, hidden: 256, rope: RopePairs { rotary_dim: 64, layout: PairLayout::Half } }
}

fn fingerprint() -> String {
    kvlar_candle::llama::Llama::load(format!("{ASSETS}/tiny-llama")).unwrap().fingerprint().unwrap()
}

#[test]
fn gates_of_the_bundled_model_are_trained() {
    let check = format!("{ASSETS}/text.txt");
    let r = run(&["--check", &check]);
    let gates = r.gates();
    gates.check_model(&fingerprint(), &bundled()).unwrap();
    assert_eq!((gates.gated().count(), gates.dtype()), (6, Dtype::Bf16));
    let s = gates.shape();
    assert_eq!((s.hidden, s.kv_heads, s.group, s.gate_dim, s.sinks), (256, 4, 2, 16, 16));
    let (text, report) = (r.text(), r.report());
    // 59 tokens a window, one in a hundred held out.
    assert!(text.contains("1 of 177 tokens held out") && text.contains("177 tokens of another text"), "{text}");
    assert!(text.contains("gates.safetensors, gates.report.json"), "{text}");
    assert_eq!((&report["method"], &report["fingerprint"]), (&json!("fast-kvzip"), &json!(gates.fingerprint())));
    assert_eq!(
        (&report["windows"], &report["window"], &report["config"]["repeat"]["chunk"]),
        (&json!(3), &json!(60), &json!(40))
    );
    assert_eq!((&report["config"]["training"]["steps"], &report["config"]["training"]["dtype"]), (&json!(20), &json!("bf16")));
    for part in ["trained", "held_out", "check"] {
        let layers = report["report"][part]["layers"].as_array().unwrap();
        assert_eq!(layers.len(), 6, "{part}");
        for l in layers {
            let [loss, floor, agreement] = ["loss", "floor", "agreement"].map(|name| l[name].as_f64().unwrap());
            assert!(loss > floor && floor > 0.0 && (0.0..=1.0).contains(&agreement), "{part}: {l}");
        }
    }
    // The same input gives the same file, another seed another.
    let bytes = |r: &Run| std::fs::read(r.dir.path().join("gates.safetensors")).unwrap();
    let again = run(&["--seed", "0"]);
    assert_eq!(again.gates(), gates);
    assert_eq!(bytes(&again), bytes(&r));
    assert_eq!(again.report()["report"]["check"], Value::Null);
    assert_ne!(run(&["--seed", "1"]).gates(), gates);
}

#[test]
fn what_does_not_do_is_named() {
    run(&["--steps", "0"]).fails(&["steps: 0"]);
    run(&["--batch", "0"]).fails(&["batch: 0"]);
    run(&["--rate=-1"]).fails(&["rate: -1"]);
    run(&["--chunk", "0"]).fails(&["chunks of 0 tokens"]);
    run(&["--batch", "1000"]).fails(&["batch", "176 tokens to train on", "more text"]);
    run(&["--text", "short.txt"]).fails(&["short.txt", "tokens, a window takes 60"]);
    run(&["--check", "short.txt"]).fails(&["short.txt", "tokens, a window takes 60"]);
    run(&["--check", "nowhere.txt"]).fails(&["nowhere.txt"]);
    bare(&["--window", "1500"]).fails(&["a window of 1500 tokens: the model has room for 10", "--chunk 2000"]);
    bare(&["--window", "2"]).fails(&["a window of 2 tokens"]);
    bare(&["--text", "short.txt"]).fails(&["short.txt", "a window takes 10"]);
    for option in ["--kept", "--values", "--rounds", "--sinks", "--recent", "--subvectors", "--centroids"] {
        run(&[option, "1"]).fails(&[option, "is no option of --method fast-kvzip"]);
    }
}

#[test]
fn the_bundled_gates_are_of_the_bundled_model() {
    let gates = Gates::read(format!("{ASSETS}/tiny-llama-gates.safetensors").as_ref()).unwrap();
    gates.check_model(&fingerprint(), &bundled()).unwrap();
    assert_eq!((gates.gated().count(), gates.shape().gate_dim, gates.shape().sinks), (6, 16, 16));
}
