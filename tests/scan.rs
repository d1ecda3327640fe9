//! Scans against the reference, which decodes keys first.

use kvlar::{Codec, Dtype, Format, Reduction, Schedule};
use kvlar_reference::testing::Rng;
use kvlar_tests::pages::Layout;
use kvlar_tests::scan::{ScanCase, ScanData, ScanRun, check, run};
use kvlar_tests::{Lab, on_every_device};

on_every_device!(
    formats,
    head_dims,
    ratios_of_heads,
    every_length,
    lengths_around_tile_and_page_edges,
    layouts,
    rotated_scans,
    formats_that_are_decoded,
    codebooks,
    codebooks_of_any_size,
    fp8_scales,
    reductions,
    outputs_are_optional,
    ragged_heads,
    rows_beyond_a_length_may_be_left_alone,
    broken_rows,
    constant_rows,
    large_logits,
    random_scans,
    equal_bits_from_run_to_run,
    own_schedule_ignores_the_batch,
    many_splits,
    lengths_are_read_from_the_device,
    a_bad_page_is_reported,
    a_product_code_worked_by_hand,
    adversarial_codes,
    keys_on_the_codebook_score_exactly,
    permuted_rows_permute_scores,
    scores_scale_with_queries,
    a_group_scores_as_its_heads,
);

const METHODS: [Reduction; 3] = [Reduction::MeanLogit, Reduction::MaxLogit, Reduction::MaxProb];
const PLAIN: [Codec; 6] = [Codec::Bf16, Codec::F16, Codec::Fp8, Codec::Int8, Codec::Int4, Codec::Int2];

fn all(lab: &Lab, cases: impl IntoIterator<Item = ScanCase>) {
    for (i, case) in cases.into_iter().enumerate() {
        let case = ScanCase { seed: case.seed + 1000 * i as u64, ..case };
        check(lab, &case).unwrap_or_else(|e| panic!("{e}"));
    }
}

fn rotated(format: impl Into<Format>) -> Format {
    Format { hadamard: true, ..format.into() }
}

fn formats(lab: &Lab) {
    for (i, codec) in PLAIN.into_iter().enumerate() {
        let dtype = if codec == Codec::F16 { Dtype::F16 } else { Dtype::Bf16 };
        let d = [64, 128, 256][i % 3];
        all(lab, [ScanCase::new(codec, (4, 2), d, &[70, 33]).with(|c| (c.dtype, c.scores) = (dtype, Some(METHODS[i % 3])))]);
    }
}

fn head_dims(lab: &Lab) {
    for (i, d) in [8, 72, 80, 96, 136, 192].into_iter().enumerate() {
        all(lab, [PLAIN[i], Codec::Int4].map(|codec| ScanCase::new(codec, (2, 1), d, &[37, 5])));
    }
}

fn ratios_of_heads(lab: &Lab) {
    let keys = [Codec::Int4.into(), Codec::Bf16.into(), Format::pq(8, 16), Codec::Int8.into()];
    let ratios = [(1, 1), (2, 1), (3, 1), (4, 2), (5, 1), (6, 1), (7, 1), (16, 2), (9, 1), (16, 1), (33, 3)];
    let case = |(i, heads): (usize, (usize, usize))| {
        ScanCase::new(keys[i % 4], heads, 64, &[40]).with(|c| c.scores = Some(METHODS[i % 3]))
    };
    all(lab, ratios.into_iter().enumerate().map(case));
    // More heads than a tile has columns: scores are made of logits.
    all(lab, [(24, 1), (12, 1)].map(|heads| ScanCase::new(Codec::Int4, heads, 256, &[33]).with(|c| c.logits = heads.0 == 12)));
}

/// Of tiles and of pages, every residue.
fn every_length(lab: &Lab) {
    let lengths: Vec<usize> = (0..=130).collect();
    let keys = [Codec::Fp8.into(), Codec::Int8.into(), Codec::Int4.into(), Codec::Int2.into(), Format::pq(4, 8)];
    all(lab, keys.map(|keys| ScanCase::new(keys, (2, 1), 64, &lengths)));
}

