//! Encoded rows and attention over them against closed forms, plain attention and their own definitions.

use kvlar_reference::compare::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{
    AppendInput, AttendInput, Codec, Dtype, Format, HeadStorage, Int8Query, QuantizedInput, Rope, RopeLayout, RopeScaling,
    Storage, Tiers, append, attend, attend_quantized, decode_channels, decode_row, encode_channels, encode_row, hadamard, merge,
    quantize_rows,
};

const CLOSE: Tolerance = Tolerance { absolute: 2e-6, relative: 2e-6, cosine: 1e-9 };

fn format(name: &str, group: Option<usize>) -> Format {
    Format { group, ..name.parse().unwrap() }
}

fn tiers(sink_rows: usize, recent_rows: usize) -> Tiers {
    Tiers { dtype: Dtype::Bf16, sink_rows, recent_rows }
}

/// One head of a quantized attention: n rows of d, G query heads, S query rows.
struct Head {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dims: [usize; 4],
}

impl Head {
    fn random(seed: u64, [g, s, n, d]: [usize; 4]) -> Self {
        let mut rng = Rng::new(seed);
        let mut normals = |n| Dtype::Bf16.round_all(&rng.normals(n, 1.0));
        Self { q: normals(g * s * d), k: normals(n * d), v: normals(n * d), dims: [g, s, n, d] }
    }

    fn input(&self) -> AttendInput<'_> {
        let [q_heads, query_rows, rows, d] = self.dims;
        AttendInput {
            seqs: 1,
            q_heads,
            kv_heads: 1,
            query_rows,
            rows,
            head_dim: d,
            value_dim: d,
            q: &self.q,
            k: &self.k,
            v: &self.v,
            ..Default::default()
        }
    }

    fn quantized(&self, keys: Format, values: Format) -> QuantizedInput<'_> {
        QuantizedInput {
            attend: self.input(),
            keys: keys.into(),
            values: values.into(),
            tiers: Tiers::none(Dtype::Bf16),
            int8_query: false,
        }
    }
}

#[test]
fn which_rows_are_exact_and_what_all_take() {
    let (d, g) = (16, 32);
    let store = HeadStorage::from(format("int2-channel", None));
    // T, sinks, recent; rows of whole groups. KIVI's own rule would leave none exact at T = 256, this one keeps the last R.
    for (n, sinks, recent, quantized) in [
        (300, 0, 128, 160),
        (256, 0, 128, 128),
        (129, 0, 0, 128),
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (31, 0, 0, 0),
        (32, 0, 0, 32),
        (33, 0, 0, 32),
        (33, 1, 0, 32),
        (33, 2, 0, 0),
        (255, 0, 0, 224),
        (256, 0, 0, 256),
        (257, 0, 0, 256),
        (100, 4, 10, 64),
        (100, 60, 60, 0),
        (100, 200, 0, 0),
    ] {
        let rows = Rng::new(n as u64).normals(n * d, 1.0);
        let r = quantize_rows(&rows, d, &store, tiers(sinks, recent)).unwrap();
        let exact = |row: usize| r.decoded[row * d..][..d] == rows[row * d..][..d];
        assert!((0..n).all(|row| exact(row) != (sinks..sinks + quantized).contains(&row)), "{n} {sinks} {recent}");
        assert_eq!(r.bytes, quantized / g * (g * 16 + 4 * d) + (n - quantized) * 2 * d, "{n} {sinks} {recent}");
        // The same rows as groups that are encoded where the body starts.
        for (i, group) in rows[sinks.min(n) * d..].chunks(g * d).take(quantized / g).enumerate() {
            let stored = encode_channels(group, d, 2).unwrap();
            let back = decode_channels(&stored.codes, &stored.params, d, 2).unwrap();
            assert_eq!(r.decoded[(sinks + i * g) * d..][..g * d], back);
        }
    }
    // Token-wise, all of the body is quantized, row by row.
    let rows = Rng::new(1).normals(50 * d, 1.0);
    let f32s = Tiers { dtype: Dtype::F32, sink_rows: 3, recent_rows: 7 };
    let r = quantize_rows(&rows, d, &format("int4", Some(8)).into(), f32s).unwrap();
    assert_eq!(r.bytes, 10 * 64 + 40 * (16 + 8));
    for (row, x) in rows.chunks(d).enumerate() {
        let stored = encode_row(x, Codec::Int4, 8).unwrap();
        let back = decode_row(&stored.codes, &stored.params, d, Codec::Int4, 8).unwrap();
        assert_eq!(r.decoded[row * d..][..d], if (3..43).contains(&row) { back } else { x.to_vec() });
    }
    assert!(quantize_rows(&rows, 24, &format("int8+hadamard", None).into(), tiers(0, 0)).is_err());
    assert!(quantize_rows(&rows[1..], d, &store, tiers(0, 0)).is_err() && quantize_rows(&rows, 0, &store, tiers(0, 0)).is_err());
    assert!(quantize_rows(&rows, d, &Codec::Pq.into(), tiers(0, 0)).unwrap_err().to_string().contains("codebooks"));
}

