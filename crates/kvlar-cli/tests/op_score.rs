//! The ops that score rows from outside: score_window, score_column, score_gate, score_keys, score_repeat.

use crate::case::{Case, Run, kernels, run, values};
use kvlar_reference::testing::Rng;
use kvlar_reference::{
    ColumnInput, Dtype as Type, Gate, HeadReduction, KeyMethod, KeysInput, Pool, RepeatInput, RowReduction, WindowColumns,
    WindowInput, score_column, score_gate, score_keys, score_repeat, score_window,
};

fn reference(op: &str, case: &Case) -> Run {
    run(op, "reference", case, &[])
}

fn with(case: &Case, keys: &[(&str, &str)]) -> Case {
    keys.iter().fold(case.clone(), |c, (k, v)| c.key(k, v))
}

fn replace(case: &Case, name: &str, shape: &[usize]) -> Case {
    case.clone().without(name).floats(name, shape, &vec![0.5; shape.iter().product()])
}

/// Every key and value fails and is named.
#[track_caller]
fn refuses(op: &str, case: &Case, bad: &[(&str, &str)]) {
    for (key, value) in bad {
        reference(op, &case.clone().key(key, value)).fails(2, key);
    }
}

/// Each tensor fails and is named where it is missing, and where it has another shape.
#[track_caller]
fn needs(op: &str, case: &Case, misshapen: &[(&str, &[usize])]) {
    for (name, shape) in misshapen {
        reference(op, &case.clone().without(name)).fails(2, &format!("no tensor {name}"));
        reference(op, &replace(case, name, shape)).fails(2, name);
        reference(op, &case.clone().without(name).ints(name, &[1], &[1])).fails(2, &format!("{name} is I32"));
    }
    refuses(op, case, &[("dtype", "int8"), ("windows", "1"), ("lengths", "1")]);
    reference(op, &case.clone().ints("lengths", &[1], &[1])).fails(2, "unknown tensor \"lengths\"");
    // score_gate has none of 4 dimensions; wrong input is wrong all the same.
    for backend in ["simt", "cuda"] {
        if !WITH_KERNELS.contains(&op) {
            run(op, backend, case, &[]).fails(3, "unsupported");
        }
        run(op, backend, &replace(case, misshapen[0].0, misshapen[0].1), &[]).fails(2, misshapen[0].0);
        run(op, backend, &case.clone().key("dtype", "int8"), &[]).fails(2, "dtype");
    }
}

const WITH_KERNELS: [&str; 4] = ["score_window", "score_column", "score_repeat", "score_keys"];

/// The emulated kernels' scores are those of the reference.
#[track_caller]
fn agrees(op: &str, case: &Case) {
    let Some(kernels) = kernels() else { return };
    let ((shape, expected), (found, actual)) =
        (reference(op, case).tensor("scores"), run(op, kernels, case, &[]).tensor("scores"));
    assert_eq!(shape, found);
    for (i, (a, e)) in actual.iter().zip(&expected).enumerate() {
        assert!(a.is_nan() && e.is_nan() || (a - e).abs() <= 1e-5 * (1.0 + e.abs()), "{op}: {i}: {a} instead of {e}");
    }
}

