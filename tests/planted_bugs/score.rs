//! Bugs of scores by attention: of the pass that finds lse, and of the pass that makes scores.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Pooling, ScoreReduction, ScoredRows};
use kvlar_tests::Lab;
use kvlar_tests::pages::Layout;
use kvlar_tests::score::{ScoreCase, check};

pub const LSE: Suite = Suite { name: "score_lse", by: Compiler::Host, source: SOURCE, bugs: LSE_BUGS, run: short_lse };
pub const SCORES: Suite = Suite { name: "score", by: Compiler::Host, source: SOURCE, bugs: SCORE_BUGS, run: short_scores };

const LSE_BUGS: &[Bug] = &[
    bug("a query sees its next row", "score/lse.cuh", "row > query[b][h])", "row > query[b][h] + 1)"),
    bug(
        "the last row of a block is not looked at",
        "score/lse.cuh",
        "return t + 15 <= lowest && (",
        "return t + 14 <= lowest && (",
    ),
    bug("rows between the parts are seen", "score/lse.cuh", "if (!seen || row", "if (row"),
    bug(
        "a block beyond the sinks is all visible",
        "score/lse.cuh",
        "(t + 15 < head.sink || (t >= head.start && t + 15 < head.end)",
        "(t < head.sink || (t >= head.start && t + 15 < head.end)",
    ),
    bug(
        "the chunk's end is not looked at",
        "score/lse.cuh",
        "(t >= head.start && t + 15 < head.end)",
        "(t >= head.start && t < head.end)",
    ),
    bug("the chunk's run of tiles is left out", "score/lse.cuh", "i < count[1] ? first[1] + i :", "i < 0 ? first[1] + i :"),
    bug("tiles of two runs twice", "score/lse.cuh", "first[i] = max(done, from[i] / rows);", "first[i] = from[i] / rows;"),
    bug("the maximum raised without the sum", "score/lse.cuh", "to.sum *= ptx::ex2_approx(to.top - top);", ""),
    bug("a maximum of some", "score/lse.cuh", "fmaxf(fmaxf(s[0][b][2 * h], s[0][b][2 * h + 1])", "fmaxf(fmaxf(-1e30f, -1e30f)"),
    bug("lanes merged once", "score/lse.cuh", "x = LogSum::merge(x, x.of_lane(2));", ""),
    bug(
        "warps of rows forgotten",
        "score/lse.cuh",
        "for (int w = 0; w < S::kWarps / query_warps; ++w)",
        "for (int w = 0; w < 1; ++w)",
    ),
    bug("parts of the first split", "score/lse.cuh", "__ldcg(parts + s * width + t)", "__ldcg(parts + t)"),
    bug("splits of another unit", "score/lse.cuh", "int64_t(unit) * splits * width", "int64_t(unit) * width"),
    bug("the last split left out", "score/lse.cuh", "for (int s = 0; s < splits; ++s)", "for (int s = 0; s + 1 < splits; ++s)"),
    bug(
        "dropped barrier between tiles",
        "score/lse.cuh",
        "__syncthreads();  // the tile is there, and all warps are done with the one before",
        "__syncwarp();",
    ),
    bug(
        "no wait for a tile",
        "score/lse.cuh",
        "ptx::cp_async_wait<0>();\n      __syncthreads();",
        "ptx::cp_async_wait<1>();\n      __syncthreads();",
    ),
    bug("warps of rows that take the same", "score/lse.cuh", "int n = 16 * row_warp;", "int n = 0;"),
    bug("heads and rows swapped", "score/lse.cuh", "head.query(p, i % group, row)", "head.query(p, row % group, i / group)"),
    bug(
        "queries of no row have an lse",
        "score/lse.cuh",
        "row < head.live || row >= head.live_end ? -INFINITY : x.value()",
        "x.value()",
    ),
    bug("lse in base 2", "score/lse.cuh", "(top + __log2f(sum)) * kLn2", "(top + __log2f(sum))"),
    bug(
        "queries of the next tile",
        "score/lse.cuh",
        "% p.query_tiles) * query_warps * S::kWarpRows, group",
        "% p.query_tiles) * S::kWarpRows, group",
    ),
    bug("seen rows end a row early", "score/lse.cuh", "head.live_end - 1) + 1, head.length)", "head.live_end - 1), head.length)"),
    bug(
        "B fragments of the wrong half",
        "score/tile.cuh",
        "at(lane & 7, 2 * k + (lane >> 3))",
        "at(lane & 7, 2 * k + ((lane >> 3) ^ 1))",
    ),
];

