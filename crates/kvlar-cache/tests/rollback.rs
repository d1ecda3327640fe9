//! Exact rows beside latents: which they are, what taking tokens back does to them, what they cost.

use crate::devices::{on_kernels, tolerance_of_latents};
use crate::lab::{DIM, Exact, HEADS, Lab, Q_HEADS, config, exact_plan};
use kvlar::{Codec, Device};
use kvlar_cache::{BatchShape, Cache, CacheConfig};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;

on_kernels!(tokens_taken_back_leave_no_trace_there);

/// Adds tokens (above 0) and takes some back (below), then attends from one more token, always the same: the outputs of
/// that.
fn outputs(device: &Device, tolerance: Tolerance, exact: Exact, steps: &[isize]) -> Vec<Vec<f32>> {
    let mut lab = Lab::exact(device, 12, tolerance, exact);
    let a = lab.create();
    for &n in steps {
        if n >= 0 {
            lab.extend(&[(a, n as usize)]).unwrap();
        } else {
            let rows = lab.model[&a].len() - n.unsigned_abs();
            lab.cache.truncate(a, rows).unwrap();
            lab.truncated(a, rows);
        }
    }
    lab.next_token = 1000;
    lab.extend(&[(a, 1)]).unwrap();
    lab.outputs
}

/// Steps of up to `most` tokens that add `n`.
fn steps(rng: &mut Rng, n: usize, most: usize) -> Vec<isize> {
    let (mut left, mut steps) = (n, Vec::new());
    while left > 0 {
        let step = 1 + rng.below(left.min(most));
        steps.push(step as isize);
        left -= step;
    }
    steps
}

/// What stays exact, how many tokens come, and how many come and are taken back.
type Case = (Exact, usize, usize);

fn check(device: &Device, tolerance: Tolerance, cases: &[Case], most: usize) {
    let mut forgot = 0;
    for (seed, &(exact, first, back)) in cases.iter().enumerate() {
        let mut rng = Rng::new(seed as u64);
        let before = steps(&mut rng, first, most);
        let plain = outputs(device, tolerance, exact, &before);
        let there_and_back = [before.clone(), steps(&mut rng, back, most), vec![-(back as isize)]].concat();
        // Also back to within a step.
        let at_once = [steps(&mut rng, first + back, most), vec![-(back as isize)]].concat();
        for steps in [&there_and_back, &at_once] {
            assert_eq!(outputs(device, tolerance, exact, steps), plain, "{exact:?}: {steps:?}");
        }
        // With nothing held for it, it does matter.
        let forgetful = (exact.0, exact.1, 0);
        forgot += usize::from(outputs(device, tolerance, forgetful, &there_and_back) != plain);
    }
    assert!(forgot > 0, "no case in which the rollback made a difference");
}

#[test]
fn tokens_taken_back_leave_no_trace() {
    let mut rng = Rng::new(1);
    let mut case = || {
        let exact = (rng.below(20), 1 + rng.below(24), rng.below(40));
        (exact, 1 + rng.below(50), rng.below(exact.2 + 1))
    };
    let cases: Vec<Case> = (0..30).map(|_| case()).collect();
    check(&Device::reference(), Tolerance::merge(), &cases, 60);
}

fn tokens_taken_back_leave_no_trace_there(device: &Device) {
    let cases = [((3, 12, 20), 40, 20), ((0, 5, 16), 23, 16), ((17, 1, 9), 50, 7)];
    check(device, tolerance_of_latents(device), &cases, 8);
}

