//! Budgets of layers and heads against the reference: exactly the same numbers of rows, round by round.

use kvlar::{
    BudgetHeadsArgs, BudgetHeadsShape, BudgetLayersArgs, BudgetLayersShape, Ks, LayerBudget, TopkArgs, TopkShape, Workspace,
};
use kvlar_reference::testing::Rng;
use kvlar_tests::budget::{HeadsCase, LayersCase, Scores};
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    golden_layers,
    golden_heads,
    layers_that_dominate,
    what_is_gone_stays_gone,
    rounds_of_all_sizes,
    ragged_sequences,
    rows_apart_and_counted,
    lines_and_constants,
    heads_round_halves_to_even,
    random_budgets,
    layers_in_little,
    heads_in_little,
    budgets_are_what_topk_reads,
    replays_follow_scores_and_lengths,
);

use LayerBudget::{DynamicKv, Pyramid, Uniform};

/// The generator of the exact vectors.
fn known(layers: usize, heads: usize, rows: usize) -> Scores {
    let score = |at: usize| {
        let (l, h, t) = (at / rows / heads, at / rows % heads, at % rows);
        (((31 * l + h) * 1009 + 7919 * t + 613 * (l + 1) * (t % 5)) % 100_003) as f32
    };
    Scores::new([1, layers, heads], rows, (0..layers * heads * rows).map(score).collect())
}

fn golden_layers(lab: &Lab) {
    let case = LayersCase::new(DynamicKv, known(8, 2, 64), 8);
    assert_eq!(case.expected(0)[0][..4], [15, 16, 17, 16]);
    assert_eq!(case.check(lab), [[8, 8, 8, 8, 6, 9, 8, 9]]);
    let layers = |method, beta| {
        let mut case = LayersCase::new(method, known(8, 2, 64), 8);
        case.shape.beta = beta;
        case.check(lab).remove(0)
    };
    assert_eq!(layers(Uniform, 20), [8; 8]);
    assert_eq!(layers(Pyramid, 20), [16, 13, 11, 9, 7, 5, 3, 0]);
    assert_eq!(layers(Pyramid, 2), [12, 11, 10, 9, 7, 6, 5, 4]);
}

fn golden_heads(lab: &Lab) {
    let scores = Scores::new([1, 1, 2], 4, vec![9.0, 8.0, 7.0, 1.0, 6.0, 5.0, 2.0, 0.0]);
    assert_eq!(HeadsCase::new(scores.clone(), 2, 0.0).check(lab), [3, 1]);
    assert_eq!(HeadsCase::new(scores, 2, 0.5).check(lab), [2, 2]);
}

/// One layer has all the best scores: it keeps what it holds, and what it cannot is not handed on.
fn layers_that_dominate(lab: &Lab) {
    let mut scores = known(8, 2, 64);
    scores.values[..128].iter_mut().for_each(|x| *x += 1e6);
    let mut case = LayersCase::new(DynamicKv, scores, 8);
    assert_eq!(case.check(lab), [[64, 0, 0, 0, 0, 0, 0, 0]]);
    case.shape.r_max = 4.0;
    assert_eq!(case.check(lab), [[32, 0, 0, 0, 0, 0, 0, 0]]);
}

/// A layer that has none of the best in the first round would have some in the last: its rows are gone by then.
fn what_is_gone_stays_gone(lab: &Lab) {
    let mut scores: Vec<f32> = (0..90).map(|i| (i * 7 % 30) as f32 - if i < 60 { 0.0 } else { 500.0 }).collect();
    scores[..30].fill(-1000.0);
    scores[..10].fill(1000.0);
    let mut case = LayersCase::new(DynamicKv, Scores::new([1, 3, 1], 30, scores), 5);
    case.shape.interval = 2;
    assert_eq!(case.expected(0)[0], [15, 0, 30]);
    assert_eq!(case.check(lab), [[10, 0, 0]]);
}

/// Intervals that divide the layers, and not; more to keep than there is; nothing at all.
fn rounds_of_all_sizes(lab: &Lab) {
    for ((layers, interval), base, r_max) in
        [((7, 3), 5, 10.0), ((4, 4), 9, 1.5), ((5, 1), 30, 0.5), ((3, 8), 0, 10.0), ((6, 4), 1000, 10.0)]
    {
        let mut case = LayersCase::new(DynamicKv, Scores::random(layers as u64, [2, layers, 3], 40), base);
        (case.shape.interval, case.shape.r_max, case.shape.forced_rows) = (interval, r_max, 6);
        case.check(lab);
    }
    for dims in [[2, 3, 0], [2, 0, 2], [0, 3, 2]] {
        for method in [DynamicKv, Pyramid, Uniform] {
            LayersCase::new(method, Scores::random(1, dims, 9), 4).check(lab);
        }
        HeadsCase::new(Scores::random(1, dims, 9), 4, 0.5).check(lab);
    }
    LayersCase::new(DynamicKv, Scores::random(1, [1, 2, 2], 0), 4).check(lab);
    HeadsCase::new(Scores::random(1, [1, 2, 2], 0), 4, 0.5).check(lab);
}