#[test]
fn emulated_kernels_agree_with_the_reference() {
    let window = queries(W);
    let lse = window.clone().floats("lse", &[B, HQ, W], &Rng::new(2).normals(B * HQ * W, 3.0));
    let keys: [&[(&str, &str)]; 6] = [
        &[],
        &[("dtype", "f16"), ("pool", "max"), ("kernel", "3"), ("scale", "0.9")],
        &[("pool", "none"), ("rows", "mean"), ("reduce", "max")],
        &[("columns", "all"), ("reduce", "sum")],
        &[("columns", "prefix"), ("kernel", "101")],
        &[("columns", "all"), ("pool", "max")],
    ];
    for keys in keys {
        agrees("score_window", &with(&window, keys));
        agrees("score_window", &with(&lse, keys));
    }
    agrees("score_column", &queries(T));
    agrees("score_column", &with(&queries(T), &[("dtype", "f16"), ("scale", "0.2")]));
    let mut rng = Rng::new(5);
    let repeat =
        Case::default().floats("q", &[4, 5, D], &rng.normals(20 * D, 1.0)).floats("k", &[2, 30, D], &rng.normals(60 * D, 1.0));
    for (sink, start, len) in [("0", "0", "25"), ("3", "7", "9"), ("25", "25", "0"), ("9", "4", "20")] {
        agrees("score_repeat", &with(&repeat, &[("sink", sink), ("start", start), ("len", len)]));
    }
    // Nothing to score.
    let (q, k) = ([0.5; HQ * W * D], [0.5; HK * W * D]);
    agrees("score_window", &Case::default().floats("q", &[1, HQ, W, D], &q).floats("k", &[1, HK, W, D], &k));
    agrees("score_window", &Case::default().floats("q", &[0, HQ, W, D], &[]).floats("k", &[0, HK, T, D], &[]));
    agrees("score_column", &Case::default().floats("q", &[1, HQ, 0, D], &[]).floats("k", &[1, HK, 0, D], &[]));
    if let Some(kernels) = kernels() {
        // f32, and rows that are no multiple of 8, run on the reference.
        run("score_window", kernels, &with(&window, &[("dtype", "f32")]), &[]).fails(3, "unsupported");
        let thin = Case::default().floats("q", &[2, 2, 1], &[0.5; 4]).floats("k", &[2, 5, 1], &[0.5; 10]);
        let thin = with(&thin, &[("sink", "1"), ("start", "1"), ("len", "2")]);
        run("score_repeat", kernels, &thin, &[]).fails(3, "unsupported");
    }
}

const B: usize = 2;
const HQ: usize = 4;
const HK: usize = 2;
const W: usize = 3;
const T: usize = 14;
const D: usize = 8;

fn queries(rows: usize) -> Case {
    let mut rng = Rng::new(1);
    let (q, k) = (rng.normals(B * HQ * rows * D, 1.0), rng.normals(B * HK * T * D, 1.0));
    Case::default().floats("q", &[B, HQ, rows, D], &q).floats("k", &[B, HK, T, D], &k)
}

const TYPES: [(&str, Type); 3] = [("bf16", Type::Bf16), ("f16", Type::F16), ("f32", Type::F32)];

