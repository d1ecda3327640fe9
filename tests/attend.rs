//! Attention against the reference.

use kvlar::{Codec, Dtype, Schedule};
use kvlar_reference::testing::Rng;
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun, SegmentCase, check, compare};
use kvlar_tests::pages::Layout;
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    head_dims,
    gqa_ratios,
    query_rows,
    lengths_around_tile_and_page_edges,
    layouts,
    int8_rows,
    segments,
    ragged_heads,
    positions_and_windows,
    softcap_and_sinks,
    large_logits,
    no_visible_rows,
    half_precision_outputs_and_strides,
    value_dim_differs,
    many_random_cases,
    equal_bits_from_run_to_run,
    own_schedule_ignores_the_batch,
    many_splits,
    workspace_is_left_zeroed,
    broken_rows_reach_only_those_who_see_them,
    bad_pages_and_lengths_are_clamped_and_reported,
);

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn all(lab: &Lab, cases: impl IntoIterator<Item = AttendCase>) {
    for (i, case) in cases.into_iter().enumerate() {
        let case = AttendCase { seed: case.seed + 1000 * i as u64, ..case };
        check(lab, &case).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn int8(case: &mut AttendCase) {
    case.segments.iter_mut().for_each(|s| s.set_formats(Codec::Int8, Codec::Int8));
}

fn head_dims(lab: &Lab) {
    let dims = [8, 64, 72, 80, 96, 128, 136, 192, 256];
    all(lab, dims.into_iter().flat_map(|d| DTYPES.map(|t| AttendCase::new(t, (4, 2), d, &[37, 5]))));
}

fn gqa_ratios(lab: &Lab) {
    let ratios = [(1, 1), (3, 1), (5, 5), (6, 2), (8, 1), (12, 1), (16, 1), (24, 1), (33, 3)];
    all(lab, ratios.into_iter().map(|heads| AttendCase::new(Dtype::Bf16, heads, 64, &[21, 40])));
}

fn query_rows(lab: &Lab) {
    let case = |rows, heads| AttendCase::new(Dtype::F16, heads, 64, &[40, 9]).with(|c| c.query_rows = rows);
    all(
        lab,
        [(1, (2, 1)), (2, (8, 2)), (3, (4, 4)), (5, (6, 2)), (8, (4, 1)), (9, (2, 1)), (17, (2, 2))].map(|(s, h)| case(s, h)),
    );
}

fn lengths_around_tile_and_page_edges(lab: &Lab) {
    let lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129];
    for d in [64, 128, 256] {
        all(
            lab,
            [AttendCase::new(Dtype::Bf16, (2, 1), d, &lengths), AttendCase::new(Dtype::Bf16, (2, 1), d, &lengths).with(int8)],
        );
    }
}

fn layouts(lab: &Lab) {
    let layouts = [
        Layout::Contiguous,
        Layout::Nhd(16),
        Layout::Nhd(64),
        Layout::Hnd(32),
        Layout::Hnd(256),
        Layout::PerHead(16),
        Layout::PerHead(128),
    ];
    all(lab, layouts.map(|l| AttendCase::new(Dtype::Bf16, (6, 3), 64, &[70, 33, 128]).with(|c| c.segments[0].layout = l)));
}

fn int8_rows(lab: &Lab) {
    let dims = [
        (64, Layout::Hnd(16)),
        (80, Layout::Contiguous),
        (96, Layout::PerHead(32)),
        (128, Layout::Hnd(64)),
        (256, Layout::Hnd(16)),
    ];
    let case = |(d, layout), dtype, heads| {
        AttendCase::new(dtype, heads, d, &[50, 100, 1]).with(int8).with(|c| c.segments[0].layout = layout)
    };
    all(lab, dims.into_iter().flat_map(|d| [case(d, Dtype::Bf16, (4, 2)), case(d, Dtype::F16, (12, 1))]));
}

/// Sinks, a quantized body, a dense recent window.
fn tiers(dtype: Dtype, body: Codec) -> AttendCase {
    let dense = Option::<Codec>::from(dtype).unwrap();
    let segment = |codec, layout, lengths: &[usize]| SegmentCase { capacity: 96, ..SegmentCase::new(codec, layout, lengths) };
    AttendCase::new(dtype, (8, 2), 128, &[0, 0, 0]).with(|c| {
        c.segments = vec![
            segment(dense, Layout::Contiguous, &[4, 4, 2]),
            segment(body, Layout::Hnd(32), &[90, 33, 0]),
            segment(dense, Layout::Nhd(16), &[17, 1, 0]),
        ];
    })
}

fn segments(lab: &Lab) {
    let mut cases = Vec::new();
    for dtype in DTYPES {
        cases.push(tiers(dtype, Codec::Int8));
        cases.push(tiers(dtype, Option::<Codec>::from(dtype).unwrap()).with(|c| c.query_rows = 3));
        cases.push(tiers(dtype, Codec::Int8).with(|c| (c.window, c.schedule) = (40, Schedule::Own)));
        cases.push(tiers(dtype, Codec::Int8).with(|c| c.segments.push(c.segments[0].clone())));
    }
    all(lab, cases);
}

fn ragged_heads(lab: &Lab) {
    let case = |codec: Codec| {
        AttendCase::new(Dtype::Bf16, (6, 3), 64, &[0, 0]).with(|c| {
            let s = &mut c.segments[0];
            (s.layout, s.capacity) = (Layout::PerHead(16), 130);
            s.set_formats(codec, codec);
            s.lengths = vec![130, 3, 0, 64, 17, 129];
        })
    };
    let positions = |c: AttendCase| c.with(|c| c.segments[0].positions = true);
    all(
        lab,
        [
            case(Codec::Bf16),
            case(Codec::Int8),
            positions(case(Codec::Bf16)),
            positions(case(Codec::Int8)).with(|c| c.query_rows = 2),
        ],
    );
}

fn positions_and_windows(lab: &Lab) {
    let base = |layout| AttendCase::new(Dtype::Bf16, (4, 2), 64, &[60, 100]).with(|c| c.segments[0].layout = layout);
    let mut cases = Vec::new();
    for layout in [Layout::Contiguous, Layout::Hnd(16), Layout::PerHead(32)] {
        for window in [0, 1, 7, 64, 1000] {
            cases.push(base(layout).with(|c| (c.window, c.query_rows) = (window, 4)));
            cases.push(base(layout).with(|c| {
                (c.window, c.query_rows, c.q_positions) = (window, 3, true);
                c.segments[0].positions = true;
            }));
        }
        cases.push(base(layout).with(|c| (c.q_positions, c.query_rows) = (true, 2)));
    }
    // Windows that begin around the edge of a tile.
    let lengths: Vec<usize> = (80..90).collect();
    cases.push(AttendCase::new(Dtype::Bf16, (2, 1), 64, &lengths).with(|c| (c.window, c.query_rows) = (20, 3)));
    cases.push(AttendCase::new(Dtype::Bf16, (2, 1), 128, &lengths).with(|c| (c.window, c.query_rows) = (20, 4)));
    all(lab, cases);
}

fn softcap_and_sinks(lab: &Lab) {
    let base = || AttendCase::new(Dtype::Bf16, (4, 2), 64, &[30, 77]);
    all(
        lab,
        [
            base().with(|c| c.softcap = 5.0),
            base().with(|c| c.sinks = true),
            base().with(|c| (c.softcap, c.sinks, c.schedule) = (2.0, true, Schedule::Own)),
            base().with(int8).with(|c| (c.softcap, c.sinks) = (3.0, true)),
        ],
    );
}

/// Maxima that rise by far more than the headroom, and fall: running sums must be rescaled.
/// A row whose values decode to NaN is NaN for the queries that see it, and for no other.
fn broken_rows_reach_only_those_who_see_them(lab: &Lab) {
    let case = |heads| {
        AttendCase::new(Dtype::Bf16, heads, 64, &[40, 17]).with(int8).with(|c| {
            c.broken = true;
            c.query_rows = 3;
        })
    };
    all(lab, [case((2, 2)), case((3, 1)), case((8, 2)).with(|c| c.window = 9)]);
}

fn large_logits(lab: &Lab) {
    for q_size in [10.0, 60.0] {
        let base = |d| AttendCase::new(Dtype::F16, (2, 1), d, &[2000, 77]).with(|c| (c.q_size, c.query_rows) = (q_size, 3));
        all(lab, [base(64), base(128), base(64).with(int8), base(128).with(int8), base(64).with(|c| c.softcap = 20.0)]);
    }
}

fn no_visible_rows(lab: &Lab) {
    for sinks in [false, true] {
        for schedule in [Schedule::Balanced, Schedule::Own] {
            // The second sequence is empty; the first query of the third lies before all rows.
            let case = AttendCase::new(Dtype::Bf16, (4, 2), 64, &[20, 0, 1]).with(|c| {
                (c.sinks, c.schedule, c.query_rows) = (sinks, schedule, 2);
            });
            let data = AttendData::new(&case);
            let expected = data.expected();
            let empty = expected.lse[8];
            assert!(if sinks { empty.is_finite() } else { empty == f32::NEG_INFINITY }, "the case has no empty row");
            assert!(expected.out[8 * 64..16 * 64].iter().all(|&x| x == 0.0));
            check(lab, &case).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}

fn half_precision_outputs_and_strides(lab: &Lab) {
    let base = |dtype: Dtype| {
        AttendCase::new(dtype, (6, 2), 128, &[40, 8]).with(|c| (c.out_dtype, c.query_rows, c.rows_first) = (dtype, 3, true))
    };
    all(lab, DTYPES.map(base));
    all(lab, DTYPES.map(|t| base(t).with(|c| c.out_dtype = Dtype::F32).with(int8)));
}

fn value_dim_differs(lab: &Lab) {
    let dims = [(64, 128), (128, 64), (192, 128), (40, 8), (8, 256)];
    all(lab, dims.map(|(d, dv)| AttendCase::new(Dtype::Bf16, (4, 2), d, &[33, 20]).with(|c| c.value_dim = dv)));
    all(
        lab,
        [(64, 128), (192, 128)]
            .map(|(d, dv)| AttendCase::new(Dtype::F16, (4, 2), d, &[33, 20]).with(int8).with(|c| c.value_dim = dv)),
    );
}

fn random_case(seed: u64) -> AttendCase {
    let mut rng = Rng::new(seed);
    let pick = |rng: &mut Rng, from: &[usize]| from[rng.below(from.len())];
    let dtype = DTYPES[rng.below(2)];
    let (kv_heads, group) = (1 + rng.below(3), pick(&mut rng, &[1, 2, 3, 4, 7, 8, 16]));
    let seqs = 1 + rng.below(3);
    let head_dim = pick(&mut rng, &[16, 64, 80, 96, 128, 176, 256]);
    let mut case = AttendCase::new(dtype, (kv_heads * group, kv_heads), head_dim, &vec![0; seqs]);
    case.segments.clear();
    for _ in 0..1 + rng.below(kvlar::MAX_SEGMENTS) {
        let codec = if rng.below(2) == 0 { Codec::Int8 } else { Option::<Codec>::from(dtype).unwrap() };
        let page = 16 << rng.below(3);
        let layout = [Layout::Contiguous, Layout::Hnd(page), Layout::PerHead(page), Layout::Nhd(page)][rng.below(4)];
        let layout = if codec == Codec::Int8 && matches!(layout, Layout::Nhd(_)) { Layout::Hnd(page) } else { layout };
        let capacity = 1 + rng.below(150);
        let per_head = matches!(layout, Layout::PerHead(_));
        let lengths: Vec<usize> = (0..if per_head { seqs * kv_heads } else { seqs }).map(|_| rng.below(capacity + 1)).collect();
        let segment = SegmentCase::new(codec, layout, &lengths);
        case.segments.push(SegmentCase { capacity, positions: rng.below(4) == 0, ..segment });
    }
    case.query_rows = pick(&mut rng, &[1, 1, 2, 3, 5]);
    case.softcap = [0.0, 0.0, 4.0][rng.below(3)];
    case.window = pick(&mut rng, &[0, 0, 1, 20, 90]) as u32;
    case.sinks = rng.below(3) == 0;
    case.q_positions = rng.below(3) == 0;
    case.rows_first = rng.below(2) == 0;
    case.schedule = [Schedule::Balanced, Schedule::Own][rng.below(2)];
    case.out_dtype = [Dtype::F32, dtype][rng.below(2)];
    case.seed = seed;
    case
}

fn many_random_cases(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(25);
    for seed in 0..count {
        check(lab, &random_case(seed)).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn equal_bits_from_run_to_run(lab: &Lab) {
    for schedule in [Schedule::Balanced, Schedule::Own] {
        let case = AttendCase::new(Dtype::Bf16, (4, 2), 128, &[600, 50, 333]).with(|c| c.schedule = schedule);
        let data = AttendData::new(&case);
        let mut run = AttendRun::new(lab, &data);
        run.enqueue();
        let first = run.result();
        compare(&data, &first).unwrap_or_else(|e| panic!("{e}"));
        run.poison();
        run.enqueue();
        let second = run.result();
        assert_eq!(bits(&first.out), bits(&second.out));
        assert_eq!(bits(&first.lse), bits(&second.lse));
    }
}

/// Rows [0, n) of a case's first sequence alone give the same bits as within a batch.
/// From 1 to 35 of a unit: a merge takes eight at a time, and a lane's states are 32 apart.
fn many_splits(lab: &Lab) {
    let case = AttendCase::new(Dtype::Bf16, (2, 1), 8, &[17_400, 16_300, 15_900, 4_500, 4_000, 3_600, 700])
        .with(|c| (c.schedule, c.segments[0].layout) = (Schedule::Own, Layout::Contiguous));
    all(lab, [case.clone(), case.clone().with(|c| c.sinks = true), case.with(int8)]);
}

fn own_schedule_ignores_the_batch(lab: &Lab) {
    let own = |lengths: &[usize]| {
        AttendCase::new(Dtype::F16, (4, 2), 64, lengths).with(|c| {
            c.schedule = Schedule::Own;
            (c.segments[0].layout, c.segments[0].capacity) = (Layout::Contiguous, 1200);
        })
    };
    let batch = AttendData::new(&own(&[1100, 700, 9]));
    let mut alone = AttendData::new(&own(&[1100]));
    alone.take_first_sequence(&batch);
    let (mut a, mut b) = (AttendRun::new(lab, &batch), AttendRun::new(lab, &alone));
    a.enqueue();
    b.enqueue();
    let (a, b) = (a.result(), b.result());
    assert_eq!(bits(&a.out[..b.out.len()]), bits(&b.out));
    assert_eq!(bits(&a.lse[..b.lse.len()]), bits(&b.lse));
}

fn workspace_is_left_zeroed(lab: &Lab) {
    let case = AttendCase::new(Dtype::Bf16, (2, 2), 64, &[500, 200]);
    let data = AttendData::new(&case);
    let mut run = AttendRun::new(lab, &data);
    run.enqueue();
    let zeroed = run.counters();
    assert!(!zeroed.is_empty() && zeroed.iter().all(|&x| x == 0), "{zeroed:?}");
}

fn bad_pages_and_lengths_are_clamped_and_reported(lab: &Lab) {
    let case = AttendCase::new(Dtype::Bf16, (2, 1), 64, &[40, 40]).with(|c| c.segments[0].positions = false);
    for (lengths, bad) in [([40, 41], true), ([-1, 40], true), ([40, 40], false)] {
        let mut run = AttendRun::new(lab, &AttendData::new(&case));
        run.set_lengths(0, &lengths);
        run.enqueue();
        assert_eq!(run.status().bad_length(), bad, "{lengths:?}");
    }
    let mut run = AttendRun::new(lab, &AttendData::new(&case).with_bad_page());
    run.enqueue();
    assert!(run.status().bad_page() && !run.status().bad_length());
    assert!(run.result().out[128..].iter().all(|x| x.is_finite()), "the other sequence is not touched");
}
