//! Every error that a caller can cause is reached, names what is wrong, and leaves memory as it was.

use kvlar::{
    AppendArgs, AppendShape, AttendShape, Buffer, Codec, Device, Dtype, EncodeShape, Error, Format, MergeShape, Pool, Rope,
    RopeLayout, Rows, SegmentShape, Strides, View, Workspace, WorkspaceSize,
};
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun};
use kvlar_tests::{Lab, says};

fn shape() -> AttendShape {
    AttendShape::new(Dtype::Bf16, 2, (4, 2), 1, 64, SegmentShape::new(Codec::Bf16, 100))
}

fn plan_error(change: impl FnOnce(&mut AttendShape)) -> Error {
    let mut s = shape();
    change(&mut s);
    s.plan(&Device::reference()).expect_err("a bad shape")
}

#[test]
fn attend_refuses_shapes_without_a_kernel() {
    for (e, words) in [
        (plan_error(|s| s.head_dim = 264), ["head_dim", "264"]),
        (plan_error(|s| s.head_dim = 0), ["head_dim", "0"]),
        (plan_error(|s| s.value_dim = 12), ["value_dim", "12"]),
        (plan_error(|s| s.dtype = Dtype::F32), ["f32", "bf16"]),
        (plan_error(|s| s.out_dtype = Dtype::F16), ["f16 out", "bf16 q"]),
        (plan_error(|s| s.segments[0] = Some(SegmentShape::new(Codec::F16, 100))), ["F16 rows", "bf16 q"]),
    ] {
        assert!(matches!(e, Error::Unsupported { op: "attend", .. }), "{e:?}");
        says(&e, &words);
    }
}

#[test]
fn attend_refuses_contradictions() {
    for (e, arg) in [
        (plan_error(|s| s.q_heads = 5), "q_heads"),
        (plan_error(|s| s.kv_heads = 0), "q_heads"),
        (plan_error(|s| s.query_rows = 0), "query_rows"),
        (plan_error(|s| s.softcap = -1.0), "softcap"),
        (plan_error(|s| s.softcap = f32::NAN), "softcap"),
        (plan_error(|s| s.scale = f32::INFINITY), "scale"),
        (plan_error(|s| s.window = u32::MAX), "window"),
        (plan_error(|s| s.segments = [None; 4]), "segments"),
        (plan_error(|s| s.segments[2] = s.segments[0]), "segments"),
        (plan_error(|s| s.segments[0].as_mut().unwrap().max_rows = usize::MAX), "max_rows"),
        (plan_error(|s| (s.seqs, s.segments[0].as_mut().unwrap().max_rows) = (1 << 20, 1 << 20)), "segments"),
    ] {
        assert!(matches!(&e, Error::Invalid { arg: a, .. } if *a == arg), "{e:?} instead of {arg}");
    }
}

/// Launches a good case with one argument changed; the output must stay poison.
#[track_caller]
fn launch_error(change: impl for<'a> FnOnce(&mut kvlar::AttendArgs<'a>)) -> Error {
    let lab = Lab::reference();
    let case = AttendCase::new(Dtype::Bf16, (4, 2), 64, &[40, 20]).with(|c| (c.sinks, c.q_positions) = (true, true));
    let mut run = AttendRun::new(&lab, &AttendData::new(&case));
    let e = run.with_args(|plan, args, work, workspace| {
        plan.schedule(&lab.stream, args, work, workspace).expect("a good case");
        change(args);
        plan.launch(&lab.stream, args, work, workspace).expect_err("a bad argument")
    });
    assert!(run.result().out.iter().all(|x| x.is_nan()), "something was written");
    e
}