#[test]
fn score_window_has_every_key() {
    let (case, lse) = (queries(W), Rng::new(2).normals(B * HQ * W, 3.0));
    let scored = |dtype: Type, more: &dyn Fn(&mut WindowInput<'_>)| {
        let (q, k) = (values(&case, "q", dtype), values(&case, "k", dtype));
        let mut i = WindowInput {
            seqs: B,
            q_heads: HQ,
            kv_heads: HK,
            window: W,
            rows: T,
            head_dim: D,
            q: &q,
            k: &k,
            ..Default::default()
        };
        more(&mut i);
        (vec![B, HK, T - W], score_window(&i).unwrap())
    };
    let of = |keys: &[(&str, &str)]| reference("score_window", &with(&case, keys)).tensor("scores");
    for (name, dtype) in TYPES {
        assert_eq!(of(&[("dtype", name), ("format", "pt")]), scored(dtype, &|_| ()));
    }
    let bf16 = |more: &dyn Fn(&mut WindowInput<'_>)| scored(Type::Bf16, more);
    // Defaults: bf16, 1/√d, avg of 7, sum, mean.
    let said = [("scale", "0.35355339059327373"), ("pool", "avg"), ("kernel", "7"), ("rows", "sum"), ("reduce", "mean")];
    assert_eq!(of(&[]), bf16(&|_| ()));
    assert_eq!(of(&said), bf16(&|_| ()));
    assert_eq!(of(&[("scale", "0.5")]), bf16(&|i| i.scale = Some(0.5)));
    assert_eq!(of(&[("kernel", "3")]), bf16(&|i| i.pool = Pool::Avg(3)));
    assert_eq!(of(&[("pool", "max")]), bf16(&|i| i.pool = Pool::Max(7)));
    assert_eq!(of(&[("pool", "none")]), bf16(&|i| i.pool = Pool::None));
    assert_eq!(of(&[("rows", "mean")]), bf16(&|i| i.row_reduction = RowReduction::Mean));
    assert_eq!(of(&[("reduce", "max")]), bf16(&|i| i.head_reduction = HeadReduction::Max));
    assert_eq!(of(&[("reduce", "sum")]), bf16(&|i| i.head_reduction = HeadReduction::Sum));
    let (shape, scores) = of(&[("columns", "all")]);
    assert_eq!((shape, scores), (vec![B, HK, T], bf16(&|i| i.columns = WindowColumns::All).1));
    let given = reference("score_window", &case.clone().floats("lse", &[B, HQ, W], &lse)).tensor("scores");
    let (q, k) = (values(&case, "q", Type::Bf16), values(&case, "k", Type::Bf16));
    let i =
        WindowInput { seqs: B, q_heads: HQ, kv_heads: HK, window: W, rows: T, head_dim: D, q: &q, k: &k, ..Default::default() };
    assert_eq!(given.1, score_window(&WindowInput { lse: Some(&lse), ..i }).unwrap());
    // All rows in the window, and no sequence.
    let (none, k) = (Case::default().floats("q", &[0, HQ, W, D], &[]), [0.0; HK * W * D]);
    let none = none.floats("k", &[0, HK, T, D], &[]);
    assert_eq!(reference("score_window", &none).tensor("scores"), (vec![0, HK, T - W], vec![]));
    let all = replace(&case.clone().without("k"), "q", &[1, HQ, W, D]).floats("k", &[1, HK, W, D], &k);
    assert_eq!(reference("score_window", &all).tensor("scores"), (vec![1, HK, 0], vec![]));
}

#[test]
fn wrong_score_window_input_is_named() {
    let case = queries(W);
    needs("score_window", &case, &[("q", &[B, 5, W, D]), ("k", &[B, HK, T, D - 1])]);
    let fails = |case: &Case, word: &str| reference("score_window", case).fails(2, word);
    fails(&replace(&case, "q", &[B, HQ, D]), "q is [2, 4, 8]; it must have 4 dimensions");
    fails(&replace(&case, "k", &[B, 0, T, D]), "q has 4 heads of 8 dimensions, k 0 heads");
    fails(&replace(&case, "k", &[B + 1, HK, T, D]), "k [3, 2, 14, 8]");
    fails(&replace(&case, "q", &[B, HQ, 0, D]), "q: 0 queries");
    fails(&replace(&case, "q", &[B, HQ, T + 1, D]), "q: 15 queries");
    fails(&case.clone().floats("lse", &[B, HQ], &[0.0; B * HQ]), "lse is [2, 4]");
    fails(&case.clone().floats("v", &[1], &[0.0]), "unknown tensor \"v\"");
    refuses("score_window", &case, &[("kernel", "4"), ("kernel", "0"), ("kernel", "-1"), ("kernel", "x"), ("pool", "min")]);
    refuses(
        "score_window",
        &case,
        &[("columns", "suffix"), ("rows", "max"), ("reduce", "min"), ("scale", "inf"), ("scale", "x"), ("softcap", "1")],
    );
    refuses("score_window", &with(&case, &[("pool", "none")]), &[("kernel", "4")]);
}

#[test]
fn score_column_is_that_of_the_reference() {
    let case = queries(T);
    for (name, dtype) in TYPES {
        let (q, k) = (values(&case, "q", dtype), values(&case, "k", dtype));
        for scale in [None, Some(0.5)] {
            let i = ColumnInput { seqs: B, q_heads: HQ, kv_heads: HK, rows: T, head_dim: D, q: &q, k: &k, scale };
            let case = scale.map_or(case.clone(), |s| case.clone().key("scale", &s.to_string())).key("dtype", name);
            assert_eq!(reference("score_column", &case).tensor("scores"), (vec![B, HK, T], score_column(&i).unwrap()));
        }
    }
    let bf16 = with(&case, &[("dtype", "bf16")]);
    assert_eq!(reference("score_column", &case).tensor("scores"), reference("score_column", &bf16).tensor("scores"));
}

#[test]
fn wrong_score_column_input_is_named() {
    let case = queries(T);
    needs("score_column", &case, &[("q", &[B, HQ, T - 1, D]), ("k", &[B, 3, T, D])]);
    reference("score_column", &replace(&case, "k", &[B, HK, T + 1, D])).fails(2, "q has 14 rows a head and k 15");
    refuses("score_column", &case, &[("scale", "NaN"), ("reduce", "max"), ("kernel", "7"), ("window", "4")]);
}

/// D = 6, H = 2, G = 3, D' = 4, S = 5, seven tokens.
fn gate_case() -> Case {
    let mut rng = Rng::new(3);
    let tensors: [(&str, &[usize]); 8] = [
        ("hidden", &[7, 6]),
        ("q_proj.weight", &[24, 6]),
        ("q_proj.bias", &[24]),
        ("k_proj.weight", &[8, 6]),
        ("q_norm.weight", &[4]),
        ("k_norm.weight", &[4]),
        ("k_base", &[2, 1, 5, 4]),
        ("b", &[2, 1, 3]),
    ];
    tensors.iter().fold(Case::default(), |c, (name, shape)| c.floats(name, shape, &rng.normals(shape.iter().product(), 1.0)))
}

#[test]
fn score_gate_finds_its_sizes() {
    let case = gate_case();
    let mut seen = Vec::new();
    for (name, dtype) in TYPES {
        let [q_proj, q_bias, k_proj] = ["q_proj.weight", "q_proj.bias", "k_proj.weight"].map(|name| values(&case, name, dtype));
        let [q_norm, k_norm, k_base, b] =
            ["q_norm.weight", "k_norm.weight", "k_base", "b"].map(|name| values(&case, name, Type::F32));
        let gate = Gate {
            hidden_dim: 6,
            kv_heads: 2,
            group: 3,
            gate_dim: 4,
            sinks: 5,
            q_proj: &q_proj,
            q_bias: &q_bias,
            k_proj: &k_proj,
            q_norm: &q_norm,
            k_norm: &k_norm,
            k_base: &k_base,
            b: &b,
        };
        let expected = score_gate(&values(&case, "hidden", dtype), &gate, dtype).unwrap();
        let scores = reference("score_gate", &case.clone().key("dtype", name)).tensor("scores");
        assert_eq!(scores, (vec![2, 7], expected));
        seen.push(scores);
    }
    assert_eq!(reference("score_gate", &case).tensor("scores"), seen[0], "bf16 by default");
    assert!(seen[0] != seen[1] && seen[1] != seen[2], "projections are rounded");
    assert_eq!(reference("score_gate", &replace(&case, "hidden", &[0, 6])).tensor("scores"), (vec![2, 0], vec![]));
    let mut hidden = values(&case, "hidden", Type::F32);
    hidden[6 + 2] = f32::NAN;
    let spoiled = case.without("hidden").floats("hidden", &[7, 6], &hidden);
    let (_, scores) = reference("score_gate", &spoiled).tensor("scores");
    assert!(scores.iter().zip(&seen[0].1).enumerate().all(|(i, (a, b))| *a == if i % 7 == 1 { 0.0 } else { *b }));
}

#[test]
fn wrong_score_gate_input_is_named() {
    let case = gate_case();
    needs(
        "score_gate",
        &case,
        &[
            ("hidden", &[7]),
            ("q_proj.weight", &[24, 5]),
            ("q_proj.bias", &[23]),
            ("k_proj.weight", &[8, 5]),
            ("q_norm.weight", &[3]),
            ("k_norm.weight", &[3]),
            ("k_base", &[2, 5, 4]),
            ("b", &[2, 3, 1]),
        ],
    );
    let fails = |case: &Case, word: &str| reference("score_gate", case).fails(2, word);
    fails(&replace(&case, "hidden", &[7, 5]), "q_proj.weight is [24, 6]; the other tensors make it [24, 5]");
    fails(&replace(&case, "k_proj.weight", &[7, 6]), "k_proj.weight has 7 rows");
    fails(&replace(&case, "k_proj.weight", &[0, 6]), "k_proj.weight has 0 rows");
    fails(&replace(&case, "k_proj.weight", &[16, 6]), "q_proj.weight has 24 rows");
    fails(&replace(&case, "q_proj.weight", &[0, 6]), "q_proj.weight has 0 rows");
    fails(&replace(&case, "q_norm.weight", &[0]), "q_norm.weight");
    fails(&replace(&case, "k_base", &[2, 2, 5, 4]), "k_base is [2, 2, 5, 4]");
    fails(&replace(&case, "k_base", &[2, 1, 0, 4]), "k_base: it has a dimension of 0");
    fails(&replace(&case, "b", &[2, 1, 4]), "b is [2, 1, 4]");
    for (name, shape) in [("q_proj.weight", vec![24, 6]), ("k_norm.weight", vec![4]), ("b", vec![2, 1, 3])] {
        let inf = vec![f32::INFINITY; shape.iter().product()];
        fails(&case.clone().without(name).floats(name, &shape, &inf), &format!("{name}: inf is not finite"));
    }
    refuses("score_gate", &case, &[("scale", "1"), ("group", "3"), ("dtype", "fp8")]);
}

const METHODS: [(&str, KeyMethod); 4] = [
    ("l2norm", KeyMethod::L2Norm),
    ("keydiff", KeyMethod::KeyDiff),
    ("lagkv", KeyMethod::LagKv),
    ("value_key_ratio", KeyMethod::ValueKeyRatio),
];

/// Two lags and a tail.
fn keys_case() -> Case {
    let (rows, mut rng) = (300, Rng::new(4));
    let (k, v) = (rng.normals(HK * rows * 8, 1.0), rng.normals(HK * rows * 6, 1.0));
    Case::default().floats("k", &[1, HK, rows, 8], &k).floats("v", &[1, HK, rows, 6], &v)
}

#[test]
fn score_keys_has_four_methods() {
    let case = keys_case();
    for (name, method) in METHODS {
        for (dtype, round) in TYPES {
            let (k, v) = (values(&case, "k", round), values(&case, "v", round));
            let i = KeysInput { seqs: 1, kv_heads: HK, rows: 300, head_dim: 8, value_dim: 6, k: &k, v: Some(&v), method };
            let scores = reference("score_keys", &with(&case, &[("method", name), ("dtype", dtype)])).tensor("scores");
            assert_eq!(scores, (vec![1, HK, 300], score_keys(&i).unwrap()), "{name} {dtype}");
        }
        let (bare, bf16) = (case.clone().key("method", name), with(&case, &[("method", name), ("dtype", "bf16")]));
        let bf16 = reference("score_keys", &bf16).tensor("scores");
        assert_eq!(reference("score_keys", &bare).tensor("scores"), bf16);
        // Where values are not needed they may be there or not.
        let without = reference("score_keys", &bare.without("v"));
        if method.needs_values() {
            without.fails(2, "no tensor v");
        } else {
            assert_eq!(without.tensor("scores"), bf16);
        }
    }
}

#[test]
fn wrong_score_keys_input_is_named() {
    let case = keys_case();
    for (name, _) in METHODS {
        let case = case.clone().key("method", name);
        needs("score_keys", &case, &[("k", &[HK, 300, 8])]);
        reference("score_keys", &replace(&case, "v", &[1, HK, 299, 6])).fails(2, "v is [1, 2, 299, 6]");
        reference("score_keys", &replace(&case, "k", &[1, HK, 300, 0])).fails(2, "k: its rows have 0");
    }
    reference("score_keys", &case).fails(2, "no key method");
    refuses("score_keys", &case, &[("method", "knorm"), ("method", "")]);
    let lags = case.clone().key("method", "lagkv");
    reference("score_keys", &replace(&lags, "v", &[HK, 300, 6])).fails(2, "v is [2, 300, 6]; it must have 4 dimensions");
    reference("score_keys", &replace(&lags, "v", &[1, HK, 300, 1])).fails(2, "v: its rows have 1");
    refuses("score_keys", &lags, &[("lag", "64"), ("sink", "4"), ("scale", "1")]);
}

#[test]
fn emulated_scores_are_those_of_the_reference() {
    let Some(kernels) = kernels() else { return };
    let close = |op: &str, case: &Case, near: f32| {
        let ((shape, expected), (emulated, scores)) =
            (reference(op, case).tensor("scores"), run(op, kernels, case, &[]).tensor("scores"));
        assert_eq!(shape, emulated);
        assert!(scores.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= near), "{op}: {scores:?}, not {expected:?}");
    };
    // A gate of 16 dimensions, small numbers: projections are exact.
    let (d, h, g, s, t) = (24, 2, 3, 5, 9);
    let mut rng = Rng::new(8);
    let mut eighths = |n: usize| (0..n).map(|_| (rng.below(9) as f32 - 4.0) / 8.0).collect::<Vec<_>>();
    let case = Case::default()
        .floats("hidden", &[t, d], &eighths(t * d))
        .floats("q_proj.weight", &[h * g * 16, d], &eighths(h * g * 16 * d))
        .floats("q_proj.bias", &[h * g * 16], &eighths(h * g * 16))
        .floats("k_proj.weight", &[h * 16, d], &eighths(h * 16 * d))
        .floats("q_norm.weight", &[16], &[0.75; 16])
        .floats("k_norm.weight", &[16], &[1.25; 16])
        .floats("k_base", &[h, 1, s, 16], &eighths(h * s * 16))
        .floats("b", &[h, 1, g], &eighths(h * g));
    for dtype in ["bf16", "f16"] {
        close("score_gate", &case.clone().key("dtype", dtype), 2e-3);
    }
    close("score_gate", &case.clone().without("hidden").floats("hidden", &[0, d], &[]), 0.0);
    run("score_gate", kernels, &case.clone().key("dtype", "f32"), &[]).fails(3, "unsupported");
    // Rows of 6 values have no kernel; lagkv has ranks, in which neighbours may change places.
    let keys = keys_case();
    run("score_keys", kernels, &keys.clone().key("method", "lagkv"), &[]).fails(3, "unsupported");
    let (k, v) = (Rng::new(3).normals(2 * HK * 300 * 8, 1.0), Rng::new(4).normals(2 * HK * 300 * 16, 1.0));
    let keys = Case::default().floats("k", &[2, HK, 300, 8], &k).floats("v", &[2, HK, 300, 16], &v);
    for (method, near) in [("l2norm", 1e-5), ("keydiff", 1e-5), ("value_key_ratio", 1e-3), ("lagkv", 2.0 / 128.0)] {
        for dtype in ["bf16", "f16"] {
            close("score_keys", &with(&keys, &[("method", method), ("dtype", dtype)]), near);
        }
    }
    let none = Case::default().floats("k", &[2, HK, 0, 8], &[]).key("method", "l2norm");
    close("score_keys", &none, 0.0);
}

