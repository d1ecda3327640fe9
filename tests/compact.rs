//! compact against rows moved one at a time: which rows are where afterwards, and that nothing else has changed.

use kvlar::{
    Codec, Columns, CompactArgs, CompactShape, Format, Keep, ProtectArgs, ProtectShape, RowScores, Rows, StagedScores, Stored,
    View, ViewMut, Workspace,
};
use kvlar_reference::testing::Rng;
use kvlar_tests::compact::{CompactCase, CompactRun, Judge, Layout, Span, check_protected, check_staged};
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    by_hand,
    patterns,
    formats,
    layouts,
    lengths_of_owners,
    tiles,
    by_position,
    by_cut,
    layers_with_pools_of_their_own,
    keys_alone,
    nothing_beside_rows,
    random_cases,
    a_second_time,
    lengths_that_are_none,
    pages_that_are_none,
    rows_before_the_first_hole_are_not_touched,
    a_replay_follows_marks_and_lengths,
    attention_over_what_is_left,
    protected_scores,
    protected_scores_of_bad_input,
    rows_in_little,
);

const LAYOUTS: [Layout; 4] = [Layout::Contiguous, Layout::Owned(16), Layout::Owned(64), Layout::Shared(32)];

fn small() -> Stored {
    Stored::row_wise(32, 8)
}

/// Rows 0, 2, 5 and 9 of ten.
fn by_hand(lab: &Lab) {
    let case = CompactCase::new(1, small(), Layout::Owned(16), &[10], 20).mask(|_, row| [0, 2, 5, 9].contains(&row));
    assert_eq!(case.check(lab), [4]);
    assert_eq!(case.sources(0), [0, 2, 5, 9]);
    let any = case.any();
    assert_eq!(any.check(lab), [4]);
    assert_eq!(any.sources(0), [0, 9, 2, 5]);
}

/// None, all, the first, the last, every other, halves.
fn patterns(lab: &Lab) {
    type Pattern = fn(usize) -> bool;
    let all: [Pattern; 8] =
        [|_| false, |_| true, |r| r == 0, |r| r == 99, |r| r % 2 == 0, |r| r % 2 == 1, |r| r < 50, |r| r >= 50];
    for layout in [Layout::Owned(16), Layout::Contiguous] {
        for (i, pattern) in all.into_iter().enumerate() {
            let case = CompactCase::new(i as u64, small(), layout, &[100, 64], 120).mask(|_, row| pattern(row));
            case.check(lab);
            case.any().check(lab);
        }
    }
}

fn formats(lab: &Lab) {
    let int4 = Format { group: Some(32), ..Codec::Int4.into() };
    let all: [(Format, usize); 7] = [
        (Codec::Bf16.into(), 128),
        (Codec::F16.into(), 256),
        (Codec::Fp8.into(), 80),
        (Codec::Int8.into(), 128),
        (int4, 128),
        (Codec::Int2.into(), 64),
        (Format::pq(2, 256), 72),
    ];
    for (i, (format, dim)) in all.into_iter().enumerate() {
        let case = CompactCase::new(i as u64, format.stored(dim), Layout::Owned(64), &[200, 33], 256).random_mask(60);
        case.check(lab);
        case.any().check(lab);
    }
    // Keys of one format, values of another.
    let mut case = CompactCase::new(9, int4.stored(128), Layout::Owned(16), &[150, 40, 99], 160).random_mask(50);
    case.shape.values = Some(Format::from(Codec::Bf16).stored(96));
    case.check(lab);
    case.any().check(lab);
}

fn layouts(lab: &Lab) {
    for (i, layout) in LAYOUTS.into_iter().enumerate() {
        for seed in 0..2 {
            let lengths = [130, 5, 64, 0, 77, 160];
            let case = CompactCase::new(10 * i as u64 + seed, small(), layout, &lengths, 160).owners(2, 3).random_mask(55);
            case.check(lab);
            case.any().check(lab);
        }
    }
}

/// Also those that are none: clamped, and said so.
fn lengths_of_owners(lab: &Lab) {
    for lengths in [[0, 1, 2, 31], [32, 33, 63, 64], [100, 99, 0, 100]] {
        let case = CompactCase::new(3, small(), Layout::Owned(16), &lengths, 100).owners(2, 2).random_mask(50);
        case.check(lab);
        case.any().check(lab);
    }
    CompactCase::new(3, small(), Layout::Contiguous, &[], 100).check(lab);
}

