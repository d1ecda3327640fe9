//! append_lowrank against the reference: what is stored, where, and that nothing else is written.

use kvlar::{AppendLowrankShape, Codec, Device, Dtype, Error, Pool, SideArgs, SideShape, Strides};
use kvlar_reference::testing::Rng;
use kvlar_tests::latents::{AppendLowrankCase as Case, SideCase, random_groups};
use kvlar_tests::pages::Layout;
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    rows_and_ranks,
    int8_rows_and_ranks,
    many_tokens,
    ready_made_latents,
    long_latents,
    dense_rows,
    one_side_alone,
    groups_and_means,
    ranges_without_zero,
    layouts,
    skipped_and_scattered_slots,
    bad_slots_and_pages,
    strided_inputs,
    odd_values_stay_in_their_rows,
    parts_meet_again,
    parts_of_many_tokens_meet_again
);

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn native(dtype: Dtype) -> Codec {
    Option::<Codec>::from(dtype).expect("a 16-bit type")
}

fn project(rng: &mut Rng, kv_heads: usize, groups: (usize, usize), rank: usize, codec: Codec) -> SideCase {
    SideCase::Project { members: random_groups(rng, kv_heads, groups.0, groups.1), rank, mean: false, above: 0.0, codec }
}

fn rows_and_ranks(lab: &Lab) {
    for (i, rows) in [1, 2, 7, 8, 15, 17, 40].into_iter().enumerate() {
        for (j, ranks) in [(1, 32), (31, 33), (64, 100), (7, 128)].into_iter().enumerate() {
            Case::new(DTYPES[(i + j) % 2], rows, 64, ranks).check(lab);
        }
    }
    for dtype in DTYPES {
        Case::new(dtype, 3, 256, (512, 257)).check(lab);
        Case::new(dtype, 200, 32, (40, 64)).with(|c| c.seqs = 1).check(lab);
    }
}

fn int8_rows_and_ranks(lab: &Lab) {
    for (i, rows) in [1, 2, 9, 16, 33].into_iter().enumerate() {
        for (j, ranks) in [(1, 32), (31, 33), (72, 100), (5, 128)].into_iter().enumerate() {
            Case::new(DTYPES[(i + j) % 2], rows, 64, ranks).int8().check(lab);
        }
    }
    for dtype in DTYPES {
        Case::new(dtype, 3, 256, (512, 257)).int8().check(lab);
        Case::new(dtype, 200, 32, (40, 64)).int8().with(|c| c.seqs = 1).check(lab);
    }
}

/// Kernels of 64 tokens a warp: one pass over the ranks and several.
fn many_tokens(lab: &Lab) {
    for (i, ranks) in [(32usize, 33), (96, 128), (160, 31), (260, 72)].into_iter().enumerate() {
        // Heads of many values, and of as few as the ranks let.
        for (rows, head_dim) in [(130, 136), (150, 8 * ranks.0.max(ranks.1).div_ceil(16))] {
            let case = Case::new(DTYPES[i % 2], rows, head_dim, ranks);
            case.check(lab);
            case.int8().check(lab);
        }
    }
    let dense = SideCase::Dense { head_dim: 40, codec: Codec::Bf16 };
    Case::new(Dtype::Bf16, 270, 24, (48, 1)).with(|c| (c.seqs, c.values) = (1, dense)).check(lab);
}

/// The stored bytes are those of the reference codec.
fn ready_made_latents(lab: &Lab) {
    for (i, dtype) in DTYPES.into_iter().enumerate() {
        for codec in [native(dtype), Codec::Int8] {
            for (j, rank) in [1, 2, 8, 24, 31, 32, 33, 64, 100, 256, 257, 300].into_iter().enumerate() {
                let side = |groups, rank| SideCase::Latent { groups, rank, codec };
                let seed = (10 * i + j) as u64;
                Case::new(dtype, 9, 64, (1, 1))
                    .with(|c| (c.keys, c.values, c.seed) = (side(3, rank), side(1 + j % 4, 301 - rank), seed))
                    .check(lab);
            }
        }
    }
}

