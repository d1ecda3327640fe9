//! Attention over channel-wise keys and grouped values (KIVI) against the reference, which decodes them first.

use kvlar::{Codec, Dtype, Format, Schedule};
use kvlar_reference::testing::Rng;
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun, SegmentCase, check, compare};
use kvlar_tests::pages::Layout;
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    pairs,
    head_dims,
    gqa_ratios_and_query_rows,
    every_length,
    lengths_around_groups,
    groups_and_layouts,
    value_groups,
    rotated_channels,
    exact_rows_beside,
    ragged_groups,
    positions_and_windows,
    softcap_and_sinks,
    int8_queries,
    constant_rows,
    broken_keys_and_values,
    small_and_large_numbers,
    random_channels,
    equal_bits_from_run_to_run,
);

const KEYS: [Codec; 2] = [Codec::Int4Channel, Codec::Int2Channel];
const VALUES: [Codec; 3] = [Codec::Int8, Codec::Int4, Codec::Int2];

fn all(lab: &Lab, cases: impl IntoIterator<Item = AttendCase>) {
    for (i, case) in cases.into_iter().enumerate() {
        let case = AttendCase { seed: case.seed + 1000 * i as u64, ..case };
        check(lab, &case).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn grouped(codec: Codec, group: usize) -> Format {
    Format { group: Some(group), ..codec.into() }
}

/// KIVI: groups of 32 rows of keys, and of 32 values; in pages that hold whole groups.
fn kivi(heads: (usize, usize), d: usize, lengths: &[usize], keys: Codec, values: Codec) -> AttendCase {
    AttendCase::new(Dtype::Bf16, heads, d, lengths).with(|c| {
        let group = if d.is_multiple_of(32) { 32 } else { d };
        c.segments[0].set_formats(keys, grouped(values, group));
        c.segments[0].layout = Layout::Hnd(64);
    })
}

fn pairs(lab: &Lab) {
    for (i, keys) in KEYS.into_iter().enumerate() {
        for (j, values) in VALUES.into_iter().enumerate() {
            let d = [64, 128, 256][(i + j) % 3];
            let f16 = |c: &mut AttendCase| c.dtype = if j == 1 { Dtype::F16 } else { Dtype::Bf16 };
            all(lab, [kivi((4, 2), d, &[101, 33], keys, values).with(f16)]);
        }
    }
}

fn head_dims(lab: &Lab) {
    for keys in KEYS {
        all(lab, [8, 16, 64, 72, 96, 128, 136, 192, 256].map(|d| kivi((4, 2), d, &[70, 5], keys, Codec::Int4)));
    }
    let differ = |d, dv| kivi((4, 2), d, &[60, 33], Codec::Int2Channel, Codec::Int2).with(|c| c.value_dim = dv);
    all(lab, [differ(64, 128), differ(128, 64), differ(192, 96), differ(64, 256)]);
}

fn gqa_ratios_and_query_rows(lab: &Lab) {
    let ratios = [(1, 1), (3, 1), (6, 2), (8, 1), (12, 1), (33, 3)];
    all(lab, ratios.map(|heads| kivi(heads, 64, &[21, 40], Codec::Int4Channel, Codec::Int4)));
    let rows = |s, heads| kivi(heads, 64, &[40, 9], Codec::Int2Channel, Codec::Int2).with(|c| c.query_rows = s);
    all(lab, [rows(2, (8, 2)), rows(3, (4, 4)), rows(8, (4, 1)), rows(17, (2, 2))]);
}

/// Of a tile and of groups, every residue.
fn every_length(lab: &Lab) {
    let lengths: Vec<usize> = (0..=130).collect();
    for keys in KEYS {
        all(lab, [kivi((2, 1), 64, &lengths, keys, Codec::Int4)]);
    }
}

fn lengths_around_groups(lab: &Lab) {
    let lengths = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 256];
    for (d, keys) in [(64, Codec::Int2Channel), (128, Codec::Int4Channel), (256, Codec::Int2Channel)] {
        all(lab, [kivi((2, 1), d, &lengths, keys, Codec::Int2)]);
    }
}

fn groups_and_layouts(lab: &Lab) {
    let case = |group, layout| {
        kivi((6, 3), 64, &[70, 33, 200], Codec::Int4Channel, Codec::Int4).with(|c| {
            c.segments[0].set_formats(grouped(Codec::Int4Channel, group), grouped(Codec::Int4, 32));
            c.segments[0].layout = layout;
        })
    };
    let layouts = [
        (32, Layout::Contiguous),
        (32, Layout::Hnd(32)),
        (32, Layout::PerHead(256)),
        (64, Layout::Hnd(64)),
        (64, Layout::PerHead(128)),
        (128, Layout::Hnd(128)),
        (96, Layout::Contiguous),
    ];
    all(lab, layouts.map(|(group, layout)| case(group, layout)));
}

fn value_groups(lab: &Lab) {
    for (d, groups) in [(64, &[8, 16, 64][..]), (128, &[16, 64, 128]), (256, &[16, 256]), (80, &[80, 16])] {
        for &group in groups {
            let case = |values| {
                kivi((4, 2), d, &[50, 9], Codec::Int4Channel, Codec::Int4)
                    .with(|c| c.segments[0].set_formats(Codec::Int4Channel, grouped(values, group)))
            };
            all(lab, [case(Codec::Int4), case(Codec::Int2)]);
        }
    }
}

fn rotated_channels(lab: &Lab) {
    for codec in KEYS {
        let rotated = Format { hadamard: true, ..codec.into() };
        let case =
            |d, heads| kivi(heads, d, &[50, 17], codec, Codec::Int4).with(|c| c.segments[0].set_formats(rotated, Codec::Int4));
        all(lab, [case(64, (4, 2)), case(128, (12, 1)), case(256, (2, 2))]);
    }
}

/// Sinks, a body of whole groups, recent rows and the unfinished group.
fn tiers(dtype: Dtype, d: usize, keys: Codec, values: Codec) -> AttendCase {
    let dense = Option::<Codec>::from(dtype).unwrap();
    kivi((8, 2), d, &[0, 0, 0], keys, values).with(|c| {
        let mut body = SegmentCase { lengths: vec![320, 32, 0], capacity: 320, ..c.segments[0].clone() };
        body.layout = Layout::PerHead(64);
        c.dtype = dtype;
        c.segments = vec![
            SegmentCase::new(dense, Layout::Contiguous, &[4, 4, 2]),
            body,
            SegmentCase::new(dense, Layout::Nhd(16), &[140, 31, 0]),
        ];
    })
}

fn exact_rows_beside(lab: &Lab) {
    for (i, keys) in KEYS.into_iter().enumerate() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            all(lab, [tiers(dtype, [64, 128][i], keys, [Codec::Int4, Codec::Int2][i])]);
        }
    }
    all(lab, [tiers(Dtype::Bf16, 256, Codec::Int2Channel, Codec::Int2)]);
}

