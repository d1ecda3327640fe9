//! Scores by attention against the reference: windows, columns, and what repeats a chunk.

use kvlar::{Dtype, Pooling, ScoreReduction, ScoreShape, ScoredRows};
use kvlar_reference::testing::Rng;
use kvlar_tests::pages::Layout;
use kvlar_tests::score::{ScoreCase, ScoreData, ScoreRun, agrees, check, run};
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    head_dims_and_types,
    windows,
    ratios_of_heads,
    lengths_around_the_window_and_tiles,
    layouts,
    pools,
    pools_across_ctas,
    reductions,
    all_rows,
    running_sums,
    outputs_are_optional,
    a_given_lse,
    broken_keys,
    large_logits,
    more_queries_than_shared_memory_holds,
    columns,
    repeats,
    random_windows,
    a_small_window_column_and_chunk,
    by_hand,
    weights_sum_to_the_queries,
    equal_bits_from_run_to_run,
    a_sequence_ignores_the_batch,
    a_replay_follows_the_lengths,
    bad_lengths_pages_and_spans_are_reported,
    empty_shapes,
);

const POOLS: [Pooling; 3] = [Pooling::None, Pooling::Avg(5), Pooling::Max(7)];
const REDUCTIONS: [ScoreReduction; 3] = [ScoreReduction::Sum, ScoreReduction::Mean, ScoreReduction::Max];

