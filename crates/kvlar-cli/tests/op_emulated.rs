//! attend_quantized on the emulated kernels, from outside: fused and decoded first.

use crate::case::{Case, Run, backends, run};
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

const DIMS: [usize; 6] = [2, 4, 2, 50, 16, 8]; // B, Hq, Hk, T, d, dv

fn attend_case() -> Case {
    let [b, hq, hk, t, d, dv] = DIMS;
    let mut rng = Rng::new(1);
    let mut normals = |shape: [usize; 4]| rng.normals(shape.iter().product(), 1.0);
    let (q, k, v) = (normals([b, hq, 1, d]), normals([b, hk, t, d]), normals([b, hk, t, dv]));
    Case::default().floats("q", &[b, hq, 1, d], &q).floats("k", &[b, hk, t, d], &k).floats("v", &[b, hk, t, dv], &v)
}

/// Fused pairs, pairs that are decoded first, exact rows, ragged heads, positions, 8-bit queries.
#[test]
fn emulated_kernels_agree_with_the_reference() {
    if !backends().contains(&"simt") {
        return;
    }
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
        let (on_cpu, emulated) = (reference("attend_quantized", &case), run("attend_quantized", "simt", &case, &[]));
        for name in ["k_decoded", "v_decoded"] {
            close(&emulated.tensor(name).1, &on_cpu.tensor(name).1, 1e-6);
        }
        close(&emulated.tensor("out").1, &on_cpu.tensor("out").1, 3e-2);
        close(&emulated.tensor("lse").1, &on_cpu.tensor("lse").1, 1e-2);
    }
    // Queries that are rounded go with rows that are not stored as they are.
    let both = with(&pair("int8", "int8"), &[("query", "int8"), ("recent_rows", "4")]);
    run("attend_quantized", "simt", &both, &[]).fails(3, "unsupported");
}