const SCORE_BUGS: &[Bug] = &[
    bug("queries from the start", "score/head.cuh", "p.from_start ? 0 : length - int(p.query_rows)", "0"),
    bug(
        "windows counted from the capacity",
        "score/head.cuh",
        "min(int(p.query_rows), length - first_query)",
        "int(p.query_rows)",
    ),
    bug("the window scores itself", "score/head.cuh", "p.columns == KVLAR_COLUMNS_ALL ? length : own)", "length)"),
    bug("one table for all heads", "score/head.cuh", "+ head * r.table_head_stride", ""),
    bug("one length for all heads", "score/head.cuh", "+ head * r.length_head_stride", ""),
    bug("spans of the first sequence", "score/head.cuh", "p.spans + 3 * seq", "p.spans"),
    bug(
        "a chunk that reaches into the queries' rows",
        "score/head.cuh",
        "min(own - start, int(p.row_count))",
        "int(p.row_count)",
    ),
    bug("the page of the first block", "score/head.cuh", "rows.page1 = page_of(p, rows, 16)", "rows.page1 = page_of(p, rows, 0)"),
    bug("query heads of the first kv head", "score/head.cuh", "+ head * int(p.group) * p.q_head_stride", ""),
    bug("lse of the first kv head", "score/head.cuh", "p.lse + int64_t(unit) * p.group * p.query_rows", "p.lse"),
    bug("scores without their stride", "score/head.cuh", "int64_t(unit) * p.score_stride", "int64_t(unit) * p.row_count"),
    bug(
        "queries that see only some of the rows count for all",
        "score/scores.cuh",
        "lse.y == -INFINITY || q < whole ||",
        "lse.y == -INFINITY || q < head.live ||",
    ),
    bug("padding queries count", "score/scores.cuh", "query >= head.live_end || seen < 0", "seen < 0"),
    bug("a query that saw nothing counts", "score/scores.cuh", "if (shift[e & 1] == INFINITY) s[b][e] = -INFINITY;", ""),
    bug("queries that see a row too early", "score/scores.cuh", "|| seen < 0)", "|| seen < -1)"),
    bug(
        "sums of two lanes",
        "score/scores.cuh",
        "for (int step = 1; step < 4; step *= 2) {",
        "for (int step = 1; step < 2; step *= 2) {",
    ),
    bug(
        "a mean over rows that are not there",
        "score/scores.cuh",
        "float(max(1, head.live_end - head.live))",
        "float(p.query_rows)",
    ),
    bug("a kernel cut off at the borders", "score/scores.cuh", "1.f / float(2 * half + 1)", "1.f / float(to - from)"),
    bug("a pool that begins a row late", "score/scores.cuh", "max(head.first, row - half)", "max(head.first, row - half + 1)"),
    bug("pools beyond the prefix", "score/scores.cuh", "min(head.stop, row + half + 1)", "row + half + 1"),
    bug(
        "rows around a seam left out",
        "score/scores.cuh",
        "from = max(first, out - half), to = min(end, out_end + half);  //",
        "from = out, to = out_end;  //",
    ),
    bug("rows emitted before those around them", "score/scores.cuh", "min(out_end, whole - half)", "min(out_end, whole)"),
    bug("dropped barrier before rows are pooled", "score/scores.cuh", "__syncthreads();  // sums of the tile are there", ""),
    bug(
        "dropped barrier between chunks",
        "score/scores.cuh",
        "__syncthreads();  // this chunk is there, and all are done with the one before",
        "__syncwarp();",
    ),
    bug("chunks in one stage", "score/scores.cuh", "parity ^= 1;", ""),
    bug("the next head's first chunk is this head's", "score/scores.cuh", "issue_queries(same ? g : g + 1,", "issue_queries(g,"),
    bug(
        "chunks that begin too late",
        "score/scores.cuh",
        "tile * S::kRows - head.first_query) & ~7",
        "tile * S::kRows - head.first_query + 8) & ~7",
    ),
    bug(
        "heads that share queries",
        "score/scores.cuh",
        "issue_queries(g, 0, g * int(p.chunk_rows))",
        "issue_queries(0, 0, g * int(p.chunk_rows))",
    ),
    bug("a maximum that begins with 0", "score/scores.cuh", "float score = highest ? nan : 0.f;", "float score = 0.f;"),
    bug("running sums forget", "score/scores.cuh", "fmaf(p.decay, *score, x)", "x"),
    bug("running sums of rows that had none", "score/scores.cuh", "p.accumulate && row < known", "p.accumulate"),
    bug("rows with a score of another head", "score/scores.cuh", " + head.head * p.previous_head_stride", ""),
    bug("nothing behind the rows that are scored", "score/scores.cuh", "head.scores[i] = -INFINITY", "{}"),
    bug("chunks scored from row 0 on", "score/scores.cuh", "head.scores + (row - head.first)", "head.scores + row"),
];

