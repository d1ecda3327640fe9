//! Bugs of scans that find cuts.

use super::{Bug, Compiler, Suite, bug};
use kvlar::{Codec, Schedule};
use kvlar_tests::Lab;
use kvlar_tests::scan::ScanCase;
use kvlar_tests::scan_select::ScanSelectCase;

pub const SUITE: Suite = Suite { name: "scan_select", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const BUGS: &[Bug] = &[
    bug("ties go to the higher row", "scan/cut.cuh", "uint32_t(~uint32_t(i))", "uint32_t(i)"),
    bug("rows that are always kept do not count", "scan/cut.cuh", "need = k - forced;", "need = k;"),
    bug("recent rows of none", "scan/cut.cuh", "max(first, rows - int(p.recent_rows))", "rows"),
    bug("rows that are always kept stay counted", "scan/cut.cuh", "atomicSub(bins + ", "atomicSub(bins + 0 * "),
    bug("recent rows taken for sinks", "scan/cut.cuh", "i < first ? i : i + end - first", "i"),
    bug(
        "bins from below",
        "scan/cut.cuh",
        "const int top = kBins - 1 - kEach * int(threadIdx.x);",
        "const int top = kEach * int(threadIdx.x) + kEach - 1;",
    ),
    bug("a bin too early", "scan/cut.cuh", "before + bins[at] < need", "before + bins[at] <= need"),
    bug(
        "rows that are always kept compete",
        "scan/cut.cuh",
        "from = first + int(threadIdx.x); from < end;",
        "from = int(threadIdx.x); from < end;",
    ),
    bug("a list that ends early", "scan/cut.cuh", "if (int(slot) < room)", "if (int(slot) < room && slot < 16)"),
    bug("lists that are too long trusted", "scan/cut.cuh", "int(shared.listed) <= room;", "true;"),
    bug("the digit above not taken off", "scan/cut.cuh", "uint32_t(need) - shared.above;", "uint32_t(need);"),
    bug("bins of the digit before", "scan/cut.cuh", "bins[i] = 0;", "bins[i] &= 1;"),
    bug("digits of scores that differ above them", "scan/cut.cuh", "if (x >> known == prefix >> known) ", ""),
    bug("digits that overlap", "scan/cut.cuh", "      known = shift;\n", ""),
    bug("a digit too few", "scan/cut.cuh", "digit < 5 && !whole", "digit < 3 && !whole"),
    bug("counts of the last CTA alone", "scan/scan.cuh", "      out.bins[i] = count;\n", ""),
    bug("counts left behind", "device/order.cuh", "      counts[i] = 0;\n", ""),
    bug("any CTA finds a cut", "scan/scan.cuh", "bool last = share.splits == 1;", "bool last = true;"),
    bug("one k for all", "scan/scan.cuh", "s.ks + head * s.k_stride", "s.ks"),
    bug(
        "k above the most",
        "scan/scan.cuh",
        "min(int(__ldg(s.ks + head * s.k_stride)), int(s.k))",
        "int(__ldg(s.ks + head * s.k_stride))",
    ),
    bug("cuts of the first sequence", "scan/scan.cuh", "s.cuts[head] = found;", "s.cuts[unit.head] = found;"),
    bug(
        "the last score listed again",
        "scan/cut.cuh",
        "if (i >= end || own >> 21 != bin) continue;",
        "if (own >> 21 != bin) continue;",
    ),
    bug(
        "a list of a thread's first sixteen",
        "scan/cut.cuh",
        "from < end; from += kAtOnce * kThreads",
        "from < min(end, first + kAtOnce * kThreads); from += kAtOnce * kThreads",
    ),
    bug("a thread's bins but the last four", "scan/cut.cuh", "i < kEach / 4; ++i", "i < kEach / 4 - 1; ++i"),
    bug("counts of a thread's first score", "scan/cut.cuh", "ordered_key(x[j]);", "ordered_key(x[0]);"),
];

const SOURCE: &str = r#"
#include "scan/warp.cuh"
KVLAR_SCAN_ENTRY(kvlar_scan_d64_n8, 3, kvlar::scan::WarpScan<64, 1>)
GPU_EXPORT(kvlar_scan_d64_n8)
#include "attend/schedule.cu"
"#;

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    for schedule in [Schedule::Balanced, Schedule::Own] {
        let scan = ScanCase::new(Codec::Int4, (4, 2), 64, &[300, 40, 0]).with(|c| c.schedule = schedule);
        ScanSelectCase::new(scan, 70)
            .with(|c| (c.sink_rows, c.recent_rows, c.ks) = (2, 9, Some(vec![70, 200, 30, 12, 5, 9])))
            .check(lab);
    }
    let one = ScanCase::new(Codec::Int4, (1, 1), 64, &[1200]);
    for k in [1, 600, 1199] {
        ScanSelectCase::new(one.clone(), k).check(lab);
    }
    // The last row that competes is now and then a little above the cut.
    let short = ScanCase::new(Codec::Bf16, (4, 4), 8, &[130, 130]);
    for recent_rows in 0..30 {
        ScanSelectCase::new(short.clone(), 20 + recent_rows).with(|c| c.recent_rows = recent_rows).check(lab);
    }
    for k in [2, 33, 199] {
        let equal = ScanCase::new(Codec::Int4, (2, 1), 64, &[200]).with(|c| c.q_size = 0.0);
        ScanSelectCase::new(equal, k).with(|c| c.sink_rows = 1).check(lab);
    }
    // More equal scores than there is room for.
    let many = ScanCase::new(Codec::Int2, (1, 1), 8, &[4700]).with(|c| c.q_size = 0.0);
    ScanSelectCase::new(many, 3000).check(lab);
    // More than threads list at once, and room for them.
    let listed = ScanCase::new(Codec::Bf16, (1, 1), 8, &[2500]).with(|c| c.q_size = 0.0);
    ScanSelectCase::new(listed, 2300).check(lab);
}
