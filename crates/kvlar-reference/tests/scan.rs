//! Scans over encoded keys, and reductions of their logits.

use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, Codebooks, Codec, Format, ReduceInput, Reduction, ScanInput, Storage, attend, reduce, scan};
use std::f64::consts::LN_2;

const CLOSE: Tolerance = Tolerance { absolute: 2e-6, relative: 2e-6, cosine: 1e-9 };

fn format(name: &str, group: Option<usize>) -> Format {
    Format { group, ..name.parse().unwrap() }
}

fn scan_input<'a>(q: &'a [f32], k: &'a [f32], [q_heads, kv_heads, rows, head_dim]: [usize; 4]) -> ScanInput<'a> {
    let keys = Codec::F16.into();
    ScanInput { seqs: 1, q_heads, kv_heads, rows, head_dim, q, k, keys, lengths: None, scale: None }
}

#[test]
fn scans_by_hand() {
    // scale 0.5, zero -1, codes 0, 2, 4: q·k = 2.
    let r = scan(&ScanInput { scale: Some(1.0), ..scan_input(&[1.0, 2.0, 3.0], &[-1.0, 0.0, 1.0], [1, 1, 1, 3]) }).unwrap();
    assert_eq!((r.logits[0], r.lse[0], &r.k_decoded[..]), (2.0, 2.0, &[-1.0, 0.0, 1.0][..]));
    // Two kv heads of two query heads, lengths of their own, the default scale 1/2.
    let q: Vec<f32> = (1..=16).map(|i| i as f32).collect();
    let k = [1.0; 2 * 3 * 4];
    let r = scan(&ScanInput { lengths: Some(&[2, 0]), ..scan_input(&q, &k, [4, 2, 3, 4]) }).unwrap();
    let hidden = f32::NEG_INFINITY;
    assert_eq!(r.logits, [[5.0, 5.0, hidden], [13.0, 13.0, hidden], [hidden; 3], [hidden; 3]].concat());
    assert_eq!(r.lse, [(5.0 + LN_2) as f32, (13.0 + LN_2) as f32, hidden, hidden]);
    assert!(r.k_decoded.iter().enumerate().all(|(i, &x)| x == if i < 8 { 1.0 } else { 0.0 }));
    let bad = scan_input(&q, &k, [4, 2, 3, 4]);
    assert!(scan(&ScanInput { kv_heads: 3, ..bad.clone() }).is_err() && scan(&ScanInput { rows: 2, ..bad.clone() }).is_err());
    assert!(scan(&ScanInput { lengths: Some(&[4]), ..bad.clone() }).is_err());
    assert!(scan(&ScanInput { lengths: Some(&[1, 2, 3]), ..bad.clone() }).is_err());
    assert!(scan(&ScanInput { keys: Codec::Pq.into(), ..bad }).is_err());
}

#[test]
fn scans_permute_scale_and_agree_with_attention() {
    let (n, d) = (40, 32);
    let mut rng = Rng::new(12);
    let (q, k) = (rng.normals(2 * d, 1.0), rng.normals(n * d, 1.0));
    let order = rng.permutation(n);
    let permuted: Vec<f32> = order.iter().flat_map(|&r| k[r * d..][..d].to_vec()).collect();
    let scaled: Vec<f32> = q.iter().map(|x| x * 4.0).collect();
    for name in ["f16", "fp8", "int8", "int4", "int2+hadamard"] {
        let of = |q, k| scan(&ScanInput { keys: format(name, None).into(), ..scan_input(q, k, [2, 1, n, d]) }).unwrap();
        let (plain, moved) = (of(&q, &k), of(&q, &permuted));
        for (i, &from) in order.iter().enumerate() {
            assert_eq!((moved.logits[i], moved.logits[n + i]), (plain.logits[from], plain.logits[n + from]), "{name}");
        }
        compare(&moved.lse, &plain.lse, CLOSE).unwrap();
        let four: Vec<f32> = plain.logits.iter().map(|x| x * 4.0).collect();
        assert_eq!(of(&scaled, &k).logits, four);
        // Attention over the decoded keys has the same lse, and softmax weights exp(logit − lse).
        let ones = vec![1.0; n];
        let a = AttendInput {
            seqs: 1,
            q_heads: 2,
            kv_heads: 1,
            query_rows: 1,
            rows: n,
            head_dim: d,
            value_dim: 1,
            q: &q,
            k: &plain.k_decoded,
            v: &ones,
            ..Default::default()
        };
        compare(&attend(&a).unwrap().lse, &plain.lse, CLOSE).unwrap();
    }
}