fn lengths_around_tile_and_page_edges(lab: &Lab) {
    let lengths = [0, 1, 31, 32, 33, 63, 64, 65, 127, 129];
    let keys = [Codec::Int2.into(), Codec::Int4.into(), Codec::Bf16.into(), Format::pq(4, 8), Format::pq(16, 5)];
    all(lab, keys.map(|keys| ScanCase::new(keys, (2, 1), 64, &lengths)));
    all(lab, [0, 1].map(|n| ScanCase::new(rotated(Codec::Bf16), (2, 2), 64, &[n]).with(|c| c.scores = Some(Reduction::MaxProb))));
}

fn layouts(lab: &Lab) {
    let layouts = [Layout::Contiguous, Layout::Hnd(64), Layout::PerHead(16)];
    for keys in [Codec::Int4.into(), Format::pq(2, 32)] {
        all(lab, layouts.map(|l| ScanCase::new(keys, (6, 3), 64, &[70, 128]).with(|c| c.layout = l)));
    }
    let strided = |c: &mut ScanCase| (c.layout, c.strided) = (Layout::Nhd(16), true);
    all(lab, [Codec::Fp8.into(), Format::pq(32, 9)].map(|keys| ScanCase::new(keys, (4, 2), 128, &[33, 17]).with(strided)));
}

fn rotated_scans(lab: &Lab) {
    for codec in [Codec::Int8, Codec::Int4, Codec::Int2, Codec::Fp8] {
        all(lab, [(64, (4, 2)), (128, (9, 1))].map(|(d, heads)| ScanCase::new(rotated(codec), heads, d, &[50])));
    }
    all(lab, [Format::pq(2, 32), Format::pq(16, 32)].map(|keys| ScanCase::new(rotated(keys), (4, 2), 64, &[50])));
}

/// Groups of a row, rotated dense rows, rows of another type than q, sub-vectors that are no fragments.
fn formats_that_are_decoded(lab: &Lab) {
    let grouped = |codec: Codec, group| Format { group: Some(group), ..codec.into() };
    let keys = [grouped(Codec::Int4, 16), rotated(grouped(Codec::Int2, 8)), rotated(Codec::Bf16), Codec::F16.into()];
    all(lab, keys.map(|keys| ScanCase::new(keys, (6, 2), 64, &[35, 7])));
    all(lab, [grouped(Codec::Int8, 3), Format::pq(3, 7)].map(|keys| ScanCase::new(keys, (9, 1), 96, &[33])));
    // Whole groups: what is left after them is not encoded.
    let channels = [Codec::Int4Channel.into(), rotated(grouped(Codec::Int2Channel, 16))];
    all(lab, channels.map(|keys| ScanCase::new(keys, (6, 2), 64, &[64, 0, 32]).with(|c| c.layout = Layout::Hnd(32))));
}

/// Every width as fragments and as tables.
fn codebooks(lab: &Lab) {
    for (width, groups) in [(1, [1, 2]), (2, [1, 5]), (4, [1, 3]), (8, [2, 6]), (16, [3, 8]), (32, [1, 9]), (64, [4, 1])] {
        all(lab, groups.map(|g| ScanCase::new(Format::pq(width, 24), (g, 1), 64, &[45]).with(|c| c.dtype = Dtype::F16)));
    }
    for (d, width) in [(128, 2), (128, 8), (256, 4), (80, 4), (96, 8), (192, 16)] {
        all(lab, [ScanCase::new(Format::pq(width, 17), (8, 1), d, &[33]).with(|c| c.scores = Some(Reduction::MaxProb))]);
    }
    // All that a byte can number, two heads.
    all(lab, [4, 16].map(|width| ScanCase::new(Format::pq(width, 256), (4, 2), 64, &[40])));
}

/// fp16 alone could not hold these centroids.
fn codebooks_of_any_size(lab: &Lab) {
    for size in [1e-6, 1e-3, 3e3, 1e6] {
        let case = ScanCase::new(Format::pq(2, 16), (4, 1), 64, &[40]).with(|c| {
            c.k_size = size;
            c.q_size = 1.0 / size;
            c.keys.codebooks.iter_mut().for_each(|x| *x *= size);
        });
        all(lab, [case]);
    }
}

fn fp8_scales(lab: &Lab) {
    all(
        lab,
        [[0.5, 0.01], [2.0, 0.1]].map(|s| ScanCase::new(Codec::Fp8, (4, 2), 64, &[50]).with(|c| c.keys.scales = s.to_vec())),
    );
}