fn ragged_sequences(lab: &Lab) {
    for method in [DynamicKv, Pyramid, Uniform] {
        let mut case = LayersCase::new(method, Scores::random(3, [5, 6, 2], 50), 12);
        case.scores.lengths = Some(vec![50, 11, 0, 14, 99]);
        case.check(lab);
    }
    let mut heads = HeadsCase::new(Scores::random(4, [5, 2, 3], 50), 9, 0.3);
    heads.scores.lengths = Some(vec![50, 4, 0, -3, 10]);
    heads.check(lab);
}

fn rows_apart_and_counted(lab: &Lab) {
    let mut scores = Scores::random(5, [2, 5, 2], 37).apart();
    scores.lengths = Some(vec![37, 20]);
    for histogram in [false, true] {
        scores.histogram = histogram;
        LayersCase::new(DynamicKv, scores.clone(), 7).check(lab);
        HeadsCase::new(scores.clone(), 7, 0.5).check(lab);
    }
}

/// PyramidKV over sizes of models.
fn lines_and_constants(lab: &Lab) {
    for (layers, rows, base) in
        [(32, 8000, 120), (32, 8000, 2040), (32, 3000, 2040), (1, 100, 7), (80, 131_072, 4000), (1024, 9, 5)]
    {
        for beta in [1, 7, 20] {
            for method in [Pyramid, Uniform] {
                let mut case = LayersCase::new(method, Scores::new([2, layers, 1], rows, Vec::new()), base);
                case.scores.stride = 0; // nothing reads scores
                case.shape.beta = beta;
                check_without_scores(lab, &case);
            }
        }
    }
}

fn check_without_scores(lab: &Lab, case: &LayersCase) {
    let s = &case.shape;
    let plan = s.plan(&lab.device).unwrap();
    let lengths = [s.rows as i32, s.rows as i32 / 2];
    let (given, mut budgets) = (lab.upload(&lengths), lab.poisoned(8 * s.layers));
    let mut args = BudgetLayersArgs {
        scores: None,
        score_stride: None,
        lengths: Some(given.view()),
        histogram: None,
        budgets: budgets.view_mut(),
        ks: None,
    };
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
    for (seq, found) in lab.download::<i32>(&budgets).chunks_exact(s.layers).enumerate() {
        let rows = lengths[seq] as usize;
        let i = kvlar_reference::LayersInput {
            layers: s.layers,
            heads: 0,
            rows,
            scores: &[],
            base: s.base,
            method: s.method,
            r_max: 10.0,
            interval: 4,
            beta: s.beta,
        };
        assert_eq!(found, kvlar_reference::budget_layers(&i).unwrap(), "{s:?} of {rows} rows");
    }
}

fn heads_round_halves_to_even(lab: &Lab) {
    // Counts 0..=6 of one head out of two: with alpha = 1/2 every other budget is a half.
    for own in 0..=6 {
        let best = |i: usize| if i < own { 9.0 } else { 0.0 };
        let others = |i: usize| if i < 6 - own { 8.0 } else { -1.0 };
        let scores: Vec<f32> = (0..10).map(best).chain((0..10).map(others)).collect();
        for alpha in [0.0, 0.1, 0.25, 0.5, 0.7, 1.0] {
            HeadsCase::new(Scores::new([1, 1, 2], 10, scores.clone()), 3, alpha).check(lab);
        }
    }
}

fn random_budgets(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(6);
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let dims = [1 + rng.below(3), 1 + rng.below(7), 1 + rng.below(3)];
        let rows = 1 + rng.below(90);
        let mut scores = Scores::random(seed, dims, rows);
        scores.lengths = (rng.below(2) == 0).then(|| (0..dims[0]).map(|_| rng.below(rows + 1) as i32).collect());
        scores.histogram = rng.below(2) == 0;
        let base = rng.below(rows + 5);
        let mut layers = LayersCase::new(DynamicKv, scores.clone(), base);
        layers.shape.interval = 1 + rng.below(5);
        layers.shape.r_max = [0.7, 1.3, 10.0][rng.below(3)];
        layers.check(lab);
        HeadsCase::new(scores, base, rng.below(11) as f64 / 10.0).check(lab);
    }
}