#[test]
fn score_repeat_is_the_teacher() {
    // A sink, two rows of context, two of the repeating text; the second kv head is a copy.
    let (q, k) = ([1.0, 2.0, -1.0, 0.0].repeat(2), [0.0, 1.0, 2.0, 0.5, 0.0].repeat(2));
    let bare = Case::default().floats("q", &[4, 2, 1], &q).floats("k", &[2, 5, 1], &k);
    let keys = [("sink", "1"), ("start", "1"), ("len", "2")];
    let case = with(&bare, &keys);
    for (name, _) in TYPES {
        let (shape, scores) = reference("score_repeat", &case.clone().key("dtype", name)).tensor("scores");
        assert_eq!(shape, [2, 2]);
        let expected = [0.213_097_3, 0.818_495_6].repeat(2);
        assert!(scores.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-7), "{scores:?}");
    }
    let i = RepeatInput { q_heads: 4, kv_heads: 2, queries: 2, rows: 3, head_dim: 1, q: &q, k: &k, ..Default::default() };
    let scaled = RepeatInput { sink: 2, start: 2, len: 1, scale: Some(0.25), ..i };
    let keys = [("sink", "2"), ("start", "2"), ("len", "1"), ("scale", "0.25")];
    assert_eq!(reference("score_repeat", &with(&bare, &keys)).tensor("scores").1, score_repeat(&scaled).unwrap());
    let empty = case.clone().key("len", "0");
    assert_eq!(reference("score_repeat", &empty).tensor("scores"), (vec![2, 0], vec![]));
}