fn reductions(lab: &Lab) {
    for method in METHODS {
        for keys in [Codec::Int4.into(), Format::pq(32, 9), rotated(Codec::Bf16)] {
            all(lab, [ScanCase::new(keys, (6, 2), 64, &[70, 0]).with(|c| c.scores = Some(method))]);
        }
    }
}

fn outputs_are_optional(lab: &Lab) {
    let wanted = |scores, logits, lse, histogram| {
        move |c: &mut ScanCase| (c.scores, c.logits, c.lse, c.histogram) = (scores, logits, lse, histogram)
    };
    let (prob, logit) = (Some(Reduction::MaxProb), Some(Reduction::MaxLogit));
    for keys in [Codec::Int4.into(), Format::pq(32, 9)] {
        let case =
            |scores, logits, lse, histogram| ScanCase::new(keys, (4, 2), 64, &[40]).with(wanted(scores, logits, lse, histogram));
        all(lab, [case(None, true, true, false), case(None, false, true, false), case(logit, false, false, false)]);
        all(lab, [case(logit, false, false, true), case(prob, false, false, true), case(prob, false, true, false)]);
    }
}

fn ragged_heads(lab: &Lab) {
    for layout in [Layout::PerHead(16), Layout::Contiguous] {
        let case = |keys: Format, method| {
            ScanCase::new(keys, (6, 3), 64, &[70, 0, 33, 5, 64, 31])
                .with(|c| (c.seqs, c.layout, c.scores) = (2, layout, Some(method)))
        };
        all(lab, [case(Codec::Int4.into(), Reduction::MaxProb), case(Format::pq(16, 9), Reduction::MeanLogit)]);
    }
}

fn rows_beyond_a_length_may_be_left_alone(lab: &Lab) {
    for method in METHODS {
        let bare = |c: &mut ScanCase| (c.fill, c.scores, c.capacity) = (false, Some(method), 90);
        all(lab, [Codec::Int8.into(), Format::pq(32, 9)].map(|keys| ScanCase::new(keys, (4, 2), 64, &[40, 9]).with(bare)));
    }
}

fn broken_rows(lab: &Lab) {
    for (i, codec) in PLAIN.into_iter().enumerate() {
        let dtype = if codec == Codec::F16 { Dtype::F16 } else { Dtype::Bf16 };
        let broken = |c: &mut ScanCase| (c.nan_key, c.dtype, c.scores) = (true, dtype, Some(METHODS[i % 3]));
        all(lab, [ScanCase::new(codec, (4, 2), 64, &[40, 2]).with(broken)]);
    }
    // No code stands for NaN: such a sub-vector is centroid 0.
    all(lab, [2, 32].map(|w| ScanCase::new(Format::pq(w, 9), (4, 2), 64, &[40]).with(|c| c.nan_key = true)));
}

fn constant_rows(lab: &Lab) {
    for codec in [Codec::Int8, Codec::Int4, Codec::Int2] {
        all(lab, [ScanCase::new(codec, (4, 2), 64, &[50]).with(|c| c.constant = true)]);
    }
}

fn large_logits(lab: &Lab) {
    for keys in [Codec::Int4.into(), Codec::Bf16.into(), Format::pq(32, 9)] {
        all(lab, [ScanCase::new(keys, (4, 2), 64, &[90]).with(|c| (c.q_size, c.scores) = (60.0, Some(Reduction::MaxProb)))]);
    }
}

fn random_case(rng: &mut Rng) -> ScanCase {
    let pick = |rng: &mut Rng, from: &[usize]| from[rng.below(from.len())];
    let (kv_heads, ratio) = (1 + rng.below(3), pick(rng, &[1, 2, 3, 4, 7, 8, 11]));
    let d = pick(rng, &[32, 64, 80, 128, 256]);
    let lengths: Vec<usize> = (0..1 + rng.below(3)).map(|_| rng.below(150)).collect();
    let mut keys = match rng.below(3) {
        0 => Format::pq(pick(rng, &[2, 4, 8, 16]), 1 + rng.below(30)),
        _ => PLAIN[rng.below(6)].into(),
    };
    keys.hadamard = d.is_power_of_two() && rng.below(3) == 0;
    if keys.codec != Codec::Pq && rng.below(4) == 0 {
        keys.group = Some(d / 2);
    }
    ScanCase::new(keys, (kv_heads * ratio, kv_heads), d, &lengths).with(|c| {
        c.dtype = [Dtype::Bf16, Dtype::F16][rng.below(2)];
        c.layout = [Layout::Hnd(16), Layout::Hnd(64), Layout::Contiguous, Layout::PerHead(32)][rng.below(4)];
        c.scores = Some(METHODS[rng.below(3)]);
        (c.logits, c.histogram, c.fill) = (rng.below(2) == 0, rng.below(2) == 0, rng.below(3) > 0);
        c.schedule = if rng.below(3) == 0 { Schedule::Own } else { Schedule::Balanced };
        c.seed = rng.below(1 << 30) as u64;
    })
}

