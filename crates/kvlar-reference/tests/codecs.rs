//! Storage formats against values worked out by hand, exhaustive searches and closed forms.

use half::f16;
use kvlar_reference::testing::Rng;
use kvlar_reference::{
    Codebooks, Codec, Dtype, Format, decode_channels, decode_fp8, decode_pq, decode_row, encode_channels, encode_fp8, encode_pq,
    encode_row, hadamard, pack_codes, unpack_codes,
};

const TOKEN_WISE: [Codec; 3] = [Codec::Int8, Codec::Int4, Codec::Int2];

fn round_trip(x: &[f32], codec: Codec, group: usize) -> Vec<f32> {
    let row = encode_row(x, codec, group).unwrap();
    assert_eq!(row.codes.len(), codec.row_bytes(x.len()));
    assert_eq!(row.params.len(), codec.params_bytes(x.len(), group));
    decode_row(&row.codes, &row.params, x.len(), codec, group).unwrap()
}

fn codes(x: &[f32], codec: Codec, group: usize) -> Vec<u8> {
    unpack_codes(&encode_row(x, codec, group).unwrap().codes, x.len(), codec.bits()).unwrap()
}

#[test]
fn packing_is_a_stream_of_bits_lowest_first() {
    for bits in [2usize, 4, 8] {
        let all = 1u32 << bits;
        for n in 0..=2 * 8 / bits + 1 {
            for first in 0..all {
                // Every code at every place, with other codes around it.
                let codes: Vec<u8> = (0..n).map(|i| ((first as usize + i * 7) % all as usize) as u8).collect();
                let packed = pack_codes(&codes, bits).unwrap();
                assert_eq!(packed.len(), (n * bits).div_ceil(8));
                for bit in 0..8 * packed.len() {
                    let expected = codes.get(bit / bits).is_some_and(|c| c >> (bit % bits) & 1 == 1);
                    assert_eq!(packed[bit / 8] >> (bit % 8) & 1 == 1, expected, "bit {bit} of {codes:?}");
                }
                assert_eq!(unpack_codes(&packed, n, bits).unwrap(), codes);
            }
        }
        assert!(pack_codes(&[0, all as u8], bits).is_err() == (bits < 8));
    }
    assert_eq!(pack_codes(&[0, 1, 2, 3, 4, 5, 6, 7], 4).unwrap(), 0x7654_3210u32.to_le_bytes());
    assert_eq!(pack_codes(&[0, 1, 2, 3].repeat(4), 2).unwrap(), 0xe4e4_e4e4u32.to_le_bytes());
    assert!(pack_codes(&[0], 3).is_err() && unpack_codes(&[0], 1, 1).is_err() && unpack_codes(&[0], 3, 4).is_err());
}

#[test]
fn rows_are_padded_with_zeros_at_every_length() {
    let mut rng = Rng::new(1);
    for codec in Codec::ALL.into_iter().filter(|c| !c.is_channel_wise() && *c != Codec::Pq) {
        for d in 1..=70 {
            let x = rng.normals(d, 1.0);
            let row = encode_row(&x, codec, d).unwrap();
            let used = d * codec.bits();
            assert_eq!(row.codes.len(), used.div_ceil(128) * 16, "{codec} {d}");
            let padding = (used..8 * row.codes.len()).filter(|bit| row.codes[bit / 8] >> (bit % 8) & 1 == 1).count();
            assert_eq!(padding, 0, "{codec} {d}");
            assert_eq!(decode_row(&row.codes, &row.params, d, codec, d).unwrap().len(), d);
        }
    }
}

/// What e4m3 bytes 0 to 126 stand for: 1.fraction · 2^(exponent − 7), or 0.fraction · 2^-6.
fn e4m3() -> Vec<f64> {
    let value = |code: i32| match code / 8 {
        0 => f64::from(code) / 8.0 * 2f64.powi(-6),
        e => (1.0 + f64::from(code % 8) / 8.0) * 2f64.powi(e - 7),
    };
    (0..127).map(value).collect()
}

