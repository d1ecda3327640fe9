//! Every error that a caller of low-rank attention can cause is reached, names what is wrong, and leaves memory as it was.

use kvlar::{Codec, Dtype, Error, HeadSets, LowrankShape, LowrankValues, Segment, View};
use kvlar_tests::lowrank::{LowrankCase, LowrankData, LowrankRun, Positions};
use kvlar_tests::{Lab, says};

fn case() -> LowrankCase {
    LowrankCase::new(Dtype::Bf16, (4, 2), 2, 64, (64, 32), &[40, 20])
}

#[track_caller]
fn plan_error(lab: &Lab, change: impl FnOnce(&mut LowrankShape)) -> Error {
    let sets = HeadSets::new(&lab.device, &lab.stream, &[0, 0], Some(&[0, 0])).expect("sets");
    let mut shape = case().shape(&sets);
    change(&mut shape);
    shape.plan(&lab.device).expect_err("a bad shape")
}

#[test]
fn shapes_that_contradict_themselves_are_refused() {
    let lab = Lab::reference();
    for (e, words) in [
        (plan_error(&lab, |s| s.key_rank = 48), ["key_rank 48", "multiple of 32"]),
        (plan_error(&lab, |s| s.key_rank = 0), ["key_rank 0", "multiple of 32"]),
        (plan_error(&lab, |s| s.key_rank = 8192), ["key_rank 8192", "4096"]),
        (plan_error(&lab, |s| s.values = LowrankValues::Latent { rank: 20, codec: Codec::Bf16 }), ["value rank 20", "multiple"]),
        (plan_error(&lab, |s| s.sets.kv_heads = 3), ["sets", "3 kv heads"]),
        (plan_error(&lab, |s| s.sets.value_groups = 0), ["sets", "no value groups"]),
        (plan_error(&lab, |s| s.attend.query_rows = 0), ["query_rows", "no query rows"]),
    ] {
        assert!(matches!(e, Error::Invalid { .. }), "{e:?}");
        says(&e, &words);
    }
}

#[test]
fn combinations_without_a_kernel_are_unsupported() {
    let lab = Lab::reference();
    for (e, words) in [
        (plan_error(&lab, |s| s.values = LowrankValues::Latent { rank: 32, codec: Codec::F16 }), ["F16 value latents", "bf16"]),
        (
            plan_error(&lab, |s| s.values = LowrankValues::Latent { rank: 32, codec: Codec::Int8 }),
            ["Int8 value latents", "Dtype"],
        ),
        (
            plan_error(&lab, |s| s.attend.segments[0].as_mut().unwrap().keys = Codec::Int8.into()),
            ["Int8 rows", "segment of latents"],
        ),
    ] {
        assert!(matches!(e, Error::Unsupported { op: "attend_lowrank", .. }), "{e:?}");
        says(&e, &words);
    }
    for lab in Lab::emulated().into_iter().take(1) {
        let e = plan_error(&lab, |s| s.attend.query_rows = 9);
        assert!(matches!(e, Error::Unsupported { .. }), "{e:?}");
        says(&e, &["9 query rows", "8"]);
    }
}

#[test]
fn head_sets_need_groups_that_are() {
    let lab = Lab::reference();
    let sets = |k: &[i32], v: Option<&[i32]>| HeadSets::new(&lab.device, &lab.stream, k, v).expect_err("bad sets");
    says(&sets(&[0, -1], None), &["group", "-1"]);
    says(&sets(&[0, 1], Some(&[0])), &["group_v", "another number"]);
    says(&sets(&[0, 1], Some(&[0, -2])), &["group", "-2"]);
}

/// Launches a good case with one argument changed; the output must stay poison.
#[track_caller]
fn launch_error(case: &LowrankCase, change: impl for<'a> FnOnce(&mut kvlar::LowrankArgs<'a>)) -> Error {
    let lab = Lab::reference();
    let mut run = LowrankRun::new(&lab, &LowrankData::new(case));
    let e = run.with_args(|plan, args, work, workspace| {
        plan.schedule(&lab.stream, args, work, workspace).expect("a good case");
        change(args);
        plan.launch(&lab.stream, args, work, workspace).expect_err("a bad argument")
    });
    assert!(run.result().out.iter().all(|x| x.is_nan()), "something was written");
    e
}

