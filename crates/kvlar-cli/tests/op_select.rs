//! The ops that choose and move rows from outside: topk, topp, threshold, budget_layers, budget_heads, compact.

use crate::case::{Case, Run, kernels, run};
use kvlar_reference::Dtype as Type;
use kvlar_reference::testing::Rng;

fn reference(op: &str, case: &Case) -> Run {
    run(op, "reference", case, &[])
}

fn with(case: &Case, name: &str, shape: &[usize], values: &[f32]) -> Case {
    case.clone().without(name).floats(name, shape, values)
}

fn with_ints(case: &Case, name: &str, shape: &[usize], values: &[i32]) -> Case {
    case.clone().without(name).ints(name, shape, values)
}

/// What every op refuses, beside keys that are out of their range: each required tensor missing or of another rank, what it does
/// not know, another type. The good case passes.
fn refuses(op: &str, case: &Case, tensor: &str, bad: &[(&str, &str)]) {
    assert!(reference(op, &case.clone().key("format", "pt").key("dtype", "f16")).output.status.success());
    let fails = |case: Case, words: &[&str]| words.iter().for_each(|word| reference(op, &case).fails(2, word));
    fails(case.clone().without(tensor), &[&format!("no tensor {tensor}")]);
    fails(with(case, tensor, &[1, 1, 1, 1], &[0.0]), &[&format!("{tensor} is [1, 1, 1, 1]")]);
    fails(with_ints(case, tensor, &[1], &[0]), &[&format!("{tensor} is I32")]);
    fails(case.clone().floats("mystery", &[1], &[0.0]), &["unknown tensor", "mystery"]);
    fails(case.clone().key("mystery", "1"), &["unknown key", "mystery"]);
    fails(case.clone().key("dtype", "f64"), &["dtype", "f64"]);
    for (key, value) in bad {
        fails(case.clone().key(key, value), &[key]);
        run(op, "reference", case, &["--set", &format!("{key}={value}")]).fails(2, key);
    }
}

/// A case that lacks a key.
fn lacks(op: &str, case: &Case, key: &str) {
    reference(op, case).fails(2, &format!("no key {key}"));
}

#[test]
fn topk_keeps_forced_rows_and_the_best() {
    let bare = Case::default().floats("scores", &[2, 6], &[9.0, 8.0, 7.0, 0.0, 0.0, 0.0, 1.0, f32::NAN, 3.0, 3.0, 2.0, 3.0]);
    let case = bare.clone().key("k", "4");
    let r = reference("topk", &case);
    assert_eq!(r.ints("rows", &[2, 4]), [0, 1, 2, 3, 2, 3, 4, 5]);
    assert_eq!(r.ints("counts", &[2]), [4, 4]);
    let forced = case.clone().key("sink_rows", "1").key("recent_rows", "2");
    assert_eq!(reference("topk", &forced).ints("rows", &[2, 4]), [0, 1, 4, 5, 0, 2, 4, 5]);
    let r = reference("topk", &forced.clone().ints("lengths", &[2], &[5, 2]));
    assert_eq!(r.ints("rows", &[2, 4]), [0, 1, 3, 4, 0, 1, -1, -1]);
    assert_eq!(r.ints("counts", &[2]), [4, 2]);
    let none = reference("topk", &bare.clone().key("k", "0"));
    assert_eq!((none.ints("rows", &[2, 0]), none.ints("counts", &[2])), (vec![], vec![0, 0]));
    let empty = Case::default().floats("scores", &[1, 0], &[]).key("k", "2");
    assert_eq!(reference("topk", &empty).ints("rows", &[1, 2]), [-1, -1]);
    reference("topk", &Case::default().floats("scores", &[0, 6], &[]).key("k", "2")).ints("rows", &[0, 2]);

    refuses("topk", &case, "scores", &[("k", "-1"), ("k", "few"), ("k", "2.5"), ("sink_rows", "-1"), ("recent_rows", "x")]);
    lacks("topk", &bare, "k");
    reference("topk", &forced.clone().key("k", "2")).fails(2, "k: 2 is less than the 3 sink and recent rows");
    reference("topk", &with(&case, "scores", &[12], &[0.0; 12])).fails(2, "scores is [12]");
    for (lengths, word) in [(&[6, 7][..], "lengths: 7"), (&[-1, 6], "lengths: -1"), (&[6], "lengths is [1]")] {
        reference("topk", &with_ints(&case, "lengths", &[lengths.len()], lengths)).fails(2, word);
    }
    reference("topk", &with(&case, "lengths", &[2], &[6.0, 6.0])).fails(2, "lengths is F32");
}

