//! Bugs of attention over quantized rows, and of their codecs.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Codec, Dtype, Format};
use kvlar_tests::Lab;
use kvlar_tests::append::AppendCase;
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun, SegmentCase, check};
use kvlar_tests::pages::{Layout, RowFormat};

pub const SUITE: Suite = Suite { name: "quantized", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const QUERIES: &str = "attend_quantized/queries.cuh";

const BUGS: &[Bug] = &[
    bug(
        "4-bit codes meet queries in another order",
        "attend_quantized/keys.cuh",
        "8 * word + 2 * j + half + 4 * e",
        "8 * word + 4 * j + 2 * half + e",
    ),
    bug(
        "2-bit codes meet queries in another order",
        "attend_quantized/keys.cuh",
        "16 * word + 2 * j + half + 8 * e",
        "16 * word + 4 * j + 2 * half + e",
    ),
    bug("4-bit queries not divided by the codes' weights", "attend_quantized/keys.cuh", "bits == 4 ? 4 * half", "bits == 4 ? 0"),
    bug("2-bit queries not divided by the codes' weights", "attend_quantized/keys.cuh", "2 * ((2 * k + half) % 4)", "0"),
    bug("4-bit sums not divided by the codes' weights", "attend_quantized/values.cuh", "(upper ? 16.f : 1.f)", "1.f"),
    bug(
        "2-bit sums divided by the wrong weights",
        "attend_quantized/values.cuh",
        "(upper ? 64.f : 16.f)",
        "(upper ? 16.f : 64.f)",
    ),
    bug(
        "rows of a pair of values exchanged",
        "attend_quantized/values.cuh",
        "const uint32_t u = __byte_perm(x[0][w], x[1][w], m < 2",
        "const uint32_t u = __byte_perm(x[1][w], x[0][w], m < 2",
    ),
    bug("the codes' 1024 forgotten in scores", QUERIES, "Keys::kMagic * all", "0.f * all"),
    bug(
        "queries not rotated",
        "attend_quantized/queries.cuh",
        "if (p.rotated_keys) hadamard(x, int(p.head_dim), columns.lane);",
        "",
    ),
    bug("8-bit queries over 128 steps", "attend_quantized/queries.cuh", "__fdiv_rn(largest, 127.f)", "__fdiv_rn(largest, 128.f)"),
    bug("zeros of keys forgotten", "attend_quantized/warp.cuh", "fmaf(k.x, x, k.y * coded.sum[n][e])", "(k.x * x)"),
    bug("zeros of values forgotten", "attend_quantized/warp.cuh", "zero[n][e] = fmaf(w[e], offset[b][h], zero[n][e]);", ""),
    bug(
        "stale zeros and weights",
        "attend_quantized/warp.cuh",
        "zero[n][e] = weight[n][e] = weight[n][e + 2] = 0.f;\n      }\n  }\n\n  __device__ void take",
        "}\n  }\n\n  __device__ void take",
    ),
    bug(
        "sums of codes and of values mixed",
        "attend_quantized/warp.cuh",
        "      settle();\n      Base::consume_dense",
        "      Base::consume_dense",
    ),
    bug("sums of values enter as they are", "attend_quantized/warp.cuh", "*= value_weight(value_codec(), i, e / 2);", "*= 1.f;"),
    bug("weights not raised with the maximum", "attend_quantized/warp.cuh", "weight[n][e] *= factor;", ""),
    bug(
        "fp8 keys take the first head's scale",
        "attend_quantized/warp.cuh",
        "__ldg(segment.key_format.tables + shared.unit().head)",
        "__ldg(segment.key_format.tables)",
    ),
    bug("a broken row reaches those who don't see it", "attend_quantized/warp.cuh", "scale[b][h] = offset[b][h] = 0.f;", ""),
    bug(
        "scales of the wrong half of a tile",
        "attend_quantized/warp.cuh",
        "stage_value_params + 4 * (row + 16 * b",
        "stage_value_params + 4 * (16 * b",
    ),
    bug("NaN of fp8 keys lost", "attend_quantized/keys.cuh", "if (row_nan & 0x80808080u)", "if (false)"),
    bug("NaN of fp8 values lost", "attend_quantized/codes.cuh", "return x - (x >> 15);", "return x & 0;"),
    bug("fp8 sign lost", "attend_quantized/codes.cuh", "high_bytes & 0x80008000u);\n}", "0u);\n}"),
    bug(
        "dropped barrier between queries and fragments",
        "attend_quantized/rows.cuh",
        "prepare(scratch);\n    __syncthreads();",
        "prepare(scratch);",
    ),
    bug(
        "dropped barrier between fragments and the last stages",
        "attend_quantized/rows.cuh",
        "coded.load_fragments(scratch);\n    __syncthreads();",
        "coded.load_fragments(scratch);",
    ),
    bug("queries in the first stages", "attend_quantized/rows.cuh", "memory + (p.stages - 1) * kWarps * p.stage_bytes", "memory"),
    bug(
        "warps without tiles prepare nothing",
        "attend/columns.cuh",
        "(Taker::kPrepares) taker",
        "(Taker::kPrepares) if (own < end) taker",
    ),
    bug(
        "a stage is that of the neighbouring warp",
        "attend_quantized/rows.cuh",
        "(stage * kWarps + Base::warp)",
        "(stage + Base::warp)",
    ),
    bug(
        "chunks laid out for other rows",
        "attend_quantized/copy.cuh",
        "tile + uint32_t(chunk_at(log, at.first + r, c))",
        "tile + uint32_t(16 * (((at.first + r) << log) + c))",
    ),
    bug("chunks of later rows not permuted", "attend_quantized/copy.cuh", "(to ^ (on & 127))", "(to + (on & 127))"),
    bug(
        "a block's page taken for the next one's",
        "attend_quantized/rows.cuh",
        "int(p.segments[rows.segment].tile_rows) / 32 & ~15",
        "16 / 32 & ~15",
    ),
    bug(
        "rows of a tile's other half",
        "attend_quantized/keys.cuh",
        "eighth * kRepeat * (16 << kLog)",
        "(eighth ^ 1) * kRepeat * (16 << kLog)",
    ),
    bug(
        "scale rounded after the codes",
        "device/affine.cuh",
        "{half_of(ptx::pack_f16(__fdiv_rn(__fsub_rn(high, low), levels), 0.f)),",
        "{__fdiv_rn(__fsub_rn(high, low), levels),",
    ),
    bug("codes clamped at a level too many", "device/row_codec.cuh", "float((1 << bits) - 1)", "float(1 << bits)"),
    bug("fp8 ties away from even", "device/fp8.cuh", "0x7ffffu + (normal >> 20 & 1u)", "0x80000u"),
    bug("fp8 subnormals halved", "device/fp8.cuh", "__fmul_rn(size, 512.f)", "__fmul_rn(size, 256.f)"),
    bug("Hadamard butterflies with the wrong sign", "device/hadamard.cuh", "__fsub_rn(other, x[i])", "__fsub_rn(x[i], other)"),
    bug(
        "Hadamard rotation not normalized",
        "device/hadamard.cuh",
        "x[i] = __fmul_rn(x[i], scale);",
        "x[i] = x[i] + 0.f * scale;",
    ),
    bug("words of a lane in another order", QUERIES, "4 + 2 * (k % 2) + h] = word", "4 + 2 * h + k % 2] = word"),
    bug("words of other lanes", QUERIES, "32 + 4 * (column % 8) + c) * 4", "32 + column % 8 + 8 * c) * 4"),
    bug("queries divided by twice the weights", QUERIES, "uint32_t(127 - log) << 23", "uint32_t(126 - log) << 23"),
    bug("sums without the weights", QUERIES, "uint32_t(127 + log) << 23", "uint32_t(127) << 23"),
    bug("the largest dim of a lane", QUERIES, "largest = warp_max(largest);\n      const uint32_t", "const uint32_t"),
    bug(
        "8-bit queries by the largest of a lane",
        QUERIES,
        "largest = warp_max(largest);\n    const float multiplier",
        "const float multiplier",
    ),
    bug("8-bit queries by the first row", QUERIES, "s < int(p.query_rows)", "s < 1"),
    bug("the first lane's sum of dims", QUERIES, "      coded = warp_sum(coded);\n", ""),
    bug("the first lane's sum of codes", QUERIES, "      all = warp_sum(all);\n", ""),
    bug(
        "dropped warp barrier before a row is read",
        QUERIES,
        "}\n      __syncwarp();\n      float coded",
        "}\n      float coded",
    ),
    bug("sums of other columns", QUERIES, "kStates + 8 * n + 2 * at.c", "kStates + 8 * n + at.c"),
    bug("scales not returned to the size of the query", QUERIES, "= multiplier * up;", "= multiplier;"),
    bug(
        "neighbouring values in another order",
        "attend/attend.cuh",
        "make_float4(state.o[i][n][e], state.o[i][n][e + 2], state.o[i + 1][n][e], ",
        "make_float4(state.o[i][n][e], state.o[i + 1][n][e], state.o[i][n][e + 2], ",
    ),
];

/// What the short suites need, in one translation unit.
const SOURCE: &str = r#"
#include "attend/attend.cuh"
#include "attend_quantized/warp.cuh"
KVLAR_ATTEND_ENTRY(kvlar_attend_quantized_d64_n8, kvlar::attend_quantized::WarpQuantized<64, 1>)
GPU_EXPORT(kvlar_attend_quantized_d64_n8)
#include "attend/schedule.cu"
#include "append/append.cu"
"#;

/// A short form of the suites, within what [`SOURCE`] holds.
fn short_suites(lab: &Lab) {
    let rotated = |codec: Codec| Format { hadamard: true, ..codec.into() };
    let base = |lengths: &[usize], keys: Format, values: Codec| {
        AttendCase::new(Dtype::Bf16, (4, 2), 64, lengths).with(|c| c.segments[0].set_formats(keys, values))
    };
    let tiers = |keys: Format, values: Codec| {
        AttendCase::new(Dtype::Bf16, (8, 2), 64, &[0, 0]).with(|c| {
            let body = |lengths: [usize; 2]| {
                let mut s = SegmentCase { capacity: 520, ..SegmentCase::new(Codec::Bf16, Layout::Hnd(32), &lengths) };
                s.set_formats(keys, values);
                s
            };
            let exact = |lengths: [usize; 2]| SegmentCase::new(Codec::Bf16, Layout::Hnd(16), &lengths);
            // So many that a warp meets all of them.
            c.segments = vec![exact([200, 130]), body([500, 520]), exact([150, 200]), body([220, 200])];
        })
    };
    let mut cases = vec![
        base(&[101, 64, 7], Codec::Int4.into(), Codec::Int4),
        base(&[130, 40], Codec::Int2.into(), Codec::Int2),
        base(&[70, 33], Codec::Int8.into(), Codec::Int8),
        base(&[70, 33], rotated(Codec::Int4), Codec::Int2),
        base(&[600, 90], Codec::Int4.into(), Codec::Int4).with(|c| c.q_size = 12.0),
        base(&[40, 17], Codec::Int4.into(), Codec::Int4).with(|c| (c.broken, c.query_rows) = (true, 3)),
        base(&[60, 9], Codec::Int8.into(), Codec::Int4).with(|c| (c.int8_queries, c.query_rows) = (true, 2)),
        tiers(Codec::Int4.into(), Codec::Int4),
        tiers(Codec::Int2.into(), Codec::Int2),
        tiers(Codec::Fp8.into(), Codec::Fp8),
    ];
    let fp8 = |change: &dyn Fn(&mut AttendCase)| base(&[70, 33], Codec::Fp8.into(), Codec::Fp8).with(|c| change(c));
    cases.push(fp8(&|c| c.segments[0].keys.scales = vec![0.02, 0.7]));
    cases.push(fp8(&|c| c.nan_key = true));
    cases.push(fp8(&|c| c.nan_value = true));
    for case in &cases {
        check(lab, case).unwrap_or_else(|e| panic!("{e}"));
    }
    // Two units a CTA: what one leaves in shared memory is the next one's.
    let data = AttendData::new(&base(&[40, 50, 60, 33, 20], Codec::Int4.into(), Codec::Int4));
    let mut run = AttendRun::new(lab, &data);
    run.enqueue();
    kvlar_tests::attend::compare(&data, &run.result()).unwrap();
    for codec in [Codec::Int8, Codec::Int4, Codec::Int2, Codec::Fp8] {
        AppendCase::new(Dtype::Bf16, codec, 64).check(lab);
        AppendCase { rope: kvlar_reference::Rope::none(), ..AppendCase::new(Dtype::F16, rotated(codec), 128) }.check(lab);
    }
    let small = RowFormat { scales: vec![40.0; 3], ..Codec::Fp8.into() };
    AppendCase { values: small, ..AppendCase::new(Dtype::Bf16, Codec::Fp8, 64) }.check(lab);
}