/// Beyond the rows that are judged at a time.
fn tiles(lab: &Lab) {
    let rows = 9000;
    let stored = Stored::row_wise(16, 0);
    for percent in [1, 50, 99] {
        let case = CompactCase::new(percent as u64, stored, Layout::Owned(16), &[rows], rows as usize).random_mask(percent);
        case.check(lab);
        case.any().check(lab);
    }
    // The first hole in a later tile; holes in the first alone; what is kept behind two tiles.
    let bounds: [(usize, usize); 4] = [(4096, 4097), (5000, 5001), (0, 3), (10, 8300)];
    for (from, to) in bounds {
        let case = CompactCase::new(7, stored, Layout::Contiguous, &[rows], rows as usize).mask(|_, r| !(from..to).contains(&r));
        case.check(lab);
        case.any().check(lab);
    }
}

/// Rows outside of the positions that are judged stay.
fn by_position(lab: &Lab) {
    for (seed, layout) in [(1, Layout::Owned(16)), (2, Layout::Contiguous), (3, Layout::Shared(16))] {
        for count in [None, Some(vec![60, 1000]), Some(vec![0, -3])] {
            let mut case = CompactCase::new(seed, small(), layout, &[100, 37, 64, 120], 128).owners(2, 1);
            (case.columns, case.span) = (70, Some(Span { first: vec![10, -5], count }));
            let case = case.random_mask(40);
            case.check(lab);
            case.any().check(lab);
        }
    }
}

fn by_cut(lab: &Lab) {
    for members in [1, 2, 4] {
        for (seed, layout) in [(1, Layout::Owned(16)), (2, Layout::Contiguous)] {
            let case = CompactCase::with_cuts(seed, small(), layout, members);
            case.check(lab);
            case.clone().any().check(lab);
            let by_position = case.with(|c| c.span = Some(Span { first: vec![3, 20], count: Some(vec![90, 130]) }));
            by_position.check(lab);
            by_position.any().check(lab);
        }
    }
    // By the scores that move.
    let mut case = CompactCase::with_cuts(4, small(), Layout::Owned(16), 4);
    let Judge::Cut { scores, stride, .. } = &mut case.judge else { unreachable!() };
    (case.scores, case.score_stride, case.columns) = (scores.take(), *stride, 128);
    case.check(lab);
    case.any().check(lab);
}

fn layers_with_pools_of_their_own(lab: &Lab) {
    for layout in LAYOUTS {
        let mut case = CompactCase::new(5, small(), layout, &[90, 20, 64, 7, 100, 100, 3, 50], 100).owners(2, 2).random_mask(50);
        case.layered = true;
        case.check(lab);
        case.any().check(lab);
    }
}

/// Values lie elsewhere.
fn keys_alone(lab: &Lab) {
    let mut case = CompactCase::new(5, small(), Layout::Owned(16), &[90, 20], 100).random_mask(50);
    case.shape.values = None;
    case.check(lab);
    case.clone().any().check(lab);
    case.layered = true;
    case.check(lab);
}

fn nothing_beside_rows(lab: &Lab) {
    let mut case = CompactCase::new(5, Stored::row_wise(48, 0), Layout::Owned(16), &[90, 20], 100).random_mask(50);
    (case.scores, case.positions) = (None, None);
    case.check(lab);
    case.any().check(lab);
}

fn random_cases(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(12);
    for seed in 0..count {
        let mut rng = Rng::new(seed + 100);
        let (seqs, layers, heads) = (1 + rng.below(2), 1 + rng.below(2), 1 + rng.below(3));
        let capacity = 1 + rng.below(400);
        let lengths: Vec<i32> = (0..seqs * layers * heads).map(|_| rng.below(capacity + 1) as i32).collect();
        let stored = Stored::row_wise(16 * (1 + rng.below(6)), 4 * rng.below(5));
        let layout = LAYOUTS[rng.below(4)];
        let mut case = CompactCase::new(seed, stored, layout, &lengths, capacity).owners(seqs, heads);
        case.layered = rng.below(3) == 0;
        if rng.below(2) == 0 {
            case.scores = None;
        }
        if rng.below(2) == 0 {
            case.columns = 1 + rng.below(capacity);
            let count = (rng.below(2) == 0).then(|| (0..seqs).map(|_| rng.below(capacity) as i32).collect());
            case.span = Some(Span { first: (0..seqs).map(|_| rng.below(100) as i32 - 10).collect(), count });
        }
        let case = case.random_mask(rng.below(101));
        case.check(lab);
        case.any().check(lab);
    }
}

