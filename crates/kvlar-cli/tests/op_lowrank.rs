//! attend_lowrank from outside.

use crate::case::{Case, backends, kernels, run};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, Dtype as Type, Rope, RopeLayout, RopeScaling};

const B: usize = 2;
const HQ: usize = 6;
const HK: usize = 3;
const T: usize = 45;
const D: usize = 32;
/// Two heads share latents, the third has its own; ranks are no multiples of 32.
const GROUPS: [i32; 3] = [1, 0, 1];
const RANKS: (usize, usize) = (40, 24);

fn lowrank_case(seed: u64) -> Case {
    let mut rng = Rng::new(seed);
    let round = |x: Vec<f32>| Type::Bf16.round_all(&x);
    let (rk, rv) = RANKS;
    let rope = Rope::new(1e4, D, RopeLayout::Half, RopeScaling::None);
    Case::default()
        .floats("q", &[B, HQ, 2, D], &round(rng.normals(B * HQ * 2 * D, 1.0)))
        .floats("zk", &[B, 2, T, rk], &round(rng.normals(B * 2 * T * rk, 1.0)))
        .floats("uk", &[HK, D, rk], &round(rng.normals(HK * D * rk, 0.15)))
        .ints("group_k", &[HK], &GROUPS)
        .floats("zv", &[B, 2, T, rv], &round(rng.normals(B * 2 * T * rv, 1.0)))
        .floats("uv", &[B, HK, 16, rv], &round(rng.normals(B * HK * 16 * rv, 0.2)))
        .ints("group_v", &[HK], &[0, 1, 0])
        .floats("inv_freq", &[D / 2], &rope.inv_freq)
}

/// Devices agree with the reference, whose rebuild a test below checks against plain attention.
#[test]
fn devices_agree_with_the_reference() {
    let mean: Vec<f32> = Rng::new(9).normals(HK * D, 0.3);
    let positions: Vec<i32> = (0..T as i32).map(|t| 1000 + 3 * t).collect();
    let plain = lowrank_case(1);
    let cases = [
        plain.clone(),
        plain.clone().key("latent", "int8"),
        plain.clone().key("latent", "int8").key("basis", "int8"),
        plain.clone().floats("mean_k", &[HK, D], &mean).key("rope", "interleaved").key("attention_factor", "1.2"),
        plain.clone().ints("positions", &[T], &positions).ints("lengths", &[B, HK], &[45, 3, 0, 17, 33, 45]).key("window", "40"),
        plain
            .clone()
            .without("inv_freq")
            .floats("inv_freq", &[0], &[])
            .floats("sink_logits", &[HQ], &[0.5; HQ])
            .key("softcap", "3"),
        plain.without("zv").without("uv").without("group_v").floats(
            "v",
            &[B, HK, T, 8],
            &Type::Bf16.round_all(&Rng::new(3).normals(B * HK * T * 8, 1.0)),
        ),
    ];
    for (i, case) in cases.iter().enumerate() {
        let expected = run("attend_lowrank", "reference", case, &[]);
        let (out, lse) = (expected.tensor("out"), expected.tensor("lse"));
        for backend in backends() {
            let r = run("attend_lowrank", backend, case, &[]);
            let (actual, actual_lse) = (r.tensor("out"), r.tensor("lse"));
            assert_eq!(actual.0, out.0);
            let logit = 1.5;
            compare(&actual_lse.1, &lse.1, Tolerance::lse_lowrank(Type::Bf16, logit))
                .unwrap_or_else(|e| panic!("case {i} {backend} lse: {e}"));
            compare(&actual.1, &out.1, Tolerance::attend_lowrank(Type::Bf16, T, 4.0, logit))
                .unwrap_or_else(|e| panic!("case {i} {backend}: {e}"));
        }
    }
}

/// At full rank with a basis that selects each head's part, the result is that of plain attention over rotated keys.
#[test]
fn full_rank_is_plain_attention() {
    let (g, d, t) = (2, 16, 33);
    let mut rng = Rng::new(5);
    let rope = Rope::new(1e4, 8, RopeLayout::Half, RopeScaling::None);
    let (q, z, v) = (rng.normals(4 * d, 1.0), rng.normals(t * g * d, 1.0), rng.normals(g * t * d, 1.0));
    let select: Vec<f32> = (0..g * d * g * d).map(|i| if i / (g * d) == i % (g * d) { 1.0 } else { 0.0 }).collect();
    let case = Case::default()
        .floats("q", &[1, 4, 1, d], &q)
        .floats("zk", &[1, 1, t, g * d], &z)
        .floats("uk", &[g, d, g * d], &select)
        .ints("group_k", &[g], &[0, 0])
        .floats("v", &[1, g, t, d], &v)
        .floats("inv_freq", &[4], &rope.inv_freq)
        .key("dtype", "f32");
    let k: Vec<f32> = (0..g)
        .flat_map(|h| (0..t).flat_map(|row| rope.rotate(&z[(row * g + h) * d..][..d], row as i64)).collect::<Vec<_>>())
        .collect();
    let input = AttendInput {
        seqs: 1,
        q_heads: 4,
        kv_heads: g,
        query_rows: 1,
        rows: t,
        head_dim: d,
        value_dim: d,
        q: &q,
        k: &k,
        v: &v,
        ..Default::default()
    };
    let expected = kvlar_reference::attend(&input).unwrap();
    let r = run("attend_lowrank", "reference", &case, &[]);
    assert_eq!((r.tensor("out").1, r.tensor("lse").1), (expected.out, expected.lse));
}

