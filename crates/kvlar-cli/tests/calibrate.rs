//! `kvlar calibrate` from outside: a model and a text in, a plan file and a report out, errors that name what is wrong.

use kvlar_calibrate::{Budget, Grouping, Latent, Plan, Side, ValueFit, Weighting};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ASSETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets");

struct Run {
    output: Output,
    dir: tempfile::TempDir,
}

/// Runs with few short windows.
fn run(arguments: &[&str]) -> Run {
    bare(&[&["--window", "128", "--windows", "2"], arguments].concat())
}

/// Runs in a folder of its own.
fn bare(arguments: &[&str]) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvlar"));
    command.arg("calibrate").args(arguments);
    let output = command.current_dir(dir.path()).env("KVLAR_ASSETS", ASSETS).output().unwrap();
    Run { output, dir }
}

impl Run {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned() + &String::from_utf8_lossy(&self.output.stderr)
    }

    #[track_caller]
    fn plan(&self) -> Plan {
        assert!(self.output.status.success(), "{}", self.text());
        Plan::read(&self.dir.path().join("plan.safetensors")).unwrap()
    }

    fn report(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.dir.path().join("plan.report.json")).unwrap()).unwrap()
    }

    /// Exit status 1 (or `status`), a message with these words, and no file.
    #[track_caller]
    fn fails_with(&self, status: i32, words: &[&str]) {
        assert_eq!(self.output.status.code(), Some(status), "{}", self.text());
        let text = String::from_utf8_lossy(&self.output.stderr).into_owned();
        for w in words {
            assert!(text.contains(w), "{text:?} does not say {w:?}");
        }
        let files: Vec<PathBuf> = std::fs::read_dir(self.dir.path()).unwrap().map(|f| f.unwrap().path()).collect();
        let left: Vec<&PathBuf> = files.iter().filter(|f| f.to_string_lossy().contains("plan")).collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    #[track_caller]
    fn fails(&self, words: &[&str]) {
        self.fails_with(1, words);
    }
}

/// Bytes of the plan's rows over those of the 16-bit cache.
fn kept(plan: &Plan) -> f64 {
    plan.bytes_per_token() / plan.dense_bytes_per_token()
}

fn ranks(plan: &Plan) -> Vec<[usize; 2]> {
    let rank = |s: &Side, full: usize| s.factors().map_or(full, |f| f.rank);
    plan.layers.iter().map(|l| [rank(&l.keys, 128), rank(&l.values, 128)]).collect()
}