#[test]
fn fp8_is_the_nearest_number_ties_to_even() {
    let table = e4m3();
    assert_eq!(table[126], 448.0);
    for (code, value) in table.iter().enumerate() {
        assert_eq!(f64::from(decode_fp8(code as u8, 1.0)), *value);
        assert_eq!(f64::from(decode_fp8(code as u8 | 0x80, 1.0)), -value);
        assert_eq!(encode_fp8(*value as f32, 1.0), code as u8);
        assert_eq!(encode_fp8(-*value as f32, 1.0), code as u8 | 0x80, "also -0");
        assert_eq!(encode_fp8(*value as f32 * 0.25, 0.25), code as u8);
    }
    assert!(decode_fp8(0x7f, 1.0).is_nan() && decode_fp8(0xff, 1.0).is_nan());
    let nearest = |x: f32| {
        let distance = |code: usize| (table[code] - f64::from(x.abs())).abs();
        let best = (0..127).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2)))).unwrap();
        best as u8 | u8::from(x.is_sign_negative()) << 7
    };
    // Around each number and each middle of two, and anything else.
    let mut inputs: Vec<f32> = table.windows(2).flat_map(|w| [w[0], (w[0] + w[1]) / 2.0]).map(|x| x as f32).collect();
    let around: Vec<f32> = inputs.iter().flat_map(|x| [x.next_up(), x.next_down()]).collect();
    inputs.extend(around);
    let mut rng = Rng::new(2);
    inputs.extend((0..20_000).map(|_| rng.normal() * 2f32.powi(rng.below(24) as i32 - 14)));
    inputs.extend([464.0, 463.9, 480.0, 1e-30, f32::MIN_POSITIVE, 1e-45]);
    for x in inputs.into_iter().flat_map(|x| [x, -x]) {
        assert_eq!(encode_fp8(x, 1.0), nearest(x), "{x:e}");
    }
}

#[test]
fn fp8_saturates_and_keeps_signs() {
    for (x, code) in [(448.0, 0x7e), (449.0, 0x7e), (464.0, 0x7e), (1e6, 0x7e), (f32::INFINITY, 0x7e), (f32::NAN, 0x7f)] {
        assert_eq!(encode_fp8(x, 1.0), code);
        assert_eq!(encode_fp8(-x, 1.0), code | 0x80);
    }
    assert_eq!(encode_fp8(-1e-9, 1.0), 0x80);
    assert!(decode_fp8(0x80, 1.0).is_sign_negative());
    // One division, exact here: 31/16 is a tie, which an inverse of the scale would miss to either side.
    for i in 1..500 {
        assert_eq!(encode_fp8(31.0 * i as f32, 16.0 * i as f32), 0x40);
    }
    assert_eq!(decode_fp8(0x44, 0.1), 3.0 * 0.1f32);
    assert_eq!(encode_fp8(100.0, 0.01), 0x7e);
    assert_eq!(round_trip(&[0.3, -500.0, 1.0625, -0.0], Codec::Fp8, 4)[..3], [0.3125, -448.0, 1.0]);
}

