//! Low-rank attention against the reference.

use kvlar::{Dtype, Latents, Schedule};
use kvlar_reference::testing::Rng;
use kvlar_reference::{Rope, RopeLayout, RopeScaling, Yarn};
use kvlar_tests::lowrank::{LowrankCase, LowrankData, LowrankRun, Positions, SegmentCase, ValueCase, check, compare};
use kvlar_tests::pages::Layout;
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    ranks,
    groups_and_gqa,
    head_dims,
    query_rows,
    lengths_around_tile_and_page_edges,
    layouts,
    int8_latents,
    int8_bases,
    int4_latents_on_the_reference_alone,
    dense_values,
    exact_rows_beside_latents,
    partitions_that_cut_across,
    ragged_heads,
    far_positions,
    rope_layouts_and_scalings,
    windows_softcap_sinks,
    no_visible_rows,
    bases_a_sequence,
    many_random_cases,
    equal_bits_from_run_to_run,
    own_schedule_ignores_the_batch,
    many_splits,
    nothing_of_an_earlier_launch_is_merged,
    broken_rows_reach_only_those_who_see_them,
);

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F16];

fn all(lab: &Lab, cases: impl IntoIterator<Item = LowrankCase>) {
    for (i, case) in cases.into_iter().enumerate() {
        let case = LowrankCase { seed: case.seed + 1000 * i as u64, ..case };
        check(lab, &case).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn ranks(lab: &Lab) {
    let case = |t, k, v| LowrankCase::new(t, (4, 2), 2, 64, (k, v), &[37, 5]);
    let ranks = [(32, 32), (64, 32), (96, 64), (128, 96), (160, 128), (256, 160), (32, 256), (512, 288), (64, 512)];
    all(lab, ranks.into_iter().map(|(k, v)| case(Dtype::Bf16, k, v)));
    all(lab, [case(Dtype::F16, 32, 96), case(Dtype::F16, 192, 32)]);
}

fn groups_and_gqa(lab: &Lab) {
    let of = |heads: (usize, usize), size| LowrankCase::new(Dtype::Bf16, heads, size, 64, (64, 64), &[41]);
    let cases = [
        ((1, 1), 1),
        ((2, 2), 2),
        ((4, 4), 4),
        ((8, 8), 8),
        ((16, 4), 2),
        ((16, 4), 4),
        ((6, 2), 2),
        ((10, 2), 2),
        ((14, 2), 2),
        ((8, 1), 1),
        ((24, 3), 3),
        ((20, 1), 1),
        ((24, 12), 12),
    ];
    all(lab, cases.map(|(heads, size)| of(heads, size)));
}

fn head_dims(lab: &Lab) {
    let dims = [8, 32, 64, 72, 80, 96, 128, 192, 256];
    let rope = |d: usize| Rope::new(10_000.0, d, RopeLayout::Half, RopeScaling::None);
    let case = |t, d| LowrankCase::new(t, (4, 2), 2, d, (32, 32), &[33]).with(|c| c.rope = rope(d));
    all(lab, dims.into_iter().flat_map(|d| DTYPES.map(|t| case(t, d))));
    all(lab, [(64, 128), (128, 64), (96, 256)].map(|(d, dv)| case(Dtype::Bf16, d).with(|c| c.value_dim = dv)));
}

fn query_rows(lab: &Lab) {
    let case = |s, heads, size| LowrankCase::new(Dtype::F16, heads, size, 64, (32, 64), &[40, 9]).with(|c| c.query_rows = s);
    all(lab, [(2, (4, 2), 2), (3, (2, 2), 2), (8, (2, 1), 1), (8, (4, 2), 2), (5, (6, 2), 1)].map(|(s, h, g)| case(s, h, g)));
}

fn lengths_around_tile_and_page_edges(lab: &Lab) {
    let lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129];
    all(lab, [LowrankCase::new(Dtype::Bf16, (2, 1), 1, 64, (32, 32), &lengths)]);
}

fn layouts(lab: &Lab) {
    let layouts = [
        Layout::Contiguous,
        Layout::Nhd(16),
        Layout::Nhd(64),
        Layout::Hnd(32),
        Layout::Hnd(256),
        Layout::PerHead(16),
        Layout::PerHead(64),
    ];
    let case = |l| LowrankCase::new(Dtype::Bf16, (8, 4), 2, 64, (64, 32), &[70, 33]).with(|c| c.segments[0].layout = l);
    all(lab, layouts.map(case));
}

fn int8_latents(lab: &Lab) {
    let case = |t, k, v| LowrankCase::new(t, (8, 4), 2, 64, (k, v), &[45, 64]).int8(Latents::Int8);
    all(lab, [(32, 32), (64, 96), (96, 64), (128, 128), (160, 256)].into_iter().flat_map(|(k, v)| DTYPES.map(|t| case(t, k, v))));
    // 16-bit values beside int8 keys, a mean, and layouts with room for scales.
    let mixed = case(Dtype::Bf16, 64, 64).with(|c| {
        c.mean = true;
        c.segments[0].layout = Layout::Contiguous;
        c.values = ValueCase::Latent { group: c.group_k.clone(), rank: 64, int8: false };
    });
    all(lab, [mixed.clone(), mixed.with(|c| c.segments[0].layout = Layout::PerHead(32))]);
}

fn int8_bases(lab: &Lab) {
    let case = |t, k, v| LowrankCase::new(t, (8, 4), 4, 64, (k, v), &[45, 64]).int8(Latents::Int8Basis);
    all(lab, [(32, 32), (64, 96), (128, 128), (160, 64), (256, 32)].into_iter().flat_map(|(k, v)| DTYPES.map(|t| case(t, k, v))));
    all(lab, [case(Dtype::Bf16, 64, 64).with(|c| c.mean = true), case(Dtype::F16, 64, 64).with(|c| c.head_dim = 80)]);
}

fn int4_latents_on_the_reference_alone(lab: &Lab) {
    let case = LowrankCase::new(Dtype::Bf16, (8, 4), 2, 64, (64, 96), &[45, 64]).int8(Latents::Int4);
    if !lab.runs_kernels() {
        return all(lab, [case]);
    }
    let ValueCase::Latent { group, .. } = &case.values else { return };
    let sets = kvlar::HeadSets::new(&lab.device, &lab.stream, &case.group_k, Some(group)).unwrap();
    assert!(matches!(case.shape(&sets).plan(&lab.device), Err(kvlar::Error::Unsupported { .. })));
}

fn dense_values(lab: &Lab) {
    let case = |heads, size, d: usize, dv| {
        LowrankCase::new(Dtype::Bf16, heads, size, d, (64, 32), &[50, 17]).with(|c| {
            c.values = ValueCase::Dense;
            c.value_dim = dv;
        })
    };
    all(lab, [case((4, 2), 2, 64, 64), case((8, 8), 8, 64, 96), case((16, 4), 4, 128, 128), case((4, 4), 2, 64, 256)]);
    all(lab, [case((4, 2), 2, 64, 80).with(|c| c.latents = Latents::Int8)]);
}

/// Sinks before, recent rows behind the latents.
fn exact(lengths: Vec<usize>) -> SegmentCase {
    SegmentCase {
        latent: false,
        layout: Layout::Hnd(16),
        capacity: lengths.iter().copied().max().unwrap_or(0).max(1),
        lengths,
        positions: Positions::Index,
    }
}

fn with_exact_rows(c: &mut LowrankCase, sinks: usize, recent: usize) {
    c.segments.insert(0, exact(vec![sinks; c.seqs]));
    c.segments.push(exact((0..c.seqs).map(|b| recent.saturating_sub(b)).collect()));
}

fn exact_rows_beside_latents(lab: &Lab) {
    let case = |heads, size, d| {
        LowrankCase::new(Dtype::Bf16, heads, size, d, (32, 64), &[60, 0, 33]).with(|c| with_exact_rows(c, 4, 21))
    };
    all(lab, [case((4, 2), 2, 64), case((16, 4), 4, 64), case((8, 8), 4, 128), case((4, 2), 1, 80)]);
    all(lab, [case((4, 2), 2, 64).int8(Latents::Int8), case((4, 2), 2, 64).with(|c| c.values = ValueCase::Dense)]);
    all(
        lab,
        [
            case((4, 2), 2, 64).with(|c| {
                c.query_rows = 3;
                c.window = 30;
            }),
            case((4, 2), 2, 64).with(|c| {
                c.segments.iter_mut().zip([3, 200, 900]).for_each(|(s, first)| s.positions = Positions::Gaps(first));
                c.window = 950;
            }),
        ],
    );
}

fn partitions_that_cut_across(lab: &Lab) {
    let case = LowrankCase::new(Dtype::Bf16, (8, 4), 2, 64, (64, 64), &[50]);
    let values = |group: [i32; 4]| ValueCase::Latent { group: group.to_vec(), rank: 64, int8: false };
    all(
        lab,
        [
            case.clone().with(|c| c.group_k = vec![0, 1, 0, 1]),
            case.clone().with(|c| c.values = values([0, 0, 0, 0])),
            case.clone().with(|c| {
                c.group_k = vec![1, 0, 0, 1];
                c.values = values([0, 1, 2, 3]);
            }),
            case.with(|c| {
                c.group_k = vec![0, 0, 1, 0];
                c.values = values([0, 0, 1, 1]);
            }),
        ],
    );
}

fn ragged_heads(lab: &Lab) {
    let case = LowrankCase::new(Dtype::Bf16, (8, 4), 2, 64, (32, 32), &[70, 70]).with(|c| {
        c.segments[0].lengths = vec![70, 33, 1, 0, 16, 70, 40, 65];
    });
    all(lab, [case.clone(), case.with(|c| c.segments[0].layout = Layout::PerHead(16))]);
}

fn far_positions(lab: &Lab) {
    let case = |p| {
        LowrankCase::new(Dtype::F16, (4, 2), 2, 128, (64, 64), &[70, 40]).with(|c| {
            c.segments[0].positions = p;
            c.rope = Rope::new(500_000.0, 128, RopeLayout::Half, RopeScaling::None);
        })
    };
    all(
        lab,
        [
            case(Positions::From(1_000_000)),
            case(Positions::Gaps(1_000_000)),
            case(Positions::Gaps(7)),
            case(Positions::From(12_345)),
        ],
    );
    all(
        lab,
        [case(Positions::Gaps(999_000)).with(|c| {
            c.latents = Latents::Int8;
            c.window = 60;
        })],
    );
}

fn rope_layouts_and_scalings(lab: &Lab) {
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max: 8192.0 };
    let yarn = RopeScaling::Yarn(Yarn::new(4.0, 4096.0));
    let ropes = [
        Rope::none(),
        Rope::new(1e4, 64, RopeLayout::Interleaved, RopeScaling::None),
        Rope::new(5e5, 64, RopeLayout::Half, llama3),
        Rope::new(1e6, 64, RopeLayout::Half, yarn),
        Rope::new(1e4, 32, RopeLayout::Half, RopeScaling::None),
        Rope::new(1e4, 16, RopeLayout::Interleaved, yarn),
        Rope::new(1e4, 20, RopeLayout::Half, RopeScaling::Linear(2.0)),
    ];
    let case = |rope: &Rope| LowrankCase::new(Dtype::F16, (4, 2), 2, 64, (32, 32), &[50]).with(|c| c.rope = rope.clone());
    all(lab, ropes.iter().map(case));
    all(lab, ropes[1..].iter().map(|r| case(r).with(|c| c.segments[0].positions = Positions::Gaps(5))));
    all(lab, ropes[3..].iter().map(|r| case(r).int8(Latents::Int8Basis)));
}

