//! Budgets: vectors, what the released code gets wrong, and what holds for any scores.

use crate::select_sorting::{score, sorted};
use kvlar_reference::{
    HeadsInput, LayerBudget, LayersInput, best_counts, budget_heads, budget_layers, dynamickv_rounds, largest_remainder,
};
use proptest::prelude::*;

fn layers<'a>(scores: &'a [f32], [layers, heads, rows]: [usize; 3], base: usize) -> LayersInput<'a> {
    LayersInput { layers, heads, rows, scores, base, method: LayerBudget::DynamicKv, r_max: 10.0, interval: 4, beta: 20 }
}

/// ((31 l + h) · 1009 + 7919 t + 613 (l + 1)(t mod 5)) mod 100003, plus an offset a layer.
fn generated([layers, heads, rows]: [usize; 3], offset: impl Fn(usize) -> usize) -> Vec<f32> {
    let score = |l: usize, h: usize, t: usize| ((31 * l + h) * 1009 + 7919 * t + 613 * (l + 1) * (t % 5)) % 100_003 + offset(l);
    let all = (0..layers).flat_map(|l| (0..heads).flat_map(move |h| (0..rows).map(move |t| (l, h, t))));
    all.map(|(l, h, t)| score(l, h, t) as f32).collect()
}

const SHAPE: [usize; 3] = [8, 2, 64];

#[test]
fn vectors_of_generated_scores() {
    let x = generated(SHAPE, |_| 0);
    assert_eq!(best_counts(&x[..4 * 128], 4, 64), [15, 16, 17, 16]);
    assert_eq!(best_counts(&x, 8, 128), [15, 16, 16, 16, 12, 18, 16, 19]);
    let i = layers(&x, SHAPE, 8);
    assert_eq!(dynamickv_rounds(&i).unwrap(), [vec![15, 16, 17, 16], vec![8, 8, 8, 8, 6, 9, 8, 9]]);
    assert_eq!(budget_layers(&i).unwrap(), [8, 8, 8, 8, 6, 9, 8, 9]);
    // Scores of layer 0 above all others.
    let x = generated(SHAPE, |l| if l == 0 { 200_000 } else { 0 });
    let i = layers(&x, SHAPE, 8);
    assert_eq!(dynamickv_rounds(&i).unwrap(), [vec![64, 0, 0, 0], vec![64, 0, 0, 0, 0, 0, 0, 0]]);
}

#[test]
fn no_layer_gets_more_than_it_stores() {
    // The released code asks for 64 rows where 32 are held, and copies rows of the window in their place.
    let x = generated(SHAPE, |l| if l == 0 { 200_000 } else { 0 });
    let i = LayersInput { r_max: 4.0, ..layers(&x, SHAPE, 8) };
    assert_eq!(dynamickv_rounds(&i).unwrap(), [vec![32, 0, 0, 0], vec![32, 0, 0, 0, 0, 0, 0, 0]]);
    // What a round took away does not come back: the second would give layer 1 two rows.
    let x = [9.0, 9.0, 9.0, 9.0, 0.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
    let i = LayersInput { interval: 2, ..layers(&x, [3, 1, 5], 2) };
    assert_eq!(best_counts(&x, 3, 6), [4, 2, 0]);
    assert_eq!(dynamickv_rounds(&i).unwrap(), [vec![5, 0], vec![4, 0, 0]]);
    // r_max is rounded down, not up: a layer holds at most ⌊1.5 · 3⌋ = 4 of its 10 rows.
    let x = generated([2, 1, 10], |l| if l == 0 { 200_000 } else { 0 });
    assert_eq!(budget_layers(&LayersInput { r_max: 1.5, ..layers(&x, [2, 1, 10], 3) }).unwrap(), [4, 0]);
}

#[test]
fn what_is_left_goes_to_the_largest_remainders() {
    // The released code floors three times, and gives the last layer all that is lost.
    assert_eq!(largest_remainder(&[15, 16, 16, 16, 12, 18, 16, 19], 64), [8, 8, 8, 8, 6, 9, 8, 9]);
    assert_eq!(largest_remainder(&[1, 1, 1], 5), [2, 2, 1]);
    assert_eq!(largest_remainder(&[1, 1, 1], 4), [2, 1, 1]);
    assert_eq!(largest_remainder(&[10, 26, 14, 50], 7), [1, 2, 1, 3]); // 0.7, 1.82, 0.98, 3.5
    assert_eq!(largest_remainder(&[3, 0, 1], 2), [2, 0, 0]); // 1.5, 0, 0.5: a tie
    assert_eq!(largest_remainder(&[0, 0], 9), [0, 0]);
    assert_eq!(largest_remainder(&[], 9), [0usize; 0]);
    // Counts of 1 are not divided by the number of layers first.
    let x = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0];
    assert_eq!(budget_layers(&layers(&x, [4, 1, 2], 1)).unwrap(), [1, 1, 1, 1]);
}

