//! Bugs of attend, append, encode and merge.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Codec, Dtype, MergeShape, RopeLayout, Schedule};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{Rope, RopeScaling, Yarn, compare};
use kvlar_tests::Lab;
use kvlar_tests::append::AppendCase;
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun, SegmentCase, check};
use kvlar_tests::pages::Layout;

pub const SUITE: Suite = Suite { name: "dense", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const STATES: &str = "attend/split_states.cuh";
const COLUMNS: &str = "attend/columns.cuh";

const BUGS: &[Bug] = &[
    bug(
        "dropped barrier before the rings become scratch",
        "attend/attend.cuh",
        "__syncthreads();  // all rings are drained",
        "// all rings are drained",
    ),
    bug(
        "dropped barrier after the unit is loaded",
        "attend/attend.cuh",
        "shared.begin(p, t);\n    __syncthreads();",
        "shared.begin(p, t);",
    ),
    bug(
        "wrong GQA map",
        "attend/columns.cuh",
        "head = (shared.unit().head - row) * int(p.group) + i;",
        "head = (i - row * int(p.group)) * int(p.kv_heads) + shared.unit().head;",
    ),
    bug(
        "swapped RoPE halves",
        "device/rope.cuh",
        "second ? __fmul_rn(partner[j], sin) : -__fmul_rn(partner[j], sin)",
        "second ? -__fmul_rn(partner[j], sin) : __fmul_rn(partner[j], sin)",
    ),
    bug("interleaved pairs taken as halves", "device/rope.cuh", ": i ^ 1, pair", ": (i >= half ? i - half : i + half), pair"),
    bug("off-by-one page", "attend/columns.cuh", "table, rows.row + 16 * b) : 0;", "table, max(0, rows.row + 16 * b - 1)) : 0;"),
    bug(
        "rows of a page not wrapped",
        "append/append.cuh",
        "slot & ((1 << p.rows.page_rows_log2) - 1)",
        "slot & ((2 << p.rows.page_rows_log2) - 1)",
    ),
    bug("missing rescale of the output", "attend/state.cuh", "o[i][n][e] *= factor;", ""),
    bug("missing rescale of the sum", "attend/state.cuh", "sum[n][e] *= factor;", ""),
    bug(
        "splits merged with another split's state",
        "attend/attend.cuh",
        "from[j] = __ldcg(partial_state(slot, column));",
        "from[j] = __ldcg(partial_state(list.slot_of_split(share, max(0, share.splits - 1 - first - j)), column));",
    ),
    bug("partial results share a slot", "attend/schedule.cuh", "(first_cell(first) < unit.first_cell ? 1 : 0)", "0"),
    bug("counter not left at zero", "device/ptx.cuh", "if (last) __stcg(counter, 0u);", ""),
    bug("lse in the wrong base", "attend/attend.cuh", "(top + __log2f(sum)) * kLn2", "top * kLn2 + __log2f(sum)"),
    bug("window off by one", "attend/columns.cuh", "query - position >= p.window)", "query - position > p.window)"),
    bug("causal mask off by one", "attend/columns.cuh", "position > query ||", "position >= query ||"),
    bug("one row too many", "attend/columns.cuh", "return r >= valid ||", "return r > valid ||"),
    bug(
        "a stage is read before it landed",
        "attend/columns.cuh",
        "if (stages == 3) ptx::cp_async_wait<1>(); else",
        "if (stages == 3) ptx::cp_async_wait<2>(); else",
    ),
    bug("a stage is overwritten while it is read", "attend/columns.cuh", "to = to + 1 == stages ? 0 : to + 1;", "to = stage;"),
    bug(
        "codes truncated",
        "device/affine.cuh",
        "rintf(__fdiv_rn(__fsub_rn(x, a.zero), a.scale))",
        "truncf(__fdiv_rn(__fsub_rn(x, a.zero), a.scale))",
    ),
    bug(
        "sink logit in the wrong base",
        "attend/attend.cuh",
        "__ldg(p.sink_logits + head) * kLog2E",
        "__ldg(p.sink_logits + head)",
    ),
    bug(
        "soft-cap not returned to base 2",
        "attend/state.cuh",
        "soft_cap(s[b][n][e], p.softcap) * kLog2E",
        "soft_cap(s[b][n][e], p.softcap)",
    ),
    bug(
        "tile bound ignores the window's lower end",
        "attend/unit.cuh",
        "u.lowest_query - p.window + 1",
        "u.highest_query - p.window + 1",
    ),
    bug("skipped slots are written", "append/append.cuh", "if (slot < 0) return;", "if (slot < -2) return;"),
    bug(
        "dropped warp barrier between rotation and rows",
        "append/append.cuh",
        "to[1] = make_float4(x[4], x[5], x[6], x[7]);\n  __syncwarp();",
        "to[1] = make_float4(x[4], x[5], x[6], x[7]);",
    ),
    bug("merge keeps vanished parts", "merge/merge.cu", "if (lse == -INFINITY) continue;", ""),
    bug(
        "angles of halves for interleaved pairs",
        "device/rope.cuh",
        "pair = split ? min(i, other) : i / 2",
        "pair = min(i, other)",
    ),
    bug("dims beyond the rotary ones scaled", "device/rope.cuh", "x[j] = i < rotary ? turned : x[j];", "x[j] = turned;"),
    bug("sines without the factor", "device/rope.cuh", "sin = __fmul_rn(sin, rope.attention_factor);", ""),
    bug(
        "keys at the positions of the first sequence",
        "append/append.cuh",
        "p.positions + int64_t(seq) * p.new_rows + row",
        "p.positions + row",
    ),
    bug(
        "a row a CTA whatever is shared",
        "append/append.cuh",
        "const bool shared = p.key_format",
        "const bool shared = true || p.key_format",
    ),
    bug(
        "splits beyond the first eight",
        "attend/attend.cuh",
        "first < share.splits; first += kAtOnce",
        "first < min(share.splits, kAtOnce); first += kAtOnce",
    ),
    bug(
        "the last split counted again",
        "attend/attend.cuh",
        "if (first + j < share.splits) add_scaled(x, ptx",
        "add_scaled(x, ptx",
    ),
    bug("states of splits beyond the first 32", STATES, "first < count; first += 32", "first < min(count, 32); first += 32"),
    bug("states of the first 32 splits again", STATES, "if (first > 0) own = state_of(first + lane);", ""),
    bug("the last split's state again", STATES, "i < count ? load(i) : make_float2(kFloor, 0.f)", "load(min(i, count - 1))"),
    bug("the top of one split", STATES, "step < 32; step *= 2) top = fmaxf", "step < 1; step *= 2) top = fmaxf"),
    bug("splits' sums not rescaled", STATES, "ptx::ex2_approx(own.x - top);", "1.f;"),
    bug("the sum of one split", STATES, "i < eight + 8; ++i)", "i < eight + 1; ++i)"),
    bug("eight splits of each 32", STATES, "eight < min(32, count - first)", "eight < 1"),
    bug("the first query row for all", "attend/unit.cuh", "p.query_rows == 1 ? 0", "true ? 0"),
    bug("the first query tile for all", "attend/unit.cuh", "p.query_tiles == 1 ? index :", "true ? index :"),
    bug("a tile too high", "attend/unit.cuh", "row >> (31 - __clz(tile_rows))", "row >> (32 - __clz(tile_rows))"),
    bug(
        "the next unit before the last cell of this one",
        "attend/work_list.cuh",
        "index = at.index + (cell >= at.of.splits.end_cell);",
        "index = at.index + (cell >= at.of.splits.end_cell - 1);",
    ),
    bug("cells of the unit behind", "attend/work_list.cuh", "min(at.cell_end, at.of.splits.end_cell)", "at.cell_end"),
    bug("a CTA begins a unit too early", "attend/schedule.cuh", "record.index = low;", "record.index = max(low - 1, 0);"),
    bug("a CTA's first split is the unit's", "attend/work_list.cuh", "int(blockIdx.x) - (unit.slot >> 1)", "0"),
    bug("a slot too far", "attend/work_list.cuh", "(s.slot & ~1) + 2 * split", "s.slot + 2 * split"),
    bug("no partial results counted", "attend/schedule.cuh", "cta_of_cell(unit.end_cell - 1) - first + 1", "1"),
    bug(
        "CTAs without work take a unit",
        "attend/schedule.cuh",
        "busy ? all.first_cell(c + 1) : 0",
        "busy ? all.first_cell(c + 1) : 1",
    ),
    bug(
        "the last split is the whole unit's",
        "attend/schedule.cuh",
        "splits.count = splits.end_cell - splits.first_cell",
        "splits.count = 1",
    ),
    bug("the only query sees all rows", COLUMNS, "? shared.unit().lowest_query", "? kMaskedColumn"),
    bug(
        "records not awaited by the lanes that find rows",
        COLUMNS,
        "    if (t >= 32) return;\n    __syncwarp();",
        "    if (t >= 32) return;",
    ),
    bug("rows of the first segment", COLUMNS, "const KvlarSegment& s = p.segments[t];", "const KvlarSegment& s = p.segments[0];"),
    bug(
        "dropped barrier before the next unit is read",
        "attend/work_list.cuh",
        "__syncthreads();\n  if (!more) return false;",
        "if (!more) return false;",
    ),
    bug(
        "dropped barrier before the next unit",
        "attend/attend.cuh",
        "__syncthreads();  // scratch is free, and the unit known",
        "// scratch is free, and the unit known",
    ),
    bug("one split's sum in all", STATES, "own.y, i), sum)", "own.y, 0), sum)"),
    bug(
        "states of the first column",
        "attend/attend.cuh",
        "const float top = merged[column].x;",
        "const float top = merged[0].x;",
    ),
    bug(
        "dropped barrier behind the states of columns",
        "attend/attend.cuh",
        "merge_columns(merged, share, columns);\n    __syncthreads();",
        "merge_columns(merged, share, columns);",
    ),
];

/// What the short suites need, in one translation unit.
const SOURCE: &str = r#"
#include "attend/attend.cuh"
#include "attend/warp.cuh"
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d64_n8, kvlar::attend::WarpAttend<64, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_bf16_d64_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d64_n16, kvlar::attend::WarpAttend<64, 2, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_bf16_d64_n16)
#include "attend/schedule.cu"
#include "append/append.cu"
#include "encode/encode.cu"
#include "merge/merge.cu"
"#;

