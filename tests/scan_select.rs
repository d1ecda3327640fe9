//! Scans that find cuts too: exactly the rows that sorting the written scores gives.

use kvlar::{Codec, Dtype, Format, Ks, Reduction, ScanSelectShape, Schedule, SelectArgs, Workspace};
use kvlar_reference::testing::Rng;
use kvlar_tests::pages::Layout;
use kvlar_tests::scan::{ScanCase, ScanData, ScanRun};
use kvlar_tests::scan_select::ScanSelectCase;
use kvlar_tests::{Lab, on_every_device, says};

on_every_device!(
    every_kernel,
    numbers_of_rows,
    rows_that_are_always_kept,
    splits_and_batches,
    equal_scores,
    more_ties_than_fit,
    broken_scores,
    k_is_read_from_the_device,
    other_outputs_too,
    scores_made_of_logits,
    random_selections,
    a_cut_in_little,
    replays_follow_lengths_and_k,
);

fn every_kernel(lab: &Lab) {
    let rotated = Format { hadamard: true, ..Codec::Int8.into() };
    let formats: [(Format, (usize, usize), usize); 9] = [
        (Codec::Bf16.into(), (4, 2), 64),
        (Codec::Int4.into(), (4, 2), 128),
        (Codec::Int2.into(), (2, 1), 256),
        (Codec::Fp8.into(), (16, 1), 64),
        (Codec::Int8.into(), (9, 1), 128),
        (rotated, (2, 2), 64),
        (Format::pq(8, 16), (4, 1), 64),
        (Format::pq(16, 32), (1, 1), 64),
        (Format { group: Some(16), ..Codec::Int4.into() }, (2, 1), 64),
    ];
    for (keys, heads, d) in formats {
        ScanSelectCase::new(ScanCase::new(keys, heads, d, &[150, 33]), 40)
            .with(|c| (c.sink_rows, c.recent_rows) = (2, 5))
            .check(lab);
    }
    let f16 = ScanCase::new(Codec::F16, (4, 2), 64, &[90]).with(|c| c.dtype = Dtype::F16);
    ScanSelectCase::new(f16, 40).check(lab);
}

fn numbers_of_rows(lab: &Lab) {
    for k in [0, 1, 31, 64, 129, 130, 500] {
        ScanSelectCase::new(ScanCase::new(Codec::Int4, (4, 2), 64, &[130, 31, 0, 64]), k).check(lab);
    }
}

fn rows_that_are_always_kept(lab: &Lab) {
    for (sinks, recent) in [(4, 0), (0, 9), (3, 40), (30, 30), (100, 0), (0, 200)] {
        let scan = ScanCase::new(Codec::Int4, (4, 2), 64, &[130, 41, 0, 3]);
        ScanSelectCase::new(scan, 70.max((sinks + recent).min(130)))
            .with(|c| (c.sink_rows, c.recent_rows) = (sinks, recent))
            .check(lab);
    }
}

/// Units of one CTA and of many, whichever comes last.
fn splits_and_batches(lab: &Lab) {
    for schedule in [Schedule::Balanced, Schedule::Own] {
        for (heads, lengths) in [((1, 1), vec![1500]), ((2, 2), vec![700, 64, 1]), ((4, 4), vec![3, 900])] {
            let scan = ScanCase::new(Codec::Int4, heads, 64, &lengths).with(|c| c.schedule = schedule);
            ScanSelectCase::new(scan, 100).check(lab);
        }
    }
    let ragged = ScanCase::new(Codec::Int4, (2, 2), 64, &[300, 20, 0, 150]).with(|c| {
        (c.seqs, c.layout) = (2, Layout::PerHead(16));
    });
    ScanSelectCase::new(ragged, 50).check(lab);
}

/// Keys that hold one number, queries of zeros: all scores are one.
fn equal_scores(lab: &Lab) {
    for k in [1, 32, 33, 199, 200] {
        let scan = ScanCase::new(Codec::Int4, (2, 1), 64, &[200]).with(|c| c.q_size = 0.0);
        ScanSelectCase::new(scan, k).with(|c| c.sink_rows = 1).check(lab);
    }
}