#[test]
fn scans_of_product_codes_use_each_heads_codebooks() {
    let mut rng = Rng::new(13);
    let (m, c, d, n) = (4, 8, 16, 9);
    let (q, k, values) = (rng.normals(2 * d, 1.0), rng.normals(2 * n * d, 1.0), rng.normals(2 * c * d, 1.0));
    let books = Codebooks { subvectors: m, centroids: c, values: &values };
    let keys = Storage { codebooks: Some(books), ..Codec::Pq.into() };
    let r = scan(&ScanInput { keys, scale: Some(1.0), ..scan_input(&q, &k, [2, 2, n, d]) }).unwrap();
    for (i, (x, decoded)) in k.chunks(4).zip(r.k_decoded.chunks(4)).enumerate() {
        let (head, sub) = (i / m / n, i % m);
        let centroids = || values[(head * m + sub) * c * 4..][..c * 4].chunks(4);
        let far = |y: &[f32]| x.iter().zip(y).map(|(a, b)| (a - b).powi(2)).sum::<f32>();
        assert!(centroids().any(|y| y == decoded) && centroids().all(|y| far(y) >= far(decoded)));
    }
    // Keys that are centroids score exactly as themselves.
    let on: Vec<f32> = r.k_decoded.clone();
    let again = scan(&ScanInput { keys, scale: Some(1.0), ..scan_input(&q, &on, [2, 2, n, d]) }).unwrap();
    assert_eq!((&again.k_decoded, &again.logits), (&on, &r.logits));
    let dense = ScanInput { keys: Codec::F16.into(), scale: Some(1.0), ..scan_input(&q, &on, [2, 2, n, d]) };
    compare(&scan(&dense).unwrap().logits, &r.logits, Tolerance { absolute: 2e-2, relative: 2e-2, cosine: 1e-5 }).unwrap();
    let refused = |books: Codebooks<'_>, word: &str| {
        let keys = Storage { codebooks: Some(books), ..keys };
        let text = scan(&ScanInput { keys, ..scan_input(&q, &k, [2, 2, n, d]) }).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    };
    refused(Codebooks { values: &values[1..], ..books }, "codebooks: expected");
    refused(Codebooks { subvectors: 5, ..books }, "5 sub-vectors");
    let mut spoiled = values.clone();
    spoiled[7] = f32::NAN;
    refused(Codebooks { values: &spoiled, ..books }, "NaN");
}

#[test]
fn a_spoiled_key_spoils_its_own_score_or_its_groups() {
    let (n, d, j) = (70, 16, 40);
    let mut rng = Rng::new(14);
    let (q, clean) = (rng.normals(d, 1.0), rng.normals(n * d, 1.0));
    for bad in [f32::NAN, f32::INFINITY] {
        let mut k = clean.clone();
        k[j * d + 3] = bad;
        for (name, group, spoiled) in [
            ("int8", None, j..j + 1),
            ("int4", Some(4), j..j + 1),
            ("int2+hadamard", None, j..j + 1),
            ("int4-channel", None, 32..64),
            ("int4-channel", Some(10), 40..50),
            ("int2-channel+hadamard", None, 32..64),
        ] {
            let of = |k| scan(&ScanInput { keys: format(name, group).into(), ..scan_input(&q, k, [1, 1, n, d]) }).unwrap();
            let (with, without) = (of(&k), of(&clean));
            for row in 0..n {
                let (a, b) = (with.logits[row], without.logits[row]);
                assert!(if spoiled.contains(&row) { a.is_nan() } else { a == b }, "{name} {bad} row {row}");
            }
            assert!(with.lse[0].is_nan());
            // Without rotation only one channel of them.
            if !name.ends_with("hadamard") {
                let nans = with.k_decoded.iter().filter(|x| x.is_nan()).count();
                assert_eq!(
                    nans,
                    if name == "int8" {
                        d
                    } else if name == "int4" {
                        4
                    } else {
                        spoiled.len()
                    }
                );
            }
        }
        // fp8 saturates infinities; there is no code for what is not finite in a product code.
        let fp8 = scan(&ScanInput { keys: Codec::Fp8.into(), ..scan_input(&q, &k, [1, 1, n, d]) }).unwrap();
        assert_eq!(fp8.k_decoded[j * d + 3].is_nan(), bad.is_nan());
        assert!(bad.is_nan() || fp8.k_decoded[j * d + 3] == 448.0);
    }
}

#[test]
fn reductions_by_hand() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    // Two kv heads of two query heads, four rows.
    let logits = [1.0, 2.0, nan, -inf, 3.0, -4.0, 0.5, -inf, nan, -inf, 7.0, 1.0, nan, 2.0, -inf, 1.0];
    let lse = [0.5, 3.0, 1.0, 2.0];
    let of = |method| {
        let i = ReduceInput { seqs: 1, q_heads: 4, kv_heads: 2, rows: 4, logits: &logits, lse: &lse, method };
        reduce(&i).unwrap()
    };
    let same =
        |a: Vec<f32>, b: [f32; 8]| a.iter().zip(b).for_each(|(a, b)| assert!(*a == b || (a.is_nan() && b.is_nan()), "{a} {b}"));
    same(of(Reduction::MeanLogit), [2.0, -1.0, nan, -inf, nan, -inf, -inf, 1.0]);
    same(of(Reduction::MaxLogit), [3.0, 2.0, 0.5, -inf, nan, 2.0, 7.0, 1.0]);
    // The head with the larger logit is not the one with the larger weight.
    same(of(Reduction::MaxProb), [0.5, 1.5, -2.5, -inf, nan, 0.0, 6.0, 0.0]);
    // A head without rows.
    let none =
        ReduceInput { seqs: 1, q_heads: 1, kv_heads: 1, rows: 1, logits: &[-inf], lse: &[-inf], method: Reduction::MaxProb };
    assert_eq!(reduce(&none).unwrap(), [-inf]);
    assert!(reduce(&ReduceInput { kv_heads: 0, ..none }).is_err() && reduce(&ReduceInput { kv_heads: 2, ..none }).is_err());
    assert!(reduce(&ReduceInput { rows: 2, ..none }).is_err() && reduce(&ReduceInput { lse: &[], ..none }).is_err());
}
