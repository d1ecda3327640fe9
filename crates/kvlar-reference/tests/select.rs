//! Selection by hand.

use kvlar_reference::{
    Cut, Forced, Resolve, ThresholdInput, ThresholdRule, TopkInput, ToppInput, ordered_key, ordered_row, threshold, topk, topp,
};

const INF: f32 = f32::INFINITY;
const NAN: f32 = f32::NAN;
const FREE: Forced = Forced { sink_rows: 0, recent_rows: 0 };

fn one(scores: &[f32], k: usize, (sink_rows, recent_rows): (usize, usize)) -> TopkInput<'_> {
    TopkInput { batch: 1, rows: scores.len(), scores, lengths: None, k, forced: Forced { sink_rows, recent_rows } }
}

#[track_caller]
fn best(scores: &[f32], k: usize, expected: &[i32]) {
    assert_eq!(topk(&one(scores, k, (0, 0))).unwrap().rows, expected);
}

#[test]
fn keys_are_those_of_the_kernels() {
    for (x, key) in [
        (NAN, 0),
        (-NAN, 0),
        (f32::from_bits(0x7fff_ffff), 0),
        (f32::from_bits(u32::MAX), 0),
        (-INF, 0x007f_ffff),
        (f32::MIN, 0x0080_0000),
        (-1.0, 0x407f_ffff),
        (-1e-40, 0x7ffe_e93d),
        (-0.0, 0x8000_0000),
        (0.0, 0x8000_0000),
        (1e-40, 0x8001_16c2),
        (1.0, 0xbf80_0000),
        (f32::MAX, 0xff7f_ffff),
        (INF, 0xff80_0000),
    ] {
        assert_eq!(ordered_key(x), key, "{x}: {:#x}", ordered_key(x));
    }
    assert_eq!(ordered_row(1.0, 0), 0xbf80_0000_ffff_ffff);
    assert_eq!(ordered_row(1.0, 7), 0xbf80_0000_ffff_fff8);
    assert_eq!(ordered_row(-NAN, u32::MAX), 0);
}

#[test]
fn cuts_keep_all_or_none_or_what_is_above() {
    for x in [NAN, -INF, 0.0, INF] {
        for index in [0, 1, u32::MAX] {
            assert!(Cut::ALL.keeps(x, index) && !Cut::NONE.keeps(x, index));
            assert!(!Cut::above(x).keeps(x, index));
        }
    }
    assert!(Cut::above(NAN).keeps(-INF, 5) && Cut::above(-INF).keeps(f32::MIN, 5) && Cut::above(0.0).keeps(1e-45, 5));
    assert!(!Cut::above(0.0).keeps(-0.0, 0) && !Cut::above(-0.0).keeps(0.0, 0));
    assert_eq!(Cut::of_best(vec![], 0), Cut::NONE);
    assert_eq!(Cut::of_best(vec![3, 9, 5], 2), Cut(5));
    assert_eq!((Cut::of_best(vec![3, 9, 5], 3), Cut::of_best(vec![3, 9, 5], 4)), (Cut::ALL, Cut::ALL));
}

#[test]
fn the_best_rows_by_hand() {
    let ten = [4.0; 10];
    best(&ten, 0, &[]);
    best(&ten, 3, &[0, 1, 2]);
    best(&ten, 10, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    best(&ten, 11, &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, -1]);
    best(&[], 0, &[]);
    best(&[], 2, &[-1, -1]);
    best(&[1.0, 3.0, 3.0, 2.0, 3.0], 2, &[1, 2]);
    best(&[1.0, 3.0, 3.0, 2.0, 3.0], 4, &[1, 2, 3, 4]);
    best(&[NAN, 1.0, -INF, 2.0], 2, &[1, 3]);
    best(&[NAN, 1.0, -INF, 2.0], 3, &[1, 2, 3]);
    best(&[NAN; 4], 2, &[0, 1]);
    best(&[-NAN, NAN, NAN], 2, &[0, 1]);
    best(&[-0.0, 0.0, -1.0], 1, &[0]);
    best(&[0.0, 1e-40], 1, &[1]);
    best(&[-1e-40, 0.0], 1, &[1]);
    best(&[INF, f32::MAX, INF], 2, &[0, 2]);
}