#[test]
fn rows_lost_by_going_further_back_come_again() {
    let mut lab = Lab::exact(&Device::reference(), 12, Tolerance::merge(), (3, 20, 8));
    let a = lab.create();
    assert_eq!(lab.cache.rollback_rows(), 8);
    let exact = |lab: &Lab| lab.cache.exact_rows(a).unwrap();
    lab.extend(&[(a, 70)]).unwrap();
    assert_eq!(exact(&lab), (3, 35)); // 70 - 20 = 50: 35 is the boundary before it
    // 62 tokens need rows from 35 on, which are there; 45 would need those from 19 on.
    lab.cache.truncate(a, 62).unwrap();
    lab.truncated(a, 62);
    assert_eq!(exact(&lab), (3, 35));
    lab.cache.truncate(a, 45).unwrap();
    lab.truncated(a, 45);
    assert_eq!(exact(&lab), (3, 35));
    lab.cache.truncate(a, 30).unwrap();
    lab.truncated(a, 30);
    assert_eq!(exact(&lab), (3, 30)); // none: the page of rows 19 to 34 was given up
    lab.extend(&[(a, 5)]).unwrap();
    assert_eq!(exact(&lab), (3, 35));
    lab.extend(&[(a, 10)]).unwrap();
    assert_eq!(exact(&lab), (3, 35));
    lab.extend(&[(a, 10)]).unwrap();
    assert_eq!(exact(&lab), (3, 35)); // of 55, as of any 55
    // Caches without recent rows lose nothing.
    assert_eq!(Lab::exact(&Device::reference(), 12, Tolerance::merge(), (3, 0, 8)).cache.rollback_rows(), usize::MAX);
    assert_eq!(Lab::new(Codec::F16, 4).cache.rollback_rows(), usize::MAX);
}

/// What committed rows were held for is given up at once, whoever shares the pages.
#[test]
fn a_commit_gives_pages_back() {
    let mut lab = Lab::exact(&Device::reference(), 12, Tolerance::merge(), (0, 16, 48));
    let a = lab.create();
    lab.extend(&[(a, 90)]).unwrap();
    let used = |lab: &Lab| lab.cache.usage().exact_pages - lab.cache.usage().exact_free;
    assert_eq!(used(&lab), 5); // rows 16 to 89: 42 tokens have exact rows from 16 on
    let b = lab.cache.fork(a).unwrap();
    lab.forked(a, b);
    let bytes = lab.cache.sequence_bytes(a).unwrap();
    lab.cache.commit(a, 70).unwrap();
    lab.held.get_mut(&a).unwrap().0 = 70;
    assert_eq!(used(&lab), 5, "the fork still owns them");
    // Rows from 48 on: two pages less, of 16 rows of all heads' keys and values in two layers.
    assert_eq!(bytes - lab.cache.sequence_bytes(a).unwrap(), 32 * 2 * HEADS * 2 * 2 * DIM);
    lab.cache.remove(b).unwrap();
    lab.model.remove(&b);
    assert_eq!(used(&lab), 3);
    // 70 and more tokens come back as if nothing had been.
    lab.cache.truncate(a, 70).unwrap();
    lab.truncated(a, 70);
    assert_eq!(lab.cache.exact_rows(a).unwrap(), (0, 48));
    lab.extend(&[(a, 1)]).unwrap();
    lab.check();
}

#[test]
fn sequences_pay_for_rows_held() {
    let device = Device::reference();
    for (exact, total, rows) in [
        ((5, 20, 0), 4, 4),
        ((5, 20, 0), 40, 5 + 35),
        ((5, 20, 0), 41, 5 + 20), // from 21 on
        ((5, 20, 10), 41, 5 + 36),
        ((5, 0, 10), 41, 5),
    ] {
        let mut lab = Lab::exact(&device, 12, Tolerance::merge(), exact);
        let a = lab.create();
        lab.extend(&[(a, total)]).unwrap();
        // Latents of both heads together are as long as their rows; sinks have none.
        let behind = total - exact.0.min(total);
        let expected = (behind + rows) * 2 * 2 * 2 * HEADS * DIM;
        assert_eq!(lab.cache.sequence_bytes(a).unwrap(), expected, "{exact:?} of {total}");
    }
}

/// A step that is cancelled leaves the exact rows as they were, also those that it would have pushed out.
#[test]
fn a_cancelled_step_forgets_no_exact_row() {
    let mut lab = Lab::exact(&Device::reference(), 12, Tolerance::merge(), (5, 20, 7));
    let a = lab.create();
    lab.extend(&[(a, 40)]).unwrap();
    let (before, usage) = (lab.cache.exact_rows(a).unwrap(), lab.cache.usage());
    let mut batch = lab.cache.batch(BatchShape::new(1, 50, Q_HEADS)).unwrap();
    lab.cache.begin(&lab.stream, &mut batch, &[(a, 50)]).unwrap();
    assert_ne!(lab.cache.exact_rows(a).unwrap(), before);
    lab.cache.cancel(&mut batch).unwrap();
    assert_eq!((lab.cache.exact_rows(a).unwrap(), lab.cache.usage()), (before, usage));
    lab.extend(&[(a, 1)]).unwrap();
}

