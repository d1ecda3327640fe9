//! Bugs of attend_lowrank.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Dtype, Latents, Schedule};
use kvlar_tests::Lab;
use kvlar_tests::lowrank::{LowrankCase, LowrankData, LowrankRun, Positions, SegmentCase, ValueCase, check};
use kvlar_tests::pages::Layout;

pub const SUITE: Suite = Suite { name: "lowrank", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const SOURCE: &str = r#"
#include "attend_lowrank/cta.cuh"
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_v128_n8, __nv_bfloat16, 1, 128, KVLAR_LATENT_DTYPE)
GPU_EXPORT(kvlar_attend_lowrank_bf16_v128_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_int8_v256_n8, __nv_bfloat16, 1, 256, KVLAR_LATENT_INT8)
GPU_EXPORT(kvlar_attend_lowrank_bf16_int8_v256_n8)
#include "attend_lowrank/schedule.cu"
"#;

const BASES: &str = "attend_lowrank/bases.cuh";
const STATES: &str = "attend/split_states.cuh";
const MERGE: &str = "attend_lowrank/merge.cuh";
const UNIT: &str = "attend_lowrank/unit.cuh";

const BUGS: &[Bug] = &[
    bug(
        "heads rebuilt in stored order (no un-reordering)",
        BASES,
        "int64_t(unit.head[row.head]) * p.attend.head_dim",
        "int64_t(row.head) * p.attend.head_dim",
    ),
    bug("wrong value group", "attend_lowrank/unit.cuh", "value_group = __ldg(entry + 1);", "value_group = key_group;"),
    bug(
        "stale basis",
        "attend_lowrank/cta.cuh",
        "    bases.load(warps());\n",
        "    if (progress.work.index % 2 == 0) bases.load(warps());\n",
    ),
    bug("latents rotated by the wrong tile", "attend_lowrank/warp.cuh", "in_a_row ? first : 0", "in_a_row ? rows.row : 0"),
    bug("scattered rows taken as rows in a row", "attend_lowrank/warp.cuh", "in_a_row ? nullptr : positions", "nullptr"),
    bug("swapped RoPE halves", "attend_lowrank/scores.cuh", "fmaf(b0, t.x, a0 * t.y)", "fmaf(b0, t.x, -a0 * t.y)"),
    bug("queries turned forward", "attend_lowrank/turns.cuh", "fmaf(a.x, t.x, b.x * t.y)", "fmaf(a.x, t.x, -b.x * t.y)"),
    bug(
        "latents merged with plain partials",
        MERGE,
        "factors() + phase * kSplitsAtOnce * kColumns + column",
        "factors() + column",
    ),
    bug("slices counted twice in the sum", MERGE, "if (i % each > 1) state.y = 0.f;", ""),
    bug(
        "queries of other heads not masked",
        "attend_lowrank/scores.cuh",
        "if (head_of(n) != head) q =",
        "if (head_of(n) < 0) q =",
    ),
    bug("exact rows seen by all heads", "attend_lowrank/warp.cuh", "positions, head, at);", "positions, -1, at);"),
    bug("zeros of int8 latents forgotten", "attend_lowrank/scores.cuh", "fmaf(-1024.f, a.x, a.y)", "-1024.f * a.x"),
    bug("zeros of int8 values forgotten", MERGE, "column_sum(state.zero[n][e]) - 1024.f", "-1024.f"),
    bug("mean forgotten", "attend_lowrank/scores.cuh", "if (!kAffine && p.key_mean)", "if (kAffine && p.key_mean)"),
    bug("int8 basis words out of order", "attend_lowrank/rebuild.cuh", "return i < 4 ? 2 * i : 2 * (i - 4) + 1;", "return i;"),
    bug(
        "a stage is overwritten while it is read",
        "attend_lowrank/warp.cuh",
        "issue(coming, stage ^ 1, next);",
        "issue(coming, stage, next);",
    ),
    bug("dropped wait", "attend_lowrank/warp.cuh", "      ptx::cp_async_wait<0>();\n      __syncwarp();", "      __syncwarp();"),
    bug(
        "dropped barrier before the rings become scratch",
        "attend_lowrank/cta.cuh",
        "__syncthreads();  // all rings are drained",
        "// all rings are drained",
    ),
    bug(
        "dropped barrier behind the angles",
        "attend_lowrank/scores.cuh",
        "angles[i] = turn_of(p.rope, i, position);\n    __syncwarp();",
        "angles[i] = turn_of(p.rope, i, position);",
    ),
    bug(
        "a head's own length ignored",
        "attend_lowrank/columns.cuh",
        "row + r >= u.length[segment][head]",
        "row + r >= u.longest[segment]",
    ),
    bug("bases of the first head", BASES, "head = group / groups;", "head = 0;"),
    bug("pairs of the first group", BASES, "group % groups * kGroupPairs", "0 * group * kGroupPairs"),
    bug("halves of a pair swapped", BASES, "i / kGroupPairs % 2", "1 - i / kGroupPairs % 2"),
    bug(
        "rows of a lane next to one another",
        BASES,
        "const Row row(p, first + 32 / kLanesARow * j);",
        "const Row row(p, first + j);",
    ),
    bug("ranks beyond a request", BASES, "part < parts; part += kLanesARow", "part < min(parts, kLanesARow); part += kLanesARow"),
    bug("rows that pad are not 0", BASES, "exists[j] ? words[i] : 0u", "exists[j] ? words[i] : ~0u"),
    bug("halves of 32 bytes swapped", BASES, "layout.at(row, 2 * part + h)", "layout.at(row, 2 * part + 1 - h)"),
    bug(
        "words of int8 bases as they came",
        BASES,
        "make_uint4(words[Latents::basis_word(4 * h)], words[Latents::basis_word(4 * h + 1)], words[Latents::basis_word(4 * h + 2)],",
        "make_uint4(words[4 * h], words[4 * h + 1], words[4 * h + 2],",
    ),
    bug("sums of a basis row without its last lanes", BASES, "step < kLanesARow; step *= 2", "step < kLanesARow / 2; step *= 2"),
    bug("sums of other rows", BASES, "[first + 32 / kLanesARow * j] = sum[j]", "[first + j] = sum[j]"),
    bug("sums of every other element", BASES, "sum += two.x + two.y;", "sum += two.x;"),
    bug("means of the first head", BASES, "p.key_mean + int64_t(head) * p.attend.head_dim", "p.key_mean"),
    bug(
        "four int8 values of a lane in another order",
        MERGE,
        "state.o[i][n][e + 2] + shift, state.o[i + 1][n][e] + shift",
        "state.o[i + 1][n][e] + shift, state.o[i][n][e + 2] + shift",
    ),
    bug(
        "partial results of a slice at the first",
        MERGE,
        "partial(slot, column) + first + dim), x",
        "partial(slot, column) + dim), x",
    ),
    bug(
        "phases without rows leave what was there",
        "attend_lowrank/cta.cuh",
        "return merge.skip(slot(), progress.phase);",
        "return;",
    ),
    bug(
        "the next phase begins too early",
        "attend_lowrank/cta.cuh",
        "__syncthreads();  // scratch is free again, and the phase known to all\n",
        "",
    ),
    bug("states beyond the first 32", STATES, "first < count; first += 32", "first < min(count, 32); first += 32"),
    bug("states of the first 32 again", STATES, "if (first > 0) own = state_of(first + lane);", ""),
    bug("tops of the first 32 states", STATES, "i < count; i += 32) top", "i < min(count, 32); i += 32) top"),
    bug("the top of one lane", STATES, "step < 32; step *= 2) top = fmaxf", "step < 1; step *= 2) top = fmaxf"),
    bug("sums not rescaled to the column's top", STATES, "ptx::ex2_approx(own.x - top);", "1.f;"),
    bug("the sum of one lane", STATES, "i < eight + 8; ++i)", "i < eight + 1; ++i)"),
    bug("eight states of each 32", STATES, "eight < min(32, count - first)", "eight < 1"),
    bug(
        "splits beyond the first 32",
        MERGE,
        "first < share.splits; first += kSplitsAtOnce",
        "first < min(share.splits, kSplitsAtOnce); first += kSplitsAtOnce",
    ),
    bug(
        "factors of the first 32 splits",
        MERGE,
        "split = first + i / kColumns % kSplitsAtOnce",
        "split = i / kColumns % kSplitsAtOnce",
    ),
    bug("partial results of the first 32 splits", MERGE, "slot_of_split(share, first + s + j)", "slot_of_split(share, s + j)"),
    bug(
        "the last splits alone",
        MERGE,
        "float4 x = first == 0 ? make_float4(0.f, 0.f, 0.f, 0.f) : sum;",
        "float4 x = make_float4(0.f, 0.f, 0.f, 0.f);",
    ),
    bug(
        "sums that begin with what was there",
        MERGE,
        "float4 x = first == 0 ? make_float4(0.f, 0.f, 0.f, 0.f) : sum;",
        "float4 x = sum;",
    ),
    bug(
        "parts that there are not",
        MERGE,
        "top > attend::kFloor ? ptx::ex2_approx(top - merged_state(column)->x) : -1.f",
        "ptx::ex2_approx(top - merged_state(column)->x)",
    ),
    bug(
        "splits beyond the first eight of 32",
        MERGE,
        "s < count; s += kLoadsAtOnce",
        "s < min(count, kLoadsAtOnce); s += kLoadsAtOnce",
    ),
    bug(
        "dropped barrier before factors",
        MERGE,
        "      __syncthreads();  // states, or: the factors before these are not needed any more\n",
        "",
    ),
    bug(
        "dropped barrier before the factors of more splits",
        MERGE,
        "      __syncthreads();  // states, or: the factors before these are not needed any more\n",
        "      if (first == 0) __syncthreads();\n",
    ),
    bug(
        "dropped barrier behind factors",
        MERGE,
        "load_factors(share, first);\n      __syncthreads();",
        "load_factors(share, first);",
    ),
    bug(
        "dropped barrier between merging and expansion",
        "attend_lowrank/cta.cuh",
        "merge.merge_splits(share);\n      __syncthreads();",
        "merge.merge_splits(share);",
    ),
    bug("the first four dims twice", MERGE, "dim = first % dv + lane / 16 * 4", "dim = first % dv"),
    bug("columns that there are not", MERGE, "if (own >= end) continue;", ""),
    bug("one basis row for four dims", MERGE, "basis + i * rank", "basis"),
    bug("ranks beyond the first 128", MERGE, "r < rank; r += 8 * 16", "r < min(rank, 8 * 16); r += 8 * 16"),
    bug("latents of the lower four", MERGE, "b[i].z, high.x, high.y", "b[i].z, low.x, low.y"),
    bug("the other half kept", MERGE, "(upper ? x[k + kHalf] : x[k]) + other", "(upper ? x[k] : x[k + kHalf]) + other"),
    bug("the half kept is sent", MERGE, "upper ? x[k] : x[k + kHalf], kHalf", "upper ? x[k + kHalf] : x[k], kHalf"),
    bug("halves of four not added", MERGE, "    share_halves<2>(x, part);\n", ""),
    bug("as many latent tiles as exact ones", UNIT, "u.latent_tiles = visible.latent;", "u.latent_tiles = visible.exact;"),
    bug("tiles of the first segment", UNIT, "= visible.tiles[s];", "= visible.tiles[0];"),
    bug("tiles from the first on", UNIT, "= visible.first[s];", "= 0;"),
    bug("the highest query for the lowest", UNIT, "= visible.lowest_query;", "= visible.highest_query;"),
    bug("the longest head for the shortest", UNIT, "u.shortest[s] = shortest;", "u.shortest[s] = longest;"),
    bug("the shortest head for the longest", UNIT, "u.longest[s] = longest;", "u.longest[s] = shortest;"),
    bug("rows of the first head", UNIT, "of_column = rows.of_lane(h)", "of_column = rows.of_lane(0)"),
    bug("columns of the first head", UNIT, "__shfl_sync(0xffffffffu, own_head, h)", "__shfl_sync(0xffffffffu, own_head, 0)"),
];

