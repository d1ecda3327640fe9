//! Bugs of channel-wise keys and values in groups: their codecs, and attention over them.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Codec, Dtype, Format};
use kvlar_reference::testing::Rng;
use kvlar_tests::Lab;
use kvlar_tests::append_groups::GroupsRun;
use kvlar_tests::attend::{AttendCase, SegmentCase, check};
use kvlar_tests::encode::EncodeCase;
use kvlar_tests::pages::Layout;

pub const SUITE: Suite = Suite { name: "channels", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const BUGS: &[Bug] = &[
    bug(
        "decoded to the other 16-bit type",
        "encode/encode.cu",
        "return p.dtype == KVLAR_DTYPE_F16 ? ptx::pack_f16(x[i], x[i + 1])",
        "return p.dtype != KVLAR_DTYPE_F16 ? ptx::pack_f16(x[i], x[i + 1])",
    ),
    bug(
        "decoded pairs exchanged",
        "encode/encode.cu",
        "ptx::pack_bf16(x[i], x[i + 1]); };\n    *reint",
        "ptx::pack_bf16(x[i + 1], x[i]); };\n    *reint",
    ),
    bug(
        "codes of channels meet queries in another order",
        "attend_quantized/channel_keys.cuh",
        "kCodes / 4 * (column / 8) + kCodes / 2 * (column % 2)",
        "kCodes / 2 * (column / 8) + kCodes / 4 * (column % 2)",
    ),
    bug("zeros of channels forgotten", "attend_quantized/channel_keys.cuh", "Half16<__half>::mma(zeros, zero, query);", ""),
    bug("codes of other weights summed as they are", "attend_quantized/channel_keys.cuh", "1.f / (1 << kBits)", "1.f"),
    bug(
        "scales of channels where others are read",
        "attend_quantized/channels.cuh",
        "16 * kChunks * part + channel_chunk_at(c)",
        "16 * kChunks * part + 16 * c",
    ),
    bug("groups of 32 rows whatever the format says", "attend_quantized/channels.cuh", "/ s.key_format.group;", "/ 32;"),
    bug("stale scales: those of the tile's first 32 rows", "attend_quantized/channels.cuh", " + row / 32 * (16 * kChunks);", ";"),
    bug("zeros of a pair of rows exchanged", "attend_quantized/grouped_values.cuh", "zeros_of(x, y);", "zeros_of(y, x);"),
    bug(
        "values divided by the wrong weight",
        "attend_quantized/grouped_values.cuh",
        "kWeight == 16 ? 4 :",
        "kWeight == 16 ? 3 :",
    ),
    bug(
        "all values take the first scale of their row",
        "attend_quantized/grouped_values.cuh",
        "min((8 * j + g) * kWide / group, count - 1)",
        "min(8 * j * kWide / group, count - 1)",
    ),
    bug(
        "broken values kept from who sees them",
        "attend_quantized/channels.cuh",
        "= state.o[i][0][e + 2] = quiet_nan();",
        "+= 0.f;",
    ),
    bug(
        "a broken value reaches those who don't see it",
        "attend_quantized/channels.cuh",
        "scales.clear(row, i);",
        "scales.at(row, i);",
    ),
    bug(
        "extremes of the first warp's rows alone",
        "device/channel_codec.cuh",
        "for (int w = 0; w < kChannelWarps; ++w) {",
        "for (int w = 0; w < 1; ++w) {",
    ),
    bug("dropped barrier between extremes and scales", "device/channel_codec.cuh", "  __syncthreads();\n  Affine", "  Affine"),
    bug(
        "NaN of a channel lost",
        "device/channel_codec.cuh",
        "x[i] == x[i] ? fminf(low[i], x[i]) : -INFINITY;",
        "fminf(low[i], x[i]);",
    ),
    bug("new rows encoded before they are rounded", "append/packed_rows.cuh", "    round_as_stored(x, p.exact.dtype);\n", ""),
    bug("pages of earlier rows taken from the first", "append/packed_rows.cuh", "? row - at.source_first : -1", "? row : -1"),
    bug(
        "a step's last group left out",
        "append/groups.cu",
        "(pack + 1) * int(p.pack_rows) > packing.w",
        "(pack + 1) * int(p.pack_rows) >= packing.w",
    ),
    bug("the first eight rows of a warp again", "append/packed_rows.cuh", "(kStagedRows * eight + i)", "i"),
    bug("rows of another eight", "append/packed_rows.cuh", "held != number / kStagedRows", "held < 0"),
    bug(
        "every row from the first page",
        "append/packed_rows.cuh",
        "__shfl_sync(0xffffffffu, page, i)",
        "__shfl_sync(0xffffffffu, page, 0)",
    ),
    bug("rows not waited for", "append/packed_rows.cuh", "ptx::cp_async_wait<0>();", "ptx::cp_async_wait<1>();"),
    bug("keys alone", "append/groups.cu", "(blockIdx.x - p.row_ctas) % 2", "(blockIdx.x - p.row_ctas) % 2 * 0"),
    bug("a row's scales instead of its group's", "device/row_codec.cuh", "uint64_t(row / group)", "uint64_t(row)"),
];

/// What the short suites need, in one translation unit.
const SOURCE: &str = r#"
#include "attend/attend.cuh"
#include "attend_quantized/channels.cuh"
KVLAR_ATTEND_ENTRY(kvlar_attend_quantized_channels_d64_n8, kvlar::attend_quantized::WarpChannels<64>)
GPU_EXPORT(kvlar_attend_quantized_channels_d64_n8)
#include "attend/schedule.cu"
#include "append/groups.cu"
#include "encode/encode.cu"
"#;

/// A short form of the suites, within what [`SOURCE`] holds.
fn short_suites(lab: &Lab) {
    let grouped = |codec: Codec, group| Format { group: Some(group), ..codec.into() };
    let base = |lengths: &[usize], keys: Codec, group, values: Codec| {
        AttendCase::new(Dtype::Bf16, (4, 2), 64, lengths).with(|c| {
            c.segments[0].set_formats(grouped(keys, group), grouped(values, 32));
            c.segments[0].layout = Layout::Hnd(64);
        })
    };
    let cases = [
        base(&[101, 64, 7], Codec::Int4Channel, 32, Codec::Int4),
        base(&[130, 200], Codec::Int2Channel, 64, Codec::Int2),
        base(&[60, 9], Codec::Int4Channel, 32, Codec::Int8).with(|c| c.nan_key = true),
        base(&[40, 17], Codec::Int4Channel, 32, Codec::Int4).with(|c| (c.broken, c.query_rows) = (true, 3)),
        base(&[40, 70], Codec::Int2Channel, 32, Codec::Int2).with(|c| (c.broken, c.query_rows) = (true, 3)),
        base(&[200, 130], Codec::Int4Channel, 32, Codec::Int4).with(|c| {
            c.segments.insert(0, SegmentCase::new(Codec::Bf16, Layout::Contiguous, &[4, 2]));
            c.segments.push(SegmentCase::new(Codec::Bf16, Layout::Hnd(16), &[40, 33]));
        }),
    ];
    for case in &cases {
        check(lab, case).unwrap_or_else(|e| panic!("{e}"));
    }
    let steps = [[40, 5], [1, 27], [23, 1], [70, 31]];
    for rope in [false, true] {
        let run = GroupsRun { rope, ..GroupsRun::new(Codec::Int4Channel.into(), Codec::Int2Channel.into(), &steps) };
        if rope {
            let once = GroupsRun { steps: vec![[134, 64]], ..run.clone() };
            assert!(run.run(lab).keys == once.run(lab).keys, "steps of other sizes give other codes");
        } else {
            run.check(lab);
        }
    }
    // Rows of several pages, more than a warp stages at a time.
    let many = GroupsRun::new(grouped(Codec::Int4Channel, 64), Codec::Int8.into(), &[[50, 63], [14, 1]]);
    GroupsRun { pack_rows: 64, ..many }.check(lab);
    for (codec, group) in [(Codec::Int4Channel, 16), (Codec::Int2Channel, 32)] {
        let case = EncodeCase {
            stored: grouped(codec, group).into(),
            dtype: Dtype::Bf16,
            layout: Layout::PerHead(32),
            dim: 64,
            rows: 64,
        };
        let mut values = Rng::new(group as u64).normals(2 * 2 * 64 * 64, 2.0);
        case.check(lab, &values);
        values[64 * 7 + 5] = f32::NAN;
        case.check(lab, &values);
    }
}