fn windows_softcap_sinks(lab: &Lab) {
    let case = LowrankCase::new(Dtype::Bf16, (8, 4), 4, 64, (64, 64), &[200, 31]);
    all(
        lab,
        [
            case.clone().with(|c| c.window = 70),
            case.clone().with(|c| {
                c.window = 1;
                c.query_rows = 2;
            }),
            case.clone().with(|c| {
                c.softcap = 3.0;
                c.q_size = 4.0;
            }),
            case.clone().with(|c| c.sinks = true),
            case.clone().with(|c| {
                c.q_positions = Some(40);
                c.query_rows = 3;
            }),
            case.clone().with(|c| {
                c.q_size = 30.0;
                c.sinks = true;
            }),
            case.with(|c| c.out_dtype = Dtype::Bf16),
        ],
    );
}

fn no_visible_rows(lab: &Lab) {
    let case = LowrankCase::new(Dtype::Bf16, (4, 2), 2, 64, (32, 32), &[0, 5, 0]);
    all(lab, [case.clone(), case.clone().with(|c| c.sinks = true), case.with(|c| c.q_positions = Some(1000))]);
}

fn bases_a_sequence(lab: &Lab) {
    let case = LowrankCase::new(Dtype::Bf16, (4, 2), 2, 64, (32, 64), &[40, 33, 17]).with(|c| c.per_seq_bases = true);
    all(lab, [case.clone(), case.clone().int8(Latents::Int8), case.int8(Latents::Int8Basis)]);
}

