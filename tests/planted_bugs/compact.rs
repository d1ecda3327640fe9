//! Bugs of compact and protect.

use super::{Bug, Compiler, Suite, bug};
use kvlar_tests::Lab;
use kvlar_tests::compact::{CompactCase, Judge, Layout, Span, check_protected, check_staged};

pub const SUITE: Suite = Suite { name: "compact", by: Compiler::Host, source: SOURCE, bugs: BUGS, run: short_suites };

const BUGS: &[Bug] = &[
    bug("dropped barrier between reads and writes", "compact/move.cuh", "if (!kAny) __syncthreads();", ""),
    bug("rows before the first hole touched", "compact/move.cuh", "!kAny && moves.source(move)", "false && moves.source(move)"),
    bug(
        "values of the keys' page",
        "compact/move.cuh",
        "(key ? part : part - of_keys);\n  }\n\n  // Word",
        "part;\n  }\n\n  // Word",
    ),
    bug("scales stay", "compact/move.cuh", "if (part < of_keys + of_values) {", "if (part < of_keys) {"),
    bug(
        "positions stay",
        "compact/move.cuh",
        "if (part == of_keys + of_values && p.rows.positions)",
        "if (part == of_keys + of_values && p.rows.positions && row < 0)",
    ),
    bug("scores of the page", "compact/move.cuh", "shared.bases.scores) + row;", "shared.bases.scores) + at.row;"),
    bug("targets on the sources' pages", "compact/move.cuh", "place(shared.target_pages,", "place(shared.source_pages,"),
    bug("fillers ascend", "compact/move.cuh", "kAny ? source_at - move : move", "move"),
    bug(
        "rows of a bad page moved to",
        "compact/move.cuh",
        "if (is_page(from) && is_page(to)) *vector",
        "if (is_page(from)) *vector",
    ),
    bug(
        "bad pages not reported",
        "compact/move.cuh",
        "else if (p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_PAGE));",
        "",
    ),
    bug("half a batch", "compact/keep.cuh", "kThreads * kWords / words.divisor));", "kThreads * kWords / words.divisor)) + 1;"),
    bug("a layer too far", "compact/keep.cuh", "o.index % int(p.owners_a_layer)", "o.index"),
    bug("the first layer's pool", "compact/keep.cuh", "(layers + layer)", "(layers)"),
    bug(
        "the mask of another owner",
        "compact/keep.cuh",
        "mask = k.mask + o.row() * k.stride;",
        "mask = k.mask + o.index * k.stride;",
    ),
    bug(
        "one row of scores too many",
        "compact/keep.cuh",
        "p.scores + o.row() * p.score_stride",
        "p.scores + o.row() * p.rows.max_rows",
    ),
    bug(
        "sets begin anew with each owner",
        "compact/keep.cuh",
        "before = uint32_t(o.row() % k.members) * k.columns;",
        "before = 0;",
    ),
    bug("the cut of another set", "compact/keep.cuh", "k.cuts + o.row() / k.members", "k.cuts + o.row() % k.members"),
    bug("recent rows of the capacity", "compact/keep.cuh", "recent_from = columns - min(", "recent_from = k.columns - min("),
    bug("sinks not kept", "compact/keep.cuh", "|| column < sinks", ""),
    bug("rows outside of the span go", "compact/keep.cuh", "if (column[i] >= columns && (in >> i & 1)) kept |= 1u << i;", ""),
    bug("the span from 0", "compact/keep.cuh", "column[i] -= first;", ""),
    bug(
        "counts above the columns",
        "compact/keep.cuh",
        "max(0, min(__ldg(k.counts + o.seq), int(k.columns)))",
        "max(0, __ldg(k.counts + o.seq))",
    ),
    bug("positions by row", "compact/keep.cuh", "if (p.rows.positions) locate(column, p, o, in);", ""),
    bug("lengths not clamped", "compact/keep.cuh", "length = max(0, min(held, int(p.rows.max_rows)));", "length = max(0, held);"),
    bug(
        "bad lengths not reported",
        "compact/keep.cuh",
        "if (held != length && threadIdx.x == 0",
        "if (false && threadIdx.x == 0",
    ),
    bug(
        "lists of warps over each other",
        "compact/keep.cuh",
        "before += w < warp ? shared.warp_sums[w] : 0;",
        "before += w < 0 ? shared.warp_sums[w] : 0;",
    ),
    bug("lanes in each other's place", "compact/keep.cuh", "word & ((1u << lane) - 1)", "word & ((2u << lane) - 1)"),
    bug(
        "rows of earlier tiles forgotten",
        "compact/compact.cu",
        "const bool holes = left < first || count < end - first;",
        "const bool holes = count < end - first;",
    ),
    bug(
        "targets from the tile's start",
        "compact/compact.cu",
        "Moves<false>{shared, first, 0, left, 0}",
        "Moves<false>{shared, first, 0, first, 0}",
    ),
    bug(
        "pages of targets from the first",
        "compact/compact.cu",
        "mover.load_pages(shared.target_pages, o, left, left + count - 1);",
        "mover.load_pages(shared.target_pages, o, 0, left + count - 1);",
    ),
    bug(
        "dropped barrier before lists are read",
        "compact/compact.cu",
        "    __syncthreads();\n    if (p.source)",
        "    if (p.source)",
    ),
    bug("the length of the first round", "compact/compact.cu", "= left;\n}", "= 0;\n}"),
    bug("holes behind the rows left", "compact/compact.cu", "min(hole_first + kTile, left)", "min(hole_first + kTile, o.length)"),
    bug("the same fillers again", "compact/compact.cu", "    filler += count;\n", ""),
    bug("sinks by row", "compact/protect.cu", "return position < p.sink_positions", "return row < p.sink_positions"),
    bug("the first sequence's window", "compact/protect.cu", "__ldg(p.recent + seq)", "__ldg(p.recent)"),
    bug("scores wait a column too long", "compact/protect.cu", "position - staged_from;", "position - staged_from - 1;"),
    bug("scores that waited are forgotten", "compact/protect.cu", "    *own = x;\n", ""),
    bug("scores that wait of the first owner", "compact/protect.cu", "p.staged + of * p.staged_stride", "p.staged"),
    bug("scores that wait without end", "compact/protect.cu", "column >= 0 && column < p.staged_count", "column >= 0"),
    bug("scores that wait of the first sequence", "compact/protect.cu", "__ldg(p.staged_from + seq)", "__ldg(p.staged_from)"),
    bug("always filled", "compact/protect.cu", "(p.fill ? int(p.row_count) : length)", "int(p.row_count)"),
    bug("strides of the wrong scores", "compact/protect.cu", "p.scores + of * p.stride", "p.scores + of * p.protected_stride"),
    bug("pages of protect not checked", "compact/protect.cu", "uint32_t(page) >= p.page_count", "page < 0"),
];

