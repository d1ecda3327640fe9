//! Bugs of topp.

use super::{Bug, Compiler, Suite, bug};
use kvlar_tests::Lab;
use kvlar_tests::topp::ToppCase;

pub const SUITE: Suite = Suite { name: "topp", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const SUMS: &str = "device/scan.cuh";

const BUGS: &[Bug] = &[
    bug("masses of earlier warps forgotten", SUMS, "lane < warp ? warp_sums[lane] : T(0)", "T(0)"),
    bug("masses of lanes counted twice", SUMS, "+ sum - value;", "+ sum;"),
    bug("masses of half of the lanes", SUMS, "step *= 2) x += ", "step *= 4) x += "),
    bug("masses of half of the warps", SUMS, "lane < kThreads / 32 ? warp_sums", "lane < kThreads / 64 ? warp_sums"),
    bug(
        "dropped barrier before the masses of warps",
        SUMS,
        "= value;\n  __syncthreads();\n  const T sum",
        "= value;\n  const T sum",
    ),
    bug("the largest of a warp", "select/topp.cu", "top = shared.warp_tops[threadIdx.x % kWarps];", ""),
    bug("the largest of half of the warps", "select/topp.cu", "step < kWarps; step *= 2", "step < kWarps / 2; step *= 2"),
    bug(
        "NaN has mass",
        "select/topp.cu",
        "if (!(x > -INFINITY)) return 0;",
        "if (x == -INFINITY) return 0; if (x != x) x = top;",
    ),
    bug("powers of two", "select/topp.cu", "* 1.4426950408889634f", ""),
    bug(
        "infinite logits have no mass",
        "select/topp.cu",
        "x == top ? 1.f : ptx::ex2",
        "x == top && top < INFINITY ? 1.f : x == top ? 0.f : ptx::ex2",
    ),
    bug("steps rounded down", "select/topp.cu", "ceil(__dmul_rn(__dsub_rn", "floor(__dmul_rn(__dsub_rn"),
    bug("steps of 1/8", "select/topp.cu", "double(x)), 16.)", "double(x)), 8.)"),
    bug("negative logits turned over", "select/topp.cu", "key & 0x7fffffffu : ~key", "key & 0x7fffffffu : key"),
    bug("a step too many", "select/topp.cu", "<= double(steps)) inside", "<= double(steps + 1)) inside"),
    bug(
        "masses of the digit before",
        "select/topp.cu",
        "shared.low[i] = shared.high[i] = 0;\n  __syncthreads();",
        "__syncthreads();",
    ),
    bug("a bin too early", "select/topp.cu", "need <= before + high;", "need < before + high;"),
    bug("masses of keys that differ above them", "select/topp.cu", "if (key >> known == prefix >> known) add_mass", "add_mass"),
    bug("masses above the bin kept twice", "select/topp.cu", "left -= shared.above;", ""),
    bug("ties rounded down", "select/topp.cu", "(left + each - 1) / each", "left / each + (left < each)"),
    bug("ties one too many", "select/topp.cu", "(left + each - 1) / each", "left / each + 1"),
    bug(
        "forced mass left out",
        "select/topp.cu",
        "return forced < target ? cut_of_mass(shared, free, mass, target - forced)",
        "return forced < target ? cut_of_mass(shared, free, mass, target)",
    ),
    bug(
        "a share of the others alone",
        "select/topp.cu",
        "const uint64_t whole = forced + block_sum",
        "const uint64_t whole = 0 * forced + block_sum",
    ),
    bug("the share is of one", "select/topp.cu", "__dmul_rn(top_p, double(whole))", "top_p * 0x1p40"),
    bug("k_min of free rows", "select/topp.cu", "k_min - always", "k_min"),
    bug("k_max of free rows", "select/topp.cu", "k_max - always", "k_max"),
    bug("limits of the launch before", "select/topp.cu", "p.limits ? __ldg(p.limits) : int(p.k_min)", "int(p.k_min)"),
    bug(
        "rows without mass",
        "select/topp.cu",
        "max(kFinite, find_cut(shared.select, p.rows, free, need))",
        "find_cut(shared.select, p.rows, free, need)",
    ),
    bug("the mass of all", "select/topp.cu", "if (free.selected(i, x, cut)) kept", "kept"),
    bug("mass of nothing", "select/topp.cu", "whole > 0 ? float(", "true ? float("),
    bug(
        "dropped barrier after the masses",
        "select/topp.cu",
        "      });\n      __syncthreads();\n    }\n    find_mass_bin",
        "      });\n    }\n    find_mass_bin",
    ),
    bug("high words of the digit before", "select/topp.cu", "shared.low[i] = shared.high[i] = 0;", "shared.low[i] = 0;"),
    bug("dropped carries", "select/topp.cu", " + (before + low < low)", ""),
    bug("carries of the sum before", "select/topp.cu", "(before + low < low)", "(before < low)"),
    bug("high words lost", "select/topp.cu", "  if (high) atomicAdd(shared.high + bin, high);\n", ""),
    bug(
        "high and low words swapped",
        "select/topp.cu",
        "uint64_t(shared.high[bin]) << 32 | shared.low[bin]",
        "uint64_t(shared.low[bin]) << 32 | shared.high[bin]",
    ),
    bug(
        "logits beyond the first sixteen of a thread",
        "select/topp.cu",
        "left > 0; left -= kAtOnce * kThreads",
        "left > 0 && left > free.length - kThreads; left -= kAtOnce * kThreads",
    ),
    bug(
        "the largest of the first logits of threads",
        "select/topp.cu",
        "j < kAtOnce; ++j) top = fmaxf",
        "j < 1; ++j) top = fmaxf",
    ),
    bug(
        "logits beyond the first eight of a thread",
        "select/order.cuh",
        "i < end; i += kScores * kThreads",
        "i < min(end, first + kScores * kThreads); i += kScores * kThreads",
    ),
];

const SOURCE: &str = r#"
#include "select/topp.cu"
"#;

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    let inf = f32::INFINITY;
    let both = |case: ToppCase| {
        case.check(lab);
        case.bins().check(lab);
    };
    for top_p in [0.0, 0.3, 0.9, 1.0] {
        both(ToppCase::normal(4, 2, 300, top_p));
        both(ToppCase::normal(4, 1, 300, top_p).with(|s| (s.sink_rows, s.recent_rows) = (9, 40)));
        for k_min in [0, 5] {
            both(ToppCase::one(&[f32::NAN, 1.0, -inf, 2.0, 0.0], top_p).with(|s| s.k_min = k_min));
            both(ToppCase::one(&[inf, 1.0, inf, f32::NAN], top_p).with(|s| s.k_min = k_min));
        }
    }
    both(ToppCase::one(&[-inf, f32::NAN], 0.5));
    both(ToppCase::one(&[1.0, -126.5, -127.0], 1.0));
    for top_p in [0.25, 0.5, 0.6] {
        both(ToppCase::one(&[-7.5; 64], top_p));
        both(ToppCase::one(&(0..700u32).map(|i| f32::from_bits(0x3f80_0000 ^ (i * 37 % 701))).collect::<Vec<_>>(), top_p));
        both(ToppCase::one(&(0..90).map(|i| -20.0 - i as f32 / 16.0).collect::<Vec<_>>(), top_p));
    }
    // Sums that are exact: logits so small that each has the same mass, and equal ones.
    let small: Vec<f32> = (0..64u32).map(|i| f32::from_bits(0x3080_0000 + (i * 37 % 64))).collect();
    for kept in [1, 31, 32, 33, 63] {
        for logits in [&small[..], &[-7.5; 64]] {
            assert_eq!(ToppCase::one(logits, kept as f64 / 64.0).check(lab)[0].len(), kept);
        }
    }
    // On steps, and just beside them.
    for top_p in [0.3, 0.6, 0.9] {
        let beside = |i: usize| [f32::next_up, |x| x, f32::next_down][i % 3](3.0 - (i / 3) as f32 / 16.0);
        ToppCase::one(&(0..180).map(beside).collect::<Vec<_>>(), top_p).bins().check(lab);
    }
    // More than threads take at once, the largest behind the first ones.
    for (rows, largest) in [(2000, 1500), (16_501, 16_500)] {
        let mut many: Vec<f32> = (0..rows).map(|i| (i * 37 % 701) as f32 / 100.0).collect();
        many[largest] = 60.0;
        ToppCase::one(&many, 0.9).check(lab);
    }
    // All that has mass, where it is little.
    let little: Vec<f32> = (0..20).map(|i| if i == 0 { 0.0 } else { -30.0 - i as f32 / 4.0 }).collect();
    assert_eq!(ToppCase::one(&little, 1.0).check(lab)[0].len(), 20);
    let mut ragged = ToppCase::normal(3, 3, 200, 0.7).with(|s| (s.k_min, s.k_max, s.sink_rows) = (30, 40, 6));
    ragged.lengths = Some(vec![200, 20, 90]);
    (ragged.limits, ragged.histogram) = (true, true);
    both(ragged.clone());
    both(ragged.with(|s| (s.k_min, s.k_max) = (5, 9)));
}
