//! topk against the reference: which rows are kept, in the total order of scores, with ties to the lower index.

use kvlar::{Ks, TopkArgs, TopkShape, Workspace};
use kvlar_reference::testing::Rng;
use kvlar_reference::{Cut, Forced};
use kvlar_tests::select::TopkCase;
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    sizes,
    golden_cases,
    ties_go_to_the_lower_index,
    keys_that_share_digits,
    odd_values,
    rows_that_are_always_kept,
    a_row_in_little,
    a_set_in_little,
    k_is_read_from_the_device,
    rows_apart,
    random_rows,
    rows_beyond_a_cta,
    sets_choose_together,
    equal_scores_of_a_set,
    strict_thresholds,
    floors_come_first,
    floors_of_equal_scores,
    histograms_save_a_pass,
    lengths_of_several_rows,
    random_sets,
    replays_follow_lengths_and_k,
    outputs_are_optional,
);

/// Around warps, CTAs and powers of two; k of none, one, some, all and more.
fn sizes(lab: &Lab) {
    for rows in [1, 2, 31, 32, 33, 1023, 1024, 1025, 2049, 5000] {
        for k in [0, 1, rows / 3, rows - 1, rows, rows + 7] {
            TopkCase::normal(rows as u64, 2, rows, k).check(lab);
        }
    }
    TopkCase::new(2, 0, 3, vec![]).check(lab);
    TopkCase::new(0, 5, 3, vec![]).check(lab);
}

/// By hand.
fn golden_cases(lab: &Lab) {
    let kept = |scores: &[f32], k| TopkCase::one(scores, k).check(lab).remove(0);
    assert_eq!(kept(&[7.0; 10], 3), [0, 1, 2]);
    assert_eq!(kept(&[1.0, 3.0, 3.0, 2.0, 3.0], 2), [1, 2]);
    assert_eq!(kept(&[1.0, 3.0, 3.0, 2.0, 3.0], 4), [1, 2, 3, 4]);
    let odd = [f32::NAN, 1.0, f32::NEG_INFINITY, 2.0];
    assert_eq!((kept(&odd, 2), kept(&odd, 3)), (vec![1, 3], vec![1, 2, 3]));
    assert_eq!(kept(&[f32::NAN; 4], 2), [0, 1]);
    assert_eq!(kept(&[-0.0, 0.0, -1.0], 1), [0]);
    assert_eq!(kept(&[0.0, 1e-40, 0.0], 1), [1]);
    let forced = TopkCase::one(&[9.0, 8.0, 7.0, 0.0, 0.0, 0.0], 4).forced(1, 2);
    assert_eq!(forced.check(lab), [[0, 1, 4, 5]]);
}

fn ties_go_to_the_lower_index(lab: &Lab) {
    for rows in [40, 3000] {
        for k in [1, 31, 32, 33, rows - 1] {
            TopkCase::new(1, rows, k, vec![-3.5; rows]).check(lab);
            // Two values: the cut lies among those of the one or the other.
            let two = (0..rows).map(|i| if i % 3 == 0 { 2.0 } else { 1.0 }).collect();
            TopkCase::new(1, rows, k, two).check(lab);
        }
    }
}

/// Keys that differ in their last bits alone, in the middle ones, or in the first.
fn keys_that_share_digits(lab: &Lab) {
    for shift in [0, 5, 10, 15, 21] {
        let scores: Vec<f32> = (0..700u32).map(|i| f32::from_bits(0x3f80_0000 ^ ((i * 37 % 701) << shift))).collect();
        for k in [1, 2, 350, 699] {
            TopkCase::one(&scores, k).check(lab);
        }
    }
}

fn odd_values(lab: &Lab) {
    let odd = [f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 0.0, -0.0, 1e-40, -1e-40, f32::MAX, f32::MIN, -f32::NAN];
    let scores: Vec<f32> = (0..97).map(|i| odd[i * 7 % 10]).collect();
    for k in 0..=97 {
        TopkCase::one(&scores, k).check(lab);
    }
}