const SOURCE: &str = r#"
#include "compact/compact.cu"
#include "compact/protect.cu"
"#;

/// A short form of the suites.
fn short_suites(lab: &Lab) {
    let stored = kvlar::Stored::row_wise(32, 8);
    let both = |case: CompactCase| {
        case.check(lab);
        case.any().check(lab);
    };
    for layout in [Layout::Owned(16), Layout::Contiguous, Layout::Shared(32)] {
        both(CompactCase::new(1, stored, layout, &[130, 5, 64, 0, 77, 160], 160).owners(2, 3).random_mask(55));
    }
    // Scales alone beside the rows; batches that are bound by words, and by vectors.
    for (row, params) in [(16, 20), (160, 4)] {
        both(CompactCase::new(2, kvlar::Stored::row_wise(row, params), Layout::Owned(16), &[600], 600).random_mask(80));
    }
    let long = CompactCase::new(3, kvlar::Stored::row_wise(16, 0), Layout::Owned(64), &[9000], 9000);
    both(long.clone().random_mask(50));
    both(long.mask(|_, r| !(300..310).contains(&r)));
    // Judged by position, by cut, and both.
    for count in [None, Some(vec![60, 1000])] {
        let mut case = CompactCase::new(4, stored, Layout::Owned(16), &[100, 37, 64, 120], 128).owners(2, 1);
        (case.columns, case.span) = (70, Some(Span { first: vec![10, 5], count }));
        both(case.random_mask(40));
    }
    for members in [2, 4] {
        let cut = CompactCase::with_cuts(5, stored, Layout::Owned(16), members);
        both(cut.clone());
        both(cut.with(|c| c.span = Some(Span { first: vec![3, 20], count: Some(vec![90, 130]) })));
    }
    let mut own = CompactCase::with_cuts(6, stored, Layout::Owned(16), 4);
    let Judge::Cut { scores, stride, .. } = &mut own.judge else { unreachable!() };
    (own.scores, own.score_stride, own.columns) = (scores.take(), *stride, 128);
    both(own);
    for layout in [Layout::Owned(16), Layout::Contiguous] {
        let mut layered = CompactCase::new(7, stored, layout, &[90, 20, 64, 7, 100, 100, 3, 50], 100).owners(2, 2);
        layered.layered = true;
        both(layered.random_mask(50));
    }
    // What is clamped or skipped.
    let short = CompactCase::new(8, stored, Layout::Owned(16), &[180, -4], 100).random_mask(50);
    assert!(short.check_all(lab).1.bad_length());
    let mut damaged = CompactCase::new(9, stored, Layout::Owned(16), &[100], 100).mask(|_, row| row < 70 || row % 3 == 0);
    damaged.bad = vec![(0, 0), (0, 3)];
    damaged.check(lab);
    damaged = damaged.random_mask(50);
    for case in [damaged.clone(), damaged.any()] {
        assert!(case.check_all(lab).1.bad_page());
    }
    let mut case = CompactCase::new(10, stored, Layout::Owned(16), &[120, 7, 0, 33], 128).owners(2, 2);
    for fill in [false, true] {
        assert!(check_protected(lab, &case, 128, Some(&[150, 20]), fill).is_clean());
    }
    assert!(check_staged(lab, &case, (128, true), Some(&[150, 20]), Some((&[100, 3], 20))).is_clean());
    case.bad = vec![(0, 1), (0, 2)];
    assert!(check_protected(lab, &case, 125, Some(&[150, 20]), true).bad_page());
}
