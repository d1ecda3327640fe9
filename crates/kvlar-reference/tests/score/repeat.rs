//! The teacher of the gate.

use super::{attention, close, refused, wide};
use kvlar_reference::testing::Rng;
use kvlar_reference::{RepeatInput, score_repeat};
use proptest::prelude::*;

/// One dimension: a sink, two rows of context, two of the repeating text; two query heads.
fn small<'a>(q: &'a [f32; 4], k: &'a [f32; 5]) -> RepeatInput<'a> {
    let (sink, start, len) = (1, 1, 2);
    RepeatInput { q_heads: 2, kv_heads: 1, queries: 2, rows: 3, head_dim: 1, q, k, sink, start, len, scale: None }
}

const Q: [f32; 4] = [1.0, 2.0, -1.0, 0.0];
const K: [f32; 5] = [0.0, 1.0, 2.0, 0.5, 0.0];

#[test]
fn the_largest_weight_of_any_query_and_head() {
    let scores = score_repeat(&small(&Q, &K)).unwrap();
    for (score, expected) in scores.iter().zip([0.213_097_3, 0.818_495_6f64]) {
        assert!((f64::from(*score) - expected).abs() < 1e-7, "{scores:?}");
    }
    // A chunk of the second row alone leaves the first out of the denominator, and so do sinks that are not wanted.
    let e = |x: f64| x.exp();
    let alone = RepeatInput { start: 2, len: 1, sink: 0, ..small(&Q, &K) };
    close(&score_repeat(&alone).unwrap(), &[e(4.0) / (e(4.0) + e(1.0) + 1.0)]);
    // Rows that are sinks too count once.
    let all = RepeatInput { sink: 0, start: 0, len: 3, ..small(&Q, &K) };
    let scores = score_repeat(&all).unwrap();
    for sink in 1..=3 {
        assert_eq!(score_repeat(&RepeatInput { sink, ..all.clone() }).unwrap(), scores);
        let first = RepeatInput { len: 1, sink, ..all.clone() };
        let own = |q: f64, repeat: f64| 1.0 / ((0..sink).map(|t| e(q * f64::from(K[t]))).sum::<f64>() + repeat);
        close(&score_repeat(&first).unwrap(), &[own(-1.0, e(-0.5)).max(own(0.0, 2.0))]);
    }
    assert_eq!(score_repeat(&RepeatInput { len: 0, ..all }).unwrap(), []);
}

#[test]
fn a_query_that_is_not_finite_is_passed_over() {
    let mut q = Q;
    q[1] = f32::NAN;
    // The best of the others.
    close(&score_repeat(&small(&q, &K)).unwrap(), &[0.213_097_3, 0.579_259]);
    let mut k = K;
    k[0] = f32::NAN;
    assert!(score_repeat(&small(&Q, &k)).unwrap().iter().all(|x| x.is_nan()));
    // The last row of the repeating text is seen by the last query of each head alone.
    let mut k = K;
    k[4] = f32::NAN;
    close(&score_repeat(&small(&Q, &k)).unwrap(), &[0.213_097_3, 0.579_259]);
}

#[test]
fn refuses_what_does_not_fit() {
    let good = small(&Q, &K);
    refused(score_repeat(&RepeatInput { q: &Q[1..], ..good.clone() }), "q: expected shape [2, 2, 1]");
    refused(score_repeat(&RepeatInput { k: &K[1..], ..good.clone() }), "k: expected shape [1, 5, 1]");
    refused(score_repeat(&RepeatInput { kv_heads: 4, ..good.clone() }), "q: 2 query heads");
    refused(score_repeat(&RepeatInput { queries: 0, ..good.clone() }), "q: there are 0 queries");
    refused(score_repeat(&RepeatInput { sink: 4, ..good.clone() }), "sink: 4");
    refused(score_repeat(&RepeatInput { start: 4, len: 0, ..good.clone() }), "start: 4");
    refused(score_repeat(&RepeatInput { len: 3, ..good.clone() }), "len: 3 rows from start 1");
    refused(score_repeat(&RepeatInput { len: usize::MAX, ..good }), "len: ");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn is_attention_over_the_rows_that_are_left(
        (h, g, d) in (1..3usize, 1..4usize, 1..10usize),
        (sink, gap, len, rest, n) in (0..4usize, 0..9usize, 1..9usize, 0..9usize, 1..6usize),
        seed in any::<u64>(),
    ) {
        let (mut rng, start) = (Rng::new(seed), sink + gap);
        let t = start + len + rest;
        let (q, k) = (rng.normals(h * g * n * d, 1.0), rng.normals(h * (t + n) * d, 1.0));
        let i = RepeatInput { q_heads: h * g, kv_heads: h, queries: n, rows: t, head_dim: d, q: &q, k: &k, sink, start, len, scale: None };
        let scores = score_repeat(&i).unwrap();
        let left: Vec<usize> = (0..sink).chain(start..start + len).chain(t..t + n).collect();
        let row = |head: usize, row: usize| k[(head * (t + n) + row) * d..][..d].to_vec();
        let kept: Vec<f32> = (0..h).flat_map(|head| left.iter().flat_map(move |&r| row(head, r)).collect::<Vec<_>>()).collect();
        let (weights, _) = attention(&q, &kept, [h * g, h, n, left.len(), d]);
        for (own, rows) in scores.chunks(len).zip(weights.chunks(g * n * left.len())) {
            let best = |c: usize| rows.chunks(left.len()).map(|row| row[sink + c]).fold(0.0, f32::max);
            close(own, &wide(&(0..len).map(best).collect::<Vec<_>>()));
        }
    }
}