fn all(lab: &Lab, cases: impl IntoIterator<Item = ScoreCase>) {
    for (i, case) in cases.into_iter().enumerate() {
        let case = ScoreCase { seed: case.seed + 1000 * i as u64, ..case };
        check(lab, &case).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn head_dims_and_types(lab: &Lab) {
    for (i, d) in [8, 64, 72, 128, 136, 256].into_iter().enumerate() {
        let case = |(j, dtype)| {
            ScoreCase::window((4, 2), 5, d, &[70, 33]).with(|c| {
                (c.shape.dtype, c.shape.pool, c.lse) = (dtype, POOLS[(i + j) % 3], j == 0);
            })
        };
        all(lab, [Dtype::Bf16, Dtype::F16].into_iter().enumerate().map(case));
    }
}

fn windows(lab: &Lab) {
    for (i, w) in [1, 2, 7, 8, 9, 16, 32, 33].into_iter().enumerate() {
        all(lab, [ScoreCase::window((4, 2), w, 64, &[100, 40]).with(|c| (c.lse, c.shape.pool) = (true, POOLS[i % 3]))]);
    }
    all(lab, [ScoreCase::window((3, 1), 64, 128, &[150])]);
}

fn ratios_of_heads(lab: &Lab) {
    let ratios = [(1, 1), (2, 2), (3, 1), (5, 1), (7, 1), (8, 2), (16, 1), (33, 3)];
    let case = |(i, heads): (usize, (usize, usize))| {
        ScoreCase::window(heads, 4, 64, &[40]).with(|c| (c.shape.over_heads, c.lse) = (REDUCTIONS[i % 3], true))
    };
    all(lab, ratios.into_iter().enumerate().map(case));
}

fn lengths_around_the_window_and_tiles(lab: &Lab) {
    let lengths = [0, 1, 4, 5, 6, 15, 16, 17, 127, 128, 129, 132, 133, 134];
    for (d, pool) in [(64, Pooling::Avg(7)), (256, Pooling::Max(3))] {
        all(
            lab,
            [true, false].map(|fill| {
                ScoreCase::window((2, 1), 5, d, &lengths).with(|c| {
                    (c.shape.fill, c.shape.pool, c.lse) = (fill, pool, true);
                })
            }),
        );
    }
    // A length for each kv head.
    all(
        lab,
        [ScoreCase::window((4, 2), 3, 64, &[90, 2, 7, 130]).with(|c| {
            (c.shape.seqs, c.layout) = (2, Layout::PerHead(16));
        })],
    );
}

fn layouts(lab: &Lab) {
    for layout in [Layout::Contiguous, Layout::Nhd(16), Layout::Hnd(64), Layout::PerHead(32)] {
        all(lab, [ScoreCase::window((6, 3), 4, 64, &[70, 128]).with(|c| (c.layout, c.strided, c.gap) = (layout, true, 3))]);
    }
}

fn pools(lab: &Lab) {
    let kernels = [1, 3, 7, 31, 63, 301];
    for n in [6, 40] {
        all(lab, kernels.map(|k| ScoreCase::window((2, 1), 2, 64, &[n]).with(|c| c.shape.pool = Pooling::Avg(k))));
        all(lab, kernels.map(|k| ScoreCase::window((2, 1), 2, 64, &[n]).with(|c| c.shape.pool = Pooling::Max(k))));
    }
}

/// Long enough for several CTAs a head: rows around a seam are worked out on both sides.
fn pools_across_ctas(lab: &Lab) {
    for (kernel, d) in [(1, 64), (3, 64), (63, 64), (255, 64), (65, 256), (7, 128)] {
        all(lab, [ScoreCase::window((2, 1), 8, d, &[700]).with(|c| c.shape.pool = Pooling::Max(kernel))]);
        all(lab, [ScoreCase::window((2, 1), 8, d, &[391]).with(|c| c.shape.pool = Pooling::Avg(kernel))]);
    }
}

fn reductions(lab: &Lab) {
    for over_rows in [ScoreReduction::Sum, ScoreReduction::Mean] {
        for over_heads in REDUCTIONS {
            all(
                lab,
                POOLS.map(|pool| {
                    ScoreCase::window((6, 2), 6, 64, &[50, 9]).with(|c| {
                        (c.shape.over_rows, c.shape.over_heads, c.shape.pool) = (over_rows, over_heads, pool);
                    })
                }),
            );
        }
    }
}

fn all_rows(lab: &Lab) {
    for w in [1, 5, 20] {
        all(
            lab,
            POOLS.map(|pool| {
                ScoreCase::window((4, 2), w, 64, &[140, 3, 21]).with(|c| {
                    (c.shape.scored, c.shape.pool, c.lse) = (ScoredRows::All, pool, true);
                    c.shape.over_rows = ScoreReduction::Mean;
                })
            }),
        );
    }
}

fn running_sums(lab: &Lab) {
    for (decay, w, scored) in [(1.0, 1, ScoredRows::All), (0.98, 4, ScoredRows::All), (0.5, 3, ScoredRows::Prefix)] {
        let case = ScoreCase::window((4, 2), w, 64, &[70, 2, 140]).with(|c| {
            (c.shape.scored, c.shape.pool, c.shape.accumulate) = (scored, Pooling::None, Some(decay));
        });
        let each = vec![66, 0, 2, 1, 0, 139];
        all(lab, [None, Some(vec![60, 1, 7]), Some(each)].map(|p| case.clone().with(|c| c.previous = p)));
        all(lab, [case.with(|c| c.shape.fill = false)]);
    }
}

fn outputs_are_optional(lab: &Lab) {
    all(lab, [true, false].map(|lse| ScoreCase::window((4, 1), 8, 64, &[33, 300]).with(|c| c.lse = lse)));
}

fn a_given_lse(lab: &Lab) {
    for (i, over_heads) in REDUCTIONS.into_iter().enumerate() {
        let given = |odd| {
            ScoreCase::window((4, 2), 6, 64, &[70, 9]).with(|c| {
                (c.shape.given_lse, c.shape.over_heads, c.shape.pool, c.odd_lse) = (true, over_heads, POOLS[i], odd);
            })
        };
        all(lab, [given(false), given(true)]);
    }
    // One that saw nothing adds 0, whatever its logits are: the first query here.
    let nothing = |w| {
        ScoreCase::window((1, 1), w, 64, &[30]).with(|c| {
            (c.shape.given_lse, c.odd_lse, c.odd_keys) = (true, true, vec![(3, f32::NAN), (7, f32::INFINITY)]);
        })
    };
    all(lab, [nothing(1), nothing(2)]);
}

/// What a NaN or infinity among the keys does: to the queries that see it, all; in the window, to those after it.
fn broken_keys(lab: &Lab) {
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for row in [2, 28, 29] {
            let case = ScoreCase::window((2, 1), 3, 64, &[30, 33]).with(|c| (c.odd_keys, c.lse) = (vec![(row, odd)], true));
            let max = case.clone().with(|c| (c.shape.over_heads, c.shape.pool) = (ScoreReduction::Max, Pooling::Max(3)));
            all(lab, [case, max]);
        }
        all(lab, [ScoreCase::column((2, 1), 64, &[20]).with(|c| c.odd_keys = vec![(9, odd)])]);
        all(lab, [ScoreCase::repeat((2, 1), 9, 64, 40, &[[4, 10, 9], [0, 0, 31]]).with(|c| c.odd_keys = vec![(35, odd)])]);
    }
}

fn large_logits(lab: &Lab) {
    all(lab, [30.0, 300.0].map(|size| ScoreCase::window((2, 1), 4, 64, &[60]).with(|c| (c.q_size, c.lse) = (size, true))));
    // Below where a running maximum begins.
    all(lab, [ScoreCase::column((2, 1), 64, &[40]).with(|c| c.k_size = 100.0)]);
}

/// They pass in chunks.
fn more_queries_than_shared_memory_holds(lab: &Lab) {
    all(
        lab,
        [
            ScoreCase::window((4, 1), 40, 256, &[150]),
            ScoreCase::window((3, 1), 89, 128, &[170, 260]).with(|c| c.shape.scored = ScoredRows::All),
            ScoreCase::window((7, 1), 100, 64, &[130]).with(|c| c.shape.over_heads = ScoreReduction::Max),
        ],
    );
}

fn columns(lab: &Lab) {
    all(
        lab,
        [
            ScoreCase::column((4, 2), 64, &[1, 40, 0, 129]),
            ScoreCase::column((2, 1), 64, &[301, 130]).with(|c| c.lse = true),
            ScoreCase::column((3, 1), 128, &[200]).with(|c| c.shape.dtype = Dtype::F16),
            ScoreCase::column((2, 1), 256, &[150, 65]).with(|c| c.layout = Layout::Contiguous),
            ScoreCase::column((2, 1), 64, &[90]).with(|c| (c.shape.given_lse, c.shape.fill) = (true, false)),
            ScoreCase::column((2, 1), 64, &[90, 33])
                .with(|c| (c.shape.pool, c.shape.over_rows) = (POOLS[2], ScoreReduction::Mean)),
        ],
    );
}

fn repeats(lab: &Lab) {
    let spans = [[0, 0, 60], [4, 20, 9], [4, 2, 30], [60, 10, 20], [7, 59, 1], [3, 30, 0], [0, 60, 0], [17, 17, 43]];
    all(
        lab,
        [
            ScoreCase::repeat((4, 2), 12, 64, 72, &spans).with(|c| c.lse = true),
            ScoreCase::repeat((2, 1), 1, 128, 61, &spans).with(|c| c.shape.fill = false),
            ScoreCase::repeat((3, 1), 33, 256, 93, &spans[..4]).with(|c| c.shape.dtype = Dtype::F16),
            // Tiles between the parts are left out; queries in chunks.
            ScoreCase::repeat((2, 1), 40, 64, 800, &[[16, 500, 150], [5, 130, 200], [100, 140, 131]]).with(|c| c.lse = true),
            ScoreCase::repeat((6, 1), 90, 64, 400, &[[16, 131, 150]]).with(|c| c.layout = Layout::PerHead(64)),
        ],
    );
}

fn random_windows(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let (kv_heads, seqs) = (1 + rng.below(2), 1 + rng.below(3));
        let lengths: Vec<usize> = (0..seqs).map(|_| rng.below(300)).collect();
        let case =
            ScoreCase::window((kv_heads * (1 + rng.below(5)), kv_heads), 1 + rng.below(20), 8 + 8 * rng.below(16), &lengths);
        all(
            lab,
            [case.with(|c| {
                c.seed = seed;
                c.layout = [Layout::Contiguous, Layout::Hnd(16), Layout::PerHead(16)][rng.below(3)];
                c.shape.dtype = [Dtype::Bf16, Dtype::F16][rng.below(2)];
                c.shape.scored = [ScoredRows::Prefix, ScoredRows::All][rng.below(2)];
                let kernel = 1 + 2 * rng.below(20);
                c.shape.pool = [Pooling::None, Pooling::Avg(kernel), Pooling::Max(kernel)][rng.below(3)];
                c.shape.over_rows = REDUCTIONS[rng.below(2)];
                c.shape.over_heads = REDUCTIONS[rng.below(3)];
                (c.shape.fill, c.lse) = (rng.below(2) == 0, rng.below(2) == 0);
                (c.gap, c.strided) = (rng.below(3), rng.below(2) == 0);
            })],
        );
    }
}

