//! topp against the reference: which rows hold the mass, within what sums in fp32 may be off.

use kvlar::{Resolve, ToppArgs, ToppShape};
use kvlar_reference::testing::Rng;
use kvlar_tests::topp::ToppCase;
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    sizes,
    golden_cases,
    equal_logits,
    logits_that_share_digits,
    odd_values,
    steps_of_a_logit,
    least_and_most_rows,
    rows_that_are_always_kept,
    peaks_and_plains,
    rows_apart_and_ragged,
    random_rows,
    rows_beyond_a_cta,
    a_row_in_little,
    outputs_are_optional_and_replays_follow,
);

/// Both ways.
fn both(lab: &Lab, case: ToppCase) {
    case.check(lab);
    case.bins().check(lab);
}

fn sizes(lab: &Lab) {
    for rows in [1, 2, 31, 32, 33, 1023, 1024, 1025, 3000] {
        for top_p in [0.0, 0.3, 0.9, 0.999, 1.0] {
            both(lab, ToppCase::normal(rows as u64, 2, rows, top_p));
        }
    }
    both(lab, ToppCase::new(2, 0, 0.9, vec![]));
    both(lab, ToppCase::new(0, 5, 0.9, vec![]));
}

/// By hand.
fn golden_cases(lab: &Lab) {
    let x = [0.125f32, 0.5, 0.25, 0.125].map(f32::ln);
    let kept = |top_p| ToppCase::one(&x, top_p).check(lab).remove(0);
    assert_eq!((kept(0.7), kept(0.4), kept(0.8)), (vec![1, 2], vec![1], vec![0, 1, 2]));
    assert_eq!((kept(0.0), kept(1.0)), (vec![1], vec![0, 1, 2, 3])); // k_min is 1
    let none = ToppCase::one(&x, 0.0).with(|s| s.k_min = 0).check(lab);
    assert_eq!(none, [[0usize; 0]]);
    let equal = [0.25f32; 4];
    assert_eq!(ToppCase::one(&equal, 0.7).check(lab), [[0, 1, 2]]);
    assert_eq!(ToppCase::one(&equal, 0.3).bins().check(lab), [[0, 1, 2, 3]]);
    let forced = |c: ToppCase| c.with(|s| (s.sink_rows, s.recent_rows, s.k_max) = (1, 1, 3));
    assert_eq!(forced(ToppCase::one(&x, 0.7)).check(lab), [[0, 1, 3]]);
    assert_eq!(forced(ToppCase::one(&equal, 0.7)).check(lab), [[0, 1, 3]]);
}

/// Masses of powers of two: the sums are exact, so are the counts.
fn equal_logits(lab: &Lab) {
    for rows in [64, 1024] {
        for (top_p, kept) in [(0.5, rows / 2), (0.25, rows / 4), (1.0, rows), (1.0 / rows as f64, 1)] {
            let found = ToppCase::one(&vec![-7.5; rows], top_p).check(lab).remove(0);
            assert_eq!(found, (0..kept).collect::<Vec<_>>());
        }
    }
    // Logits so small that each has the same mass.
    let small: Vec<f32> = (0..64u32).map(|i| f32::from_bits(0x3080_0000 + (i * 37 % 64))).collect();
    for kept in 0..=64 {
        let found = ToppCase::one(&small, kept as f64 / 64.0).with(|s| s.k_min = 0).check(lab).remove(0);
        assert_eq!(found.len(), kept);
    }
    // Two values: the cut lies among those of the one or the other.
    for top_p in [0.1, 0.5, 0.6, 0.95] {
        both(lab, ToppCase::one(&(0..700).map(|i| if i % 3 == 0 { 2.0 } else { 1.0 }).collect::<Vec<_>>(), top_p));
    }
}

fn logits_that_share_digits(lab: &Lab) {
    for shift in [0, 5, 10, 15] {
        let logits: Vec<f32> = (0..700u32).map(|i| f32::from_bits(0x3f80_0000 ^ ((i * 37 % 701) << shift))).collect();
        for top_p in [0.002, 0.5, 0.99] {
            both(lab, ToppCase::one(&logits, top_p));
        }
    }
}

