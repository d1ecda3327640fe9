//! Attention over quantized rows against the reference, which decodes them first.

use kvlar::{Codec, Dtype, Format, Schedule};
use kvlar_reference::testing::Rng;
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun, SegmentCase, check, compare};
use kvlar_tests::pages::{Layout, RowFormat};
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    pairs,
    head_dims,
    gqa_ratios,
    query_rows,
    every_length,
    lengths_around_tile_and_page_edges,
    layouts,
    rotated_keys,
    rotated_keys_in_little,
    fp8_scales,
    fp8_nan,
    int8_queries,
    exact_rows_beside,
    ragged_heads,
    positions_and_windows,
    softcap_and_sinks,
    value_dim_differs,
    constant_rows,
    broken_rows_reach_only_those_who_see_them,
    large_logits,
    many_random_cases,
    equal_bits_from_run_to_run,
    own_schedule_ignores_the_batch,
);

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];
const QUANTIZED: [Codec; 4] = [Codec::Int8, Codec::Int4, Codec::Int2, Codec::Fp8];

fn all(lab: &Lab, cases: impl IntoIterator<Item = AttendCase>) {
    for (i, case) in cases.into_iter().enumerate() {
        let case = AttendCase { seed: case.seed + 1000 * i as u64, ..case };
        check(lab, &case).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Every segment's keys and values.
fn stored(mut case: AttendCase, keys: impl Into<Format> + Copy, values: impl Into<Format> + Copy) -> AttendCase {
    case.segments.iter_mut().for_each(|s| s.set_formats(keys, values));
    case
}

fn rotated(codec: Codec) -> Format {
    Format { hadamard: true, ..codec.into() }
}

fn pairs(lab: &Lab) {
    for (i, keys) in QUANTIZED.into_iter().enumerate() {
        all(
            lab,
            QUANTIZED.into_iter().enumerate().map(|(j, values)| {
                let d = [64, 128, 256][(i + j) % 3];
                stored(AttendCase::new(DTYPES[j % 2], (4, 2), d, &[101, 33]), keys, values)
            }),
        );
    }
}

fn head_dims(lab: &Lab) {
    let dims = [8, 16, 64, 72, 80, 96, 128, 136, 192, 256];
    for codec in QUANTIZED {
        all(lab, dims.into_iter().map(|d| stored(AttendCase::new(Dtype::Bf16, (4, 2), d, &[70, 5]), codec, codec)));
    }
}

fn gqa_ratios(lab: &Lab) {
    let ratios = [(1, 1), (3, 1), (5, 5), (6, 2), (8, 1), (12, 1), (16, 1), (24, 1), (33, 3)];
    all(
        lab,
        ratios.into_iter().map(|heads| stored(AttendCase::new(Dtype::Bf16, heads, 64, &[21, 40]), Codec::Int4, Codec::Int4)),
    );
    all(lab, [(10, 1), (16, 2)].map(|heads| stored(AttendCase::new(Dtype::F16, heads, 128, &[90]), Codec::Int8, Codec::Int2)));
}

fn query_rows(lab: &Lab) {
    let case = |rows, heads, codec: Codec| {
        stored(AttendCase::new(Dtype::F16, heads, 64, &[40, 9]), codec, codec).with(|c| c.query_rows = rows)
    };
    all(lab, [(2, (8, 2)), (3, (4, 4)), (8, (4, 1)), (9, (2, 1))].map(|(s, h)| case(s, h, Codec::Int4)));
    all(lab, [case(5, (6, 2), Codec::Fp8), case(17, (2, 2), Codec::Int2)]);
}

/// Of a tile of 64 rows and of pages, every residue.
fn every_length(lab: &Lab) {
    let lengths: Vec<usize> = (0..=130).collect();
    for codec in [Codec::Fp8, Codec::Int8, Codec::Int4, Codec::Int2] {
        all(lab, [stored(AttendCase::new(Dtype::Bf16, (2, 1), 64, &lengths), codec, codec)]);
    }
}

fn lengths_around_tile_and_page_edges(lab: &Lab) {
    let lengths = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129];
    for (d, codec) in [(64, Codec::Int2), (128, Codec::Int4), (128, Codec::Fp8), (256, Codec::Int8)] {
        all(lab, [stored(AttendCase::new(Dtype::Bf16, (2, 1), d, &lengths), codec, codec)]);
    }
}

fn layouts(lab: &Lab) {
    let layouts = [Layout::Contiguous, Layout::Hnd(32), Layout::Hnd(256), Layout::PerHead(16), Layout::PerHead(128)];
    for codec in [Codec::Int4, Codec::Int2] {
        let case =
            |l| stored(AttendCase::new(Dtype::Bf16, (6, 3), 64, &[70, 33, 128]), codec, codec).with(|c| c.segments[0].layout = l);
        all(lab, layouts.map(case));
    }
    // fp8 rows have no scales of their own: any layout of an engine holds them.
    let fp8 = |l| {
        stored(AttendCase::new(Dtype::F16, (4, 2), 128, &[70, 33]), Codec::Fp8, Codec::Fp8).with(|c| c.segments[0].layout = l)
    };
    all(lab, [Layout::Nhd(16), Layout::Nhd(64)].map(fp8));
}

fn rotated_keys(lab: &Lab) {
    for codec in QUANTIZED {
        all(
            lab,
            [(64, (4, 2)), (128, (12, 1)), (256, (2, 2)), (16, (2, 1))]
                .map(|(d, heads)| stored(AttendCase::new(Dtype::Bf16, heads, d, &[50, 17]), rotated(codec), codec)),
        );
    }
}

/// The race detector's case.
fn rotated_keys_in_little(lab: &Lab) {
    let case = AttendCase::new(Dtype::Bf16, (4, 2), 64, &[50]);
    all(lab, [stored(case, rotated(Codec::Int4), Codec::Int8)]);
}

fn fp8_scales(lab: &Lab) {
    let case = |keys: [f32; 2], values: [f32; 2]| {
        stored(AttendCase::new(Dtype::Bf16, (4, 2), 64, &[50, 17]), Codec::Fp8, Codec::Fp8).with(|c| {
            c.segments[0].keys.scales = keys.to_vec();
            c.segments[0].values.scales = values.to_vec();
        })
    };
    all(lab, [case([0.01, 0.3], [0.02, 0.005]), case([1.0, 0.1], [0.5, 1.0])]);
    let mixed = stored(AttendCase::new(Dtype::F16, (2, 2), 128, &[40]), Codec::Fp8, Codec::Int4);
    all(lab, [mixed.with(|c| c.segments[0].keys.scales = vec![0.02, 0.7])]);
}

/// A key with a NaN makes every score of its row NaN; a value with one, that dimension.
fn fp8_nan(lab: &Lab) {
    let case = stored(AttendCase::new(Dtype::Bf16, (4, 2), 64, &[50, 70]), Codec::Fp8, Codec::Fp8);
    for (keys, values) in [(true, false), (false, true)] {
        all(lab, [case.clone().with(|c| (c.nan_key, c.nan_value) = (keys, values))]);
    }
    all(lab, [stored(case, Codec::Int4, Codec::Fp8).with(|c| (c.nan_value, c.head_dim, c.value_dim) = (true, 128, 128))]);
}

fn int8_queries(lab: &Lab) {
    let case = |keys: Format, rows| {
        stored(AttendCase::new(Dtype::Bf16, (6, 2), 64, &[60, 9]), keys, Codec::Int4).with(|c| {
            c.int8_queries = true;
            c.query_rows = rows;
        })
    };
    all(
        lab,
        [case(Codec::Int8.into(), 1), case(Codec::Int4.into(), 3), case(rotated(Codec::Int4), 2), case(Codec::Int2.into(), 1)],
    );
    all(lab, [case(Codec::Fp8.into(), 2).with(|c| c.q_size = 20.0)]);
}

/// Sinks, a quantized body, a recent window.
fn tiers(dtype: Dtype, d: usize, keys: impl Into<Format> + Copy, values: Codec) -> AttendCase {
    let dense = Option::<Codec>::from(dtype).unwrap();
    AttendCase::new(dtype, (8, 2), d, &[0, 0, 0]).with(|c| {
        c.segments = vec![
            SegmentCase::new(dense, Layout::Contiguous, &[4, 4, 2]),
            SegmentCase::new(dense, Layout::Hnd(32), &[90, 33, 0]),
            SegmentCase::new(dense, Layout::Nhd(16), &[40, 1, 0]),
        ];
        c.segments[1].set_formats(keys, values);
    })
}

/// Two bodies of one format and exact rows, in turn, so many that a warp meets all of them: sums of codes and of values
/// take turns.
fn long_tiers(codec: Codec) -> AttendCase {
    AttendCase::new(Dtype::Bf16, (4, 2), 64, &[0, 0, 0]).with(|c| {
        c.segments = [[200, 130, 170], [500, 520, 480], [150, 200, 180], [220, 200, 260]]
            .into_iter()
            .enumerate()
            .map(|(i, lengths)| {
                let mut s = SegmentCase::new(Codec::Bf16, Layout::Hnd(32), &lengths);
                if i % 2 == 1 {
                    s.set_formats(codec, codec);
                }
                SegmentCase { capacity: 520, ..s }
            })
            .collect();
    })
}

fn exact_rows_beside(lab: &Lab) {
    for (i, codec) in QUANTIZED.into_iter().enumerate() {
        for dtype in DTYPES {
            all(lab, [tiers(dtype, [64, 128][i % 2], codec, codec), tiers(dtype, 128, rotated(codec), codec)]);
        }
    }
    all(lab, [tiers(Dtype::Bf16, 256, Codec::Int4, Codec::Int2), tiers(Dtype::F16, 80, Codec::Int8, Codec::Fp8)]);
    all(lab, QUANTIZED.map(long_tiers));
}

fn ragged_heads(lab: &Lab) {
    let case = stored(AttendCase::new(Dtype::Bf16, (6, 3), 128, &[0, 0]), Codec::Int4, Codec::Int2).with(|c| {
        let s = &mut c.segments[0];
        (s.layout, s.capacity) = (Layout::PerHead(16), 130);
        s.lengths = vec![130, 0, 17, 64, 1, 99];
    });
    all(lab, [case]);
}

fn positions_and_windows(lab: &Lab) {
    let case = |codec| stored(AttendCase::new(Dtype::Bf16, (4, 2), 64, &[150, 60]), codec, codec);
    for codec in [Codec::Int4, Codec::Int8] {
        all(
            lab,
            [
                case(codec).with(|c| c.window = 40),
                case(codec).with(|c| (c.segments[0].positions, c.window) = (true, 70)),
                case(codec).with(|c| (c.q_positions, c.query_rows) = (true, 4)),
                case(codec).with(|c| (c.q_positions, c.segments[0].positions, c.window) = (true, true, 33)),
            ],
        );
    }
}

fn softcap_and_sinks(lab: &Lab) {
    let case = |codec| stored(AttendCase::new(Dtype::F16, (8, 2), 64, &[50, 0]), codec, codec);
    for codec in [Codec::Int4, Codec::Fp8] {
        all(lab, [case(codec).with(|c| c.sinks = true), case(codec).with(|c| (c.softcap, c.q_size) = (5.0, 4.0))]);
    }
}

fn value_dim_differs(lab: &Lab) {
    for (d, dv) in [(64, 128), (128, 64), (192, 96), (40, 256)] {
        let case = AttendCase::new(Dtype::Bf16, (4, 2), d, &[60, 33]).with(|c| c.value_dim = dv);
        all(lab, [stored(case.clone(), Codec::Int4, Codec::Int4), stored(case, Codec::Int2, Codec::Int8)]);
    }
}

/// Groups of one value have scale 0.
fn constant_rows(lab: &Lab) {
    for codec in [Codec::Int8, Codec::Int4, Codec::Int2] {
        all(lab, [stored(AttendCase::new(Dtype::Bf16, (4, 2), 64, &[50]), codec, codec).with(|c| c.constant = true)]);
    }
}

fn broken_rows_reach_only_those_who_see_them(lab: &Lab) {
    for codec in [Codec::Int8, Codec::Int4, Codec::Int2] {
        let case = |heads| {
            stored(AttendCase::new(Dtype::Bf16, heads, 64, &[40, 17]), codec, codec).with(|c| {
                c.broken = true;
                c.query_rows = 3;
            })
        };
        all(lab, [case((2, 2)), case((3, 1)), case((8, 2)).with(|c| c.window = 9)]);
    }
}

fn large_logits(lab: &Lab) {
    for codec in [Codec::Int4, Codec::Fp8] {
        all(lab, [stored(AttendCase::new(Dtype::Bf16, (4, 2), 64, &[90]), codec, codec).with(|c| c.q_size = 30.0)]);
    }
}

fn random_case(rng: &mut Rng) -> AttendCase {
    let pick = |rng: &mut Rng, from: &[usize]| from[rng.below(from.len())];
    let (kv_heads, ratio) = (1 + rng.below(3), pick(rng, &[1, 2, 3, 4, 7, 8, 11]));
    let (d, dv) = (pick(rng, &[32, 64, 64, 80, 128, 128, 256]), pick(rng, &[0, 0, 0, 64, 96]));
    let lengths: Vec<usize> = (0..1 + rng.below(3)).map(|_| rng.below(200)).collect();
    let dtype = DTYPES[rng.below(2)];
    let mut c = AttendCase::new(dtype, (kv_heads * ratio, kv_heads), d, &lengths);
    c.value_dim = if dv == 0 { d } else { dv };
    let mut keys = Format::from(QUANTIZED[rng.below(4)]);
    keys.hadamard = d.is_power_of_two() && rng.below(3) == 0;
    c.segments[0].set_formats(keys, QUANTIZED[rng.below(4)]);
    c.segments[0].layout = [Layout::Hnd(16), Layout::Hnd(64), Layout::Contiguous, Layout::PerHead(32)][rng.below(4)];
    c.segments[0].positions = rng.below(4) == 0;
    if rng.below(2) == 0 {
        let dense = Option::<Codec>::from(dtype).unwrap();
        let exact = |rng: &mut Rng, n: usize| {
            let lengths: Vec<usize> = lengths.iter().map(|_| rng.below(n)).collect();
            SegmentCase::new(dense, Layout::Hnd(16), &lengths)
        };
        let (sinks, recent) = (exact(rng, 9), exact(rng, 40));
        c.segments.insert(0, sinks);
        c.segments.push(recent);
    } else {
        c.int8_queries = rng.below(4) == 0;
    }
    c.query_rows = 1 + rng.below(3);
    c.window = if rng.below(4) == 0 { 1 + rng.below(100) as u32 } else { 0 };
    c.sinks = rng.below(3) == 0;
    c.schedule = if rng.below(3) == 0 { Schedule::Own } else { Schedule::Balanced };
    c.seed = rng.below(1 << 30) as u64;
    c
}

fn many_random_cases(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(16);
    let mut rng = Rng::new(77);
    all(lab, (0..count).map(|_| random_case(&mut rng)));
}

fn equal_bits_from_run_to_run(lab: &Lab) {
    let case = tiers(Dtype::Bf16, 64, rotated(Codec::Int4), Codec::Int4);
    let data = AttendData::new(&case);
    let mut run = AttendRun::new(lab, &data);
    run.enqueue();
    let first = run.result();
    for _ in 0..2 {
        run.poison();
        run.enqueue();
        assert_eq!(run.result(), first);
        assert!(run.counters().iter().all(|&c| c == 0));
    }
    compare(&data, &first).unwrap();
}

fn own_schedule_ignores_the_batch(lab: &Lab) {
    let case = |lengths: &[usize]| {
        stored(AttendCase::new(Dtype::Bf16, (4, 2), 64, lengths), Codec::Int4, Codec::Int4).with(|c| {
            c.schedule = Schedule::Own;
            c.segments[0].capacity = 2500;
            c.segments[0].layout = Layout::Contiguous;
        })
    };
    let run = |data: &AttendData| {
        let mut run = AttendRun::new(lab, data);
        run.enqueue();
        compare(data, &run.result()).unwrap();
        run.result()
    };
    let batch = AttendData::new(&case(&[2400, 12, 333]));
    let mut alone = AttendData::new(&case(&[2400]));
    alone.take_first_sequence(&batch);
    let (batch, alone) = (run(&batch), run(&alone));
    assert_eq!((&batch.out[..alone.out.len()], &batch.lse[..alone.lse.len()]), (&alone.out[..], &alone.lse[..]));
}

/// Formats that the kernels have none for are refused before anything is enqueued.
#[test]
fn combinations_without_a_kernel_are_unsupported() {
    let lab = Lab::reference();
    let refused = |change: &dyn Fn(&mut AttendCase)| {
        let mut case = tiers(Dtype::Bf16, 128, Codec::Int4, Codec::Int4);
        change(&mut case);
        let e = case.shape().plan(&lab.device).expect_err("a bad shape");
        assert!(matches!(e, kvlar::Error::Unsupported { op: "attend", .. }), "{e:?}");
        e
    };
    let grouped = Format { group: Some(32), ..Codec::Int4.into() };
    kvlar_tests::says(&refused(&|c| c.segments[1].set_formats(grouped, Codec::Int4)), &["keys", "every 32 values"]);
    kvlar_tests::says(&refused(&|c| c.segments[1].set_formats(Codec::Int4, grouped)), &["values", "every 32 values"]);
    kvlar_tests::says(&refused(&|c| c.segments[1].set_formats(Codec::Int4, rotated(Codec::Int4))), &["rotated values"]);
    kvlar_tests::says(&refused(&|c| c.segments[1].set_formats(Codec::Int4, Codec::Bf16)), &["Int4 keys", "Bf16 values"]);
    kvlar_tests::says(&refused(&|c| c.segments[0].set_formats(Codec::Int8, Codec::Int8)), &["two quantized formats"]);
    kvlar_tests::says(&refused(&|c| c.segments[0].set_formats(Codec::F16, Codec::F16)), &["F16 rows", "bf16 q"]);
    kvlar_tests::says(&refused(&|c| c.int8_queries = true), &["int8 queries", "rows of the type of q"]);
    let e = stored(AttendCase::new(Dtype::Bf16, (2, 1), 96, &[9]), rotated(Codec::Int4), Codec::Int4).shape();
    kvlar_tests::says(&e.plan(&lab.device).unwrap_err(), &["keys", "96", "power of two"]);
    let mut case = AttendCase::new(Dtype::Bf16, (2, 1), 64, &[9]);
    case.segments[0].keys = RowFormat { scales: vec![1.0], ..Codec::Bf16.into() };
    let mut run = AttendRun::new(&lab, &AttendData::new(&case));
    let e = run.with_args(|plan, args, work, workspace| plan.schedule(&lab.stream, args, work, workspace).expect_err("scales"));
    kvlar_tests::says(&e, &["key scales", "Bf16"]);
}