fn ragged_groups(lab: &Lab) {
    let case = kivi((6, 3), 128, &[0, 0], Codec::Int2Channel, Codec::Int2).with(|c| {
        let s = &mut c.segments[0];
        (s.layout, s.capacity) = (Layout::PerHead(32), 160);
        s.lengths = vec![160, 0, 32, 64, 1, 99];
    });
    all(lab, [case]);
}

fn positions_and_windows(lab: &Lab) {
    let case = || kivi((4, 2), 64, &[150, 60], Codec::Int4Channel, Codec::Int2);
    all(
        lab,
        [
            case().with(|c| c.window = 40),
            case().with(|c| (c.segments[0].positions, c.window) = (true, 70)),
            case().with(|c| (c.q_positions, c.query_rows) = (true, 4)),
            case().with(|c| (c.q_positions, c.segments[0].positions, c.window) = (true, true, 33)),
        ],
    );
}

fn softcap_and_sinks(lab: &Lab) {
    let case = |keys| kivi((8, 2), 64, &[50, 0], keys, Codec::Int4);
    for keys in KEYS {
        all(lab, [case(keys).with(|c| c.sinks = true), case(keys).with(|c| (c.softcap, c.q_size) = (5.0, 4.0))]);
    }
}

fn int8_queries(lab: &Lab) {
    let case = |keys, rows| kivi((6, 2), 64, &[60, 9], keys, Codec::Int4).with(|c| (c.int8_queries, c.query_rows) = (true, rows));
    all(lab, [case(Codec::Int4Channel, 1), case(Codec::Int2Channel, 3)]);
}

/// Channels of one value have scale 0.
fn constant_rows(lab: &Lab) {
    all(lab, KEYS.map(|keys| kivi((4, 2), 64, &[50], keys, Codec::Int2).with(|c| c.constant = true)));
}

/// A key that is not finite spoils its channel for the group, so that all of the group's rows score NaN; a value spoils its
/// few dimensions of its row, for those who see it.
fn broken_keys_and_values(lab: &Lab) {
    for keys in KEYS {
        let case = |heads| kivi(heads, 64, &[40, 70], keys, Codec::Int4).with(|c| c.query_rows = 3);
        all(lab, [case((4, 2)).with(|c| c.nan_key = true), case((4, 2)).with(|c| c.nan_value = true)]);
        let broken = |heads| case(heads).with(|c| c.broken = true);
        all(lab, [broken((2, 2)), broken((3, 1)), broken((8, 2)).with(|c| c.window = 9)]);
        all(lab, [kivi((2, 1), 256, &[90], keys, Codec::Int2).with(|c| (c.broken, c.query_rows) = (true, 2))]);
    }
}