#[test]
fn the_bundled_model_is_calibrated() {
    let r = run(&["--kept", "0.5"]);
    let plan = r.plan();
    assert_eq!((plan.method.as_str(), plan.layers.len()), ("recalkv", 6));
    assert!(plan.fingerprint.starts_with("llama-6x256-"), "{}", plan.fingerprint);
    let shape = plan.model;
    assert_eq!((shape.layers, shape.hidden, shape.rope.rotary_dim), (6, 256, 64));
    assert_eq!((shape.layer.q_heads, shape.layer.kv_heads, shape.layer.head_dim, shape.layer.value_dim), (8, 4, 64, 64));
    // Groups of two heads of 64: half of the bytes is rank 64 exactly.
    assert_eq!(ranks(&plan), [[64, 64]; 6]);
    assert_eq!(kept(&plan), 0.5);
    for layer in &plan.layers {
        for side in [&layer.keys, &layer.values] {
            let f = side.factors().unwrap();
            let mut heads: Vec<usize> = f.groups.iter().flatten().copied().collect();
            heads.sort_unstable();
            assert_eq!(heads, [0, 1, 2, 3]);
            assert!(f.groups.iter().all(|g| g.len() == 2));
            assert!(f.basis.iter().any(|x| *x != 0.0));
        }
    }
    let text = r.text();
    assert!(text.contains("256 calibration tokens") && text.contains("plan.safetensors, plan.report.json"), "{text}");
    let report = r.report();
    assert_eq!(report["fingerprint"], json!(plan.fingerprint));
    assert_eq!((&report["windows"], &report["window"]), (&json!(2), &json!(128)));
    assert_eq!(report["report"]["kept"], json!(0.5));
    let layers = report["report"]["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 6);
    for layer in layers {
        for side in ["keys", "values"] {
            let lost = layer[side]["discarded"].as_f64().unwrap();
            assert!(lost > 0.0 && lost < 0.5, "{side}: {lost}");
        }
    }
}

#[test]
fn the_bytes_kept_are_those_asked_for_within_rounding() {
    for (budget, asked) in [("uniform", "0.3"), ("fisher", "0.5"), ("spectral", "0.4")] {
        let plan = run(&["--kept", asked, "--budget", budget]).plan();
        // Ranks are multiples of 32 of 128: half a step at most, each way; what the spectral budget cannot spend is less
        // than a step of one of the 12 sides.
        let asked: f64 = asked.parse().unwrap();
        let slack = if budget == "spectral" { 0.25 / 12.0 } else { 0.125 };
        assert!((kept(&plan) - asked).abs() <= slack + 1e-9, "{budget}: {} of {asked}", kept(&plan));
        assert!(ranks(&plan).iter().flatten().all(|r| r.is_multiple_of(32)));
        let same = ranks(&plan).iter().all(|r| *r == ranks(&plan)[0]);
        assert_eq!(same, budget == "uniform", "{budget}: {:?}", ranks(&plan));
    }
}

#[test]
fn settings_reach_the_plan() {
    let plan = run(&[
        "--group-keys",
        "4",
        "--group-values",
        "1",
        "--grouping",
        "greedy",
        "--weighting",
        "none",
        "--latent",
        "int8",
        "--values",
        "alternating",
        "--rounds",
        "3",
        "--multiple",
        "16",
        "--center",
        "--no-hadamard",
        "--sinks",
        "7",
        "--recent",
        "33",
        "--kept",
        "0.25",
    ])
    .plan();
    let c = &plan.config;
    assert_eq!((c.key_group, c.value_group, c.grouping, c.multiple), (4, 1, Grouping::Greedy, 16));
    assert_eq!((c.weighting_keys, c.weighting_values), (Weighting::None, Weighting::None));
    assert_eq!((c.latent_keys, c.latent_values), (Latent::Int8, Latent::Int8));
    assert_eq!(c.values, ValueFit::Alternating { rounds: 3 });
    assert!(c.center && !c.hadamard);
    assert_eq!((plan.sink_rows, plan.recent_rows), (7, 33));
    for layer in &plan.layers {
        let (k, v) = (layer.keys.factors().unwrap(), layer.values.factors().unwrap());
        assert_eq!((k.groups.len(), v.groups.len()), (1, 4));
        assert!(k.mean.is_some() && v.mean.is_none());
        assert_eq!((k.latent, v.latent), (Latent::Int8, Latent::Int8));
    }
    let plan = run(&["--weighting", "output", "--shards", "2", "--grouping", "natural", "--values", "svd"]).plan();
    assert_eq!((plan.config.weighting_keys, plan.config.weighting_values), (Weighting::None, Weighting::Output));
    assert_eq!((plan.config.values, plan.config.shards), (ValueFit::WeightSvd, 2));
    for layer in &plan.layers {
        assert_eq!(layer.keys.factors().unwrap().groups, [[0, 1], [2, 3]]);
    }
}

#[test]
fn presets_are_settings_by_name() {
    for (name, latent, group) in [("speed", Latent::Model, 2), ("quality", Latent::Int8, 2), ("capacity", Latent::Int8, 4)] {
        let plan = run(&["--preset", name]).plan();
        let c = &plan.config;
        assert_eq!((c.latent_keys, c.latent_values, c.key_group, c.value_group), (latent, latent, group, group), "{name}");
        let Budget::Fixed { keys, values } = c.budget else { panic!("{name}: {:?}", c.budget) };
        for layer in &plan.layers {
            assert_eq!(layer.keys.factors().unwrap().rank, keys.next_multiple_of(32), "{name}");
            assert_eq!(layer.values.factors().unwrap().rank, values.next_multiple_of(32), "{name}");
        }
    }
    run(&["--preset", "speed", "--kept", "0.5"]).fails_with(2, &["--preset", "--kept"]);
    // Four kv heads in two shards: no group of four.
    let plan = run(&["--preset", "capacity", "--shards", "2"]).plan();
    assert_eq!((plan.config.key_group, plan.config.value_group, plan.config.shards), (2, 2, 2));
    for groups in plan.layers.iter().flat_map(|l| [&l.keys, &l.values]).map(|s| &s.factors().unwrap().groups) {
        assert!(groups.iter().all(|g| g.iter().all(|h| h / 2 == g[0] / 2)), "{groups:?}");
    }
    run(&["--preset", "capacity", "--shards", "3"]).fails(&["shards", "3 does not divide 4"]);
    run(&["--preset", "speed", "--shards", "0"]).fails(&["shards"]);
}

#[test]
fn every_plan_has_a_report_of_its_own() {
    let r = run(&["--out", "plan.v1"]);
    assert!(r.output.status.success(), "{}", r.text());
    let path = |name: &str| r.dir.path().join(name);
    assert!(path("plan.v1").exists() && path("plan.v1.report.json").exists() && !path("plan.report.json").exists());
    assert!(r.text().contains("plan.v1, plan.v1.report.json"), "{}", r.text());
    // A report that cannot be written leaves no part of one.
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("plan.report.json")).unwrap();
    let out = dir.path().join("plan.safetensors");
    let r = run(&["--out", out.to_str().unwrap()]);
    assert_eq!(r.output.status.code(), Some(1));
    let mut left: Vec<String> =
        std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, ["plan.report.json", "plan.safetensors"]);
}