/// A step that had to copy shared pages before it could write into them, and is cancelled: both owners are as before.
#[test]
fn a_cancelled_step_that_copied_pages_changes_nothing() {
    for exact in [(0, 0, 0), (20, 20, 4)] {
        let mut lab = Lab::exact(&Device::reference(), 12, Tolerance::merge(), exact);
        let a = lab.create();
        lab.extend(&[(a, 18)]).unwrap();
        let b = lab.cache.fork(a).unwrap();
        lab.forked(a, b);
        let before = lab.cache.usage();
        let mut batch = lab.cache.batch(BatchShape::new(1, 30, Q_HEADS)).unwrap();
        lab.cache.begin(&lab.stream, &mut batch, &[(b, 30)]).unwrap();
        lab.cache.cancel(&mut batch).unwrap();
        // Pages that would have been written into are its own now; those that only the step needed are free again. With 20
        // sinks no latent has been written yet: their first page is still to come, too.
        let (after, copied) = (lab.cache.usage(), if exact.0 > 0 { 2 } else { 1 });
        assert_eq!((after.free, after.shared), (before.free - copied, before.shared - copied));
        assert_eq!(before.exact_free - after.exact_free, usize::from(exact.0 > 0));
        lab.check();
        // Each holds its tokens still, and neither sees what the other brings.
        lab.extend(&[(b, 3)]).unwrap();
        lab.extend(&[(a, 5), (b, 30)]).unwrap();
        lab.cache.remove(a).unwrap();
        lab.model.remove(&a);
        lab.extend(&[(b, 1)]).unwrap();
        lab.cache.remove(b).unwrap();
        let end = lab.cache.usage();
        assert_eq!((end.free, end.exact_free, end.used_bytes), (end.pages, end.exact_pages, 0));
    }
}

/// A page of several owners is never written, not even with what the others would write there: rows that leave the exact ones
/// beside earlier groups of a shared page are encoded into a copy.
#[test]
fn rows_are_encoded_into_pages_of_their_own() {
    let formats = [Codec::Int4.into(), Codec::Int8.into()];
    let mut lab = Lab::encoded(&Device::reference(), 12, Tolerance::merge(), (0, 24, 8), formats, (16, 4));
    let a = lab.create();
    lab.extend(&[(a, 64)]).unwrap(); // rows 0 to 31 are codes, in a page for 64
    let b = lab.cache.fork(a).unwrap();
    lab.forked(a, b);
    let shared = |lab: &Lab| lab.cache.usage().shared;
    assert_eq!(shared(&lab), 1);
    lab.extend(&[(a, 1)]).unwrap();
    assert_eq!(shared(&lab), 1, "nothing was encoded yet");
    lab.extend(&[(a, 7)]).unwrap(); // rows 32 to 47 become codes
    assert_eq!(shared(&lab), 0);
    lab.extend(&[(b, 24), (a, 16)]).unwrap();
}

/// Pages of exact rows are enough for as many sequences as the configuration says, whatever those do.
#[test]
fn two_sequences_that_share_pages_have_room() {
    for seed in 0..20 {
        let mut rng = Rng::new(seed);
        let exact = (rng.below(20), rng.below(40), rng.below(40));
        let mut lab = Lab::exact(&Device::reference(), 24, Tolerance::merge(), exact);
        let two = CacheConfig { max_seqs: 2, rollback_rows: exact.2, ..config(Codec::F16, 24) };
        lab.cache = Cache::planned(lab.stream.device(), &lab.stream, two, &exact_plan(lab.factor, (exact.0, exact.1))).unwrap();
        let a = lab.create();
        let first = rng.below(40);
        lab.extend(&[(a, first)]).unwrap();
        let b = lab.cache.fork(a).unwrap();
        lab.forked(a, b);
        for _ in 0..4 {
            lab.extend(&[(a, rng.below(15)), (b, rng.below(15))]).unwrap();
            let (seq, back) = ([a, b][rng.below(2)], rng.below(8));
            let rows = lab.model[&seq].len().saturating_sub(back);
            lab.cache.truncate(seq, rows).unwrap();
            lab.truncated(seq, rows);
            lab.check();
        }
    }
}