/// The race detector's cases, whose CTAs have 1024 threads each.
fn layers_in_little(lab: &Lab) {
    let mut case = LayersCase::new(DynamicKv, Scores::random(2, [1, 2, 1], 12), 3);
    case.shape.interval = 1;
    case.check(lab);
}

fn heads_in_little(lab: &Lab) {
    HeadsCase::new(Scores::random(2, [1, 1, 2], 12), 3, 0.5).check(lab);
}

/// Counts that a selection keeps are the budgets, and the rows that are always kept.
fn budgets_are_what_topk_reads(lab: &Lab) {
    let (dims, rows, window) = ([2, 5, 3], 60, 4);
    let [seqs, layers, heads] = dims;
    let prefix = Scores::random(8, dims, rows - window);
    let shape = BudgetLayersShape { forced_rows: window, ..BudgetLayersShape::new(DynamicKv, dims, rows - window, 9) };
    let (plan, all) = (shape.plan(&lab.device).unwrap(), seqs * layers * heads);
    let (scores, mut budgets, mut ks) = (lab.upload(&prefix.values), lab.poisoned(4 * seqs * layers), lab.poisoned(4 * all));
    let mut args = BudgetLayersArgs {
        scores: Some(scores.view()),
        score_stride: None,
        lengths: None,
        histogram: None,
        budgets: budgets.view_mut(),
        ks: Some(ks.view_mut()),
    };
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
    // The window's rows lie behind the prefix.
    let behind = |row: &[f32]| row.iter().copied().chain([0.0; 4]).collect::<Vec<_>>();
    let all_scores: Vec<f32> = prefix.values.chunks_exact(rows - window).flat_map(behind).collect();
    let (all_scores, mut counts) = (lab.upload(&all_scores), lab.poisoned(4 * all));
    let topk = TopkShape { recent_rows: window, ..TopkShape::new(all, rows, rows) }.plan(&lab.device).unwrap();
    let mut scratch = Workspace::new(&lab.device, topk.workspace()).unwrap();
    let ks_of_rows = Some(Ks::Each(ks.view()));
    let mut args = TopkArgs { ks: ks_of_rows, counts: Some(counts.view_mut()), ..TopkArgs::new(all_scores.view()) };
    topk.launch(&lab.stream, &mut args, &mut scratch).unwrap();
    assert_eq!(lab.download::<i32>(&counts), lab.download::<i32>(&ks));
    let expected = LayersCase { scores: prefix, shape };
    let of_seq = |seq| expected.expected(seq).pop().unwrap_or_default();
    let each: Vec<i32> = (0..seqs).flat_map(of_seq).flat_map(|b: i32| vec![b + window as i32; heads]).collect();
    assert_eq!(lab.download::<i32>(&counts), each);
}

/// Rounds captured once: budgets follow what memory holds at a replay.
fn replays_follow_scores_and_lengths(lab: &Lab) {
    let mut case = LayersCase::new(DynamicKv, Scores::random(1, [2, 6, 2], 30), 7);
    let plan = case.shape.plan(&lab.device).unwrap();
    let (mut scores, mut lengths) = (lab.upload(&case.scores.values), lab.upload(&[30i32, 30]));
    let mut budgets = lab.poisoned(4 * 12);
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let graph = lab.stream.capture(|stream| {
        let mut args = BudgetLayersArgs {
            scores: Some(scores.view()),
            score_stride: None,
            lengths: Some(lengths.view()),
            histogram: None,
            budgets: budgets.view_mut(),
            ks: None,
        };
        plan.launch(stream, &mut args, &mut workspace)
    });
    let graph = graph.expect("a graph");
    for (seed, length) in [(1, [30, 30]), (2, [30, 5]), (3, [0, 17])] {
        case.scores = Scores { lengths: Some(length.to_vec()), ..Scores::random(seed, [2, 6, 2], 30) };
        lab.stream.upload(&mut scores, 0, bytemuck::cast_slice(&case.scores.values)).unwrap();
        lab.stream.upload(&mut lengths, 0, bytemuck::cast_slice(&length)).unwrap();
        // SAFETY: all that was captured is still there.
        unsafe { graph.launch(&lab.stream) }.expect("a replay");
        lab.stream.synchronize().expect("a result");
        let expected: Vec<i32> = (0..2).flat_map(|seq| case.expected(seq).pop().unwrap_or_default()).collect();
        assert_eq!(lab.download::<i32>(&budgets), expected);
    }
}

