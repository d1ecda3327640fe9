//! Every error that a caller of scores by attention can cause is reached, names what is wrong, and leaves memory as it was.

use kvlar::{Device, Dtype, Error, Memory, Pooling, ScoreArgs, ScoreReduction, ScoreShape, ScoredRows, Strides, View, Workspace};
use kvlar_tests::score::{ScoreCase, ScoreData, ScoreRun};
use kvlar_tests::{Lab, says};

fn plan_error(change: impl FnOnce(&mut ScoreShape)) -> Error {
    let mut s = ScoreShape::window(Dtype::Bf16, 2, (4, 2), 8, 100, 64);
    change(&mut s);
    s.plan(&Device::reference()).expect_err("a bad shape")
}

#[test]
fn shapes_are_checked() {
    let repeat = |change: fn(&mut ScoreShape)| {
        plan_error(|s| {
            *s = ScoreShape::repeat(Dtype::Bf16, 1, (4, 2), 8, 20, 100, 64);
            change(s);
        })
    };
    for (e, words) in [
        (plan_error(|s| s.head_dim = 264), ["head_dim", "264"]),
        (plan_error(|s| s.head_dim = 12), ["head_dim", "12"]),
        (plan_error(|s| s.dtype = Dtype::F32), ["f32", "bf16"]),
        (plan_error(|s| s.over_rows = ScoreReduction::Max), ["largest", "chunk"]),
        (plan_error(|s| s.pool = Pooling::Max(1 << 20 | 1)), ["Max(1048577)", "shared memory"]),
        (plan_error(|s| s.pool = Pooling::Avg(usize::MAX)), ["Avg", "shared memory"]),
        (repeat(|s| s.over_rows = ScoreReduction::Sum), ["chunk", "largest"]),
        (repeat(|s| s.over_heads = ScoreReduction::Mean), ["chunk", "largest"]),
        (repeat(|s| s.pool = Pooling::Max(3)), ["chunk", "largest"]),
        (repeat(|s| s.accumulate = Some(1.0)), ["running sums", "chunk"]),
        (repeat(|s| s.given_lse = true), ["given lse", "chunk"]),
    ] {
        assert!(matches!(e, Error::Unsupported { op: "score", .. }), "{e:?}");
        says(&e, &words);
    }
    for (e, name) in [
        (plan_error(|s| s.q_heads = 5), "q_heads"),
        (plan_error(|s| s.q_heads = 0), "q_heads"),
        (plan_error(|s| s.kv_heads = 0), "q_heads"),
        (plan_error(|s| s.scale = f32::NAN), "scale"),
        (plan_error(|s| s.rows = 1 << 31), "rows"),
        (plan_error(|s| s.seqs = 1 << 31), "rows"),
        (plan_error(|s| s.queries = 0), "queries"),
        (plan_error(|s| s.queries = 101), "queries"),
        (plan_error(|s| s.from_start = true), "queries"),
        (plan_error(|s| (s.q_heads, s.queries, s.rows) = (8192, 1 << 20, 1 << 20)), "queries"),
        (plan_error(|s| s.pool = Pooling::Avg(4)), "pool"),
        (plan_error(|s| s.pool = Pooling::Max(0)), "pool"),
        (plan_error(|s| s.accumulate = Some(f32::INFINITY)), "accumulate"),
        (repeat(|s| s.scored = ScoredRows::Chunk(93)), "chunk"),
    ] {
        assert!(matches!(&e, Error::Invalid { arg, .. } if *arg == name), "{e:?} instead of {name}");
    }
}

/// Launches a good case with one argument changed; scores must stay poison.
#[track_caller]
fn launch_error(case: &ScoreCase, change: impl for<'a> FnOnce(&mut ScoreArgs<'a>)) -> Error {
    let lab = Lab::reference();
    let mut run = ScoreRun::new(&lab, &ScoreData::new(case));
    let e = run.with_args(|plan, args, workspace| {
        change(args);
        plan.launch(&lab.stream, args, workspace).expect_err("a bad argument")
    });
    let r = run.result();
    assert!([r.scores, r.lse].concat().iter().all(|x| x.is_nan()), "something was written");
    e
}