fn small_and_large_numbers(lab: &Lab) {
    for keys in KEYS {
        let case = |size| kivi((4, 2), 64, &[90], keys, Codec::Int4).with(|c| c.q_size = size);
        all(lab, [case(30.0), case(1e-4), case(1e4).with(|c| c.key_size = 1e-4), case(0.01).with(|c| c.key_size = 100.0)]);
    }
}

fn random_case(rng: &mut Rng) -> AttendCase {
    let pick = |rng: &mut Rng, from: &[usize]| from[rng.below(from.len())];
    let (kv_heads, ratio) = (1 + rng.below(3), pick(rng, &[1, 2, 3, 4, 7, 8, 11]));
    let d = pick(rng, &[32, 64, 64, 96, 128, 128, 256]);
    let lengths: Vec<usize> = (0..1 + rng.below(3)).map(|_| rng.below(200)).collect();
    let mut c = kivi((kv_heads * ratio, kv_heads), d, &lengths, KEYS[rng.below(2)], VALUES[rng.below(3)]);
    c.dtype = [Dtype::Bf16, Dtype::F16][rng.below(2)];
    c.segments[0].keys.format.hadamard = d.is_power_of_two() && rng.below(3) == 0;
    c.segments[0].layout = [Layout::Hnd(32), Layout::Hnd(64), Layout::Contiguous, Layout::PerHead(32)][rng.below(4)];
    c.segments[0].positions = rng.below(4) == 0;
    if rng.below(2) == 0 {
        let dense = Option::<Codec>::from(c.dtype).unwrap();
        let exact = |rng: &mut Rng, n: usize| {
            let lengths: Vec<usize> = lengths.iter().map(|_| rng.below(n)).collect();
            SegmentCase::new(dense, Layout::Hnd(16), &lengths)
        };
        let (sinks, recent) = (exact(rng, 9), exact(rng, 40));
        c.segments.insert(0, sinks);
        c.segments.push(recent);
    }
    c.query_rows = 1 + rng.below(3);
    c.window = if rng.below(4) == 0 { 1 + rng.below(100) as u32 } else { 0 };
    c.sinks = rng.below(3) == 0;
    c.schedule = if rng.below(3) == 0 { Schedule::Own } else { Schedule::Balanced };
    c.seed = rng.below(1 << 30) as u64;
    c
}

fn random_channels(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    let mut rng = Rng::new(78);
    all(lab, (0..count).map(|_| random_case(&mut rng)));
}

fn equal_bits_from_run_to_run(lab: &Lab) {
    let data = AttendData::new(&tiers(Dtype::Bf16, 64, Codec::Int4Channel, Codec::Int4));
    let mut run = AttendRun::new(lab, &data);
    run.enqueue();
    let first = run.result();
    run.poison();
    run.enqueue();
    assert_eq!(run.result(), first);
    assert!(run.counters().iter().all(|&c| c == 0));
    compare(&data, &first).unwrap();
}

/// Formats that the kernels have none for are refused before anything is enqueued.
#[test]
fn combinations_without_a_kernel_are_unsupported() {
    let lab = Lab::reference();
    let refused = |keys: Format, values: Format, what: &[&str]| {
        let case = kivi((4, 2), 128, &[9], Codec::Int4Channel, Codec::Int4).with(|c| c.segments[0].set_formats(keys, values));
        let e = case.shape().plan(&lab.device).expect_err("a bad shape");
        assert!(matches!(e, kvlar::Error::Unsupported { op: "attend", .. }), "{e:?}");
        kvlar_tests::says(&e, what);
    };
    let channels = Format::from(Codec::Int4Channel);
    refused(grouped(Codec::Int4Channel, 48), Codec::Int4.into(), &["groups of 48 rows", "multiples of 32"]);
    refused(channels, channels, &["Int4Channel values"]);
    refused(Codec::Int4.into(), channels, &["Int4Channel values"]);
    refused(channels, Codec::Fp8.into(), &["Int4Channel keys", "Fp8 values"]);
    refused(channels, Codec::Bf16.into(), &["Int4Channel keys", "Bf16 values"]);
    refused(channels, grouped(Codec::Int4, 8), &["every 8 values", "multiples of 16"]);
    refused(channels, Format { hadamard: true, ..Codec::Int4.into() }, &["rotated values"]);
    // Pages that hold no whole groups are an error of the rows.
    let case = kivi((4, 2), 64, &[40], Codec::Int4Channel, Codec::Int4).with(|c| c.segments[0].layout = Layout::Hnd(16));
    let mut run = AttendRun::new(&lab, &AttendData::new(&case));
    let e = run.with_args(|plan, args, work, workspace| plan.schedule(&lab.stream, args, work, workspace).expect_err("pages"));
    kvlar_tests::says(&e, &["keys", "groups of 32", "pages of 16"]);
}
