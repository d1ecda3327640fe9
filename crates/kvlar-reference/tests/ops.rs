//! The reference against values worked out by hand or in closed form.

use kvlar_reference::compare::{Mismatch, compare};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{
    AppendInput, AttendInput, Codec, Dtype, ReferenceError, Rope, RopeLayout, RopeScaling, Yarn, append, attend, decode_row,
    encode_row, merge,
};

fn close(a: f32, b: f64) {
    assert!((f64::from(a) - b).abs() < 1e-6 * b.abs().max(1.0), "{a} instead of {b}");
}

fn two_rows<'a>(q: &'a [f32], k: &'a [f32], v: &'a [f32]) -> AttendInput<'a> {
    AttendInput {
        seqs: 1,
        q_heads: 1,
        kv_heads: 1,
        query_rows: 1,
        rows: 2,
        head_dim: 2,
        value_dim: 2,
        q,
        k,
        v,
        ..Default::default()
    }
}

#[test]
fn attention_of_two_rows_by_hand() {
    // Logits 1·scale and 3·scale: weights 1 : e^(2 scale).
    let (q, k, v) = ([1.0, 0.0], [1.0, 5.0, 3.0, -7.0], [1.0, 0.0, 0.0, 1.0]);
    let r = attend(&AttendInput { scale: Some(0.5), ..two_rows(&q, &k, &v) }).unwrap();
    let e = 1f64.exp();
    close(r.out[0], 1.0 / (1.0 + e));
    close(r.out[1], e / (1.0 + e));
    close(r.lse[0], (0.5f64.exp() + 1.5f64.exp()).ln());
    // Soft-cap 1: tanh of the logits; a sink logit only in the denominator, not capped.
    let sink = [2.0];
    let r = attend(&AttendInput { scale: Some(0.5), softcap: 1.0, sink_logits: Some(&sink), ..two_rows(&q, &k, &v) }).unwrap();
    let (a, b, s) = (0.5f64.tanh().exp(), 1.5f64.tanh().exp(), 2f64.exp());
    close(r.out[0], a / (a + b + s));
    close(r.lse[0], (a + b + s).ln());
    // A window of one: only the row at the query's own position.
    let r = attend(&AttendInput { window: 1, ..two_rows(&q, &k, &v) }).unwrap();
    assert_eq!(r.out, [0.0, 1.0]);
    // A query before all rows.
    let r = attend(&AttendInput { q_positions: Some(&[-1]), ..two_rows(&q, &k, &v) }).unwrap();
    assert_eq!((r.out, r.lse[0]), (vec![0.0, 0.0], f32::NEG_INFINITY));
}

#[test]
fn heads_share_rows_by_integer_division() {
    let mut rng = Rng::new(1);
    let (hq, hk, t, d) = (6, 2, 5, 4);
    let (q, k, v) = (rng.normals(hq * d, 1.0), rng.normals(hk * t * d, 1.0), rng.normals(hk * t * d, 1.0));
    let all = AttendInput {
        seqs: 1,
        q_heads: hq,
        kv_heads: hk,
        query_rows: 1,
        rows: t,
        head_dim: d,
        value_dim: d,
        q: &q,
        k: &k,
        v: &v,
        ..Default::default()
    };
    let whole = attend(&all).unwrap();
    for h in 0..hq {
        let g = h / 3;
        let one = AttendInput {
            q_heads: 1,
            kv_heads: 1,
            q: &q[h * d..][..d],
            k: &k[g * t * d..][..t * d],
            v: &v[g * t * d..][..t * d],
            ..all.clone()
        };
        assert_eq!(attend(&one).unwrap().out, whole.out[h * d..][..d]);
    }
    assert!(matches!(attend(&AttendInput { kv_heads: 4, ..all.clone() }), Err(ReferenceError::Value { .. })));
    assert!(matches!(attend(&AttendInput { rows: 6, ..all.clone() }), Err(ReferenceError::Shape { .. })));
    assert!(attend(&AttendInput { lengths: Some(&[6]), ..all.clone() }).is_err());
    assert!(attend(&AttendInput { softcap: f64::NAN, ..all.clone() }).is_err());
    assert!(attend(&AttendInput { window: -1, ..all }).is_err());
}