fn long_latents(lab: &Lab) {
    for (dtype, rank) in [(Dtype::Bf16, 4096), (Dtype::F16, 1025), (Dtype::Bf16, 511)] {
        for codec in [native(dtype), Codec::Int8] {
            let side = SideCase::Latent { groups: 2, rank, codec };
            Case::new(dtype, 3, 64, (1, 1)).with(|c| (c.keys, c.values) = (side.clone(), side)).check(lab);
        }
    }
    // Ranks of a projection beyond what any CTA has at once, in both kernels.
    for rows in [2, 130] {
        let mut rng = Rng::new(3);
        let side = project(&mut rng, 11, (1, 11), 520, Codec::Int8);
        let values = SideCase::None;
        Case::new(Dtype::Bf16, rows, 48, (1, 1)).with(|c| (c.kv_heads, c.keys, c.values) = (11, side, values)).check(lab);
    }
}

fn dense_rows(lab: &Lab) {
    for dtype in DTYPES {
        for codec in [native(dtype), Codec::Int8] {
            for head_dim in [8, 40, 64, 128, 256] {
                let dense = SideCase::Dense { head_dim, codec };
                Case::new(dtype, 11, 64, (48, 1)).with(|c| c.values = dense.clone()).check(lab);
                Case::new(dtype, 11, 64, (1, 48)).with(|c| c.keys = dense).check(lab);
            }
        }
    }
}

fn one_side_alone(lab: &Lab) {
    Case::new(Dtype::Bf16, 10, 64, (40, 1)).with(|c| c.values = SideCase::None).check(lab);
    Case::new(Dtype::F16, 10, 64, (1, 40)).with(|c| c.keys = SideCase::None).int8().check(lab);
    let latents = SideCase::Latent { groups: 2, rank: 30, codec: Codec::Int8 };
    Case::new(Dtype::F16, 10, 64, (1, 40)).with(|c| (c.keys, c.values) = (SideCase::None, latents)).check(lab);
}

fn groups_and_means(lab: &Lab) {
    let mut rng = Rng::new(5);
    for (i, (kv_heads, key_groups, value_groups)) in
        [(1, (1, 1), (1, 1)), (8, (4, 2), (1, 8)), (8, (8, 1), (2, 4)), (6, (2, 3), (3, 2)), (5, (3, 4), (2, 5))]
            .into_iter()
            .enumerate()
    {
        let dtype = DTYPES[i % 2];
        let codec = if i % 2 == 0 { native(dtype) } else { Codec::Int8 };
        let mut keys = project(&mut rng, kv_heads, key_groups, 30 + i, codec);
        if let SideCase::Project { mean, .. } = &mut keys {
            *mean = true;
        }
        let values = project(&mut rng, kv_heads, value_groups, 38 - i, codec);
        for rows in [1, 18] {
            let (keys, values) = (keys.clone(), values.clone());
            Case::new(dtype, rows, 64, (1, 1)).with(|c| (c.kv_heads, c.keys, c.values) = (kv_heads, keys, values)).check(lab);
        }
    }
}

/// The padding of a latent is no value of it.
fn ranges_without_zero(lab: &Lab) {
    for (rows, rank, shift) in [(3, 40, 9.0), (3, 40, -9.0), (5, 100, 9.0), (140, 40, -9.0), (140, 150, 9.0)] {
        Case::new(Dtype::Bf16, rows, 80, (rank, rank))
            .int8()
            .with(|c| {
                for side in [&mut c.keys, &mut c.values] {
                    if let SideCase::Project { above, .. } = side {
                        *above = shift;
                    }
                }
            })
            .check(lab);
    }
}