#[test]
fn wrong_score_repeat_input_is_named() {
    let bare = Case::default().floats("q", &[4, 2, 1], &[0.5; 8]).floats("k", &[2, 5, 1], &[0.5; 10]);
    let keys = [("sink", "1"), ("start", "1"), ("len", "2")];
    let case = with(&bare, &keys);
    needs("score_repeat", &case, &[("q", &[4, 2, 2]), ("k", &[3, 5, 1])]);
    for missing in ["sink", "start", "len"] {
        let rest: Vec<_> = keys.into_iter().filter(|k| k.0 != missing).collect();
        reference("score_repeat", &with(&bare, &rest)).fails(2, &format!("no key {missing}"));
    }
    refuses("score_repeat", &case, &[("sink", "4"), ("sink", "-1"), ("start", "4"), ("start", "x"), ("start", "2")]);
    refuses("score_repeat", &case, &[("len", "3"), ("len", "18446744073709551615"), ("scale", "NaN"), ("window", "2")]);
    reference("score_repeat", &replace(&case, "k", &[2, 1, 1])).fails(2, "k has 1 rows");
    reference("score_repeat", &replace(&case, "q", &[4, 0, 1])).fails(2, "q: there are 0 queries");
}

#[test]
fn what_the_ops_refuse_is_refused_whatever_would_run_them() {
    let (window, gate, keys) = (queries(W), gate_case(), keys_case().key("method", "lagkv"));
    let repeat = Case::default().floats("q", &[4, 2, 1], &[0.5; 8]).floats("k", &[2, 5, 1], &[0.5; 10]);
    let repeat = with(&repeat, &[("sink", "4"), ("start", "1"), ("len", "2")]);
    let spoiled = gate.without("b").floats("b", &[2, 1, 3], &[f32::NAN; 6]);
    for backend in ["reference", "simt", "cuda"] {
        run("score_window", backend, &replace(&window, "q", &[B, HQ, T + 1, D]), &[]).fails(2, "q: 15 queries");
        run("score_gate", backend, &spoiled, &[]).fails(2, "b: NaN is not finite");
        run("score_keys", backend, &replace(&keys, "v", &[1, HK, 300, 1]), &[]).fails(2, "v: its rows have 1");
        run("score_repeat", backend, &repeat, &[]).fails(2, "sink: 4");
    }
}