#[test]
fn rotation_keeps_norms_and_depends_on_distance_only() {
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        let rope = Rope::new(10000.0, 8, layout, RopeScaling::None);
        let mut rng = Rng::new(2);
        let (a, b) = (rng.normals(12, 1.0), rng.normals(12, 1.0));
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
        let at = |x: &[f32], p: i64| rope.rotate(x, p);
        assert!((dot(&at(&a, 7), &at(&b, 3)) - dot(&at(&a, 1_000_007), &at(&b, 1_000_003))).abs() < 1e-5);
        assert!((dot(&at(&a, 99), &at(&a, 99)) - dot(&a, &a)).abs() < 1e-5);
        assert_eq!(at(&a, 5)[8..], a[8..], "dimensions beyond the rotary ones");
        assert_eq!(at(&a, 0), a);
    }
    // By hand: pairs (0, 2) and (1, 3), or (0, 1) and (2, 3); frequencies 1 and 0.01.
    let x = [1.0, 2.0, 3.0, 4.0];
    let (c, s) = (1f64.cos(), 1f64.sin());
    let half = Rope::new(10000.0, 4, RopeLayout::Half, RopeScaling::None).rotate(&x, 1);
    close(half[0], c - 3.0 * s);
    close(half[2], 3.0 * c + s);
    let interleaved = Rope::new(10000.0, 4, RopeLayout::Interleaved, RopeScaling::None).rotate(&x, 1);
    close(interleaved[0], c - 2.0 * s);
    close(interleaved[1], 2.0 * c + s);
}

#[test]
fn stretched_frequencies() {
    let frequencies = |scaling| Rope::new(500000.0, 128, RopeLayout::Half, scaling).inv_freq;
    let plain = frequencies(RopeScaling::None);
    let linear = frequencies(RopeScaling::Linear(4.0));
    assert!(plain.iter().zip(&linear).all(|(a, b)| (a / b - 4.0).abs() < 1e-6));
    // Llama 3.1: wavelengths below 8192 / 4 stay, above 8192 / 1 are stretched by 8, between they blend monotonically.
    let llama =
        frequencies(RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_max: 8192.0 });
    for (i, (&f, &g)) in plain.iter().zip(&llama).enumerate() {
        let wavelength = 2.0 * std::f32::consts::PI / f;
        let ratio = f / g;
        match wavelength {
            w if w < 2048.0 => assert_eq!(f, g, "{i}"),
            w if w > 8192.0 => assert!((ratio - 8.0).abs() < 1e-5, "{i}"),
            w => {
                let smooth = (8192.0 / w - 1.0) / 3.0;
                assert!((g / f - ((1.0 - smooth) / 8.0 + smooth)).abs() < 1e-5, "{i}");
            }
        }
    }
    // YaRN (paper §3.2-3.4): fast dimensions stay, slow ones are divided; the attention factor is 0.1 ln s + 1.
    let yarn = Rope::new(10000.0, 128, RopeLayout::Half, RopeScaling::Yarn(Yarn::new(16.0, 4096.0)));
    let plain = Rope::new(10000.0, 128, RopeLayout::Half, RopeScaling::None);
    close(yarn.attention_factor, 0.1 * 16f64.ln() + 1.0);
    let turns = |i: usize| 4096.0 * f64::from(plain.inv_freq[i]) / (2.0 * std::f64::consts::PI);
    for i in 0..64 {
        let ratio = f64::from(plain.inv_freq[i] / yarn.inv_freq[i]);
        assert!((0.999..16.001).contains(&ratio));
        if turns(i) > 40.0 {
            assert!((ratio - 1.0).abs() < 1e-6, "{i}");
        }
        if turns(i) < 0.8 {
            assert!((ratio - 16.0).abs() < 1e-4, "{i}");
        }
    }
}

#[test]
fn int8_rows_by_hand() {
    // 0 to 255 in steps of 1: scale 1, zero 0, codes exact; ties go to even.
    let x: Vec<f32> = vec![0.0, 255.0, 0.5, 1.5, 2.5, 254.5, 100.4, 100.6];
    let row = encode_row(&x, Codec::Int8, 8).unwrap();
    assert_eq!(row.codes[..8], [0, 255, 0, 2, 2, 254, 100, 101]);
    assert_eq!(row.codes[8..], [0; 8], "padding");
    assert_eq!(row.params, [0x00, 0x3c, 0, 0]); // f16 1.0, 0.0
    assert_eq!(decode_row(&row.codes, &row.params, 8, Codec::Int8, 8).unwrap()[6], 100.0);
    // A constant group decodes exactly to the value as f16 holds it.
    let row = encode_row(&[0.1; 8], Codec::Int8, 4).unwrap();
    let back = decode_row(&row.codes, &row.params, 8, Codec::Int8, 4).unwrap();
    assert!(back.iter().all(|&x| x == Dtype::F16.round(0.1)));
    assert_eq!(Codec::Int8.stored_bytes(10, 24, 8), 10 * (32 + 12));
    assert!(encode_row(&x, Codec::Int8, 3).is_err() && encode_row(&x, Codec::Int8, 0).is_err());
    assert!(decode_row(&[0; 3], &[0; 4], 8, Codec::Int8, 8).is_err());
}