fn rows_that_are_always_kept(lab: &Lab) {
    for (sinks, recent) in [(4, 0), (0, 9), (3, 40), (30, 30), (100, 0), (0, 100)] {
        for k in [60, 65, 100, 120] {
            let mut case = TopkCase::normal(k as u64, 4, 100, k.max(sinks + recent)).forced(sinks, recent);
            case.lengths = Some(vec![100, 33, 0, 61]);
            case.check(lab);
        }
    }
}

/// In little: the race detector's cases, whose CTAs have 1024 threads each.
fn a_row_in_little(lab: &Lab) {
    let mut row = TopkCase::normal(1, 1, 70, 9).forced(2, 3);
    row.scores.iter_mut().for_each(|x| *x = x.round());
    row.check(lab);
}

fn a_set_in_little(lab: &Lab) {
    TopkCase::sets(2, (1, 2), 40, 11).check(lab);
}

fn k_is_read_from_the_device(lab: &Lab) {
    let mut case = TopkCase::normal(3, 5, 200, 64).forced(2, 5);
    case.ks = Some(vec![64, 0, 7, 1000, -5]);
    let kept = case.check(lab);
    assert_eq!(kept.iter().map(Vec::len).collect::<Vec<_>>(), [64, 7, 7, 64, 7]);
    case.ks = Some(vec![20]);
    case.lengths = Some(vec![200, 19, -3, 20, 5000]);
    let kept = case.check(lab);
    assert_eq!(kept.iter().map(Vec::len).collect::<Vec<_>>(), [20, 19, 0, 20, 20]);
}

/// Rows of scores with something between them.
fn rows_apart(lab: &Lab) {
    let mut case = TopkCase::normal(1, 3, 130, 17);
    case.stride = 133;
    case.scores = Rng::new(8).normals(2 * 133 + 130, 1.0);
    case.check(lab);
}

/// Scores of few values, so that ties are common.
fn random_rows(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let (batch, rows) = (1 + rng.below(3), 1 + rng.below(2500));
        let (sinks, recent) = (rng.below(40).min(rows), rng.below(40).min(rows));
        let k = (sinks + recent).min(rows) + rng.below(rows + 1);
        let values = [3, 50, 100_000][rng.below(3)];
        let scores = (0..batch * rows).map(|_| rng.below(values) as f32 - 2.0).collect();
        let mut case = TopkCase::new(batch, rows, k, scores).forced(sinks, recent);
        case.lengths = (rng.below(2) == 0).then(|| (0..batch).map(|_| rng.below(rows + 1) as i32).collect());
        case.check(lab);
    }
}

/// More than 32K scores: many CTAs a row.
fn rows_beyond_a_cta(lab: &Lab) {
    for (rows, k) in [(32_769, 12), (40_000, 20_000), (65_536, 65_000)] {
        let mut case = TopkCase::normal(k as u64, 2, rows, k).forced(4, 3);
        case.lengths = Some(vec![rows as i32, 33_000]);
        case.check(lab);
    }
    // Few values: ties everywhere.
    let few = (0..33_000).map(|i| (i * 7 % 3) as f32).collect();
    TopkCase::new(1, 33_000, 12_345, few).check(lab);
}

/// Layers and heads that share a budget: how many each keeps follows from all scores.
fn sets_choose_together(lab: &Lab) {
    for (rows, members, k) in [(1, 3, 2), (33, 5, 40), (700, 4, 1), (700, 4, 2799), (8200, 2, 300)] {
        let mut case = TopkCase::sets(k as u64, (2, members), rows, k);
        case.check(lab);
        case.lengths = Some((0..2 * members).map(|i| (i * 37 % (rows + 1)) as i32).collect());
        case.check(lab);
    }
    let mut case = TopkCase::sets(4, (2, 3), 100, 60).forced(2, 5);
    case.lengths = Some(vec![100, 4, 0, 33, 100, 8]);
    case.ks = Some(vec![30, 1000]);
    case.check(lab);
    TopkCase::sets(4, (2, 3), 100, 300).check(lab);
    TopkCase::sets(4, (2, 3), 100, 0).check(lab);
}

/// Ties go to the lower row, then to the lower index.
fn equal_scores_of_a_set(lab: &Lab) {
    for k in [1, 99, 100, 101, 250, 299] {
        let mut case = TopkCase::sets(1, (1, 3), 100, k);
        case.scores.fill(0.25);
        let kept = case.check(lab);
        assert_eq!(
            kept.iter().map(Vec::len).collect::<Vec<_>>(),
            [k.min(100), k.saturating_sub(100).min(100), k.saturating_sub(200)]
        );
    }
}

