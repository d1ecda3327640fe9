//! Bugs of attend_lowrank over int8 latents with an int8 basis.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Dtype, Latents};
use kvlar_tests::Lab;
use kvlar_tests::lowrank::{LowrankCase, ValueCase, check};

pub const SUITE: Suite = Suite { name: "lowrank_bytes", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const SOURCE: &str = r#"
#include "attend_lowrank/cta.cuh"
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_int8_basis_v256_n8, __nv_bfloat16, 1, 256, KVLAR_LATENT_INT8_BASIS)
GPU_EXPORT(kvlar_attend_lowrank_bf16_int8_basis_v256_n8)
#include "attend_lowrank/schedule.cu"
"#;

const BASES: &str = "attend_lowrank/bases.cuh";
const SCORES: &str = "attend_lowrank/scores.cuh";
const REBUILD: &str = "attend_lowrank/rebuild.cuh";

const BUGS: &[Bug] = &[
    bug("sums of three latents of four", BASES, "0x01010101", "0x00010101"),
    bug("sums of half of the lanes", BASES, "step < kLanesARow; step *= 2", "step < kLanesARow / 2; step *= 2"),
    bug(
        "ranks beyond the first 256",
        BASES,
        "part < parts; part += kLanesARow",
        "part < min(parts, kLanesARow); part += kLanesARow",
    ),
    bug("bases of the first sequence", BASES, "unit.seq * p.key_basis_seq_stride", "0 * p.key_basis_seq_stride"),
    bug(
        "bases of two bytes an element",
        BASES,
        "from[j] = reinterpret_cast<const uint4*>(bases + (element << Scoring::kBasisShift));",
        "from[j] = reinterpret_cast<const uint4*>(bases + 2 * element);",
    ),
    bug("means not divided by scales", BASES, "scale > 0.f ? mean / (128.f * scale) : 0.f", "mean"),
    bug("means by scales of the first sequence", BASES, "p.key_scales + unit.seq * p.key_scales_seq_stride", "p.key_scales"),
    bug("means by scales of the first head", BASES, "int64_t(head) * (p.padded_dim / 2) + row.pair", "row.pair"),
    bug("queries by scales of the first sequence", SCORES, "p.key_scales + unit.seq * p.key_scales_seq_stride", "p.key_scales"),
    bug("queries by scales of the first head", SCORES, "int64_t(unit.head[head]) * (p.padded_dim / 2)", "0"),
    bug("queries by scales of the lower pairs", SCORES, "(scales + 8)", "(scales)"),
    bug("2^7 left in", SCORES, "kByteBasis ? a.x * 0.0078125f : a.x;", "a.x;"),
    bug("2^7 left in zeros", SCORES, "kByteBasis ? a.y * 0.0078125f", "kByteBasis ? a.y"),
    bug("the bias left in", SCORES, "fmaf(-ByteBasis::kBiasValue, scale[i], rest)", "rest"),
    bug("integers taken as floats", SCORES, "x = float(__float_as_int(x));", ";"),
    bug("a bias where sums are integers", SCORES, "if constexpr (kByteBasis && kHeld) begin", "if constexpr (kByteBasis) begin"),
    bug(
        "halves of a basis crossed",
        REBUILD,
        "basis + uint32_t(rows.at(row + ((lane >> 4) << 3) + (lane & 7), 2 * block + ((lane >> 3) & 1)))",
        "basis + uint32_t(rows.at(row + (((lane >> 3) & 1) << 3) + (lane & 7), 2 * block + (lane >> 4)))",
    ),
];

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    let base =
        |heads, ranks, lengths: &[usize]| LowrankCase::new(Dtype::Bf16, heads, 2, 64, ranks, lengths).int8(Latents::Int8Basis);
    let cases = [
        base((4, 4), (64, 32), &[70, 9]).with(|c| (c.mean, c.per_seq_bases) = (true, true)),
        // A rank whose products are sums of integers, and one whose basis is of many parts.
        base((2, 2), (160, 64), &[40]),
        base((2, 2), (288, 32), &[35]).with(|c| c.mean = true),
        // Padded dimensions.
        base((2, 2), (32, 32), &[50]).with(|c| (c.head_dim, c.mean) = (80, true)),
        base((4, 2), (96, 32), &[33, 64]).with(|c| c.values = ValueCase::Dense),
    ];
    for case in &cases {
        check(lab, case).unwrap_or_else(|e| panic!("{e}"));
    }
}