/// With all rows marked, nothing happens.
fn a_second_time(lab: &Lab) {
    let case = CompactCase::new(1, small(), Layout::Owned(16), &[100, 0, 16], 100);
    assert_eq!(case.after().keys, case.before().keys);
    assert_eq!(case.check(lab), case.lengths);
    assert_eq!(case.any().check(lab), [100, 0, 16]);
}

/// Clamped, and said so.
fn lengths_that_are_none(lab: &Lab) {
    let all = [([-3, 40], true), ([101, 40], true), ([i32::MAX, i32::MIN], true), ([100, 0], false)];
    for (lengths, bad) in all {
        for layout in [Layout::Owned(16), Layout::Contiguous] {
            let case = CompactCase::new(2, small(), layout, &lengths, 100).random_mask(50);
            for case in [case.clone(), case.any()] {
                let (_, status) = case.check_all(lab);
                assert_eq!((status.bad_length(), status.bad_page()), (bad, false), "{lengths:?}");
            }
        }
    }
}

/// Their rows stay where they are, and nothing goes there.
fn pages_that_are_none(lab: &Lab) {
    for bad in [vec![(0, 0)], vec![(0, 3), (1, 1)], vec![(0, 5), (0, 1), (1, 0), (1, 2)]] {
        let mut case = CompactCase::new(3, small(), Layout::Owned(16), &[100, 50], 110).random_mask(50);
        case.bad = bad.clone();
        for case in [case.clone(), case.clone().any()] {
            assert!(case.check_all(lab).1.bad_page(), "{bad:?}");
        }
        // Judged by position: rows whose position is not known stay.
        case.span = Some(Span { first: vec![0], count: Some(vec![300]) });
        for case in [case.clone(), case.any()] {
            assert!(case.check_all(lab).1.bad_page(), "{bad:?}");
        }
    }
}

fn rows_before_the_first_hole_are_not_touched(lab: &Lab) {
    let mut case = CompactCase::new(4, small(), Layout::Owned(16), &[100], 100).mask(|_, row| row < 70 || row % 3 == 0);
    case.bad = vec![(0, 0), (0, 3)];
    assert!(case.check_all(lab).1.is_clean());
    // In any order, no kept row is touched that stays.
    let mut any = CompactCase::new(4, small(), Layout::Owned(16), &[100], 100).mask(|_, row| row != 40).any();
    any.bad = vec![(0, 0), (0, 1), (0, 3), (0, 5)];
    assert!(any.check_all(lab).1.is_clean());
}

fn a_replay_follows_marks_and_lengths(lab: &Lab) {
    for any in [false, true] {
        let first = CompactCase::new(5, small(), Layout::Owned(16), &[100, 64, 33], 100).random_mask(70);
        let first = if any { first.any() } else { first };
        let mut run = CompactRun::new(lab, &first);
        let graph = lab.stream.capture(|stream| run.try_launch(&lab.device, stream, |_| ())).expect("a graph");
        let mut now = first.before();
        for (round, percent) in [70, 50, 100, 30].into_iter().enumerate() {
            let mut case = first.clone();
            (case.lengths, case.seed) = (now.lengths.clone(), 5 + round as u64);
            let case = CompactCase { seed: 5, ..case.random_mask(percent) };
            let Judge::Mask(mask) = &case.judge else { unreachable!() };
            run.set_mask(lab, mask);
            // SAFETY: everything that was captured lives in `run`.
            unsafe { graph.launch(&lab.stream) }.expect("a replay");
            lab.stream.synchronize().expect("a result");
            now = case.after_all(&now);
            run.compare(lab, &now, &case);
        }
    }
}

