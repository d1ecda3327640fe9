//! Every error that a caller of scan, reduce or codebooks can cause is reached, names what is wrong, and leaves memory as it was.

use kvlar::{
    AttendShape, Codec, Device, Dtype, EncodeShape, Error, Format, Memory, Pool, ReduceArgs, ReduceShape, Reduction, Rows,
    ScanArgs, ScanShape, SegmentShape, Strides, View, Workspace, WorkspaceSize,
};
use kvlar_tests::scan::{ScanCase, ScanData, ScanRun};
use kvlar_tests::{Lab, says};

fn plan_error(change: impl FnOnce(&mut ScanShape)) -> Error {
    let mut s = ScanShape::new(Dtype::Bf16, 2, (4, 2), 64, Codec::Int4, 100);
    change(&mut s);
    s.plan(&Device::reference()).expect_err("a bad shape")
}

#[test]
fn shapes_are_checked() {
    for (e, words) in
        [(plan_error(|s| s.head_dim = 264), ["head_dim", "264"]), (plan_error(|s| s.dtype = Dtype::F32), ["f32", "bf16"])]
    {
        assert!(matches!(e, Error::Unsupported { op: "scan", .. }), "{e:?}");
        says(&e, &words);
    }
    for (e, name) in [
        (plan_error(|s| s.q_heads = 5), "q_heads"),
        (plan_error(|s| s.kv_heads = 0), "q_heads"),
        (plan_error(|s| s.scale = f32::NAN), "scale"),
        (plan_error(|s| s.rows = 1 << 31), "rows"),
        (plan_error(|s| (s.seqs, s.rows) = (1 << 20, 1 << 20)), "rows"),
        (plan_error(|s| (s.scores, s.histogram) = (None, true)), "histogram"),
        (plan_error(|s| s.keys.group = Some(48)), "keys"),
        (plan_error(|s| s.keys = Format::pq(8, 0)), "keys"),
        (plan_error(|s| s.keys = Format::pq(8, 257)), "keys"),
        (plan_error(|s| s.keys = Format::pq(7, 16)), "keys"),
    ] {
        assert!(matches!(&e, Error::Invalid { arg, .. } if *arg == name), "{e:?} instead of {name}");
    }
}

/// Launches a good case with one argument changed; the outputs must stay poison.
#[track_caller]
fn launch_error(keys: Format, change: impl for<'a> FnOnce(&mut ScanArgs<'a>)) -> Error {
    let lab = Lab::reference();
    let mut run = ScanRun::new(&lab, &ScanData::new(&ScanCase::new(keys, (4, 2), 64, &[40, 20])));
    let e = run.with_args(|plan, args, work, workspace| {
        plan.schedule(&lab.stream, args, work, workspace).expect("a good case");
        change(args);
        plan.launch(&lab.stream, args, work, workspace).expect_err("a bad argument")
    });
    let r = run.result();
    assert!([r.scores, r.logits, r.lse].concat().iter().all(|x| x.is_nan()), "something was written");
    e
}