#[test]
fn forced_rows_come_first_and_count() {
    let x = [9.0, 8.0, 7.0, 0.0, 0.0, 0.0];
    assert_eq!(topk(&one(&x, 4, (1, 2))).unwrap().rows, [0, 1, 4, 5]);
    // Only they: the cut keeps nothing else.
    let r = topk(&one(&x, 3, (1, 2))).unwrap();
    assert_eq!((r.rows, r.cuts), (vec![0, 4, 5], vec![Cut::NONE]));
    // A forced NaN stays.
    assert_eq!(topk(&one(&[NAN, 1.0, 2.0, NAN], 3, (1, 1))).unwrap().rows, [0, 2, 3]);
    // Recent rows are the last of the length, not of the tensor; rows behind it are not there.
    let r = topk(&TopkInput { lengths: Some(&[4]), ..one(&x, 3, (1, 1)) }).unwrap();
    assert_eq!((r.rows, r.counts), (vec![0, 1, 3], vec![3]));
    let high = [0.0, 0.0, 5.0];
    assert_eq!(topk(&TopkInput { lengths: Some(&[2]), ..one(&high, 1, (0, 0)) }).unwrap().rows, [0]);
    // k below their number: an error, unless the length is shorter.
    let e = topk(&one(&x, 2, (1, 2))).unwrap_err().to_string();
    assert!(e.contains("k: 2 is less than the 3 sink and recent rows of length 6"), "{e}");
    let short = TopkInput { lengths: Some(&[2]), ..one(&x, 2, (1, 2)) };
    assert_eq!(topk(&short).unwrap().rows, [0, 1]);
    assert!(topk(&TopkInput { lengths: Some(&[3]), ..short }).is_err());
    assert_eq!(topk(&TopkInput { lengths: Some(&[0]), k: 1, ..short }).unwrap().rows, [-1]);
    // More of them than a usize can count are all rows.
    assert_eq!(topk(&one(&x, 6, (usize::MAX, usize::MAX))).unwrap().counts, [6]);
}

#[test]
fn wrong_lists_are_named() {
    let x = [0.0; 6];
    let good = TopkInput { batch: 2, rows: 3, ..one(&x, 1, (0, 0)) };
    let says = |i: TopkInput<'_>, word: &str| {
        let e = topk(&i).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    };
    topk(&good).unwrap();
    says(TopkInput { rows: 4, ..good }, "scores");
    says(TopkInput { lengths: Some(&[3]), ..good }, "lengths");
    says(TopkInput { lengths: Some(&[3, 4]), ..good }, "lengths: 4");
    says(TopkInput { lengths: Some(&[-1, 3]), ..good }, "lengths: -1");
    says(TopkInput { k: 1 << 31, ..good }, "k: 2147483648");
    let p = mass_of(&x, 0.5);
    let says = |i: ToppInput<'_>, word: &str| {
        let e = topp(&i).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    };
    says(ToppInput { rows: 5, ..p }, "logits");
    says(ToppInput { lengths: Some(&[7]), ..p }, "lengths: 7");
    for bad in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        says(ToppInput { top_p: bad, ..p }, &format!("top_p: {bad}"));
    }
    let t = ThresholdInput { layers: 1, heads: 2, rows: 3, scores: &x, keep: 4, rule: ThresholdRule::Exact, floor: 2 };
    let says = |i: ThresholdInput<'_>, word: &str| {
        let e = threshold(&i).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    };
    threshold(&t).unwrap();
    says(ThresholdInput { rows: 2, ..t }, "scores");
    says(ThresholdInput { keep: 7, ..t }, "keep: 7");
    says(ThresholdInput { keep: 3, ..t }, "floor: 2 rows of each of 2 heads");
    says(ThresholdInput { floor: usize::MAX, ..t }, "floor");
    says(ThresholdInput { rule: ThresholdRule::Strict, floor: 1, ..t }, "floor: 1");
}

fn mass_of(logits: &[f32], top_p: f64) -> ToppInput<'_> {
    ToppInput {
        batch: 1,
        rows: logits.len(),
        logits,
        lengths: None,
        top_p,
        k_min: 1,
        k_max: logits.len(),
        forced: FREE,
        resolve: Resolve::Exact,
    }
}

#[track_caller]
fn mask(i: ToppInput<'_>, expected: &[u8]) {
    let r = topp(&i).unwrap();
    assert_eq!(r.mask, expected);
    assert_eq!(r.counts, [expected.iter().map(|&m| i32::from(m)).sum::<i32>()]);
}