fn odd_values(lab: &Lab) {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let rows = [
        vec![nan, 1.0, -inf, 2.0, 0.0, -0.0, 1e-40],
        vec![inf, 1.0, inf, nan, f32::MAX],
        vec![-inf, nan, -inf],
        vec![f32::MIN, f32::MAX, 0.0],
        vec![1e30, 1e30, 0.0, -1e30],
        vec![-1e30, -1e30, nan],
    ];
    for (r, x) in rows.iter().enumerate() {
        for (i, top_p) in [0.0, 0.4, 0.6, 1.0].into_iter().enumerate() {
            // Every other pair, the others with the next row: a launch's 1024 threads take their time.
            for k_min in [0, 1, 5, 100].into_iter().skip((r + i) % 2).step_by(2) {
                let case = ToppCase::one(x, top_p).with(|s| s.k_min = k_min);
                both(lab, case.clone());
                both(lab, case.with(|s| (s.sink_rows, s.recent_rows) = (1, 1)));
            }
        }
    }
}

/// Logits on and just beside the steps of 1/16.
fn steps_of_a_logit(lab: &Lab) {
    let mut logits: Vec<f32> = (0..60).map(|i| 3.0 - i as f32 / 16.0).collect();
    logits.extend((1..60).map(|i| (3.0 - i as f32 / 16.0).next_up()));
    logits.extend((1..60).map(|i| (3.0 - i as f32 / 16.0).next_down()));
    for top_p in [0.0, 0.05, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0] {
        ToppCase::one(&logits, top_p).bins().check(lab);
        let below: Vec<f32> = logits.iter().map(|x| x - 1000.0).collect();
        ToppCase::one(&below, top_p).bins().check(lab);
    }
    // Far below: no mass, in the last bin.
    ToppCase::one(&[0.0, -126.0, -127.9, -128.0, -500.0, -1e9], 1.0).bins().check(lab);
}

fn least_and_most_rows(lab: &Lab) {
    for (k_min, k_max) in [(0, 0), (1, 1), (50, 60), (300, 300), (90, 20), (0, 5), (1000, 1000)] {
        for top_p in [0.1, 0.9] {
            for (limits, histogram) in [(false, false), (true, true)] {
                let case = ToppCase::normal(k_min as u64, 1, 300, top_p).with(|s| (s.k_min, s.k_max) = (k_min, k_max));
                let case = ToppCase { limits, histogram, ..case };
                both(lab, case.clone());
                both(lab, case.with(|s| (s.sink_rows, s.recent_rows) = (4, 9)));
            }
        }
    }
}

fn rows_that_are_always_kept(lab: &Lab) {
    for (sinks, recent) in [(4, 0), (0, 9), (3, 40), (30, 30), (100, 0), (0, 100)] {
        for top_p in [0.2, 0.8, 1.0] {
            let mut case = ToppCase::normal(7, 4, 100, top_p).with(|s| (s.sink_rows, s.recent_rows) = (sinks, recent));
            case.lengths = Some(vec![100, 33, 0, 61]);
            both(lab, case);
        }
    }
}

/// A few large logits over many small ones, and the other way round.
fn peaks_and_plains(lab: &Lab) {
    let mut rng = Rng::new(3);
    for (above, below) in [(12.0, 0.01), (3.0, 2.0), (0.0, 30.0)] {
        let logits: Vec<f32> =
            rng.normals(2000, below).iter().enumerate().map(|(i, x)| x + if i % 401 == 7 { above } else { 0.0 }).collect();
        for top_p in [0.5, 0.95] {
            both(lab, ToppCase::one(&logits, top_p));
        }
    }
}

fn rows_apart_and_ragged(lab: &Lab) {
    let mut case = ToppCase::normal(1, 4, 130, 0.9);
    case.stride = 133;
    case.logits = Rng::new(8).normals(3 * 133 + 130, 2.0);
    (case.lengths, case.length_rows) = (Some(vec![130, 41]), 2);
    both(lab, case.clone());
    case.lengths = Some(vec![-1, 999]);
    both(lab, case);
}

fn random_rows(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let (batch, rows) = (1 + rng.below(3), 1 + rng.below(1500));
        let scale = [0.1, 1.0, 8.0][rng.below(3)];
        let round = [1.0, 16.0, 1e6][rng.below(3)];
        let logits = rng.normals(batch * rows, scale).iter().map(|x| (x * round).round() / round).collect();
        let mut case = ToppCase::new(batch, rows, rng.below(101) as f64 / 100.0, logits);
        case.lengths = (rng.below(2) == 0).then(|| (0..batch).map(|_| rng.below(rows + 1) as i32).collect());
        case.shape.sink_rows = rng.below(5);
        case.shape.recent_rows = rng.below(40);
        case.shape.k_min = rng.below(60);
        case.shape.k_max = [rows, rng.below(rows + 1)][rng.below(2)];
        both(lab, case);
    }
}