/// Of one score, beyond what the rings have room for.
fn more_ties_than_fit(lab: &Lab) {
    for k in [5000, 7100] {
        let scan = ScanCase::new(Codec::Int2, (1, 1), 8, &[7200]).with(|c| c.q_size = 0.0);
        ScanSelectCase::new(scan, k).with(|c| (c.sink_rows, c.recent_rows) = (3, 2)).check(lab);
    }
}

fn broken_scores(lab: &Lab) {
    for k in [1, 69, 70] {
        let scan = ScanCase::new(Codec::Bf16, (2, 2), 64, &[70, 3]).with(|c| c.nan_key = true);
        ScanSelectCase::new(scan, k).check(lab);
    }
}

fn k_is_read_from_the_device(lab: &Lab) {
    let scan = ScanCase::new(Codec::Int4, (4, 2), 64, &[130, 90]);
    let case = ScanSelectCase::new(scan, 64).with(|c| (c.sink_rows, c.recent_rows) = (2, 3));
    case.clone().with(|c| c.ks = Some(vec![30])).check(lab);
    case.with(|c| c.ks = Some(vec![64, 0, 7, 1000])).check(lab);
}

fn other_outputs_too(lab: &Lab) {
    let outputs = |c: &mut ScanCase| (c.logits, c.lse, c.histogram) = (true, true, true);
    for lengths in [vec![900, 20], vec![40]] {
        let mut case = ScanSelectCase::new(ScanCase::new(Codec::Int4, (4, 2), 64, &lengths), 33);
        outputs(&mut case.scan);
        case.check(lab);
    }
}

/// In launches of their own, by the histogram where there is one.
fn scores_made_of_logits(lab: &Lab) {
    for histogram in [false, true] {
        for lengths in [vec![130, 50], vec![130, 50, 7, 0]] {
            let scan = ScanCase::new(Codec::Int4, (4, 2), 64, &lengths).with(|c| {
                (c.seqs, c.scores) = (2, Some(Reduction::MaxProb));
                if c.lengths.len() > 2 {
                    c.layout = Layout::PerHead(16);
                }
            });
            let mut case = ScanSelectCase::new(scan, 40).with(|c| c.sink_rows = 2);
            case.scan.histogram = histogram;
            assert!(!case.shape().plan(&lab.device).unwrap().is_one_launch());
            case.check(lab);
        }
    }
}

fn random_selections(lab: &Lab) {
    let count = std::env::var("KVLAR_RANDOM_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(8);
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let heads = [(1, 1), (4, 2), (6, 2), (8, 1)][rng.below(4)];
        let lengths: Vec<usize> = (0..1 + rng.below(3)).map(|_| rng.below(600)).collect();
        let keys = [Codec::Int4, Codec::Int8, Codec::Bf16][rng.below(3)];
        let scan = ScanCase::new(keys, heads, 64, &lengths).with(|c| {
            (c.seed, c.k_size) = (seed, [1.0, 1e-3, 30.0][rng.below(3)]);
            c.scores = Some([Reduction::MaxLogit, Reduction::MeanLogit][rng.below(2)]);
            c.schedule = [Schedule::Balanced, Schedule::Own][rng.below(2)];
        });
        let (sinks, recent) = (rng.below(9), rng.below(40));
        let k = sinks + recent + rng.below(300);
        ScanSelectCase::new(scan, k).with(|c| (c.sink_rows, c.recent_rows) = (sinks, recent)).check(lab);
    }
}

/// The race detector's case.
fn a_cut_in_little(lab: &Lab) {
    let scan = ScanCase::new(Codec::Int4, (2, 1), 64, &[200]);
    ScanSelectCase::new(scan, 40).with(|c| (c.sink_rows, c.recent_rows) = (2, 3)).check(lab);
}