fn layouts(lab: &Lab) {
    for layout in
        [Layout::Contiguous, Layout::Nhd(16), Layout::Nhd(64), Layout::Hnd(64), Layout::PerHead(16), Layout::PerHead(32)]
    {
        let case = Case::new(Dtype::Bf16, 37, 64, (64, 40)).with(|c| {
            (c.layout, c.capacity) = (layout, 80);
            c.positions = !matches!(layout, Layout::PerHead(_));
        });
        case.check(lab);
        if !matches!(layout, Layout::Nhd(_)) {
            case.int8().check(lab);
        }
    }
    Case::new(Dtype::F16, 5, 64, (64, 40)).with(|c| c.positions = false).check(lab);
}

fn skipped_and_scattered_slots(lab: &Lab) {
    let slots = vec![39, -1, 0, 17, 16, -5, -1, 31, 32, 3];
    let case = Case::new(Dtype::Bf16, 5, 64, (40, 64)).with(|c| (c.slots, c.capacity) = (Some(slots), 40));
    case.check(lab);
    case.clone().int8().check(lab);
    let ready = SideCase::Latent { groups: 2, rank: 33, codec: Codec::Int8 };
    case.clone().with(|c| c.values = ready).check(lab);
    case.with(|c| c.slots = Some(vec![-1; 10])).check(lab);
}

fn bad_slots_and_pages(lab: &Lab) {
    let slots = vec![40, 1, i32::MAX, 17, 4, 35, 6, 7, 20, 9];
    let case = Case::new(Dtype::Bf16, 5, 64, (40, 64)).with(|c| (c.slots, c.capacity) = (Some(slots), 40));
    let ready = SideCase::Latent { groups: 2, rank: 33, codec: Codec::Int8 };
    // A table entry is a page of 16 rows; three a sequence.
    for bad_pages in [vec![], vec![(0, -1), (5, i32::MAX)], vec![(3, 9), (4, 8)], vec![(1, i32::MIN)]] {
        let case = case.clone().with(|c| c.bad_pages = bad_pages.clone());
        case.check(lab);
        case.clone().int8().check(lab);
        case.clone().with(|c| c.keys = ready.clone()).check(lab);
        case.with(|c| (c.keys, c.values) = (SideCase::None, ready.clone())).check(lab);
    }
    let first = Case::new(Dtype::F16, 20, 64, (40, 64)).with(|c| (c.bad_pages, c.capacity) = (vec![(1, 99)], 48));
    first.check(lab);
    // A row is stored on both sides or on none.
    for pages in [1, 3, 6] {
        Case::new(Dtype::Bf16, 40, 64, (40, 64)).with(|c| (c.value_pages, c.capacity) = (Some(pages), 48)).check(lab);
    }
}

fn strided_inputs(lab: &Lab) {
    Case::new(Dtype::F16, 9, 96, (64, 40)).with(|c| c.rows_first = true).check(lab);
    for rank in [16, 17] {
        let ready = SideCase::Latent { groups: 3, rank, codec: Codec::F16 };
        Case::new(Dtype::F16, 9, 96, (64, 40)).with(|c| (c.rows_first, c.values) = (true, ready)).check(lab);
    }
}

fn odd_values_stay_in_their_rows(lab: &Lab) {
    for rows in [20, 140] {
        let at = |seq: usize, head: usize, row: usize| ((seq * 4 + head) * rows + row) * 64;
        let odd = vec![(at(0, 1, 3) + 5, f32::NAN), (at(1, 2, 19) + 63, f32::INFINITY), (at(0, 0, 8), f32::NEG_INFINITY)];
        let case = Case::new(Dtype::Bf16, rows, 64, (40, 33)).with(|c| c.odd = odd);
        case.check(lab);
        case.clone().int8().check(lab);
        let ready = |codec| SideCase::Latent { groups: 4, rank: 64, codec };
        case.with(|c| (c.keys, c.values) = (ready(Codec::Int8), ready(Codec::Bf16))).check(lab);
    }
}

