//! Bugs of topk.

use super::{Bug, Compiler, Suite, bug};
use kvlar::TopkShape;
use kvlar_tests::Lab;
use kvlar_tests::select::TopkCase;

pub const SUITE: Suite = Suite { name: "select", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const SUMS: &str = "device/scan.cuh";

const BUGS: &[Bug] = &[
    bug("ties go to the higher index", "select/order.cuh", "uint32_t(~index)", "index"),
    bug("a tie too many", "select/row.cuh", "(ties >> lane & 1) && rank == need", "(ties >> lane & 1) && rank == need + 1"),
    bug("ties counted from the wrong lane", "select/row.cuh", "(2u << lane) - 1", "(1u << lane) - 1"),
    bug("sums of this warp, too", SUMS, "lane < warp ? warp_sums[lane]", "lane <= warp ? warp_sums[lane]"),
    bug("sums of first lanes", SUMS, "if (lane == 31) warp_sums[warp]", "if (lane == 0) warp_sums[warp]"),
    bug("lanes' sums of half of the warp", SUMS, "step *= 2) {\n", "step *= 4) {\n"),
    bug(
        "dropped barrier before the sums of warps",
        SUMS,
        "= value;\n  __syncthreads();\n  const T before",
        "= value;\n  const T before",
    ),
    bug(
        "ties of earlier warps forgotten",
        "select/row.cuh",
        "int before = sum_of_warps_before<kThreads>(own, shared.warp_sums);",
        "int before = 0 * sum_of_warps_before<kThreads>(own, shared.warp_sums);",
    ),
    bug("bins of the digit before", "select/order.cuh", "shared.bins[i] = 0;", "shared.bins[i] &= 1;"),
    bug("digits of keys that differ above them", "select/row.cuh", "key >> known == prefix >> known", "true"),
    bug("bins from below", "select/order.cuh", "kBins - 1 - 2 * int(threadIdx.x)", "1 + 2 * int(threadIdx.x)"),
    bug("a bin too early", "select/order.cuh", "need <= before + high;", "need < before + high;"),
    bug("keys above the bin kept twice", "select/row.cuh", "left -= shared.above;", ""),
    bug(
        "dropped barrier before bins are read",
        "select/row.cuh",
        "      __syncthreads();\n    }\n    find_bin(shared, left);",
        "    }\n    find_bin(shared, left);",
    ),
    bug(
        "dropped barrier after bins are cleared",
        "select/order.cuh",
        "shared.bins[i] = 0;\n  __syncthreads();",
        "shared.bins[i] = 0;",
    ),
    bug("NaN above all", "device/order.cuh", "if (x != x) return 0;", ""),
    bug("-0 below 0", "device/order.cuh", "x == 0.f ? 0u : __float_as_uint(x)", "__float_as_uint(x)"),
    bug(
        "recent rows of the capacity",
        "select/order.cuh",
        "max(first, length - int(p.recent_rows))",
        "max(first, int(p.row_count) - int(p.recent_rows))",
    ),
    bug("rows that are always kept do not count", "select/topk.cu", "wanted(p, row) - forced", "wanted(p, row)"),
    bug(
        "k above the most",
        "select/order.cuh",
        "min(int(__ldg(p.ks + set * p.k_stride)), int(p.k))",
        "int(__ldg(p.ks + set * p.k_stride))",
    ),
    bug("one k for all", "select/order.cuh", "p.ks + set * p.k_stride", "p.ks"),
    bug(
        "rows of the wrong score stride",
        "select/order.cuh",
        "p.scores + at * p.score_stride",
        "p.scores + at * int(p.row_count)",
    ),
    bug("nothing behind the rows kept", "select/order.cuh", "p.selected[int64_t(row) * p.k + i] = -1;", "{}"),
    bug("rows listed over those of earlier warps", "select/order.cuh", "out[before + __popc(", "out[__popc("),
    bug("candidates in each other's slots", "select/set.cu", "to + __popc(all & ((1u << lane) - 1))", "to"),
    bug(
        "the digit above not taken off",
        "select/set.cu",
        "uint32_t(min(need, all)) - shared.above,",
        "uint32_t(min(need, all)),",
    ),
    bug(
        "the last part left out",
        "select/set.cu",
        "int(blockIdx.x % p.parts + 1) * kPart",
        "int(blockIdx.x % p.parts) * kPart + kPart / 2",
    ),
    bug("rows of a set that share indices", "select/order.cuh", "before = member * p.row_count;", "before = 0;"),
    bug("digits that overlap", "select/set.cu", "    known = shift;\n", ""),
    bug("strict keeps the score itself", "select/set.cu", "((prefix >> 32) + 1) << 32", "(prefix >> 32) << 32"),
    bug("bins left behind", "select/set.cu", "bins[i] = 0;\n}\nGPU_EXPORT(kvlar_topk_cut)", "{}\n}\nGPU_EXPORT(kvlar_topk_cut)"),
    bug("candidates left behind", "select/set.cu", "p.found[part.set] = 0;", "{}"),
    bug("the cut of another set", "select/set.cu", ": row / int(p.members)", ": row % int(p.members)"),
    bug("floors compete", "select/set.cu", " && scores.place(free, j) < scores.below", ""),
    bug("floors counted among the others", "select/set.cu", "free.before + uint32_t(i)) < below)", "0) <= kNone)"),
    bug("floors do not count", "select/set.cu", "max(0, free.count() - int(p.floor))", "free.count()"),
    bug(
        "the cut of all over floors",
        "select/set.cu",
        "min(uint64_t(cut), p.floor ? floor_cut(p, part.set * cuts + m) : kNone)",
        "cut",
    ),
    bug("a floor's tie in another row", "select/row.cuh", "free.before + uint32_t(find_tie", "uint32_t(find_tie"),
    bug("sinks counted by a histogram", "select/order.cuh", "atomicSub(shared.bins + ", "atomicAdd(shared.bins + "),
    bug("the first row's histogram", "select/order.cuh", "int64_t(free.at) * kBins + i", "i"),
    bug("recent rows taken for sinks", "select/order.cuh", "i < free.first ? i : i + free.count()", "i"),
    bug("a length a row", "select/order.cuh", "p.lengths + at / p.length_rows", "p.lengths + at % p.length_rows"),
    bug(
        "warps in each other's slots",
        "select/set.cu",
        "(uint32_t(shared.number) + uint32_t(before))",
        "uint32_t(shared.number)",
    ),
    bug("rounds in each other's slots", "select/set.cu", "    to += __popc(all);\n", ""),
    bug(
        "CTAs in each other's slots",
        "select/set.cu",
        "before + own > 0) shared.number = int(atomicAdd(p.found + part.set, uint32_t(before + own)))",
        "before + own > 0) shared.number = 0 * int(atomicAdd(p.found + part.set, uint32_t(before + own)))",
    ),
    bug(
        "the candidates of the last warp alone",
        "select/set.cu",
        "atomicAdd(p.found + part.set, uint32_t(before + own))",
        "atomicAdd(p.found + part.set, uint32_t(own))",
    ),
    bug("rows that the first lane does not sum up", "select/set.cu", "    held = __reduce_add_sync(0xffffffffu, held);\n", ""),
    bug("rows that the first warp does not sum up", "select/set.cu", "int(shared.bins[lane])", "int(shared.bins[0])"),
    bug("what competes taken for what is held", "select/set.cu", "int(shared.bins[kWarps + lane])", "int(shared.bins[lane])"),
    bug(
        "candidates beyond the first four of a thread",
        "select/set.cu",
        "i < count; i += 4 * kThreads",
        "i < min(count, 4 * uint32_t(kThreads)); i += 4 * kThreads",
    ),
    bug(
        "scores beyond the first eight of a thread",
        "select/order.cuh",
        "i < end; i += kScores * kThreads",
        "i < min(end, first + kScores * kThreads); i += kScores * kThreads",
    ),
    bug(
        "scores beyond the first four of a lane",
        "select/order.cuh",
        "for (; first < end; first += 32 * kShareScores) {",
        "if (first < end) {",
    ),
    bug(
        "rows of the next warp counted",
        "select/order.cuh",
        "const bool in = i < end && free.selected(i, x, cut);\n    if (mask",
        "const bool in = free.selected(i, x, cut);\n    if (mask",
    ),
    bug(
        "ties of the next warp counted",
        "select/row.cuh",
        "{ own += __popc(__ballot_sync(0xffffffffu, i < end && ",
        "{ own += __popc(__ballot_sync(0xffffffffu, ",
    ),
];

const SOURCE: &str = r#"
#include "select/topk.cu"
#include "select/set.cu"
"#;

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    let inf = f32::INFINITY;
    let odd = [f32::NAN, 1.0, -inf, 0.0, -0.0, inf, 0.0, -1.0, f32::NAN, -0.0, 1e-40];
    for k in 0..=11 {
        TopkCase::one(&odd, k).check(lab);
    }
    for k in [1, 33, 699] {
        TopkCase::new(1, 1500, k, (0..1500).map(|i| if i % 3 == 0 { 2.0 } else { 1.0 }).collect()).check(lab);
        let close = (0..700u32).map(|i| f32::from_bits(0x3f80_0000 ^ (i * 37 % 701))).collect();
        TopkCase::new(1, 700, k, close).check(lab);
        TopkCase::normal(k as u64, 2, 1100, k).check(lab);
    }
    let mut case = TopkCase::normal(3, 3, 200, 64).forced(2, 5);
    case.lengths = Some(vec![200, 40, 150]);
    case.ks = Some(vec![100, 20, 30]);
    case.check(lab);
    let mut apart = TopkCase::normal(1, 2, 130, 17);
    apart.stride = 133;
    apart.scores.extend([9.0; 3]);
    apart.check(lab);
    // Sets, parts of rows, and what is left for the next launch.
    let mut sets = TopkCase::sets(5, (2, 3), 300, 100).forced(3, 2);
    sets.lengths = Some(vec![300, 40, 0, 211, 4, 300]);
    sets.check(lab);
    TopkCase::sets(6, (1, 2), 8400, 700).check(lab);
    let mut equal = TopkCase::sets(7, (2, 2), 700, 900);
    equal.scores.iter_mut().for_each(|x| *x = x.round());
    equal.check(lab);
    // More scores, candidates and rows than threads take at once.
    TopkCase::normal(12, 1, 9000, 800).check(lab);
    let mut one_digit = TopkCase::sets(13, (1, 2), 4500, 700);
    one_digit.scores = (0..9000u32).map(|i| f32::from_bits(0x3f80_0000 ^ (i * 37 % 9001))).collect();
    one_digit.check(lab);
    TopkCase::sets(14, (1, 40), 40, 300).check(lab);
    // Floors, histograms, lengths of several rows.
    let mut floors = TopkCase::sets(8, (2, 3), 300, 130).forced(3, 2).floor(20);
    floors.scores[..600].iter_mut().for_each(|x| *x = x.round() - 50.0);
    floors.lengths = Some(vec![300, 15]);
    floors.length_rows = 3;
    floors.check(lab);
    // All of one first digit: floors are among those that share it with the cut.
    let mut close = TopkCase::sets(9, (1, 2), 300, 130).floor(40);
    close.scores = (0..600u32).map(|i| f32::from_bits(0x3f80_0000 ^ (i * 37 % 701))).collect();
    close.check(lab);
    let mut counted = TopkCase { histogram: true, ..TopkCase::normal(3, 3, 200, 64).forced(2, 5) };
    counted.lengths = Some(vec![200, 6, 90]);
    counted.check(lab);
    TopkCase { shape: TopkShape { k: 500, ..equal.shape }, ..equal }.strict().check(lab);
}
