//! project against the reference, and what it refuses.

use kvlar::{Device, Dtype, Error, HeadGroups, ProjectShape, Projection, Strides};
use kvlar_reference::testing::Rng;
use kvlar_tests::latents::ProjectCase as Case;
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    rows_and_ranks,
    groups_and_sizes,
    head_dims,
    many_tokens,
    means_are_taken_off,
    outputs_of_the_type_of_x,
    strided_inputs,
    odd_values_stay_in_their_rows,
    random_shapes
);

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn rows_and_ranks(lab: &Lab) {
    for (i, rows) in [1, 2, 7, 8, 9, 16, 33, 128].into_iter().enumerate() {
        for (j, rank) in [1, 8, 31, 32, 33, 64, 100].into_iter().enumerate() {
            Case::new(DTYPES[(i + j) % 2], rows, 64, rank).check(lab);
        }
    }
    for dtype in DTYPES {
        Case::new(dtype, 5, 128, 512).check(lab);
        Case::new(dtype, 200, 64, 257).check(lab);
    }
}

fn groups_and_sizes(lab: &Lab) {
    for (i, (kv_heads, groups)) in
        [(1, (1, 1)), (8, (8, 1)), (8, (1, 8)), (8, (4, 2)), (6, (2, 3)), (5, (3, 4)), (8, (2, 8))].into_iter().enumerate()
    {
        for rows in [1, 21] {
            Case { kv_heads, groups, seed: i as u64, ..Case::new(DTYPES[i % 2], rows, 64, 48) }.check(lab);
        }
    }
}

fn head_dims(lab: &Lab) {
    for dim in [8, 16, 24, 40, 80, 96, 120, 256] {
        for (groups, kv_heads) in [((2, 1), 4), ((2, 3), 4), ((1, 7), 7)] {
            let dtype = DTYPES[usize::from(dim % 16 == 8)];
            Case { groups, kv_heads, ..Case::new(dtype, 11, dim, 40) }.check(lab);
        }
    }
}

/// Kernels of 64 tokens a warp.
fn many_tokens(lab: &Lab) {
    for (i, rank) in [1, 32, 65, 100, 160, 300].into_iter().enumerate() {
        for seqs in [1, 2] {
            let rows = if seqs == 1 { 300 } else { 131 };
            Case { seqs, ..Case::new(DTYPES[i % 2], rows, 32, rank) }.check(lab);
        }
    }
    Case { mean: true, rows_first: true, groups: (3, 3), ..Case::new(Dtype::F16, 200, 40, 72) }.check(lab);
    Case { out_dtype: Dtype::Bf16, ..Case::new(Dtype::Bf16, 129, 64, 36) }.check(lab);
}

fn means_are_taken_off(lab: &Lab) {
    for dtype in DTYPES {
        for (rows, rank) in [(1, 64), (19, 37), (130, 96)] {
            Case { mean: true, ..Case::new(dtype, rows, 64, rank) }.check(lab);
        }
    }
}

fn outputs_of_the_type_of_x(lab: &Lab) {
    for dtype in DTYPES {
        for rank in [5, 32, 60, 128] {
            Case { out_dtype: dtype, ..Case::new(dtype, 17, 64, rank) }.check(lab);
        }
    }
}

fn strided_inputs(lab: &Lab) {
    for rows in [3, 50, 140] {
        Case { rows_first: true, ..Case::new(Dtype::Bf16, rows, 96, 64) }.check(lab);
    }
}

fn odd_values_stay_in_their_rows(lab: &Lab) {
    let at = |seq: usize, head: usize, row: usize| ((seq * 4 + head) * 20 + row) * 64;
    let odd = vec![(at(0, 1, 3) + 5, f32::NAN), (at(1, 2, 19) + 63, f32::INFINITY), (at(0, 0, 8), f32::NEG_INFINITY)];
    Case { odd, groups: (4, 1), ..Case::new(Dtype::Bf16, 20, 64, 40) }.check(lab);
}

fn random_shapes(lab: &Lab) {
    let mut rng = Rng::new(77);
    for seed in 0..12 {
        let kv_heads = 1 + rng.below(8);
        let groups = (1 + rng.below(4), 1 + rng.below(kv_heads));
        let (rows, dim, rank) = (1 + rng.below(60), 8 * (1 + rng.below(16)), 1 + rng.below(150));
        let dtype = DTYPES[rng.below(2)];
        Case { kv_heads, groups, seqs: 1 + rng.below(3), mean: seed % 3 == 0, seed, ..Case::new(dtype, rows, dim, rank) }
            .check(lab);
    }
}

fn shape() -> ProjectShape {
    ProjectShape {
        dtype: Dtype::Bf16,
        out_dtype: Dtype::F32,
        seqs: 2,
        kv_heads: 4,
        rows: 3,
        head_dim: 64,
        groups: 2,
        size: 2,
        rank: 16,
    }
}

#[track_caller]
fn plan_error(change: impl FnOnce(&mut ProjectShape)) -> Error {
    let mut s = shape();
    change(&mut s);
    s.plan(&Device::reference()).expect_err("a bad shape")
}

#[test]
fn shapes_without_a_kernel_are_unsupported() {
    for (e, words) in [
        (plan_error(|s| s.head_dim = 264), ["head_dim", "264"]),
        (plan_error(|s| s.head_dim = 12), ["head_dim", "12"]),
        (plan_error(|s| s.dtype = Dtype::F32), ["f32", "bf16"]),
        (plan_error(|s| s.out_dtype = Dtype::F16), ["f16", "bf16"]),
        (plan_error(|s| s.rank = 4097), ["4097", "4096"]),
        (plan_error(|s| (s.kv_heads, s.size, s.head_dim) = (1 << 20, 1 << 20, 64)), ["1048576", "64"]),
    ] {
        assert!(matches!(e, Error::Unsupported { op: "project", .. }), "{e:?}");
        says(&e, &words);
    }
}

