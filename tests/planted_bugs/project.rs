//! Bugs of project and append_lowrank.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Codec, Dtype};
use kvlar_reference::testing::Rng;
use kvlar_tests::Lab;
use kvlar_tests::latents::{AppendLowrankCase as Append, ProjectCase as Project, SideCase, random_groups};

pub const SUITE: Suite = Suite { name: "project", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const SOURCE: &str = r#"
#include "project/bf16.cu"
"#;

const BUGS: &[Bug] = &[
    bug("dropped barrier before places and sums are read", "project/append.cuh", "if (begin) __syncthreads();", ""),
    bug(
        "dropped barrier before ranges are read",
        "project/append.cuh",
        "if (round == passes - 1) __syncthreads();  // all warps' ranges are there",
        "// all warps' ranges are there",
    ),
    bug(
        "members of another group",
        "project/tile.cuh",
        "p.members + int64_t(group) * p.size;",
        "p.members + int64_t(p.groups - 1 - group) * p.size;",
    ),
    bug(
        "members in order",
        "project/tile.cuh",
        "__ldg(members + member) * head_stride",
        "(__ldg(members) / int(p.size) * int(p.size) + member) * head_stride",
    ),
    bug(
        "padding of a latent not zeroed",
        "project/tile.cuh",
        "x[i] = i < offset.count ? z[i / 2][2 * h + i % 2] - offset.of[i] : 0.f;",
        "x[i] = z[i / 2][2 * h + i % 2] - offset.of[i];",
    ),
    bug("codes of padding not zeroed", "project/store.cuh", "first + i < count ? code_of(x[i], a) : 0u;", "code_of(x[i], a);"),
    bug(
        "scale over the padding too (projected, whole rows)",
        "project/append.cuh",
        "if (lane_rank(pass) + i < int(side.projection.rank)) range.widen(x[i]);",
        "range.widen(x[i]);",
    ),
    bug(
        "scale over the padding too (stored rows)",
        "project/store.cuh",
        "if (first + i < count) range.widen(x[i]);",
        "range.widen(x[i]);",
    ),
    bug(
        "k-steps of the encoder swapped",
        "project/tile.cuh",
        "b0[2] = {b[j].x, b[j].y}, b1[2] = {b[j].z, b[j].w};",
        "b0[2] = {b[j].z, b[j].w}, b1[2] = {b[j].x, b[j].y};",
    ),
    bug(
        "tokens off by one",
        "project/tile.cuh",
        "const int index = first + 16 * m + 8 * h + lane.g;",
        "const int index = first + 16 * m + 8 * h + lane.g + (first > 0);",
    ),
    bug(
        "sequence boundary off by one",
        "project/tile.cuh",
        "const int seq = int(uint32_t(index) / rows);",
        "const int seq = int(uint32_t(index + 1) / rows);",
    ),
    bug(
        "sum warps: one slice left out",
        "project/append.cuh",
        "for (int i = 1; i < int(side.projection.sum_warps); ++i) shared.partials.add(z, at.warp + i);",
        "for (int i = 2; i < int(side.projection.sum_warps); ++i) shared.partials.add(z, at.warp + i);",
    ),
    bug("last block of the contraction left out", "project/tile.cuh", "blocks = (width + 31) / 32,", "blocks = width / 32,"),
    bug(
        "ranks of a tile in the order of its columns",
        "project/tile.cuh",
        "first_rank + 8 * (lane.g >> 1) + (lane.g & 1);",
        "first_rank + lane.g;",
    ),
    bug("skipped slots are written", "project/append.cuh", "if (slot < 0) return none;", "if (slot < -2) return none;"),
    bug(
        "rows of a page not wrapped",
        "project/append.cuh",
        "slot & ((1 << p.rows.page_rows_log2) - 1)",
        "slot & ((2 << p.rows.page_rows_log2) - 1)",
    ),
    bug("slot at the capacity taken", "project/append.cuh", "slot >= int(p.rows.max_rows)", "slot > int(p.rows.max_rows)"),
    bug(
        "bad pages of values not seen by keys",
        "project/append.cuh",
        "for (int i = 0; i < 2; ++i)  // a row",
        "for (int i = 0; i < 1; ++i)  // a row",
    ),
    bug("offset added", "project/tile.cuh", "z[i / 2][2 * h + i % 2] - offset.of[i]", "z[i / 2][2 * h + i % 2] + offset.of[i]"),
    bug(
        "positions by every part",
        "project/append.cuh",
        "writes_positions(p, which, cta.group) && cta.part == 0;",
        "writes_positions(p, which, cta.group) && cta.part == 1;",
    ),
    bug(
        "the last part does not wait for the others",
        "project/append.cuh",
        "if (!ptx::arrive_last(side.counters + unit, side.projection.parts)) return;",
        "if (!ptx::arrive_last(side.counters + unit, side.projection.parts - 1)) return;",
    ),
    bug(
        "parts share scratch of a row block",
        "project/append.cuh",
        "unit = cta.group * int(side.projection.row_blocks) + cta.block;",
        "unit = cta.group;",
    ),
    bug(
        "second sweep over the first pass only",
        "project/append.cuh",
        "const int pass = whole_rows ? round % passes : cta.part;",
        "const int pass = whole_rows ? (round < passes ? round : 0) : cta.part;",
    ),
    bug("ranges of earlier passes forgotten", "project/append.cuh", "if (pass > 0) range.widen(of_row);", ""),
    bug("ranges of warps without ranks", "project/append.cuh", "i < with_ranks; ++i", "i < rank_warps; ++i"),
    bug(
        "non-finite values taken as a range",
        "project/store.cuh",
        "low = fabsf(x) < INFINITY ? fminf(low, x) : -INFINITY;",
        "low = fminf(low, x);",
    ),
    bug(
        "tail of an output row written past its end",
        "project/project.cuh",
        "const bool whole = vectors && first + kLaneRanks <= rank;",
        "const bool whole = vectors;",
    ),
    bug("dropped barrier before sums are read", "project/project.cuh", "if (side.sum_warps > 1) __syncthreads();", ""),
    bug(
        "stored rows off by one",
        "project/append.cuh",
        "kAppendWarps<MT> + int(threadIdx.x) / 32;",
        "kAppendWarps<MT> + int(threadIdx.x) / 32 + 1;",
    ),
];

fn project(kv_heads: usize, groups: (usize, usize), rank: usize, above: f32, codec: Codec) -> SideCase {
    let members = random_groups(&mut Rng::new(6), kv_heads, groups.0, groups.1);
    SideCase::Project { members, rank, mean: false, above, codec }
}

fn short_suites(lab: &Lab) {
    let dtype = Dtype::Bf16;
    let rows = |rows, dim, rank| Project::new(dtype, rows, dim, rank);
    Project { groups: (3, 3), ..rows(21, 40, 37) }.check(lab);
    Project { mean: true, ..rows(9, 64, 60) }.check(lab);
    Project { seqs: 3, ..rows(100, 24, 65) }.check(lab);
    let base = |rows, dim, ranks| Append::new(dtype, rows, dim, ranks);
    let ready = |groups, rank, codec| SideCase::Latent { groups, rank, codec };
    for case in [base(17, 64, (40, 33)), base(140, 40, (33, 72))] {
        case.check(lab);
        case.int8().check(lab);
    }
    base(150, 136, (160, 31)).int8().check(lab);
    let slots = Some(vec![39, -1, 0, 17, 40, -5, -1, 31, 32, 3]);
    let scattered = base(5, 64, (40, 64)).with(|c| (c.slots, c.capacity) = (slots, 40));
    scattered.check(lab);
    scattered.clone().int8().with(|c| c.bad_pages = vec![(3, 9), (4, 8), (1, -1)]).check(lab);
    scattered.with(|c| (c.keys, c.values) = (SideCase::None, ready(3, 35, Codec::Int8))).check(lab);
    base(40, 64, (40, 64)).with(|c| (c.value_pages, c.capacity) = (Some(3), 48)).check(lab);
    base(20, 64, (1, 1))
        .with(|c| (c.keys, c.values) = (ready(2, 33, Codec::Int8), ready(2, 300, Codec::Bf16)))
        .with(|c| c.odd = vec![(40, f32::NAN), (700, f32::INFINITY)])
        .check(lab);
    for rows in [3, 140] {
        base(rows, 80, (1, 1))
            .with(|c| c.keys = project(4, (2, 2), 150, -9.0, Codec::Int8))
            .with(|c| c.values = project(4, (2, 2), 40, 9.0, Codec::Int8))
            .check(lab);
        let odd = vec![(5 * 64 + 3, f32::NAN), (rows * 64 + 7, f32::INFINITY)];
        base(rows.max(6), 64, (40, 33)).with(|c| c.odd = odd).check(lab);
    }
    base(40, 64, (1, 1))
        .with(|c| (c.kv_heads, c.launches) = (8, 2))
        .with(|c| (c.keys, c.values) = (project(8, (2, 4), 130, 0.0, Codec::Int8), project(8, (1, 8), 200, 0.0, Codec::Int8)))
        .check(lab);
}