/// Two heads (1, 0) and (0, 1) in one latent √2, one frequency of π/2: keys turn by 90° a row, so scores are integers.
#[test]
fn quarter_turns_give_integer_scores() {
    let root = std::f32::consts::SQRT_2;
    let base = Case::default()
        .floats("q", &[1, 2, 1, 2], &[1.0, 0.0, 1.0, 0.0])
        .floats("zk", &[1, 1, 1, 1], &[root])
        .floats("uk", &[2, 2, 1], &[1.0 / root, 0.0, 0.0, 1.0 / root])
        .ints("group_k", &[2], &[0, 0])
        .floats("v", &[1, 2, 1, 1], &[1.0, 1.0])
        .floats("inv_freq", &[1], &[std::f32::consts::FRAC_PI_2])
        .ints("q_positions", &[1, 1], &[3])
        .key("dtype", "f32")
        .key("scale", "1");
    for (t, expected) in [(0, [1.0, 0.0]), (1, [0.0, -1.0]), (2, [-1.0, 0.0]), (3, [0.0, 1.0])] {
        let r = run("attend_lowrank", "reference", &base.clone().ints("positions", &[1], &[t]), &[]);
        for (x, y) in r.tensor("lse").1.iter().zip(expected) {
            assert!((x - y).abs() < 1e-6, "row at {t}: {x} instead of {y}");
        }
    }
}

/// q = 0 weighs all rows alike: the result is the basis times the mean latent; one huge logit: times that row's latent.
#[test]
fn uniform_and_one_hot_weights() {
    let (t, r) = (5, 3);
    let mut rng = Rng::new(8);
    let (zv, uv) = (rng.normals(t * r, 1.0), rng.normals(2 * r, 1.0));
    let zk: Vec<f32> = (0..t).map(|i| if i == 3 { 1.0 } else { 0.0 }).collect();
    let case = |q: f32| {
        Case::default()
            .floats("q", &[1, 1, 1, 2], &[q, 0.0])
            .floats("zk", &[1, 1, t, 1], &zk)
            .floats("uk", &[1, 2, 1], &[1.0, 0.0])
            .ints("group_k", &[1], &[0])
            .floats("zv", &[1, 1, t, r], &zv)
            .floats("uv", &[1, 2, r], &uv)
            .ints("group_v", &[1], &[0])
            .floats("inv_freq", &[0], &[])
            .key("dtype", "f32")
            .key("scale", "1")
    };
    let expand = |z: &[f32]| (0..2).map(|c| (0..r).map(|j| uv[c * r + j] * z[j]).sum::<f32>()).collect::<Vec<_>>();
    let mean: Vec<f32> = (0..r).map(|j| (0..t).map(|i| zv[i * r + j]).sum::<f32>() / t as f32).collect();
    for (q, z) in [(0.0, mean.as_slice()), (1000.0, &zv[3 * r..4 * r])] {
        let out = run("attend_lowrank", "reference", &case(q), &[]).tensor("out").1;
        for (x, y) in out.iter().zip(expand(z)) {
            assert!((x - y).abs() < 1e-5, "{x} instead of {y}");
        }
    }
}

#[test]
fn bad_input_is_named() {
    let good = lowrank_case(2);
    let fails = |case: Case, word: &str| run("attend_lowrank", "reference", &case, &[]).fails(2, word);
    for name in ["q", "zk", "uk", "group_k", "uv", "group_v", "inv_freq"] {
        fails(good.clone().without(name), name);
    }
    fails(good.clone().without("zv"), "no tensor v");
    fails(good.clone().floats("v", &[1], &[0.0]), "both");
    fails(good.clone().without("group_k").ints("group_k", &[HK], &[0, 2, 0]), "group_k");
    fails(good.clone().without("uk").floats("uk", &[HK, D, 8], &[0.0; HK * D * 8]), "uk");
    fails(good.clone().floats("mean_k", &[D], &[0.0; D]), "mean_k");
    fails(good.clone().without("q").floats("q", &[B, HQ, 9, D], &vec![0.0; B * HQ * 9 * D]), "query rows");
    fails(good.clone().ints("lengths", &[B], &[46, 0]), "lengths");
    fails(good.clone().key("rope", "spiral"), "rope");
    fails(good.clone().key("latent", "int3"), "latent");
    fails(good.clone().key("basis", "int8"), "basis");
    fails(good.clone().key("colour", "blue"), "colour");
    fails(good.clone().without("inv_freq").floats("inv_freq", &[D], &[1.0; D]), "inv_freq");
    if let Some(kernels) = kernels() {
        run("attend_lowrank", kernels, &good.key("dtype", "f32"), &[]).fails(3, "unsupported");
    }
}
