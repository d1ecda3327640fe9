//! Selection against plain sorting.

use kvlar_reference::{
    Forced, Resolve, ThresholdInput, ThresholdRule, TopK, TopkInput, ToppInput, ordered_key, ordered_row, threshold, topk, topp,
};
use proptest::prelude::*;
use std::cmp::Ordering;

const INF: f32 = f32::INFINITY;
const NAN: f32 = f32::NAN;

/// The order of scored rows as `OPS.md` words it, better first.
pub fn better((a, i): (f32, usize), (b, j): (f32, usize)) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (true, true) => i.cmp(&j),
        (true, false) => Ordering::Greater,
        (false, true) => Ordering::Less,
        (false, false) if a > b => Ordering::Less,
        (false, false) if a < b => Ordering::Greater,
        (false, false) => i.cmp(&j),
    }
}

/// Indices of scores, better first.
pub fn sorted(scores: &[f32]) -> Vec<usize> {
    let mut all: Vec<usize> = (0..scores.len()).collect();
    all.sort_by(|&i, &j| better((scores[i], i), (scores[j], j)));
    all
}

/// Scores that are hard to order: many ties, both zeros, denormals, infinities, NaNs of either sign, any bits.
pub fn score() -> impl Strategy<Value = f32> {
    let special = prop::sample::select(vec![NAN, -NAN, INF, -INF, 0.0, -0.0, 1e-40, -1e-40, f32::MAX, f32::MIN]);
    prop_oneof![4 => (-3..4i32).prop_map(|x| x as f32), 2 => special, 2 => any::<u32>().prop_map(f32::from_bits)]
}

pub fn scores(most: usize) -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![9 => prop::collection::vec(score(), 0..=most), 1 => (0..=most).prop_map(|n| vec![NAN; n])]
}

/// The softmax of a list, without what has no mass.
fn softmax(x: &[f32]) -> Vec<f64> {
    let top = x.iter().copied().filter(|x| !x.is_nan()).fold(-INF, f32::max);
    let weight = |x: f32| match x {
        x if x.is_nan() || x == -INF => 0.0,
        x if top == INF => f64::from(u8::from(x == INF)),
        x => (f64::from(x) - f64::from(top)).exp(),
    };
    let sum: f64 = x.iter().map(|&x| weight(x)).sum();
    x.iter().map(|&x| if sum > 0.0 { weight(x) / sum } else { 0.0 }).collect()
}

/// What `OPS.md` asks of a list's mask; `rows` are the scores of its length.
fn check_mass(i: &ToppInput<'_>, rows: &[f32], mask: &[u8], mass: f32) -> Result<(), TestCaseError> {
    let n = rows.len();
    let is_forced = |row: usize| row < i.forced.sink_rows || row + i.forced.recent_rows >= n;
    let share = softmax(rows);
    let takable = |row: &usize| rows[*row] > -INF && !is_forced(*row);
    let order: Vec<usize> = sorted(rows).into_iter().filter(takable).collect();
    let taken = order.iter().filter(|&&row| mask[row] == 1).count();
    let forced = (0..n).filter(|&row| is_forced(row)).count();
    let count = mask.iter().filter(|&&m| m == 1).count();
    prop_assert!((0..n).all(|row| !is_forced(row) || mask[row] == 1), "forced rows stay");
    prop_assert!(order[..taken].iter().all(|&row| mask[row] == 1), "the best are taken");
    prop_assert_eq!(count, forced + taken, "nothing else is kept");
    let kept: f64 = (0..n).filter(|&row| mask[row] == 1).map(|row| share[row]).sum();
    prop_assert!((f64::from(mass) - kept).abs() < 1e-6, "{mass} instead of {kept}");
    prop_assert!(count <= i.k_max.max(forced));
    prop_assert!(count >= i.k_min.min(i.k_max).min(forced + order.len()));
    if i.resolve == Resolve::Bin {
        // The steps counted out, for a share that only rounding tells from the one asked for.
        let top = rows.iter().copied().filter(|x| !x.is_nan()).fold(-INF, f32::max);
        let with = |j: usize| order.iter().filter(|&&row| f64::from(rows[row]) >= f64::from(top) - j as f64 / 16.0).count();
        let mass_of = |m: usize| order[..m].iter().map(|&row| share[row]).sum::<f64>() + kept_by_force(&share, is_forced);
        let least = |p: f64| (0..400).map(with).find(|&m| mass_of(m) >= p).unwrap_or(order.len());
        let bounded = |m: usize| m.max(i.k_min.saturating_sub(forced)).min(i.k_max.saturating_sub(forced)).min(order.len());
        let allowed = [bounded(least(i.top_p - 1e-9)), bounded(least(i.top_p + 1e-9))];
        prop_assert!(allowed.contains(&taken), "{taken} taken instead of {allowed:?}");
        return Ok(());
    }
    prop_assert!(kept >= i.top_p - 1e-5 || taken == order.len() || count >= i.k_max, "mass {kept} of {}", i.top_p);
    if taken > 0 && count > i.k_min {
        let less = kept - share[order[taken - 1]];
        prop_assert!(less < i.top_p + 1e-5, "{less} without the least is enough");
        prop_assert!(less < i.top_p || i.top_p == 0.0 || i.top_p - less < 1e-9, "in f64 the count is exact");
    }
    Ok(())
}