/// In little: the race detector's case. Several CTAs share a head's rows; queries are resident, and in chunks.
fn a_small_window_column_and_chunk(lab: &Lab) {
    all(
        lab,
        [
            ScoreCase::window((2, 1), 3, 64, &[300]).with(|c| c.lse = true),
            ScoreCase::window((5, 1), 107, 64, &[140]).with(|c| c.shape.scored = ScoredRows::All),
            ScoreCase::repeat((2, 1), 4, 64, 200, &[[3, 100, 30]]),
        ],
    );
}

/// research notes: equal logits, and the teacher of Fast KVzip worked by hand.
fn by_hand(lab: &Lab) {
    // Queries of 0: row i of a window of 2 behind 2 rows has weights 1 / (2 + i + 1).
    let mut zero = ScoreData::new(&ScoreCase::window((1, 1), 2, 64, &[4]).with(|c| c.shape.pool = Pooling::None));
    zero.q.fill(0.0);
    let scores = run(lab, &zero).scores;
    assert!(scores.iter().all(|x| (x - 7.0 / 12.0).abs() < 1e-6), "{scores:?}");
    // Keys 0 | 1, 2 | 0.5, 0 in one dimension; queries 1, 2 and -1, 0 of two query heads.
    let case = ScoreCase::repeat((2, 1), 2, 8, 5, &[[1, 1, 2]]).with(|c| c.shape.scale = 1.0);
    let mut teacher = ScoreData::new(&case);
    let in_first = |x: &[f32]| x.iter().flat_map(|&x| [x, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]).collect::<Vec<f32>>();
    (teacher.q, teacher.k) = (in_first(&[1.0, 2.0, -1.0, 0.0]), in_first(&[0.0, 1.0, 2.0, 0.5, 0.0]));
    let scores = run(lab, &teacher).scores;
    let off = (scores[0] - 0.213_097_3).abs().max((scores[1] - 0.818_495_6).abs());
    assert!(off < 1e-6, "{scores:?}");
    // Pooled at the borders: [3, 0, 0, 3] of logits that make such weights would be [1, 1, 1, 1]; here by ratios.
    let pooled = |pool| {
        let mut data =
            ScoreData::new(&ScoreCase::window((1, 1), 1, 8, &[5]).with(|c| (c.shape.pool, c.shape.scale) = (pool, 1.0)));
        (data.q, data.k) = (in_first(&[1.0]), in_first(&[2.0, -30.0, -30.0, 2.0, -30.0]));
        run(lab, &data).scores
    };
    let close = |x: Vec<f32>, all: f32| assert!(x.iter().all(|x| (x - all).abs() < 1e-6), "{x:?}");
    close(pooled(Pooling::Avg(3)), 1.0 / 6.0);
    close(pooled(Pooling::Max(3)), 0.5);
}