#[test]
fn layers_behind_the_last_interval_are_judged_too() {
    // The released code leaves layers 4 and 5 at min(80, P).
    let shape = [6, 2, 64];
    let x = generated(shape, |_| 0);
    let rounds = dynamickv_rounds(&layers(&x, shape, 8)).unwrap();
    assert_eq!((rounds.len(), rounds[0].len(), rounds[1].len()), (2, 4, 6));
    assert_eq!(rounds[1].iter().sum::<usize>(), 48);
    assert!(rounds[1][4..].iter().all(|&rows| rows < 16), "{rounds:?}");
    // An interval longer than the model is one round.
    let i = LayersInput { interval: usize::MAX, ..layers(&x, shape, 8) };
    assert_eq!(dynamickv_rounds(&i).unwrap().len(), 1);
    // No layer is owed any.
    assert_eq!(budget_layers(&layers(&x, shape, 0)).unwrap(), [0; 6]);
    // As many as there are: all stay, whatever they score.
    assert_eq!(budget_layers(&layers(&x, shape, 64)).unwrap(), [64; 6]);
    assert_eq!(budget_layers(&layers(&x, shape, 100)).unwrap(), [64; 6]);
    assert_eq!(budget_layers(&layers(&[], [3, 2, 0], 8)).unwrap(), [0; 3]);
    assert_eq!(budget_layers(&layers(&[], [0, 2, 5], 8)).unwrap(), [0i32; 0]);
}

fn pyramid(shape: [usize; 3], base: usize) -> Vec<i32> {
    let x = vec![0.0; shape.iter().product()];
    budget_layers(&LayersInput { method: LayerBudget::Pyramid, ..layers(&x, shape, base) }).unwrap()
}

#[test]
fn pyramids_fall_evenly_and_sum_to_the_total() {
    // Floored steps would sum to 4016, 65296 and 65488.
    for (base, rows, first, last) in
        [(120, 7992, 234, 6), (2040, 7992, 3978, 102), (2040, 2992, 2992, 1088), (2048, 4096, 3994, 102)]
    {
        let b = pyramid([32, 1, rows], base);
        assert_eq!((b[0], b[31]), (first, last), "{b:?}");
        assert_eq!(b.iter().sum::<i32>(), 32 * base as i32);
        assert!(b.windows(2).all(|w| w[0] > w[1]));
    }
    assert_eq!(pyramid([5, 1, 100], 10), [20, 15, 10, 5, 0]); // 19.5, 14.75, 10, 5.25, 0.5
    assert_eq!(pyramid([1, 1, 100], 10), [10]);
    assert_eq!(pyramid([3, 1, 7], 10), [7; 3]);
    assert_eq!(pyramid([0, 1, 7], 10), [0i32; 0]);
    let flat = LayersInput { method: LayerBudget::Pyramid, beta: 1, ..layers(&[0.0; 60], [3, 1, 20], 6) };
    assert_eq!(budget_layers(&flat).unwrap(), [6; 3]);
    let uniform = |base| budget_layers(&LayersInput { method: LayerBudget::Uniform, base, ..flat }).unwrap();
    assert_eq!((uniform(6), uniform(25)), (vec![6; 3], vec![20; 3]));
}