/// What was given and how much of it is kept, on the emulated kernels as on the reference: rows, sets, both rules.
#[test]
fn emulated_selections_are_those_of_the_reference() {
    let Some(kernels) = kernels() else { return };
    let x: Vec<f32> = Rng::new(5).normals(3 * 700, 1.0).iter().map(|x| (8.0 * x).round()).collect();
    let rows = Case::default().floats("scores", &[3, 700], &x).key("k", "90");
    let forced = rows.clone().key("sink_rows", "4").key("recent_rows", "30").ints("lengths", &[3], &[700, 20, 333]);
    let (no_scores, no_rows) = (with(&rows, "scores", &[2, 0], &[]), with(&rows, "scores", &[0, 5], &[]));
    for (batch, case) in [(3, rows.clone()), (3, forced), (2, no_scores), (0, no_rows)] {
        let (on_cpu, emulated) = (reference("topk", &case), run("topk", kernels, &case, &[]));
        assert_eq!(emulated.ints("rows", &[batch, 90]), on_cpu.ints("rows", &[batch, 90]));
        assert_eq!(emulated.ints("counts", &[batch]), on_cpu.ints("counts", &[batch]));
    }
    let all = Case::default().floats("scores", &[3, 7, 100], &x);
    for (keep, rule, floor) in [
        ("0", "exact", "0"),
        ("1", "strict", "0"),
        ("0", "strict", "0"),
        ("801", "exact", "0"),
        ("801", "strict", "0"),
        ("2100", "exact", "0"),
        ("801", "exact", "9"),
        ("210", "exact", "10"),
        ("2100", "exact", "100"),
    ] {
        let case = all.clone().key("keep", keep).key("rule", rule).key("floor", floor);
        let (on_cpu, emulated) = (reference("threshold", &case), run("threshold", kernels, &case, &[]));
        assert_eq!(emulated.bytes("mask", &[3, 7, 100]), on_cpu.bytes("mask", &[3, 7, 100]), "{keep} {rule} {floor}");
        assert_eq!(emulated.ints("lengths", &[3, 7]), on_cpu.ints("lengths", &[3, 7]));
    }
    // Rows are shorter than what would be kept of longer ones.
    let short = rows.clone().key("k", "33").key("sink_rows", "4").key("recent_rows", "30").ints("lengths", &[3], &[20, 33, 0]);
    let (on_cpu, emulated) = (reference("topk", &short), run("topk", kernels, &short, &[]));
    assert_eq!(emulated.ints("rows", &[3, 33]), on_cpu.ints("rows", &[3, 33]));
    assert_eq!(emulated.ints("counts", &[3]), [20, 33, 0]);
    let none = rows.clone().key("k", "0").key("sink_rows", "1").ints("lengths", &[3], &[0; 3]);
    assert_eq!(run("topk", kernels, &none, &[]).ints("counts", &[3]), [0; 3]);
    run("topk", kernels, &short.key("k", "32"), &[]).fails(2, "k: 32 is less than the 33");
    run("topk", kernels, &rows.key("sink_rows", "91"), &[]).fails(2, "k: 90 is less than the 91");
}

/// As above, of masses and budgets.
#[test]
fn emulated_masses_and_budgets_are_those_of_the_reference() {
    let Some(kernels) = kernels() else { return };
    let emulated = |op, case: &Case| run(op, kernels, case, &[]);
    let x: Vec<f32> = Rng::new(6).normals(3 * 300, 2.0).iter().map(|x| (8.0 * x).round() / 8.0).collect();
    let rows = Case::default().floats("logits", &[3, 300], &x);
    let forced = rows.clone().key("sink_rows", "4").key("recent_rows", "30").ints("lengths", &[3], &[300, 20, 133]);
    let bounds = forced.clone().key("k_min", "60").key("k_max", "61");
    let empty = Case::default().floats("logits", &[2, 0], &[]);
    for case in [rows.clone(), forced, bounds, rows.clone().key("top_p", "0.3"), rows.key("resolve", "bin"), empty] {
        let (on_cpu, on_simt) = (reference("topp", &case), emulated("topp", &case));
        let (shape, mass) = on_cpu.tensor("mass");
        let r = shape[0];
        let t = if r == 2 { 0 } else { 300 };
        assert_eq!(on_simt.bytes("mask", &[r, t]), on_cpu.bytes("mask", &[r, t]));
        assert_eq!(on_simt.ints("counts", &[r]), on_cpu.ints("counts", &[r]));
        assert!(mass.iter().zip(on_simt.tensor("mass").1).all(|(a, b)| (a - b).abs() < 1e-5));
    }
    let scores = Case::default().floats("scores", &[6, 3, 50], &x).key("base", "9");
    let interval = scores.clone().key("method", "dynamickv").key("interval", "5").key("r_max", "2");
    let methods = ["dynamickv", "pyramid", "uniform"].map(|method| scores.clone().key("method", method));
    for case in methods.into_iter().chain([interval]) {
        let on_cpu = reference("budget_layers", &case).ints("budgets", &[6]);
        assert_eq!(emulated("budget_layers", &case).ints("budgets", &[6]), on_cpu);
    }
    let heads = Case::default().floats("scores", &[9, 100], &x).key("base", "31");
    for alpha in ["0", "0.2", "0.5", "1"] {
        let case = heads.clone().key("alpha", alpha);
        let on_cpu = reference("budget_heads", &case).ints("budgets", &[9]);
        assert_eq!(emulated("budget_heads", &case).ints("budgets", &[9]), on_cpu);
    }
}

