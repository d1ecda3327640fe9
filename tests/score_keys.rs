//! score_keys against the reference, and what append writes about new keys against score_keys.

use kvlar::{Codec, Dtype, Format, KeyMethod, KeySums, Pool, Rows, ScoreKeysArgs, ScoreKeysShape, Workspace};
use kvlar_reference::testing::Rng;
use kvlar_tests::pages::Layout;
use kvlar_tests::score_keys::{Appends, CAPACITY, GAP, HEADS, KeysCase, KeysRun, SEQS, rows_to_append};
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    methods_and_dims,
    layouts_and_lengths,
    lags,
    equal_rows_of_a_lag,
    rows_that_are_not_finite,
    zeros_and_far_values,
    many_rows,
    rows_beyond_a_length,
    sums_are_kept_and_given,
    bad_lengths_and_pages_are_reported,
    random_rows,
    a_few_rows_of_each_method,
    replays_follow_lengths,
    appended_keys_have_their_scores,
    appended_keys_add_to_sums,
);

const METHODS: [KeyMethod; 4] = [KeyMethod::L2Norm, KeyMethod::KeyDiff, KeyMethod::LagKv, KeyMethod::ValueKeyRatio];
const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn methods_and_dims(lab: &Lab) {
    for method in METHODS {
        let rows = if method == KeyMethod::LagKv { 300 } else { 37 };
        for (i, dim) in [8, 16, 24, 64, 72, 80, 128, 136, 256].into_iter().enumerate() {
            KeysCase::new(method, DTYPES[i % 2], Layout::Contiguous, (1, 2), &[rows], dim).check(lab);
        }
        KeysCase::of_dims(method, Dtype::Bf16, Layout::Hnd(16), (1, 1), &[rows], (128, 40)).check(lab);
        KeysCase::of_dims(method, Dtype::F16, Layout::Hnd(16), (1, 1), &[rows], (8, 256)).check(lab);
    }
}

fn layouts_and_lengths(lab: &Lab) {
    for method in METHODS {
        let long = if method == KeyMethod::LagKv { 400 } else { 70 };
        for (i, layout) in [Layout::Contiguous, Layout::Nhd(16), Layout::Hnd(64), Layout::PerHead(32)].into_iter().enumerate() {
            let dtype = DTYPES[i % 2];
            KeysCase::new(method, dtype, layout, (3, 2), &[long, 0, 17], 64).check(lab);
            let each = [3, long, 0, 16, long - 1, 1];
            KeysCase::new(method, dtype, layout, (3, 2), &each, 40).with(|c| c.head_gap = 5).check(lab);
        }
    }
}

/// Around one, two and three lags.
fn lags(lab: &Lab) {
    for rows in [1, 3, 4, 5, 131, 132, 133, 259, 260, 261, 387, 388, 389, 516, 700] {
        KeysCase::new(KeyMethod::LagKv, DTYPES[rows % 2], Layout::Hnd(16), (1, 1), &[rows], 32).check(lab);
    }
    KeysCase::new(KeyMethod::LagKv, Dtype::Bf16, Layout::PerHead(16), (1, 3), &[390, 259, 260], 64).check(lab);
}

/// Ties: the lower row stands higher.
fn equal_rows_of_a_lag(lab: &Lab) {
    let mut case = KeysCase::new(KeyMethod::LagKv, Dtype::Bf16, Layout::Contiguous, (1, 1), &[270], 24);
    for row in 4..132 {
        let of = |mut rows: Vec<f32>| rows.split_off(0);
        let (k, v) = (of(case.key(0, 4 + row % 3).to_vec()), of(case.value(0, 4 + row % 3).to_vec()));
        case.key(0, row).copy_from_slice(&k);
        case.value(0, row).copy_from_slice(&v);
    }
    case.check(lab);
    // All alike, and channels that are constant in the next lag.
    case.k.fill(1.5);
    case.v.fill(-2.0);
    let scores = case.check(lab);
    assert_eq!(scores[4..132], (0..128).map(|i| (127 - i) as f32 / 128.0).collect::<Vec<_>>());
}

