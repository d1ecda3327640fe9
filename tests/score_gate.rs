//! score_gate against the reference: sizes of every kind, where scores land, and the cases of its paper's notes.

use kvlar::{Dtype, Gate, GateWeights, ScoreGateArgs, ScoreGateShape, Workspace};
use kvlar_reference::testing::Rng;
use kvlar_tests::score_gate::{DIM, GateCase, GateRun, GateTensors};
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    row_counts,
    hidden_dims,
    groups,
    sink_counts,
    heads,
    split_dims,
    golden_cases,
    far_logits_are_0_and_1,
    untrained_gates_have_bounds,
    scores_land_where_told,
    rows_of_many_sequences,
    tokens_that_are_not_finite,
    projections_beyond_their_type,
    a_token_is_scored_by_itself,
    normal_data,
    random_gates,
    a_few_rows_of_the_gate,
    replays_follow_counts,
);

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn gate(hidden_dim: usize, heads: (usize, usize), sinks: usize) -> GateTensors {
    GateTensors::random((hidden_dim * 31 + heads.0 * 7 + heads.1 * 3 + sinks) as u64, hidden_dim, heads, sinks)
}

/// Around tiles of 16, 32 and 128 rows, and of both kinds.
fn row_counts(lab: &Lab) {
    for (i, rows) in [0, 1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 260, 400].into_iter().enumerate() {
        GateCase::new(DTYPES[i % 2], (1, rows), gate(72, (2, 2), 16)).check(lab);
    }
    GateCase::new(Dtype::Bf16, (0, 5), gate(8, (1, 1), 1)).check(lab);
}

fn hidden_dims(lab: &Lab) {
    for dim in [8, 16, 56, 64, 72, 120, 128, 136, 200, 328] {
        for dtype in DTYPES {
            GateCase::new(dtype, (1, 19), gate(dim, (2, 4), 16)).check(lab);
        }
        GateCase::new(Dtype::Bf16, (1, 390), gate(dim, (1, 4), 16)).check(lab);
    }
}

fn groups(lab: &Lab) {
    for (i, group) in [1, 2, 3, 4, 5, 6, 7, 8, 9, 13].into_iter().enumerate() {
        GateCase::new(DTYPES[i % 2], (1, 33), gate(80, (2, group), 16)).check(lab);
        GateCase::new(DTYPES[(i + 1) % 2], (1, 270), gate(24, (2, group), 16)).check(lab);
    }
}

fn sink_counts(lab: &Lab) {
    for (i, sinks) in [1, 2, 7, 8, 9, 15, 16, 17, 31].into_iter().enumerate() {
        GateCase::new(DTYPES[i % 2], (1, 20), gate(40, (2, 3), sinks)).check(lab);
        GateCase::new(DTYPES[i % 2], (1, 385), gate(40, (1, 2), sinks)).check(lab);
    }
}

/// An odd number leaves half of a CTA's warps without a head.
fn heads(lab: &Lab) {
    for (i, heads) in [1, 2, 3, 5, 8].into_iter().enumerate() {
        GateCase::new(DTYPES[i % 2], (1, 40), gate(48, (heads, 2), 16)).check(lab);
        GateCase::new(DTYPES[i % 2], (1, 300), gate(48, (heads, 2), 16)).check(lab);
    }
}

/// Several CTAs a tile, the last with fewer dims than the others.
fn split_dims(lab: &Lab) {
    for dim in [256, 264, 448, 640, 1000] {
        for group in [1, 4, 6] {
            let case = GateCase::new(DTYPES[dim / 8 % 2], (1, 5), gate(dim, (1, group), 16));
            assert!(!lab.runs_kernels() || case.plan(lab).bare_params().splits > 1);
            case.check(lab);
        }
        GateCase::new(Dtype::Bf16, (1, 33), gate(dim, (1, 5), 16)).check(lab);
    }
}