fn random_scans(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    let mut rng = Rng::new(77);
    all(lab, (0..count).map(|_| random_case(&mut rng)));
}

/// Bits of all results.
fn bits(lab: &Lab, data: &ScanData) -> Vec<u32> {
    let r = run(lab, data);
    [r.scores, r.logits, r.lse].concat().iter().map(|x| x.to_bits()).chain(r.histogram).collect()
}

fn equal_bits_from_run_to_run(lab: &Lab) {
    for (keys, method) in [(rotated(Codec::Int4), Reduction::MaxLogit), (Format::pq(2, 16), Reduction::MaxProb)] {
        let data = ScanData::new(&ScanCase::new(keys, (4, 2), 64, &[200, 33]).with(|c| c.scores = Some(method)));
        let mut run = ScanRun::new(lab, &data);
        run.enqueue();
        let first = run.result();
        for _ in 0..2 {
            run.poison();
            run.enqueue();
            assert_eq!(run.result(), first);
            assert!(run.counters().iter().all(|&c| c == 0));
        }
    }
}

/// From 1 to 35 of a unit: a lane's are 32 apart.
fn many_splits(lab: &Lab) {
    let case = |codec| {
        ScanCase::new(codec, (2, 1), 8, &[17_400, 16_300, 15_900, 700])
            .with(|c| (c.schedule, c.layout, c.lse) = (Schedule::Own, Layout::Contiguous, true))
    };
    all(lab, [Codec::Bf16, Codec::Int8].map(case));
}

fn own_schedule_ignores_the_batch(lab: &Lab) {
    let case = |lengths: &[usize]| {
        ScanCase::new(Codec::Int2, (2, 1), 64, lengths)
            .with(|c| (c.schedule, c.capacity, c.layout, c.lse) = (Schedule::Own, 1200, Layout::Contiguous, true))
    };
    let batch = ScanData::new(&case(&[1100, 12]));
    let mut alone = ScanData::new(&case(&[1100]));
    alone.q = batch.q[..alone.q.len()].to_vec();
    alone.k = batch.k[..alone.k.len()].to_vec();
    let (batch, alone) = (run(lab, &batch), run(lab, &alone));
    assert_eq!(
        (&batch.lse[..2], &batch.logits[..2400], &batch.scores[..1200]),
        (&alone.lse[..], &alone.logits[..], &alone.scores[..])
    );
}

/// A captured graph replays with other lengths.
fn lengths_are_read_from_the_device(lab: &Lab) {
    for method in [Reduction::MeanLogit, Reduction::MaxProb] {
        let long = ScanData::new(&ScanCase::new(Codec::Int4, (4, 2), 64, &[90, 40]).with(|c| {
            (c.layout, c.scores) = (Layout::Contiguous, Some(method));
        }));
        let mut short = long.clone();
        short.case.lengths = vec![17, 0];
        let mut run = ScanRun::new(lab, &long);
        run.set_lengths(&[17, 0]);
        run.enqueue();
        let (actual, expected) = (run.result(), short.expected());
        for (a, e) in [(&actual.scores, &expected.scores), (&actual.logits, &expected.logits), (&actual.lse, &expected.lse)] {
            kvlar_reference::compare::compare(a, e, long.tolerance()).unwrap();
        }
        // A length that no cache has is clamped, and said so.
        run.set_lengths(&[-3, 91]);
        run.enqueue();
        assert!(run.workspace.status(&lab.stream).unwrap().bad_length());
    }
}