fn rows_that_are_not_finite(lab: &Lab) {
    for (i, bad) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().enumerate() {
        for method in METHODS {
            let case = KeysCase::new(method, DTYPES[i % 2], Layout::Hnd(16), (1, 2), &[300], 72).with(|c| {
                c.key(0, 5)[71] = bad;
                c.key(1, 299)[0] = bad;
                c.key(0, 140)[8] = bad;
                c.value(1, 6)[30] = bad;
                c.value(0, 150)[3] = bad;
                c.value(0, 5)[0] = f32::NAN;
            });
            case.check(lab);
        }
    }
    // Nothing in a lag, or in the next, that could be compared.
    for rows in [4..132, 132..260, 4..260] {
        let mut case = KeysCase::new(KeyMethod::LagKv, Dtype::Bf16, Layout::Contiguous, (1, 1), &[270], 16);
        rows.for_each(|row| case.key(0, row)[3] = f32::NAN);
        case.check(lab);
    }
}

/// Squares that are beyond fp32, or vanish in it; rows without a direction.
fn zeros_and_far_values(lab: &Lab) {
    for method in [KeyMethod::L2Norm, KeyMethod::KeyDiff, KeyMethod::ValueKeyRatio] {
        for dtype in DTYPES {
            let case = KeysCase::new(method, dtype, Layout::Hnd(16), (1, 2), &[40], 24).with(|c| {
                let far = if c.dtype == Dtype::F16 { [6e4, 1e-7] } else { [1e30, 1e-38] };
                for (row, scale) in [(3, far[0]), (4, far[1]), (5, 0.0), (6, -far[0]), (9, 0.0)] {
                    c.key(0, row).iter_mut().for_each(|x| *x = scale * x.clamp(-1.0, 1.0));
                }
                for (row, scale) in [(4, far[1]), (5, 0.0), (7, 0.0), (8, far[0])] {
                    c.value(0, row).iter_mut().for_each(|x| *x = scale * x.clamp(-1.0, 1.0));
                }
                (0..40).for_each(|row| c.key(1, row).fill(0.0));
            });
            case.check(lab);
        }
    }
    // The largest of fp32 against small ones: a range whose width is beyond it, values far from a narrow one.
    let wide = KeysCase::new(KeyMethod::LagKv, Dtype::Bf16, Layout::Contiguous, (1, 1), &[264], 8).with(|c| {
        c.key(0, 140).fill(3e38);
        c.key(0, 141).fill(-3e38);
    });
    assert!(wide.check(lab).iter().all(|x| x.is_finite()));
    // Keys that cancel each other have no mean direction.
    let opposite = KeysCase::new(KeyMethod::KeyDiff, Dtype::F16, Layout::Contiguous, (1, 1), &[2], 8).with(|c| {
        c.key(0, 0).fill(2.0);
        c.key(0, 1).fill(-4.0);
    });
    assert_eq!(opposite.check(lab), [0.0, 0.0]);
}

/// Several CTAs a head.
fn many_rows(lab: &Lab) {
    for method in METHODS {
        for rows in [255, 256, 257, 1023, 1024, 1025, 2500] {
            if rows < 2000 || method != KeyMethod::LagKv {
                KeysCase::new(method, DTYPES[rows % 2], Layout::Hnd(64), (1, 2), &[rows, rows / 2 + 1], 16).check(lab);
            }
        }
    }
}

fn rows_beyond_a_length(lab: &Lab) {
    for method in METHODS {
        for fill in [true, false] {
            let case = KeysCase::new(method, Dtype::Bf16, Layout::PerHead(16), (2, 2), &[600, 3, 0, 290], 16);
            case.with(|c| c.fill = fill).check(lab);
        }
    }
}