/// All causal attention is given to somebody: a query's weights sum to 1.
fn weights_sum_to_the_queries(lab: &Lab) {
    for (case, queries) in [
        (ScoreCase::column((4, 2), 64, &[150]), 150.0),
        (
            ScoreCase::window((4, 2), 9, 64, &[150]).with(|c| (c.shape.scored, c.shape.pool) = (ScoredRows::All, Pooling::None)),
            9.0,
        ),
    ] {
        for row in run(lab, &ScoreData::new(&case)).scores.chunks(150) {
            let sum: f64 = row.iter().map(|&x| f64::from(x)).sum();
            assert!((sum - queries).abs() < 1e-4 * queries, "{sum} instead of {queries}");
        }
    }
}

fn equal_bits_from_run_to_run(lab: &Lab) {
    for case in [
        ScoreCase::window((4, 2), 8, 64, &[600, 33]).with(|c| c.lse = true),
        ScoreCase::column((2, 1), 64, &[200]),
        ScoreCase::repeat((2, 1), 20, 64, 300, &[[4, 100, 70]]),
    ] {
        let mut run = ScoreRun::new(lab, &ScoreData::new(&case));
        run.enqueue();
        let first = run.result();
        for _ in 0..2 {
            run.reset();
            run.enqueue();
            assert_eq!(run.result(), first);
        }
    }
}

/// However rows are shared among CTAs: with a given lse, the same bits.
fn a_sequence_ignores_the_batch(lab: &Lab) {
    let case = |lengths: &[usize]| {
        ScoreCase::window((2, 1), 8, 64, lengths).with(|c| {
            (c.layout, c.shape.rows, c.shape.given_lse) = (Layout::Contiguous, 700, true);
        })
    };
    let batch = ScoreData::new(&case(&[650, 12, 700, 300]));
    let mut alone = ScoreData::new(&case(&[650]));
    alone.q = batch.q[..alone.q.len()].to_vec();
    alone.k = batch.k[..alone.k.len()].to_vec();
    alone.lse = batch.lse.as_ref().map(|lse| lse[..2 * 8].to_vec());
    let (batch, alone) = (run(lab, &batch).scores, run(lab, &alone).scores);
    assert_eq!(
        batch[..alone.len()].iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
        alone.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    );
}