/// One head whose projections of the first `n` dims are `queries` times them, and those dims themselves.
fn line(queries: &[f32], q_norm: f32, k_base: Vec<f32>, b: f32) -> GateTensors {
    let diagonal = |x: f32| (0..DIM * DIM).map(|i| if i / DIM == i % DIM { x } else { 0.0 }).collect::<Vec<_>>();
    let group = queries.len();
    GateTensors {
        hidden_dim: DIM,
        kv_heads: 1,
        group,
        sinks: k_base.len() / DIM,
        q_proj: queries.iter().flat_map(|&x| diagonal(x)).collect(),
        q_bias: vec![0.0; group * DIM],
        k_proj: diagonal(1.0),
        q_norm: vec![q_norm; DIM],
        k_norm: vec![1.0; DIM],
        k_base,
        b: vec![b; group],
    }
}

/// The notes' G1, G2 and G3, which have 4 dimensions or a logit: four copies of 4 dimensions, half the norm.
fn golden_cases(lab: &Lab) {
    let scored = |dtype, tensors: GateTensors, x: &[f32]| {
        let case = GateCase { hidden: x.to_vec(), ..GateCase::new(dtype, (1, 1), tensors) };
        case.check(lab).0[0]
    };
    let x = [1.0, 2.0, 2.0, 4.0].repeat(4);
    let zeros = vec![0.0; 2 * DIM];
    // One value is four times its own, as is a unit vector's product with it.
    let mut sinks = zeros.clone();
    (sinks[0], sinks[DIM + 1], sinks[DIM + 3]) = (4.0, 2.0, -2.0);
    for (dtype, near) in [(Dtype::Bf16, 2e-3), (Dtype::F16, 3e-4)] {
        let golden = |tensors, expected: f32| {
            let score = scored(dtype, tensors, &x);
            assert!((score - expected).abs() < near, "{score}, not {expected}");
        };
        golden(line(&[1.0], 0.5, zeros.clone(), 0.0), 0.786_986);
        golden(line(&[1.0], 0.5, zeros.clone(), 0.5), 0.858_981);
        golden(line(&[1.0], 0.5, sinks.clone(), 0.5), 0.856_557_2);
        golden(line(&[1.0, -1.0], 0.5, zeros.clone(), 0.0), 0.425_182_5);
        let logits = [(-4.0, 0.001_143_418_5), (-2.0, 0.008_387_51), (0.0, 1.0 / 17.0), (2.0, 0.315_919_4), (4.0, 0.773_365_2)];
        for (logit, expected) in logits {
            let score = scored(dtype, line(&[1.0], logit / 4.0, vec![0.0; 16 * DIM], 0.0), &[1000.0; DIM]);
            assert!((score - expected).abs() < 1e-6, "logit {logit}: {score}, not {expected}");
        }
    }
}

fn far_logits_are_0_and_1(lab: &Lab) {
    for dtype in DTYPES {
        for (b, expected) in [(-3e4, 0.0), (-800.0, 0.0), (800.0, 1.0), (3e4, 1.0)] {
            let case = GateCase::new(dtype, (1, 3), line(&[1.0], 1.0, vec![0.0; DIM], b));
            assert_eq!(case.check(lab).0, [expected; 3]);
        }
        // A sink that takes everything.
        let mut sink = vec![0.0; DIM];
        sink[0] = 3e4;
        let case = GateCase { hidden: vec![2.0; DIM], ..GateCase::new(dtype, (1, 1), line(&[1.0], 1.0, sink, 0.0)) };
        assert_eq!(case.check(lab).0, [0.0]);
    }
}

/// |l| ≤ 4 beside 16 even sinks; a rounded unit vector may be a little longer.
fn untrained_gates_have_bounds(lab: &Lab) {
    for scale in [1e-3, 1.0, 1e3] {
        let mut tensors = gate(64, (2, 4), 16);
        tensors.k_base.fill(0.0);
        tensors.b.fill(0.0);
        tensors.q_norm.fill(1.0);
        tensors.k_norm.fill(1.0);
        let hidden = Rng::new(5).normals(60 * 64, scale);
        let case = GateCase { hidden, ..GateCase::new(Dtype::Bf16, (1, 60), tensors) };
        let scores = case.check_to(lab, 8e-3).0;
        assert!(scores.iter().all(|&x| x > 0.001_143_4 * 0.96 && x < 0.773_365_2 * 1.01), "{scores:?}");
    }
}