fn sums_are_kept_and_given(lab: &Lab) {
    for lengths in [vec![70, 0, 33, 5], vec![2100, 30, 1024, 0]] {
        let case = KeysCase::new(KeyMethod::KeyDiff, Dtype::Bf16, Layout::PerHead(16), (2, 2), &lengths, 40);
        let mut run = KeysRun::new(lab, &case);
        let mut sums = lab.poisoned(4 * 4 * 40);
        run.launch(&lab.stream, KeySums::Write(sums.view_mut())).unwrap();
        case.compare(&run.scores());
        let kept: Vec<f32> = lab.download(&sums);
        for (head, sum) in kept.chunks(40).enumerate() {
            let empty = lengths[head] == 0;
            assert!(sum.iter().all(|x| x.is_finite()) && (empty == sum.iter().all(|&x| x == 0.0)), "{sum:?}");
        }
        run.poison();
        run.launch(&lab.stream, KeySums::Read(sums.view())).unwrap();
        case.compare(&run.scores());
        assert_eq!(lab.download::<f32>(&sums), kept);
        // Other sums, other scores.
        let away: Vec<f32> = kept.iter().map(|x| -x).collect();
        let turned = lab.upload(&away);
        let before = run.scores();
        run.launch(&lab.stream, KeySums::Read(turned.view())).unwrap();
        for (a, b) in run.scores().iter().zip(&before) {
            assert!(*a == -b || (a.is_infinite() && a == b), "{a} and {b}");
        }
    }
}

fn bad_lengths_and_pages_are_reported(lab: &Lab) {
    for method in METHODS {
        let case = KeysCase::new(method, Dtype::Bf16, Layout::Hnd(16), (2, 1), &[48, 20], 16).with(|c| c.fill = false);
        let mut run = KeysRun::new(lab, &case);
        // More than the capacity is the capacity, less than none is none.
        lab.stream.upload(&mut run.on_device.lengths, 0, bytemuck::cast_slice(&[77i32, -3])).unwrap();
        run.launch(&lab.stream, KeySums::Own).unwrap();
        let status = run.workspace.status(&lab.stream).unwrap();
        assert!(status.bad_length() && !status.bad_page());
        let scores = run.scores();
        assert!(scores[..48].iter().all(|x| x.is_finite()) && scores[48..].iter().all(|x| x.is_nan()));
        if method == KeyMethod::LagKv {
            continue; // reads no rows of so few
        }
        // A table's entry behind the length's pages names no page.
        run.workspace.clear_status(&lab.stream).unwrap();
        lab.stream.upload(&mut run.on_device.lengths, 0, bytemuck::cast_slice(&[48i32, 48])).unwrap();
        run.launch(&lab.stream, KeySums::Own).unwrap();
        let status = run.workspace.status(&lab.stream).unwrap();
        assert!(status.bad_page() && !status.bad_length());
    }
}

fn random_rows(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let (seqs, heads) = (1 + rng.below(3), 1 + rng.below(3));
        let layout = [Layout::Contiguous, Layout::Nhd(16), Layout::Hnd(32), Layout::PerHead(16)][rng.below(4)];
        let lengths: Vec<usize> = (0..seqs * heads).map(|_| rng.below(500)).collect();
        let lengths = if rng.below(2) == 0 { lengths[..seqs].to_vec() } else { lengths };
        let dims = (8 * (1 + rng.below(32)), 8 * (1 + rng.below(32)));
        let (method, dtype) = (METHODS[rng.below(4)], DTYPES[rng.below(2)]);
        let case = KeysCase::of_dims(method, dtype, layout, (seqs, heads), &lengths, dims);
        case.with(|c| (c.fill, c.head_gap) = (rng.below(2) == 0, rng.below(3))).check(lab);
    }
}

/// In little: the race detector's case.
fn a_few_rows_of_each_method(lab: &Lab) {
    for method in METHODS {
        let rows = [20, 1030, 262, 20][METHODS.iter().position(|&m| m == method).unwrap()];
        KeysCase::new(method, Dtype::Bf16, Layout::Hnd(16), (1, 1), &[rows], 8).check(lab);
    }
}