#[test]
fn rows_are_turned_before_and_back_after() {
    let d = 32;
    let rows = Rng::new(2).normals(40 * d, 1.0);
    let turned: Vec<f32> = rows.chunks(d).flat_map(|r| hadamard(r).unwrap()).collect();
    for name in ["bf16", "fp8", "int8", "int4", "int4-channel", "int2-channel"] {
        let with = quantize_rows(&rows, d, &format(&format!("{name}+hadamard"), None).into(), tiers(4, 2)).unwrap();
        let without = quantize_rows(&turned, d, &format(name, None).into(), tiers(4, 2)).unwrap();
        assert_eq!(with.bytes, without.bytes);
        for row in 0..40 {
            let plain = &without.decoded[row * d..][..d];
            // Exact rows are not turned at all; channel-wise, rows 36 and 37 belong to no whole group.
            let exact = !(4..38).contains(&row) || (name.ends_with("channel") && row >= 36);
            let expected = if exact { rows[row * d..][..d].to_vec() } else { hadamard(plain).unwrap() };
            assert_eq!(with.decoded[row * d..][..d], expected, "{name} {row}");
        }
    }
}

#[test]
fn appending_one_by_one_is_encoding_all() {
    let (d, n) = (32, 70);
    let rows = Rng::new(3).normals(n * d, 1.0);
    let (slots, rope) = ((0..n as i32).collect::<Vec<_>>(), Rope::none());
    for name in ["bf16", "f16", "fp8", "int8", "int4", "int2", "int4+hadamard"] {
        let storage = Storage::from(format(name, None));
        let all = quantize_rows(&rows, d, &storage.heads(1, d).unwrap()[0], tiers(0, 0)).unwrap();
        let input = AppendInput {
            seqs: 1,
            kv_heads: 1,
            new_rows: n,
            head_dim: d,
            value_dim: d,
            k: &rows,
            v: &rows,
            positions: &slots,
            slots: &slots,
            rope: &rope,
            keys: storage,
            values: storage,
        };
        let appended = append(&input).unwrap();
        assert_eq!((&appended.k_decoded, &appended.v_decoded), (&all.decoded, &all.decoded), "{name}");
    }
    // Channel-wise, a group is what it was when it was whole.
    let store = HeadStorage::from(format("int4-channel", None));
    let all = quantize_rows(&rows, d, &store, tiers(0, 0)).unwrap();
    for n in 0..70 {
        let some = quantize_rows(&rows[..n * d], d, &store, tiers(0, 0)).unwrap();
        assert_eq!(some.decoded[..n / 32 * 32 * d], all.decoded[..n / 32 * 32 * d]);
    }
}