fn scores_land_where_told(lab: &Lab) {
    for rows in [7, 200] {
        let case = GateCase::new(Dtype::Bf16, (3, rows), gate(64, (3, 2), 16)).with(|c| {
            c.columns = 2 * rows + 3;
            (c.row_gap, c.head_gap) = (24, 5);
            c.first_columns = Some(vec![3, 0, rows as i32 + 3]);
            c.counts = Some(vec![rows as i32, 0, rows as i32 - 2]);
        });
        case.check(lab);
        // More rows than there are, fewer than none; columns before the first and behind the last.
        let odd = case.clone().with(|c| c.counts = Some(vec![rows as i32 + 9, -1, 1]));
        odd.check(lab);
        for first in [-2, -16, -17] {
            let outside = case.clone().with(|c| c.first_columns = Some(vec![first, 5, 2 * rows as i32]));
            assert!(outside.expected().1);
            outside.check(lab);
        }
    }
}

/// A tile holds rows of many sequences: a step of decoding.
fn rows_of_many_sequences(lab: &Lab) {
    for (seqs, rows) in [(40, 1), (13, 3), (150, 1), (200, 2)] {
        let case = GateCase::new(Dtype::F16, (seqs, rows), gate(136, (2, 3), 16)).with(|c| {
            c.columns = 50;
            c.first_columns = Some((0..seqs as i32).map(|i| i * 7 % 48).collect());
            c.counts = Some((0..seqs as i32).map(|i| i % (rows as i32 + 1)).collect());
        });
        case.check(lab);
    }
}

fn tokens_that_are_not_finite(lab: &Lab) {
    for rows in [6, 260] {
        let clean = GateCase::new(Dtype::Bf16, (1, rows), gate(72, (2, 2), 16));
        let expected = clean.check(lab).0;
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut case = clean.clone();
            case.hidden[2 * 72 + 70] = bad;
            for (i, (a, b)) in case.check(lab).0.iter().zip(&expected).enumerate() {
                assert_eq!(*a, if i % rows == 2 { 0.0 } else { *b });
            }
        }
    }
}

/// Finite, but not its projection where types are narrow.
fn projections_beyond_their_type(lab: &Lab) {
    for dtype in DTYPES {
        let mut case = GateCase::new(dtype, (1, 5), gate(64, (2, 2), 16));
        case.hidden[2 * 64..3 * 64].iter_mut().for_each(|x| *x *= 8192.0);
        let scores = case.check(lab).0;
        assert!([2, 7].iter().all(|&i| (scores[i] == 0.0) == (dtype == Dtype::F16)), "{scores:?}");
    }
    // Squares that are beyond fp32, as kernels sum them.
    let mut vast = GateCase::new(Dtype::Bf16, (1, 4), gate(64, (2, 2), 16));
    vast.hidden.iter_mut().for_each(|x| *x *= 1e25);
    assert!(!lab.runs_kernels() || vast.run(lab) == [0.0; 8]);
}

/// In another order, and in two chunks.
fn a_token_is_scored_by_itself(lab: &Lab) {
    for rows in [37, 300] {
        let (d, heads) = (64, 2);
        let case = GateCase::new(Dtype::Bf16, (1, rows), gate(d, (heads, 3), 16));
        let scores = case.check(lab).0;
        let order = Rng::new(9).permutation(rows);
        let moved = order.iter().flat_map(|&t| case.hidden[t * d..][..d].to_vec()).collect();
        let moved = GateCase { hidden: moved, ..case.clone() }.check(lab).0;
        let cut = rows / 3;
        let part = |range: std::ops::Range<usize>| {
            let hidden = case.hidden[range.start * d..range.end * d].to_vec();
            GateCase { hidden, ..GateCase::new(Dtype::Bf16, (1, range.len()), case.tensors.clone()) }.check(lab).0
        };
        let (first, last) = (part(0..cut), part(cut..rows));
        for head in 0..heads {
            for (i, &t) in order.iter().enumerate() {
                assert_eq!(moved[head * rows + i], scores[head * rows + t]);
            }
            assert_eq!(first[head * cut..][..cut], scores[head * rows..][..cut]);
            assert_eq!(last[head * (rows - cut)..][..rows - cut], scores[head * rows + cut..][..rows - cut]);
        }
    }
}