fn rows_beyond_a_cta(lab: &Lab) {
    both(lab, ToppCase::normal(5, 1, 40_000, 0.9));
}

/// The race detector's case, whose CTAs have 1024 threads each.
fn a_row_in_little(lab: &Lab) {
    let case = ToppCase::normal(2, 1, 70, 0.8).with(|s| (s.sink_rows, s.recent_rows, s.k_max) = (2, 3, 20));
    both(lab, case);
    ToppCase::one(&[1.0; 40], 0.5).check(lab);
}

fn outputs_are_optional_and_replays_follow(lab: &Lab) {
    let case = ToppCase::normal(5, 2, 300, 0.9);
    let plan = case.shape.plan(&lab.device).unwrap();
    let (logits, mut lengths) = (lab.upload(&case.logits), lab.upload(&[300i32, 300]));
    plan.launch(&lab.stream, &mut ToppArgs::new(logits.view())).unwrap();
    let mut counts = lab.poisoned(8);
    let graph = lab.stream.capture(|stream| {
        let mut args =
            ToppArgs { lengths: Some(lengths.view()), counts: Some(counts.view_mut()), ..ToppArgs::new(logits.view()) };
        plan.launch(stream, &mut args)
    });
    let graph = graph.expect("a graph");
    for length in [[300, 300], [120, 7], [0, 299]] {
        lab.stream.upload(&mut lengths, 0, bytemuck::cast_slice(&length)).unwrap();
        // SAFETY: all that was captured is still there.
        unsafe { graph.launch(&lab.stream) }.expect("a replay");
        lab.stream.synchronize().expect("a result");
        let kept = ToppCase { lengths: Some(length.to_vec()), ..case.clone() }.check(lab);
        assert_eq!(lab.download::<i32>(&counts), [kept[0].len() as i32, kept[1].len() as i32]);
    }
}

#[test]
fn bad_input_is_named() {
    let lab = Lab::reference();
    let shape = ToppShape { resolve: Resolve::Bin, ..ToppShape::new(2, 10) };
    says(&ToppShape { top_p: 1.1, ..shape }.plan(&lab.device).unwrap_err(), &["top_p", "1.1"]);
    says(&ToppShape { top_p: f64::NAN, ..shape }.plan(&lab.device).unwrap_err(), &["top_p", "NaN"]);
    says(&ToppShape { rows: (1 << 22) + 1, ..shape }.plan(&lab.device).unwrap_err(), &["rows", "too many"]);
    says(&ToppShape { batch: 1 << 31, ..shape }.plan(&lab.device).unwrap_err(), &["rows", "too many"]);
    let plan = shape.plan(&lab.device).unwrap();
    let (logits, short, mut small) = (lab.upload(&[0f32; 20]), lab.upload(&[1i32]), lab.device.alloc(3).unwrap());
    let none = || ToppArgs::new(logits.view());
    let refused = |mut args: ToppArgs<'_>, what: &[&str]| says(&plan.launch(&lab.stream, &mut args).unwrap_err(), what);
    refused(ToppArgs::new(short.view()), &["logits"]);
    refused(ToppArgs { logit_stride: Some(9), ..none() }, &["logit_stride", "9"]);
    refused(ToppArgs { logit_stride: Some(11), ..none() }, &["logits"]);
    refused(ToppArgs { length_rows: 0, ..none() }, &["length_rows"]);
    refused(ToppArgs { length_rows: 3, ..none() }, &["length_rows", "3"]);
    refused(ToppArgs { lengths: Some(short.view()), ..none() }, &["lengths"]);
    refused(ToppArgs { histogram: Some(short.view()), ..none() }, &["histogram"]);
    refused(ToppArgs { limits: Some(short.view()), ..none() }, &["limits"]);
    refused(ToppArgs { cuts: Some(small.view_mut()), ..none() }, &["cuts"]);
    refused(ToppArgs { counts: Some(small.view_mut()), ..none() }, &["counts"]);
    refused(ToppArgs { mass: Some(small.view_mut()), ..none() }, &["mass"]);
    refused(ToppArgs { selected: Some(small.view_mut()), ..none() }, &["selected"]);
    refused(ToppArgs { mask: Some(small.view_mut()), ..none() }, &["mask"]);
}