fn replays_follow_lengths(lab: &Lab) {
    for method in METHODS {
        let case = KeysCase::new(method, Dtype::F16, Layout::Contiguous, (2, 1), &[400, 400], 16).with(|c| c.fill = true);
        let mut run = KeysRun::new(lab, &case);
        lab.stream.upload(&mut run.on_device.lengths, 0, bytemuck::cast_slice(&[1i32, 0])).unwrap();
        let graph = lab.stream.capture(|stream| run.launch(stream, KeySums::Own)).unwrap();
        for lengths in [[400, 270], [0, 399], [10, 261]] {
            lab.stream.upload(&mut run.on_device.lengths, 0, bytemuck::cast_slice(&lengths.map(|n| n as i32))).unwrap();
            run.poison();
            // SAFETY: everything that was captured lives in `run`.
            unsafe { graph.launch(&lab.stream) }.unwrap();
            case.clone().with(|c| c.lengths = lengths.to_vec()).compare(&run.scores());
        }
    }
}

/// The bits of score_keys, at the rows' slots alone; of rows that are not dense, those of their type.
fn appended_keys_have_their_scores(lab: &Lab) {
    for dim in [8, 72, 128, 256] {
        for (dtype, codec) in [(Dtype::Bf16, Codec::Bf16), (Dtype::F16, Codec::F16), (Dtype::F16, Codec::Bf16)] {
            let rows = 6;
            let k = rows_to_append(rows, dim);
            let mut dense = Appends::new(lab, dtype, codec.into(), dim);
            dense.append(&k, &[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5], rows, false).unwrap();
            let appended: Vec<f32> = lab.download(&dense.l2norm);
            let scored = dense.scored(KeyMethod::L2Norm, rows, KeySums::Own);
            for (a, s) in appended.chunks(CAPACITY + GAP).zip(scored.chunks(CAPACITY)) {
                assert_eq!(a[..rows], s[..rows]);
                assert!(a[rows..].iter().all(|x| x.to_bits() == u32::MAX), "{a:?}");
            }
            // Elsewhere, some nowhere; encoded.
            let rotated = Format { hadamard: true, ..Codec::Int8.into() };
            for format in [codec.into(), Codec::Int4.into(), if dim.is_power_of_two() { rotated } else { Codec::Fp8.into() }] {
                let native = if dtype == Dtype::F16 { Codec::F16 } else { Codec::Bf16 };
                if format != codec.into() && codec != native {
                    continue;
                }
                let mut other = Appends::new(lab, dtype, format, dim);
                other.append(&k, &[19, -1, 7, 3, 40, 5, 0, 1, 2, 3, 4, 5], rows, false).unwrap();
                let there: Vec<f32> = lab.download(&other.l2norm);
                for head in 0..HEADS {
                    let (a, s) = (&there[head * (CAPACITY + GAP)..][..CAPACITY + GAP], &scored[head * CAPACITY..]);
                    assert_eq!([a[19], a[7], a[3], a[5]], [s[0], s[2], s[3], s[5]]);
                    assert_eq!(a.iter().filter(|x| x.is_nan()).count(), CAPACITY + GAP - 4);
                }
            }
        }
    }
}

/// A step at a time, the sums are those of the rows.
fn appended_keys_add_to_sums(lab: &Lab) {
    for (dtype, codec, dim) in [(Dtype::Bf16, Codec::Bf16, 128), (Dtype::F16, Codec::F16, 40)] {
        let (mut appends, steps) = (Appends::new(lab, dtype, codec.into(), dim), 12);
        for step in 0..steps {
            let mut k = Rng::new(step).normals(SEQS * HEADS * dim, 1.0);
            if step == 3 {
                k[..dim].fill(0.0);
                k[dim] = f32::INFINITY;
                k[2 * dim + 5] = f32::NAN;
            }
            appends.append(&k, &[step as i32, step as i32], 1, true).unwrap();
        }
        // Skipped: nothing is added.
        let before: Vec<f32> = lab.download(&appends.sums);
        appends.append(&vec![1.0; SEQS * HEADS * dim], &[-1, -1], 1, true).unwrap();
        assert_eq!(lab.download::<f32>(&appends.sums), before);
        let own = appends.scored(KeyMethod::KeyDiff, steps as usize, KeySums::Own);
        let given = appends.scored(KeyMethod::KeyDiff, steps as usize, KeySums::Read(appends.sums.view()));
        for (a, b) in own.iter().zip(&given) {
            assert!(a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() < 1e-6, "{a} and {b}");
        }
        assert_eq!(own.iter().filter(|x| x.is_nan()).count(), 2);
        // Several new rows have an order that no launch keeps.
        let two = vec![0.5; SEQS * HEADS * 2 * dim];
        says(&appends.append(&two, &[0, 1, 0, 1], 2, true).unwrap_err(), &["append", "unsupported", "2 new rows", "score_keys"]);
        appends.append(&two, &[0, 1, 0, 1], 2, false).unwrap();
    }
}