fn replays_follow_lengths_and_k(lab: &Lab) {
    let case = ScanSelectCase::new(ScanCase::new(Codec::Int4, (2, 1), 64, &[300, 77]), 50);
    let data = ScanData::new(&case.scan);
    let mut run = ScanRun::new(lab, &data);
    let plan = case.shape().plan(&lab.device).unwrap();
    assert!(plan.is_one_launch());
    let mut work = plan.scan().work_list(&lab.device).unwrap();
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let (mut cuts, mut ks) = (lab.poisoned(16), lab.upload(&[50i32]));
    let graph = run.with_args(|_, args, _, _| {
        lab.stream.capture(|stream| {
            plan.scan().schedule(stream, args, &mut work, &mut workspace)?;
            let mut select = SelectArgs { ks: Some(Ks::One(ks.view())), cuts: cuts.view_mut() };
            plan.launch(stream, args, &mut select, &work, &mut workspace)
        })
    });
    let graph = graph.expect("a graph");
    for (lengths, k) in [([300, 77], 50), ([40, 0], 9), ([300, 33], 33)] {
        run.set_lengths(&lengths);
        lab.stream.upload(&mut ks, 0, bytemuck::cast_slice(&[k])).unwrap();
        // SAFETY: all that was captured is still there.
        unsafe { graph.launch(&lab.stream) }.expect("a replay");
        lab.stream.synchronize().expect("a result");
        let (scores, cuts) = (run.result().scores, lab.download::<u64>(&cuts));
        for (seq, &length) in lengths.iter().enumerate() {
            let row = &scores[seq * 300..][..length as usize];
            let kept = (0..row.len()).filter(|&i| kvlar_reference::ordered_row(row[i], i as u32) >= cuts[seq]).count();
            assert_eq!(kept, (k as usize).min(row.len()));
        }
    }
}

#[test]
fn bad_input_is_named() {
    let lab = Lab::reference();
    let case = ScanSelectCase::new(ScanCase::new(Codec::Int4, (2, 1), 64, &[70, 9]), 20);
    let shape = case.shape();
    let none = ScanSelectShape { scan: kvlar::ScanShape { scores: None, ..shape.scan }, ..shape };
    says(&none.plan(&lab.device).unwrap_err(), &["scan", "no scores"]);
    says(&ScanSelectShape { sink_rows: 21, ..shape }.plan(&lab.device).unwrap_err(), &["k", "20", "21"]);
    assert!(
        !ScanSelectShape { scan: kvlar::ScanShape { rows: 40_000, ..shape.scan }, ..shape }
            .plan(&lab.device)
            .unwrap()
            .is_one_launch()
    );
    let plan = shape.plan(&lab.device).unwrap();
    let data = ScanData::new(&case.scan);
    let mut run = ScanRun::new(&lab, &data);
    let mut work = plan.scan().work_list(&lab.device).unwrap();
    let mut workspace = Workspace::new(&lab.device, plan.workspace()).unwrap();
    let (mut cuts, mut small, short) = (lab.poisoned(16), lab.poisoned(8), lab.upload(&[1i32]));
    run.with_args(|_, args, _, _| {
        let stream = &lab.stream;
        plan.scan().schedule(stream, args, &mut work, &mut workspace).unwrap();
        let mut refused = |select: &mut SelectArgs<'_>, what: &[&str]| {
            says(&plan.launch(stream, args, select, &work, &mut workspace).unwrap_err(), what);
        };
        refused(&mut SelectArgs { ks: None, cuts: small.view_mut() }, &["cuts"]);
        refused(&mut SelectArgs { ks: Some(Ks::Each(short.view())), cuts: cuts.view_mut() }, &["ks"]);
        args.scores = None;
        let mut select = SelectArgs { ks: None, cuts: cuts.view_mut() };
        says(&plan.launch(stream, args, &mut select, &work, &mut workspace).unwrap_err(), &["scores"]);
    });
}