const SOURCE: &str = r#"
#include "score/lse.cuh"
#include "score/scores.cuh"
KVLAR_SCORE_LSE_ENTRY(kvlar_score_lse_bf16_d64, 64, __nv_bfloat16)
GPU_EXPORT(kvlar_score_lse_bf16_d64)
KVLAR_SCORE_ROWS_ENTRY(kvlar_score_rows_bf16_d64, 64, __nv_bfloat16)
GPU_EXPORT(kvlar_score_rows_bf16_d64)
"#;

fn all(lab: &Lab, cases: impl IntoIterator<Item = ScoreCase>) {
    cases.into_iter().for_each(|case| check(lab, &case).unwrap_or_else(|e| panic!("{e}")));
}

/// A short form of the suites. The first pass shows in its lse.
fn short_lse(lab: &Lab) {
    let window = |heads, w, lengths: &[usize]| ScoreCase::window(heads, w, 64, lengths).with(|c| c.lse = true);
    let spans = [[20, 40, 30], [4, 300, 90], [100, 140, 131], [60, 30, 10]];
    let lse = |c: &mut ScoreCase| c.lse = true;
    all(
        lab,
        [
            window((4, 2), 5, &[700, 2, 33]),
            window((2, 1), 30, &[290, 128]).with(|c| c.q_size = 20.0),
            window((3, 1), 70, &[260]).with(|c| c.strided = true),
            ScoreCase::repeat((2, 1), 12, 64, 500, &spans).with(lse),
            ScoreCase::repeat((2, 1), 3, 64, 800, &[[4, 140, 100]]).with(lse),
            ScoreCase::column((2, 1), 64, &[200, 130]).with(lse),
        ],
    );
}

fn short_scores(lab: &Lab) {
    let each = vec![60, 5, 2, 1];
    let max = |c: &mut ScoreCase| (c.shape.over_heads, c.shape.pool) = (ScoreReduction::Max, Pooling::Max(5));
    all(
        lab,
        [
            ScoreCase::window((4, 2), 5, 64, &[410, 20]).with(|c| (c.gap, c.layout) = (2, Layout::PerHead(16))),
            ScoreCase::window((4, 2), 3, 64, &[70, 2, 7, 50]).with(|c| {
                (c.shape.seqs, c.layout) = (2, Layout::PerHead(16));
                max(c);
            }),
            ScoreCase::window((2, 1), 9, 64, &[140, 4]).with(|c| {
                (c.shape.scored, c.shape.over_rows) = (ScoredRows::All, ScoreReduction::Mean);
            }),
            ScoreCase::window((1, 1), 1, 64, &[40])
                .with(|c| (c.shape.given_lse, c.odd_lse, c.odd_keys) = (true, true, vec![(3, f32::NAN)])),
            ScoreCase::window((4, 2), 4, 64, &[70, 9]).with(|c| {
                (c.shape.scored, c.shape.pool, c.shape.accumulate) = (ScoredRows::All, Pooling::None, Some(0.5));
                c.previous = Some(each);
            }),
            ScoreCase::window((5, 1), 107, 64, &[140]).with(|c| c.shape.scored = ScoredRows::All),
            ScoreCase::column((2, 1), 64, &[281, 130]),
            ScoreCase::repeat((2, 1), 12, 64, 200, &[[20, 40, 30], [4, 90, 60]]),
        ],
    );
    // What weights are all less than nothing: a maximum of logits below 0 is none of scores, which a NaN shows.
    all(
        lab,
        [ScoreCase::window((2, 1), 2, 64, &[30]).with(|c| {
            c.odd_keys = vec![(28, f32::NAN)];
            max(c);
        })],
    );
    let cut = ScoreCase::repeat((2, 1), 6, 64, 40, &[[4, 3, 30]]);
    let data = kvlar_tests::score::ScoreData::new(&cut);
    let mut run = kvlar_tests::score::ScoreRun::new(lab, &data);
    run.set_spans(&[[4, 20, 30]]);
    run.enqueue();
    let mut expected = data.clone();
    expected.case.spans = vec![[4, 20, 14]];
    kvlar_tests::score::agrees(&run.result(), &expected.expected(), cut.tolerance()).expect("a chunk that is cut off");
}