#[test]
fn the_fewest_of_a_mass_by_hand() {
    let x = [0.125f32, 0.5, 0.25, 0.125].map(f32::ln);
    for (top_p, expected) in [
        (0.4, [0, 1, 0, 0]),
        (0.6, [0, 1, 1, 0]),
        (0.8, [1, 1, 1, 0]), // of the two equal ones the first
        (0.9, [1, 1, 1, 1]),
        (1.0, [1, 1, 1, 1]),
        (0.0, [0, 1, 0, 0]), // k_min
    ] {
        mask(mass_of(&x, top_p), &expected);
    }
    assert!((topp(&mass_of(&x, 0.8)).unwrap().mass[0] - 0.875).abs() < 1e-6);
    mask(ToppInput { k_min: 0, ..mass_of(&x, 0.0) }, &[0, 0, 0, 0]);
    mask(ToppInput { k_min: 3, ..mass_of(&x, 0.4) }, &[1, 1, 1, 0]);
    mask(ToppInput { k_max: 1, ..mass_of(&x, 0.9) }, &[0, 1, 0, 0]);
    // The mass of nothing has no sign.
    assert_eq!(topp(&ToppInput { k_max: 0, ..mass_of(&x, 0.9) }).unwrap().mass[0].to_bits(), 0);
    mask(ToppInput { k_min: 3, k_max: 2, ..mass_of(&x, 0.4) }, &[0, 1, 1, 0]);
    // Equal logits: shares are exact, a share of one half is reached by half of them.
    mask(mass_of(&[2.5; 8], 0.5), &[1, 1, 1, 1, 0, 0, 0, 0]);
    // Sinks and recent rows first: 1/8 and 1/8 count towards the share, the largest makes it 3/4.
    let forced = Forced { sink_rows: 1, recent_rows: 1 };
    mask(ToppInput { forced, ..mass_of(&x, 0.7) }, &[1, 1, 0, 1]);
    mask(ToppInput { forced, ..mass_of(&x, 0.2) }, &[1, 0, 0, 1]);
    mask(ToppInput { forced, k_min: 3, ..mass_of(&x, 0.2) }, &[1, 1, 0, 1]);
    mask(ToppInput { forced, k_max: 3, ..mass_of(&x, 1.0) }, &[1, 1, 0, 1]);
    mask(ToppInput { forced, k_max: 1, ..mass_of(&x, 1.0) }, &[1, 0, 0, 1]);
}

#[test]
fn rows_without_mass_are_kept_only_where_forced() {
    let x = [NAN, -INF, 1.0, -INF, NAN];
    mask(ToppInput { k_min: 5, ..mass_of(&x, 1.0) }, &[0, 0, 1, 0, 0]);
    assert_eq!(topp(&mass_of(&x, 1.0)).unwrap().mass, [1.0]);
    let forced = Forced { sink_rows: 1, recent_rows: 2 };
    let r = topp(&ToppInput { forced, ..mass_of(&x, 1.0) }).unwrap();
    assert_eq!((r.mask, r.counts, r.mass), (vec![1, 0, 1, 1, 1], vec![4], vec![1.0]));
    // No mass at all.
    for x in [[NAN; 3], [-INF; 3]] {
        let r = topp(&ToppInput { forced: Forced { sink_rows: 1, recent_rows: 0 }, ..mass_of(&x, 0.9) }).unwrap();
        assert_eq!((r.mask, r.counts, r.mass), (vec![1, 0, 0], vec![1], vec![0.0]));
    }
    let r = topp(&ToppInput { lengths: Some(&[0]), ..mass_of(&[1.0, 2.0], 0.9) }).unwrap();
    assert_eq!((r.mask, r.counts, r.mass), (vec![0, 0], vec![0], vec![0.0]));
    assert_eq!(topp(&mass_of(&[], 0.9)).unwrap().counts, [0]);
    // +∞: softmax in the limit.
    let r = topp(&mass_of(&[INF, 7.0, INF, NAN], 0.5)).unwrap();
    assert_eq!((r.mask, r.mass), (vec![1, 0, 0, 0], vec![0.5]));
    mask(ToppInput { k_min: 3, ..mass_of(&[INF, 7.0, INF, NAN], 1.0) }, &[1, 1, 1, 0]);
    mask(ToppInput { resolve: Resolve::Bin, ..mass_of(&[INF, 7.0, INF, NAN], 0.5) }, &[1, 0, 1, 0]);
    // Finite rows whose mass is 0 in f64 are no fewer than needed, but there for k_min.
    mask(mass_of(&[0.0, -1e30, -1e30], 1.0), &[1, 0, 0]);
    mask(ToppInput { k_min: 2, ..mass_of(&[0.0, -1e30, -1e30], 1.0) }, &[1, 1, 0]);
}

