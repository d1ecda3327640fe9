//! Files of gates: written and read, and everything that must be refused.

use crate::common::{model, says};
use kvlar_calibrate::Error;
use kvlar_calibrate::gate::{GATE_FORMAT, Gate, GateShape, Gates};
use kvlar_reference::Dtype;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as Stored, TensorView};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

const SHAPE: GateShape = GateShape { hidden: 6, kv_heads: 2, group: 3, gate_dim: 4, sinks: 5 };

fn gates(dtype: Dtype) -> Gates {
    let gate = |seed| {
        let mut g = Gate::init(SHAPE, seed, 0).unwrap();
        g.b[1] = 0.1;
        g.k_base[3] = 0.1;
        Some(g)
    };
    Gates::new("llama-3x6-abc", dtype, vec![gate(1), None, gate(2)]).unwrap()
}

fn written(gates: &Gates) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("gates.safetensors");
    gates.write(&path).unwrap();
    (dir, path)
}

#[test]
fn every_type_is_written_and_read() {
    for (dtype, stored) in [(Dtype::Bf16, Stored::BF16), (Dtype::F16, Stored::F16), (Dtype::F32, Stored::F32)] {
        let gates = gates(dtype);
        assert_eq!(gates.layer(0).unwrap().b[1], dtype.round(0.1));
        let (dir, path) = written(&gates);
        let back = Gates::read(&path).unwrap();
        assert_eq!(back, gates);
        assert_eq!((back.fingerprint(), back.dtype(), back.shape()), ("llama-3x6-abc", dtype, SHAPE));
        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.len(), 14);
        let shape = |name: &str| (file.tensor(name).unwrap().dtype(), file.tensor(name).unwrap().shape().to_vec());
        assert_eq!(shape("layers.0.q_proj.weight"), (stored, vec![24, 6]));
        assert_eq!(shape("layers.0.q_proj.bias"), (stored, vec![24]));
        assert_eq!(shape("layers.0.k_proj.weight"), (stored, vec![8, 6]));
        assert_eq!(shape("layers.0.q_norm.weight"), (Stored::F32, vec![4]));
        assert_eq!(shape("layers.2.k_norm.weight"), (Stored::F32, vec![4]));
        assert_eq!(shape("layers.2.k_base"), (Stored::F32, vec![2, 1, 5, 4]));
        assert_eq!(shape("layers.2.b"), (stored, vec![2, 1, 3]));
        // The same gates give the same bytes, and nothing else is left in the folder.
        gates.write(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    // The arithmetic of the released gates: Qwen2.5-7B.
    let qwen = GateShape { hidden: 3584, kv_heads: 4, group: 7, gate_dim: 16, sinks: 16 };
    assert_eq!(qwen.parameters(), 1_836_540);
}

#[test]
fn gates_are_of_one_model() {
    let gates = gates(Dtype::Bf16);
    let mut shape = model(3, 6, 2, 8, 8);
    shape.hidden = 6;
    gates.check_model("llama-3x6-abc", &shape).unwrap();
    let e = gates.check_model("llama-3x6-abd", &shape);
    assert!(matches!(e, Err(Error::GatesOfOtherModel { .. })));
    says(e, &["llama-3x6-abc", "llama-3x6-abd", "fast-kvzip"]);
    says(gates.check_model("llama-3x6-abc", &model(3, 6, 2, 8, 8)), &["gates", "(3, 6, 2, 3)", "(3, 48, 2, 3)"]);
    says(gates.check_model("llama-3x6-abc", &model(2, 6, 2, 8, 8)), &["the model's are (2,"]);
}

#[test]
fn gates_that_do_not_fit_together_are_refused() {
    let gate = Gate::init(SHAPE, 0, 0).unwrap();
    let of = |layers: Vec<Option<Gate>>| Gates::new("m", Dtype::Bf16, layers);
    says(of(vec![None, None]), &["none of the 2 layers"]);
    says(of(vec![]), &["none of the 0 layers"]);
    let wider = Gate::init(GateShape { hidden: 7, ..SHAPE }, 0, 0).unwrap();
    says(of(vec![Some(gate.clone()), Some(wider)]), &["layer 1", "another shape"]);
    says(of(vec![Some(Gate { b: vec![0.0; 5], ..gate.clone() })]), &["b: expected shape [2, 1, 3]"]);
    says(of(vec![Some(Gate { k_base: vec![f32::NAN; 40], ..gate.clone() })]), &["k_base", "not finite"]);
    // Beyond the largest f16.
    let large = Gate { q_bias: vec![1e6; 24], ..gate };
    says(Gates::new("m", Dtype::F16, vec![Some(large)]), &["q_proj.bias", "not finite"]);
}

type Parts = BTreeMap<String, (Stored, Vec<usize>, Vec<u8>)>;

/// A written file, changed: its metadata without a hash, and its tensors.
fn forged(change: impl FnOnce(&mut Value, &mut Parts)) -> (tempfile::TempDir, PathBuf) {
    let (dir, path) = written(&gates(Dtype::F32));
    let bytes = std::fs::read(&path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut header: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["kvlar.gates"]).unwrap();
    assert!(header.as_object_mut().unwrap().remove("sha256").is_some());
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut parts: Parts =
        file.tensors().into_iter().map(|(n, t)| (n, (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect();
    change(&mut header, &mut parts);
    save(&path, &header.to_string(), &parts);
    (dir, path)
}

fn save(path: &Path, header: &str, parts: &Parts) {
    let views = parts.iter().map(|(n, (t, s, b))| (n.clone(), TensorView::new(*t, s.clone(), b).unwrap()));
    let metadata = HashMap::from([("kvlar.gates".to_string(), header.to_string())]);
    safetensors::serialize_to_file(views, Some(metadata), path).unwrap();
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Value, &mut Parts), words: &[&str]) {
    let (_dir, path) = forged(change);
    says(Gates::read(&path), &[&["gates.safetensors"], words].concat());
}

#[test]
fn a_file_without_a_hash_is_read() {
    let (_dir, path) = forged(|_, _| ());
    assert_eq!(Gates::read(&path).unwrap(), gates(Dtype::F32));
}

#[test]
fn unsound_files_are_refused() {
    refused(|h, _| h["format"] = json!(GATE_FORMAT + 1), &["gates of format 2, this build reads 1"]);
    refused(|h, _| *h = json!({"format": 9}), &["format 9"]);
    refused(|h, _| *h = json!({}), &["format version"]);
    refused(|h, _| h["layers"] = json!("many"), &["its metadata"]);
    refused(|h, _| h["layers"] = json!(0), &["0 layers"]);
    refused(|h, _| h["layers"] = json!(usize::MAX), &["layers, which no model has"]);
    refused(|h, _| h["layers"] = json!(2), &["layers.2.b belongs to no gate of 2 layers"]);
    refused(|h, _| h["gate_dim"] = json!(16), &["q_norm.weight has 4 numbers", "16 (gate_dim)"]);
    refused(|_, t| drop(t.remove("layers.0.b")), &["tensor layers.0.b is missing"]);
    refused(|_, t| drop(t.remove("layers.2.k_base")), &["tensor layers.2.k_base is missing"]);
    refused(|_, t| t.clear(), &["none of the 3 layers"]);
    let more = ("layers.0.c".to_string(), (Stored::F32, vec![1], vec![0; 4]));
    refused(|_, t| drop(t.insert(more.0, more.1)), &["tensor layers.0.c belongs to no gate"]);
    let shaped = |name: &'static str, shape: &'static [usize]| {
        move |_: &mut Value, t: &mut Parts| t.get_mut(name).unwrap().1 = shape.to_vec()
    };
    refused(shaped("layers.0.q_proj.weight", &[6, 24]), &["layers.0", "no heads of 4 rows"]);
    refused(shaped("layers.0.k_base", &[2, 1, 4, 5]), &["layers.0.k_base is [2, 1, 4, 5] instead of [2, 1, 4, 4]"]);
    refused(shaped("layers.0.k_base", &[40]), &["layers.0.k_base is [40]", "4 dimensions"]);
    refused(shaped("layers.2.b", &[3, 1, 2]), &["layers.2.b is [3, 1, 2] instead of [2, 1, 3]"]);
    refused(shaped("layers.2.k_proj.weight", &[4, 12]), &["layers.2"]);
    let nan = f32::NAN.to_le_bytes();
    for name in ["q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b"] {
        refused(
            |_, t| t.get_mut(&format!("layers.2.{name}")).unwrap().2[4..8].copy_from_slice(&nan),
            &[name, "NaN is not finite"],
        );
    }
    let retyped = |name: &'static str, dtype: Stored| {
        move |_: &mut Value, t: &mut Parts| {
            let part = t.get_mut(name).unwrap();
            let half = part.2.chunks(4).flat_map(|b| [b[2], b[3]]).collect();
            (part.0, part.2) = (dtype, half);
        }
    };
    refused(retyped("layers.0.b", Stored::BF16), &["layers.0.b is Bf16 instead of F32"]);
    refused(retyped("layers.0.q_norm.weight", Stored::BF16), &["layers.0.q_norm.weight is Bf16 instead of F32"]);
    refused(retyped("layers.2.q_proj.weight", Stored::BF16), &["layers.2.q_proj.weight is Bf16"]);
    refused(retyped("layers.0.q_proj.weight", Stored::I16), &["layers.0.q_proj.weight is I16"]);
}

#[test]
fn damaged_files_are_refused() {
    let (dir, path) = written(&gates(Dtype::Bf16));
    let bytes = std::fs::read(&path).unwrap();
    for length in [0, 7, 8, 60, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        says(Gates::read(&path), &["gates.safetensors", "cut off"]);
    }
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &changed).unwrap();
    says(Gates::read(&path), &["hash mismatch"]);
    let text = String::from_utf8_lossy(&bytes).replace("llama-3x6-abc", "llama-3x6-abd");
    assert!(text.contains("abd"));
    let at = bytes.windows(3).position(|w| w == b"abc").unwrap();
    changed = bytes.clone();
    changed[at + 2] = b'd';
    std::fs::write(&path, &changed).unwrap();
    says(Gates::read(&path), &["hash mismatch"]);
    // Files of something else, and none.
    let tensor = TensorView::new(Stored::F32, vec![1], &[0; 4]).unwrap();
    safetensors::serialize_to_file([("x", tensor)], None, &path).unwrap();
    says(Gates::read(&path), &["no gates", "kvlar.gates"]);
    assert!(matches!(Gates::read(&dir.path().join("nowhere")), Err(Error::File { .. })));
    assert!(matches!(gates(Dtype::Bf16).write(&dir.path().join("no/folder")), Err(Error::File { .. })));
    // A write that fails leaves nothing.
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    assert!(gates(Dtype::Bf16).write(&dir.path().join("folder")).is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}
