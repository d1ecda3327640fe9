//! Bugs of attention over selected rows.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Codec, Dtype, Schedule};
use kvlar_tests::Lab;
use kvlar_tests::attend::{AttendCase, SegmentCase};
use kvlar_tests::attend_cut::{AttendCutCase, Cut, Scores, check};
use kvlar_tests::pages::Layout;

pub const SUITE: Suite = Suite { name: "attend_cut", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const FILE: &str = "attend_cut/warp.cuh";

const BUGS: &[Bug] = &[
    bug("rows at the cut are left out", FILE, "uint32_t(row)) >= cut;", "uint32_t(row)) > cut;"),
    bug("scores compared as bits", FILE, "ordered_key(score)", "__float_as_uint(score)"),
    bug("ties by the row of a tile", FILE, "uint32_t(row)) >= cut;", "uint32_t(lane)) >= cut;"),
    bug("sinks one too many", FILE, "row < int(selection.sink_rows)", "row <= int(selection.sink_rows)"),
    bug("sinks not kept", FILE, "(row < int(selection.sink_rows)) | ", ""),
    bug(
        "recent rows one too few",
        FILE,
        "row >= length - int(selection.recent_rows)",
        "row > length - int(selection.recent_rows)",
    ),
    bug(
        "recent rows of the first segment's length",
        FILE,
        "selected(row, length, score[i])",
        "selected(row, shared.unit().length[0], score[i])",
    ),
    bug(
        "scores of the first head",
        FILE,
        "scores(selection.scores + head_index() * selection.score_stride)",
        "scores(selection.scores)",
    ),
    bug(
        "the cut of another sequence",
        FILE,
        "__ldg(selection.cuts + head_index())",
        "__ldg(selection.cuts + shared.unit().head)",
    ),
    bug("scores of any segment", FILE, "there & (!scored | selected", "there & (selected"),
    bug("rows beyond the end", FILE, "min(length - from.row, (end - tile) * kRows)", "(end - tile) * kRows"),
    bug(
        "tiles beyond the end",
        FILE,
        "min(length - from.row, (end - tile) * kRows)",
        "min(length - from.row, (end + 1 - tile) * kRows)",
    ),
    bug("looks that overlap", FILE, "walk.next += 32 * kWarps;", "walk.next += 31 * kWarps;"),
    bug("looks with a gap", FILE, "walk.next += 32 * kWarps;", "walk.next += 33 * kWarps;"),
    bug(
        "one look alone",
        FILE,
        "while (walk.tiles == 0 && walk.next < walk.end) {",
        "if (walk.tiles == 0 && walk.next < walk.end) {",
    ),
    bug("tiles of a neighbouring warp", FILE, "to.tile = walk.first + i * kWarps;", "to.tile = walk.first + i;"),
    bug("rows of the first tile", FILE, "__shfl_sync(0xffffffffu, walk.rows, i)", "__shfl_sync(0xffffffffu, walk.rows, 0)"),
    bug("rows that are not selected are read", FILE, "there && c + j < chunks ? 16 : 0", "c + j < chunks ? 16 : 0"),
    bug("rows that are not selected count", "attend/warp.cuh", "if (!seen || Base::hidden(", "if (Base::hidden("),
    bug("tiles of some rows taken whole", "attend/warp.cuh", " || (kSome && ~shown << (32 - Tiles::kRows) != 0)", ""),
    bug("rows of the tile after", FILE, "const Picked now = stages == 3 ? older : old;", "const Picked now = old;"),
    bug(
        "an end before the last tile",
        FILE,
        "next.tile < 0 && old.tile < 0 && (stages < 3 || older.tile < 0)",
        "next.tile < 0 && old.tile < 0",
    ),
    bug("an end at the last pick", FILE, "next.tile < 0 && old.tile < 0 && (stages < 3 || older.tile < 0)", "next.tile < 0"),
    bug("a stage that is still read is written", FILE, "to = to + 1 == stages ? 0 : to + 1;", "to = stage;"),
    bug(
        "a stage is read before it landed",
        FILE,
        "if (stages == 3) ptx::cp_async_wait<1>(); else",
        "if (stages == 3) ptx::cp_async_wait<2>(); else",
    ),
    bug("a segment at the tiles of those before", FILE, "lane / kRows - seen)", "lane / kRows)"),
    bug("a segment over those before", FILE, "own |= bits", "own = bits"),
    bug("a tile too many of a segment", FILE, "(rows + kTileStep - 1) / kTileStep;", "rows / kTileStep + 1;"),
];

const SOURCE: &str = r#"
#include "attend_cut/warp.cuh"
KVLAR_ATTEND_CUT_ENTRY(kvlar_attend_cut_bf16_d64_n8, kvlar::attend_cut::WarpCut<64, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_cut_bf16_d64_n8)
KVLAR_ATTEND_CUT_ENTRY(kvlar_attend_cut_bf16_d128_n8, kvlar::attend_cut::WarpCut<128, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_cut_bf16_d128_n8)
#include "attend/schedule.cu"
"#;

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    let base = |d, lengths: &[usize]| AttendCase::new(Dtype::Bf16, (4, 2), d, lengths);
    for d in [64, 128] {
        for cut in [Cut::All, Cut::None, Cut::Best(9), Cut::Best(120)] {
            let case = AttendCutCase::new(base(d, &[300, 40, 129]), cut);
            check(lab, &case.with(|c| (c.sink_rows, c.recent_rows) = (3, 5)));
        }
        for scores in [Scores::Ties, Scores::Broken] {
            check(lab, &AttendCutCase::new(base(d, &[90, 41]), Cut::Best(37)).with(|c| c.scores = scores));
        }
        let tiers = base(d, &[0, 0]).with(|c| {
            let segment =
                |lengths: [usize; 2]| SegmentCase { capacity: 96, ..SegmentCase::new(Codec::Bf16, Layout::Hnd(32), &lengths) };
            c.segments = vec![segment([4, 2]), segment([90, 33]), segment([17, 1])];
        });
        check(lab, &AttendCutCase::new(tiers, Cut::Best(7)).with(|c| (c.segment, c.recent_rows) = (1, 2)));
        // A segment that ends where a round of the warps does.
        let round = base(d, &[0, 0]).with(|c| {
            let segment =
                |lengths: [usize; 2]| SegmentCase { capacity: 300, ..SegmentCase::new(Codec::Bf16, Layout::Hnd(32), &lengths) };
            (c.segments, c.schedule) = (vec![segment([128, 256]), segment([300, 90])], Schedule::Own);
        });
        check(lab, &AttendCutCase::new(round, Cut::Best(90)).with(|c| c.segment = 1));
    }
    // A CTA's share is several looks of a warp, some without a row.
    let long = AttendCase::new(Dtype::Bf16, (1, 1), 8, &[56_000]).with(|c| c.segments[0].layout = Layout::Contiguous);
    check(lab, &AttendCutCase::new(long.clone(), Cut::Best(60)).with(|c| c.scores = Scores::Rising));
    check(lab, &AttendCutCase::new(long, Cut::Best(2000)));
    check(lab, &AttendCutCase::new(base(64, &[60, 100]).with(|c| (c.window, c.query_rows) = (20, 3)), Cut::Best(30)));
}