#[test]
fn codes_are_within_half_a_step() {
    let mut rng = Rng::new(3);
    for _ in 0..200 {
        let x = rng.normals(64, 3.0);
        let row = encode_row(&x, Codec::Int8, 32).unwrap();
        let back = decode_row(&row.codes, &row.params, 64, Codec::Int8, 32).unwrap();
        for (group, decoded) in x.chunks(32).zip(back.chunks(32)) {
            let (low, high) = group.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
            // Half a step, and what rounding scale and zero to f16 moves the ends by.
            let bound = (high - low) / 255.0 * 0.5 + low.abs() / 2048.0 + (high - low) / 2048.0;
            assert!(group.iter().zip(decoded).all(|(a, b)| (a - b).abs() <= bound));
        }
    }
}

#[test]
fn append_writes_where_it_should() {
    let k: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let rope = Rope::none();
    let input = AppendInput {
        seqs: 1,
        kv_heads: 1,
        new_rows: 3,
        head_dim: 4,
        value_dim: 4,
        k: &k,
        v: &k,
        positions: &[0, 1, 2],
        slots: &[2, -1, 0],
        rope: &rope,
        keys: Codec::F16.into(),
        values: Codec::F16.into(),
    };
    let r = append(&input).unwrap();
    assert_eq!(r.k_decoded, [8.0, 9.0, 10.0, 11.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0]);
    assert!(append(&AppendInput { slots: &[3, 0, 1], ..input.clone() }).is_err());
    assert!(append(&AppendInput { slots: &[0, 1], ..input }).is_err());
}

#[test]
fn merging_by_hand() {
    // Weights 1 : 3.
    let (out, lse) = merge(&[1.0, 5.0], &[0.0, 3f32.ln()], 2, 1, 1).unwrap();
    close(out[0], 4.0);
    close(lse[0], 4f64.ln());
    let (out, lse) = merge(&[f32::NAN, 5.0], &[f32::NEG_INFINITY, 1.0], 2, 1, 1).unwrap();
    assert_eq!((out[0], lse[0]), (5.0, 1.0));
    let (out, lse) = merge(&[7.0, 5.0], &[f32::NEG_INFINITY; 2], 2, 1, 1).unwrap();
    assert_eq!((out[0], lse[0]), (0.0, f32::NEG_INFINITY));
    assert!(merge(&[1.0], &[0.0, 0.0], 2, 1, 1).is_err());
}

#[test]
fn the_comparator_fails_where_it_should() {
    let t = Tolerance { absolute: 0.1, relative: 0.01, cosine: 1e-4 };
    let nan = f32::NAN;
    assert_eq!(compare(&[1.0, 2.0], &[1.05, 2.0], Tolerance { cosine: 1.0, ..t }), Ok(()));
    assert_eq!(compare(&[1.0], &[1.0, 2.0], t), Err(Mismatch::Length(1, 2)));
    assert!(matches!(compare(&[1.0, 2.0], &[1.2, 2.0], t), Err(Mismatch::Element { index: 0, count: 1, .. })));
    assert!(matches!(compare(&[nan, 2.0], &[1.0, 2.0], t), Err(Mismatch::NonFinite { index: 0, .. })));
    assert!(matches!(compare(&[1.0], &[nan], t), Err(Mismatch::NonFinite { .. })));
    assert!(matches!(compare(&[f32::INFINITY], &[f32::NEG_INFINITY], t), Err(Mismatch::NonFinite { .. })));
    assert_eq!(compare(&[nan, f32::INFINITY], &[nan, f32::INFINITY], t), Ok(()));
    // Each element is within the absolute bound, but all lean one way.
    assert!(matches!(compare(&[0.05, -0.04], &[0.1, 0.05], t), Err(Mismatch::Cosine(_))));
    assert_eq!(compare(&[-0.0], &[0.0], Tolerance::EXACT), Ok(()));
    assert!(compare(&[1e-30], &[0.0], Tolerance::EXACT).is_err());
}