/// By hand: the released rule of Fast KVzip.
fn strict_thresholds(lab: &Lab) {
    let scores = [0.9, 0.1, 0.5, 0.5, 0.3, 0.7, 0.2, 0.8, 0.5, 0.4];
    // n = max(k - 1, 0): k is the n-th from 0 on.
    let kept = |n: usize| TopkCase::one(&scores, n + 1).strict().check(lab).remove(0);
    assert_eq!(kept(2), [0, 7]);
    assert_eq!((kept(4), kept(5)), (vec![0, 5, 7], vec![0, 5, 7]));
    assert_eq!(kept(0), [0i32; 0]);
    assert_eq!(kept(9).len(), 9);
    for (k, values) in [(1, 50), (700, 50), (1400, 3), (2000, 100_000)] {
        let mut rng = Rng::new(k as u64);
        let mut case = TopkCase::sets(0, (1, 4), 500, k).strict();
        case.scores.iter_mut().for_each(|x| *x = rng.below(values) as f32);
        case.check(lab);
    }
    TopkCase::sets(0, (2, 2), 0, 5).strict().check(lab);
    TopkCase::sets(0, (2, 2), 9, 0).strict().check(lab);
}

/// The best of each row, then the best of what is left of all.
fn floors_come_first(lab: &Lab) {
    // By hand: rows (.9 .1 .5), (.5 .3 .7), (.2 .8 .5), (.4 0 0); the best of each are .9, .7, .8, .4.
    let mut four = TopkCase::sets(0, (1, 4), 3, 5).floor(1);
    four.scores = vec![0.9, 0.1, 0.5, 0.5, 0.3, 0.7, 0.2, 0.8, 0.5, 0.4, 0.0, 0.0];
    assert_eq!(four.check(lab), [vec![0, 2], vec![2], vec![1], vec![0]]);
    for (rows, members, k, floor) in [(33, 5, 40, 8), (700, 4, 40, 10), (700, 4, 2799, 3), (300, 3, 30, 10), (300, 3, 900, 300)] {
        let mut case = TopkCase::sets(k as u64, (2, members), rows, k).floor(floor);
        // One row is far below the others.
        case.scores[..rows].iter_mut().for_each(|x| *x -= 100.0);
        case.check(lab);
        case.lengths = Some((0..2 * members).map(|i| [rows, floor / 2, 0, floor + 1][i % 4] as i32).collect());
        case.check(lab);
        case.ks = Some(vec![0, (k / 2) as i32]);
        case.check(lab);
    }
    let mut forced = TopkCase::sets(4, (2, 3), 100, 60).forced(2, 5).floor(6);
    forced.lengths = Some(vec![100, 4, 9, 33, 100, 12]);
    forced.check(lab);
    TopkCase::sets(5, (1, 2), 8200, 3000).floor(1000).check(lab);
    TopkCase::sets(5, (2, 1), 100, 30).floor(20).check(lab);
    TopkCase::sets(5, (2, 2), 0, 0).floor(3).check(lab);
}

/// Ties of a floor go to the lower index, those of the rest to the lower row.
fn floors_of_equal_scores(lab: &Lab) {
    for (k, kept) in [(30, [10, 10, 10]), (31, [11, 10, 10]), (130, [100, 20, 10]), (250, [100, 100, 50])] {
        let mut case = TopkCase::sets(1, (1, 3), 100, k).floor(10);
        case.scores.fill(0.25);
        assert_eq!(case.check(lab).iter().map(Vec::len).collect::<Vec<_>>(), kept);
    }
}

