//! Attention of a window.

use super::{attention, close, refused, wide};
use kvlar_reference::testing::Rng;
use kvlar_reference::{HeadReduction, Pool, RowReduction, WindowColumns, WindowInput, score_window};
use proptest::prelude::*;

fn window<'a>(q: &'a [f32], k: &'a [f32], [q_heads, kv_heads, window, rows, head_dim]: [usize; 5]) -> WindowInput<'a> {
    let pool = Pool::None;
    WindowInput { seqs: 1, q_heads, kv_heads, window, rows, head_dim, q, k, pool, ..Default::default() }
}

/// Scores where the attention that each query `[Hq][W]` gives to the rows before the window is known.
fn of_weights(weights: &[&[&[f32]]], pool: Pool, head_reduction: HeadReduction) -> Vec<f32> {
    let (heads, w, before) = (weights.len(), weights[0].len(), weights[0][0].len());
    let (d, rows) = (heads * w, before + w);
    // Each query looks at a dimension of its own, in which keys hold logarithms of weights; the lse is 0.
    let mut k = vec![0.0; rows * d];
    for (i, row) in weights.iter().flat_map(|head| head.iter()).enumerate() {
        row.iter().enumerate().for_each(|(t, &x)| k[t * d + i] = if x == 0.0 { -1e4 } else { x.ln() });
    }
    let q: Vec<f32> = (0..d * d).map(|i| if i / d == i % d { 1.0 } else { 0.0 }).collect();
    let lse = vec![0.0; d];
    let i = window(&q, &k, [heads, 1, w, rows, d]);
    score_window(&WindowInput { lse: Some(&lse), scale: Some(1.0), pool, head_reduction, ..i }).unwrap()
}

#[test]
fn defaults_are_those_of_the_op() {
    let i = WindowInput::default();
    let (rows, heads) = (i.row_reduction, i.head_reduction);
    assert_eq!((i.pool, rows, heads), (Pool::Avg(7), RowReduction::Sum, HeadReduction::Mean));
}

#[test]
fn queries_see_the_window_up_to_themselves() {
    // Queries of zeros share their attention out evenly: 1/3 + 1/4.
    let k: Vec<f32> = (0..8).map(|i| i as f32).collect();
    let even = window(&[0.0; 4], &k, [1, 1, 2, 4, 2]);
    close(&score_window(&even).unwrap(), &[7.0 / 12.0; 2]);
    let mean = WindowInput { row_reduction: RowReduction::Mean, ..even };
    close(&score_window(&mean).unwrap(), &[7.0 / 24.0; 2]);
    // Weights 1 : 2, then 1 : 2 : 4.
    let k = [0.0, 2f32.ln(), 4f32.ln()];
    let steps = window(&[1.0, 1.0], &k, [1, 1, 2, 3, 1]);
    close(&score_window(&steps).unwrap(), &[1.0 / 3.0 + 1.0 / 7.0]);
    // The scale is 1/√d where none is given: 1/2 here.
    let four: Vec<f32> = k.iter().flat_map(|&x| [2.0 * x, 0.0, 0.0, 0.0]).collect();
    let q = [1.0, 0.0, 0.0, 0.0].repeat(2);
    close(&score_window(&window(&q, &four, [1, 1, 2, 3, 4])).unwrap(), &[1.0 / 3.0 + 1.0 / 7.0]);
    let doubled = WindowInput { scale: Some(1.0), ..window(&q, &four, [1, 1, 2, 3, 4]) };
    close(&score_window(&doubled).unwrap(), &[1.0 / 5.0 + 1.0 / 21.0]);
    // Nothing before the window.
    assert_eq!(score_window(&window(&[1.0; 3], &k, [1, 1, 3, 3, 1])).unwrap(), []);
}

#[test]
fn all_rows_may_have_a_score() {
    // Weights 1 : 2, then 1 : 2 : 4, of rows 0, 1, 2; the window's rows get some of them.
    let k = [0.0, 2f32.ln(), 4f32.ln()];
    let all = WindowInput { columns: WindowColumns::All, ..window(&[1.0, 1.0], &k, [1, 1, 2, 3, 1]) };
    close(&score_window(&all).unwrap(), &[1.0 / 3.0 + 1.0 / 7.0, 2.0 / 3.0 + 2.0 / 7.0, 4.0 / 7.0]);
    // Pooled with those before.
    let pooled = WindowInput { pool: Pool::Max(3), ..all };
    close(&score_window(&pooled).unwrap(), &[2.0 / 3.0 + 2.0 / 7.0; 3]);
}

#[test]
fn pools_the_rows_before_the_window_only() {
    let scores: &[&[&[f32]]] = &[&[&[3.0, 0.0, 0.0, 3.0]]];
    close(&of_weights(scores, Pool::Avg(3), HeadReduction::Mean), &[1.0; 4]);
    close(&of_weights(scores, Pool::Max(3), HeadReduction::Mean), &[3.0; 4]);
    close(&of_weights(scores, Pool::Max(1), HeadReduction::Mean), &[3.0, 0.0, 0.0, 3.0]);
    close(&of_weights(scores, Pool::None, HeadReduction::Mean), &[3.0, 0.0, 0.0, 3.0]);
    close(&of_weights(&[&[&[5.0]]], Pool::Avg(5), HeadReduction::Mean), &[1.0]);
    close(&of_weights(&[&[&[5.0, 10.0]]], Pool::Avg(usize::MAX), HeadReduction::Mean), &[0.0; 2]);
    close(&of_weights(&[&[&[5.0, 10.0]]], Pool::Max(usize::MAX), HeadReduction::Mean), &[10.0; 2]);
}