#[test]
fn append_scales_turns_and_refuses() {
    let (d, rope) = (8, Rope::new(100.0, 8, RopeLayout::Half, RopeScaling::None));
    let x = Rng::new(4).normals(2 * d, 30.0);
    let scales = [0.3, 5.0];
    let keys = Storage { scales: Some(&scales), ..format("fp8", None).into() };
    let input = AppendInput {
        seqs: 1,
        kv_heads: 2,
        new_rows: 1,
        head_dim: d,
        value_dim: d,
        k: &x,
        v: &x,
        positions: &[5],
        slots: &[0],
        rope: &rope,
        keys,
        values: format("int8+hadamard", Some(4)).into(),
    };
    let r = append(&input).unwrap();
    for (h, scale) in scales.into_iter().enumerate() {
        let fp8 = |x: &f32| kvlar_reference::decode_fp8(kvlar_reference::encode_fp8(*x, scale), scale);
        let rotated = rope.rotate(&x[h * d..][..d], 5);
        assert_eq!(r.k_decoded[h * d..][..d], rotated.iter().map(fp8).collect::<Vec<_>>(), "rotated first, then scaled");
        let turned = hadamard(&x[h * d..][..d]).unwrap();
        let row = encode_row(&turned, Codec::Int8, 4).unwrap();
        let back = decode_row(&row.codes, &row.params, d, Codec::Int8, 4).unwrap();
        assert_eq!(r.v_decoded[h * d..][..d], hadamard(&back).unwrap());
    }
    let refuses = |keys: Storage<'_>, word: &str| {
        let text = append(&AppendInput { keys, ..input.clone() }).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    };
    refuses(format("int4-channel", None).into(), "int4-channel");
    refuses(Codec::Pq.into(), "codebooks");
    refuses(format("int8", Some(3)).into(), "group");
    refuses(Storage { scales: Some(&[1.0]), ..keys }, "scales");
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        refuses(Storage { scales: Some(&[1.0, bad]), ..keys }, "above 0");
    }
}

#[test]
fn lossless_rows_attend_as_plain_ones() {
    let mut rng = Rng::new(5);
    let mut head = Head::random(5, [3, 2, 40, 16]);
    // Integers with the extremes of 4 bits in every row, and in every channel of a group.
    let integers = |n: usize, rng: &mut Rng| -> Vec<f32> {
        (0..n).map(|i| [0.0, 15.0].get(i % 17).copied().unwrap_or(rng.below(16) as f32)).collect()
    };
    (head.k, head.v) = (integers(640, &mut rng), integers(640, &mut rng));
    for (keys, values) in [("int4-channel", "bf16"), ("bf16", "int4-channel")] {
        let plain = attend(&head.input()).unwrap();
        let r = attend_quantized(&head.quantized(format(keys, None), format(values, None))).unwrap();
        assert_eq!((r.out, r.lse), (plain.out, plain.lse), "{keys} {values}");
        assert_eq!((&r.k_decoded, &r.v_decoded), (&head.k, &head.v));
    }
}

#[test]
fn attention_is_that_of_the_decoded_rows() {
    let (b, hq, hk, s, t, d, dv) = (2, 4, 2, 3, 70, 16, 32);
    let mut rng = Rng::new(6);
    let (q, k, v) = (rng.normals(b * hq * s * d, 1.0), rng.normals(b * hk * t * d, 1.0), rng.normals(b * hk * t * dv, 1.0));
    let positions: Vec<i32> = (0..2 * 70).map(|i| (i % 70) * 2).collect();
    let (lengths, sinks) = ([70, 33, 1, 0], [0.5, -1.0, 2.0, 0.0]);
    let plain = AttendInput {
        seqs: b,
        q_heads: hq,
        kv_heads: hk,
        query_rows: s,
        rows: t,
        head_dim: d,
        value_dim: dv,
        q: &q,
        k: &k,
        v: &v,
        lengths: Some(&lengths),
        positions: Some(&positions),
        q_positions: None,
        sink_logits: Some(&sinks),
        scale: Some(0.4),
        softcap: 5.0,
        window: 90,
    };
    let scales = [0.01, 0.02];
    let input = QuantizedInput {
        attend: plain.clone(),
        keys: Storage { scales: Some(&scales), ..format("fp8+hadamard", None).into() },
        values: format("int2-channel", Some(20)).into(),
        tiers: tiers(3, 5),
        int8_query: false,
    };
    let r = attend_quantized(&input).unwrap();
    let mut bytes = 0;
    for (head, &n) in lengths.iter().enumerate() {
        for (x, dim, storage, decoded) in [(&k, d, input.keys, &r.k_decoded), (&v, dv, input.values, &r.v_decoded)] {
            let rows = &x[head * t * dim..][..n as usize * dim];
            let own = quantize_rows(rows, dim, &storage.heads(hk, dim).unwrap()[head % hk], input.tiers).unwrap();
            let decoded = &decoded[head * t * dim..][..t * dim];
            assert_eq!(decoded[..own.decoded.len()], own.decoded, "inside the head's length");
            assert!(decoded[own.decoded.len()..].iter().all(|&x| x == 0.0), "0 beyond it");
            bytes += own.bytes;
        }
    }
    assert_eq!(r.bytes, bytes);
    let expected = attend(&AttendInput { k: &r.k_decoded, v: &r.v_decoded, ..plain }).unwrap();
    assert_eq!((&r.out, &r.lse), (&expected.out, &expected.lse));
    assert_eq!(attend_quantized(&input).unwrap(), r, "twice the same bits");
    assert!(attend_quantized(&QuantizedInput { keys: Codec::Pq.into(), ..input.clone() }).is_err());
    assert!(attend_quantized(&QuantizedInput { values: format("int8", Some(5)).into(), ..input.clone() }).is_err());
    assert!(attend_quantized(&QuantizedInput { attend: AttendInput { rows: 69, ..input.attend.clone() }, ..input }).is_err());
}