/// Attention does not know the difference between rows that are masked and rows that are gone, in any order.
fn attention_over_what_is_left(lab: &Lab) {
    let (heads, rows, dim) = (2, 50, 8);
    for (codec, any) in [(Codec::Bf16, false), (Codec::Bf16, true), (Codec::F16, false), (Codec::F16, true)] {
        let stored = Format::from(codec).stored(dim);
        let case = CompactCase::new(6, stored, Layout::Contiguous, &[50, 31], rows).random_mask(40);
        let case = if any { case.any() } else { case };
        let mut rng = Rng::new(7);
        let x: Vec<f32> = rng.normals(2 * heads * rows * dim, 1.0);
        let coded = kvlar_reference::encode_row(&x, codec.reference(), x.len()).expect("a row").codes;
        let (keys, values) = coded.split_at(coded.len() / 2);
        let mut run = CompactRun::new(lab, &case);
        run.set_rows(lab, keys, values);
        run.launch(lab);
        let now = run.now(lab);
        let q = rng.normals(heads * dim, 1.0);
        for head in 0..heads {
            let row = |bytes: &[u8], row: usize| {
                kvlar_reference::decode_row(&bytes[(head * rows + row) * 2 * dim..][..2 * dim], &[], dim, codec.reference(), dim)
                    .expect("a row")
            };
            let attend = |k: &[u8], v: &[u8], visible: &[usize]| {
                let weight = |r: usize| {
                    let dot: f64 = row(k, r).iter().zip(&q[head * dim..]).map(|(a, b)| f64::from(a * b)).sum();
                    dot.exp()
                };
                let sum: f64 = visible.iter().map(|&r| weight(r)).sum();
                let mut out = vec![0.0; dim];
                for &r in visible {
                    row(v, r).iter().zip(&mut out).for_each(|(x, to)| *to += weight(r) / sum * f64::from(*x));
                }
                out
            };
            let kept: Vec<usize> = (0..case.length(head)).filter(|&r| case.is_kept(head, r)).collect();
            let left: Vec<usize> = (0..now.lengths[head] as usize).collect();
            let (masked, gone) = (attend(keys, values, &kept), attend(&now.keys[0], &now.values[0], &left));
            assert!(masked.iter().zip(&gone).all(|(a, b)| (a - b).abs() < 1e-12), "{codec:?}: {masked:?} {gone:?}");
        }
    }
}

fn protected_scores(lab: &Lab) {
    for layout in [Layout::Owned(16), Layout::Contiguous, Layout::Shared(64)] {
        for fill in [false, true] {
            let mut case = CompactCase::new(8, small(), layout, &[120, 7, 0, 33], 128).owners(2, 2);
            assert!(check_protected(lab, &case, 128, Some(&[150, 20]), fill).is_clean());
            assert!(check_protected(lab, &case, 121, None, fill).is_clean());
            case.positions = None;
            assert!(check_protected(lab, &case, 128, Some(&[100, -1]), fill).is_clean());
        }
    }
    // Scores that wait for their rows, of sequences that are at different places.
    for (layout, from) in [(Layout::Owned(16), [100, 3]), (Layout::Shared(64), [-5, 60])] {
        let case = CompactCase::new(12, small(), layout, &[120, 7, 1, 33], 128).owners(2, 2);
        for width in [1, 40, 300] {
            assert!(check_staged(lab, &case, (128, true), Some(&[150, 20]), Some((&from, width))).is_clean());
        }
    }
    let long = CompactCase::new(9, Stored::row_wise(16, 0), Layout::Owned(64), &[2500, 1024], 2600);
    assert!(check_protected(lab, &long, 2600, Some(&[3000]), true).is_clean());
}

fn protected_scores_of_bad_input(lab: &Lab) {
    let mut case = CompactCase::new(10, small(), Layout::Owned(16), &[120, 300, -5], 128);
    let status = check_protected(lab, &case, 128, Some(&[100]), true);
    assert_eq!((status.bad_length(), status.bad_page()), (true, false));
    (case.lengths, case.bad) = (vec![100, 50, 40], vec![(0, 0), (1, 2)]);
    let status = check_protected(lab, &case, 128, Some(&[100]), false);
    assert_eq!((status.bad_length(), status.bad_page()), (false, true));
}

/// The race detector's case.
fn rows_in_little(lab: &Lab) {
    let mut case = CompactCase::new(11, small(), Layout::Owned(16), &[90, 33], 100).random_mask(60);
    case.check(lab);
    case.clone().any().check(lab);
    (case.columns, case.span) = (70, Some(Span { first: vec![10], count: None }));
    let case = case.random_mask(40);
    case.check(lab);
    case.clone().any().check(lab);
    let mut cut = CompactCase::with_cuts(4, small(), Layout::Owned(16), 4);
    let Judge::Cut { scores, stride, .. } = &mut cut.judge else { unreachable!() };
    (cut.scores, cut.score_stride, cut.columns) = (scores.take(), *stride, 128);
    cut.check(lab);
    cut.any().check(lab);
    check_staged(lab, &case, (100, true), Some(&[80]), Some((&[30], 60)));
}

