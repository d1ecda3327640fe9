//! Quantized sides in plan files: every format written and read, and everything that must be refused.

use crate::common::{model, says};
use crate::plan::{Tensors, forged, written};
use kvlar_calibrate::{FitConfig, LayerPlan, PLAN_FORMAT, Plan, Quantized, QuantizedCodec, QuantizedFormat, RecalkvConfig, Side};
use kvlar_reference::testing::Rng;
use serde_json::{Value, json};

const HEADS: usize = 4;
const DIM: usize = 8;

fn pq(seed: u64, subvectors: usize, centroids: usize) -> Side {
    let format = QuantizedCodec::Pq { subvectors, centroids }.into();
    Side::Quantized(Quantized { format, codebooks: Some(Rng::new(seed).normals(HEADS * centroids * DIM, 1.0)) })
}

fn side(format: impl Into<QuantizedFormat>) -> Side {
    Side::Quantized(format.into().into())
}

/// Product-quantized keys beside each kind of values, then a pair of formats a layer.
fn plan() -> Plan {
    let grouped = |codec, group| QuantizedFormat { group: Some(group), hadamard: false, codec };
    let turned = |codec| QuantizedFormat { group: None, hadamard: true, codec };
    use QuantizedCodec::{Fp8, Int2, Int2Channel, Int4, Int4Channel, Int8};
    let layers = vec![
        (pq(1, 4, 16), side(Int4)),
        (pq(2, 1, 1), Side::Dense),
        (side(turned(Int4)), side(grouped(Int2, 4))),
        (side(grouped(Int4Channel, 16)), side(Int8)),
        (side(Fp8), side(Fp8)),
        (side(turned(Int2Channel)), Side::Dense),
        (Side::Dense, Side::Dense),
    ];
    Plan {
        format: PLAN_FORMAT,
        method: "quantized".into(),
        fingerprint: "abc".into(),
        model: model(layers.len(), 8, HEADS, DIM, DIM),
        config: FitConfig::Chosen,
        sink_rows: 4,
        recent_rows: 16,
        layers: layers.into_iter().map(|(keys, values)| LayerPlan { keys, values }).collect(),
    }
}

#[test]
fn every_format_is_written_and_read() {
    let plan = plan();
    let (dir, path, bytes) = written(&plan);
    assert_eq!(Plan::read(&path).unwrap(), plan);
    plan.write(&path).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "the same plan gives the same bytes");
    drop(dir);
}

#[test]
fn bytes_are_counted_to_the_last_scale() {
    let plan = plan();
    let bytes: Vec<usize> = (0..plan.layers.len()).map(|l| plan.layer_bytes_per_token(l)).collect();
    // Codes are padded to 16 bytes a row; a scale and a zero take 4.
    let expected = [
        16 + (16 + 4),
        16 + 2 * DIM,
        (16 + 4) + (16 + 2 * 4),
        (16 + 2) + (16 + 4), // 8 channels share their 32 bytes among 16 rows
        16 + 16,
        (16 + 1) + 2 * DIM,
        4 * DIM,
    ];
    assert_eq!(bytes, expected.map(|b| HEADS * b));
    // Codebooks once, in f32: 16 and 1 centroids of 8 numbers a head. Dense keys beside codes need no identity.
    assert_eq!(plan.fixed_bytes(), 4 * HEADS * DIM * (16 + 1));
    let all: usize = bytes.iter().sum();
    let (dense, exact) = (HEADS * 4 * DIM, 20 * HEADS * 4 * DIM);
    let kept = 80 * (all - dense) + 6 * exact + 100 * dense + plan.fixed_bytes();
    assert!((plan.kept(100) - kept as f64 / (100 * 7 * dense) as f64).abs() < 1e-12);
    // Longer rows than the padding: 65 bytes of codes take 80.
    let format = |codec: QuantizedCodec| QuantizedFormat::from(codec);
    assert_eq!(format(QuantizedCodec::Pq { subvectors: 65, centroids: 9 }).row_bytes(130), 80);
    assert_eq!(format(QuantizedCodec::Int4).row_bytes(128), 64 + 4);
    assert_eq!(format(QuantizedCodec::Int4Channel).row_bytes(128), 64 + 16);
    assert_eq!(format(QuantizedCodec::Int2Channel).row_bytes(128), 32 + 16);
}