fn random_case(rng: &mut Rng) -> LowrankCase {
    let pick = |rng: &mut Rng, from: &[usize]| from[rng.below(from.len())];
    let (kv_heads, ratio) = (pick(rng, &[1, 2, 3, 4, 6]), pick(rng, &[1, 1, 2, 3, 4, 7]));
    let (d, seqs) = (pick(rng, &[32, 64, 64, 80, 128]), 1 + rng.below(3));
    let size = 1 + rng.below(kv_heads);
    let ranks = (pick(rng, &[32, 64, 96, 128, 160]), pick(rng, &[32, 64, 96, 160]));
    let lengths: Vec<usize> = (0..seqs).map(|_| rng.below(150)).collect();
    let dtype = DTYPES[rng.below(2)];
    let mut c = LowrankCase::new(dtype, (kv_heads * ratio, kv_heads), size, d, ranks, &lengths);
    for g in &mut c.group_k {
        *g = rng.below(kv_heads.div_ceil(size)) as i32;
    }
    let used: Vec<i32> = c.group_k.clone();
    let rename = |g: i32| used.iter().filter(|&&x| x < g).collect::<std::collections::BTreeSet<_>>().len() as i32;
    c.group_k = used.iter().map(|&g| rename(g)).collect();
    c.values = match rng.below(4) {
        0 => ValueCase::Dense,
        1 => ValueCase::Latent { group: vec![0; kv_heads], rank: ranks.1, int8: false },
        _ => ValueCase::Latent { group: c.group_k.clone(), rank: ranks.1, int8: false },
    };
    let latents = [Latents::Dtype, Latents::Dtype, Latents::Int8, Latents::Int8Basis][rng.below(4)];
    if latents != Latents::Dtype {
        c = c.int8(latents);
    }
    c.mean = rng.below(3) == 0;
    c.query_rows = 1 + rng.below(3);
    c.segments[0].layout = [Layout::Hnd(16), Layout::Hnd(64), Layout::Contiguous][rng.below(3)];
    c.segments[0].positions = [Positions::Index, Positions::Index, Positions::From(40), Positions::Gaps(3)][rng.below(4)];
    if c.segments[0].positions == Positions::Index && rng.below(2) == 0 {
        with_exact_rows(&mut c, rng.below(20), rng.below(40));
    }
    c.window = if rng.below(4) == 0 { 1 + rng.below(100) as u32 } else { 0 };
    c.sinks = rng.below(3) == 0;
    c.schedule = if rng.below(3) == 0 { Schedule::Own } else { Schedule::Balanced };
    c.seed = rng.below(1 << 30) as u64;
    c
}