#[test]
fn rows_come_before_pooling_and_heads_after() {
    // Two rows that look at opposite ends: their sum is pooled, not each.
    let rows: &[&[&[f32]]] = &[&[&[3.0, 0.0, 0.0], &[0.0, 0.0, 3.0]]];
    close(&of_weights(rows, Pool::Max(3), HeadReduction::Mean), &[3.0, 3.0, 3.0]);
    let both: &[&[&[f32]]] = &[&[&[3.0, 0.0], &[0.0, 3.0]]];
    close(&of_weights(both, Pool::Max(3), HeadReduction::Mean), &[3.0, 3.0]);
    // Two heads that do: each is pooled, then they are reduced.
    let heads: &[&[&[f32]]] = &[&[&[3.0, 0.0, 0.0]], &[&[0.0, 0.0, 3.0]]];
    close(&of_weights(heads, Pool::Max(3), HeadReduction::Mean), &[1.5, 3.0, 1.5]);
    close(&of_weights(heads, Pool::Max(3), HeadReduction::Sum), &[3.0, 6.0, 3.0]);
    close(&of_weights(heads, Pool::Max(3), HeadReduction::Max), &[3.0; 3]);
    let slopes: &[&[&[f32]]] = &[&[&[3.0, 0.0, 6.0]], &[&[0.0, 9.0, 0.0]]];
    close(&of_weights(slopes, Pool::Avg(3), HeadReduction::Max), &[3.0, 3.0, 3.0]);
    close(&of_weights(slopes, Pool::Avg(3), HeadReduction::Mean), &[2.0, 3.0, 2.5]);
}

#[test]
fn what_is_not_finite_stays_in_its_query_or_its_column() {
    let mut rng = Rng::new(1);
    let (w, t, d) = (3, 9, 4);
    let (mut q, k) = (rng.normals(2 * w * d, 1.0), rng.normals(2 * t * d, 1.0));
    (0..w).for_each(|row| q[row * d] = 1.0);
    let (lse, all) = ([1.0; 6], window(&q, &k, [2, 2, w, t, d]));
    let clean = score_window(&all).unwrap();
    let clean_given = score_window(&WindowInput { lse: Some(&lse), ..all.clone() }).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        // A key of the first kv head: all that its queries give; the other head is not touched.
        let mut k = k.clone();
        k[2 * d..3 * d].copy_from_slice(&[bad, 0.0, 0.0, 0.0]);
        let spoiled = WindowInput { k: &k, ..all.clone() };
        let scores = score_window(&spoiled).unwrap();
        assert!(scores[..t - w].iter().all(|x| x.is_nan()) && scores[t - w..] == clean[t - w..], "{scores:?}");
        // With a given lse it is the key's own column alone.
        let given = score_window(&WindowInput { lse: Some(&lse), ..spoiled }).unwrap();
        let (at, rest): (Vec<_>, Vec<_>) = (0..given.len()).partition(|&i| i == 2);
        assert!(!given[at[0]].is_finite() && rest.iter().all(|&i| given[i] == clean_given[i]), "{given:?}");
    }
    // A query that is NaN: a sum has it, a largest of heads only where it is in all.
    let mut queries = rng.normals(2 * w * d, 1.0);
    queries[w * d] = f32::NAN;
    let k = &k[..t * d];
    let reduced = |head_reduction, pool| {
        let i = window(&queries, k, [2, 1, w, t, d]);
        score_window(&WindowInput { head_reduction, pool, ..i }).unwrap()
    };
    for pool in [Pool::None, Pool::Max(3)] {
        assert!(reduced(HeadReduction::Mean, pool).iter().all(|x| x.is_nan()));
        let first = window(&queries[..w * d], k, [1, 1, w, t, d]);
        assert_eq!(reduced(HeadReduction::Max, pool), score_window(&WindowInput { pool, ..first }).unwrap());
    }
    let are_nan = |x: &[f32]| x.iter().map(|x| x.is_nan()).collect::<Vec<_>>();
    // A largest along the rows passes over it too, while there is another; a mean does not.
    let nan = |pool| of_weights(&[&[&[3.0, f32::NAN, 1.0, 5.0]]], pool, HeadReduction::Mean);
    close(&nan(Pool::Max(3)), &[3.0, 3.0, 5.0, 5.0]);
    assert_eq!(are_nan(&nan(Pool::Max(1))), [false, true, false, false]);
    assert_eq!(are_nan(&nan(Pool::Avg(3))), [true, true, true, false]);
    // A query that saw nothing.
    let none = WindowInput { lse: Some(&[f32::NEG_INFINITY; 3]), ..window(&queries[..w * d], k, [1, 1, w, t, d]) };
    assert_eq!(score_window(&none).unwrap(), [0.0; 6]);
}

