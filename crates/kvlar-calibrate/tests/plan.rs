//! Plan files: round trips, and everything that must be refused.

use crate::common::{model, says};
use kvlar_calibrate::{Error, Factors, FitConfig, Latent, LayerPlan, PLAN_FORMAT, Plan, RecalkvConfig, Side};
use kvlar_reference::testing::Rng;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

fn factors(rng: &mut Rng, groups: Vec<Vec<usize>>, dim: usize, rank: usize, latent: Latent, mean: bool) -> Factors {
    let heads = groups.iter().map(Vec::len).sum::<usize>();
    Factors {
        rank,
        basis: rng.normals(heads * dim * rank, 1.0),
        encoder: rng.normals(heads * dim * rank, 1.0),
        mean: mean.then(|| rng.normals(heads * dim, 1.0)),
        groups,
        latent,
    }
}

fn plan(seed: u64) -> Plan {
    let mut rng = Rng::new(seed);
    let keys = factors(&mut rng, vec![vec![0, 2], vec![3, 1]], 8, 4, Latent::Model, true);
    let values = factors(&mut rng, vec![vec![0, 1, 2, 3]], 6, 20, Latent::Int8, false);
    Plan {
        format: PLAN_FORMAT,
        method: "recalkv".into(),
        fingerprint: "abc".into(),
        model: model(2, 8, 4, 8, 6),
        config: RecalkvConfig { kept: 0.1 + 0.2, multiple: 4, ..RecalkvConfig::default() }.into(),
        sink_rows: 4,
        recent_rows: 16,
        layers: vec![
            LayerPlan { keys: Side::LowRank(keys), values: Side::LowRank(values) },
            LayerPlan { keys: Side::Dense, values: Side::Dense },
        ],
    }
}