#[test]
fn topp_keeps_what_holds_the_mass() {
    let x = [0.125f32, 0.5, 0.25, 0.125, 0.25, 0.25, 0.25, 0.25].map(f32::ln);
    let case = Case::default().floats("logits", &[2, 4], &x);
    let r = reference("topp", &case.clone().key("top_p", "0.7"));
    assert_eq!(r.bytes("mask", &[2, 4]), [0, 1, 1, 0, 1, 1, 1, 0]);
    assert_eq!(r.ints("counts", &[2]), [2, 3]);
    let (shape, mass) = r.tensor("mass");
    assert_eq!(shape, [2]);
    assert!(mass.iter().all(|m| (m - 0.75).abs() < 1e-6));
    // Defaults: 0.9, 1, T, none forced, exact.
    let all = case.clone().key("top_p", "0.9").key("k_min", "1").key("k_max", "4").key("sink_rows", "0");
    let all = all.key("recent_rows", "0").key("resolve", "exact").ints("lengths", &[2], &[4, 4]);
    let (a, b) = (reference("topp", &case), reference("topp", &all));
    assert_eq!(a.bytes("mask", &[2, 4]), [1; 8]);
    assert_eq!((a.bytes("mask", &[2, 4]), a.tensor("mass")), (b.bytes("mask", &[2, 4]), b.tensor("mass")));
    let short = reference("topp", &case.clone().ints("lengths", &[2], &[2, 0]).key("top_p", "0.7"));
    assert_eq!((short.bytes("mask", &[2, 4]), short.tensor("mass").1[0]), (vec![0, 1, 0, 0, 0, 0, 0, 0], 0.8));
    let forced = case.clone().key("sink_rows", "1").key("recent_rows", "1").key("top_p", "0.7").key("k_max", "3");
    assert_eq!(reference("topp", &forced).bytes("mask", &[2, 4]), [1, 1, 0, 1, 1, 1, 0, 1]);
    let bins = case.clone().key("top_p", "0.3").key("resolve", "bin");
    assert_eq!(reference("topp", &bins).bytes("mask", &[2, 4]), [0, 1, 0, 0, 1, 1, 1, 1]);
    assert_eq!(reference("topp", &bins.key("k_max", "2")).bytes("mask", &[2, 4]), [0, 1, 0, 0, 1, 1, 0, 0]);
    assert_eq!(reference("topp", &Case::default().floats("logits", &[1, 0], &[])).ints("counts", &[1]), [0]);

    let numbers = [("top_p", "-0.1"), ("top_p", "1.5"), ("top_p", "nan"), ("top_p", "most"), ("k_min", "-1"), ("k_max", "-1")];
    let case = case.key("k_min", "2");
    refuses("topp", &case, "logits", &numbers);
    refuses("topp", &case, "logits", &[("sink_rows", "-1"), ("recent_rows", "1.5"), ("resolve", "rough")]);
    reference("topp", &case.clone().ints("lengths", &[2], &[5, 0])).fails(2, "lengths: 5");
    reference("topp", &case.ints("lengths", &[1, 2], &[4, 0])).fails(2, "lengths is [1, 2]");
}