/// int8 latents in parts: the counters serve the next launch.
fn parts_meet_again(lab: &Lab) {
    parts_of(lab, &[1, 9]);
}

fn parts_of_many_tokens_meet_again(lab: &Lab) {
    parts_of(lab, &[100]);
}

fn parts_of(lab: &Lab, rows: &[usize]) {
    for &rows in rows {
        let mut rng = Rng::new(8);
        let sides = [project(&mut rng, 8, (2, 4), 130, Codec::Int8), project(&mut rng, 8, (1, 8), 200, Codec::Int8)];
        let [keys, values] = sides;
        Case::new(Dtype::Bf16, rows, 64, (1, 1))
            .with(|c| (c.kv_heads, c.keys, c.values, c.launches) = (8, keys, values, 2))
            .run(lab, |plan, _, _| assert!(plan.workspace().zeroed > 0, "the case has no parts"));
    }
}

const KEYS: SideShape = SideShape::Project { kv_heads: 4, head_dim: 64, groups: 2, size: 2, rank: 40, codec: Codec::Bf16 };
const VALUES: SideShape = SideShape::Latent { groups: 3, rank: 20, codec: Codec::Int8 };

fn shape() -> AppendLowrankShape {
    AppendLowrankShape { dtype: Dtype::Bf16, seqs: 2, new_rows: 5, keys: KEYS, values: VALUES }
}

#[track_caller]
fn plan_error(keys: SideShape, values: SideShape, dtype: Dtype) -> Error {
    AppendLowrankShape { dtype, keys, values, ..shape() }.plan(&Device::reference()).expect_err("a bad shape")
}

fn projects(kv_heads: usize, head_dim: usize, groups: usize, size: usize, rank: usize) -> SideShape {
    SideShape::Project { kv_heads, head_dim, groups, size, rank, codec: Codec::Int8 }
}

#[test]
fn shapes_without_a_kernel_are_unsupported() {
    let bf16 = Dtype::Bf16;
    let none = SideShape::None;
    for (e, words) in [
        (plan_error(KEYS, VALUES, Dtype::F32), ["f32", "bf16"]),
        (plan_error(KEYS, VALUES, Dtype::F16), ["Bf16 keys", "f16"]),
        (plan_error(projects(4, 264, 2, 2, 40), none, bf16), ["head_dim", "264"]),
        (plan_error(projects(40, 256, 1, 40, 4097), none, bf16), ["4097", "4096"]),
        (plan_error(none, SideShape::Latent { groups: 1, rank: 4097, codec: Codec::Int8 }, bf16), ["values", "4097"]),
        (plan_error(none, SideShape::Latent { groups: 1, rank: 7, codec: Codec::F16 }, bf16), ["F16 values", "bf16"]),
        (plan_error(none, SideShape::Dense { kv_heads: 1, head_dim: 12, codec: Codec::Bf16 }, bf16), ["head_dim", "12"]),
    ] {
        assert!(matches!(e, Error::Unsupported { op: "append_lowrank", .. }), "{e:?}");
        says(&e, &words);
    }
}

#[test]
fn contradictions_are_refused() {
    let none = SideShape::None;
    let error = |keys, values| plan_error(keys, values, Dtype::Bf16);
    for (e, arg) in [
        (error(none, none), "keys"),
        (error(projects(4, 64, 2, 2, 129), none), "keys"),
        (error(projects(4, 64, 2, 5, 40), none), "size"),
        (error(projects(4, 64, 2, 0, 40), none), "size"),
        (error(projects(4, 64, 2, 2, 0), none), "groups"),
        (error(none, projects(4, 64, 0, 2, 40)), "values"),
        (error(none, SideShape::Latent { groups: 1, rank: 0, codec: Codec::Int8 }), "values"),
        (error(KEYS, SideShape::Dense { kv_heads: 0, head_dim: 64, codec: Codec::Bf16 }), "values"),
    ] {
        assert!(matches!(&e, Error::Invalid { arg: a, .. } if *a == arg), "{e:?} instead of {arg}");
    }
    says(&error(projects(4, 64, 2, 2, 129), none), &["129", "2 kv heads of 64"]);
    let e = AppendLowrankShape { new_rows: 1 << 40, ..shape() }.plan(&Device::reference()).expect_err("too many");
    assert!(matches!(e, Error::Invalid { arg: "rows", .. }), "{e:?}");
}