#[test]
fn bins_take_in_what_is_within_a_sixteenth() {
    // Masses of about 0.24, 0.23, 0.23, 0.22, 0.08.
    let x = [0.0, -0.05, -0.0625, -0.07, -1.0];
    let bin = |top_p| ToppInput { resolve: Resolve::Bin, ..mass_of(&x, top_p) };
    mask(mass_of(&x, 0.3), &[1, 1, 0, 0, 0]);
    mask(bin(0.3), &[1, 1, 1, 0, 0]);
    mask(bin(0.2), &[1, 0, 0, 0, 0]);
    mask(bin(0.75), &[1, 1, 1, 1, 0]);
    mask(bin(0.95), &[1, 1, 1, 1, 1]);
    mask(ToppInput { k_max: 2, ..bin(0.3) }, &[1, 1, 0, 0, 0]);
    mask(ToppInput { k_min: 4, ..bin(0.3) }, &[1, 1, 1, 1, 0]);
    // Bins are below the largest of all rows, forced or not; the least step still takes in those equal to it.
    let forced = Forced { sink_rows: 1, recent_rows: 0 };
    mask(ToppInput { forced, ..bin(0.3) }, &[1, 1, 1, 0, 0]);
    let ties = [1.0, 1.0, 0.9];
    mask(ToppInput { forced, resolve: Resolve::Bin, ..mass_of(&ties, 0.1) }, &[1, 1, 0]);
    mask(ToppInput { forced, ..mass_of(&ties, 0.1) }, &[1, 0, 0]);
}

fn of_all(scores: &[f32], [layers, heads, rows]: [usize; 3], keep: usize) -> ThresholdInput<'_> {
    ThresholdInput { layers, heads, rows, scores, keep, rule: ThresholdRule::Exact, floor: 0 }
}

#[test]
fn thresholds_by_hand() {
    let x = [0.9, 0.1, 0.5, 0.5, 0.3, 0.7, 0.2, 0.8, 0.5, 0.4];
    let kept = |i: ThresholdInput<'_>| -> Vec<usize> {
        let mask = threshold(&i).unwrap().mask;
        (0..mask.len()).filter(|&at| mask[at] == 1).collect()
    };
    let exact = |keep| kept(of_all(&x, [1, 1, 10], keep));
    let strict = |keep| kept(ThresholdInput { rule: ThresholdRule::Strict, ..of_all(&x, [1, 1, 10], keep) });
    // The released rule: one fewer, without those that tie.
    assert_eq!((strict(3), strict(5), strict(6)), (vec![0, 7], vec![0, 5, 7], vec![0, 5, 7]));
    assert_eq!((strict(0), strict(1)), (vec![], vec![]));
    assert_eq!(strict(10), [0, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!((exact(0), exact(3), exact(5), exact(10).len()), (vec![], vec![0, 5, 7], vec![0, 2, 3, 5, 7], 10));
    // All equal: strict keeps none, exact the first.
    let same = [0.25; 6];
    let all = of_all(&same, [1, 2, 3], 4);
    assert_eq!(threshold(&ThresholdInput { rule: ThresholdRule::Strict, ..all }).unwrap().lengths, [0, 0]);
    assert_eq!(threshold(&all).unwrap().lengths, [3, 1]);
    // Nothing to choose from.
    let strict_of_none = ThresholdInput { rule: ThresholdRule::Strict, ..of_all(&[], [2, 2, 0], 0) };
    assert_eq!(threshold(&strict_of_none).unwrap().lengths, [0; 4]);
    // A floor: head 1 keeps its best, counted, so head 0 one less.
    let two = [5.0, 4.0, 3.0, 2.0, 1.0, 1.5, 0.5, 1.5];
    let heads = of_all(&two, [1, 2, 4], 3);
    assert_eq!(kept(heads), [0, 1, 2]);
    assert_eq!(kept(ThresholdInput { floor: 1, ..heads }), [0, 1, 5]);
    assert_eq!(kept(ThresholdInput { floor: 2, keep: 4, ..heads }), [0, 1, 5, 7]);
    assert_eq!(kept(ThresholdInput { floor: 4, keep: 8, ..heads }).len(), 8);
}

#[test]
fn decode_time_eviction_keeps_its_budget() {
    // Two heads, a budget of 3 rows each, the last of each list protected by a score of 1.
    let distinct = [1.0, 0.2, 0.9, 0.4, 1.0, 1.0, 0.3, 0.05, 0.6, 1.0];
    let r = threshold(&of_all(&distinct, [1, 2, 5], 6)).unwrap();
    assert_eq!(r.mask, [1, 0, 1, 0, 1, 1, 0, 0, 1, 1]);
    // The released rule, score >= threshold, keeps 5 and 4 here: ties made it exceed the budget.
    let ties = [1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 0.5, 0.05, 0.6, 1.0];
    let r = threshold(&of_all(&ties, [1, 2, 5], 6)).unwrap();
    assert_eq!((r.mask, r.lengths), (vec![1, 1, 0, 0, 1, 1, 0, 0, 1, 1], vec![3, 3]));
}