fn kept_by_force(share: &[f64], forced: impl Fn(usize) -> bool) -> f64 {
    (0..share.len()).filter(|&row| forced(row)).map(|row| share[row]).sum()
}

/// Some lists of one size, and their lengths.
fn lists(score: impl Strategy<Value = f32> + Clone) -> impl Strategy<Value = (usize, Vec<f32>, Vec<i32>)> {
    (1..4usize, 0..24usize).prop_flat_map(move |(r, t)| {
        (Just(t), prop::collection::vec(score.clone(), r * t), prop::collection::vec(0..=t as i32, r))
    })
}

fn forced() -> impl Strategy<Value = Forced> {
    (0..5usize, 0..5usize).prop_map(|(sink_rows, recent_rows)| Forced { sink_rows, recent_rows })
}

/// Logits of a softmax that more than one row has a share of, and now and then what is none.
fn logit() -> impl Strategy<Value = f32> + Clone {
    prop_oneof![6 => -3.0..3.0f32, 3 => (-4..5i32).prop_map(|x| x as f32 / 2.0), 1 => prop::sample::select(vec![NAN, -INF, -1e30])]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Keys are in the order of scores, rows in that of scores and indices.
    #[test]
    fn integers_are_ordered_as_scores(a in score(), b in score(), i in 0..3usize, j in 0..3usize) {
        let expected = better((b, 0), (a, 0));
        prop_assert_eq!(ordered_key(a).cmp(&ordered_key(b)), expected);
        prop_assert_eq!(ordered_row(a, i as u32).cmp(&ordered_row(b, j as u32)), better((b, j), (a, i)));
    }

    /// The k best are the first k of all rows sorted, behind those that are forced; the cut keeps the same.
    #[test]
    fn the_best_are_the_first_when_sorted((t, x, lengths) in lists(score().boxed()), k in 0..30usize, forced in forced()) {
        let i = TopkInput { batch: lengths.len(), rows: t, scores: &x, lengths: Some(&lengths), k, forced };
        let forced_of = |n: usize| (forced.sink_rows + forced.recent_rows).min(n);
        if let Some(n) = lengths.iter().find(|&&n| forced_of(n as usize) > k) {
            prop_assert!(topk(&i).is_err(), "{} rows", n);
            return Ok(());
        }
        let TopK { rows, counts, cuts } = topk(&i).unwrap();
        for (b, &n) in lengths.iter().enumerate() {
            let n = n as usize;
            let own = &x[b * t..][..n];
            let is_forced = |row: &usize| *row < forced.sink_rows || row + forced.recent_rows >= n;
            let (first, rest): (Vec<_>, Vec<_>) = sorted(own).into_iter().partition(is_forced);
            let mut expected: Vec<i32> = first.iter().chain(&rest).take(k).map(|&row| row as i32).collect();
            expected.sort_unstable();
            prop_assert_eq!(counts[b] as usize, expected.len());
            prop_assert_eq!(expected.len(), k.min(n));
            expected.resize(k, -1);
            prop_assert_eq!(&rows[b * k..][..k], &expected);
            let by_cut: Vec<usize> = (0..n).filter(|row| is_forced(row) || cuts[b].keeps(own[*row], *row as u32)).collect();
            prop_assert_eq!(by_cut.len(), counts[b] as usize);
            prop_assert!(by_cut.iter().zip(&rows[b * k..]).all(|(&a, &b)| a as i32 == b));
            // A list alone gives what it gives beside others.
            let alone = topk(&TopkInput { batch: 1, scores: &x[b * t..][..t], lengths: Some(&lengths[b..=b]), ..i }).unwrap();
            prop_assert_eq!(&alone.rows, &rows[b * k..][..k]);
            prop_assert_eq!(alone.cuts[0], cuts[b]);
        }
    }

    /// Without ties, rows that change places are chosen wherever they are.
    #[test]
    fn choices_follow_rows(order in Just((0..20usize).collect::<Vec<_>>()).prop_shuffle(), k in 0..20usize) {
        let moved: Vec<f32> = order.iter().map(|&x| x as f32).collect();
        let rows = {
            let i = TopkInput { batch: 1, rows: 20, scores: &moved, lengths: None, k, forced: Forced::default() };
            topk(&i).unwrap().rows
        };
        prop_assert!(rows.windows(2).all(|w| w[0] < w[1]));
        let mut values: Vec<usize> = rows.iter().map(|&row| order[row as usize]).collect();
        values.sort_unstable();
        prop_assert_eq!(values, (20 - k..20).collect::<Vec<_>>());
    }

    /// What is kept holds the share, without its least row it does not; bins are counted out.
    #[test]
    fn masses_are_what_is_asked_for(
        (t, x, lengths) in lists(logit().boxed()),
        top_p in prop_oneof![0.0..=1.0f64, Just(0.5), Just(1.0)],
        (k_min, k_max) in (0..6usize, 0..30usize),
        forced in forced(),
        bin in any::<bool>(),
    ) {
        let resolve = if bin { Resolve::Bin } else { Resolve::Exact };
        let lengths_of = Some(&lengths[..]);
        let i = ToppInput { batch: lengths.len(), rows: t, logits: &x, lengths: lengths_of, top_p, k_min, k_max, forced, resolve };
        let r = topp(&i).unwrap();
        for (b, &n) in lengths.iter().enumerate() {
            let (own, mask) = (&x[b * t..][..n as usize], &r.mask[b * t..][..t]);
            prop_assert!(mask[n as usize..].iter().all(|&m| m == 0), "rows that are not there");
            prop_assert_eq!(r.counts[b], mask.iter().map(|&m| i32::from(m)).sum::<i32>());
            check_mass(&i, own, &mask[..n as usize], r.mass[b])?;
            let by_cut = r.cuts[b].rows(own, forced);
            prop_assert!((0..n as usize).all(|row| by_cut.contains(&row) == (mask[row] == 1)));
        }
    }

    /// Exactly `keep`: each head's floor, then the best of all others; more of them keep what fewer do.
    #[test]
    fn thresholds_are_sorting((layers, heads, rows) in (1..3usize, 1..4usize, 0..9usize), seed in scores(54), floor in 0..4usize, more in 0..40usize) {
        let x: Vec<f32> = seed.iter().copied().cycle().take(if seed.is_empty() { 0 } else { layers * heads * rows }).collect();
        prop_assume!(x.len() == layers * heads * rows);
        let floor = floor.min(rows);
        let keep = (floor * layers * heads + more).min(x.len());
        let i = ThresholdInput { layers, heads, rows, scores: &x, keep, rule: ThresholdRule::Exact, floor };
        let r = threshold(&i).unwrap();
        let mut expected = vec![0u8; x.len()];
        for head in 0..layers * heads {
            sorted(&x[head * rows..][..rows]).iter().take(floor).for_each(|&row| expected[head * rows + row] = 1);
        }
        let left = keep - floor * layers * heads;
        let others: Vec<usize> = sorted(&x).into_iter().filter(|&at| expected[at] == 0).take(left).collect();
        others.iter().for_each(|&at| expected[at] = 1);
        prop_assert_eq!(&r.mask, &expected);
        prop_assert_eq!(r.mask.iter().filter(|&&m| m == 1).count(), keep);
        for head in 0..layers * heads {
            let own = head * rows..(head + 1) * rows;
            prop_assert_eq!(r.lengths[head], expected[own.clone()].iter().map(|&m| i32::from(m)).sum::<i32>());
            prop_assert!(own.clone().all(|at| r.cuts[head].keeps(x[at], at as u32) == (expected[at] == 1)));
        }
        if keep < x.len() {
            let next = threshold(&ThresholdInput { keep: keep + 1, ..i }).unwrap().mask;
            prop_assert!(r.mask.iter().zip(&next).all(|(a, b)| a <= b));
        }
    }

    /// The strict rule keeps scores above that of place keep − 1, whatever their index.
    #[test]
    fn strict_thresholds_are_above_a_score(x in scores(20), keep in 0..21usize) {
        let keep = keep.min(x.len());
        let (rows, rule) = (x.len(), ThresholdRule::Strict);
        let i = ThresholdInput { layers: 1, heads: 1, rows, scores: &x, keep, rule, floor: 0 };
        let r = threshold(&i).unwrap();
        let order = sorted(&x);
        let Some(&at) = order.get(keep.saturating_sub(1)) else { return Ok(()) };
        for (row, &kept) in r.mask.iter().enumerate() {
            prop_assert_eq!(kept == 1, better((x[row], 0), (x[at], 0)) == Ordering::Less, "row {}", row);
        }
        prop_assert!(r.mask.iter().map(|&m| usize::from(m)).sum::<usize>() <= keep.saturating_sub(1));
    }
}