#[test]
fn the_same_input_gives_the_same_file() {
    let bytes = |r: &Run| std::fs::read(r.dir.path().join("plan.safetensors")).unwrap();
    let (a, b) = (run(&[]), run(&[]));
    assert_eq!(a.plan(), b.plan());
    assert_eq!(bytes(&a), bytes(&b));
}

/// Writes a text file and runs on it.
fn on(text: &str, more: &[&str]) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("given.txt");
    std::fs::write(&path, text).unwrap();
    run(&[&["--text", path.to_str().unwrap()], more].concat())
}

#[test]
fn texts_that_do_not_do_are_named() {
    on("", &[]).fails(&["given.txt", "the text is empty"]);
    on(" \n\n", &[]).fails(&["given.txt", "the text is empty"]);
    on("too short", &[]).fails(&["given.txt", "tokens, a window takes 128"]);
    run(&["--text", "nowhere.txt"]).fails(&["nowhere.txt"]);
    bare(&["--window", "1"]).fails(&["a window of 1 tokens: the model takes 3 to 2048"]);
    bare(&["--window", "4096"]).fails(&["a window of 4096 tokens"]);
    bare(&["--windows", "0"]).fails(&["--windows 0", "at least one window"]);
}

#[test]
fn settings_that_do_not_do_are_named() {
    run(&["--method", "magic"]).fails(&["no method \"magic\"", "recalkv"]);
    for bad in ["0", "-0.5", "1.01", "nan", "inf"] {
        run(&[&format!("--kept={bad}")]).fails(&["kept", "outside (0, 1]"]);
    }
    run(&["--kept", "half"]).fails_with(2, &["--kept", "half"]);
    run(&["--group-keys", "3"]).fails(&["key_group", "3 does not divide the 4 kv heads"]);
    run(&["--group-values", "8"]).fails(&["value_group", "8 does not divide the 4 kv heads"]);
    run(&["--group-keys", "4", "--shards", "2"]).fails(&["key_group", "4 does not divide the 2 kv heads of a shard"]);
    run(&["--shards", "3"]).fails(&["shards", "3 does not divide 4 kv heads"]);
    run(&["--shards", "0"]).fails(&["shards"]);
    run(&["--multiple", "0"]).fails(&["multiple"]);
    run(&["--multiple", "18446744073709551615"]).fails(&["multiple", "no step"]);
    run(&["--weighting", "none,query"]).fails(&["--weighting"]);
    run(&["--budget", "generous"]).fails_with(2, &["--budget", "generous"]);
}

#[test]
fn places_that_do_not_do_are_named_before_the_work() {
    run(&["--out", "plans/here/x.safetensors"]).fails(&["plans/here", "no such folder"]);
    run(&["--out", "."]).fails(&["--out is a file"]);
    run(&["--model", "nowhere"]).fails(&["--model needs --text"]);
    run(&["--model", "nowhere", "--text", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")]).fails(&["nowhere/config.json"]);
}

/// A copy of the bundled model, one number of one tensor changed.
fn spoilt(tensor: &str, value: half::bf16) -> tempfile::TempDir {
    let (from, to) = (Path::new(ASSETS).join("tiny-llama"), tempfile::tempdir().unwrap());
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(from.join(name), to.path().join(name)).unwrap();
    }
    let mut bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let at = stored.tensor(tensor).unwrap().data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    std::fs::write(to.path().join("model.safetensors"), bytes).unwrap();
    to
}

#[test]
fn activations_that_are_not_finite_are_named() {
    let text = format!("{ASSETS}/calibration.txt");
    let calibrate = |dir: &tempfile::TempDir, more: &[&str]| {
        run(&[&["--model", dir.path().to_str().unwrap(), "--text", &text], more].concat())
    };
    let values = spoilt("model.layers.3.self_attn.v_proj.weight", half::bf16::NAN);
    calibrate(&values, &[]).fails(&["window 0", "layer 3", "v: row 0", "NaN"]);
    let keys = spoilt("model.layers.5.self_attn.k_proj.weight", half::bf16::INFINITY);
    calibrate(&keys, &["--budget", "fisher"]).fails(&["window 0", "layer 5", "k: row 0"]);
    // What no layer's activations show, the loss does.
    let last = spoilt("model.layers.5.self_attn.o_proj.weight", half::bf16::NAN);
    calibrate(&last, &["--budget", "fisher"]).fails(&["window 0", "the loss is NaN"]);
}

#[test]
fn a_plan_is_for_one_model() {
    let other = spoilt("model.layers.3.self_attn.v_proj.weight", half::bf16::ONE);
    let text = format!("{ASSETS}/calibration.txt");
    let theirs = run(&["--model", other.path().to_str().unwrap(), "--text", &text]).plan();
    let ours = run(&[]).plan();
    assert_ne!(ours.fingerprint, theirs.fingerprint);
    let e = ours.check_model(&theirs.fingerprint).unwrap_err().to_string();
    assert!(e.contains(&ours.fingerprint) && e.contains(&theirs.fingerprint), "{e}");
}
