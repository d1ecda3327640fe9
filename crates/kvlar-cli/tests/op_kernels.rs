//! Quantized ops by kernels, from outside: attention fused and decoded first, scans, codebooks.

use crate::case::{Case, Run, kernels, run};
use crate::op_quantized::{DIMS, attend_case};
use kvlar_reference::testing::Rng;

fn reference(op: &str, case: &Case) -> Run {
    run(op, "reference", case, &[])
}

fn with(case: &Case, keys: &[(&str, &str)]) -> Case {
    keys.iter().fold(case.clone(), |c, (k, v)| c.key(k, v))
}

fn close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(a == b || (a - b).abs() <= tolerance * (1.0 + b.abs()), "{i}: {a} instead of {b}");
    }
}

/// Fused pairs, pairs that are decoded first, exact rows, ragged heads, positions, 8-bit queries.
#[test]
fn kernels_agree_with_the_reference() {
    let Some(kernels) = kernels() else { return };
    let [b, _, hk, t, ..] = DIMS;
    let bare = attend_case();
    let ragged: Vec<i32> = (0..b * hk).map(|i| (t as i32) - 7 * i as i32).collect();
    let positions: Vec<i32> = (0..t as i32).map(|i| 3 * i + i / 4).collect();
    let pair = |keys: &str, values: &str| with(&bare, &[("key_codec", keys), ("value_codec", values)]);
    let exact = [("sink_rows", "3"), ("recent_rows", "11")];
    for case in [
        pair("int4", "int4"),
        pair("int8+hadamard", "int2"),
        with(&pair("int4+hadamard", "int4"), &exact),
        with(&pair("fp8", "fp8"), &exact).floats("k_scale", &[hk], &[0.02, 0.3]).floats("v_scale", &[hk], &[0.01, 1.0]),
        with(&pair("int2", "int4"), &exact).ints("lengths", &[b, hk], &ragged),
        with(&pair("int8", "int4"), &[("sink_rows", "2"), ("window", "60")]).ints("positions", &[t], &positions),
        with(&pair("int8", "int8"), &[("query", "int8")]),
        with(&pair("int4", "int4"), &[("group", "8")]),
        with(&pair("int4", "int8+hadamard"), &exact).ints("lengths", &[b], &[t as i32, 20]),
        with(&pair("int4", "bf16"), &[("dtype", "bf16")]),
        pair("int4-channel", "int4"),
        with(&pair("int2-channel+hadamard", "int4"), &exact).ints("lengths", &[b, hk], &ragged),
        with(&pair("int4-channel", "int8"), &[("group", "8"), ("sink_rows", "1")]),
        with(&pair("int4-channel", "int2-channel"), &[("group", "16"), ("recent_rows", "5")]),
    ] {
        let (on_cpu, by_kernels) = (reference("attend_quantized", &case), run("attend_quantized", kernels, &case, &[]));
        for name in ["k_decoded", "v_decoded"] {
            close(&by_kernels.tensor(name).1, &on_cpu.tensor(name).1, 1e-6);
        }
        close(&by_kernels.tensor("out").1, &on_cpu.tensor("out").1, 3e-2);
        close(&by_kernels.tensor("lse").1, &on_cpu.tensor("lse").1, 1e-2);
    }
    // Queries that are rounded go with rows that are not stored as they are.
    let both = with(&pair("int8", "int8"), &[("query", "int8"), ("recent_rows", "4")]);
    run("attend_quantized", kernels, &both, &[]).fails(3, "unsupported");
}

/// Random codebooks `[heads.., m, c, d/m]`.
fn with_codebooks(case: &Case, heads: &[usize], [m, c, width]: [usize; 3]) -> Case {
    let shape = [heads, &[m, c, width]].concat();
    case.clone().floats("codebooks", &shape, &Rng::new(7).normals(shape.iter().product(), 1.0))
}

