//! append_groups: new rows stay as they are, and leave in groups to be encoded, against the reference's codecs.

use kvlar::{AppendGroupsShape, AppendShape, Codec, Dtype, Format, RopeLayout};
use kvlar_reference::{Rope as Rotation, RopeScaling};
use kvlar_tests::append_groups::GroupsRun;
use kvlar_tests::pages::{Layout, RowFormat};
use kvlar_tests::{Lab, on_every_device, reference_dtype};

on_every_device!(
    formats,
    steps_of_any_size_give_equal_bits,
    every_length,
    recent_rows_stay,
    channels_side_by_side,
    sinks_are_negative,
    rotation_is_that_of_append,
    other_rows_are_left_alone,
);

fn grouped(codec: Codec, group: usize) -> Format {
    Format { group: Some(group), ..codec.into() }
}

/// KIVI: channel-wise keys, values in groups of 32.
fn kivi() -> (Format, Format) {
    (Codec::Int2Channel.into(), grouped(Codec::Int2, 32))
}

/// Steps that end within groups, at their ends, and pass several.
const STEPS: [[usize; 2]; 6] = [[40, 5], [1, 27], [23, 1], [1, 0], [70, 31], [0, 64]];

fn formats(lab: &Lab) {
    let rotated = |codec: Codec| Format { hadamard: true, ..codec.into() };
    let (keys, values) = kivi();
    let mut runs = vec![
        GroupsRun::new(keys, values, &STEPS),
        GroupsRun::new(rotated(Codec::Int4Channel), Codec::Int4.into(), &STEPS),
        GroupsRun::new(Codec::Int4Channel.into(), Codec::Int2Channel.into(), &STEPS),
        GroupsRun { dtype: Dtype::F16, ..GroupsRun::new(Codec::Int8.into(), Codec::Int4Channel.into(), &STEPS) },
        GroupsRun {
            keys: RowFormat { scales: vec![0.02, 0.1], ..Codec::Fp8.into() },
            ..GroupsRun::new(keys, Codec::Fp8.into(), &STEPS)
        },
    ];
    runs.push(GroupsRun {
        pack_rows: 16,
        layout: Layout::Hnd(16),
        ..GroupsRun::new(rotated(Codec::Int4), Codec::Int2.into(), &STEPS)
    });
    runs.push(GroupsRun {
        keys: grouped(Codec::Int4Channel, 64).into(),
        values: Codec::Int8.into(),
        pack_rows: 64,
        dims: (128, 256),
        layout: Layout::PerHead(128),
        ..GroupsRun::new(keys, values, &STEPS)
    });
    runs.push(GroupsRun { heads: 3, dims: (80, 64), layout: Layout::Contiguous, ..GroupsRun::new(keys, values, &STEPS) });
    for run in runs {
        run.check(lab);
    }
}

/// A step may bring any number of rows: what is encoded is the same, also where keys are rotated.
fn steps_of_any_size_give_equal_bits(lab: &Lab) {
    let (keys, values) = kivi();
    for sinks in [0, 3] {
        let once = GroupsRun { rope: true, sinks, ..GroupsRun::new(keys, values, &[[100, 100]]) };
        let ones = GroupsRun { steps: vec![[1, 2]; 50], ..once.clone() };
        let some = GroupsRun { steps: [&ones.steps[..], &[[33, 0], [17, 0]]].concat(), ..ones };
        let (a, b) = (once.run(lab), some.run(lab));
        assert_eq!(a.packed, b.packed);
        assert!(a.keys == b.keys && a.values == b.values, "sinks {sinks}");
    }
}

/// Of a group, every residue, before and after a step that ends one.
fn every_length(lab: &Lab) {
    let (keys, values) = kivi();
    for n in 0..=33 {
        GroupsRun::new(keys, values, &[[n, 33 - n], [31, 1], [1, 32]]).check(lab);
    }
}

fn recent_rows_stay(lab: &Lab) {
    let (keys, values) = kivi();
    for recent in [1, 31, 32, 50, 200] {
        GroupsRun { recent, ..GroupsRun::new(keys, values, &STEPS) }.check(lab);
    }
}

/// Both sides channel-wise, over a page's end, in little: the race detector's case.
fn channels_side_by_side(lab: &Lab) {
    GroupsRun { recent: 1, ..GroupsRun::new(Codec::Int4Channel.into(), Codec::Int2Channel.into(), &[[40, 5], [1, 27]]) }
        .check(lab);
}

fn sinks_are_negative(lab: &Lab) {
    let (keys, values) = kivi();
    for sinks in [1, 4, 45] {
        GroupsRun { sinks, recent: 7, ..GroupsRun::new(keys, values, &STEPS) }.check(lab);
    }
}

/// What is encoded at once is what was stored before: rotated and rounded.
fn rotation_is_that_of_append(lab: &Lab) {
    let run = GroupsRun { rope: true, ..GroupsRun::new(Codec::Int8.into(), Codec::Int8.into(), &[[32, 64]]) };
    let encoded = run.run(lab);
    let rotation = Rotation::new(10000.0, 64, RopeLayout::Half, RopeScaling::None);
    let mut far = 0f32;
    for row in 0..32 {
        let given = &encoded.k[0][1][row * 64..][..64];
        let expected = reference_dtype(run.dtype).round_all(&rotation.rotate(given, row as i64));
        let actual = encoded.pages.load(&encoded.keys, (0, 1, row), 64, &run.keys);
        far = expected.iter().zip(&actual).fold(far, |far, (a, b)| far.max((a - b).abs()));
    }
    // Half a code of 255 over a range of about 6, and a rounding of the rotation.
    assert!(far < 0.05 && far > 0.0, "{far}");
}

/// Without whole groups nothing is encoded, and tables beyond are not followed.
fn other_rows_are_left_alone(lab: &Lab) {
    let (keys, values) = kivi();
    let encoded = GroupsRun::new(keys, values, &[[31, 1], [0, 30]]).run(lab);
    assert_eq!(encoded.packed, [0, 0]);
    assert!(encoded.keys.iter().chain(&encoded.values).all(|&x| x == 0xff));
}

#[test]
fn shapes_that_contradict_themselves_are_refused() {
    let lab = Lab::reference();
    let (keys, values) = kivi();
    let native = Format::from(Codec::Bf16);
    let append = AppendShape {
        dtype: Dtype::Bf16,
        key_format: native,
        value_format: native,
        seqs: 1,
        kv_heads: 1,
        new_rows: 1,
        head_dim: 64,
        value_dim: 64,
    };
    let shape = AppendGroupsShape { append, key_format: keys, value_format: values, pack_rows: 32, max_packs: 1 };
    shape.plan(&lab.device).unwrap();
    let refused = |shape: AppendGroupsShape, what: &[&str]| {
        kvlar_tests::says(&shape.plan(&lab.device).expect_err("a refusal"), what);
    };
    refused(AppendGroupsShape { pack_rows: 0, ..shape }, &["pack_rows", "0 rows"]);
    refused(AppendGroupsShape { pack_rows: 64, ..shape }, &["key format", "groups of 32", "64"]);
    refused(AppendGroupsShape { value_format: grouped(Codec::Int2, 48), ..shape }, &["value format", "48", "64 values"]);
    refused(AppendGroupsShape { max_packs: 1 << 40, ..shape }, &["max_packs", "too many"]);
    let f16 = AppendShape { key_format: Codec::F16.into(), ..append };
    refused(AppendGroupsShape { append: f16, ..shape }, &["append_groups", "another type than bf16"]);
}
