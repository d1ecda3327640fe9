//! Attention over rows at or above a cut, against the reference over those rows alone.

use kvlar::{AttendCutShape, Buffer, Codec, CutArgs, Dtype, Error, Schedule, SegmentShape};
use kvlar_reference::testing::Rng;
use kvlar_tests::attend::{AttendCase, AttendRun, SegmentCase};
use kvlar_tests::attend_cut::{AttendCutCase, AttendCutData, AttendCutRun, Cut, Scores, check};
use kvlar_tests::pages::Layout;
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    every_kernel,
    lengths_and_cuts,
    gqa_ratios_and_query_rows,
    layouts,
    ragged_heads,
    broken_and_equal_scores,
    rows_that_are_always_seen,
    neighbours_and_long_gaps,
    masks_hold_as_well,
    other_segments_are_seen,
    nothing_is_selected,
    everything_selected_is_attend,
    random_cases,
    a_selection_in_little,
    equal_bits_from_run_to_run,
    replays_follow_scores_cuts_and_lengths,
    bad_lengths_and_pages_are_clamped_and_reported,
);

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn base(lengths: &[usize]) -> AttendCase {
    AttendCase::new(Dtype::Bf16, (4, 2), 64, lengths)
}

fn every_kernel(lab: &Lab) {
    for dtype in DTYPES {
        for (heads, d, dv) in [
            ((4, 2), 64, 64),
            ((12, 1), 64, 64),
            ((4, 2), 128, 128),
            ((9, 1), 128, 128),
            ((2, 1), 256, 256),
            ((2, 1), 72, 40),
            ((3, 1), 136, 200),
        ] {
            let attend = AttendCase::new(dtype, heads, d, &[150, 37]).with(|c| c.value_dim = dv);
            check(lab, &AttendCutCase::new(attend, Cut::Best(25)).with(|c| c.recent_rows = 3));
        }
    }
}

fn lengths_and_cuts(lab: &Lab) {
    for d in [64, 128] {
        for cut in [Cut::All, Cut::Best(1), Cut::Best(15), Cut::Best(70), Cut::Digit] {
            check(lab, &AttendCutCase::new(AttendCase::new(Dtype::Bf16, (2, 1), d, &[1, 16, 17, 31, 33, 64, 129]), cut));
        }
    }
}

fn gqa_ratios_and_query_rows(lab: &Lab) {
    for (heads, rows) in [((1, 1), 1), ((3, 1), 2), ((6, 2), 5), ((24, 1), 1), ((33, 3), 1), ((2, 2), 17)] {
        let attend = AttendCase::new(Dtype::F16, heads, 64, &[70, 40]).with(|c| c.query_rows = rows);
        check(lab, &AttendCutCase::new(attend, Cut::Best(20)));
    }
}

fn layouts(lab: &Lab) {
    for layout in [Layout::Contiguous, Layout::Nhd(16), Layout::Hnd(64), Layout::PerHead(16), Layout::PerHead(128)] {
        let attend = AttendCase::new(Dtype::Bf16, (6, 3), 128, &[70, 33, 128]).with(|c| c.segments[0].layout = layout);
        check(lab, &AttendCutCase::new(attend, Cut::Best(13)));
    }
}

fn ragged_heads(lab: &Lab) {
    let attend = AttendCase::new(Dtype::Bf16, (6, 3), 64, &[0, 0]).with(|c| {
        let s = &mut c.segments[0];
        (s.layout, s.capacity, s.lengths) = (Layout::PerHead(16), 130, vec![130, 3, 0, 64, 17, 129]);
        // Given, since heads would differ in where their last row is.
        c.q_positions = true;
    });
    check(lab, &AttendCutCase::new(attend, Cut::Best(9)).with(|c| (c.sink_rows, c.recent_rows) = (2, 5)));
}

fn broken_and_equal_scores(lab: &Lab) {
    for scores in [Scores::Broken, Scores::Ties] {
        for cut in [Cut::All, Cut::Best(1), Cut::Best(30), Cut::Best(60), Cut::Digit] {
            check(lab, &AttendCutCase::new(base(&[90, 41]), cut).with(|c| c.scores = scores));
        }
    }
}

