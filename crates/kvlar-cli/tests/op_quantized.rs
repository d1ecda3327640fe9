//! The ops on encoded rows from outside: attend_quantized, scan, reduce, encode, append, fit_codebooks.

use crate::case::{Case, Run, backends, kernels, run};
use half::{bf16, f16};
use kvlar_reference::testing::Rng;
use safetensors::SafeTensors;

fn reference(op: &str, case: &Case) -> Run {
    run(op, "reference", case, &[])
}

fn with(case: &Case, keys: &[(&str, &str)]) -> Case {
    keys.iter().fold(case.clone(), |c, (k, v)| c.key(k, v))
}

fn replace(case: &Case, name: &str, shape: &[usize], values: &[f32]) -> Case {
    case.clone().without(name).floats(name, shape, values)
}

fn to_bf16(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

/// Every key and value fails and is named.
fn refuses(op: &str, case: &Case, bad: &[(&str, &str)]) {
    for (key, value) in bad {
        reference(op, &case.clone().key(key, value)).fails(2, key);
    }
}

/// zero + scale · code over groups that lie `stride` apart inside each other, in f64 but for what is stored in f16.
fn affine(x: &mut [f32], starts: &[usize], stride: usize, group: usize, bits: u32) {
    let half = |x: f64| f16::from_f64(x).to_f64();
    for &start in starts {
        let at: Vec<usize> = (0..group).map(|i| start + i * stride).collect();
        let values: Vec<f64> = at.iter().map(|&i| f64::from(x[i])).collect();
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), &v| (l.min(v), h.max(v)));
        let top = f64::from((1u32 << bits) - 1);
        let (scale, zero) = (half((high - low) / top), half(low));
        for (&i, v) in at.iter().zip(values) {
            let code = if scale > 0.0 { ((v - zero) / scale).round_ties_even().clamp(0.0, top) } else { 0.0 };
            x[i] = (zero + scale * code) as f32;
        }
    }
}

/// H x from the signs of its entries, in f64.
fn turned(x: &[f32]) -> Vec<f32> {
    let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    let entry = |i: usize| (0..x.len()).map(|j| sign(i, j) * f64::from(x[j])).sum::<f64>() / (x.len() as f64).sqrt();
    (0..x.len()).map(|i| entry(i) as f32).collect()
}

#[track_caller]
fn close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(a == b || (a - b).abs() <= tolerance * (1.0 + b.abs()), "{i}: {a} instead of {b}");
    }
}