fn a_bad_page_is_reported(lab: &Lab) {
    let data = ScanData::new(&ScanCase::new(Codec::Int4, (2, 1), 64, &[40]).with(|c| c.bad_page = true));
    let mut run = ScanRun::new(lab, &data);
    run.enqueue();
    assert!(run.workspace.status(&lab.stream).unwrap().bad_page());
}

/// Logits (unscaled) of keys that are codes in codebooks, by one query head or more.
fn logits_of_codes(lab: &Lab, format: Format, codebooks: Vec<f32>, codes: &[Vec<usize>], q: &[f32]) -> Vec<f32> {
    let (width, d) = (format.group_of(0), codebooks.len() / format.centroids);
    let heads = q.len() / d;
    let case = ScanCase::new(format, (heads, 1), d, &[codes.len()]).with(|c| c.keys.codebooks = codebooks.clone());
    let mut data = ScanData::new(&case);
    data.q = q.to_vec();
    let centroid = |s: usize, code: usize| codebooks[(s * format.centroids + code) * width..][..width].to_vec();
    data.k = codes
        .iter()
        .flat_map(|row| row.iter().enumerate().flat_map(|(s, &code)| centroid(s, code)).collect::<Vec<_>>())
        .collect();
    run(lab, &data).logits.iter().map(|x| x / case.shape().scale).collect()
}

/// T0 = {3, -2}, T1 = {9, 3.5}: codes (0, 0) score 12, (0, 1) 6.5, (1, 0) 7, (1, 1) 1.5; by tables and by fragments.
fn a_product_code_worked_by_hand(lab: &Lab) {
    for (d, heads) in [(8, 1), (16, 1), (16, 3)] {
        let mut codebooks = vec![1.0, 0.0, 0.0, 1.0, 2.0, 2.0, -1.0, 1.0];
        codebooks.resize(2 * d, 0.0);
        let mut q = vec![3.0, -2.0, 0.5, 4.0];
        q.resize(d, 0.0);
        let code = |a, b| [vec![a, b], vec![0; d / 2 - 2]].concat();
        let codes = [code(0, 0), code(0, 1), code(1, 0), code(1, 1)];
        let logits = logits_of_codes(lab, Format::pq(2, 2), codebooks, &codes, &q.repeat(heads));
        let close = |(a, e): (&f32, f32)| (a - e).abs() < 1e-5;
        assert!(logits.iter().zip([12.0, 6.5, 7.0, 1.5].repeat(heads)).all(close), "{logits:?}");
    }
}

/// Equal codes, and codes 32 apart, whose entries meet in one bank.
fn adversarial_codes(lab: &Lab) {
    for (width, heads) in [(2, 4), (16, 1)] {
        let (d, m) = (64, 64 / width);
        // Centroid a of every sub-vector is a / 8 in each dimension.
        let codebooks: Vec<f32> = (0..m).flat_map(|_| (0..256).flat_map(|a| vec![a as f32 / 8.0; width])).collect();
        let rows: Vec<usize> = (0..70).collect();
        let codes: Vec<Vec<usize>> = rows.iter().map(|&r| vec![if r < 35 { 77 } else { r * 32 % 256 }; m]).collect();
        let logits = logits_of_codes(lab, Format::pq(width, 256), codebooks, &codes, &vec![0.5; d * heads]);
        for (i, x) in logits.iter().enumerate() {
            let expected = codes[i % 70][0] as f32 / 8.0 * 0.5 * d as f32;
            assert!((x - expected).abs() <= 1e-5 * expected, "row {i} with width {width}: {x} instead of {expected}");
        }
    }
}

/// Centroids that fp16 holds: the sum over sub-vectors is the dot product with the decoded row, to fp32 rounding.
fn keys_on_the_codebook_score_exactly(lab: &Lab) {
    for (width, heads) in [(2, 2), (4, 4), (16, 2), (32, 1)] {
        let (d, centroids) = (64, 12);
        let mut rng = Rng::new(width as u64);
        let codebooks: Vec<f32> = (0..centroids * d).map(|_| (rng.below(400) as f32 - 200.0) / 64.0).collect();
        let q: Vec<f32> = (0..heads * d).map(|_| (rng.below(200) as f32 - 100.0) / 32.0).collect();
        let codes: Vec<Vec<usize>> = (0..40).map(|_| (0..d / width).map(|_| rng.below(centroids)).collect()).collect();
        let logits = logits_of_codes(lab, Format::pq(width, centroids), codebooks.clone(), &codes, &q);
        for (i, x) in logits.iter().enumerate() {
            let (head, row) = (i / 40, &codes[i % 40]);
            let dim = |j: usize| codebooks[((j / width) * centroids + row[j / width]) * width + j % width];
            let (exact, size) = (0..d).fold((0f64, 0f64), |(sum, size), j| {
                let product = f64::from(q[head * d + j]) * f64::from(dim(j));
                (sum + product, size + product.abs())
            });
            assert!((f64::from(*x) - exact).abs() <= 1e-6 * size, "row {i} with width {width}: {x} instead of {exact}");
        }
    }
}