fn cut(v: View<'_>) -> View<'_> {
    let bytes = kvlar::Memory::bytes(&v);
    v.slice(0..bytes - 1).expect("not empty")
}

#[test]
fn every_argument_is_checked_against_its_memory() {
    let bounds =
        |e: Error, name: &str| assert!(matches!(&e, Error::Bounds { arg, .. } if *arg == name), "{e:?} instead of {name}");
    let int8_basis = case().int8(kvlar::Latents::Int8Basis).with(|c| c.mean = true);
    bounds(launch_error(&case(), |a| a.bases.keys = cut(a.bases.keys)), "key basis");
    bounds(launch_error(&case(), |a| a.bases.values = a.bases.values.map(cut)), "value basis");
    bounds(launch_error(&int8_basis, |a| a.bases.key_scales = a.bases.key_scales.map(cut)), "key_scales");
    bounds(launch_error(&int8_basis, |a| a.bases.key_mean = a.bases.key_mean.map(cut)), "key_mean");
    bounds(launch_error(&case(), |a| a.bases.keys_per_seq = true), "key basis");
    bounds(launch_error(&case(), |a| a.attend.q = cut(a.attend.q)), "q");
    bounds(launch_error(&case(), |a| a.rope.as_mut().unwrap().inv_freq = cut(a.rope.unwrap().inv_freq)), "inv_freq");
}

#[test]
fn arguments_that_contradict_the_shape_are_refused() {
    let dense = case().with(|c| c.values = kvlar_tests::lowrank::ValueCase::Dense);
    for (e, words) in [
        (launch_error(&case(), |a| a.bases.key_scales = Some(a.bases.keys)), ["key_scales", "int8 basis"]),
        (launch_error(&case(), |a| a.bases.key_mean = Some(a.bases.keys)), ["key_mean", "none"]),
        (launch_error(&case(), |a| a.bases.values = None), ["value basis", "latent values"]),
        (launch_error(&dense, |a| a.bases.values = Some(a.bases.keys)), ["value basis", "dense values"]),
        (launch_error(&case(), |a| a.attend.segments = &[]), ["segments", "0 instead of 1"]),
    ] {
        assert!(matches!(e, Error::Invalid { .. }), "{e:?}");
        says(&e, &words);
    }
    // Stored positions that the shape knows nothing of: they also would have made another work list.
    let lab = Lab::reference();
    let mut run = LowrankRun::new(&lab, &LowrankData::new(&case()));
    let e = run.with_args(|plan, args, work, workspace| {
        let old = args.attend.segments[0];
        let rows = kvlar::Rows { positions: old.rows.table, ..old.rows };
        args.attend.segments = Box::leak(Box::new([Segment { rows, ..old }]));
        plan.schedule(&lab.stream, args, work, workspace).expect_err("positions")
    });
    says(&e, &["stored positions"]);
}

#[test]
fn a_work_list_of_other_position_sources_is_refused() {
    let lab = Lab::reference();
    let case = case().with(|c| (c.segments[0].positions, c.window) = (Positions::Gaps(3), 20));
    let mut run = LowrankRun::new(&lab, &LowrankData::new(&case));
    let e = run.with_args(|plan, args, work, workspace| {
        plan.schedule(&lab.stream, args, work, workspace).expect("a good case");
        let old = args.attend.segments[0];
        args.attend.segments = Box::leak(Box::new([Segment { rows: kvlar::Rows { positions: None, ..old.rows }, ..old }]));
        plan.launch(&lab.stream, args, work, workspace).expect_err("other positions")
    });
    assert!(matches!(e, Error::Mismatch { arg: "work list", .. }), "{e:?}");
}

#[test]
fn bad_pages_and_lengths_are_clamped_and_reported() {
    for lab in [Lab::reference()].into_iter().chain(Lab::emulated().into_iter().take(1)) {
        let case = case();
        let mut run = LowrankRun::new(&lab, &LowrankData::new(&case));
        run.set_lengths(0, &[i32::MAX, 40, -3, 20]);
        run.enqueue();
        assert!(run.status().bad_length() && !run.status().bad_page(), "{:?}", run.status());
        let mut run = LowrankRun::new(&lab, &LowrankData::new(&case).with_bad_page());
        run.enqueue();
        assert!(run.status().bad_page() && !run.status().bad_length(), "{:?}", run.status());
    }
}

/// Heads of a set turn a tile of latents together: they need as many rows before it.
#[test]
fn heads_whose_latents_begin_at_other_rows_are_reported() {
    for lab in Lab::emulated().into_iter().take(1) {
        let exact = kvlar_tests::lowrank::SegmentCase {
            latent: false,
            layout: kvlar_tests::pages::Layout::Hnd(16),
            capacity: 16,
            lengths: vec![4, 4, 4, 4],
            positions: Positions::Index,
        };
        let case = case().with(|c| c.segments.insert(0, exact));
        let mut run = LowrankRun::new(&lab, &LowrankData::new(&case));
        run.enqueue();
        assert!(!run.status().bad_length(), "{:?}", run.status());
        run.set_lengths(0, &[4, 3, 4, 4]);
        run.enqueue();
        assert!(run.status().bad_length(), "{:?}", run.status());
    }
}