/// Softmax attention of one query over n rows: the output, and the logits' lse.
fn attention(q: &[f32], k: &[f32], v: &[f32], scale: f64) -> (Vec<f32>, f32) {
    let (d, n) = (q.len(), k.len() / q.len());
    let dot = |row: &[f32]| scale * q.iter().zip(row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let weights: Vec<f64> = k.chunks(d).map(|row| dot(row).exp()).collect();
    let (sum, dv) = (weights.iter().sum::<f64>(), v.len() / n);
    let out = |c: usize| (weights.iter().zip(v.chunks(dv)).map(|(w, row)| w * f64::from(row[c])).sum::<f64>() / sum) as f32;
    ((0..dv).map(out).collect(), sum.ln() as f32)
}

pub const DIMS: [usize; 6] = [2, 4, 2, 50, 16, 8]; // B, Hq, Hk, T, d, dv

pub fn attend_case() -> Case {
    let [b, hq, hk, t, d, dv] = DIMS;
    let mut rng = Rng::new(1);
    let mut normals = |shape: [usize; 4]| rng.normals(shape.iter().product(), 1.0);
    let (q, k, v) = (normals([b, hq, 1, d]), normals([b, hk, t, d]), normals([b, hk, t, dv]));
    Case::default().floats("q", &[b, hq, 1, d], &q).floats("k", &[b, hk, t, d], &k).floats("v", &[b, hk, t, dv], &v)
}

fn tensor(case: &Case, name: &str) -> Vec<f32> {
    crate::case::values(case, name, kvlar_reference::Dtype::Bf16)
}

#[test]
fn attend_quantized_is_attention_over_what_is_decoded() {
    let [b, hq, hk, t, d, dv] = DIMS;
    let lengths = [50, 37, 9, 0];
    let base = attend_case().ints("lengths", &[b, hk], &lengths);
    let q = tensor(&base, "q");
    let keys = [("key_codec", "int4-channel"), ("value_codec", "int8+hadamard"), ("sink_rows", "3"), ("recent_rows", "5")];
    // Groups of 32 rows, and of whole value rows, by default; or of 8 of either.
    for group in [None, Some(8)] {
        let case = with(&base, &keys);
        let case = group.map_or(case.clone(), |g: usize| with(&case, &[("group", &g.to_string()), ("scale", "0.1")]));
        let scale = if group.is_some() { 0.1 } else { 0.25 };
        let r = reference("attend_quantized", &case);
        let (mut k, mut v) = (tensor(&base, "k"), tensor(&base, "v"));
        for (head, &n) in lengths.iter().enumerate() {
            let n = n as usize;
            let (start, end) = (3.min(n), n.saturating_sub(5).max(3.min(n)));
            let (rows, group_v) = (group.unwrap_or(32), group.unwrap_or(dv));
            let own = &mut k[head * t * d..][..t * d];
            for g in 0..(end - start) / rows {
                let channels: Vec<usize> = (0..d).map(|c| (start + g * rows) * d + c).collect();
                affine(own, &channels, d, rows, 4);
            }
            own[n * d..].fill(0.0);
            let own = &mut v[head * t * dv..][..t * dv];
            for row in start..end {
                let mut x = turned(&own[row * dv..][..dv]);
                affine(&mut x, &(0..dv).step_by(group_v).collect::<Vec<_>>(), 1, group_v, 8);
                own[row * dv..][..dv].copy_from_slice(&turned(&x));
            }
            own[n * dv..].fill(0.0);
        }
        assert_eq!(r.tensor("k_decoded").0, [b, hk, t, d]);
        assert_eq!(r.tensor("v_decoded").0, [b, hk, t, dv]);
        close(&r.tensor("k_decoded").1, &k, 1e-6);
        close(&r.tensor("v_decoded").1, &v, 1e-5);
        let ((shape, out), (lse_shape, lse)) = (r.tensor("out"), r.tensor("lse"));
        assert_eq!((shape, lse_shape), (vec![b, hq, 1, dv], vec![b, hq, 1]));
        for head in 0..b * hq {
            let (h, n) = (head / 2, lengths[head / 2] as usize);
            if n == 0 {
                assert!(out[head * dv..][..dv].iter().all(|&x| x == 0.0) && lse[head] == f32::NEG_INFINITY);
                continue;
            }
            let expected = attention(&q[head * d..][..d], &k[h * t * d..][..n * d], &v[h * t * dv..][..n * dv], scale);
            close(&out[head * dv..][..dv], &expected.0, 1e-5);
            close(&lse[head..=head], &[expected.1], 1e-5);
        }
    }
}

#[test]
fn attend_quantized_takes_scales_codebooks_and_eight_bit_queries() {
    let [b, hq, hk, t, d, dv] = DIMS;
    let case = with(&attend_case(), &[("key_codec", "bf16"), ("value_codec", "fp8")]);
    let (q, k, v) = (tensor(&case, "q"), tensor(&case, "k"), tensor(&case, "v"));
    // Scales are the heads' own, 1 if none are given.
    let fp8 = |x: f32, scale| kvlar_reference::decode_fp8(kvlar_reference::encode_fp8(x, scale), scale);
    let scaled = case.clone().floats("v_scale", &[hk], &[0.7, 0.003]);
    let (_, fine) = reference("attend_quantized", &scaled).tensor("v_decoded");
    let (_, plain) = reference("attend_quantized", &case).tensor("v_decoded");
    for (i, &x) in v.iter().enumerate() {
        let scale = if i / (t * dv) % 2 == 0 { 0.7 } else { 0.003 };
        assert_eq!((fine[i], plain[i]), (fp8(x, scale), fp8(x, 1.0)));
    }
    // int8 queries: a scale a head, over its rows.
    let (out, lse) = {
        let r = reference("attend_quantized", &case.clone().key("query", "int8"));
        (r.tensor("out").1, r.tensor("lse").1)
    };
    for head in 0..b * hq {
        let own = &q[head * d..][..d];
        let scale = own.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
        let seen: Vec<f32> = own.iter().map(|x| (x / scale).round_ties_even() * scale).collect();
        let expected = attention(&seen, &k[head / 2 * t * d..][..t * d], &plain[head / 2 * t * dv..][..t * dv], 0.25);
        close(&out[head * dv..][..dv], &expected.0, 1e-5);
        close(&lse[head..=head], &[expected.1], 1e-5);
        let unseen = attention(own, &k[head / 2 * t * d..][..t * d], &plain[head / 2 * t * dv..][..t * dv], 0.25);
        assert!((unseen.1 - lse[head]).abs() > 1e-6, "queries were not quantized");
    }
    // pq keys read the codebooks of their head: here one centroid each, so that all keys are alike.
    let centroids: Vec<f32> = (0..hk * d).map(|i| i as f32 / 64.0).collect();
    let pq =
        with(&attend_case(), &[("key_codec", "pq"), ("value_codec", "bf16")]).floats("codebooks", &[hk, 4, 1, 4], &centroids);
    let r = reference("attend_quantized", &pq);
    assert!(
        r.tensor("k_decoded").1.chunks(t * d).enumerate().all(|(h, k)| k.chunks(d).all(|k| *k == centroids[h % 2 * d..][..d]))
    );
    let mean = |h: usize, c: usize| (0..t).map(|r| v[(h * t + r) * dv + c]).sum::<f32>() / t as f32;
    let means: Vec<f32> = (0..b * hq).flat_map(|head| (0..dv).map(move |c| (head / 2, c))).map(|(h, c)| mean(h, c)).collect();
    close(&r.tensor("out").1, &means, 1e-5);
}

#[test]
fn wrong_attend_quantized_input_is_named() {
    let [b, hq, hk, t, d, dv] = DIMS;
    let bare = attend_case();
    let case = with(&bare, &[("key_codec", "int4"), ("value_codec", "int4")]);
    let fails = |c: &Case, word: &str| reference("attend_quantized", c).fails(2, word);
    refuses(
        "attend_quantized",
        &case,
        &[
            ("key_codec", "int3"),
            ("key_codec", "int8-channel"),
            ("key_codec", "int4+hadamard-channel"),
            ("value_codec", "bf16-channel"),
            ("value_codec", "pq"),
            ("group", "3"),
            ("group", "16"), // divides d, not dv
            ("group", "0"),
            ("group", "x"),
            ("sink_rows", "-1"),
            ("recent_rows", "1.5"),
            ("query", "fp8"),
            ("window", "-1"),
            ("softcap", "-1"),
            ("scale", "nan"),
            ("dtype", "int8"),
            ("page_size", "64"),
        ],
    );
    fails(&bare.clone().key("value_codec", "int4"), "no key key_codec");
    fails(&bare.clone().key("key_codec", "int4"), "no key value_codec");
    fails(&case.clone().without("k"), "no tensor k");
    fails(&replace(&case, "v", &[b, hk, t - 1, dv], &vec![0.0; b * hk * (t - 1) * dv]), "v is [2, 2, 49, 8]");
    fails(&replace(&case, "q", &[b, 3, 1, d], &vec![0.0; b * 3 * d]), "3 heads");
    fails(&replace(&case, "q", &[b, hq, 9, d], &vec![0.0; b * hq * 9 * d]), "9 query rows");
    fails(&case.clone().ints("lengths", &[b], &[51, 0]), "lengths: 51");
    fails(&case.clone().floats("k_scale", &[hk], &[1.0; 2]), "k_scale: only fp8");
    fails(&case.clone().floats("codebooks", &[hk, 4, 1, 4], &[0.0; 32]), "codebooks: only pq");
    // 24 dimensions are no power of two.
    let odd = replace(&case, "v", &[b, hk, t, 24], &vec![0.0; b * hk * t * 24]);
    fails(&with(&odd, &[("value_codec", "int8+hadamard")]), "value_codec: hadamard: 24");
    let fp8 = with(&bare, &[("key_codec", "fp8"), ("value_codec", "fp8")]);
    for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        fails(&fp8.clone().floats("k_scale", &[hk], &[1.0, bad]), "k_scale");
        fails(&fp8.clone().floats("v_scale", &[hk], &[bad, 1.0]), "v_scale");
    }
    fails(&fp8.clone().floats("k_scale", &[1], &[1.0]), "k_scale is [1]");
    let pq = with(&bare, &[("key_codec", "pq"), ("value_codec", "bf16")]);
    fails(&pq, "codebooks");
    for (shape, word) in [
        (&[hk, 4, 2, 4][..], ""),
        (&[1, 4, 2, 4], "codebooks is [1"),
        (&[hk, 4, 2, 3], "not 16 dimensions"),
        (&[4, 2, 4], "codebooks is [4"),
        (&[hk, 4, 0, 4], "0 centroids"),
        (&[hk, 4, 257, 4], "257 centroids"),
        (&[hk, 0, 2, 4], "codebooks"),
    ] {
        let case = pq.clone().floats("codebooks", shape, &vec![0.5; shape.iter().product()]);
        if word.is_empty() {
            assert!(reference("attend_quantized", &case).output.status.success());
        } else {
            fails(&case, word);
        }
    }
    let spoiled = pq.floats("codebooks", &[hk, 1, 1, 16], &[[0.0; 31].as_slice(), &[f32::NAN]].concat());
    for backend in backends() {
        run("attend_quantized", backend, &spoiled, &[]).fails(2, "codebooks: a centroid holds NaN");
    }
}