fn short_suites(lab: &Lab) {
    let base = |ranks, lengths: &[usize]| LowrankCase::new(Dtype::Bf16, (4, 4), 2, 64, ranks, lengths);
    let exact = |lengths: &[usize]| SegmentCase {
        latent: false,
        layout: Layout::Hnd(16),
        capacity: 32,
        lengths: lengths.to_vec(),
        positions: Positions::Index,
    };
    let cases = [
        base((64, 32), &[300, 45]),
        base((32, 64), &[70, 9]).with(|c| {
            c.group_k = vec![1, 0, 0, 1];
            c.values = ValueCase::Latent { group: vec![0, 1, 1, 0], rank: 64, int8: false };
        }),
        base((96, 288), &[100, 400]).int8(Latents::Int8).with(|c| c.query_rows = 2),
        base((32, 32), &[80, 80]).with(|c| {
            c.segments[0].lengths = vec![80, 33, 1, 0, 16, 70, 40, 65];
            (c.mean, c.q_positions) = (true, Some(0));
        }),
        base((32, 32), &[150, 90]).with(|c| c.segments[0].positions = Positions::Gaps(5)),
        base((32, 32), &[150, 90]).with(|c| c.segments[0].positions = Positions::From(500)),
        base((64, 64), &[90, 64]).int8(Latents::Int8).with(|c| c.query_rows = 2),
        base((160, 32), &[50, 9]).with(|c| (c.head_dim, c.window) = (80, 12)),
        base((32, 32), &[80, 80]).with(|c| c.segments[0].lengths = vec![80, 33, 1, 0, 16, 70, 40, 65]),
        base((32, 32), &[90, 64]).with(|c| {
            c.segments.insert(0, exact(&[4, 4]));
            c.segments.push(exact(&[20, 3]));
        }),
        // 35 splits, the first 34 of them of exact rows.
        LowrankCase::new(Dtype::Bf16, (8, 8), 8, 32, (32, 32), &[40]).with(|c| {
            c.segments.insert(0, SegmentCase { capacity: 1100, ..exact(&[1100]) });
            c.schedule = Schedule::Own;
        }),
        // Likewise; a window hides all of the exact rows, whose states have no top.
        LowrankCase::new(Dtype::Bf16, (8, 8), 8, 32, (32, 32), &[40]).with(|c| {
            c.segments[0].positions = Positions::From(5000);
            c.segments.insert(0, SegmentCase { capacity: 1100, ..exact(&[1100]) });
            (c.schedule, c.window) = (Schedule::Own, 60);
        }),
    ];
    for case in &cases {
        check(lab, case).unwrap_or_else(|e| panic!("{e}"));
    }
    // What a launch left in the workspace, infinities among it, is no part of the next one's, which has no latent rows.
    let broken = base((32, 32), &[90, 64]).with(|c| {
        c.segments.push(exact(&[20, 3]));
        c.broken = true;
    });
    let data = LowrankData::new(&broken);
    let [mut used, mut fresh] = [(); 2].map(|()| LowrankRun::new(lab, &data));
    used.enqueue();
    for run in [&mut used, &mut fresh] {
        run.set_lengths(0, &[0; 8]);
        run.enqueue();
    }
    assert_eq!(used.result(), fresh.result());
}