#[test]
fn contradictions_are_refused() {
    for (e, arg) in [
        (plan_error(|s| s.groups = 0), "groups"),
        (plan_error(|s| s.rank = 0), "groups"),
        (plan_error(|s| s.size = 0), "size"),
        (plan_error(|s| s.size = 5), "size"),
        (plan_error(|s| s.rows = 1 << 40), "rows"),
    ] {
        assert!(matches!(&e, Error::Invalid { arg: a, .. } if *a == arg), "{e:?} instead of {arg}");
    }
}

#[test]
fn groups_are_checked_before_a_kernel_sees_them() {
    let lab = Lab::reference();
    let groups = |size, members: &[i32]| HeadGroups::new(&lab.device, &lab.stream, 4, size, members);
    for (size, members, words) in [
        (2, &[0, 1, 2][..], ["3", "groups of 2"]),
        (0, &[0], ["1", "groups of 0"]),
        (2, &[], ["0", "groups of 2"]),
        (2, &[0, 1, 2, 4], ["group 1", "kv head 4"]),
        (2, &[0, -1], ["group 0", "-1"]),
        (3, &[0, 1, 0], ["kv head 0", "twice"]),
    ] {
        let e = groups(size, members).expect_err("bad groups");
        assert!(matches!(e, Error::Invalid { arg: "groups", .. }), "{e:?}");
        says(&e, &words);
    }
    let overlapping = groups(2, &[0, 1, 1, 3]).expect("heads may be in several groups");
    assert_eq!((overlapping.groups(), overlapping.size(), overlapping.kv_heads()), (2, 2, 4));
}

#[test]
fn every_argument_is_checked_against_its_memory() {
    let lab = Lab::reference();
    let whole = lab.device.alloc(8192 + 16).expect("memory");
    let s = shape();
    let plan = s.plan(&lab.device).expect("a plan");
    let buffer = |bytes: usize| lab.device.alloc(bytes).expect("memory");
    let (x, encoder, offset) = (buffer(2 * 4 * 3 * 64 * 2), buffer(2 * 16 * 128 * 2), buffer(2 * 16 * 4));
    let groups = HeadGroups::new(&lab.device, &lab.stream, 4, 2, &[0, 1, 2, 3]).expect("groups");
    let others = HeadGroups::new(&lab.device, &lab.stream, 4, 1, &[0, 1]).expect("groups");
    let all = 2 * 2 * 3 * 16 * 4;
    let mut out = lab.poisoned(all);
    let good = Projection { x: x.view(), x_strides: None, encoder: encoder.view(), groups: &groups, offset: Some(offset.view()) };
    let mut try_with = |change: &dyn Fn(&mut Projection<'_>), out_bytes: usize| {
        let mut p = good;
        change(&mut p);
        plan.launch(&lab.stream, &p, &mut out.view_mut().slice(0..out_bytes).expect("within"))
    };
    assert_eq!(try_with(&|_| {}, all), Ok(()));
    let bounds =
        |r: Result<(), Error>, name: &str| assert!(matches!(&r, Err(Error::Bounds { arg, .. }) if *arg == name), "{r:?}");
    bounds(try_with(&|_| {}, all - 4), "out");
    bounds(try_with(&|p| p.x = p.x.slice(0..100).expect("within"), all), "x");
    bounds(try_with(&|p| p.encoder = p.encoder.slice(0..8190).expect("within"), all), "encoder");
    bounds(try_with(&|p| p.offset = p.offset.map(|o| o.slice(0..124).expect("within")), all), "offset");
    bounds(try_with(&|p| p.x_strides = Some(Strides { seq: 4096, head: 64, row: 256 }), all), "x");
    let e = try_with(&|p| p.x_strides = Some(Strides { seq: 768, head: 190, row: 64 }), all).expect_err("odd strides");
    says(&e, &["x:", "multiples of 8"]);
    let misaligned = Projection { encoder: whole.view().slice(8..8200).expect("within"), ..good };
    let e = plan.launch(&lab.stream, &misaligned, &mut out.view_mut()).expect_err("misaligned");
    assert!(matches!(e, Error::Alignment { arg: "encoder", need: 16, .. }), "{e:?}");
    let other = Projection { groups: &others, ..good };
    let e = plan.launch(&lab.stream, &other, &mut out.view_mut()).expect_err("other groups");
    says(&e, &["groups:", "2 groups of 1", "2 of 2"]);
}

#[test]
fn no_rows_are_no_launch() {
    for lab in [Lab::reference()].into_iter().chain(Lab::emulated()) {
        Case::new(Dtype::Bf16, 0, 64, 16).check(&lab);
        Case { seqs: 0, ..Case::new(Dtype::F16, 4, 64, 16) }.check(&lab);
    }
}

#[test]
fn an_offset_is_the_image_of_the_mean() {
    let s = ProjectShape { kv_heads: 2, head_dim: 8, groups: 1, size: 2, rank: 1, ..shape() };
    let mut encoder = [0.0f32; 16];
    (encoder[0], encoder[8]) = (1.0 + 1.0 / 512.0, 2.0); // the first is between two bf16 numbers
    let mut mean = [0.0f32; 16];
    (mean[0], mean[8]) = (3.0, 10.0);
    assert_eq!(s.offset_of(&mean, &encoder, &[1, 0]).expect("a mean"), [16.0]); // 1 x 10 + 2 x 3
    assert!(s.offset_of(&mean[1..], &encoder, &[1, 0]).is_err());
    assert!(s.offset_of(&mean, &encoder, &[1, 2]).is_err());
}