fn scan_case() -> Case {
    let [b, hq, hk, t, d, _] = DIMS;
    let case = attend_case().without("v");
    let [q, k] = ["q", "k"].map(|name| crate::case::values(&case, name, kvlar_reference::Dtype::F32));
    Case::default().floats("q", &[b, hq, d], &q).floats("k", &[b, hk, t, d], &k)
}

#[test]
fn scan_scores_every_row() {
    let [b, hq, hk, t, d, _] = DIMS;
    let lengths = [50, 20];
    let case = with(&scan_case().ints("lengths", &[b], &lengths), &[("key_codec", "int2"), ("group", "4"), ("scale", "0.5")]);
    let r = reference("scan", &case);
    let (q, mut k) = (tensor(&case, "q"), tensor(&case, "k"));
    for (head, own) in k.chunks_mut(t * d).enumerate() {
        affine(own, &(0..t * d).step_by(4).collect::<Vec<_>>(), 1, 4, 2);
        own[lengths[head / hk] as usize * d..].fill(0.0);
    }
    let ((shape, logits), (_, lse)) = (r.tensor("logits"), r.tensor("lse"));
    assert_eq!((shape, r.tensor("lse").0, r.tensor("k_decoded").0), (vec![b, hq, t], vec![b, hq], vec![b, hk, t, d]));
    close(&r.tensor("k_decoded").1, &k, 1e-6);
    for head in 0..b * hq {
        let n = lengths[head / hq] as usize;
        let rows = &k[head / 2 * t * d..][..n * d];
        let dot = |row: &[f32]| 0.5 * q[head * d..][..d].iter().zip(row).map(|(a, b)| a * b).sum::<f32>();
        close(&logits[head * t..][..n], &rows.chunks(d).map(dot).collect::<Vec<_>>(), 1e-5);
        assert!(logits[head * t + n..][..t - n].iter().all(|&x| x == f32::NEG_INFINITY));
        let sum: f64 = logits[head * t..][..n].iter().map(|&x| f64::from(x).exp()).sum();
        close(&lse[head..=head], &[sum.ln() as f32], 1e-5);
    }
    // 1/√d, bf16 and all rows, if nothing is said.
    let (short, long) = (scan_case().key("key_codec", "int8"), with(&scan_case(), &[("key_codec", "int8"), ("dtype", "bf16")]));
    let long = long.key("scale", "0.25").ints("lengths", &[b], &[t as i32; 2]);
    assert_eq!(reference("scan", &short).tensor("logits"), reference("scan", &long).tensor("logits"));
}