#[test]
fn bad_input_is_named() {
    let lab = Lab::reference();
    let case = CompactCase::new(1, small(), Layout::Owned(16), &[10, 20], 32);
    let refuses = |shape: CompactShape, what: &[&str]| says(&shape.plan(&lab.device).unwrap_err(), what);
    let shape = case.shape;
    refuses(CompactShape { keys: Format::from(Codec::Int4Channel).stored(64), ..shape }, &["compact", "unsupported", "keys"]);
    refuses(CompactShape { values: Some(Stored::row_wise(24, 0)), ..shape }, &["values", "24", "16"]);
    refuses(CompactShape { values: Some(Stored::row_wise(16, 6)), ..shape }, &["values", "6"]);
    refuses(CompactShape { keys: Stored::row_wise(0, 0), ..shape }, &["keys"]);
    refuses(CompactShape { keys: Stored::row_wise(1 << 15, 0), ..shape }, &["unsupported", "32768"]);
    refuses(CompactShape { keys: Stored::row_wise(16, 1 << 12), ..shape }, &["unsupported", "4104"]);
    refuses(CompactShape { owners_a_layer: 0, ..shape }, &["owners_a_layer"]);
    refuses(CompactShape { owners: 3, ..shape }, &["owners_a_layer", "3"]);
    refuses(CompactShape { max_rows: 1 << 31, ..shape }, &["max_rows", "too many"]);
    refuses(CompactShape { seqs: 1 << 31, ..shape }, &["max_rows", "too many"]);

    let buffer = lab.upload(&[0u64; 64]);
    // SAFETY: it lives as long as all launches, of which none takes place.
    let view = |bytes| unsafe { View::from_raw(buffer.address(), bytes) };
    // SAFETY: likewise.
    let to = |bytes| unsafe { ViewMut::from_raw(buffer.address(), bytes) };
    let refused = |case: &CompactCase, change: &dyn Fn(&mut CompactArgs<'_>), what: &[&str]| {
        let mut run = CompactRun::new(&lab, case);
        says(&run.try_launch(&lab.device, &lab.stream, change).unwrap_err(), what);
        run.compare(&lab, &case.before(), case); // nothing was enqueued
    };
    refused(&case, &|a| a.rows.max_rows = 33, &["rows", "33", "32"]);
    refused(&case, &|a| a.rows.table_head_stride = 1 << 40, &["page table"]);
    refused(&case, &|a| a.rows.page_rows_log2 = 3, &["rows", "2^3"]);
    refused(&case, &|a| a.rows.table_head_stride = 0, &["positions", "share"]);
    let contiguous = CompactCase::new(1, small(), Layout::Contiguous, &[10, 20], 32).owners(2, 1);
    refused(&contiguous, &|a| a.rows.position_seq_stride = 0, &["positions", "sequences share"]);
    refused(&case, &|a| a.keys.row_stride = 16, &["keys", "32 bytes", "16"]);
    refused(&case, &|a| a.keys.page_stride += 8, &["keys", "multiple of 16"]);
    refused(&case, &|a| a.values.as_mut().unwrap().page_count += 1, &["values"]);
    refused(&case, &|a| a.values = None, &["values", "shape has them"]);
    refused(&case, &|a| a.lengths = to(7), &["lengths", "7 bytes"]);
    refused(&case, &|a| a.positions = Some(to(100)), &["positions", "100 bytes"]);
    refused(&case, &|a| a.source = Some(to(255)), &["source", "255 bytes"]);
    refused(&case, &|a| a.scores = Some(RowScores { scores: to(512), stride: 31 }), &["scores", "31"]);
    refused(&case, &|a| a.scores = Some(RowScores { scores: to(252), stride: 32 }), &["scores", "252 bytes"]);
    let span = |first, count| {
        move |a: &mut CompactArgs<'_>| a.columns = Columns::Positions { first: view(first), count: Some(view(count)) }
    };
    refused(&case, &span(3, 4), &["first", "3 bytes"]);
    refused(&case, &span(4, 3), &["count", "3 bytes"]);
    let mask = |columns, bytes| move |a: &mut CompactArgs<'_>| a.keep = Keep::Mask { mask: view(bytes), columns };
    refused(&case, &mask(32, 63), &["mask", "63 bytes"]);
    refused(&case, &mask(31, 64), &["mask", "31 columns for 32 rows"]);
    refused(&case, &mask(1 << 31, 64), &["mask", "2^30"]);
    let cut = |scores: Option<usize>, stride, cuts, members| {
        move |a: &mut CompactArgs<'_>| {
            let (scores, cuts, sink_rows, recent_rows) = (scores.map(view), view(cuts), 0, 0);
            a.keep = Keep::Cut { scores, stride, columns: 32, cuts, members, sink_rows, recent_rows };
        }
    };
    refused(&case, &cut(Some(256), 32, 16, 0), &["members", "0"]);
    refused(&case, &cut(Some(256), 32, 16, 3), &["members", "sets of 3"]);
    refused(&case, &cut(Some(256), 32, 8, 1), &["cuts", "8 bytes"]);
    refused(&case, &cut(Some(256), 31, 16, 1), &["cut scores", "31"]);
    refused(&case, &cut(Some(255), 32, 16, 1), &["cut scores", "255 bytes"]);
    let mut without = case.clone();
    without.scores = None;
    refused(&without, &cut(None, 32, 16, 1), &["cut scores", "none move"]);
    refused(&case, &|a| (cut(None, 32, 16, 1)(a), span(4, 4)(a)).0, &["cut scores", "columns are not rows"]);
    // Addresses of layers.
    let mut layered = case.clone();
    layered.layered = true;
    let mut run = CompactRun::new(&lab, &layered);
    run.addresses[0] = lab.upload(&[0u8; 7]);
    says(&run.try_launch(&lab.device, &lab.stream, |_| ()).unwrap_err(), &["key layers", "7 bytes"]);
}

