//! Scores from keys and values alone.

use super::{close, refused};
use kvlar_reference::testing::Rng;
use kvlar_reference::{KeyMethod, KeysInput, score_keys};
use proptest::prelude::*;

/// One head: rows of `d` and `dv`.
fn keys<'a>(method: KeyMethod, (k, head_dim): (&'a [f32], usize), (v, value_dim): (&'a [f32], usize)) -> KeysInput<'a> {
    KeysInput { seqs: 1, kv_heads: 1, rows: k.len() / head_dim, head_dim, value_dim, k, v: Some(v), method }
}

fn of_keys(method: KeyMethod, k: &[f32], d: usize) -> Vec<f32> {
    score_keys(&KeysInput { v: None, ..keys(method, (k, d), (&[], 0)) }).unwrap()
}

fn of_both(method: KeyMethod, k: (&[f32], usize), v: (&[f32], usize)) -> Vec<f32> {
    score_keys(&keys(method, k, v)).unwrap()
}

#[test]
fn short_keys_stay() {
    let k = [3.0, 4.0, 0.0, 0.0, -1.0, 0.0, f32::NAN, 1.0, f32::NEG_INFINITY, 1.0];
    let scores = of_keys(KeyMethod::L2Norm, &k, 2);
    assert_eq!(scores[..3], [-5.0, 0.0, -1.0]);
    assert!(scores[3].is_nan() && scores[4] == f32::NEG_INFINITY);
}

#[test]
fn keys_unlike_the_others_stay() {
    // Directions count, not lengths: the mean is along (1, 2).
    let root = 5f64.sqrt();
    let k = [10.0, 0.0, 0.0, 1.0, 0.0, 0.5];
    close(&of_keys(KeyMethod::KeyDiff, &k, 2), &[-1.0 / root, -2.0 / root, -2.0 / root]);
    // A key of zeros is like none; with it the mean has the same direction.
    let zero = [&k[..2], &[0.0; 2], &k[2..]].concat();
    close(&of_keys(KeyMethod::KeyDiff, &zero, 2), &[-1.0 / root, 0.0, -2.0 / root, -2.0 / root]);
    close(&of_keys(KeyMethod::KeyDiff, &[2.0, 0.0, -1.0, 0.0], 2), &[0.0; 2]);
    close(&of_keys(KeyMethod::KeyDiff, &[0.0; 4], 2), &[0.0; 2]);
    for bad in [f32::NAN, f32::INFINITY] {
        let scores = of_keys(KeyMethod::KeyDiff, &[&k[..2], &[bad, 1.0], &k[2..]].concat(), 2);
        assert!(scores[1].is_nan());
        close(&[scores[0], scores[2], scores[3]], &[-1.0 / root, -2.0 / root, -2.0 / root]);
    }
    assert_eq!(of_keys(KeyMethod::KeyDiff, &[], 2), []);
}

#[test]
fn values_weigh_against_keys() {
    let k = [3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, f32::NAN, 0.0, f32::INFINITY, 0.0];
    let v = [6.0, 8.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0];
    let scores = of_both(KeyMethod::ValueKeyRatio, (&k, 2), (&v, 3));
    assert_eq!(scores[..4], [2.0, f32::INFINITY, 0.0, 0.0]);
    assert!(scores[4].is_nan() && scores[5] == 0.0);
}

const LAG: usize = 128;

/// Rows of two lags behind 4 sinks: those of the second only say that each channel's range is 0 to 1.
fn lags(first: &[[f32; 2]]) -> Vec<f32> {
    let second = (0..LAG).flat_map(|i| [if i == 5 { 1.0 } else { 0.0 }, if i == 77 { 1.0 } else { 0.0 }]);
    [0.0; 8].into_iter().chain(first.iter().flatten().copied()).chain(second).collect()
}

fn ranks(first_k: &[[f32; 2]], first_v: &[[f32; 2]]) -> Vec<usize> {
    let scores = of_both(KeyMethod::LagKv, (&lags(first_k), 2), (&lags(first_v), 2));
    assert!(scores[..4].iter().chain(&scores[4 + LAG..]).all(|x| *x == 1.0));
    scores[4..4 + LAG].iter().map(|x| (x * 128.0) as usize).collect()
}

#[test]
fn scattered_channels_stay() {
    let rows = |x: &dyn Fn(usize) -> f32| -> Vec<[f32; 2]> { (0..LAG).map(|i| [x(i), -x(i)]).collect() };
    let even = rows(&|_| 0.25);
    let climbing = rows(&|i| i as f32 / 64.0);
    let order = Rng::new(5).permutation(LAG);
    let shuffled = rows(&|i| order[i] as f32 / 64.0);
    let up: Vec<usize> = (0..LAG).collect();
    // By keys or by values, whichever differ.
    assert_eq!(ranks(&climbing, &even), up);
    assert_eq!(ranks(&even, &climbing), up);
    assert_eq!(ranks(&shuffled, &even), order);
    // Of equals the lower row is the higher.
    assert_eq!(ranks(&even, &even), (0..LAG).rev().collect::<Vec<_>>());
    // Each side is a softmax first: deviations of 10 and 9 in keys count for more than 0 and 3 in values.
    let root = 2f32.sqrt();
    let two = |a: f32, b: f32| rows(&move |i| [a, b].get(i).map_or(0.0, |x| x / root));
    let of = ranks(&two(10.0, 9.0), &two(0.0, 3.0));
    assert_eq!(of[..2], [127, 126]);
    // A channel that is constant in the next lag counts as 0, whatever it is here.
    let flat = |x: &[f32]| -> Vec<f32> {
        x.chunks(2)
            .enumerate()
            .map(|(i, row)| if i < 4 + LAG { [row[0], 7.0 * i as f32] } else { [row[0], 3.0] })
            .collect::<Vec<_>>()
            .concat()
    };
    let scores = of_both(KeyMethod::LagKv, (&flat(&lags(&climbing)), 2), (&flat(&lags(&even)), 2));
    assert!((0..LAG).all(|i| scores[4 + i] == i as f32 / 128.0), "{scores:?}");
}

#[test]
fn lags_are_judged_when_the_next_is_full() {
    let mut rng = Rng::new(6);
    let (k, v) = (rng.normals(400 * 3, 1.0), rng.normals(400 * 2, 1.0));
    for (rows, judged) in [(0, 0), (3, 0), (4, 0), (259, 0), (260, 1), (387, 1), (388, 2), (400, 2)] {
        let scores = of_both(KeyMethod::LagKv, (&k[..rows * 3], 3), (&v[..rows * 2], 2));
        let end = 4.min(rows) + judged * LAG;
        assert!((0..rows).all(|i| (scores[i] == 1.0) == (i < 4 || i >= end)), "{rows}");
        for lag in 0..judged {
            let mut own: Vec<usize> = scores[4 + lag * LAG..][..LAG].iter().map(|x| (x * 128.0) as usize).collect();
            own.sort_unstable();
            assert_eq!(own, (0..LAG).collect::<Vec<_>>(), "each place once");
        }
    }
}

#[test]
fn a_row_that_is_not_finite_is_the_least_of_its_lag_and_of_no_range() {
    let climbing: Vec<[f32; 2]> = (0..LAG).map(|i| [i as f32 / 64.0, 0.0]).collect();
    let (k, v) = (lags(&climbing), lags(&[[0.25, 0.5]; LAG]));
    let clean = of_both(KeyMethod::LagKv, (&k, 2), (&v, 2));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        // The first row is the least already; row 9 of the next lag is at no end of the range.
        for row in [4, 4 + LAG + 9] {
            let spoil = |x: &[f32]| [&x[..2 * row], &[bad, 0.0], &x[2 * row + 2..]].concat();
            assert_eq!(of_both(KeyMethod::LagKv, (&spoil(&k), 2), (&v, 2)), clean);
            assert_eq!(of_both(KeyMethod::LagKv, (&k, 2), (&spoil(&v), 2)), clean);
        }
        // None is left: all are equal, and the lower row is the higher, whatever the values.
        let none = of_both(KeyMethod::LagKv, (&lags(&[[bad, 0.0]; LAG]), 2), (&k, 2));
        assert!((0..LAG).all(|i| none[4 + i] == (LAG - 1 - i) as f32 / 128.0), "{none:?}");
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let (k, v) = ([0.0; 12], [0.0; 12]);
    let good = KeysInput { seqs: 1, kv_heads: 2, ..keys(KeyMethod::ValueKeyRatio, (&k, 2), (&v, 2)) };
    let good = KeysInput { rows: 3, ..good };
    score_keys(&good).unwrap();
    refused(score_keys(&KeysInput { rows: 4, ..good }), "k: expected shape [1, 2, 4, 2]");
    refused(score_keys(&KeysInput { v: Some(&v[1..]), ..good }), "v: expected shape [1, 2, 3, 2]");
    refused(score_keys(&KeysInput { head_dim: 0, k: &[], ..good }), "k: its rows have 0");
    refused(score_keys(&KeysInput { value_dim: 0, v: Some(&[]), ..good }), "v: its rows have 0");
    for method in [KeyMethod::ValueKeyRatio, KeyMethod::LagKv] {
        refused(score_keys(&KeysInput { v: None, method, ..good }), "v: the method needs it");
    }
    let narrow = KeysInput { rows: 6, method: KeyMethod::LagKv, ..good };
    refused(score_keys(&KeysInput { head_dim: 1, ..narrow }), "k: its rows have 1");
    refused(score_keys(&KeysInput { rows: 3, value_dim: 1, v: Some(&v[..6]), ..narrow }), "v: its rows have 1");
    // Values that are not needed are checked all the same, not read.
    let norms = KeysInput { method: KeyMethod::L2Norm, ..good };
    refused(score_keys(&KeysInput { v: Some(&v[1..]), ..norms }), "v: expected shape");
    assert_eq!(score_keys(&KeysInput { v: Some(&[f32::NAN; 12]), ..norms }).unwrap(), [0.0; 6]);
}

/// LagKV of one head, by sorting.
fn lagkv_by_sorting(k: &[Vec<f64>], v: &[Vec<f64>]) -> Vec<f64> {
    let softmax = |x: Vec<f64>| -> Vec<f64> {
        let sum: f64 = x.iter().map(|x| x.exp()).sum();
        x.iter().map(|x| x.exp() / sum).collect()
    };
    let scatter = |own: &[Vec<f64>], next: &[Vec<f64>]| {
        let column = |c: usize| next.iter().map(move |row| row[c]);
        let deviation = |row: &Vec<f64>| {
            let scaled = |c: usize| {
                let low = column(c).fold(f64::MAX, f64::min);
                (row[c] - low) / (column(c).fold(f64::MIN, f64::max) - low)
            };
            // The variance from all pairs, each counted twice.
            let (n, x) = (row.len(), (0..row.len()).map(scaled).collect::<Vec<_>>());
            let squares: f64 = x.iter().flat_map(|a| x.iter().map(move |b| (a - b).powi(2))).sum();
            (squares / (2 * n * (n - 1)) as f64).sqrt()
        };
        softmax(own.iter().map(deviation).collect())
    };
    let mut scores = vec![1.0; k.len()];
    let mut start = 4;
    while start + 2 * LAG <= k.len() {
        let of = |x: &[Vec<f64>]| scatter(&x[start..start + LAG], &x[start + LAG..start + 2 * LAG]);
        let both: Vec<f64> = of(k).iter().zip(of(v)).map(|(a, b)| a + b).collect();
        let mut order: Vec<usize> = (0..LAG).collect();
        order.sort_by(|&a, &b| both[a].total_cmp(&both[b]));
        order.iter().enumerate().for_each(|(place, &row)| scores[start + row] = place as f64 / 128.0);
        start += LAG;
    }
    scores
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn lagkv_is_its_formula((d, dv) in (2..8usize, 2..8usize), rows in 255..550usize, scale in 0.1..20f32, seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let (k, v) = (rng.normals(rows * d, 1.0), rng.normals(rows * dv, scale));
        let split = |x: &[f32], d: usize| -> Vec<Vec<f64>> { x.chunks(d).map(super::wide).collect() };
        close(&of_both(KeyMethod::LagKv, (&k, d), (&v, dv)), &lagkv_by_sorting(&split(&k, d), &split(&v, dv)));
    }

    #[test]
    fn all_but_lags_move_with_their_rows(
        (b, h, t, d) in (1..3usize, 1..3usize, 1..20usize, 1..9usize),
        seed in any::<u64>(),
    ) {
        let mut rng = Rng::new(seed);
        let (k, v) = (rng.normals(b * h * t * d, 1.0), rng.normals(b * h * t * d, 1.0));
        let order = rng.permutation(t);
        let moved = |x: &[f32], width: usize| -> Vec<f32> {
            x.chunks(t * width).flat_map(|head| order.iter().flat_map(|&t| head[t * width..][..width].to_vec()).collect::<Vec<_>>()).collect()
        };
        for method in [KeyMethod::L2Norm, KeyMethod::KeyDiff, KeyMethod::ValueKeyRatio] {
            let of = |k: &[f32], v: &[f32]| {
                let i = KeysInput { seqs: b, kv_heads: h, rows: t, head_dim: d, value_dim: d, k, v: Some(v), method };
                score_keys(&i).unwrap()
            };
            let (scores, after) = (of(&k, &v), of(&moved(&k, d), &moved(&v, d)));
            close(&after, &super::wide(&moved(&scores, 1)));
            // Each head by itself.
            let head = |i: usize| of_both(method, (&k[i * t * d..][..t * d], d), (&v[i * t * d..][..t * d], d));
            prop_assert_eq!(scores, (0..b * h).flat_map(head).collect::<Vec<_>>());
        }
    }

    #[test]
    fn lengths_of_keys_do_not_matter_to_keydiff((t, d) in (1..20usize, 1..9usize), seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let k = rng.normals(t * d, 1.0);
        let longer: Vec<f32> = k.chunks(d).flat_map(|row| { let by = 2f32.powi(rng.below(9) as i32 - 4); row.iter().map(move |x| x * by).collect::<Vec<_>>() }).collect();
        close(&of_keys(KeyMethod::KeyDiff, &longer, d), &super::wide(&of_keys(KeyMethod::KeyDiff, &k, d)));
    }
}