fn histograms_save_a_pass(lab: &Lab) {
    let counted = |case: TopkCase| {
        let mut case = TopkCase { histogram: true, ..case };
        case.check(lab);
        let all = case.shape.batch * case.shape.members;
        case.lengths = Some((0..all).map(|i| [case.shape.rows, 0, 3, case.shape.rows / 2][i % 4] as i32).collect());
        case.check(lab);
    };
    for k in [0, 1, 60, 150, 200] {
        counted(TopkCase::normal(k as u64, 4, 200, k));
    }
    counted(TopkCase::normal(3, 4, 200, 60).forced(4, 20));
    counted(TopkCase::sets(3, (2, 3), 200, 77));
    counted(TopkCase::sets(3, (2, 2), 200, 77).forced(3, 9));
    counted(TopkCase::sets(3, (2, 2), 200, 77).floor(9));
    counted(TopkCase::sets(3, (2, 2), 200, 77).strict());
    counted(TopkCase::normal(4, 1, 33_000, 700).forced(4, 9));
    let few = (0..300).map(|i| (i * 7 % 3) as f32).collect();
    counted(TopkCase::new(1, 300, 123, few));
}

fn lengths_of_several_rows(lab: &Lab) {
    let mut rows = TopkCase { length_rows: 2, ..TopkCase::normal(3, 6, 90, 20) };
    rows.lengths = Some(vec![90, 11, 44]);
    rows.check(lab);
    let mut sets = TopkCase { length_rows: 6, ..TopkCase::sets(3, (4, 3), 90, 70) };
    sets.lengths = Some(vec![33, 80]);
    sets.check(lab);
}

/// A captured selection with a floor reads lengths and k when it runs.
fn replays_follow_lengths_and_k(lab: &Lab) {
    let mut case = TopkCase::sets(6, (1, 3), 150, 90).floor(5);
    let plan = case.shape.plan(&lab.device).unwrap();
    let scores = lab.upload(&case.scores);
    let (mut lengths, mut ks) = (lab.upload(&[150i32; 3]), lab.upload(&[90i32]));
    let mut counts = lab.poisoned(12);
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let graph = lab
        .stream
        .capture(|stream| {
            let mut args = TopkArgs {
                lengths: Some(lengths.view()),
                ks: Some(Ks::One(ks.view())),
                counts: Some(counts.view_mut()),
                ..TopkArgs::new(scores.view())
            };
            plan.launch(stream, &mut args, &mut workspace)
        })
        .unwrap();
    for (length, k) in [([150, 150, 150], 90), ([150, 3, 70], 40), ([0, 1, 150], 0)] {
        lab.stream.upload(&mut lengths, 0, bytemuck::cast_slice(&length)).unwrap();
        lab.stream.upload(&mut ks, 0, bytemuck::cast_slice(&[k])).unwrap();
        // SAFETY: all that was captured is still there.
        unsafe { graph.launch(&lab.stream) }.unwrap();
        lab.stream.synchronize().unwrap();
        (case.lengths, case.ks) = (Some(length.to_vec()), Some(vec![k]));
        let expected: Vec<i32> = case.expected().iter().map(|kept| kept.len() as i32).collect();
        assert_eq!(lab.download::<i32>(&counts), expected);
    }
}

fn random_sets(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    for seed in 100..100 + count {
        let mut rng = Rng::new(seed);
        let (batch, members, rows) = (1 + rng.below(2), 2 + rng.below(4), 1 + rng.below(600));
        let (sinks, recent) = (rng.below(20).min(rows), rng.below(20).min(rows));
        let floor = if rng.below(2) == 0 { rng.below(rows) } else { 0 };
        let k = members * (sinks + recent + floor).min(rows) + rng.below(members * rows + 1);
        let values = [3, 50, 100_000][rng.below(3)];
        let mut case = TopkCase::sets(seed, (batch, members), rows, k).forced(sinks, recent).floor(floor);
        case.scores.iter_mut().for_each(|x| *x = rng.below(values) as f32 - 2.0);
        case.lengths = (rng.below(2) == 0).then(|| (0..batch * members).map(|_| rng.below(rows + 1) as i32).collect());
        case.histogram = rng.below(2) == 0;
        case.check(lab);
    }
}