/// A captured graph, with lengths and spans that memory holds when it runs.
fn a_replay_follows_the_lengths(lab: &Lab) {
    let long =
        ScoreData::new(&ScoreCase::window((4, 2), 4, 64, &[300, 77, 5]).with(|c| (c.layout, c.lse) = (Layout::Contiguous, true)));
    let mut run = ScoreRun::new(lab, &long);
    run.set_lengths(&[33, 0, 3]);
    let graph = run.with_args(|plan, args, workspace| lab.stream.capture(|stream| plan.launch(stream, args, workspace)));
    let graph = graph.expect("a graph");
    assert!(run.result().scores.iter().all(|x| x.is_nan()), "scores were written during capture");
    for lengths in [[300, 77, 5], [33, 0, 3], [300, 77, 4]] {
        run.set_lengths(&lengths);
        // SAFETY: everything that was captured lives in `run`.
        unsafe { graph.launch(&lab.stream) }.expect("a replay");
        lab.stream.synchronize().expect("a result");
        let mut expected = long.clone();
        expected.case.lengths = lengths.map(|n| n as usize).to_vec();
        agrees(&run.result(), &expected.expected(), long.case.tolerance()).unwrap_or_else(|e| panic!("{e}"));
    }
    let chunks = ScoreData::new(&ScoreCase::repeat((2, 1), 6, 64, 140, &[[4, 3, 90]]));
    let mut run = ScoreRun::new(lab, &chunks);
    let graph = run.with_args(|plan, args, workspace| lab.stream.capture(|stream| plan.launch(stream, args, workspace)));
    let graph = graph.expect("a graph");
    for span in [[4, 3, 90], [0, 100, 34], [70, 60, 1]] {
        run.set_spans(&[span]);
        // SAFETY: as above.
        unsafe { graph.launch(&lab.stream) }.expect("a replay");
        lab.stream.synchronize().expect("a result");
        let mut expected = chunks.clone();
        expected.case.spans = vec![span];
        agrees(&run.result(), &expected.expected(), chunks.case.tolerance()).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn bad_lengths_pages_and_spans_are_reported(lab: &Lab) {
    let data = ScoreData::new(&ScoreCase::window((2, 1), 3, 64, &[40, 20]).with(|c| c.layout = Layout::Contiguous));
    for (length, clamped) in [(-3, 0), (41, 40)] {
        let mut run = ScoreRun::new(lab, &data);
        run.set_lengths(&[40, length]);
        run.enqueue();
        assert!(run.workspace.status(&lab.stream).unwrap().bad_length());
        if clamped == 0 {
            assert!(run.result().scores[37..].iter().all(|&x| x == f32::NEG_INFINITY));
        }
    }
    let mut run = ScoreRun::new(lab, &ScoreData::new(&ScoreCase::window((2, 1), 3, 64, &[40]).with(|c| c.bad_page = true)));
    run.enqueue();
    assert!(run.workspace.status(&lab.stream).unwrap().bad_page());
    // Spans are cut off at the queries' rows.
    let case = ScoreCase::repeat((2, 1), 6, 64, 40, &[[4, 3, 30]]);
    let data = ScoreData::new(&case);
    for (span, cut) in [
        ([-2, 3, 30], [0, 3, 30]),
        ([50, 3, 30], [34, 3, 30]),
        ([4, 20, 30], [4, 20, 14]),
        ([4, -5, 9], [4, 0, 9]),
        ([4, 50, 9], [4, 34, 0]),
        ([4, 3, -9], [4, 3, 0]),
    ] {
        let mut run = ScoreRun::new(lab, &data);
        run.set_spans(&[span]);
        run.enqueue();
        assert!(run.workspace.status(&lab.stream).unwrap().bad_length(), "{span:?}");
        let mut expected = data.clone();
        expected.case.spans = vec![cut];
        agrees(&run.result(), &expected.expected(), case.tolerance()).unwrap_or_else(|e| panic!("{span:?}: {e}"));
    }
}

fn empty_shapes(lab: &Lab) {
    all(
        lab,
        [
            ScoreCase::window((2, 1), 4, 64, &[]),
            ScoreCase::window((2, 1), 4, 64, &[4, 0, 3]).with(|c| c.lse = true),
            ScoreCase::column((2, 1), 64, &[0]),
        ],
    );
    let plan = ScoreShape::window(Dtype::Bf16, 1, (2, 1), 4, 9, 64).plan(&lab.device).expect("a plan");
    assert_eq!((plan.launches(), plan.shape().columns()), (2, 5));
}