fn cut(v: View<'_>) -> View<'_> {
    v.slice(0..v_len(v) - 1).expect("not empty")
}

fn v_len(v: View<'_>) -> usize {
    kvlar::Memory::bytes(&v)
}

#[test]
fn attend_checks_every_argument_against_its_memory() {
    let bounds =
        |e: Error, name: &str| assert!(matches!(&e, Error::Bounds { arg, .. } if *arg == name), "{e:?} instead of {name}");
    bounds(launch_error(|a| a.q = cut(a.q)), "q");
    bounds(launch_error(|a| a.out_strides = Some(Strides { seq: 1024, head: 64, row: 64 })), "out");
    bounds(launch_error(|a| a.q_positions = a.q_positions.map(cut)), "q_positions");
    bounds(launch_error(|a| a.sink_logits = a.sink_logits.map(cut)), "sink_logits");
    let segment = |f: fn(&mut kvlar::Segment<'_>)| {
        launch_error(move |a| {
            let mut s = a.segments[0];
            f(&mut s);
            a.segments = Vec::leak(vec![s]);
        })
    };
    bounds(segment(|s| s.keys.data = cut(s.keys.data)), "keys");
    bounds(segment(|s| s.values.data = cut(s.values.data)), "values");
    bounds(segment(|s| s.rows.table = s.rows.table.map(cut)), "page table");
    bounds(segment(|s| s.rows.lengths = s.rows.lengths.map(cut)), "lengths");
    let e = segment(|s| s.rows.lengths = None);
    assert!(matches!(e, Error::Invalid { arg: "rows", .. }), "{e:?}");
    let e = segment(|s| s.rows.max_rows = 41);
    says(&e, &["41", "40"]);
    let e = segment(|s| s.keys.page_stride += 8);
    assert!(matches!(e, Error::Alignment { arg: "keys", need: 16, .. }), "{e:?}");
    let e = segment(|s| s.rows.page_rows_log2 = 3);
    assert!(matches!(e, Error::Invalid { arg: "rows", .. }), "{e:?}");
    let e = launch_error(|a| a.segments = &[]);
    says(&e, &["segments", "0 instead of 1"]);
    let e = launch_error(|a| a.q_strides = Some(Strides { seq: 256, head: 60, row: 64 }));
    assert!(matches!(e, Error::Invalid { arg: "q", .. }), "{e:?}");
}

#[test]
fn attend_needs_its_own_work_list_and_enough_workspace() {
    let lab = Lab::reference();
    let case = AttendCase::new(Dtype::Bf16, (4, 2), 64, &[40, 20]);
    let mut run = AttendRun::new(&lab, &AttendData::new(&case));
    let e = run.with_args(|plan, args, work, workspace| plan.launch(&lab.stream, args, work, workspace)).unwrap_err();
    assert!(matches!(e, Error::Mismatch { arg: "work list", .. }), "{e:?}");
    let small = WorkspaceSize { zeroed: 4, ..run.plan.workspace() };
    run.workspace = Workspace::new(&lab.device, small).unwrap();
    let e = run.with_args(|plan, args, work, workspace| plan.schedule(&lab.stream, args, work, workspace)).unwrap_err();
    assert!(matches!(e, Error::Bounds { arg: "workspace", .. }), "{e:?}");
    let other = AttendShape { seqs: 1, q_heads: 2, kv_heads: 1, ..case.shape() }.plan(&lab.device).unwrap();
    run.work = other.work_list(&lab.device).unwrap();
    let e = run.with_args(|plan, args, work, workspace| plan.schedule(&lab.stream, args, work, workspace)).unwrap_err();
    assert!(matches!(e, Error::Bounds { arg: "work list" | "workspace", .. }), "{e:?}");
}

#[test]
fn buffers_of_another_device_are_refused() {
    let (a, b) = (Lab::reference(), Lab::reference());
    let mut foreign = b.device.alloc(16).unwrap();
    assert_eq!(a.stream.upload(&mut foreign, 0, &[0; 4]).unwrap_err(), Error::Mismatch { arg: "buffer", what: "device" });
    let mut own = a.device.alloc(16).unwrap();
    assert!(matches!(a.stream.upload(&mut own, 14, &[0; 4]), Err(Error::Bounds { .. })));
    assert!(matches!(a.stream.copy_within(&mut own, 8..20, 0), Err(Error::Bounds { .. })));
    assert!(matches!(a.stream.fill(&mut own, std::ops::Range { start: 8, end: 4 }, 0), Err(Error::Bounds { .. })));
    let graph = a.stream.capture(|_| Ok(())).unwrap();
    // SAFETY: nothing was captured.
    assert!(matches!(unsafe { graph.launch(&b.stream) }, Err(Error::Mismatch { arg: "stream", .. })));
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let e = Device::reference().alloc(usize::MAX / 4).unwrap_err();
    assert!(matches!(e, Error::OutOfMemory { .. }), "{e:?}");
}

#[test]
fn an_emulated_launch_that_goes_wrong_says_why() {
    for lab in Lab::emulated() {
        let params = kvlar::abi::KvlarMerge::default();
        // SAFETY: neither launch gets as far as a kernel: there is no such entry, and it takes another struct.
        let e = unsafe { lab.stream.enqueue_entry("kvlar_no_such_kernel", 1, 32, &params) }.unwrap_err();
        assert!(matches!(&e, Error::Emulation(_)), "{e:?}");
        says(&e, &["kvlar_no_such_kernel"]);
        // SAFETY: as above.
        let e = unsafe { lab.stream.enqueue_entry("kvlar_append", 1, 128, &params) }.unwrap_err();
        says(&e, &["kvlar_append"]);
    }
}

#[test]
fn what_waits_for_the_host_cannot_be_captured() {
    let lab = Lab::reference();
    let mut buffer = lab.device.alloc(16).unwrap();
    let e = lab.stream.capture(|s| s.upload(&mut buffer, 0, &[1; 16])).unwrap_err();
    assert!(matches!(e, Error::Capture(_)), "{e:?}");
    lab.stream.upload(&mut buffer, 0, &[1; 16]).expect("the stream works again");
}

/// Four rows of 64 codes, then their scales.
fn int8_pool<M: kvlar::Memory>(data: M) -> Pool<M> {
    Pool { params_offset: 256, params_stride: 4, ..Pool::contiguous(data, 1, 4, 64) }
}

#[test]
fn encode_and_merge_check_theirs() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let shape = EncodeShape { format: Codec::Int8.into(), dtype: Dtype::F32, seqs: 1, heads: 1, rows: 4, dim: 64 };
    let e = EncodeShape { format: Format { group: Some(48), ..shape.format }, ..shape }.plan(&device).unwrap_err();
    says(&e, &["group", "48", "64"]);
    let e = EncodeShape { format: Format { hadamard: true, ..shape.format }, dim: 96, ..shape }.plan(&device).unwrap_err();
    says(&e, &["96", "power of two"]);
    let e = EncodeShape { dim: 20, ..shape }.plan(&device).unwrap_err();
    assert!(matches!(e, Error::Unsupported { .. }), "{e:?}");
    let plan = shape.plan(&device).unwrap();
    let (x, mut rows) = (device.alloc(4 * 64 * 4).unwrap(), device.alloc(4 * 68).unwrap());
    plan.encode(&stream, x.view(), &Rows::contiguous(None, 4), &int8_pool(rows.view_mut()), None).expect("a good case");
    let e = plan.encode(&stream, x.view(), &Rows::contiguous(None, 3), &int8_pool(rows.view_mut()), None).unwrap_err();
    assert!(matches!(e, Error::Invalid { arg: "rows", .. }), "{e:?}");
    let e = plan.encode(&stream, cut(x.view()), &Rows::contiguous(None, 4), &int8_pool(rows.view_mut()), None).unwrap_err();
    assert!(matches!(e, Error::Bounds { arg: "x", .. }), "{e:?}");
    let mut no_params = int8_pool(rows.view_mut());
    no_params.params_stride = 0;
    let e = plan.encode(&stream, x.view(), &Rows::contiguous(None, 4), &no_params, None).unwrap_err();
    says(&e, &["scales"]);
    let mut out = device.alloc(4 * 64 * 4 - 4).unwrap();
    let pool = int8_pool(rows.view());
    let e = plan.decode(&stream, &Rows::contiguous(None, 4), &pool, None, &mut out.view_mut()).unwrap_err();
    assert!(matches!(e, Error::Bounds { arg: "out", .. }), "{e:?}");

    assert!(matches!(MergeShape { parts: 0, rows: 1, dim: 1 }.plan(&device), Err(Error::Invalid { .. })));
    let merge = MergeShape { parts: 2, rows: 1, dim: 16 }.plan(&device).unwrap();
    let (parts, lse) = (device.alloc(128).unwrap(), device.alloc(8).unwrap());
    let (mut out, mut merged) = (device.alloc(64).unwrap(), device.alloc(4).unwrap());
    let e = merge.launch(&stream, cut(parts.view()), lse.view(), &mut out.view_mut(), &mut merged.view_mut()).unwrap_err();
    assert!(matches!(e, Error::Bounds { arg: "parts", .. }), "{e:?}");
    let e = merge.launch(&stream, parts.view(), cut(lse.view()), &mut out.view_mut(), &mut merged.view_mut()).unwrap_err();
    assert!(matches!(e, Error::Bounds { arg: "part_lse", .. }), "{e:?}");
}