fn cut(v: View<'_>) -> View<'_> {
    v.slice(0..v.bytes() - 1).expect("not empty")
}

fn window() -> ScoreCase {
    ScoreCase::window((4, 2), 4, 64, &[40, 20]).with(|c| c.lse = true)
}

#[test]
fn arguments_are_checked_against_their_memory() {
    let given = || window().with(|c| (c.shape.given_lse, c.lse) = (true, false));
    let chunk = || ScoreCase::repeat((4, 2), 4, 64, 40, &[[0, 3, 9], [4, 9, 2]]);
    let running = || window().with(|c| (c.shape.accumulate, c.previous) = (Some(1.0), Some(vec![0, 0])));
    for (e, name) in [
        (launch_error(&window(), |a| a.q = cut(a.q)), "q"),
        (launch_error(&window(), |a| a.q_strides = Some(Strides::heads_first(4, 8, 64))), "q"),
        (launch_error(&window(), |a| a.rows.lengths = a.rows.lengths.map(cut)), "lengths"),
        (launch_error(&window(), |a| a.rows.table = a.rows.table.map(cut)), "page table"),
        (launch_error(&window(), |a| a.keys.data = cut(a.keys.data)), "keys"),
        (launch_error(&window(), |a| a.score_stride = Some(37)), "scores"),
        (launch_error(&given(), |a| a.given_lse = a.given_lse.map(cut)), "given_lse"),
        (launch_error(&chunk(), |a| a.spans = a.spans.map(cut)), "spans"),
        (launch_error(&running(), |a| a.previous = a.previous.map(cut)), "previous"),
        (launch_error(&running(), |a| a.previous_per_head = true), "previous"),
    ] {
        assert!(matches!(&e, Error::Bounds { arg, .. } if *arg == name), "{e:?} instead of {name}");
    }
    for (e, name) in [
        (launch_error(&window(), |a| a.q_strides = Some(Strides { seq: 1024, head: 256, row: 63 })), "q"),
        (launch_error(&window(), |a| a.rows.lengths = None), "rows"),
        (launch_error(&window(), |a| a.rows.max_rows = 41), "rows"),
        (launch_error(&window(), |a| a.spans = a.rows.lengths), "spans"),
        (launch_error(&window(), |a| a.given_lse = Some(a.q)), "given_lse"),
        (launch_error(&given(), |a| a.given_lse = None), "given_lse"),
        (launch_error(&chunk(), |a| a.spans = None), "spans"),
        (launch_error(&window(), |a| a.previous = a.rows.lengths), "previous"),
        (launch_error(&window(), |a| a.score_stride = Some(35)), "score_stride"),
    ] {
        assert!(matches!(&e, Error::Invalid { arg, .. } if *arg == name), "{e:?} instead of {name}");
    }
    let aligned = launch_error(&window(), |a| a.keys.row_stride = 136);
    assert!(matches!(aligned, Error::Alignment { arg: "keys", .. }), "{aligned:?}");
}

#[test]
fn an_lse_cannot_be_given_and_asked_for() {
    let lab = Lab::reference();
    let case = window().with(|c| (c.shape.given_lse, c.lse) = (true, false));
    let mut run = ScoreRun::new(&lab, &ScoreData::new(&case));
    let mut lse = lab.poisoned(4 * 2 * 4 * 4);
    run.with_args(|plan, args, workspace| {
        let mut args = ScoreArgs {
            given_lse: args.given_lse,
            lse: Some(lse.view_mut()),
            // SAFETY: nothing is launched.
            ..ScoreArgs::new(args.q, args.rows, args.keys, unsafe { again(&args.scores) })
        };
        says(&plan.launch(&lab.stream, &mut args, workspace).expect_err("both"), &["lse", "given"]);
    });
}

/// # Safety
/// Nothing is launched.
unsafe fn again<'a>(view: &kvlar::ViewMut<'_>) -> kvlar::ViewMut<'a> {
    // SAFETY: nothing writes to it.
    unsafe { kvlar::ViewMut::from_raw(view.address(), view.bytes()) }
}

#[test]
fn a_small_workspace_and_a_small_output_are_refused() {
    let lab = Lab::reference();
    let mut run = ScoreRun::new(&lab, &ScoreData::new(&window()));
    run.with_args(|plan, args, _| {
        let mut small = Workspace::new(&lab.device, Default::default()).expect("a workspace");
        says(&plan.launch(&lab.stream, args, &mut small).expect_err("no room"), &["workspace"]);
    });
    let mut short = lab.poisoned(4 * (4 * 36) - 4);
    let mut lse = lab.poisoned(4 * (2 * 4 * 4) - 4);
    run.with_args(|plan, args, workspace| {
        let mut args = ScoreArgs::new(args.q, args.rows, args.keys, short.view_mut());
        says(&plan.launch(&lab.stream, &mut args, workspace).expect_err("too short"), &["scores", "572", "576"]);
    });
    run.with_args(|plan, args, workspace| {
        // SAFETY: nothing is launched.
        let mut args = ScoreArgs {
            lse: Some(lse.view_mut()),
            ..ScoreArgs::new(args.q, args.rows, args.keys, unsafe { again(&args.scores) })
        };
        says(&plan.launch(&lab.stream, &mut args, workspace).expect_err("too short"), &["lse", "124", "128"]);
    });
    assert!(run.result().scores.iter().all(|x| x.is_nan()), "something was written");
}

/// An engine's own parameter struct gives what the checked launch gives.
#[test]
fn raw_launches_are_the_same() {
    for lab in [Lab::reference()].into_iter().chain(Lab::emulated()) {
        let data = ScoreData::new(&window().with(|c| c.layout = kvlar_tests::pages::Layout::Contiguous));
        let mut run = ScoreRun::new(&lab, &data);
        run.enqueue();
        let expected = run.result();
        run.reset();
        run.with_args(|plan, args, workspace| {
            let lengths = args.rows.lengths.expect("lengths");
            let mut params = plan.bare_params();
            params.rows.lengths = lengths.address();
            params.rows.length_seq_stride = 1;
            params.rows.page_rows_log2 = 30;
            params.rows.max_rows = 40;
            params.keys.data = args.keys.data.address();
            params.keys.head_stride = args.keys.head_stride as i64;
            params.keys.seq_stride = args.keys.seq_stride as i64;
            params.keys.row_stride = args.keys.row_stride as u32;
            params.keys.page_count = 1;
            params.q = args.q.address();
            (params.q_seq_stride, params.q_head_stride, params.q_row_stride) = (4 * 4 * 64, 4 * 64, 64);
            params.lse = args.lse.as_ref().expect("an output").address();
            params.scores = args.scores.address();
            params.counters = workspace.memory().address() + 256;
            params.partials = params.counters + plan.workspace().zeroed.next_multiple_of(256) as u64;
            // SAFETY: all of it lives in `run`.
            unsafe { plan.launch_raw(&lab.stream, &params) }.expect("a launch");
        });
        assert_eq!(run.result(), expected);
    }
}