fn rows_that_are_always_seen(lab: &Lab) {
    for (sinks, recent) in [(4, 0), (0, 9), (3, 40), (1 << 30, 0), (0, 1 << 30), (16, 33)] {
        for cut in [Cut::None, Cut::Best(8)] {
            let case = AttendCutCase::new(base(&[130, 41, 0, 3]), cut);
            check(lab, &case.with(|c| (c.sink_rows, c.recent_rows) = (sinks, recent)));
        }
    }
}

/// Selected rows at one end of a long sequence, and few and far between: a warp looks several times and finds nothing in between.
fn neighbours_and_long_gaps(lab: &Lab) {
    for (d, schedule) in [(64, Schedule::Balanced), (128, Schedule::Own)] {
        let attend = AttendCase::new(Dtype::Bf16, (2, 1), d, &[9000, 200]).with(|c| c.schedule = schedule);
        check(lab, &AttendCutCase::new(attend.clone(), Cut::Best(40)).with(|c| c.scores = Scores::Rising));
        check(lab, &AttendCutCase::new(attend, Cut::Best(5)).with(|c| c.sink_rows = 1));
    }
    // Several looks for each CTA of the emulation.
    let long = AttendCase::new(Dtype::Bf16, (1, 1), 8, &[56_000]).with(|c| c.segments[0].layout = Layout::Contiguous);
    check(lab, &AttendCutCase::new(long.clone(), Cut::Best(60)).with(|c| c.scores = Scores::Rising));
    check(lab, &AttendCutCase::new(long, Cut::Best(2000)));
}

fn masks_hold_as_well(lab: &Lab) {
    let cases = [
        base(&[60, 100]).with(|c| (c.window, c.query_rows) = (20, 4)),
        base(&[60, 100]).with(|c| {
            (c.window, c.query_rows, c.q_positions) = (30, 3, true);
            c.segments[0].positions = true;
        }),
        base(&[60, 100]).with(|c| {
            c.segments[0].positions = true;
            c.query_rows = 2;
        }),
        base(&[30, 77]).with(|c| (c.softcap, c.sinks) = (5.0, true)),
        base(&[30, 77]).with(|c| (c.out_dtype, c.rows_first, c.query_rows) = (Dtype::Bf16, true, 3)),
    ];
    for attend in cases {
        for cut in [Cut::All, Cut::Best(17)] {
            check(lab, &AttendCutCase::new(attend.clone(), cut).with(|c| c.sink_rows = 2));
        }
    }
}

/// Sinks and recent rows in segments of their own.
fn other_segments_are_seen(lab: &Lab) {
    let segment = |layout, lengths: &[usize]| SegmentCase { capacity: 96, ..SegmentCase::new(Codec::Bf16, layout, lengths) };
    for (which, d) in [(1, 128), (1, 64), (0, 128), (2, 64)] {
        let attend = AttendCase::new(Dtype::Bf16, (8, 2), d, &[0, 0, 0]).with(|c| {
            c.segments = vec![
                segment(Layout::Contiguous, &[4, 4, 2]),
                segment(Layout::Hnd(32), &[90, 33, 0]),
                segment(Layout::Nhd(16), &[17, 1, 0]),
            ];
        });
        for cut in [Cut::None, Cut::Best(7)] {
            check(lab, &AttendCutCase::new(attend.clone(), cut).with(|c| (c.segment, c.recent_rows) = (which, 1)));
        }
    }
}

