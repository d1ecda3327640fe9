//! `kvlar op` from outside: files in, files out, exit status.

use crate::case::{Case, backends, kernels, run, values};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, Codec, Dtype as Type};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use std::process::Command;

fn attend_case() -> Case {
    let mut rng = Rng::new(1);
    let (b, hq, hk, s, t, d, dv) = (2, 4, 2, 3, 70, 16, 8);
    Case::default()
        .floats("q", &[b, hq, s, d], &rng.normals(b * hq * s * d, 1.0))
        .floats("k", &[b, hk, t, d], &rng.normals(b * hk * t * d, 1.0))
        .floats("v", &[b, hk, t, dv], &rng.normals(b * hk * t * dv, 1.0))
}

#[test]
fn attend_with_everything() {
    let positions: Vec<i32> = (0..140).map(|i| (i % 70) * 2 + i / 70).collect();
    let (lengths, q_positions, sinks) = ([70, 33, 1, 0], [60, 100, 139, 5, 6, 70], [0.5, -1.0, 2.0, 0.0]);
    let base = attend_case();
    let case = base
        .clone()
        .ints("positions", &[2, 70], &positions)
        .ints("lengths", &[2, 2], &lengths)
        .ints("q_positions", &[2, 3], &q_positions)
        .floats("sink_logits", &[4], &sinks)
        .key("softcap", "4")
        .key("window", "50")
        .key("scale", "0.3")
        .key("format", "pt");
    for (dtype, round) in [("bf16", Type::Bf16), ("f16", Type::F16)] {
        let (q, k, v) = (values(&base, "q", round), values(&base, "k", round), values(&base, "v", round));
        let expected = kvlar_reference::attend(&AttendInput {
            seqs: 2,
            q_heads: 4,
            kv_heads: 2,
            query_rows: 3,
            rows: 70,
            head_dim: 16,
            value_dim: 8,
            q: &q,
            k: &k,
            v: &v,
            lengths: Some(&lengths),
            positions: Some(&positions),
            q_positions: Some(&q_positions),
            sink_logits: Some(&sinks),
            scale: Some(0.3),
            softcap: 4.0,
            window: 50,
        })
        .unwrap();
        for backend in backends() {
            for page_size in ["0", "16", "64", "1024"] {
                for schedule in ["balanced", "own"] {
                    let set = [format!("page_size={page_size}"), format!("schedule={schedule}"), format!("dtype={dtype}")];
                    let r = run("attend", backend, &case, &["--set", &set[0], "--set", &set[1], "--set", &set[2]]);
                    let (shape, out) = r.tensor("out");
                    assert_eq!(shape, [2, 4, 3, 8]);
                    compare(&out, &expected.out, Tolerance::attend(round, Codec::Bf16, 70, 4.0))
                        .unwrap_or_else(|e| panic!("{backend}: {e}"));
                    let (shape, lse) = r.tensor("lse");
                    assert_eq!(shape, [2, 4, 3]);
                    compare(&lse, &expected.lse, Tolerance::lse(Codec::Bf16)).unwrap_or_else(|e| panic!("{backend}: {e}"));
                }
            }
        }
    }
}

#[test]
fn attend_defaults_and_empty_caches() {
    for backend in backends() {
        let (_, a) = run("attend", backend, &attend_case(), &[]).tensor("out");
        let (_, b) = run("attend", backend, &attend_case().key("dtype", "bf16").key("scale", "0.25"), &[]).tensor("out");
        assert_eq!(a, b, "{backend}");
        for page in ["page_size=0", "page_size=64"] {
            let empty = Case::default().floats("q", &[1, 2, 1, 8], &[1.0; 16]).floats("k", &[1, 1, 0, 8], &[]).floats(
                "v",
                &[1, 1, 0, 8],
                &[],
            );
            let r = run("attend", backend, &empty, &["--set", page]);
            assert!(r.tensor("out").1.iter().all(|&x| x == 0.0));
            assert!(r.tensor("lse").1.iter().all(|&x| x == f32::NEG_INFINITY));
        }
    }
    let f32 = attend_case().key("dtype", "f32");
    run("attend", "reference", &f32, &[]).tensor("out");
    if let Some(kernels) = kernels() {
        run("attend", kernels, &f32, &[]).fails(3, "unsupported");
    }
}