/// Sums that round: 16-bit values may be neighbours of the reference's.
fn normal_data(lab: &Lab) {
    for (dtype, near) in [(Dtype::Bf16, 8e-3), (Dtype::F16, 1e-3)] {
        for rows in [9, 300] {
            let mut tensors = gate(192, (2, 4), 16);
            let mut rng = Rng::new(3);
            tensors.q_proj = rng.normals(tensors.q_proj.len(), 0.1);
            tensors.k_proj = rng.normals(tensors.k_proj.len(), 0.1);
            let case = GateCase::new(dtype, (1, rows), tensors);
            GateCase { hidden: rng.normals(rows * 192, 1.0), ..case }.check_to(lab, near);
        }
    }
}

fn random_gates(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let heads = (1 + rng.below(4), 1 + rng.below(8));
        let tensors = GateTensors::random(seed, 8 * (1 + rng.below(40)), heads, 1 + rng.below(20));
        let (seqs, rows) = (1 + rng.below(4), 1 + rng.below(150));
        let case = GateCase::new(DTYPES[rng.below(2)], (seqs, rows), tensors).with(|c| {
            c.columns = rows + rng.below(9);
            (c.row_gap, c.head_gap) = (8 * rng.below(3), rng.below(3));
            c.counts = (rng.below(2) == 0).then(|| (0..seqs).map(|_| rng.below(rows + 1) as i32).collect());
            let slack = c.columns - rows;
            c.first_columns = (rng.below(2) == 0).then(|| (0..seqs).map(|_| rng.below(slack + 1) as i32).collect());
        });
        case.check(lab);
    }
}

/// In little: the race detector's case, of both kinds of tiles.
fn a_few_rows_of_the_gate(lab: &Lab) {
    GateCase::new(Dtype::Bf16, (1, 3), gate(256, (1, 5), 9)).check(lab);
    GateCase::new(Dtype::F16, (1, 140), gate(72, (3, 5), 9)).check(lab);
}

fn replays_follow_counts(lab: &Lab) {
    for rows in [4, 300] {
        let case = GateCase::new(Dtype::Bf16, (2, rows), gate(256, (2, 2), 16)).with(|c| {
            c.columns = rows + 10;
            (c.first_columns, c.counts) = (Some(vec![0, 0]), Some(vec![1, 0]));
        });
        let mut run = GateRun::new(lab, &case);
        let graph = lab.stream.capture(|stream| run.launch(stream)).expect("a graph");
        for (first, counts) in [(vec![10, 3], vec![rows as i32, 2]), (vec![0, 9], vec![0, rows as i32]), (vec![5, 5], vec![3, 4])]
        {
            let now = case.clone().with(|c| (c.first_columns, c.counts) = (Some(first.clone()), Some(counts.clone())));
            lab.stream.upload(run.first_columns.as_mut().unwrap(), 0, bytemuck::cast_slice(&first)).unwrap();
            lab.stream.upload(run.counts.as_mut().unwrap(), 0, bytemuck::cast_slice(&counts)).unwrap();
            run.poison();
            // SAFETY: everything that was captured lives in `run`.
            unsafe { graph.launch(&lab.stream) }.unwrap();
            run.compare(&run.scores(), &now.expected().0, 1e-5);
        }
    }
}

#[test]
fn bad_gates_are_named() {
    let lab = Lab::reference();
    let tensors = gate(16, (2, 3), 5);
    let good = tensors.gate();
    let refused = |gate: Gate<'_>, dtype, words: &[&str]| {
        says(&GateWeights::new(&lab.device, &lab.stream, &gate, dtype).unwrap_err(), words);
    };
    refused(good, Dtype::F32, &["score_gate", "unsupported", "f32"]);
    refused(Gate { gate_dim: 8, ..good }, Dtype::Bf16, &["unsupported", "gate dimension 8: 16 is"]);
    refused(Gate { q_bias: &good.q_bias[1..], ..good }, Dtype::Bf16, &["q_proj.bias"]);
    refused(Gate { sinks: 0, ..good }, Dtype::Bf16, &["k_base"]);
    let narrow = GateTensors::random(1, 12, (1, 1), 1);
    refused(narrow.gate(), Dtype::Bf16, &["hidden_dim", "12"]);
    let mut wide = tensors.clone();
    wide.k_proj[3] = 1e5;
    refused(wide.gate(), Dtype::F16, &["projections", "100000", "f16"]);
    GateWeights::new(&lab.device, &lab.stream, &wide.gate(), Dtype::Bf16).unwrap();
    let mut wide = tensors.clone();
    wide.k_base[7] = 1e6;
    refused(wide.gate(), Dtype::F16, &["k_base", "f16"]);
    let mut wide = tensors.clone();
    (wide.q_norm[0], wide.k_norm[0]) = (1e30, 1e30);
    refused(wide.gate(), Dtype::Bf16, &["gate", "inf"]);
}

