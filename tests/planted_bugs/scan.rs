//! Bugs of scan and reduce, and of product quantization.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Codec, Dtype, EncodeShape, Format, ReduceArgs, ReduceShape, Reduction, SCORE_BINS, Schedule, Workspace};
use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{ReduceInput, reduce};
use kvlar_tests::Lab;
use kvlar_tests::append::AppendCase;
use kvlar_tests::pages::{DevicePages, Layout, Pages, RowFormat};
use kvlar_tests::scan::{ScanCase, bin_of, check};

pub const SUITE: Suite = Suite { name: "scan", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const PQ: &str = "device/pq.cuh";

const BUGS: &[Bug] = &[
    bug("distances of a pair of dimensions lost", "encode/pq.cu", "own[i + 1], two.y);", "own[i + 1], own[i + 1]);"),
    bug("ties go to the higher code", "device/pq.cuh", "b.code < a.code)", "b.code > a.code)"),
    bug("dropped barrier before staged centroids", "encode/pq.cu", "__syncthreads();\n      const int first", "const int first"),
    bug(
        "decoded with the first head's centroids",
        "device/pq.cuh",
        "int64_t(head) * format.centroids * dim",
        "int64_t(head) * 0",
    ),
    bug("padding counted as a query head", "scan/warp.cuh", "if (8 * n + 2 * at.c + e < out.heads) {", "{"),
    bug("scores of exchanged rows", "scan/warp.cuh", "if (i == at.c) own = x;", "if (i == (at.c ^ 1)) own = x;"),
    bug(
        "rows beyond the end counted in lse",
        "scan/warp.cuh",
        "x[i] = 8 * i + at.g < valid ? s[i / 2][n][2 * (i % 2) + e] : -INFINITY;",
        "x[i] = s[i / 2][n][2 * (i % 2) + e];",
    ),
    bug("centroids of a neighbouring sub-vector", "scan/centroids.cuh", "0x4440u + c);", "0x4440u + (c ^ 1));"),
    bug(
        "dimensions of centroids in another order",
        "scan/centroids.cuh",
        "(4 * (i / width) + c) * width + i % width",
        "(4 * c + i / width) * width + i % width",
    ),
    bug("large centroids not scaled down", "scan/centroids.cuh", "largest >= 32768.f ||", "false ||"),
    bug(
        "centroids kept for another head",
        "scan/warp.cuh",
        "if (is_pq() && head != staged_head) {",
        "if (is_pq() && head != staged_head && head == 0) {",
    ),
    bug(
        "tables of another head",
        "scan/rows.cuh",
        "float sum = 0.f;\n        for (int j = 0; j < width; ++j) sum = fmaf(q[h * kMaxDim + j]",
        "float sum = 0.f;\n        for (int j = 0; j < width; ++j) sum = fmaf(q[j]",
    ),
    bug("the first sub-vector's table for all", "scan/rows.cuh", "table += count * kHeads;", ""),
    bug(
        "dropped barrier between queries and tables",
        "scan/rows.cuh",
        "load_queries(segment.key_format.hadamard != 0);\n    __syncthreads();",
        "load_queries(segment.key_format.hadamard != 0);",
    ),
    bug("dropped barrier between tables and rows", "scan/rows.cuh", "make_tables();\n    __syncthreads();", "make_tables();"),
    bug(
        "dropped barrier between queries and fragments",
        "scan/warp.cuh",
        "__syncthreads();\n    if (is_dense()) Base::load_queries",
        "if (is_dense()) Base::load_queries",
    ),
    bug(
        "dropped barrier between fragments and the last stages",
        "scan/warp.cuh",
        "else coded.load_fragments(scratch);\n    __syncthreads();",
        "else coded.load_fragments(scratch);",
    ),
    bug("queries in the first stages", "scan/warp.cuh", "raw + (p.stages - 1) * kWarps * p.stage_bytes", "raw"),
    bug("bins not cleared between units", "scan/scan.cuh", "out.bins[i] = 0;\n      {", ";\n      {"),
    bug("counts left behind", "device/order.cuh", "counts[i] = 0;", ""),
    bug("-0 below 0", "device/order.cuh", "x == 0.f ? 0u : __float_as_uint(x)", "__float_as_uint(x)"),
    bug("parts of a unit not merged", "scan/scan.cuh", "s < share.splits; s += 32", "s < 1; s += 32"),
    bug("sums not rescaled to a raised top", "scan/log_sum.cuh", "sum *= weight(top, raised);", ""),
    bug("rows beyond a length not filled", "scan/scan.cuh", "if (out.scores) out.scores[row] = -INFINITY;", ""),
    bug("-inf minus an lse of -inf", "reduce/reduce.cu", "if (prob && y != -INFINITY) y -= lse[h];", "if (prob) y -= lse[h];"),
    bug(
        "NaN is no least",
        "reduce/reduce.cu",
        "float x = mean ? 0.f : __uint_as_float(0x7fc00000u);",
        "float x = mean ? 0.f : -INFINITY;",
    ),
    bug(
        "scores beyond a length counted",
        "reduce/reduce.cu",
        "if (p.histogram && row < length)",
        "if (p.histogram && row < int(p.row_count))",
    ),
    bug(
        "ties of lanes go to the higher code",
        PQ,
        "__reduce_min_sync(0xffffffffu, distance == least ? uint32_t(best.code) : 0xffffffffu)",
        "__reduce_max_sync(0xffffffffu, distance == least ? uint32_t(best.code) : 0u)",
    ),
    bug(
        "ties of a lane go to the higher code",
        PQ,
        "first + 32 * j < count && sum < best.distance",
        "first + 32 * j < count && sum <= best.distance",
    ),
    bug(
        "a lane's first centroids alone",
        PQ,
        "first < count; first += 32 * kCodes",
        "first < min(count, 32 * kCodes); first += 32 * kCodes",
    ),
    bug("centroids of the first sub-vector", PQ, "codebooks + int64_t(s) * count * width", "codebooks"),
    bug("a sub-vector skipped", PQ, "each * (share.parts - 1) + 1", "each * (share.parts - 1) + 2"),
    bug(
        "sub-vectors of the first warp alone",
        PQ,
        "s % each < each - 1 ? 1 : each * (share.parts - 1) + 1",
        "s % each < each - 1 ? 1 : subvectors",
    ),
    bug("words of another warp's codes", PQ, "lane % share.parts != share.part", "(lane + 1) % share.parts != share.part"),
    bug("codes of the wrong lane", PQ, "if (lane == s / each) {", "if (lane == s / each % share.parts) {"),
    bug(
        "rows of codes written by the first warp alone",
        "device/row_codec.cuh",
        "format.codec != KVLAR_CODEC_PQ && share.part != 0",
        "share.part != 0",
    ),
    bug("a row a warp whatever is shared", "append/append.cuh", "shared ? cta : cta * 4 + warp", "cta * 4 + warp"),
    bug("the parts of the first warp alone", "append/append.cuh", "RowShare{warp, 4}", "RowShare{0, 4}"),
    bug(
        "pairs beyond the first eight of a lane",
        "scan/centroids.cuh",
        "first < pairs; first += 32 * kAtOnce",
        "first < min(pairs, 32 * kAtOnce); first += 32 * kAtOnce",
    ),
    bug("pairs beyond the last", "scan/centroids.cuh", "          if (i >= pairs) continue;\n", ""),
    bug(
        "sub-vectors that overlap",
        "scan/centroids.cuh",
        "to + s * stride + (i << 2)",
        "to + s * (stride - 2 * width) + (i << 2)",
    ),
    bug(
        "centroids of the sub-vector before",
        "scan/centroids.cuh",
        "from + s * pairs + min",
        "from + max(s - 1, 0) * pairs + min",
    ),
    bug(
        "dimensions of queries in another order",
        "scan/centroids.cuh",
        "4 * k + 2 * (column / 8) + column % 2",
        "4 * k + column / 8 + column % 2 * 2",
    ),
    bug("splits beyond the first 32", "scan/scan.cuh", "s < share.splits; s += 32", "s < min(share.splits, 32); s += 32"),
    bug("one split's sums", "scan/scan.cuh", "step < 32; step *= 2) state = ", "step < 1; step *= 2) state = "),
    bug(
        "counts beyond the first eight of a thread",
        "device/order.cuh",
        "first < KVLAR_SCORE_BINS; first += kAtOnce * threads",
        "first < min(KVLAR_SCORE_BINS, kAtOnce * threads); first += kAtOnce * threads",
    ),
    bug("the first counts of a thread for all", "device/order.cuh", "each(i, count[j]);", "each(i, count[0]);"),
];

/// What the short suites need, in one translation unit.
const SOURCE: &str = r#"
#include "scan/warp.cuh"
#include "scan/rows.cuh"
KVLAR_SCAN_ENTRY(kvlar_scan_d64_n8, 3, kvlar::scan::WarpScan<64, 1>)
GPU_EXPORT(kvlar_scan_d64_n8)
#include "scan/rows.cu"
#include "reduce/reduce.cu"
#include "encode/pq.cu"
#include "encode/encode.cu"
#include "append/append.cu"
#include "attend/schedule.cu"
"#;

/// Codes of rows in which ties occur, byte for byte.
fn encoded(lab: &Lab, width: usize, centroids: usize) {
    let (dim, rows, heads) = (64, 37, 2);
    let mut stored = RowFormat::from(Format::pq(width, centroids)).with_codebooks(heads, dim);
    // The last centroid of each sub-vector is the first once more.
    for book in stored.codebooks.chunks_mut(centroids * width) {
        book.copy_within(..width, (centroids - 1) * width);
    }
    let pages = Pages::new(&mut Rng::new(3), Layout::Hnd(16), 1, heads, rows, &[rows]);
    let on_device = DevicePages::upload(lab, &pages);
    let values = Rng::new(8).normals(heads * rows * dim, 1.0);
    let shape = EncodeShape { format: stored.format, dtype: Dtype::F32, seqs: 1, heads, rows, dim };
    let (x, tables) = (lab.upload(&values), stored.upload(lab));
    let mut pool = lab.poisoned(pages.pool_bytes(&stored, dim));
    let plan = shape.plan(&lab.device).unwrap();
    let tables = tables.as_ref().map(|t| t.view());
    plan.encode(&lab.stream, x.view(), &on_device.rows(), &pages.pool(pool.view_mut(), &stored, dim), tables).unwrap();
    let mut expected = vec![0xffu8; pool.len()];
    let mut decoded = Vec::new();
    for (i, row) in values.chunks(dim).enumerate() {
        decoded.extend(pages.store(&mut expected, (0, i / rows, i % rows), row, &stored));
    }
    assert_eq!(lab.download::<u8>(&pool), expected);
    let mut out = lab.poisoned(4 * values.len());
    plan.decode(&lab.stream, &on_device.rows(), &pages.pool(pool.view(), &stored, dim), tables, &mut out.view_mut()).unwrap();
    assert_eq!(lab.download::<f32>(&out), decoded);
}

/// Heads that see nothing, NaN and both zeros among the scores that are counted, and rows beyond a length.
fn reduced(lab: &Lab) {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let logits = [nan, nan, -inf, -inf, -0.0, 1.0, -inf, 7.0, nan, -3.0, -inf, -inf, -2.0, 0.0, 8.0, 8.0];
    let shape =
        ReduceShape { seqs: 2, q_heads: 2, kv_heads: 1, rows: 4, method: Reduction::MaxLogit, histogram: true, fill: true };
    let lse = [-inf, -inf, 0.5, 1.0];
    for method in [Reduction::MaxLogit, Reduction::MaxProb] {
        let plan = ReduceShape { method, ..shape }.plan(&lab.device).unwrap();
        let (x, sums, lengths) = (lab.upload(&logits), lab.upload(&lse), lab.upload(&[3i32, 4]));
        let (mut scores, mut histogram) = (lab.poisoned(32), lab.poisoned(8 * SCORE_BINS));
        let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
        let mut args = ReduceArgs {
            logits: x.view(),
            lse: Some(sums.view()),
            lengths: Some(lengths.view()),
            lengths_per_head: false,
            scores: scores.view_mut(),
            histogram: Some(histogram.view_mut()),
        };
        plan.launch(&lab.stream, &mut args, &mut workspace).unwrap();
        let (scores, histogram): (Vec<f32>, Vec<u32>) = (lab.download(&scores), lab.download(&histogram));
        let input = ReduceInput { seqs: 2, q_heads: 2, kv_heads: 1, rows: 4, logits: &logits, lse: &lse, method };
        let mut expected = reduce(&input).unwrap();
        expected[3] = -inf;
        compare(&scores, &expected, Tolerance::EXACT).unwrap();
        let mut counts = vec![0u32; 2 * SCORE_BINS];
        for (i, &x) in expected.iter().enumerate().filter(|(i, _)| *i != 3) {
            counts[i / 4 * SCORE_BINS + bin_of(x)] += 1;
        }
        assert!(counts == histogram);
        assert!(lab.counters(&workspace, plan.workspace()).iter().all(|&x| x == 0));
    }
}

/// A short form of the suites, within what [`SOURCE`] holds.
fn short_suites(lab: &Lab) {
    encoded(lab, 2, 40);
    encoded(lab, 4, 256);
    encoded(lab, 32, 70);
    let rows = |width| RowFormat::from(Format::pq(width, 20)).with_codebooks(3, 64);
    for width in [2, 4, 16] {
        AppendCase { values: rows(width), ..AppendCase::new(Dtype::Bf16, Codec::Bf16, 64) }.check(lab);
    }
    // Of so many coarse centroids there are equal ones.
    let mut coarse = RowFormat::from(Format::pq(4, 256)).with_codebooks(3, 64);
    coarse.codebooks.iter_mut().for_each(|x| *x = x.round());
    AppendCase { values: coarse, ..AppendCase::new(Dtype::Bf16, Codec::Int8, 64) }.check(lab);
    let case = |keys: Format, heads, lengths: &[usize]| ScanCase::new(keys, heads, 64, lengths);
    let method = |m: Reduction| move |c: &mut ScanCase| c.scores = Some(m);
    let decoded = Format { group: Some(16), ..Codec::Int4.into() };
    let large = |c: &mut ScanCase| {
        (c.k_size, c.q_size) = (1e5, 1e-5);
        c.keys.codebooks.iter_mut().for_each(|x| *x *= 1e5);
    };
    for case in [
        case(Codec::Int4.into(), (6, 2), &[101, 64, 7, 0]),
        case(Codec::Int4.into(), (5, 1), &[77]).with(|c| (c.q_size, c.capacity) = (30.0, 120)),
        case(Codec::Bf16.into(), (6, 2), &[70, 33, 40, 50, 60]).with(method(Reduction::MeanLogit)),
        case(Codec::Fp8.into(), (3, 1), &[70, 33]).with(method(Reduction::MaxProb)),
        case(Codec::Bf16.into(), (6, 2), &[70, 33]).with(|c| (c.nan_key, c.scores) = (true, Some(Reduction::MaxProb))),
        case(Format::pq(2, 24), (8, 4), &[70, 90, 33]),
        case(Format::pq(4, 24), (6, 2), &[33, 90]).with(method(Reduction::MaxProb)),
        case(Format::pq(8, 16), (4, 1), &[50]).with(large),
        case(Format::pq(16, 16), (6, 2), &[50, 90, 33, 7]),
        case(Format::pq(32, 16), (1, 1), &[130, 40]).with(method(Reduction::MeanLogit)),
        case(decoded, (6, 2), &[70, 33]).with(|c| c.capacity = 100),
        case(decoded, (9, 1), &[33]),
        case(Codec::Int8.into(), (6, 2), &[5000]), // many tiles a warp
        case(Format::pq(4, 200), (6, 2), &[70, 33]),
        // 34 splits.
        ScanCase::new(Codec::Bf16, (2, 1), 8, &[17_000]).with(|c| (c.schedule, c.layout) = (Schedule::Own, Layout::Contiguous)),
    ] {
        check(lab, &case).unwrap_or_else(|e| panic!("{e}"));
    }
    reduced(lab);
}