#[test]
fn refuses_what_does_not_fit() {
    let (q, k) = ([0.0; 12], [0.0; 12]);
    let good = window(&q[..8], &k, [2, 1, 2, 6, 2]);
    score_window(&good).unwrap();
    refused(score_window(&WindowInput { q: &q, ..good.clone() }), "q: expected shape [1, 2, 2, 2]");
    refused(score_window(&WindowInput { rows: 5, ..good.clone() }), "k: expected shape [1, 1, 5, 2]");
    refused(score_window(&WindowInput { lse: Some(&[0.0; 3]), ..good.clone() }), "lse: expected shape [1, 2, 2]");
    refused(score_window(&WindowInput { kv_heads: 3, ..good.clone() }), "q: 2 query heads");
    refused(score_window(&WindowInput { kv_heads: 0, ..good.clone() }), "q: 2 query heads");
    refused(score_window(&WindowInput { q_heads: 0, ..good.clone() }), "q: 0 query heads");
    refused(score_window(&WindowInput { window: 0, ..good.clone() }), "q: 0 queries");
    refused(score_window(&WindowInput { window: 7, ..good.clone() }), "q: 7 queries");
    refused(score_window(&WindowInput { head_dim: 0, ..good.clone() }), "q: 2 queries of 0");
    for pool in [Pool::Avg(4), Pool::Max(0)] {
        refused(score_window(&WindowInput { pool, ..good.clone() }), "is not odd");
    }
}

/// kv heads, query heads of each, window, rows before it, dimensions.
fn dims() -> impl Strategy<Value = [usize; 5]> {
    (1..4usize, 1..4usize, 1..6usize, 1..40usize, 1..12usize).prop_map(|(h, g, w, p, d)| [h, g, w, p, d])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn is_attention_and_loses_none_of_it([h, g, w, p, d] in dims(), seed in any::<u64>()) {
        let (mut rng, t) = (Rng::new(seed), p + w);
        let (q, k) = (rng.normals(h * g * w * d, 1.0), rng.normals(h * t * d, 1.0));
        let (weights, lse) = attention(&q, &k, [h * g, h, w, t, d]);
        let i = WindowInput { head_reduction: HeadReduction::Sum, ..window(&q, &k, [h * g, h, w, t, d]) };
        let scores = score_window(&i).unwrap();
        // Each kv head's rows of attention, summed; with what stays in the window they are 1 each.
        for (head, rows) in weights.chunks(g * w * t).enumerate() {
            let sum = |t0: usize| rows.chunks(t).map(|row| f64::from(row[t0])).sum::<f64>();
            let own = &scores[head * p..][..p];
            close(own, &(0..p).map(sum).collect::<Vec<_>>());
            let all = wide(own).iter().sum::<f64>() + (p..t).map(sum).sum::<f64>();
            prop_assert!((all - (g * w) as f64).abs() < 1e-5, "{all}");
        }
        // The lse that attention gives saves a pass and changes nothing.
        close(&score_window(&WindowInput { lse: Some(&lse), ..i }).unwrap(), &wide(&scores));
    }

    #[test]
    fn sharing_keys_is_repeating_them([h, g, w, p, d] in dims(), half in 0..5usize, seed in any::<u64>()) {
        let (mut rng, t) = (Rng::new(seed), p + w);
        let (q, k) = (rng.normals(h * g * w * d, 1.0), rng.normals(h * t * d, 1.0));
        let repeated: Vec<f32> = k.chunks(t * d).flat_map(|head| head.repeat(g)).collect();
        for pool in [Pool::Avg(2 * half + 1), Pool::Max(2 * half + 1)] {
            let apart = WindowInput { pool, ..window(&q, &repeated, [h * g, h * g, w, t, d]) };
            let apart = wide(&score_window(&apart).unwrap());
            for (head_reduction, divisor) in [(HeadReduction::Mean, g as f64), (HeadReduction::Sum, 1.0)] {
                let shared = WindowInput { pool, head_reduction, ..window(&q, &k, [h * g, h, w, t, d]) };
                let sum = |i: usize| (0..g).map(|j| apart[(i / p * g + j) * p + i % p]).sum::<f64>() / divisor;
                close(&score_window(&shared).unwrap(), &(0..h * p).map(sum).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn sequences_do_not_meet([h, g, w, p, d] in dims(), seed in any::<u64>()) {
        let (mut rng, t) = (Rng::new(seed), p + w);
        let (q, k) = (rng.normals(2 * h * g * w * d, 1.0), rng.normals(2 * h * t * d, 1.0));
        let one = |b: usize| {
            let (q, k) = (&q[b * h * g * w * d..][..h * g * w * d], &k[b * h * t * d..][..h * t * d]);
            score_window(&window(q, k, [h * g, h, w, t, d])).unwrap()
        };
        let both = WindowInput { seqs: 2, ..window(&q, &k, [h * g, h, w, t, d]) };
        prop_assert_eq!(score_window(&both).unwrap(), [one(0), one(1)].concat());
    }
}