fn outputs_are_optional(lab: &Lab) {
    let case = TopkCase::normal(5, 2, 300, 9);
    let plan = case.shape.plan(&lab.device).unwrap();
    let scores = lab.upload(&case.scores);
    let expected = case.expected();
    let mut cuts = lab.poisoned(16);
    let mut counts = lab.poisoned(8);
    let none = || TopkArgs::new(scores.view());
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let mut launch = |mut args: TopkArgs<'_>| plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
    launch(none());
    launch(TopkArgs { cuts: Some(cuts.view_mut()), ..none() });
    launch(TopkArgs { counts: Some(counts.view_mut()), ..none() });
    for (i, &cut) in lab.download::<u64>(&cuts).iter().enumerate() {
        let kept = Cut(cut).rows(&case.scores[i * 300..][..300], Forced::default());
        assert_eq!(kept.iter().map(|&row| row as i32).collect::<Vec<_>>(), expected[i]);
    }
    assert_eq!(lab.download::<i32>(&counts), [9, 9]);
}

#[test]
fn bad_input_is_named() {
    let lab = Lab::reference();
    let shape = TopkShape { sink_rows: 2, recent_rows: 2, ..TopkShape::new(2, 10, 3) };
    says(&shape.plan(&lab.device).unwrap_err(), &["k", "3", "4 sink and recent rows"]);
    says(&TopkShape { rows: 1 << 31, ..shape }.plan(&lab.device).unwrap_err(), &["rows", "too many"]);
    says(&TopkShape { members: 0, ..shape }.plan(&lab.device).unwrap_err(), &["members"]);
    says(&TopkShape { members: 3, k: 11, ..shape }.plan(&lab.device).unwrap_err(), &["k", "11", "12 sink"]);
    says(&TopkShape { strict: true, ..shape }.plan(&lab.device).unwrap_err(), &["strict", "sinks"]);
    says(&TopkShape { strict: true, floor: 1, ..TopkShape::new(1, 9, 3) }.plan(&lab.device).unwrap_err(), &["strict", "floor"]);
    let floors = TopkShape { members: 3, floor: 4, ..TopkShape::new(1, 9, 11) };
    says(&floors.plan(&lab.device).unwrap_err(), &["k", "11", "floors of 4 rows each, 12"]);
    // Shorter rows than the rows that are always kept: all of them.
    TopkShape { rows: 3, ..shape }.plan(&lab.device).unwrap();
    let plan = TopkShape { k: 4, ..shape }.plan(&lab.device).unwrap();
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let (scores, short, mut small) = (lab.upload(&[0f32; 20]), lab.upload(&[1i32]), lab.device.alloc(7).unwrap());
    let none = || TopkArgs::new(scores.view());
    let mut refused = |mut args: TopkArgs<'_>, what: &[&str]| {
        says(&plan.launch(&lab.stream, &mut args, &mut workspace).unwrap_err(), what);
    };
    refused(TopkArgs { score_stride: Some(9), ..none() }, &["score_stride", "9"]);
    refused(TopkArgs { score_stride: Some(11), ..none() }, &["scores"]);
    refused(TopkArgs { lengths: Some(short.view()), ..none() }, &["lengths"]);
    refused(TopkArgs { length_rows: 0, ..none() }, &["length_rows", "0"]);
    refused(TopkArgs { length_rows: 3, ..none() }, &["length_rows", "3"]);
    refused(TopkArgs { histogram: Some(short.view()), ..none() }, &["histogram"]);
    refused(TopkArgs { ks: Some(Ks::Each(short.view())), ..none() }, &["ks"]);
    refused(TopkArgs { cuts: Some(small.view_mut()), ..none() }, &["cuts"]);
    refused(TopkArgs { counts: Some(small.view_mut()), ..none() }, &["counts"]);
    refused(TopkArgs { selected: Some(small.view_mut()), ..none() }, &["selected"]);
    refused(TopkArgs { mask: Some(small.view_mut()), ..none() }, &["mask"]);
    // Lists of sets of several rows, and launches without their scratch.
    let sets = TopkShape { members: 2, k: 8, ..TopkShape::new(1, 10, 8) }.plan(&lab.device).unwrap();
    let mut enough = Workspace::new(&lab.device, sets.workspace()).unwrap();
    let mut lists = lab.device.alloc(32).unwrap();
    let mut listed = TopkArgs { selected: Some(lists.view_mut()), ..none() };
    says(&sets.launch(&lab.stream, &mut listed, &mut enough).unwrap_err(), &["selected", "one row"]);
    says(&sets.launch(&lab.stream, &mut none(), &mut workspace).unwrap_err(), &["workspace"]);
}