/// Launches a good case with one argument changed; nothing may be written.
#[track_caller]
fn launch_error(change: impl Fn(&mut kvlar::AppendLowrankArgs<'_>)) -> Error {
    let lab = Lab::reference();
    let ready = SideCase::Latent { groups: 3, rank: 20, codec: Codec::Int8 };
    let found = std::cell::RefCell::new(None);
    Case::new(Dtype::Bf16, 5, 64, (40, 1)).with(|c| (c.values, c.slots) = (ready, Some(vec![-1; 10]))).run(
        &lab,
        |plan, args, workspace| {
            let params = plan.params(args, workspace).expect("a good case");
            assert_eq!((params.sides[0].stored, params.sides[1].stored), (64, 32));
            // A copy of the arguments with the change: the case itself goes on as it was.
            let mut changed = copy(args);
            change(&mut changed);
            *found.borrow_mut() = plan.params(&changed, workspace).err();
        },
    );
    found.into_inner().expect("a bad argument")
}

/// The same arguments again; nothing is launched with both.
fn copy<'a>(args: &kvlar::AppendLowrankArgs<'a>) -> kvlar::AppendLowrankArgs<'a> {
    use kvlar::{Memory, ViewMut};
    // SAFETY: of the two, one is used for checks only.
    let again = |v: &ViewMut<'a>| unsafe { ViewMut::from_raw(v.address(), v.bytes()) };
    let pool = |p: &Pool<ViewMut<'a>>| Pool {
        data: again(&p.data),
        seq_stride: p.seq_stride,
        head_stride: p.head_stride,
        page_stride: p.page_stride,
        row_stride: p.row_stride,
        params_offset: p.params_offset,
        params_stride: p.params_stride,
        page_count: p.page_count,
    };
    let side = |s: &SideArgs<'a>| match s {
        SideArgs::None => SideArgs::None,
        SideArgs::Project { from, pool: p } => SideArgs::Project { from: *from, pool: pool(p) },
        SideArgs::Store { x, x_strides, pool: p } => SideArgs::Store { x: *x, x_strides: *x_strides, pool: pool(p) },
    };
    kvlar::AppendLowrankArgs {
        keys: side(&args.keys),
        values: side(&args.values),
        positions: args.positions,
        slots: args.slots,
        rows: args.rows,
        row_positions: args.row_positions.as_ref().map(again),
    }
}