#[test]
fn wrong_budgets_are_named() {
    let x = [0.0; 24];
    let good = layers(&x, [2, 3, 4], 2);
    budget_layers(&good).unwrap();
    for method in [LayerBudget::DynamicKv, LayerBudget::Pyramid, LayerBudget::Uniform] {
        let says = |i: LayersInput<'_>, word: &str| {
            let e = budget_layers(&LayersInput { method, ..i }).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
        };
        says(LayersInput { rows: 5, ..good }, "scores");
        says(LayersInput { base: 1 << 31, ..good }, "base: 2147483648");
        says(LayersInput { r_max: 0.0, ..good }, "r_max: 0");
        says(LayersInput { r_max: f64::NAN, ..good }, "r_max: NaN");
        says(LayersInput { r_max: f64::INFINITY, ..good }, "r_max: inf");
        says(LayersInput { interval: 0, ..good }, "interval: 0");
        says(LayersInput { beta: 0, ..good }, "beta: 0");
        says(LayersInput { beta: (1 << 20) + 1, ..good }, "beta: 1048577");
    }
    let good = HeadsInput { heads: 6, rows: 4, scores: &x, base: 2, alpha: 0.5 };
    budget_heads(&good).unwrap();
    let says = |i: HeadsInput<'_>, word: &str| {
        let e = budget_heads(&i).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    };
    says(HeadsInput { heads: 5, ..good }, "scores");
    says(HeadsInput { base: 1 << 31, ..good }, "base");
    for bad in [-0.1, 1.1, f64::NAN] {
        says(HeadsInput { alpha: bad, ..good }, &format!("alpha: {bad}"));
    }
}