#[test]
fn bad_input_is_named() {
    let lab = Lab::reference();
    let shape = ScoreKeysShape {
        dtype: Dtype::Bf16,
        method: KeyMethod::L2Norm,
        seqs: 2,
        kv_heads: 2,
        max_rows: 16,
        head_dim: 16,
        value_dim: 0,
        fill: true,
    };
    let refused = |shape: ScoreKeysShape, words: &[&str]| says(&shape.plan(&lab.device).unwrap_err(), words);
    refused(ScoreKeysShape { dtype: Dtype::F32, ..shape }, &["unsupported", "f32"]);
    for head_dim in [0, 12, 264] {
        refused(ScoreKeysShape { head_dim, ..shape }, &["unsupported", "head_dim"]);
    }
    refused(ScoreKeysShape { method: KeyMethod::ValueKeyRatio, ..shape }, &["unsupported", "value_dim"]);
    refused(ScoreKeysShape { max_rows: (1 << 30) + 1, ..shape }, &["max_rows", "too many"]);
    refused(ScoreKeysShape { seqs: 1 << 20, kv_heads: 1 << 12, ..shape }, &["max_rows", "too many"]);
    let (rows, lengths) = (lab.upload(&[0u16; 2 * 2 * 16 * 16]), lab.upload(&[16i32, 16]));
    let (mut scores, mut short) = (lab.device.alloc(4 * 2 * 2 * 16).unwrap(), lab.device.alloc(4 * 2 * 2 * 16 - 4).unwrap());
    let given = std::cell::Cell::new(false);
    let launch = |shape: ScoreKeysShape, change: &dyn Fn(&mut ScoreKeysArgs<'_>), scores: &mut kvlar::Buffer| {
        let plan = shape.plan(&lab.device).unwrap();
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
        let mut args = ScoreKeysArgs {
            rows: Rows::contiguous(Some(lengths.view()), 16),
            keys: Pool::contiguous(rows.view(), 2, 16, 32),
            values: None,
            scores: scores.view_mut(),
            score_strides: None,
            sums: if given.get() { KeySums::Read(lengths.view()) } else { KeySums::Own },
        };
        change(&mut args);
        plan.launch(&lab.stream, &mut args, &mut workspace)
    };
    launch(shape, &|_| (), &mut scores).unwrap();
    let failed = |shape, change: &dyn Fn(&mut ScoreKeysArgs<'_>), scores: &mut kvlar::Buffer, words: &[&str]| {
        says(&launch(shape, change, scores).unwrap_err(), words);
    };
    failed(shape, &|_| (), &mut short, &["scores"]);
    failed(shape, &|a| a.score_strides = Some([33, 16]), &mut scores, &["scores"]);
    failed(shape, &|a| a.rows.max_rows = 17, &mut scores, &["rows", "17", "16"]);
    failed(shape, &|a| a.keys.row_stride = 16, &mut scores, &["keys"]);
    given.set(true);
    failed(shape, &|_| (), &mut scores, &["sums", "keydiff"]);
    let keydiff = ScoreKeysShape { method: KeyMethod::KeyDiff, ..shape };
    failed(keydiff, &|_| (), &mut scores, &["sums"]);
    given.set(false);
    let ratio = ScoreKeysShape { method: KeyMethod::ValueKeyRatio, value_dim: 16, ..shape };
    failed(ratio, &|_| (), &mut scores, &["values", "needs"]);
    failed(ratio, &|a| a.values = Some(Pool { row_stride: 8, ..a.keys }), &mut scores, &["values"]);
    let plan = keydiff.plan(&lab.device).unwrap();
    assert_eq!(plan.workspace().zeroed, 16);
}