/// A short form of the suites, within what [`SOURCE`] holds.
fn short_suites(lab: &Lab) {
    let base = |lengths: &[usize]| AttendCase::new(Dtype::Bf16, (4, 2), 64, lengths);
    let cases = [
        base(&[37, 5, 64]),
        base(&[70, 129]).with(|c| (c.q_heads, c.kv_heads) = (6, 3)),
        base(&[85, 33]).with(|c| (c.query_rows, c.window) = (3, 20)),
        base(&[60, 100]).with(|c| {
            (c.window, c.query_rows, c.q_positions) = (7, 2, true);
            (c.segments[0].positions, c.segments[0].layout) = (true, Layout::PerHead(16));
        }),
        base(&[500, 20, 0]).with(|c| c.sinks = true),
        base(&[40]).with(|c| c.window = 20),
        base(&[3000]).with(|c| (c.q_size, c.query_rows) = (40.0, 3)),
        base(&[50, 30]).with(|c| c.softcap = 5.0),
        base(&[40, 70]).with(|c| c.query_rows = 10), // two query tiles
        base(&[400, 90]).with(|c| c.schedule = Schedule::Own).with(|c| c.segments[0].capacity = 700),
        // 34 splits.
        AttendCase::new(Dtype::Bf16, (2, 1), 8, &[17_000])
            .with(|c| (c.schedule, c.segments[0].layout) = (Schedule::Own, Layout::Contiguous)),
        base(&[0, 0]).with(|c| {
            let segment =
                |codec, layout, lengths: [usize; 2]| SegmentCase { capacity: 96, ..SegmentCase::new(codec, layout, &lengths) };
            c.segments = vec![
                segment(Codec::Bf16, Layout::Contiguous, [4, 4]),
                segment(Codec::Bf16, Layout::Hnd(32), [90, 33]),
                segment(Codec::Bf16, Layout::Nhd(16), [17, 1]),
            ];
        }),
    ];
    for case in &cases {
        check(lab, case).unwrap_or_else(|e| panic!("{e}"));
    }
    // Twice through one workspace: counters must be as they were. Also with more CTAs than tiles.
    let few = |rows| AttendCase::new(Dtype::Bf16, (2, 1), 64, &[rows]).with(|c| c.segments[0].capacity = 900);
    for case in [base(&[600, 50]), few(70), few(130)] {
        let data = AttendData::new(&case);
        let mut run = AttendRun::new(lab, &data);
        run.enqueue();
        let first = run.result();
        assert!(run.counters().iter().all(|&x| x == 0), "counters");
        run.poison();
        run.enqueue();
        assert_eq!(first, run.result(), "two runs differ");
    }
    for codec in [Codec::Bf16, Codec::Int8] {
        AppendCase { slots: Some(vec![39, -1, 0, 17, 16, -1, -1, 31, 32, 3]), ..AppendCase::new(Dtype::Bf16, codec, 64) }
            .check(lab);
        for scaling in [RopeScaling::None, RopeScaling::Yarn(Yarn::new(4.0, 4096.0))] {
            let rope = Rope::new(10000.0, 48, RopeLayout::Interleaved, scaling);
            AppendCase { rope, ..AppendCase::new(Dtype::F16, codec, 64) }.check(lab);
        }
    }
    let (n, rows, dim) = (3, 2, 64);
    let mut rng = Rng::new(2);
    let mut parts = rng.normals(n * rows * dim, 1.0);
    let mut lse = rng.normals(n * rows, 3.0);
    lse[2] = f32::NEG_INFINITY;
    parts[2 * dim..3 * dim].fill(f32::NAN);
    let (p, l) = (lab.upload(&parts), lab.upload(&lse));
    let (mut out, mut merged) = (lab.poisoned(4 * rows * dim), lab.poisoned(4 * rows));
    let plan = MergeShape { parts: n, rows, dim }.plan(&lab.device).expect("a plan");
    plan.launch(&lab.stream, p.view(), l.view(), &mut out.view_mut(), &mut merged.view_mut()).expect("merge");
    let expected = kvlar_reference::merge(&parts, &lse, n, rows, dim).expect("a case");
    compare::compare(&lab.download::<f32>(&out), &expected.0, Tolerance::merge()).unwrap_or_else(|e| panic!("{e}"));
}