#[test]
fn bad_input_is_named() {
    let lab = Lab::reference();
    let tensors = gate(16, (2, 3), 5);
    let weights = GateWeights::new(&lab.device, &lab.stream, &tensors.gate(), Dtype::Bf16).unwrap();
    assert_eq!(weights.dtype(), Dtype::Bf16);
    assert_eq!(weights.bytes(), 2 * (2 * 64 * 16 + 2 * 3 * 8 * 16) + 4 * (6 * 16 + 16 + 6));
    let shape = weights.shape(2, 3, 10);
    let refused = |shape: ScoreGateShape, words: &[&str]| says(&shape.plan(&lab.device).unwrap_err(), words);
    refused(ScoreGateShape { dtype: Dtype::F32, ..shape }, &["unsupported", "f32"]);
    for dim in [0, 12, (1 << 20) + 8] {
        refused(ScoreGateShape { hidden_dim: dim, ..shape }, &["hidden_dim"]);
    }
    refused(ScoreGateShape { kv_heads: 0, ..shape }, &["kv_heads", "0"]);
    refused(ScoreGateShape { group: 0, ..shape }, &["group", "0"]);
    refused(ScoreGateShape { sinks: 0, ..shape }, &["sinks", "0"]);
    refused(ScoreGateShape { rows: 1 << 30, ..shape }, &["rows", "too many"]);
    refused(ScoreGateShape { columns: (1 << 30) + 1, ..shape }, &["columns", "too many"]);
    let plan = shape.plan(&lab.device).unwrap();
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let (hidden, one) = (lab.upload(&[0u16; 2 * 3 * 16]), lab.upload(&[0i32]));
    let mut scores = lab.device.alloc(4 * 2 * 2 * 10).unwrap();
    let mut args = ScoreGateArgs {
        hidden: hidden.view(),
        hidden_strides: None,
        weights: &weights,
        scores: scores.view_mut(),
        score_strides: None,
        first_columns: None,
        counts: None,
    };
    plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
    let mut refused = |args: &mut ScoreGateArgs<'_>, words: &[&str]| {
        says(&plan.launch(&lab.stream, args, &mut workspace).unwrap_err(), words);
    };
    args.hidden_strides = Some([52, 16]);
    refused(&mut args, &["hidden", "multiples of 8"]);
    args.hidden_strides = Some([56, 16]);
    refused(&mut args, &["hidden"]);
    args.hidden_strides = None;
    args.score_strides = Some([21, 10]);
    refused(&mut args, &["scores"]);
    args.score_strides = None;
    args.counts = Some(one.view());
    refused(&mut args, &["counts"]);
    (args.counts, args.first_columns) = (None, Some(one.view()));
    refused(&mut args, &["first_columns"]);
    args.first_columns = None;
    let other = gate(16, (2, 2), 5);
    let other = GateWeights::new(&lab.device, &lab.stream, &other.gate(), Dtype::Bf16).unwrap();
    args.weights = &other;
    refused(&mut args, &["weights"]);
    let other = GateWeights::new(&lab.device, &lab.stream, &tensors.gate(), Dtype::F16).unwrap();
    args.weights = &other;
    refused(&mut args, &["weights"]);
    // Without its scratch.
    let split = ScoreGateShape { rows: 1, seqs: 1, hidden_dim: 1024, ..shape }.plan(&lab.device).unwrap();
    assert!(split.workspace().scratch > 0);
}