#[test]
fn codebooks_are_fitted_and_scanned_with() {
    let [_, _, hk, t, d, _] = DIMS;
    // Rows of both sequences as [N, Hk, d].
    let k = tensor(&scan_case(), "k");
    let row = |i: usize, h: usize| &k[((i / t * hk + h) * t + i % t) * d..][..d];
    let rows: Vec<f32> = (0..2 * t).flat_map(|i| (0..hk).flat_map(move |h| row(i, h).to_vec())).collect();
    let fit = with(&Case::default().floats("k", &[2 * t, hk, d], &rows), &[("m", "8"), ("c", "16"), ("seed", "3")]);
    let fitted = reference("fit_codebooks", &fit);
    let ((shape, books), (error_shape, error)) = (fitted.tensor("codebooks"), fitted.tensor("error"));
    assert_eq!((shape, error_shape), (vec![hk, 8, 16, 2], vec![hk]));
    let case = scan_case().key("key_codec", "pq").floats("codebooks", &[hk, 8, 16, 2], &books);
    let (_, decoded) = reference("scan", &case).tensor("k_decoded");
    let lost = |h: usize| -> f32 {
        let far = |i: usize| -> f32 {
            let at = ((i / t * hk + h) * t + i % t) * d;
            k[at..at + d].iter().zip(&decoded[at..]).map(|(a, b)| (a - b).powi(2)).sum()
        };
        (0..2 * t).map(far).sum::<f32>() / (2 * t) as f32
    };
    close(&error, &[lost(0), lost(1)], 1e-4);
    for backend in ["simt", "cuda"] {
        assert_eq!(run("fit_codebooks", backend, &fit, &[]).tensor("codebooks").1, books, "fitting has no device part");
    }
    let more = |keys: &[(&str, &str)]| reference("fit_codebooks", &with(&fit, keys)).tensor("codebooks");
    assert_eq!(more(&[("rounds", "25"), ("dtype", "f32")]).1, books, "defaults");
    assert_ne!(more(&[("rounds", "0")]).1, books);
    assert_ne!(more(&[("seed", "4")]).1, books);
    let wide = with(&Case::default().floats("k", &[2 * t, hk, d], &rows), &[("m", "1")]);
    assert_eq!(reference("fit_codebooks", &wide).tensor("codebooks").0, [hk, 1, 256, d]);
    refuses(
        "fit_codebooks",
        &fit,
        &[("m", "3"), ("m", "0"), ("m", "-1"), ("c", "0"), ("c", "257"), ("rounds", "x"), ("seed", "-1")],
    );
    refuses("fit_codebooks", &fit, &[("max_rows", "4"), ("dtype", "int4")]);
    reference("fit_codebooks", &Case::default().floats("k", &[2 * t, hk, d], &rows)).fails(2, "no key m");
    reference("fit_codebooks", &replace(&fit, "k", &[0, hk, d], &[])).fails(2, "nothing to fit to");
    reference("fit_codebooks", &replace(&fit, "k", &[hk, d], &rows[..hk * d])).fails(2, "3 dimensions");
    let mut bad = rows.clone();
    bad[3 * hk * d] = f32::NAN;
    reference("fit_codebooks", &replace(&fit, "k", &[2 * t, hk, d], &bad)).fails(2, "k: row 3");
}