fn nothing_is_selected(lab: &Lab) {
    for sinks in [false, true] {
        let attend = base(&[50, 0, 300]).with(|c| c.sinks = sinks);
        let data = AttendCutData::new(&AttendCutCase::new(attend, Cut::None));
        let mut run = AttendCutRun::new(lab, &data);
        run.enqueue();
        let result = run.run.result();
        data.compare(&result).unwrap_or_else(|e| panic!("{e}"));
        assert!(result.out.iter().all(|&x| x == 0.0));
        assert!(result.lse.iter().all(|x| if sinks { x.is_finite() } else { *x == f32::NEG_INFINITY }));
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// With every row selected each warp takes the tiles that it takes in attend: bit for bit.
fn everything_selected_is_attend(lab: &Lab) {
    for d in [64, 128] {
        let attend = AttendCase::new(Dtype::Bf16, (4, 2), d, &[600, 50, 333]);
        let data = AttendCutData::new(&AttendCutCase::new(attend, Cut::All));
        let (mut plain, mut run) = (AttendRun::new(lab, &data.attend), AttendCutRun::new(lab, &data));
        plain.enqueue();
        run.enqueue();
        let (plain, cut) = (plain.result(), run.run.result());
        assert_eq!((bits(&plain.out), bits(&plain.lse)), (bits(&cut.out), bits(&cut.lse)));
    }
}

fn random_cases(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let (heads, dtype) = ([(1, 1), (4, 2), (6, 2), (16, 1)][rng.below(4)], DTYPES[rng.below(2)]);
        let lengths: Vec<usize> = (0..1 + rng.below(3)).map(|_| rng.below(700)).collect();
        let d = [16, 64, 96, 128, 256][rng.below(5)];
        let attend = AttendCase::new(dtype, heads, d, &lengths).with(|c| {
            c.seed = seed;
            c.schedule = [Schedule::Balanced, Schedule::Own][rng.below(2)];
            c.segments[0].layout = [Layout::Contiguous, Layout::Hnd(16), Layout::PerHead(64), Layout::Nhd(32)][rng.below(4)];
            c.query_rows = [1, 1, 2, 4][rng.below(4)];
            c.window = [0, 0, 90][rng.below(3)];
            c.sinks = rng.below(3) == 0;
        });
        let cut = [Cut::Best(1 + rng.below(200)), Cut::Best(1 + rng.below(20)), Cut::Digit, Cut::None][rng.below(4)];
        let case = AttendCutCase::new(attend, cut).with(|c| {
            c.scores = [Scores::Random, Scores::Ties, Scores::Broken][rng.below(3)];
            (c.sink_rows, c.recent_rows, c.padding) = (rng.below(6), rng.below(40), rng.below(5));
        });
        check(lab, &case);
    }
}

/// The race detector's case.
fn a_selection_in_little(lab: &Lab) {
    check(lab, &AttendCutCase::new(base(&[300, 33]), Cut::Best(20)).with(|c| (c.sink_rows, c.recent_rows) = (2, 3)));
}

fn equal_bits_from_run_to_run(lab: &Lab) {
    let data = AttendCutData::new(&AttendCutCase::new(base(&[900, 50, 333]), Cut::Best(100)));
    let mut run = AttendCutRun::new(lab, &data);
    run.enqueue();
    let first = run.run.result();
    data.compare(&first).unwrap_or_else(|e| panic!("{e}"));
    run.run.poison();
    run.enqueue();
    let second = run.run.result();
    assert_eq!((bits(&first.out), bits(&first.lse)), (bits(&second.out), bits(&second.lse)));
}

fn replays_follow_scores_cuts_and_lengths(lab: &Lab) {
    // Of one case three times: with other scores and cuts, and with shorter sequences.
    let attend =
        |lengths: &[usize]| base(lengths).with(|c| (c.segments[0].layout, c.segments[0].capacity) = (Layout::Contiguous, 300));
    let case = |lengths: &[usize], cut, scores| {
        AttendCutCase::new(attend(lengths), cut).with(|c| (c.scores, c.recent_rows) = (scores, 2))
    };
    let datas = [
        AttendCutData::new(&case(&[300, 77], Cut::Best(30), Scores::Random)),
        AttendCutData::new(&case(&[300, 77], Cut::Best(9), Scores::Rising)),
        AttendCutData::new(&case(&[300, 77], Cut::None, Scores::Ties)),
    ];
    // Rows that no data selects hold NaN, in its own pools: here all rows are there.
    let whole = AttendCutData::new(&case(&[300, 77], Cut::All, Scores::Random));
    let mut run = AttendCutRun::new(lab, &whole);
    let (plan, stride) = (run.plan, whole.case.stride());
    let AttendCutRun { run: inner, scores, cuts, .. } = &mut run;
    let graph = inner.with_args(|_, args, work, workspace| {
        let cut = CutArgs { scores: scores.view(), score_stride: stride, cuts: cuts.view() };
        lab.stream.capture(|stream| {
            plan.attend().schedule(stream, args, work, workspace)?;
            plan.launch(stream, args, &cut, work, workspace)
        })
    });
    let graph = graph.expect("a graph");
    let put = |to: &mut Buffer, bytes: &[u8]| lab.stream.upload(to, 0, bytes).expect("upload");
    for data in &datas {
        put(scores, bytemuck::cast_slice(&data.scores[..data.scores.len() - data.case.padding]));
        put(cuts, bytemuck::cast_slice(&data.cuts));
        // SAFETY: everything that was captured lives in `run`.
        unsafe { graph.launch(&lab.stream) }.expect("a replay");
        lab.stream.synchronize().expect("a result");
        data.compare(&inner.result()).unwrap_or_else(|e| panic!("{e}"));
    }
    // No rows: nothing is seen, whatever was.
    inner.set_lengths(0, &[0, 0]);
    // SAFETY: likewise.
    unsafe { graph.launch(&lab.stream) }.expect("a replay");
    lab.stream.synchronize().expect("a result");
    assert!(inner.result().lse.iter().all(|&x| x == f32::NEG_INFINITY));
}

fn bad_lengths_and_pages_are_clamped_and_reported(lab: &Lab) {
    let case = AttendCutCase::new(base(&[40, 40]), Cut::All);
    for (lengths, bad) in [([40, 41], true), ([-1, 40], true), ([40, 40], false)] {
        let mut run = AttendCutRun::new(lab, &AttendCutData::new(&case));
        run.run.set_lengths(0, &lengths);
        run.enqueue();
        assert_eq!(run.run.status().bad_length(), bad, "{lengths:?}");
    }
    let mut data = AttendCutData::new(&case);
    data.attend = data.attend.with_bad_page();
    let mut run = AttendCutRun::new(lab, &data);
    run.enqueue();
    assert!(run.run.status().bad_page() && !run.run.status().bad_length());
}

#[test]
fn shapes_without_a_kernel_are_refused() {
    let lab = Lab::reference();
    let shape = AttendCutCase::new(base(&[40, 20]), Cut::All).shape();
    let mut quantized = shape;
    quantized.attend.segments[0] = Some(SegmentShape::new(Codec::Int8, 40));
    let e = quantized.plan(&lab.device).unwrap_err();
    assert!(matches!(e, Error::Unsupported { op: "attend_cut", .. }), "{e:?}");
    says(&AttendCutShape { segment: 1, ..shape }.plan(&lab.device).unwrap_err(), &["segment", "1 of 1"]);
    says(&AttendCutShape { sink_rows: (1 << 30) + 1, ..shape }.plan(&lab.device).unwrap_err(), &["sink_rows", "2^30"]);
    says(&AttendCutShape { recent_rows: usize::MAX, ..shape }.plan(&lab.device).unwrap_err(), &["recent_rows", "2^30"]);
    let mut bad = shape;
    bad.attend.softcap = -1.0;
    says(&bad.plan(&lab.device).unwrap_err(), &["softcap"]);
}

#[test]
fn bad_arguments_are_named_and_nothing_is_written() {
    let lab = Lab::reference();
    let data = AttendCutData::new(&AttendCutCase::new(base(&[40, 20]), Cut::Best(7)));
    let AttendCutRun { mut run, plan, scores, cuts, .. } = AttendCutRun::new(&lab, &data);
    let stride = data.case.stride();
    let good = CutArgs { scores: scores.view(), score_stride: stride, cuts: cuts.view() };
    run.with_args(|_, args, work, workspace| {
        let e = plan.launch(&lab.stream, args, &good, work, workspace).unwrap_err();
        says(&e, &["work list", "schedule"]);
        plan.attend().schedule(&lab.stream, args, work, workspace).unwrap();
        let mut refused = |cut: CutArgs<'_>, words: &[&str]| {
            says(&plan.launch(&lab.stream, args, &cut, work, workspace).unwrap_err(), words);
        };
        let (all, all_cuts) = (scores.len(), cuts.len());
        refused(CutArgs { scores: scores.view().slice(0..all - 1).unwrap(), ..good }, &["scores"]);
        refused(CutArgs { scores: scores.view().slice(2..all).unwrap(), ..good }, &["scores"]);
        refused(CutArgs { cuts: cuts.view().slice(0..all_cuts - 1).unwrap(), ..good }, &["cuts"]);
        refused(CutArgs { cuts: cuts.view().slice(4..all_cuts).unwrap(), ..good }, &["cuts"]);
        refused(CutArgs { score_stride: 39, ..good }, &["score_stride", "39", "40"]);
        refused(CutArgs { score_stride: usize::MAX, ..good }, &["score_stride"]);
        args.lse = None;
        args.q = args.q.slice(0..2).unwrap();
        says(&plan.launch(&lab.stream, args, &good, work, workspace).unwrap_err(), &["q"]);
    });
    assert!(run.result().out.iter().all(|x| x.is_nan()), "something was written");
}