#[test]
fn every_argument_is_checked_against_its_memory() {
    let cut = |v: kvlar::View<'_>| {
        let bytes = kvlar::Memory::bytes(&v);
        // SAFETY: a part of what is there.
        unsafe { kvlar::View::from_raw(kvlar::Memory::address(&v), bytes - 1) }
    };
    let bounds =
        |e: Error, name: &str| assert!(matches!(&e, Error::Bounds { arg, .. } if *arg == name), "{e:?} instead of {name}");
    bounds(launch_error(|a| a.slots = cut(a.slots)), "slots");
    bounds(launch_error(|a| a.positions = a.positions.map(cut)), "positions");
    bounds(launch_error(|a| a.row_positions = a.row_positions.take().map(|p| p.slice(0..64).expect("within"))), "positions");
    bounds(launch_error(|a| a.rows.table = a.rows.table.map(cut)), "page table");
    let keys = |f: fn(&mut kvlar::Projection<'_>)| {
        launch_error(move |a| {
            if let SideArgs::Project { from, .. } = &mut a.keys {
                f(from);
            }
        })
    };
    bounds(keys(|p| p.x = p.x.slice(0..64).expect("within")), "x");
    bounds(keys(|p| p.encoder = p.encoder.slice(0..64).expect("within")), "encoder");
    bounds(keys(|p| p.offset = Some(p.x.slice(0..16).expect("within"))), "offset");
    let values = |f: fn(&mut kvlar::View<'_>, &mut Option<Strides>, &mut Pool<kvlar::ViewMut<'_>>)| {
        launch_error(move |a| {
            if let SideArgs::Store { x, x_strides, pool } = &mut a.values {
                f(x, x_strides, pool);
            }
        })
    };
    bounds(values(|x, _, _| *x = x.slice(0..100).expect("within")), "x");
    bounds(values(|_, s, _| *s = Some(Strides { seq: 300, head: 100, row: 21 })), "x");
    bounds(values(|_, _, p| p.page_count += 1), "values");
    says(&values(|_, _, p| p.row_stride = 16), &["values", "32 bytes"]);
    says(&values(|_, _, p| p.params_stride = 0), &["values", "4 bytes"]);
    let odd = values(|x, _, _| *x = x.slice(1..kvlar::Memory::bytes(x)).expect("within"));
    assert!(matches!(odd, Error::Bounds { .. } | Error::Alignment { .. }), "{odd:?}");
}

#[test]
fn arguments_that_contradict_the_shape_are_refused() {
    says(&launch_error(|a| a.values = SideArgs::None), &["values", "Latent", "another kind"]);
    says(&launch_error(|a| a.positions = None), &["positions", "row_positions"]);
    says(&launch_error(|a| a.row_positions = None), &["positions", "row_positions"]);
    says(&launch_error(|a| a.rows.table_head_stride = 1), &["rows", "2 groups of keys and 3 of values"]);
}

#[test]
fn a_workspace_of_another_plan_is_too_small() {
    let lab = Lab::reference();
    let keys = projects(4, 64, 2, 4, 200);
    let plan = AppendLowrankShape { keys, values: SideShape::None, ..shape() }.plan(&lab.device).expect("a plan");
    let size = plan.workspace();
    assert!(size.zeroed > 0 && size.scratch > 0, "{size:?}");
    let few = lab.device.alloc(1 << 20).expect("memory");
    let mut pool = lab.device.alloc(1 << 20).expect("memory");
    let groups = kvlar::HeadGroups::new(&lab.device, &lab.stream, 4, 4, &[0, 1, 2, 3, 3, 2, 1, 0]).expect("groups");
    let mut args = kvlar::AppendLowrankArgs {
        keys: SideArgs::Project {
            from: kvlar::Projection { x: few.view(), x_strides: None, encoder: few.view(), groups: &groups, offset: None },
            pool: Pool::hnd(pool.view_mut(), 4, 16, 2, 224, 4),
        },
        values: SideArgs::None,
        positions: None,
        slots: few.view(),
        rows: kvlar::Rows::block_table(few.view(), 2, few.view(), 16).expect("rows"),
        row_positions: None,
    };
    let mut none = kvlar::Workspace::new(&lab.device, Default::default()).expect("a workspace");
    let e = plan.launch(&lab.stream, &mut args, &mut none).expect_err("too small");
    assert!(matches!(e, Error::Bounds { arg: "workspace", .. }), "{e:?}");
    let mut enough = kvlar::Workspace::new(&lab.device, size).expect("a workspace");
    plan.launch(&lab.stream, &mut args, &mut enough).expect("a launch");
}

#[test]
fn no_rows_are_no_launch() {
    for lab in [Lab::reference()].into_iter().chain(Lab::emulated()) {
        Case::new(Dtype::Bf16, 0, 64, (16, 40)).check(&lab);
        Case::new(Dtype::F16, 0, 64, (16, 40)).int8().check(&lab);
    }
}