fn cut(v: View<'_>) -> View<'_> {
    v.slice(0..v.bytes() - 1).expect("not empty")
}

#[test]
fn arguments_are_checked_against_their_memory() {
    let (int4, pq) = (Format::from(Codec::Int4), Format::pq(8, 16));
    let bounds =
        |e: Error, name: &str| assert!(matches!(&e, Error::Bounds { arg, .. } if *arg == name), "{e:?} instead of {name}");
    bounds(launch_error(int4, |a| a.q = cut(a.q)), "q");
    bounds(launch_error(int4, |a| a.keys.data = cut(a.keys.data)), "keys");
    bounds(launch_error(int4, |a| a.rows.table = a.rows.table.map(cut)), "page table");
    bounds(launch_error(int4, |a| a.rows.lengths = a.rows.lengths.map(cut)), "lengths");
    bounds(launch_error(pq, |a| a.tables = a.tables.map(cut)), "key codebooks");
    fn short(x: &mut Option<kvlar::ViewMut<'_>>) {
        let whole = x.take().expect("an output");
        let len = whole.bytes();
        *x = Some(whole.slice(0..len - 4).expect("shorter"));
    }
    bounds(launch_error(int4, |a| short(&mut a.scores)), "scores");
    bounds(launch_error(int4, |a| short(&mut a.logits)), "logits");
    bounds(launch_error(int4, |a| short(&mut a.lse)), "lse");
    bounds(launch_error(int4, |a| short(&mut a.histogram)), "histogram");
    let e = launch_error(pq, |a| a.tables = a.tables.map(|t| t.slice(4..t.bytes()).expect("a part")));
    assert!(matches!(e, Error::Bounds { arg: "key codebooks", .. } | Error::Alignment { arg: "key codebooks", .. }), "{e:?}");
    says(&launch_error(pq, |a| a.tables = None), &["key codebooks", "pq rows need them"]);
    says(&launch_error(int4, |a| a.tables = Some(a.q)), &["key scales", "Int4"]);
    says(&launch_error(int4, |a| a.rows.lengths = None), &["rows", "lengths"]);
    says(&launch_error(int4, |a| a.rows.max_rows = 41), &["41", "40"]);
    says(&launch_error(int4, |a| a.logits = None), &["logits", "the shape has them"]);
    says(&launch_error(int4, |a| a.scores = None), &["histogram", "no scores"]);
    let e = launch_error(int4, |a| a.q_strides = Some(Strides { seq: 256, head: 60, row: 64 }));
    assert!(matches!(e, Error::Invalid { arg: "q", .. }), "{e:?}");
    let e = launch_error(int4, |a| a.keys.page_stride += 8);
    assert!(matches!(e, Error::Alignment { arg: "keys", need: 16, .. }), "{e:?}");
}

#[test]
fn outputs_that_were_not_planned_are_refused() {
    let lab = Lab::reference();
    let case = ScanCase::new(Codec::Int4, (4, 2), 64, &[40]).with(|c| (c.logits, c.histogram, c.scores) = (false, false, None));
    let mut run = ScanRun::new(&lab, &ScanData::new(&case));
    for output in ["scores", "logits", "histogram"] {
        let e = run.with_args(|plan, args, work, workspace| {
            let view = Some(Box::leak(Box::new(lab.poisoned(1 << 16))).view_mut());
            match output {
                "scores" => args.scores = view,
                "logits" => args.logits = view,
                _ => args.histogram = view,
            }
            plan.schedule(&lab.stream, args, work, workspace).expect_err("an output too many")
        });
        says(&e, &[output, "the shape has none"]);
    }
}

#[test]
fn a_scan_needs_its_own_work_list_and_enough_workspace() {
    let lab = Lab::reference();
    let case = ScanCase::new(Codec::Int4, (4, 2), 64, &[40, 20]).with(|c| c.scores = Some(Reduction::MaxProb));
    let mut run = ScanRun::new(&lab, &ScanData::new(&case));
    let e = run.with_args(|plan, args, work, workspace| plan.launch(&lab.stream, args, work, workspace)).unwrap_err();
    assert!(matches!(e, Error::Mismatch { arg: "work list", .. }), "{e:?}");
    for small in [
        WorkspaceSize { zeroed: run.plan.workspace().zeroed - 4, ..run.plan.workspace() },
        WorkspaceSize { scratch: run.plan.workspace().scratch - 4, ..run.plan.workspace() },
    ] {
        run.workspace = Workspace::new(&lab.device, small).unwrap();
        let e = run.with_args(|plan, args, work, workspace| plan.schedule(&lab.stream, args, work, workspace)).unwrap_err();
        assert!(matches!(e, Error::Bounds { arg: "workspace", .. }), "{e:?}");
    }
    // Logits that are no output take scratch.
    let bare = ScanShape { logits: false, ..case.shape() }.plan(&lab.device).unwrap();
    assert_eq!(bare.workspace().scratch - run.plan.workspace().scratch, 4 * 2 * 4 * 40);
    assert_eq!(
        (bare.launches(), ScanShape { scores: Some(Reduction::MaxLogit), ..case.shape() }.plan(&lab.device).unwrap().launches()),
        (2, 1)
    );
}

#[test]
fn reduce_checks_its_own() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let shape =
        ReduceShape { seqs: 1, q_heads: 4, kv_heads: 2, rows: 10, method: Reduction::MaxProb, histogram: false, fill: true };
    assert!(matches!(ReduceShape { kv_heads: 3, ..shape }.plan(&device), Err(Error::Invalid { arg: "q_heads", .. })));
    assert!(matches!(ReduceShape { kv_heads: 0, ..shape }.plan(&device), Err(Error::Invalid { arg: "q_heads", .. })));
    assert!(matches!(ReduceShape { rows: 1 << 31, ..shape }.plan(&device), Err(Error::Invalid { arg: "rows", .. })));
    let plan = shape.plan(&device).unwrap();
    let (logits, lse, lengths) = (device.alloc(160).unwrap(), device.alloc(16).unwrap(), device.alloc(8).unwrap());
    let (mut scores, mut histogram) = (device.alloc(80).unwrap(), device.alloc(1 << 14).unwrap());
    let mut workspace = Workspace::new(&device, plan.workspace()).unwrap();
    let mut launch = |change: &dyn Fn(&mut ReduceArgs<'_>), counted: bool| {
        let mut args = ReduceArgs {
            logits: logits.view(),
            lse: Some(lse.view()),
            lengths: Some(lengths.view()),
            lengths_per_head: true,
            scores: scores.view_mut(),
            histogram: counted.then(|| histogram.view_mut()),
        };
        change(&mut args);
        plan.launch(&stream, &mut args, &mut workspace)
    };
    launch(&|_| (), false).expect("a good case");
    for (change, name) in [
        (&(|a: &mut ReduceArgs<'_>| a.logits = cut(a.logits)) as &dyn Fn(&mut ReduceArgs<'_>), "logits"),
        (&|a| a.lse = a.lse.map(cut), "lse"),
        (&|a| a.lengths = a.lengths.map(cut), "lengths"),
    ] {
        let e = launch(change, false).unwrap_err();
        assert!(matches!(&e, Error::Bounds { arg, .. } if *arg == name), "{e:?} instead of {name}");
    }
    says(&launch(&|a| a.lse = None, false).unwrap_err(), &["lse", "max_prob"]);
    says(&launch(&|_| (), true).unwrap_err(), &["histogram", "the shape has none"]);
}