#[test]
fn turned_queries_on_turned_rows_give_the_same() {
    let head = Head::random(7, [2, 3, 50, 64]);
    let rows = |x: &[f32]| -> Vec<f32> { x.chunks(64).flat_map(|r| hadamard(r).unwrap()).collect() };
    for (name, int8_query) in [("int8", false), ("int4", false), ("int4", true), ("int2-channel", false), ("fp8", true)] {
        let mut input = head.quantized(format(&format!("{name}+hadamard"), None), Codec::Bf16.into());
        input.int8_query = int8_query;
        let back = attend_quantized(&input).unwrap();
        // As a kernel would: queries are turned (and quantized), keys are decoded and not turned back.
        let (turned_q, turned_k) = (rows(&head.q), rows(&head.k));
        let mut input = head.quantized(format(name, None), Codec::Bf16.into());
        (input.attend.q, input.attend.k, input.int8_query) = (&turned_q, &turned_k, int8_query);
        // The last rows of channel-wise keys are exact, here turned.
        let turned = attend_quantized(&input).unwrap();
        compare(&back.out, &turned.out, CLOSE).unwrap_or_else(|e| panic!("{name}: {e}"));
        compare(&back.lse, &turned.lse, CLOSE).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn eight_bit_queries_by_hand() {
    let r = Int8Query::quantize(&[1.0, -2.0, 0.5, 127.0, 2.5, -126.6]);
    assert_eq!((r.codes, r.scale), (vec![1, -2, 0, 127, 2, -127], 1.0));
    // Never -128: the largest magnitude is 127 steps, whatever its sign and rounding.
    let mut rng = Rng::new(8);
    for _ in 0..2000 {
        let size = 2f32.powi(rng.below(40) as i32 - 20);
        let q = rng.normals(7, size);
        let r = Int8Query::quantize(&q);
        assert!(r.codes.iter().all(|&c| c > -128) && r.codes.iter().any(|c| c.abs() == 127));
        assert!(q.iter().zip(r.dequantize()).all(|(a, b)| (a - b).abs() <= r.scale * 0.5001));
    }
    assert_eq!(Int8Query::quantize(&[0.0, -0.0]), Int8Query { codes: vec![0, 0], scale: 0.0 });
    assert_eq!(Int8Query::quantize(&[1e-45]).dequantize(), [0.0], "a scale that underflows");
    // 180 of the smallest steps, in units of one: clamped.
    let tiny = f32::from_bits(180);
    assert_eq!(Int8Query::quantize(&[-tiny, tiny]).codes, [-127, 127]);
    for bad in [f32::NAN, f32::INFINITY] {
        assert!(Int8Query::quantize(&[1.0, bad]).dequantize().iter().all(|x| x.is_nan()));
    }
    // One scale for all rows of a head, and each head its own: a large second row coarsens the first.
    let mut head = Head::random(8, [2, 2, 4, 2]);
    head.q = vec![1.0, 0.3, 127.0, 0.0, 1.0, 0.3, 1.0, 0.0];
    let mut input = head.quantized(Codec::Bf16.into(), Codec::Bf16.into());
    input.int8_query = true;
    let r = attend_quantized(&input).unwrap();
    let seen = [1.0, 0.0, 127.0, 0.0, 1.0, 38.0 / 127.0, 1.0, 0.0];
    let expected = attend(&AttendInput { q: &seen, ..head.input() }).unwrap();
    compare(&r.out, &expected.out, CLOSE).unwrap();
    compare(&r.lse, &expected.lse, CLOSE).unwrap();
    // NaN shows in its head alone; zeros attend evenly.
    head.q = vec![f32::NAN, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
    let mut input = head.quantized(Codec::Bf16.into(), Codec::Bf16.into());
    input.int8_query = true;
    let r = attend_quantized(&input).unwrap();
    assert!(r.out[..4].iter().all(|x| x.is_nan()) && r.out[4..].iter().all(|x| x.is_finite()));
    assert!((r.lse[3] - 4f32.ln()).abs() < 1e-6);
}

#[test]
fn groups_of_query_heads_share_rows() {
    for g in [1, 2, 3, 4, 5, 6, 7, 8, 16] {
        let head = Head::random(g as u64, [g, 1, 40, 8]);
        let keys = format("int4-channel", None);
        let all = attend_quantized(&head.quantized(keys, Codec::Int8.into())).unwrap();
        for h in 0..g {
            let mut one = head.quantized(keys, Codec::Int8.into());
            (one.attend.q, one.attend.q_heads) = (&head.q[h * 8..][..8], 1);
            let one = attend_quantized(&one).unwrap();
            assert_eq!((&one.out[..], one.lse[0]), (&all.out[h * 8..][..8], all.lse[h]), "{h} of {g}");
        }
    }
}

#[test]
fn splits_of_decoded_rows_merge_to_the_whole() {
    let head = Head::random(9, [2, 1, 61, 16]);
    let r = attend_quantized(&head.quantized(Codec::Int4.into(), Codec::Int8.into())).unwrap();
    for at in [0, 1, 30, 61] {
        let part = |from: usize, to: usize| {
            let (k, v) = (&r.k_decoded[from * 16..to * 16], &r.v_decoded[from * 16..to * 16]);
            attend(&AttendInput { k, v, rows: to - from, q_positions: Some(&[1000]), ..head.input() }).unwrap()
        };
        let (a, b) = (part(0, at), part(at, 61));
        let (out, lse) = merge(&[a.out, b.out].concat(), &[a.lse, b.lse].concat(), 2, 2, 16).unwrap();
        compare(&out, &r.out, CLOSE).unwrap();
        compare(&lse, &r.lse, CLOSE).unwrap();
    }
    let empty = Head::random(10, [2, 1, 0, 16]);
    let r = attend_quantized(&empty.quantized(Codec::Int4Channel.into(), Codec::Int8.into())).unwrap();
    assert!(r.out.iter().all(|&x| x == 0.0) && r.lse.iter().all(|&x| x == f32::NEG_INFINITY));
    assert_eq!((r.k_decoded.len(), r.bytes), (0, 0));
}

#[test]
fn one_vector_added_to_all_keys_leaves_attention_unchanged() {
    let mut head = Head::random(11, [2, 1, 32, 8]);
    // Sixteenths: exact in f16, so that channel-wise zeros take up all of the shift.
    head.k = head.k.iter().map(|x| (x * 16.0).round() / 16.0).collect();
    let keys = format("int4-channel", None);
    let (plain, coded) = (attend(&head.input()).unwrap(), attend_quantized(&head.quantized(keys, Codec::Bf16.into())).unwrap());
    let shift = [1.0, -2.0, 0.5, 4.0, 0.0, 3.0, -0.25, 1.5];
    head.k.iter_mut().enumerate().for_each(|(i, x)| *x += shift[i % 8]);
    let (moved, moved_coded) =
        (attend(&head.input()).unwrap(), attend_quantized(&head.quantized(keys, Codec::Bf16.into())).unwrap());
    compare(&moved.out, &plain.out, CLOSE).unwrap();
    compare(&moved_coded.out, &coded.out, CLOSE).unwrap();
    assert!(compare(&coded.out, &plain.out, CLOSE).is_err(), "codes lose something");
    for h in 0..2 {
        let by: f32 = (0..8).map(|i| head.q[h * 8 + i] * shift[i]).sum::<f32>() / 8f32.sqrt();
        assert!((moved.lse[h] - plain.lse[h] - by).abs() < 1e-5);
    }
}