fn permuted_rows_permute_scores(lab: &Lab) {
    for keys in [Codec::Int4.into(), rotated(Codec::Int8), Format::pq(2, 16), Format::pq(32, 16)] {
        let data = ScanData::new(&ScanCase::new(keys, (3, 1), 64, &[77]).with(|c| c.histogram = false));
        let order = Rng::new(5).permutation(77);
        let mut permuted = data.clone();
        permuted.k = order.iter().flat_map(|&row| data.k[row * 64..][..64].to_vec()).collect();
        let (plain, permuted) = (run(lab, &data), run(lab, &permuted));
        let expected: Vec<f32> = order.iter().map(|&row| plain.scores[row]).collect();
        assert_eq!(permuted.scores, expected);
        assert!(permuted.lse.iter().zip(&plain.lse).all(|(a, b)| (a - b).abs() < 1e-5));
    }
}

/// By a power of two, without another rounding anywhere.
fn scores_scale_with_queries(lab: &Lab) {
    for keys in [Codec::Int4.into(), Codec::Bf16.into(), rotated(Codec::Int2), Format::pq(2, 16), Format::pq(32, 16)] {
        let data = ScanData::new(&ScanCase::new(keys, (4, 2), 64, &[50]));
        let mut larger = data.clone();
        larger.q.iter_mut().for_each(|x| *x *= 4.0);
        let (plain, larger) = (run(lab, &data), run(lab, &larger));
        let expected: Vec<f32> = plain.scores.iter().map(|x| 4.0 * x).collect();
        assert!(larger.scores.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs().max(1.0)), "{keys:?}");
    }
}

fn a_group_scores_as_its_heads(lab: &Lab) {
    for (keys, group) in [(Format::from(Codec::Int4), 3), (Codec::Fp8.into(), 16), (Format::pq(16, 9), 5)] {
        let data = ScanData::new(&ScanCase::new(keys, (group, 1), 64, &[50]));
        let together = run(lab, &data).logits;
        for head in 0..group {
            let mut alone = data.clone();
            alone.case.q_heads = 1;
            alone.q = data.q[64 * head..][..64].to_vec();
            let alone = run(lab, &alone).logits;
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-3;
            assert!(alone.iter().zip(&together[50 * head..]).all(close), "head {head} of {group}, {keys:?}");
        }
    }
}

/// The scores of both devices are in the same bits where they count: a histogram of them is the same.
#[test]
fn bins_follow_the_order_of_scores() {
    use kvlar_tests::scan::bin_of;
    let ordered = [f32::NAN, f32::NEG_INFINITY, f32::MIN, -1.0, -1e-38, 0.0, 1e-38, 1.0, 1.5, f32::MAX, f32::INFINITY];
    let bins: Vec<usize> = ordered.iter().map(|&x| bin_of(x)).collect();
    assert!(bins.windows(2).all(|w| w[0] <= w[1]), "{bins:?}");
    assert_eq!((bins[0], bins[1], bin_of(-0.0)), (0, 3, bin_of(0.0)));
    assert!(bins[2] > bins[1], "-inf has a bin of its own");
    assert!(bins.iter().all(|&b| b < kvlar::SCORE_BINS));
}

#[test]
fn equal_bits_on_every_schedule_of_threads() {
    let data = ScanData::new(&ScanCase::new(Format::pq(2, 16), (4, 2), 64, &[150, 20]));
    let all: Vec<_> =
        Lab::emulated().iter().filter(|lab| lab.device.info().shared_per_sm > 128 << 10).map(|lab| bits(lab, &data)).collect();
    assert!(all.windows(2).all(|w| w[0] == w[1]));
}
