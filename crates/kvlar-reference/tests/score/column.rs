//! Attention of all queries.

use super::{attention, close, refused, wide};
use kvlar_reference::testing::Rng;
use kvlar_reference::{ColumnInput, Pool, WindowInput, score_column, score_window};
use proptest::prelude::*;

fn column<'a>(q: &'a [f32], k: &'a [f32], [q_heads, kv_heads, rows, head_dim]: [usize; 4]) -> ColumnInput<'a> {
    ColumnInput { seqs: 1, q_heads, kv_heads, rows, head_dim, q, k, scale: None }
}

#[test]
fn columns_by_hand() {
    // Even attention: 1 + 1/2 + 1/3, 1/2 + 1/3, 1/3.
    let k = [3.0, -1.0, 2.0];
    let even = column(&[0.0; 3], &k, [1, 1, 3, 1]);
    close(&score_column(&even).unwrap(), &[11.0 / 6.0, 5.0 / 6.0, 1.0 / 3.0]);
    // A second query head of the same keys, with weights 1, 1 : 2 and 1 : 2 : 4 at the scale 1/2; the mean of both.
    let k = [0.0, 2f32.ln(), 4f32.ln()];
    let two = ColumnInput { scale: Some(0.5), ..column(&[0.0, 0.0, 0.0, 2.0, 2.0, 2.0], &k, [2, 1, 3, 1]) };
    let head = [1.0 + 1.0 / 3.0 + 1.0 / 7.0, 2.0 / 3.0 + 2.0 / 7.0, 4.0 / 7.0];
    let mean = [(11.0 / 6.0 + head[0]) / 2.0, (5.0 / 6.0 + head[1]) / 2.0, (1.0 / 3.0 + head[2]) / 2.0];
    close(&score_column(&two).unwrap(), &mean);
    assert_eq!(score_column(&column(&[], &[], [2, 1, 0, 4])).unwrap(), []);
}

#[test]
fn what_is_not_finite_spoils_what_later_queries_see() {
    let (t, d) = (6, 4);
    let mut rng = Rng::new(2);
    let (q, mut k) = (rng.normals(2 * t * d, 1.0), rng.normals(2 * t * d, 1.0));
    let clean = score_column(&column(&q, &k, [2, 2, t, d])).unwrap();
    k[(t + 3) * d] = f32::NAN;
    let scores = score_column(&column(&q, &k, [2, 2, t, d])).unwrap();
    assert!(scores[..t] == clean[..t] && scores[t..].iter().all(|x| x.is_nan()));
    // The first query sees the first row alone.
    k[(t + 3) * d] = 0.0;
    let mut queries = q.clone();
    queries[0] = f32::NAN;
    let scores = score_column(&column(&queries, &k, [2, 2, t, d])).unwrap();
    assert!(scores[0].is_nan() && scores[1..t] == clean[1..t]);
}

#[test]
fn refuses_what_does_not_fit() {
    let x = [0.0; 12];
    let good = column(&x, &x[..6], [2, 1, 3, 2]);
    score_column(&good).unwrap();
    refused(score_column(&ColumnInput { k: &x, ..good.clone() }), "k: expected shape [1, 1, 3, 2]");
    refused(score_column(&ColumnInput { q: &x[..6], ..good.clone() }), "q: expected shape [1, 2, 3, 2]");
    refused(score_column(&ColumnInput { kv_heads: 3, ..good.clone() }), "q: 2 query heads");
    refused(score_column(&ColumnInput { head_dim: 0, ..good }), "q: it has rows of no dimensions");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn all_attention_is_handed_out((h, g, d) in (1..4usize, 1..4usize, 1..12usize), t in 1..30usize, seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let (q, k) = (rng.normals(h * g * t * d, 1.0), rng.normals(h * t * d, 1.0));
        let scores = score_column(&column(&q, &k, [h * g, h, t, d])).unwrap();
        let (weights, _) = attention(&q, &k, [h * g, h, t, t, d]);
        for (own, rows) in scores.chunks(t).zip(weights.chunks(g * t * t)) {
            let sum = |t0: usize| rows.chunks(t).map(|row| f64::from(row[t0])).sum::<f64>() / g as f64;
            close(own, &(0..t).map(sum).collect::<Vec<_>>());
            let all: f64 = wide(own).iter().sum();
            prop_assert!((all - t as f64).abs() < 1e-5, "{all} of {t}");
        }
    }

    #[test]
    fn a_window_is_what_its_queries_add((p, w, g) in (1..20usize, 1..6usize, 1..4usize), seed in any::<u64>()) {
        let (mut rng, t, d) = (Rng::new(seed), p + w, 8);
        let (q, k) = (rng.normals(g * t * d, 1.0), rng.normals(t * d, 1.0));
        let part = |from: usize, to: usize| q.chunks(t * d).flat_map(|head| head[from * d..to * d].to_vec()).collect::<Vec<_>>();
        let (first, last) = (part(0, p), part(p, t));
        let before = score_column(&column(&first, &k[..p * d], [g, 1, p, d])).unwrap();
        let i = WindowInput { seqs: 1, q_heads: g, kv_heads: 1, window: w, rows: t, head_dim: d, q: &last, k: &k, ..Default::default() };
        let added = score_window(&WindowInput { pool: Pool::None, ..i }).unwrap();
        let all = score_column(&column(&q, &k, [g, 1, t, d])).unwrap();
        let sum: Vec<f64> = wide(&before).iter().zip(wide(&added)).map(|(a, b)| a + b).collect();
        close(&all[..p], &sum);
    }
}