#[test]
fn wrong_scan_input_is_named() {
    let [b, hq, hk, _, d, _] = DIMS;
    let case = scan_case().key("key_codec", "int4");
    let fails = |c: &Case, word: &str| reference("scan", c).fails(2, word);
    refuses("scan", &case, &[("key_codec", "fp4"), ("group", "5"), ("scale", "inf"), ("window", "3"), ("sink_rows", "1")]);
    fails(&scan_case(), "no key key_codec");
    fails(&case.clone().without("q"), "no tensor q");
    fails(&replace(&case, "q", &[b, 5, d], &vec![0.0; b * 5 * d]), "5 heads");
    fails(&replace(&case, "q", &[b, hq, d - 1], &vec![0.0; b * hq * (d - 1)]), "k is [2, 2, 50, 16]");
    fails(&case.clone().ints("lengths", &[b, hk], &[1, 2, 3, -1]), "lengths: -1");
    fails(&case.clone().key("key_codec", "pq"), "codebooks");
    fails(&case.clone().key("key_codec", "pq").floats("codebooks", &[hk, 4, 2, 5], &[0.0; 80]), "codebooks");
    fails(&case.clone().floats("lse", &[1], &[0.0]), "unknown tensor");
}

#[test]
fn reduce_has_three_methods() {
    let logits = [1.0, 2.0, f32::NEG_INFINITY, 3.0, -4.0, f32::NEG_INFINITY];
    let case = Case::default().floats("logits", &[1, 2, 3], &logits).floats("lse", &[1, 2], &[0.5, 3.0]).key("kv_heads", "1");
    let none = f32::NEG_INFINITY;
    for (method, expected) in [("max_prob", [0.5, 1.5, none]), ("max_logit", [3.0, 2.0, none]), ("mean_logit", [2.0, -1.0, none])]
    {
        assert_eq!(reference("reduce", &case.clone().key("method", method)).tensor("scores"), (vec![1, 1, 3], expected.to_vec()));
    }
    assert_eq!(reference("reduce", &case).tensor("scores").1, [0.5, 1.5, none], "max_prob by default");
    let own = reference("reduce", &with(&case, &[("kv_heads", "2"), ("method", "max_logit"), ("dtype", "f16")]));
    assert_eq!(own.tensor("scores"), (vec![1, 2, 3], logits.to_vec()));
    refuses("reduce", &case, &[("kv_heads", "0"), ("kv_heads", "3"), ("kv_heads", "x"), ("method", "mean"), ("top_p", "1")]);
    let bare = Case::default().floats("logits", &[1, 2, 3], &logits).floats("lse", &[1, 2], &[0.5, 3.0]);
    reference("reduce", &bare).fails(2, "no key kv_heads");
    reference("reduce", &case.clone().without("lse")).fails(2, "no tensor lse");
    reference("reduce", &replace(&case, "lse", &[2, 1], &[0.0; 2])).fails(2, "lse is [2, 1]");
    reference("reduce", &replace(&case, "logits", &[2, 3], &logits)).fails(2, "logits is [2, 3]");
}