#[test]
fn wrong_attend_input_is_named() {
    let case = attend_case;
    let attend = |c: Case| run("attend", "reference", &c, &[]);
    attend(case().without("k")).fails(2, "no tensor k");
    attend(case().without("v").floats("v", &[2, 2, 69, 8], &[0.0; 2208])).fails(2, "v is [2, 2, 69, 8]");
    attend(case().without("q").floats("q", &[2, 3, 3, 16], &[0.0; 288])).fails(2, "3 heads");
    attend(case().ints("lengths", &[2], &[70, 71])).fails(2, "lengths: 71");
    attend(case().ints("lengths", &[3], &[1, 1, 1])).fails(2, "lengths is [3]");
    attend(case().floats("lengths", &[2], &[1.0, 1.0])).fails(2, "lengths is F32");
    attend(case().ints("positions", &[69], &[0; 69])).fails(2, "positions");
    attend(case().floats("sink_logits", &[2], &[0.0; 2])).fails(2, "sink_logits");
    attend(case().floats("unheard_of", &[2], &[0.0; 2])).fails(2, "unheard_of");
    for (key, value) in [
        ("page_size", "24"),
        ("page_size", "8"),
        ("window", "-1"),
        ("softcap", "-1"),
        ("softcap", "nan"),
        ("scale", "x"),
        ("scale", "inf"),
        ("schedule", "fair"),
        ("dtype", "f64"),
        ("colour", "red"),
    ] {
        attend(case().key(key, value)).fails(2, key);
        run("attend", "reference", &case(), &["--set", &format!("{key}={value}")]).fails(2, key);
    }
    run("attend", "reference", &case(), &["--set", "window"]).fails(2, "key=value");
    run("attendance", "reference", &case(), &[]).fails(2, "attendance");
}

#[test]
fn append_encodes_where_the_slots_say() {
    let mut rng = Rng::new(2);
    let (b, h, s, d, dv) = (2, 2, 5, 16, 8);
    let case = Case::default()
        .floats("k", &[b, h, s, d], &rng.normals(b * h * s * d, 1.0))
        .floats("v", &[b, h, s, dv], &rng.normals(b * h * s * dv, 1.0))
        .floats("inv_freq", &[4], &[1.0, 0.5, 0.1, 0.01])
        .ints("positions", &[b, s], &[0, 1, 2, 3, 4, 100, 7, 8, 9, 10])
        .ints("slots", &[b, s], &[4, -1, 0, 1, 3, 0, 1, 2, 3, 4]);
    for keys in [
        vec![],
        vec![("rope", "interleaved"), ("attention_factor", "1.3"), ("key_codec", "int8"), ("value_codec", "f16"), ("group", "8")],
    ] {
        let case = keys.iter().fold(case.clone(), |c, (k, v)| c.key(k, v));
        let all: Vec<_> = backends().into_iter().map(|b| run("append", b, &case, &[])).collect();
        let (shape, k) = all[0].tensor("k_decoded");
        assert_eq!(shape, [b, h, s, d]);
        assert!(k[2 * d..3 * d].iter().all(|&x| x == 0.0), "slot 2 of the first sequence was not written");
        assert!(k[..2 * d].iter().any(|&x| x != 0.0));
        for other in &all[1..] {
            compare(&other.tensor("k_decoded").1, &k, Tolerance::append(Codec::Int8, 4.0)).unwrap();
            compare(&other.tensor("v_decoded").1, &all[0].tensor("v_decoded").1, Tolerance::EXACT).unwrap();
        }
    }
    let append = |c: Case| run("append", "reference", &c, &[]);
    append(case.clone().without("inv_freq")).fails(2, "inv_freq");
    append(case.clone().without("positions")).fails(2, "positions");
    append(case.clone().without("slots").ints("slots", &[b, s], &[5, 0, 1, 2, 3, 0, 1, 2, 3, 4])).fails(2, "slots: 5");
    append(case.clone().without("slots").ints("slots", &[b, s], &[1, 1, 0, 2, 3, 0, 1, 2, 3, 4])).fails(2, "twice");
    append(case.clone().key("group", "3")).fails(2, "group");
    append(case.clone().key("key_codec", "int9")).fails(2, "int9");
    append(case.clone().key("key_codec", "int4-channel+hadamard")).fails(2, "key_codec: int4-channel+hadamard");
    append(case.without("inv_freq").floats("inv_freq", &[9], &[1.0; 9])).fails(2, "inv_freq");
}