#[test]
fn names_of_formats_are_those_of_ops() {
    for text in ["fp8", "int8", "int4", "int2", "int4-channel", "int2-channel", "int4+hadamard", "int2-channel+hadamard"] {
        let format: QuantizedFormat = text.parse().unwrap();
        assert_eq!((format.to_string().as_str(), format.hadamard), (text, text.ends_with("hadamard")));
        let theirs: kvlar_reference::Format = text.parse().unwrap();
        assert_eq!((theirs.to_string(), theirs.hadamard), (format.to_string(), format.hadamard));
        assert_eq!(theirs.group_of(64), format.group_of(64));
    }
    for bad in ["pq", "int3", "", "+hadamard", "int4+Hadamard", "int4 "] {
        let e = bad.parse::<QuantizedFormat>().unwrap_err();
        assert!(e.contains(&format!("{bad:?}")) && e.contains("int4-channel") && e.contains("+hadamard"), "{e}");
    }
}

/// Plans of version 1 named the settings of ReCalKV without saying whose they are.
#[test]
fn plans_of_the_first_version_are_read() {
    let mut plan = plan();
    plan.layers.iter_mut().for_each(|l| *l = LayerPlan { keys: Side::Dense, values: Side::Dense });
    plan.config = RecalkvConfig { kept: 0.375, multiple: 16, ..RecalkvConfig::default() }.into();
    let (_dir, path, bytes) = written(&plan);
    let first = |edit: fn(&mut Value)| {
        let bytes = forged(&bytes, |p, _| {
            p["config"] = p["config"]["recalkv"].take();
            edit(p);
        });
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
        let header = header.replacen(r#"\"format\":2"#, r#"\"format\":1"#, 1);
        [&bytes[..8], header.as_bytes(), &bytes[8 + length..]].concat()
    };
    std::fs::write(&path, first(|_| ())).unwrap();
    assert_eq!(Plan::read(&path).unwrap(), plan);
    std::fs::write(&path, first(|p| p["config"]["kept"] = "half".into())).unwrap();
    says(Plan::read(&path), &["its description"]);
    // Each version has its own way.
    std::fs::write(&path, forged(&bytes, |p, _| p["config"] = p["config"]["recalkv"].take())).unwrap();
    says(Plan::read(&path), &["its description"]);
}

#[test]
fn quantized_sides_that_do_not_fit_are_not_written() {
    fn keys(p: &mut Plan) -> &mut Quantized {
        match &mut p.layers[0].keys {
            Side::Quantized(q) => q,
            other => panic!("{other:?}"),
        }
    }
    fn format(p: &mut Plan, layer: usize, format: QuantizedFormat) {
        p.layers[layer].keys = side(format);
    }
    let int4 = || QuantizedFormat::from(QuantizedCodec::Int4);
    type Edit<'a> = &'a dyn Fn(&mut Plan);
    let cases: &[(Edit<'_>, &[&str])] = &[
        (&|p| keys(p).codebooks = None, &["layer 0, keys", "pq without codebooks"]),
        (&|p| keys(p).codebooks.as_mut().unwrap().truncate(511), &["codebooks have 511 numbers instead of 512"]),
        (&|p| keys(p).codebooks.as_mut().unwrap()[9] = f32::NAN, &["codebooks hold NaN (number 9)"]),
        (&|p| keys(p).codebooks.as_mut().unwrap()[0] = f32::INFINITY, &["codebooks hold inf (number 0)"]),
        (&|p| keys(p).format.group = Some(4), &["pq rows have no groups"]),
        (&|p| keys(p).format = QuantizedCodec::Pq { subvectors: 3, centroids: 16 }.into(), &["3 sub-vectors do not divide 8"]),
        (&|p| keys(p).format = QuantizedCodec::Pq { subvectors: 0, centroids: 16 }.into(), &["0 sub-vectors"]),
        (&|p| keys(p).format = QuantizedCodec::Pq { subvectors: 4, centroids: 257 }.into(), &["257 centroids", "1 to 256"]),
        (&|p| keys(p).format = QuantizedCodec::Pq { subvectors: 4, centroids: 0 }.into(), &["0 centroids"]),
        (&|p| keys(p).format = QuantizedCodec::Int8.into(), &["codebooks of int8 rows, which have none"]),
        (&|p| format(p, 2, QuantizedFormat { group: Some(3), ..int4() }), &["layer 2, keys", "a group of 3 does not divide 8"]),
        (&|p| format(p, 2, QuantizedFormat { group: Some(0), ..int4() }), &["a group of 0"]),
        (
            &|p| format(p, 3, QuantizedFormat { group: Some(0), ..QuantizedCodec::Int4Channel.into() }),
            &["layer 3, keys", "a group of 0"],
        ),
        (&|p| format(p, 4, QuantizedFormat { group: Some(8), ..QuantizedCodec::Fp8.into() }), &["fp8 rows have no groups"]),
        (
            &|p| {
                p.model.layer.value_dim = 6;
                p.layers[0].values = side(QuantizedFormat { hadamard: true, ..int4() });
            },
            &["layer 0, values", "6 values are no power of two"],
        ),
    ];
    for (edit, words) in cases {
        let mut plan = plan();
        edit(&mut plan);
        let dir = tempfile::tempdir().unwrap();
        says(plan.write(&dir.path().join("p")), words);
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
    }
}

#[test]
fn sound_files_of_unsound_quantized_sides_are_refused() {
    let (_dir, path, bytes) = written(&plan());
    type Edit<'a> = &'a dyn Fn(&mut Value, &mut Tensors);
    let codec = |codec: Value| move |p: &mut Value, _: &mut Tensors| p["layers"][0]["keys"]["Quantized"]["codec"] = codec.clone();
    let cases: &[(Edit<'_>, &[&str])] = &[
        (&codec(json!({"pq": {"subvectors": 3, "centroids": 16}})), &["layers.0.keys", "3 sub-vectors"]),
        (&codec(json!({"pq": {"subvectors": 0, "centroids": 16}})), &["layers.0.keys", "0 sub-vectors"]),
        (&codec(json!({"pq": {"subvectors": 4, "centroids": u64::MAX}})), &["layers.0.keys", "centroids"]),
        (&codec(json!({"pq": {"subvectors": 4, "centroids": 8}})), &["codebooks", "[4, 4, 16, 2] instead of [4, 4, 8, 2]"]),
        (&codec(json!({"pq": {"subvectors": 2, "centroids": 16}})), &["codebooks", "instead of [4, 2, 16, 4]"]),
        (&codec("int8".into()), &["layers.0.keys.codebooks belongs to no layer"]),
        (&codec("int7".into()), &["its description", "int7"]),
        (&|p, _| p["layers"][2]["keys"]["Quantized"]["group"] = 0.into(), &["layers.2.keys", "a group of 0"]),
        (&|p, _| p["layers"][2]["keys"]["Quantized"]["group"] = 3.into(), &["layers.2.keys", "a group of 3"]),
        (&|_, t| drop(t.remove("layers.1.keys.codebooks")), &["layers.1.keys.codebooks is missing"]),
        (
            &|_, t| t.get_mut("layers.0.keys.codebooks").unwrap().0 = vec![4, 16, 4, 2],
            &["[4, 16, 4, 2] instead of [4, 4, 16, 2]"],
        ),
        (
            &|_, t| t.get_mut("layers.0.keys.codebooks").unwrap().1[4..8].copy_from_slice(&f32::NAN.to_le_bytes()),
            &["layer 0, keys", "codebooks hold NaN (number 1)"],
        ),
        (&|p, _| p["config"] = json!({"kivi": {}}), &["its description", "kivi"]),
    ];
    for (edit, words) in cases {
        std::fs::write(&path, forged(&bytes, edit)).unwrap();
        says(Plan::read(&path), words);
    }
    // What is in the file, cut off or changed, is noticed by its hash and lengths as of any plan.
    for keep in (0..bytes.len()).step_by(97) {
        std::fs::write(&path, &bytes[..keep]).unwrap();
        assert!(Plan::read(&path).is_err(), "{keep} bytes");
    }
    for at in (0..bytes.len()).step_by(53) {
        let mut broken = bytes.clone();
        broken[at] ^= 1;
        std::fs::write(&path, &broken).unwrap();
        assert!(Plan::read(&path).is_err() || bytes[at] == b' ', "byte {at}");
    }
}