#[test]
fn heads_by_hand() {
    let x = [9.0, 8.0, 7.0, 1.0, 6.0, 5.0, 2.0, 0.0];
    let of = |base, alpha| budget_heads(&HeadsInput { heads: 2, rows: 4, scores: &x, base, alpha }).unwrap();
    assert_eq!(of(2, 0.0), [3, 1]);
    assert_eq!(of(2, 0.5), [2, 2]); // 2.5 and 1.5, halves to even
    assert_eq!(of(2, 1.0), [2, 2]);
    assert_eq!(of(1, 0.5), [1, 0]); // counts 2 and 0, ⌊0.5⌋ = 0
    assert_eq!(of(3, 0.5), [2, 2]); // counts 3 and 3, 1.5 + 1: two rows of six are lost
    assert_eq!((of(4, 0.3), of(9, 0.3), of(0, 0.3)), (vec![4, 4], vec![4, 4], vec![0, 0]));
    // Ties go to the lower head, NaN to none that has others.
    let of = |x: &[f32]| budget_heads(&HeadsInput { heads: 2, rows: 2, scores: x, base: 1, alpha: 0.0 }).unwrap();
    assert_eq!(of(&[1.0; 4]), [2, 0]);
    assert_eq!(of(&[f32::NAN, f32::NAN, -1.0, f32::NEG_INFINITY]), [0, 2]);
    assert_eq!(budget_heads(&HeadsInput { heads: 3, rows: 0, scores: &[], base: 2, alpha: 0.5 }).unwrap(), [0; 3]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Counts are those of sorting everything; heads of a layer may change places, and scores be scaled.
    #[test]
    fn dynamickv_follows_its_definition(
        (n, heads, rows) in (1..7usize, 1..4usize, 1..7usize),
        seed in prop::collection::vec(score(), 126),
        base in 0..9usize,
        r_max in prop_oneof![Just(0.6), Just(1.0), Just(1.5), Just(10.0)],
        interval in 1..8usize,
    ) {
        let x = &seed[..n * heads * rows];
        let i = LayersInput { r_max, interval, ..layers(x, [n, heads, rows], base) };
        let rounds = dynamickv_rounds(&i).unwrap();
        prop_assert_eq!(rounds.len(), n.div_ceil(interval));
        let mut held = vec![rows.min((r_max * base as f64) as usize); n];
        for (round, budgets) in rounds.iter().enumerate() {
            let seen = ((round + 1) * interval).min(n);
            let mut counts = vec![0usize; seen];
            let order = sorted(&x[..seen * heads * rows]);
            order.iter().take(base * heads * seen).for_each(|at| counts[at / heads / rows] += 1);
            prop_assert_eq!(&counts, &best_counts(&x[..seen * heads * rows], seen, base * heads * seen));
            // Shares one row at a time: whole parts, then to whoever is furthest below the exact share.
            let (total, sum) = (base * n, counts.iter().sum::<usize>());
            let mut shares: Vec<usize> = counts.iter().map(|c| c * total / sum.max(1)).collect();
            while sum > 0 && shares.iter().sum::<usize>() < total {
                let missing = |l: usize| counts[l] as i64 * total as i64 - (shares[l] * sum) as i64;
                let next = (0..seen).rev().max_by_key(|&l| missing(l)).unwrap();
                shares[next] += 1;
            }
            (0..seen).for_each(|l| held[l] = held[l].min(shares[l]));
            prop_assert_eq!(budgets, &held[..seen].to_vec());
        }
        let budgets = budget_layers(&i).unwrap();
        prop_assert!(budgets.iter().sum::<i32>() as usize <= base * n);
        prop_assert_eq!(budgets.iter().map(|&b| b as usize).collect::<Vec<_>>(), held);
    }

    /// Any distribution of scores over the rows and heads of a layer gives it the same budget.
    #[test]
    fn only_a_layers_scores_count_not_where_they_are(seed in any::<u64>(), base in 1..6usize) {
        let (n, heads, rows) = (5, 2, 6);
        let mut rng = kvlar_reference::testing::Rng::new(seed);
        let x: Vec<f32> = rng.permutation(n * heads * rows).into_iter().map(|x| x as f32).collect();
        let moved: Vec<f32> = x.chunks(heads * rows).flat_map(|l| rng.permutation(l.len()).into_iter().map(|at| l[at] * 8.0)).collect();
        let of = |x: &[f32]| budget_layers(&layers(x, [n, heads, rows], base)).unwrap();
        prop_assert_eq!(of(&x), of(&moved));
    }

    /// A pyramid sums to the total, falls, and is nowhere a row off its line.
    #[test]
    fn pyramids_are_lines(n in 2..40usize, base in 0..300usize, more in 0..300usize, beta in 1..40usize) {
        let rows = base + more;
        let x = vec![0.0; n * rows];
        let i = LayersInput { method: LayerBudget::Pyramid, beta, ..layers(&x, [n, 1, rows], base) };
        let b = budget_layers(&i).unwrap();
        prop_assert_eq!(b.iter().sum::<i32>() as usize, base * n);
        prop_assert!(b.windows(2).all(|w| w[0] >= w[1]) && b.iter().all(|&x| x as usize <= rows), "{b:?}");
        let max = (2.0 * base as f64 - base as f64 / beta as f64).min(rows as f64);
        let min = 2.0 * base as f64 - max;
        for (l, &b) in b.iter().enumerate() {
            let line = max - (max - min) * l as f64 / (n - 1) as f64;
            prop_assert!((f64::from(b) - line).abs() < 1.0 - 1e-9, "layer {l}: {b} instead of {line}");
        }
    }

    /// AdaKV from sorting all heads; without a share for everyone, the sum is the total.
    #[test]
    fn heads_follow_their_definition(
        (heads, rows) in (1..5usize, 1..9usize),
        seed in prop::collection::vec(score(), 32),
        base in 0..10usize,
        quarter in 0..5u32,
    ) {
        let x = &seed[..heads * rows];
        let b = budget_heads(&HeadsInput { heads, rows, scores: x, base, alpha: f64::from(quarter) / 4.0 }).unwrap();
        let mut counts = vec![0i64; heads];
        sorted(x).iter().take(base * heads).for_each(|at| counts[at / rows] += 1);
        for (count, &b) in counts.iter().zip(&b) {
            // Quarters: ¾ c and the like, and the floor of a quarter of base, in whole numbers.
            let quarters = count * i64::from(4 - quarter) + 4 * (i64::from(quarter) * base as i64 / 4);
            let (below, rest) = (quarters / 4, quarters % 4);
            let up = rest == 3 || (rest == 2 && below % 2 == 1);
            prop_assert_eq!(i64::from(b), (below + i64::from(up)).min(rows as i64));
        }
        prop_assert!(quarter > 0 || b.iter().sum::<i32>() as usize == (base * heads).min(heads * rows));
    }
}