#[test]
fn bad_input_is_named() {
    let lab = Lab::reference();
    let shape = BudgetLayersShape::new(DynamicKv, [2, 3, 2], 10, 4);
    let bad = |s: BudgetLayersShape, what: &[&str]| says(&s.plan(&lab.device).unwrap_err(), what);
    bad(BudgetLayersShape { layers: 1025, ..shape }, &["layers", "1025"]);
    bad(BudgetLayersShape { rows: 1 << 30, ..shape }, &["rows", "too many"]);
    bad(BudgetLayersShape { base: 1 << 31, ..shape }, &["base", "2147483648"]);
    bad(BudgetLayersShape { r_max: 0.0, ..shape }, &["r_max", "0"]);
    bad(BudgetLayersShape { r_max: f64::NAN, ..shape }, &["r_max", "NaN"]);
    bad(BudgetLayersShape { interval: 0, ..shape }, &["interval"]);
    bad(BudgetLayersShape { beta: 0, ..shape }, &["beta", "0"]);
    bad(BudgetLayersShape { beta: 1 << 21, ..shape }, &["beta"]);
    bad(BudgetLayersShape { forced_rows: 1 << 31, ..shape }, &["forced_rows"]);
    let plan = shape.plan(&lab.device).unwrap();
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let (scores, short, mut small) = (lab.upload(&[0f32; 120]), lab.upload(&[1i32]), lab.device.alloc(7).unwrap());
    let mut budgets = lab.device.alloc(24).unwrap();
    macro_rules! refused {
        ($what:expr, $seen:expr, $($field:ident : $value:expr),*) => {{
            let base = BudgetLayersArgs {
                scores: Some(scores.view()),
                score_stride: None,
                lengths: None,
                histogram: None,
                budgets: budgets.view_mut(),
                ks: None,
            };
            let mut args = BudgetLayersArgs { $($field: $value,)* ..base };
            says(&plan.round(&lab.stream, &mut args, &mut workspace, $seen).unwrap_err(), &$what);
        }};
    }
    refused!(["seen", "2"], 2,);
    refused!(["scores", "needs"], 3, scores: None);
    refused!(["scores"], 3, scores: Some(short.view()));
    refused!(["score_stride", "9"], 3, score_stride: Some(9));
    refused!(["lengths"], 3, lengths: Some(short.view()));
    refused!(["histogram"], 3, histogram: Some(short.view()));
    refused!(["budgets"], 3, budgets: small.view_mut());
    refused!(["ks"], 3, ks: Some(small.view_mut()));
    let mut none = Workspace::new(&lab.device, Default::default()).unwrap();
    let mut args = BudgetLayersArgs {
        scores: Some(scores.view()),
        score_stride: None,
        lengths: None,
        histogram: None,
        budgets: budgets.view_mut(),
        ks: None,
    };
    says(&plan.launch(&lab.stream, &mut args, &mut none).unwrap_err(), &["workspace"]);

    let shape = BudgetHeadsShape::new([2, 3, 2], 10, 4);
    let bad = |s: BudgetHeadsShape, what: &[&str]| says(&s.plan(&lab.device).unwrap_err(), what);
    bad(BudgetHeadsShape { alpha: -0.1, ..shape }, &["alpha", "-0.1"]);
    bad(BudgetHeadsShape { alpha: f64::NAN, ..shape }, &["alpha", "NaN"]);
    bad(BudgetHeadsShape { rows: 1 << 30, ..shape }, &["rows", "too many"]);
    bad(BudgetHeadsShape { base: 1 << 31, ..shape }, &["base"]);
    bad(BudgetHeadsShape { forced_rows: 1 << 31, ..shape }, &["forced_rows"]);
    let plan = shape.plan(&lab.device).unwrap();
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let mut budgets = lab.device.alloc(48).unwrap();
    let (scores_view, none_yet) = (scores.view(), (None, None, None));
    let (score_stride, lengths, histogram) = none_yet;
    let mut args =
        BudgetHeadsArgs { scores: short.view(), score_stride, lengths, histogram, budgets: budgets.view_mut(), ks: None };
    says(&plan.launch(&lab.stream, &mut args, &mut workspace).unwrap_err(), &["scores"]);
    args = BudgetHeadsArgs { scores: scores_view, lengths: Some(short.view()), ..args };
    says(&plan.launch(&lab.stream, &mut args, &mut workspace).unwrap_err(), &["lengths"]);
    args = BudgetHeadsArgs { lengths: None, ks: Some(small.view_mut()), ..args };
    says(&plan.launch(&lab.stream, &mut args, &mut workspace).unwrap_err(), &["ks"]);
    args = BudgetHeadsArgs { ks: None, score_stride: Some(3), ..args };
    says(&plan.launch(&lab.stream, &mut args, &mut workspace).unwrap_err(), &["score_stride", "3"]);
}