/// By fragments, by tables, decoded; ragged, empty, more heads than a tile has.
#[test]
fn scans_by_kernels_agree_with_the_reference() {
    let Some(kernels) = kernels() else { return };
    let (b, hk, d) = (2, 2, 16);
    let bare = |hq: usize, t: usize, codec: &str| {
        let mut rng = Rng::new(3);
        let (q, k) = (rng.normals(b * hq * d, 1.0), rng.normals(b * hk * t * d, 1.0));
        Case::default().floats("q", &[b, hq, d], &q).floats("k", &[b, hk, t, d], &k).key("key_codec", codec)
    };
    let pq = |hq, book| with_codebooks(&bare(hq, 40, "pq"), &[hk], book);
    for case in [
        bare(4, 40, "bf16"),
        bare(4, 33, "f16"),
        bare(6, 40, "int4+hadamard").key("group", "8"),
        bare(20, 40, "int8").ints("lengths", &[b, hk], &[40, 0, 33, 7]),
        bare(4, 40, "fp8").floats("k_scale", &[hk], &[0.02, 0.3]).ints("lengths", &[b], &[9, 40]).key("scale", "0.7"),
        bare(2, 0, "int2"),
        bare(4, 40, "int4-channel"),
        bare(6, 40, "int2-channel+hadamard").key("group", "8").ints("lengths", &[b, hk], &[40, 0, 33, 7]),
        pq(4, [8, 9, 2]),
        pq(2, [2, 256, 8]).ints("lengths", &[b, hk], &[40, 1, 33, 7]),
        with_codebooks(&bare(4, 40, "pq+hadamard"), &[hk], [16, 5, 1]),
    ] {
        let (on_cpu, by_kernels) = (run("scan", "reference", &case, &[]), run("scan", kernels, &case, &[]));
        for (name, tolerance) in [("k_decoded", 1e-6), ("logits", 2e-3), ("lse", 2e-3)] {
            assert_eq!(by_kernels.tensor(name).0, on_cpu.tensor(name).0, "{name}");
            close(&by_kernels.tensor(name).1, &on_cpu.tensor(name).1, tolerance);
        }
    }
}

#[test]
fn codebooks_and_reductions_by_kernels_agree_with_the_reference() {
    let Some(kernels) = kernels() else { return };
    let x = Case::default().floats("x", &[37, 24], &Rng::new(5).normals(37 * 24, 1.0)).key("codec", "pq");
    let encoded = with_codebooks(&x, &[], [3, 200, 8]);
    let decoded = |backend| run("encode", backend, &encoded, &[]).tensor("decoded");
    assert_eq!(decoded(kernels), decoded("reference"));
    let mut logits = Rng::new(6).normals(2 * 6 * 50, 3.0);
    (logits[3], logits[60], logits[70]) = (f32::NAN, f32::NEG_INFINITY, f32::INFINITY);
    let case = Case::default().floats("logits", &[2, 6, 50], &logits).floats("lse", &[2, 6], &[1.5; 12]).key("kv_heads", "2");
    for method in ["max_prob", "max_logit", "mean_logit"] {
        let scores = |backend| run("reduce", backend, &case, &["--set", &format!("method={method}")]).tensor("scores").1;
        for (a, e) in scores(kernels).iter().zip(scores("reference")) {
            assert!(a.is_nan() && e.is_nan() || *a == e || (a - e).abs() < 1e-5, "{method}: {a} instead of {e}");
        }
    }
    // Keys in codebooks are decoded, then attended.
    let keys = attend_case().key("key_codec", "pq").key("value_codec", "int8").key("recent_rows", "5");
    let case = with_codebooks(&keys, &[2], [4, 60, 4]);
    let (on_cpu, by_kernels) = (reference("attend_quantized", &case), run("attend_quantized", kernels, &case, &[]));
    close(&by_kernels.tensor("k_decoded").1, &on_cpu.tensor("k_decoded").1, 1e-6);
    close(&by_kernels.tensor("out").1, &on_cpu.tensor("out").1, 3e-2);
}