#[test]
fn small_integer_groups_by_hand() {
    // Lossless: scale 1, codes 0 to 15.
    let x: Vec<f32> = (-8..8).map(|i| i as f32).collect();
    assert_eq!(codes(&x, Codec::Int4, 16), (0..16).collect::<Vec<u8>>());
    assert_eq!(round_trip(&x, Codec::Int4, 16), x);
    assert_eq!(encode_row(&x, Codec::Int4, 16).unwrap().codes[..4], [0x10, 0x32, 0x54, 0x76]);
    assert_eq!(round_trip(&[0.0, 1.0, 2.0, 3.0], Codec::Int2, 4), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(encode_row(&[0.0, 1.0, 2.0, 3.0], Codec::Int2, 4).unwrap().codes[0], 0xe4);
    // The scale is rounded before codes are computed: f16(0.2) = 0.199951.
    let row = encode_row(&[-1.0, 0.0, 1.0, 2.0], Codec::Int4, 4).unwrap();
    assert_eq!(row.params, [f16::from_f32(0.2).to_le_bytes(), f16::from_f32(-1.0).to_le_bytes()].concat());
    assert_eq!(round_trip(&[-1.0, 0.0, 1.0, 2.0], Codec::Int4, 4)[1], 5.0 * 0.199_951_17 - 1.0);
    // 255.102 / 255 rounds to 1: 200.53 is nearest to code 201 of that scale, to 200 of the other.
    assert_eq!(codes(&[0.0, 255.102, 200.53], Codec::Int8, 3), [0, 255, 201]);
    // Halves go to even, at each width.
    assert_eq!(codes(&[0.0, 15.0, 0.5, 1.5, 2.5, 13.5, 14.5, 7.4], Codec::Int4, 8), [0, 15, 0, 2, 2, 14, 14, 7]);
    assert_eq!(codes(&[0.0, 3.0, 0.5, 1.5, 2.5, 1.49], Codec::Int2, 6), [0, 3, 0, 2, 2, 1]);
    // The zero rounds from 1000.25 to 1000, so that the largest value lies 15.5 steps above it: clamped, or it would spill.
    let high: Vec<f32> = [1000.25, 1007.75, 1000.25, 1007.75].into();
    assert_eq!(encode_row(&high, Codec::Int4, 4).unwrap().codes[..2], [0xf0, 0xf0]);
    // And from 1000.75 to 1001, a whole step of 0.25 above the least.
    assert_eq!(codes(&[1000.75, 1004.5, 1000.75, 1001.0], Codec::Int4, 4), [0, 14, 0, 0]);
    // d = 96 of values in [5, 6]: nothing but them makes the range.
    let x: Vec<f32> = (0..96).map(|i| 5.0 + (i % 16) as f32 / 15.0).collect();
    assert_eq!(encode_row(&x, Codec::Int4, 96).unwrap().params[..2], f16::from_f32(1.0 / 15.0).to_le_bytes());
    // Integer identity: scale 0.5, zero -1, codes 0, 2, 4.
    let params = [f16::from_f32(0.5).to_le_bytes(), f16::from_f32(-1.0).to_le_bytes()].concat();
    let k = decode_row(&[0x20, 0x04], &params, 3, Codec::Int4, 3).unwrap();
    assert_eq!(k, [-1.0, 0.0, 1.0]);
    assert_eq!(k.iter().zip([1.0, 2.0, 3.0]).map(|(k, q)| k * q).sum::<f32>(), 0.5 * 16.0 - 6.0);
}

#[test]
fn constant_and_tiny_groups_decode_without_nan() {
    for codec in TOKEN_WISE {
        for (x, back) in [(3.0, 3.0), (0.0, 0.0), (0.1, f16::from_f32(0.1).to_f32()), (-1e-9, 0.0), (65504.0, 65504.0)] {
            let row = encode_row(&[x; 8], codec, 8).unwrap();
            assert!(row.codes.iter().all(|&c| c == 0) && row.params[..2] == [0, 0]);
            assert_eq!(round_trip(&[x; 8], codec, 8), [back; 8], "{codec} {x}");
        }
        // A scale among the subnormals of f16, and a range that it cannot tell from 0.
        let tiny: Vec<f32> = (0..8).map(|i| 1.0 + i as f32 * 1e-7).collect();
        assert!(round_trip(&tiny, codec, 4).iter().all(|&x| (x - 1.0).abs() < 1e-6));
        let tiny: Vec<f32> = (0..8).map(|i| i as f32 * 1e-9).collect();
        assert!(round_trip(&tiny, codec, 8).iter().all(|&x| x == 0.0));
    }
}

#[test]
fn codes_are_within_half_a_step_and_groups_apart() {
    let mut rng = Rng::new(3);
    for codec in TOKEN_WISE {
        let levels = ((1u32 << codec.bits()) - 1) as f32;
        for (d, group) in [(64, 32), (64, 64), (96, 3), (40, 5), (8, 1), (128, 16)] {
            for _ in 0..30 {
                let offset = 10.0 * rng.normal();
                let x: Vec<f32> = rng.normals(d, 3.0).iter().map(|x| x + offset).collect();
                let back = round_trip(&x, codec, group);
                for (values, decoded) in x.chunks(group).zip(back.chunks(group)) {
                    let (low, high) = values.iter().fold((f32::MAX, f32::MIN), |(l, h), &v| (l.min(v), h.max(v)));
                    // Half a step, and what rounding the stored zero (1/2 ulp) and scale (1/2 ulp a step) moves the ends by.
                    let bound = (high - low) * (0.5 / levels + 1.0 / 2048.0) + low.abs() / 2048.0 + 1e-6;
                    assert!(values.iter().zip(decoded).all(|(a, b)| (a - b).abs() <= bound), "{codec} {group}");
                    assert_eq!(decoded.to_vec(), round_trip(values, codec, values.len()), "a group alone");
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_spoils_its_group_alone() {
    let mut rng = Rng::new(4);
    for codec in TOKEN_WISE {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let mut x = rng.normals(64, 1.0);
            let clean = round_trip(&x, codec, 16);
            x[17] = bad;
            for (i, (a, b)) in round_trip(&x, codec, 16).iter().zip(&clean).enumerate() {
                assert!(if (16..32).contains(&i) { a.is_nan() } else { a == b }, "{codec} {bad} {i}");
            }
        }
        // A group that covers all of f32 overflows its own range; 70000 is beyond f16, as a zero or as a step.
        for beyond in [[f32::MAX, -f32::MAX], [-70_000.0, -69_990.0], [70_000.0; 2], [0.0, 2e7]] {
            assert!(round_trip(&beyond, codec, 2).iter().all(|x| x.is_nan()), "{codec} {beyond:?}");
        }
    }
    // One NaN channel: the blast radius is that channel of the group.
    let mut rows = rng.normals(32 * 8, 1.0);
    rows[5 * 8 + 3] = f32::NAN;
    let stored = encode_channels(&rows, 8, 4).unwrap();
    let back = decode_channels(&stored.codes, &stored.params, 8, 4).unwrap();
    assert!(back.iter().enumerate().all(|(i, x)| x.is_nan() == (i % 8 == 3)));
}

#[test]
fn channels_are_columns_encoded_as_rows() {
    let mut rng = Rng::new(5);
    for bits in [2, 4, 8] {
        let codec = TOKEN_WISE.into_iter().find(|c| c.bits() == bits).unwrap();
        for (n, d) in [(1, 8), (2, 24), (31, 40), (32, 128), (33, 5)] {
            let rows: Vec<f32> = (0..n * d).map(|i| rng.normal() * (1 + i % d) as f32).collect();
            let stored = encode_channels(&rows, d, bits).unwrap();
            assert_eq!((stored.codes.len(), stored.params.len()), (n * codec.row_bytes(d), 4 * d));
            let back = decode_channels(&stored.codes, &stored.params, d, bits).unwrap();
            for c in 0..d {
                let column: Vec<f32> = (0..n).map(|r| rows[r * d + c]).collect();
                assert_eq!(stored.params[4 * c..4 * c + 4], encode_row(&column, codec, n).unwrap().params);
                let decoded = (0..n).map(|r| back[r * d + c]).collect::<Vec<_>>();
                assert_eq!(decoded, round_trip(&column, codec, n));
            }
            for row in stored.codes.chunks(codec.row_bytes(d)) {
                let first = unpack_codes(row, d, bits).unwrap();
                assert_eq!(pack_codes(&first, bits).unwrap()[..], row[..(d * bits).div_ceil(8)]);
                assert!(row[(d * bits).div_ceil(8)..].iter().all(|&b| b == 0));
            }
        }
    }
    // The same vector added to all rows (exact in f16 here) moves zeros, not codes.
    let rows: Vec<f32> = (0..32 * 4).map(|_| rng.below(16) as f32).collect();
    let moved: Vec<f32> = rows.iter().enumerate().map(|(i, x)| x + [8.0, -3.0, 100.0, 0.5][i % 4]).collect();
    assert_eq!(encode_channels(&rows, 4, 4).unwrap().codes, encode_channels(&moved, 4, 4).unwrap().codes);
    assert!(
        encode_channels(&rows, 5, 4).is_err() && encode_channels(&[], 4, 4).is_err() && encode_channels(&rows, 0, 4).is_err()
    );
    assert!(encode_channels(&rows, 4, 3).is_err() && decode_channels(&[0; 15], &[0; 16], 4, 4).is_err());
    assert!(decode_channels(&[0; 16], &[0; 15], 4, 4).is_err());
}

#[test]
fn hadamard_by_hand_and_bit_for_bit() {
    assert_eq!(hadamard(&[1.0, 0.0, 0.0, 0.0]).unwrap(), [0.5; 4]);
    assert_eq!(hadamard(&[1.0; 4]).unwrap(), [2.0, 0.0, 0.0, 0.0]);
    assert_eq!(hadamard(&[0.0, 1.0, 0.0, 0.0]).unwrap(), [0.5, -0.5, 0.5, -0.5]);
    assert_eq!(hadamard(&[3.0]).unwrap(), [3.0]);
    // The order of strides shows where sums round: 2^24 + 1 is 2^24. Stride 2 first would give 1, -1.
    let big = 16_777_216.0;
    assert_eq!(hadamard(&[big, 1.0, -big, 1.0]).unwrap(), [0.5, -0.5, big, big]);
    // The factor is the f32 of 1/√d, multiplied once.
    let mut rng = Rng::new(6);
    for (d, factor) in [(2, 0.5f64.sqrt()), (8, 0.125f64.sqrt()), (128, (1.0 / 128.0f64).sqrt())] {
        for x in rng.normals(100, 1.0) {
            let row: Vec<f32> = (0..d).map(|i| if i == 0 { x } else { 0.0 }).collect();
            assert_eq!(hadamard(&row).unwrap(), vec![x * factor as f32; d]);
        }
    }
    for d in [1, 2, 8, 64, 128, 256] {
        let (q, k) = (rng.normals(d, 1.0), rng.normals(d, 1.0));
        let (hq, hk) = (hadamard(&q).unwrap(), hadamard(&k).unwrap());
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        assert!((dot(&hq, &hk) - dot(&q, &k)).abs() < 1e-5 && (dot(&hq, &hq) - dot(&q, &q)).abs() < 1e-4);
        assert!(hadamard(&hq).unwrap().iter().zip(&q).all(|(a, b)| (a - b).abs() < 1e-5));
        // Entry (i, j) has the sign of the parity of i & j.
        for i in [0, d / 2, d - 1] {
            let row: f64 =
                (0..d).map(|j| if (i & j).count_ones().is_multiple_of(2) { f64::from(q[j]) } else { -f64::from(q[j]) }).sum();
            assert!((row / (d as f64).sqrt() - f64::from(hq[i])).abs() < 1e-5);
        }
    }
    assert!(hadamard(&[1.0; 3]).is_err() && hadamard(&[]).is_err());
    assert!(hadamard(&[1.0, f32::NAN, 0.0, 0.0]).unwrap().iter().all(|x| x.is_nan()));
    assert!(hadamard(&[1.0, f32::INFINITY, 0.0, 0.0]).unwrap().iter().all(|x| !x.is_finite()));
}

#[test]
fn product_codes_by_hand() {
    let values = [1.0, 0.0, 0.0, 1.0, 2.0, 2.0, -1.0, 1.0];
    let books = Codebooks { subvectors: 2, centroids: 2, values: &values };
    let q = [3.0, -2.0, 0.5, 4.0];
    for (codes, score) in [([0, 0], 12.0), ([0, 1], 6.5), ([1, 0], 7.0), ([1, 1], 1.5)] {
        let k = decode_pq(&codes, 4, &books).unwrap();
        assert_eq!(k.iter().zip(q).map(|(k, q)| k * q).sum::<f32>(), score);
        assert_eq!(encode_pq(&k, &books).unwrap(), codes, "keys on the codebook");
        // The sum over a table of q · centroid, as a kernel would have it.
        let table = |i: usize, c: u8| (0..2).map(|j| q[2 * i + j] * values[4 * i + 2 * usize::from(c) + j]).sum::<f32>();
        assert_eq!(table(0, codes[0]) + table(1, codes[1]), score);
    }
    assert_eq!(encode_pq(&[0.5, 0.5, 0.5, 1.5], &books).unwrap(), [0, 0], "ties go to the lower");
    // Sub-vectors that are not finite get code 0, and leave the others alone; so do squares that overflow.
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
        assert_eq!(encode_pq(&[bad, 1.0, -1.0, 1.0], &books).unwrap(), [0, 1]);
    }
    let many: Vec<f32> = (0..256).map(|i| i as f32).collect();
    let wide = Codebooks { subvectors: 1, centroids: 256, values: &many };
    assert_eq!(encode_pq(&[254.6], &wide).unwrap(), [255]);
    assert_eq!(decode_pq(&[255], 1, &wide).unwrap(), [255.0]);
    for bad in [
        Codebooks { subvectors: 3, ..books },
        Codebooks { subvectors: 0, ..books },
        Codebooks { centroids: 0, ..books },
        Codebooks { centroids: 257, ..books },
        Codebooks { centroids: 3, ..books },
        Codebooks { values: &values[..7], ..books },
    ] {
        assert!(encode_pq(&q, &bad).is_err() && decode_pq(&[0, 0], 4, &bad).is_err());
    }
    assert!(decode_pq(&[0], 4, &books).is_err() && decode_pq(&[0, 2], 4, &books).is_err());
}

#[test]
fn product_distances_round_in_order() {
    let nearest = |x: &[f32], centroids: &[f32]| {
        encode_pq(x, &Codebooks { subvectors: 1, centroids: centroids.len() / x.len(), values: centroids }).unwrap()[0]
    };
    // Squares 2^24, 1, 1 sum to 2^24 in order, to 2^24 + 2 from behind: a tie with 2^24, 0, 0 only in order.
    assert_eq!(nearest(&[4096.0, 1.0, 1.0], &[0.0, 0.0, 0.0, 0.0, 1.0, 1.0]), 0);
    // (1 + 2^-12)² rounds to 1 + 2^-11; fused with 2^-24 it would not, and the second would be nearer.
    let t = 1.0 + 2f32.powi(-12);
    assert_eq!(nearest(&[2f32.powi(-12), t], &[0.0, 0.0, 2f32.powi(-12), 0.0]), 0);
}

#[test]
fn product_scores_are_sums_over_a_table() {
    let mut rng = Rng::new(7);
    let (m, c, d) = (16, 32, 64);
    let values = rng.normals(c * d, 1.0);
    let books = Codebooks { subvectors: m, centroids: c, values: &values };
    for _ in 0..50 {
        let (q, k) = (rng.normals(d, 1.0), rng.normals(d, 1.0));
        let codes = encode_pq(&k, &books).unwrap();
        let decoded = decode_pq(&codes, d, &books).unwrap();
        let whole: f64 = q.iter().zip(&decoded).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
        let centroid = |i: usize, code: usize| &values[(i * c + code) * (d / m)..][..d / m];
        let entry = |i: usize| -> f64 {
            let part = centroid(i, usize::from(codes[i])).iter().zip(&q[i * d / m..]);
            part.map(|(k, q)| f64::from(*q) * f64::from(*k)).sum()
        };
        assert!(((0..m).map(entry).sum::<f64>() - whole).abs() < 1e-5);
        // No other centroid is nearer.
        for (i, &code) in codes.iter().enumerate() {
            let far = |code: usize| -> f64 {
                centroid(i, code).iter().zip(&k[i * d / m..]).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
            };
            assert!((0..c).all(|other| far(other) > far(usize::from(code)) - 1e-5));
        }
    }
}

#[test]
fn errors_of_normal_rows_are_as_published() {
    // hcattention.md 2.3: d = 128, sigma 1.
    let mut rng = Rng::new(8);
    let rows: Vec<Vec<f32>> = (0..4000).map(|_| rng.normals(128, 1.0)).collect();
    for (codec, group, expected) in [
        (Codec::Int8, 128, 3.4e-5),
        (Codec::Int4, 128, 0.00995),
        (Codec::Int4, 32, 0.00612),
        (Codec::Int2, 128, 0.250),
        (Codec::Int2, 32, 0.155),
        (Codec::Fp8, 128, 7.1e-4),
    ] {
        let error = |x: &Vec<f32>| -> f64 {
            x.iter().zip(round_trip(x, codec, group)).map(|(a, b)| (f64::from(*a) - f64::from(b)).powi(2)).sum()
        };
        let mse = rows.iter().map(error).sum::<f64>() / (4000.0 * 128.0);
        assert!((mse / expected - 1.0).abs() < 0.05, "{codec} {group}: {mse} instead of {expected}");
    }
}

#[test]
fn formats_have_names_and_sizes() {
    let parse = |s: &str| s.parse::<Format>();
    for codec in Codec::ALL {
        for hadamard in [false, true] {
            let format = Format { hadamard, ..codec.into() };
            assert_eq!(parse(&format.to_string()), Ok(format));
        }
    }
    assert_eq!(parse("int4-channel+hadamard").unwrap(), Format { codec: Codec::Int4Channel, group: None, hadamard: true });
    assert_eq!(parse("int8+hadamard").unwrap(), Format { codec: Codec::Int8, group: None, hadamard: true });
    for bad in
        ["int8-channel", "bf16-channel", "pq-channel", "int4+hadamard-channel", "int4-channel+hadamard+hadamard", "int4+", "int3"]
    {
        assert!(parse(bad).unwrap_err().contains(bad), "{bad}");
    }
    assert!(parse("").is_err() && parse("+hadamard").is_err() && parse("INT8").is_err() && parse("int4 ").is_err());
    // Rows are padded to 16 bytes; scales and zeros take 4 a group.
    let bytes = |codec: Codec, group: Option<usize>, dtype| Format { group, ..codec.into() }.stored_bytes(70, 40, dtype, 10);
    let expected = [
        (Codec::Bf16, None, 70 * 80),
        (Codec::Fp8, None, 70 * 48),
        (Codec::Int8, None, 70 * 52),
        (Codec::Int4, Some(8), 70 * (32 + 20)),
        (Codec::Int2, None, 70 * (16 + 4)),
        (Codec::Int4Channel, None, 64 * 32 + 2 * 160 + 6 * 80),
        (Codec::Int2Channel, Some(70), 70 * 16 + 160),
        (Codec::Int2Channel, Some(71), 70 * 80),
        (Codec::Pq, None, 70 * 16),
    ];
    for (codec, group, size) in expected {
        assert_eq!(bytes(codec, group, Dtype::F16), size, "{codec}");
    }
    assert_eq!(bytes(Codec::Int4Channel, None, Dtype::F32), 64 * 32 + 2 * 160 + 6 * 160);
    assert_eq!(Codec::Int4Channel.stored_bytes(70, 40, 32), 64 * 32 + 2 * 160 + 6 * 80);
    let check = |s: &str, group, dim| Format { group, ..parse(s).unwrap() }.check(dim);
    assert!(check("int4", Some(5), 20).is_ok() && check("int4", Some(6), 20).is_err() && check("int4", Some(0), 20).is_err());
    assert!(check("int4-channel", Some(6), 20).is_ok() && check("int4-channel", Some(0), 20).is_err());
    assert!(check("int8+hadamard", None, 64).is_ok() && check("int8+hadamard", None, 96).is_err());
    assert!(encode_row(&[0.0; 8], Codec::Pq, 8).is_err() && encode_row(&[0.0; 8], Codec::Int2Channel, 8).is_err());
    assert!(decode_row(&[0; 16], &[0; 4], 8, Codec::Pq, 8).is_err());
    assert!(decode_row(&[0; 1], &[0; 4], 8, Codec::Int2, 8).is_err() && decode_row(&[0; 2], &[0; 3], 8, Codec::Int2, 8).is_err());
}