pub fn written(plan: &Plan) -> (tempfile::TempDir, std::path::PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plan.safetensors");
    plan.write(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    (dir, path, bytes)
}

fn files(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn what_is_written_is_read_and_the_bytes_are_always_the_same() {
    for seed in 0..3 {
        let plan = plan(seed);
        let (dir, path, bytes) = written(&plan);
        assert_eq!(Plan::read(&path).unwrap(), plan);
        assert_eq!(written(&plan).2, bytes);
        // Over an older file, and nothing beside it.
        plan.write(&path).unwrap();
        assert_eq!(files(dir.path()), ["plan.safetensors"]);
        plan.check_model("abc").unwrap();
        says(plan.check_model("xyz"), &["abc", "xyz", "model"]);
    }
}

#[test]
fn bytes_count_scales_and_bases() {
    let plan = plan(0);
    // Keys: 2 groups × 4 × 2 bytes. Values: 1 group × (20 + 4). The other layer: 4 × (8 + 6) × 2.
    assert_eq!(plan.layer_bytes_per_token(0), 16 + 24);
    assert_eq!(plan.bytes_per_token(), 40.0 + 112.0);
    assert_eq!(plan.dense_bytes_per_token(), 224.0);
    assert_eq!(plan.fixed_bytes(), 2 * 2 * (4 * 8 * 4) + 4 * 32 + 2 * 2 * (4 * 6 * 20));
    // The low-rank layer: latents of all but 4 sinks, 20 rows as they are. The dense layer has no second copy.
    let bytes = 96.0 * 40.0 + 20.0 * 112.0 + 100.0 * 112.0 + plan.fixed_bytes() as f64;
    assert!((plan.kept(100) - bytes / (100.0 * 224.0)).abs() < 1e-12);
    // An 8-bit key basis: a byte a number, and a scale for each of 32 / 2 pairs of a head.
    let mut int8 = plan.clone();
    recalkv(&mut int8).key_basis = kvlar_calibrate::KeyBasis::Int8;
    assert_eq!(int8.fixed_bytes(), plan.fixed_bytes() - 4 * 8 * 4 + 4 * 4 * 16);
}

/// Caches keep such keys as latents of full rank, padded to 32, which the identity makes and unmakes.
#[test]
fn dense_keys_beside_latents_count_their_identity() {
    let mut plan = plan(0);
    let bytes = plan.fixed_bytes();
    plan.layers[1].values = plan.layers[0].values.clone();
    // 4 heads of 8 numbers, as 32; values as in the other layer.
    assert_eq!(plan.layer_bytes_per_token(1), 4 * 32 * 2 + 24);
    assert_eq!(plan.fixed_bytes() - bytes, 2 * 2 * (4 * 6 * 20) + 2 * (4 * 8 * 32 + 4 * 8 * 8));
    let expected = 96.0 * (40.0 + 280.0) + 2.0 * 20.0 * 112.0 + plan.fixed_bytes() as f64;
    assert!((plan.kept(100) - expected / (100.0 * 224.0)).abs() < 1e-12);
    // An 8-bit key basis is of low-rank keys alone.
    let before = plan.fixed_bytes();
    recalkv(&mut plan).key_basis = kvlar_calibrate::KeyBasis::Int8;
    assert_eq!(plan.fixed_bytes(), before - 4 * 8 * 4 + 4 * 4 * 16);
    // The other way round nothing is added: values are read as they are.
    plan.layers[1] = LayerPlan { keys: plan.layers[0].keys.clone(), values: Side::Dense };
    assert_eq!(plan.layer_bytes_per_token(1), 16 + 4 * 6 * 2);
    // Ranks padded beyond the rows, of 16 numbers a group: the padding is decoded, but nothing is encoded to it.
    let mut rng = Rng::new(7);
    plan.layers[1].keys = Side::LowRank(factors(&mut rng, vec![vec![0, 2], vec![3, 1]], 8, 20, Latent::Int8, false));
    assert_eq!(plan.layers[1].keys.factors().unwrap().fixed_bytes(), 2 * (4 * 8 * 20 + 2 * 16 * 16));
}

#[test]
fn encoding_and_decoding_use_the_order_of_the_group() {
    let plan = plan(1);
    let Side::LowRank(f) = &plan.layers[0].keys else { panic!("dense") };
    assert_eq!((f.group_of(), f.heads(), f.dim()), (vec![0, 1, 0, 1], 4, 8));
    let y = Rng::new(2).normals(3 * 32, 1.0);
    let z = f.encode(&y);
    assert_eq!(z.len(), 3 * 2 * 4);
    // Group 1 is heads 3, 1: columns 0..8 of its encoder are head 3.
    let e = &f.encoder[4 * 16..];
    let expected: f64 = (0..8).map(|i| f64::from(e[i] * y[32 + 24 + i]) + f64::from(e[8 + i] * y[32 + 8 + i])).sum();
    assert!((z[8 + 4] - expected).abs() < 1e-5);
    let back = f.decode(&z);
    let mean = f.mean.as_ref().unwrap();
    let expected = f64::from(mean[8 + 5]) + (0..4).map(|c| f64::from(f.basis[(8 + 5) * 4 + c]) * z[8 + 4 + c]).sum::<f64>();
    assert!((back[32 + 8 + 5] - expected).abs() < 1e-12);
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    let (dir, path, bytes) = written(&plan(0));
    for keep in (0..bytes.len()).step_by(61).chain([7, 8, 9, bytes.len() - 1]) {
        std::fs::write(&path, &bytes[..keep]).unwrap();
        let e = Plan::read(&path).unwrap_err();
        assert!(matches!(e, Error::Plan { .. }), "{keep} bytes: {e}");
    }
    assert!(matches!(Plan::read(&dir.path().join("none")).unwrap_err(), Error::File { .. }));
    assert!(matches!(Plan::read(dir.path()).unwrap_err(), Error::File { .. }));
}

#[test]
fn a_changed_byte_anywhere_is_noticed() {
    let (_dir, path, bytes) = written(&plan(0));
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for at in (0..bytes.len()).step_by(37).chain([8 + length, bytes.len() - 1]) {
        for flip in [1u8, 0x20] {
            let mut broken = bytes.clone();
            broken[at] ^= flip;
            std::fs::write(&path, &broken).unwrap();
            let result = Plan::read(&path);
            // Padding after the header is the one place that says nothing.
            assert!(result.is_err() || bytes[at] == b' ', "byte {at} of {} changed unnoticed", bytes.len());
        }
    }
    let mut broken = bytes.clone();
    let last = broken.len() - 1;
    broken[last] ^= 1;
    std::fs::write(&path, broken).unwrap();
    says(Plan::read(&path), &["hash mismatch", "plan.safetensors"]);
}

/// The plan's file with a text of its metadata replaced; the header is padded to its old length or grows.
fn replaced(bytes: &[u8], from: &str, to: &str) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
    assert!(header.contains(from), "{header}");
    let header = header.replacen(from, to, 1);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &bytes[8 + length..]].concat()
}