#[test]
fn append_checks_its_own() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let shape = AppendShape {
        dtype: Dtype::Bf16,
        key_format: Codec::Bf16.into(),
        value_format: Codec::Bf16.into(),
        seqs: 1,
        kv_heads: 1,
        new_rows: 2,
        head_dim: 64,
        value_dim: 64,
    };
    assert!(matches!(AppendShape { dtype: Dtype::F32, ..shape }.plan(&device), Err(Error::Unsupported { .. })));
    assert!(matches!(AppendShape { head_dim: 260, ..shape }.plan(&device), Err(Error::Unsupported { .. })));
    let grouped = Format { group: Some(0), ..Codec::Int8.into() };
    says(&AppendShape { value_format: grouped, ..shape }.plan(&device).unwrap_err(), &["value format", "group of 0"]);
    let plan = shape.plan(&device).unwrap();
    let (k, v, ints) = (device.alloc(256).unwrap(), device.alloc(256).unwrap(), device.alloc(8).unwrap());
    let inv_freq = device.alloc(128).unwrap();
    let mut pools: [Buffer; 2] = [device.alloc(4 * 128).unwrap(), device.alloc(4 * 128).unwrap()];
    let mut workspace = Workspace::new(&device, WorkspaceSize::default()).unwrap();
    let mut launch = |change: &dyn Fn(&mut AppendArgs<'_>)| {
        let [keys, values] = &mut pools;
        let mut args = AppendArgs {
            k: k.view(),
            k_strides: None,
            v: v.view(),
            v_strides: None,
            positions: ints.view(),
            slots: ints.view(),
            slots_per_head: false,
            rope: Some(Rope { inv_freq: inv_freq.view(), rotary_dim: 64, layout: RopeLayout::Half, attention_factor: 1.0 }),
            rows: Rows::contiguous(None, 4),
            row_positions: None,
            keys: Pool::contiguous(keys.view_mut(), 1, 4, 128),
            values: Pool::contiguous(values.view_mut(), 1, 4, 128),
            tables: Default::default(),
            key_scores: None,
        };
        change(&mut args);
        plan.launch(&stream, &mut args, &mut workspace)
    };
    launch(&|_| ()).expect("a good case");
    for (change, name) in [
        (&(|a: &mut AppendArgs<'_>| a.k = cut(a.k)) as &dyn Fn(&mut AppendArgs<'_>), "k"),
        (&|a| a.v = cut(a.v), "v"),
        (&|a| a.positions = cut(a.positions), "positions"),
        (&|a| a.slots = cut(a.slots), "slots"),
        (&|a| a.rope.as_mut().unwrap().inv_freq = cut(a.rope.unwrap().inv_freq), "inv_freq"),
        (&|a| a.rows.max_rows = 5, "keys"),
    ] {
        let e = launch(change).unwrap_err();
        assert!(matches!(&e, Error::Bounds { arg, .. } if *arg == name), "{e:?} instead of {name}");
    }
    let e = launch(&|a| a.rope.as_mut().unwrap().rotary_dim = 66).unwrap_err();
    assert!(matches!(e, Error::Invalid { arg: "rotary_dim", .. }), "{e:?}");
}