#[test]
fn bad_input_of_protect_is_named() {
    let lab = Lab::reference();
    let shape = ProtectShape { seqs: 1, owners: 2, rows: 32, sink_positions: 4, value: 1.0, fill: true };
    says(&ProtectShape { rows: 1 << 31, ..shape }.plan(&lab.device).unwrap_err(), &["rows", "too many"]);
    says(&ProtectShape { owners: 1 << 31, ..shape }.plan(&lab.device).unwrap_err(), &["rows", "too many"]);
    let plan = shape.plan(&lab.device).unwrap();
    let mut workspace = Workspace::new(&lab.device, Default::default()).unwrap();
    let buffer = lab.upload(&[0u64; 64]);
    // SAFETY: as above.
    let view = |bytes| unsafe { View::from_raw(buffer.address(), bytes) };
    let mut refused = |change: &dyn Fn(&mut ProtectArgs<'_>), what: &[&str]| {
        let mut args = ProtectArgs {
            rows: Rows::contiguous(None, 32),
            page_count: 1,
            lengths: view(8),
            // SAFETY: as above.
            scores: unsafe { ViewMut::from_raw(buffer.address(), 256) },
            score_stride: 32,
            recent_from: None,
            staged: None,
            // SAFETY: as above.
            protected: unsafe { ViewMut::from_raw(buffer.address(), 256) },
        };
        change(&mut args);
        says(&plan.launch(&lab.stream, &mut args, &mut workspace).unwrap_err(), what);
    };
    refused(&|a| a.rows.max_rows = 31, &["rows", "32 columns", "31"]);
    refused(&|a| a.page_count = 0, &["rows", "0"]);
    refused(&|a| a.page_count = 1 << 33, &["page_count"]);
    refused(&|a| a.lengths = view(7), &["lengths", "7 bytes"]);
    // SAFETY: as above.
    refused(&|a| a.scores = unsafe { ViewMut::from_raw(buffer.address(), 255) }, &["scores", "255 bytes"]);
    let staged = StagedScores { scores: view(80), from: view(4), columns: 8, stride: 12 };
    refused(&|a| a.staged = Some(StagedScores { scores: view(79), ..staged }), &["staged scores", "79 bytes"]);
    refused(&|a| a.staged = Some(StagedScores { stride: 7, ..staged }), &["staged scores", "stride of 7"]);
    refused(&|a| a.staged = Some(StagedScores { from: view(3), ..staged }), &["staged from", "3 bytes"]);
    refused(&|a| a.score_stride = 31, &["scores", "31"]);
    refused(&|a| a.recent_from = Some(view(3)), &["recent_from", "3 bytes"]);
    // SAFETY: as above.
    refused(&|a| a.protected = unsafe { ViewMut::from_raw(buffer.address(), 255) }, &["protected", "255 bytes"]);
}