#[test]
fn encode_reports_bytes_and_agrees_bit_for_bit() {
    let mut rng = Rng::new(3);
    let x = rng.normals(7 * 24, 2.0);
    let case = Case::default().floats("x", &[7, 24], &x);
    for (codec, group, bytes) in [
        ("bf16", 24, 7 * 48),
        ("f16", 24, 7 * 48),
        ("int8", 24, 7 * (32 + 4)),
        ("int8", 8, 7 * (32 + 12)),
        ("int8", 6, 7 * (32 + 16)),
    ] {
        for name in ["encode", "decode"] {
            let mut results = Vec::new();
            for backend in backends() {
                let r = run(name, backend, &case, &["--set", &format!("codec={codec}"), "--set", &format!("group={group}")]);
                results.push(r.tensor("decoded").1.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
                let file = std::fs::read(r.dir.path().join("out.safetensors")).unwrap();
                let file = SafeTensors::deserialize(&file).unwrap();
                let stored = file.tensor("bytes").unwrap();
                assert_eq!((stored.dtype(), stored.shape()), (Dtype::I64, &[][..]));
                assert_eq!(i64::from_le_bytes(stored.data().try_into().unwrap()), bytes);
            }
            assert!(results.windows(2).all(|w| w[0] == w[1]), "{codec} {group}");
        }
    }
    run("encode", "reference", &case, &[]).fails(2, "codec");
    run("encode", "reference", &case, &["--set", "codec=int8", "--set", "group=5"]).fails(2, "group");
    run("encode", "reference", &case, &["--set", "codec=pq"]).fails(2, "codebooks");
}

#[test]
fn merge_merges() {
    let mut rng = Rng::new(4);
    let (parts, mut lse) = (rng.normals(3 * 2 * 2 * 8, 1.0), rng.normals(3 * 2 * 2, 2.0));
    lse[1] = f32::NEG_INFINITY;
    let case = Case::default().floats("out", &[3, 2, 2, 8], &parts).floats("lse", &[3, 2, 2], &lse);
    let expected = kvlar_reference::merge(&parts, &lse, 3, 4, 8).unwrap();
    for backend in backends() {
        let r = run("merge", backend, &case, &[]);
        compare(&r.tensor("out").1, &expected.0, Tolerance::merge()).unwrap();
        compare(&r.tensor("lse").1, &expected.1, Tolerance::merge()).unwrap();
        assert_eq!(r.tensor("out").0, [2, 2, 8]);
    }
    run("merge", "reference", &case.without("lse").floats("lse", &[3, 2, 1], &lse[..6]), &[]).fails(2, "lse");
}

#[test]
fn broken_files_and_absent_devices_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let input = dir.path().join("case.safetensors");
    std::fs::write(&input, b"not a file of tensors").unwrap();
    let kvlar = |arguments: &[&str]| Command::new(env!("CARGO_BIN_EXE_kvlar")).args(arguments).output().unwrap();
    let out = dir.path().join("out.safetensors");
    let r = kvlar(&["op", "attend", "--in", input.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert_eq!(r.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&r.stderr).contains("case.safetensors"));
    let r = kvlar(&["op", "attend", "--in", "/no/such/file", "--out", out.to_str().unwrap()]);
    assert_eq!(r.status.code(), Some(2));
    #[cfg(not(feature = "cuda"))]
    {
        attend_case().write(&input);
        let r = kvlar(&["op", "attend", "--backend", "cuda", "--in", input.to_str().unwrap(), "--out", out.to_str().unwrap()]);
        assert_eq!(r.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&r.stderr).contains("feature `cuda`"));
    }
}

#[test]
fn info_tells_what_is_built() {
    let r = Command::new(env!("CARGO_BIN_EXE_kvlar")).args(["info", "--entries"]).output().unwrap();
    let text = String::from_utf8_lossy(&r.stdout);
    assert!(r.status.success());
    for word in ["ABI", "gpu:", "emulation:", "ledger:", "kvlar_attend_bf16_d128_n8"] {
        assert!(text.contains(word), "{text}");
    }
}