#[test]
fn other_versions_and_other_files_are_named() {
    let (_dir, path, bytes) = written(&plan(0));
    std::fs::write(&path, replaced(&bytes, r#"\"format\":2"#, r#"\"format\":999"#)).unwrap();
    assert!(matches!(Plan::read(&path), Err(Error::Version { found: 999, known: PLAN_FORMAT, .. })));
    says(Plan::read(&path), &["999", "reads 2", "plan.safetensors"]);
    std::fs::write(&path, replaced(&bytes, r#"\"format\":2"#, r#"\"farmat\":2"#)).unwrap();
    says(Plan::read(&path), &["format version"]);
    std::fs::write(&path, replaced(&bytes, "kvlar.plan", "kvlar.plum")).unwrap();
    says(Plan::read(&path), &["not a plan", "kvlar calibrate"]);
    std::fs::write(&path, "some text that is long enough for a header").unwrap();
    says(Plan::read(&path), &["not a safetensors file"]);
}

fn keys(plan: &mut Plan) -> &mut Factors {
    match &mut plan.layers[0].keys {
        Side::LowRank(f) => f,
        _ => panic!("not low rank"),
    }
}

fn recalkv(plan: &mut Plan) -> &mut RecalkvConfig {
    match &mut plan.config {
        FitConfig::Recalkv(config) => config,
        other => panic!("{other:?}"),
    }
}

#[test]
fn plans_that_do_not_fit_together_are_not_written() {
    type Edit = fn(&mut Plan);
    let cases: &[(Edit, &[&str])] = &[
        (|p| p.format = 3, &["format 3"]),
        (|p| p.layers.truncate(1), &["1 layers", "2"]),
        (|p| keys(p).groups[0] = vec![0, 0], &["layer 0, keys", "kv head 0 is in two groups"]),
        (|p| keys(p).groups[0] = vec![0, 9], &["kv head 9"]),
        (|p| keys(p).groups = vec![vec![0, 2], vec![3]], &["kv head 1 is in no group"]),
        (|p| keys(p).groups = vec![vec![0, 2, 1], vec![3]], &["different sizes"]),
        (|p| keys(p).groups.clear(), &["kv head 0 is in no group"]),
        (|p| keys(p).rank = 20, &["rank 20", "1..=16"]),
        (|p| keys(p).rank = 0, &["rank 0"]),
        (|p| keys(p).rank = 8, &["basis", "128 numbers instead of 256"]),
        (|p| keys(p).encoder.truncate(127), &["encoder", "127"]),
        (|p| keys(p).basis[7] = f32::NAN, &["basis holds NaN (number 7)"]),
        (|p| keys(p).mean = Some(vec![f32::INFINITY; 32]), &["mean holds inf"]),
        (|p| keys(p).mean = Some(vec![0.0; 3]), &["mean", "3 numbers"]),
        (|p| p.model.layer.kv_heads = 3, &["kv heads do not divide"]),
        (|p| recalkv(p).multiple = 0, &["multiple", "0 is no step"]),
        (|p| recalkv(p).multiple = usize::MAX, &["multiple"]),
    ];
    for (edit, words) in cases {
        let mut plan = plan(3);
        edit(&mut plan);
        let dir = tempfile::tempdir().unwrap();
        says(plan.write(&dir.path().join("p")), words);
        assert!(files(dir.path()).is_empty());
    }
}

pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// The file with its description and tensors edited and a hash that is right again: what only a program would write.
pub fn forged(bytes: &[u8], edit: impl Fn(&mut Value, &mut Tensors)) -> Vec<u8> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).unwrap();
    let mut envelope: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["kvlar.plan"]).unwrap();
    let mut plan: Value = serde_json::from_str(envelope["plan"].as_str().unwrap()).unwrap();
    let file = SafeTensors::deserialize(bytes).unwrap();
    let mut tensors: Tensors = file.tensors().into_iter().map(|(n, t)| (n, (t.shape().to_vec(), t.data().to_vec()))).collect();
    edit(&mut plan, &mut tensors);
    let text = plan.to_string();
    let mut sha = Sha256::new();
    let mut field = |bytes: &[u8]| {
        sha.update((bytes.len() as u64).to_le_bytes());
        sha.update(bytes);
    };
    field(text.as_bytes());
    for (name, (shape, bytes)) in &tensors {
        field(name.as_bytes());
        shape.iter().for_each(|n| field(&(*n as u64).to_le_bytes()));
        field(bytes);
    }
    envelope["sha256"] = sha.finalize().iter().map(|b| format!("{b:02x}")).collect::<String>().into();
    envelope["plan"] = text.into();
    let views = tensors.iter().map(|(n, (s, b))| (n.clone(), TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    safetensors::serialize(views, Some(HashMap::from([("kvlar.plan".into(), envelope.to_string())]))).unwrap()
}

#[test]
fn sound_files_of_unsound_plans_are_refused() {
    let (_dir, path, bytes) = written(&plan(0));
    let of = |p: &mut Value| p["layers"][0]["keys"]["LowRank"].take();
    type Edit<'a> = &'a dyn Fn(&mut Value, &mut Tensors);
    let set = |key: &'static str, value: Value| {
        move |p: &mut Value, _: &mut Tensors| p["layers"][0]["keys"]["LowRank"][key] = value.clone()
    };
    let cases: &[(Edit<'_>, &[&str])] = &[
        (&set("groups", serde_json::json!([[0, 2], [3, 3]])), &["layers.0.keys", "kv head 3 is in two groups"]),
        (&set("groups", serde_json::json!([[0, 2]])), &["kv head 1 is in no group"]),
        (&set("groups", serde_json::json!([[], [0, 1, 2, 3]])), &["different sizes"]),
        (&set("rank", 20.into()), &["rank 20", "1..=16"]),
        (&set("rank", 8.into()), &["basis", "[4, 8, 4] instead of [4, 8, 8]"]),
        (&set("mean", false.into()), &["layers.0.keys.mean belongs to no layer"]),
        (&set("latent", "int7".into()), &["int7"]),
        (&|p, _| drop(of(p)), &["description"]),
        (&|p, _| p["model"]["layers"] = 3.into(), &["2 layers", "3"]),
        (&|p, _| p["config"]["recalkv"]["multiple"] = u64::MAX.into(), &["multiple"]),
        (&|p, _| p["config"]["recalkv"]["multiple"] = 65537.into(), &["multiple", "65537 is no step"]),
        (&|p, _| p["config"]["recalkv"]["multiple"] = 0.into(), &["multiple", "0 is no step"]),
        (&|p, _| p["model"]["layer"]["kv_heads"] = (1u64 << 40).into(), &["size above"]),
        (&|_, t| drop(t.remove("layers.0.values.encoder")), &["layers.0.values.encoder is missing"]),
        (
            &|_, t| t.get_mut("layers.0.keys.encoder").unwrap().0 = vec![2, 16, 4],
            &["encoder", "[2, 16, 4] instead of [2, 4, 16]"],
        ),
        (&|_, t| t.get_mut("layers.0.keys.basis").unwrap().1[..4].copy_from_slice(&f32::NAN.to_le_bytes()), &["basis holds NaN"]),
        (&|_, t| drop(t.insert("more".into(), (vec![1], vec![0; 4]))), &["more belongs to no layer"]),
    ];
    std::fs::write(&path, forged(&bytes, |_, _| ())).unwrap();
    assert_eq!(Plan::read(&path).unwrap(), plan(0), "the forgery itself is at fault");
    for (edit, words) in cases {
        std::fs::write(&path, forged(&bytes, edit)).unwrap();
        says(Plan::read(&path), words);
    }
}

#[test]
fn a_write_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("no such folder").join("plan.safetensors");
    let e = plan(0).write(&path).unwrap_err();
    assert!(matches!(e, Error::File { .. }) && e.to_string().contains("no such folder"), "{e}");
    assert!(files(dir.path()).is_empty());
    // A folder in the place of the file: the part is cleaned up.
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    assert!(plan(0).write(&folder).is_err());
    assert_eq!(files(dir.path()), ["folder"]);
    assert!(plan(0).write(Path::new("/")).is_err());
}