#[test]
fn codebooks_are_checked_wherever_rows_are_written() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let shape = EncodeShape { format: Format::pq(8, 16), dtype: Dtype::F32, seqs: 1, heads: 2, rows: 4, dim: 64 };
    for format in [Format::pq(8, 0), Format::pq(8, 300), Format::pq(24, 16)] {
        let e = EncodeShape { format, ..shape }.plan(&device).unwrap_err();
        assert!(matches!(e, Error::Invalid { .. }), "{e:?}");
    }
    let plan = shape.plan(&device).unwrap();
    let (x, codebooks) = (device.alloc(2 * 4 * 64 * 4).unwrap(), device.alloc(2 * 16 * 64 * 4).unwrap());
    let mut held = device.alloc(2 * 4 * 16).unwrap();
    let mut encode = |tables: Option<View<'_>>| {
        plan.encode(&stream, x.view(), &Rows::contiguous(None, 4), &Pool::contiguous(held.view_mut(), 2, 4, 16), tables)
    };
    encode(Some(codebooks.view())).expect("a good case");
    says(&encode(None).unwrap_err(), &["key codebooks", "pq rows need them"]);
    let e = encode(Some(cut(codebooks.view()))).unwrap_err();
    assert!(matches!(e, Error::Bounds { arg: "key codebooks", .. }), "{e:?}");
    // Attention has no kernel for them; the reference needs none.
    let Ok(device) = Device::simt(kvlar::SimtOptions::default()) else { return };
    let segment = SegmentShape { keys: Format::pq(8, 16), values: Codec::Int4.into(), max_rows: 64 };
    let e = AttendShape::new(Dtype::Bf16, 1, (2, 1), 1, 64, segment).plan(&device).unwrap_err();
    assert!(matches!(e, Error::Unsupported { op: "attend", .. }), "{e:?}");
    says(&e, &["keys", "codebooks"]);
}
