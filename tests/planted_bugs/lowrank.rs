//! Bugs of attend_lowrank.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Dtype, Latents};
use kvlar_tests::Lab;
use kvlar_tests::lowrank::{LowrankCase, Positions, SegmentCase, ValueCase, check};
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

const BUGS: &[Bug] = &[
    bug(
        "heads rebuilt in stored order (no un-reordering)",
        "attend_lowrank/cta.cuh",
        "lowrank.key_basis_seq_stride + (int64_t(unit.head[head]) * p.head_dim + dim) * rank;",
        "lowrank.key_basis_seq_stride + (int64_t(head) * p.head_dim + dim) * rank;",
    ),
    bug("wrong value group", "attend_lowrank/unit.cuh", "value_group = __ldg(entry + 1);", "value_group = key_group;"),
    bug("stale basis", "attend_lowrank/cta.cuh", "    load_bases();\n", "    if (progress.unit % 2 == 0) load_bases();\n"),
    bug("latents rotated by the wrong tile", "attend_lowrank/warp.cuh", "in_a_row ? first : 0", "in_a_row ? rows.row : 0"),
    bug("scattered rows taken as rows in a row", "attend_lowrank/warp.cuh", "in_a_row ? nullptr : positions", "nullptr"),
    bug("swapped RoPE halves", "attend_lowrank/scores.cuh", "fmaf(b0, t.x, a0 * t.y)", "fmaf(b0, t.x, -a0 * t.y)"),
    bug("queries turned forward", "attend_lowrank/turns.cuh", "fmaf(a.x, t.x, b.x * t.y)", "fmaf(a.x, t.x, -b.x * t.y)"),
    bug(
        "latents merged with plain partials",
        "attend_lowrank/cta.cuh",
        "const float own = __ldcg(partial_state(slot, column, phase)).x;",
        "const float own = __ldcg(partial_state(slot, column, 0)).x;",
    ),
    bug("slices counted twice in the sum", "attend_lowrank/cta.cuh", "f < min(phases(), 2)", "f < phases()"),
    bug(
        "queries of other heads not masked",
        "attend_lowrank/scores.cuh",
        "if (head_of(n) != head) q =",
        "if (head_of(n) < 0) q =",
    ),
    bug("exact rows seen by all heads", "attend_lowrank/warp.cuh", "positions, head, at);", "positions, -1, at);"),
    bug("zeros of int8 latents forgotten", "attend_lowrank/scores.cuh", "fmaf(-1024.f, a.x, a.y)", "-1024.f * a.x"),
    bug("zeros of int8 values forgotten", "attend_lowrank/cta.cuh", "column_sum(state.zero[n][e]) - 1024.f", "-1024.f"),
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
        base((64, 64), &[90, 64]).int8(Latents::Int8),
        base((32, 32), &[90, 64]).with(|c| {
            c.segments.insert(0, exact(&[4, 4]));
            c.segments.push(exact(&[20, 3]));
        }),
    ];
    for case in &cases {
        check(lab, case).unwrap_or_else(|e| panic!("{e}"));
    }
}