#[test]
fn threshold_keeps_the_best_of_all() {
    let x = [0.9, 0.1, 0.5, 0.5, 0.3, 0.7, 0.2, 0.8, 0.5, 0.4, 0.0, 0.0];
    let bare = Case::default().floats("scores", &[2, 2, 3], &x);
    let case = bare.clone().key("keep", "5");
    let r = reference("threshold", &case);
    assert_eq!(r.bytes("mask", &[2, 2, 3]), [1, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0]);
    assert_eq!(r.ints("lengths", &[2, 2]), [2, 2, 1, 0]);
    let r = reference("threshold", &case.clone().key("rule", "strict"));
    assert_eq!(r.bytes("mask", &[2, 2, 3]), [1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0]);
    let r = reference("threshold", &case.clone().key("floor", "1"));
    assert_eq!(r.bytes("mask", &[2, 2, 3]), [1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0]);
    assert_eq!(reference("threshold", &bare.clone().key("keep", "12")).ints("lengths", &[2, 2]), [3; 4]);
    assert_eq!(reference("threshold", &bare.clone().key("keep", "0")).ints("lengths", &[2, 2]), [0; 4]);

    let bad = [("keep", "13"), ("keep", "-1"), ("keep", "half"), ("floor", "2"), ("floor", "-1"), ("rule", "loose")];
    refuses("threshold", &case, "scores", &bad);
    lacks("threshold", &bare, "keep");
    reference("threshold", &case.clone().key("rule", "strict").key("floor", "1")).fails(2, "floor: 1 with the strict rule");
    reference("threshold", &case.ints("lengths", &[2, 2], &[3; 4])).fails(2, "unknown tensor \"lengths\"");
}

#[test]
fn budget_layers_shares_out() {
    let (layers, heads, rows) = (8, 2, 64);
    let score = |at: usize| {
        let (l, h, t) = (at / rows / heads, at / rows % heads, at % rows);
        (((31 * l + h) * 1009 + 7919 * t + 613 * (l + 1) * (t % 5)) % 100_003) as f32
    };
    let x: Vec<f32> = (0..layers * heads * rows).map(score).collect();
    let bare = Case::default().floats("scores", &[layers, heads, rows], &x);
    let case = bare.clone().key("base", "8").key("method", "dynamickv");
    let budgets = |case: &Case| reference("budget_layers", case).ints("budgets", &[layers]);
    assert_eq!(budgets(&case), [8, 8, 8, 8, 6, 9, 8, 9]);
    assert_eq!(budgets(&case.clone().key("r_max", "10").key("interval", "4").key("beta", "20")), budgets(&case));
    assert_eq!(budgets(&case.clone().key("r_max", "0.5")), [4; 8]);
    assert_eq!(budgets(&case.clone().key("method", "uniform")), [8; 8]);
    // 15.6 to 0.4, a step of 2.17 a layer.
    assert_eq!(budgets(&case.clone().key("method", "pyramid")), [16, 13, 11, 9, 7, 5, 3, 0]);
    assert_eq!(budgets(&case.clone().key("method", "pyramid").key("beta", "2")), [12, 11, 10, 9, 7, 6, 5, 4]);

    let bad = [("base", "-1"), ("base", "many"), ("r_max", "0"), ("r_max", "inf"), ("interval", "0"), ("beta", "0")];
    refuses("budget_layers", &case, "scores", &bad);
    refuses("budget_layers", &case, "scores", &[("method", "snapkv"), ("interval", "-4"), ("beta", "x")]);
    lacks("budget_layers", &bare.clone().key("base", "8"), "method");
    lacks("budget_layers", &bare.key("method", "uniform"), "base");
}

#[test]
fn budget_heads_rounds_half_to_even() {
    let bare = Case::default().floats("scores", &[2, 4], &[9.0, 8.0, 7.0, 1.0, 6.0, 5.0, 2.0, 0.0]);
    let case = bare.clone().key("base", "2");
    let budgets = |case: &Case| reference("budget_heads", case).ints("budgets", &[2]);
    assert_eq!(budgets(&case), [2, 2]);
    assert_eq!(budgets(&case.clone().key("alpha", "0.5")), [2, 2]);
    assert_eq!(budgets(&case.clone().key("alpha", "0")), [3, 1]);
    let bad = [("base", "-1"), ("base", "1.5"), ("alpha", "-0.1"), ("alpha", "1.1"), ("alpha", "nan"), ("alpha", "x")];
    refuses("budget_heads", &case, "scores", &bad);
    lacks("budget_heads", &bare, "base");
    reference("budget_heads", &with(&case, "scores", &[1, 2, 4], &[0.0; 8])).fails(2, "scores is [1, 2, 4]");
}

