//! `kvlar calibrate` from outside: a model and a text in, a plan file and a report out, errors that name what is wrong.

use kvlar_calibrate::{Budget, FitConfig, Grouping, Latent, Plan, QuantizedCodec, Side, ValueFit, Weighting};
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
    let c = plan.config.recalkv().unwrap();
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
    let c = plan.config.recalkv().unwrap();
    assert_eq!((c.weighting_keys, c.weighting_values), (Weighting::None, Weighting::Output));
    assert_eq!((c.values, c.shards), (ValueFit::WeightSvd, 2));
    for layer in &plan.layers {
        assert_eq!(layer.keys.factors().unwrap().groups, [[0, 1], [2, 3]]);
    }
}

#[test]
fn presets_are_settings_by_name() {
    for (name, latent, group) in [("speed", Latent::Model, 2), ("quality", Latent::Int8, 2), ("capacity", Latent::Int8, 4)] {
        let plan = run(&["--preset", name]).plan();
        let c = plan.config.recalkv().unwrap();
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
    let c = plan.config.recalkv().unwrap();
    assert_eq!((c.key_group, c.value_group, c.shards), (2, 2, 2));
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
fn keys_are_product_quantized() {
    let settings = ["--method", "pq", "--subvectors", "8", "--centroids", "16", "--rounds", "4"];
    let r = run(&[&settings[..], &["--values", "int4+hadamard", "--sinks", "2", "--recent", "5"]].concat());
    let plan = r.plan();
    assert_eq!((plan.method.as_str(), plan.sink_rows, plan.recent_rows), ("pq", 2, 5));
    let FitConfig::Pq(c) = &plan.config else { panic!("{:?}", plan.config) };
    assert_eq!((c.subvectors, c.centroids, c.rounds, c.seed, c.rows), (8, 16, 4, 0, 64 * 16));
    for layer in &plan.layers {
        let (k, v) = (layer.keys.quantized().unwrap(), layer.values.quantized().unwrap());
        assert_eq!(k.format, QuantizedCodec::Pq { subvectors: 8, centroids: 16 }.into());
        assert_eq!(k.codebooks.as_ref().unwrap().len(), 4 * 16 * 64);
        assert_eq!(v.format.to_string(), "int4+hadamard");
    }
    // 4 heads of 8 bytes, padded to 16, and of 32 bytes with a scale and a zero.
    assert_eq!(plan.layer_bytes_per_token(0), 4 * (16 + 36));
    assert_eq!(plan.fixed_bytes(), 6 * 4 * 4 * 16 * 64);
    let (text, report) = (r.text(), r.report());
    assert!(text.contains("256 calibration tokens, 256 fitted to") && text.contains("codebooks 0.10 MB"), "{text}");
    assert_eq!((&report["method"], &report["fingerprint"]), (&json!("pq"), &json!(plan.fingerprint)));
    assert_eq!(report["config"]["values"]["hadamard"], json!(true));
    for layer in report["report"]["layers"].as_array().unwrap() {
        assert_eq!(layer["heads"].as_array().unwrap().len(), 4);
        let lost = layer["error"].as_f64().unwrap();
        assert!((0.02..0.7).contains(&lost), "{lost}");
    }
    // The same input gives the same file, another seed another; more centroids lose less.
    let bytes = |r: &Run| std::fs::read(r.dir.path().join("plan.safetensors")).unwrap();
    let (a, b) = (run(&settings), run(&[&settings[..], &["--seed", "0", "--values", "int4"]].concat()));
    assert_eq!(bytes(&a), bytes(&b));
    let other = run(&[&settings[..], &["--seed", "1", "--values", "dense"]].concat());
    assert_ne!(a.plan().layers[0].keys, other.plan().layers[0].keys);
    assert!(other.plan().layers.iter().all(|l| l.values == Side::Dense));
    let more = run(&["--method", "pq", "--subvectors", "8", "--centroids", "64", "--rounds", "4"]);
    let lost = |r: &Run| r.report()["report"]["layers"][3]["error"].as_f64().unwrap();
    assert!(lost(&more) < 0.9 * lost(&a), "{} and {}", lost(&more), lost(&a));
}

/// Codebooks are of keys as a cache holds them: rotated to their positions.
#[test]
fn codebooks_are_of_keys_after_rope() {
    let r = run(&["--method", "pq", "--subvectors", "32", "--centroids", "256", "--rounds", "0"]);
    let books = r.plan().layers[2].keys.quantized().unwrap().codebooks.clone().unwrap();
    // 256 rows and as many centroids, no rounds: each pair of dimensions of each row is a centroid.
    let model = kvlar_candle::llama::Llama::load(format!("{ASSETS}/tiny-llama")).unwrap();
    let text = std::fs::read_to_string(format!("{ASSETS}/calibration.txt")).unwrap();
    let bos: Vec<u32> = model.config().bos.into_iter().collect();
    let tokens = model.encode(&text).unwrap();
    let window: Vec<u32> = bos.iter().chain(&tokens[..128 - bos.len()]).copied().collect();
    let mut seen = 0;
    let observe = |layer: usize, _: &[f32], k: &[f32], _: &[f32]| {
        for (i, key) in k.chunks(64).enumerate().filter(|_| layer == 2) {
            let (t, head) = (i / 4, i % 4);
            let rotated = model.config().rope.rotate(key, t as i64);
            for (m, pair) in rotated.chunks(2).enumerate() {
                let own = &books[(head * 32 + m) * 512..][..512];
                assert!(own.chunks(2).any(|c| (c[0] - pair[0]).abs() + (c[1] - pair[1]).abs() < 1e-4), "token {t}, head {head}");
            }
            seen += 1;
        }
        Ok(())
    };
    model.capture(&window, observe).unwrap();
    assert_eq!(seen, 128 * 4);
}

#[test]
fn settings_of_product_quantization_that_do_not_do_are_named() {
    let pq = |more: &[&str]| run(&[&["--method", "pq"], more].concat());
    pq(&["--subvectors", "5"]).fails(&["m: 5 sub-vectors do not divide 64"]);
    pq(&["--subvectors", "0"]).fails(&["m: 0"]);
    pq(&["--centroids", "0"]).fails(&["c: 0 centroids", "1 to 256"]);
    pq(&["--centroids", "257"]).fails(&["c: 257 centroids"]);
    pq(&["--values", "svd"]).fails(&["--values", "\"svd\"", "int4-channel", "dense"]);
    pq(&["--values", "pq"]).fails(&["--values", "\"pq\""]);
    let few = ["--method", "pq", "--window", "100", "--windows", "2"];
    bare(&few).fails(&["rows: 200 rows of layer 0 for 256 centroids", "more text"]);
    // Options of the other method.
    pq(&["--kept", "0.5"]).fails(&["--kept is no option of --method pq"]);
    pq(&["--preset", "speed"]).fails(&["--preset is no option"]);
    pq(&["--weighting", "none"]).fails(&["--weighting is no option"]);
    pq(&["--int8-basis"]).fails(&["--int8-basis is no option"]);
    run(&["--subvectors", "8"]).fails(&["--subvectors is no option of --method recalkv"]);
    run(&["--seed", "8"]).fails(&["--seed is no option"]);
    run(&["--steps", "8"]).fails(&["--steps is no option of --method recalkv"]);
    pq(&["--check", "x"]).fails(&["--check is no option of --method pq"]);
    run(&["--values", "int4"]).fails(&["--values \"int4\"", "svd, alternating or closed"]);
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
    run(&["--method", "magic"]).fails(&["no method \"magic\"", "recalkv, pq, fast-kvzip"]);
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
    calibrate(&keys, &["--method", "pq"]).fails(&["window 0", "layer 5", "k: row 0"]);
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