fn many_random_cases(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    let mut rng = Rng::new(33);
    all(lab, (0..count).map(|_| random_case(&mut rng)));
}

fn equal_bits_from_run_to_run(lab: &Lab) {
    let case = LowrankCase::new(Dtype::Bf16, (8, 4), 2, 64, (64, 64), &[300, 40]).with(|c| with_exact_rows(c, 4, 20));
    let data = LowrankData::new(&case);
    let mut run = LowrankRun::new(lab, &data);
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

/// More than 32, whose factors are at hand at a time.
fn many_splits(lab: &Lab) {
    let case = |exact_rows: usize| {
        LowrankCase::new(Dtype::Bf16, (8, 8), 8, 32, (32, 32), &[40]).with(|c| {
            c.segments.insert(0, exact(vec![exact_rows]));
            c.schedule = Schedule::Own;
        })
    };
    all(lab, [480, 992, 1024, 1100].map(case));
    // A window hides the rows of the first ones.
    let hidden = case(1100).with(|c| (c.segments[1].positions, c.window) = (Positions::From(5000), 60));
    all(lab, [hidden]);
    // All of them of latent rows, of two slices.
    all(lab, [LowrankCase::new(Dtype::F16, (1, 1), 1, 16, (32, 288), &[9_100]).with(|c| c.schedule = Schedule::Own)]);
}

/// What a launch leaves in the workspace, infinities among it, is no part of the next one's, which has no latent rows.
fn nothing_of_an_earlier_launch_is_merged(lab: &Lab) {
    let broken = LowrankCase::new(Dtype::Bf16, (4, 2), 2, 64, (32, 32), &[90, 64]).with(|c| {
        c.segments.push(exact(vec![20, 3]));
        c.broken = true;
    });
    let data = LowrankData::new(&broken);
    let [mut used, mut fresh] = [(); 2].map(|()| LowrankRun::new(lab, &data));
    used.enqueue();
    for run in [&mut used, &mut fresh] {
        run.set_lengths(0, &[0; 4]);
        run.enqueue();
    }
    assert_eq!(used.result(), fresh.result());
}

fn own_schedule_ignores_the_batch(lab: &Lab) {
    let case = |lengths: &[usize]| {
        LowrankCase::new(Dtype::Bf16, (4, 2), 2, 64, (32, 32), lengths).with(|c| {
            c.schedule = Schedule::Own;
            c.segments[0].capacity = 700;
            c.segments[0].layout = Layout::Contiguous;
        })
    };
    let run = |data: &LowrankData| {
        let mut run = LowrankRun::new(lab, data);
        run.enqueue();
        compare(data, &run.result()).unwrap();
        assert!(run.counters().iter().all(|&c| c == 0));
        run.result()
    };
    let batch = LowrankData::new(&case(&[650, 12, 333]));
    let mut alone = LowrankData::new(&case(&[650]));
    alone.take_first_sequence(&batch);
    let (batch, alone) = (run(&batch), run(&alone));
    assert_eq!((&batch.out[..alone.out.len()], &batch.lse[..alone.lse.len()]), (&alone.out[..], &alone.lse[..]));
}

/// A row whose values decode to NaN is NaN for the queries that see it, and for no other.
fn broken_rows_reach_only_those_who_see_them(lab: &Lab) {
    let case = |latents| {
        LowrankCase::new(Dtype::Bf16, (4, 2), 2, 64, (32, 64), &[40, 17]).int8(latents).with(|c| {
            c.broken = true;
            c.query_rows = 3;
        })
    };
    all(lab, [case(Latents::Int8), case(Latents::Int8Basis)]);
}

/// A work list of layers whose sets have other sizes is refused: its tiles would be others.
#[test]
fn work_lists_are_shared_where_sets_have_the_same_sizes() {
    let lab = Lab::reference();
    let plan = |groups: [i32; 4], rank: usize| {
        let case = LowrankCase::new(Dtype::Bf16, (8, 4), 2, 64, (rank, 32), &[50]);
        let sets = kvlar::HeadSets::new(&lab.device, &lab.stream, &groups, Some(&groups)).unwrap();
        case.shape(&sets).plan(&lab.device).unwrap()
    };
    let here = plan([0, 0, 0, 1], 32);
    assert!(here.shares_work_list(&plan([0, 0, 0, 1], 96)));
    assert!(here.shares_work_list(&plan([0, 1, 0, 0], 32)));
    assert!(!here.shares_work_list(&plan([0, 1, 1, 1], 32)));
    assert!(!here.shares_work_list(&plan([0, 0, 1, 1], 32)));
}