fn bytes(r: &Run) -> i64 {
    r.tensor("decoded");
    let file = std::fs::read(r.dir.path().join("out.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    i64::from_le_bytes(file.tensor("bytes").unwrap().data().try_into().unwrap())
}

#[test]
fn encode_knows_every_codec() {
    let (n, d) = (70, 32);
    let x = Rng::new(4).normals(n * d, 3.0);
    let case = Case::default().floats("x", &[n, d], &x);
    let of = |keys: &[(&str, &str)]| reference("encode", &with(&case, keys));
    // Token-wise and channel-wise codes against their definition; f32 rows are not rounded before.
    for (codec, bits) in [("int8", 8), ("int4", 4), ("int2", 2)] {
        let mut expected = x.clone();
        affine(&mut expected, &(0..n * d).step_by(16).collect::<Vec<_>>(), 1, 16, bits);
        let r = of(&[("codec", codec), ("group", "16")]);
        close(&r.tensor("decoded").1, &expected, 1e-6);
        assert_eq!(bytes(&r), 70 * ((32 * i64::from(bits) / 8).max(16) + 8));
    }
    for (codec, bits) in [("int4-channel", 4), ("int2-channel", 2)] {
        let mut expected = x.clone();
        affine(&mut expected, &(0..d).chain(32 * d..33 * d).collect::<Vec<_>>(), d, 32, bits);
        let r = of(&[("codec", codec)]);
        close(&r.tensor("decoded").1, &expected, 1e-6);
        assert_eq!(r.tensor("decoded").1[64 * d..], x[64 * d..], "the unfinished group is exact");
        assert_eq!(bytes(&r), 64 * 16 + 2 * 4 * 32 + 6 * 4 * 32);
        let r = of(&[("codec", codec), ("dtype", "bf16"), ("group", "70")]);
        assert_eq!(bytes(&r), 70 * 16 + 4 * 32);
        assert_eq!(bytes(&of(&[("codec", codec), ("dtype", "f16"), ("group", "71")])), 70 * 2 * 32);
    }
    let mut expected: Vec<f32> = x.chunks(d).flat_map(turned).collect();
    affine(&mut expected, &(0..n * d).step_by(d).collect::<Vec<_>>(), 1, d, 4);
    let back: Vec<f32> = expected.chunks(d).flat_map(turned).collect();
    close(&of(&[("codec", "int4+hadamard")]).tensor("decoded").1, &back, 1e-5);
    let r = of(&[("codec", "fp8")]);
    close(&r.tensor("decoded").1, &x, 1.0 / 16.0);
    assert_eq!(bytes(&r), 70 * 32);
    let fp8 = |x: f32| kvlar_reference::decode_fp8(kvlar_reference::encode_fp8(x, 1.0), 1.0);
    assert!(r.tensor("decoded").1.iter().zip(&x).all(|(a, &b)| *a == fp8(b)));
    // Two centroids a sub-vector of 16: 1 and -1.
    let centroids = [[1.0; 16], [-1.0; 16]].concat().repeat(2);
    let r = reference("encode", &case.clone().key("codec", "pq").floats("codebooks", &[2, 2, 16], &centroids));
    let sign = |x: &[f32]| if x.iter().sum::<f32>() >= 0.0 { 1.0 } else { -1.0 };
    assert_eq!(r.tensor("decoded").1, x.chunks(16).flat_map(|s| [sign(s); 16]).collect::<Vec<_>>());
    assert_eq!(bytes(&r), 70 * 16);
    for name in ["encode", "decode"] {
        run(name, "reference", &with(&case, &[("codec", "pq")]), &[]).fails(2, "codebooks");
    }
    let rows = case.clone().key("codec", "pq").floats("codebooks", &[1, 2, 2, 16], &centroids);
    reference("encode", &rows).fails(2, "codebooks");
    refuses(
        "encode",
        &case.clone().key("codec", "int8"),
        &[("group", "5"), ("group", "0"), ("codec", "int8-channel"), ("sink_rows", "1")],
    );
    let odd = Case::default().floats("x", &[2, 12], &x[..24]).key("codec", "int8+hadamard");
    reference("encode", &odd).fails(2, "codec: hadamard: 12");
    for codec in ["bf16", "f16", "fp8", "int8", "int4", "int2", "int4+hadamard", "int4-channel", "int2-channel+hadamard"] {
        if let Some(kernels) = kernels() {
            let case = with(&case, &[("codec", codec), ("group", "16")]);
            let (on_cpu, emulated) = (reference("encode", &case), run("encode", kernels, &case, &[]));
            assert_eq!((on_cpu.tensor("decoded"), bytes(&on_cpu)), (emulated.tensor("decoded"), bytes(&emulated)), "{codec}");
        }
    }
}

#[test]
fn append_writes_every_token_wise_codec() {
    let (b, h, s, d) = (1, 2, 3, 16);
    let mut rng = Rng::new(5);
    let (k, v) = (rng.normals(b * h * s * d, 2.0), rng.normals(b * h * s * d, 2.0));
    let case = Case::default()
        .floats("k", &[b, h, s, d], &k)
        .floats("v", &[b, h, s, d], &v)
        .floats("inv_freq", &[0], &[])
        .ints("positions", &[b, s], &[0, 1, 2])
        .ints("slots", &[b, s], &[2, -1, 0]);
    let slotted = |x: &[f32]| -> Vec<f32> {
        x.chunks(s * d).flat_map(|rows| [&rows[2 * d..], &vec![0.0; d], &rows[..d]].concat()).collect()
    };
    let of = |keys: &[(&str, &str)]| reference("append", &with(&case, keys));
    for (codec, bits) in [("int8", 8), ("int4", 4), ("int2", 2)] {
        let r = of(&[("key_codec", codec), ("value_codec", &format!("{codec}+hadamard")), ("group", "8")]);
        let groups: Vec<usize> = (0..h * s * d).step_by(8).collect();
        let mut expected = to_bf16(&k);
        affine(&mut expected, &groups, 1, 8, bits);
        close(&r.tensor("k_decoded").1, &slotted(&expected), 1e-6);
        let mut expected: Vec<f32> = to_bf16(&v).chunks(d).flat_map(turned).collect();
        affine(&mut expected, &groups, 1, 8, bits);
        let back: Vec<f32> = expected.chunks(d).flat_map(turned).collect();
        close(&r.tensor("v_decoded").1, &slotted(&back), 1e-5);
    }
    let scaled = with(&case, &[("key_codec", "fp8"), ("value_codec", "fp8")]).floats("k_scale", &[h], &[0.5, 1e-3]);
    let fp8 = |x: f32, scale| kvlar_reference::decode_fp8(kvlar_reference::encode_fp8(x, scale), scale);
    let scale = |i: usize| if i / (s * d) == 0 { 0.5 } else { 1e-3 };
    let expected: Vec<f32> = to_bf16(&k).iter().enumerate().map(|(i, x)| fp8(*x, scale(i))).collect();
    let r = reference("append", &scaled);
    assert_eq!(r.tensor("k_decoded").1, slotted(&expected));
    assert_eq!(r.tensor("v_decoded").1, slotted(&to_bf16(&v).iter().map(|x| fp8(*x, 1.0)).collect::<Vec<_>>()));
    reference("append", &case.clone().floats("k_scale", &[h], &[1.0; 2])).fails(2, "k_scale: only fp8");
    reference("append", &with(&case, &[("value_codec", "fp8")]).floats("v_scale", &[h], &[1.0, 0.0])).fails(2, "v_scale: 0");
    refuses("append", &case, &[("key_codec", "int4-channel"), ("value_codec", "int2-channel+hadamard"), ("key_codec", "pq")]);
    refuses("append", &case, &[("key_codec", "int8-channel"), ("group", "5"), ("group", "0"), ("sink_rows", "1")]);
    let mut cases: Vec<Case> =
        ["int4", "int2", "int8+hadamard"].map(|c| with(&case, &[("value_codec", c), ("group", "8")])).into();
    cases.push(scaled);
    for (case, kernels) in cases.iter().filter_map(|case| Some((case, kernels()?))) {
        let (on_cpu, emulated) = (reference("append", case), run("append", kernels, case, &[]));
        for name in ["k_decoded", "v_decoded"] {
            assert_eq!(emulated.tensor(name).1, on_cpu.tensor(name).1);
        }
    }
}