#[test]
fn compaction_by_kernels_is_that_of_the_reference() {
    let Some(kernels) = kernels() else { return };
    let (h, t) = (3, 70);
    let mut rng = Rng::new(2);
    for (d, dv) in [(64, 64), (24, 3), (5, 128)] {
        let (k, v) = (rng.normals(h * t * d, 1.0), rng.normals(h * t * dv, 1.0));
        let keep: Vec<u8> = (0..h * t).map(|_| rng.below(2) as u8).collect();
        let positions: Vec<i32> = (0..t as i32).map(|i| 3 * i).collect();
        let tensors = Case::default().floats("k", &[h, t, d], &k).floats("v", &[h, t, dv], &v);
        let case = tensors.bytes("keep", &[h, t], &keep).ints("positions", &[t], &positions);
        for (order, dtype) in [("keep", "bf16"), ("any", "f16")] {
            let case = case.clone().key("order", order).key("dtype", dtype);
            let (on_cpu, emulated) = (reference("compact", &case), run("compact", kernels, &case, &[]));
            for name in ["k", "v"] {
                assert_eq!(on_cpu.tensor(name), emulated.tensor(name), "{name}, {order}");
            }
            let left: i32 = on_cpu.ints("lengths", &[h]).iter().sum();
            for (name, n) in [("lengths", h), ("positions", left as usize), ("source", left as usize)] {
                assert_eq!(on_cpu.ints(name, &[n]), emulated.ints(name, &[n]), "{name}, {order}");
            }
        }
    }
}

#[test]
fn compact_moves_rows_with_their_positions() {
    let (h, t, d, dv) = (2, 5, 3, 2);
    let mut rng = Rng::new(1);
    let (k, v) = (rng.normals(h * t * d, 1.0), rng.normals(h * t * dv, 1.0));
    let (keep, positions) = ([0, 1, 0, 1, 1, 0, 0, 0, 0, 1], [2, 3, 5, 7, 11]);
    let tensors = Case::default().floats("k", &[h, t, d], &k).floats("v", &[h, t, dv], &v);
    let case = tensors.bytes("keep", &[h, t], &keep).ints("positions", &[t], &positions);
    for (order, source) in [(None, [1, 3, 4, 4]), (Some("keep"), [1, 3, 4, 4]), (Some("any"), [4, 1, 3, 4])] {
        for (dtype, round) in [("bf16", Type::Bf16), ("f16", Type::F16), ("f32", Type::F32)] {
            let case = order.map_or(case.clone(), |order| case.clone().key("order", order));
            let r = reference("compact", &if dtype == "bf16" { case } else { case.key("dtype", dtype) });
            assert_eq!((r.ints("lengths", &[2]), r.ints("source", &[4])), (vec![3, 1], source.to_vec()));
            let expected: Vec<i32> = source.iter().map(|&row| positions[row as usize]).collect();
            assert_eq!(r.ints("positions", &[4]), expected);
            for (name, x, dim) in [("k", &k, d), ("v", &v, dv)] {
                let of = |(i, &row): (usize, &i32)| x[(i / 3 * t + row as usize) * dim..][..dim].to_vec();
                let expected: Vec<f32> = source.iter().enumerate().flat_map(of).collect();
                assert_eq!(r.tensor(name), (vec![4, dim], round.round_all(&expected)));
            }
        }
    }
    let none = case.clone().without("keep").bytes("keep", &[h, t], &[0; 10]);
    let r = reference("compact", &none);
    assert_eq!((r.tensor("k").0, r.ints("lengths", &[2]), r.ints("source", &[0])), (vec![0, 3], vec![0, 0], vec![]));

    refuses("compact", &case, "k", &[("order", "random")]);
    refuses("compact", &case, "v", &[]);
    let fails = |case: Case, word: &str| reference("compact", &case).fails(2, word);
    fails(case.clone().without("keep"), "no tensor keep");
    fails(case.clone().without("positions"), "no tensor positions");
    fails(with(&case, "v", &[2, 4, 2], &v[..16]), "v is [2, 4, 2]");
    fails(with(&case, "keep", &[2, 5], &[0.0; 10]), "keep is F32");
    fails(case.clone().without("keep").bytes("keep", &[10], &keep), "keep is [10]");
    fails(case.clone().without("keep").bytes("keep", &[h, t], &[0, 1, 2, 0, 0, 0, 0, 0, 0, 0]), "keep: 2");
    fails(with_ints(&case, "positions", &[4], &[0; 4]), "positions is [4]");
    fails(with_ints(&case, "positions", &[1, 5], &[0; 5]), "positions is [1, 5]");
}
