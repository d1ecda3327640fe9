//! Samples of keys, and plans of product-quantized keys fitted to them.

use crate::common::{model, says};
use kvlar_calibrate::{
    CodebookConfig, FitConfig, KeySample, Plan, PqConfig, Quantized, QuantizedCodec, QuantizedFormat, Side, fit_codebooks, fit_pq,
};
use kvlar_reference::testing::Rng;

/// A sample of all rows.
fn sample(k: &[f32], heads: usize, dim: usize) -> KeySample {
    let mut sample = KeySample::new(heads, dim, k.len() / (heads * dim), 0, 0).unwrap();
    sample.add(k).unwrap();
    sample
}

#[test]
fn a_sample_holds_each_row_as_likely_as_any_other() {
    // Rows that say which they are, added in uneven parts.
    let (most, n) = (40, 400);
    let rows: Vec<f32> = (0..n).flat_map(|i| [i as f32, -(i as f32)]).collect();
    let mut held = vec![0usize; n];
    for seed in 0..300 {
        let mut s = KeySample::new(2, 1, most, seed, 0).unwrap();
        let (first, rest) = rows.split_at(2 * (most - 3));
        s.add(first).unwrap();
        assert_eq!((s.len(), s.rows()), (most - 3, first), "all rows while there is room");
        rest.chunks(2 * 17).for_each(|part| s.add(part).unwrap());
        assert_eq!((s.len(), s.seen(), s.shape()), (most, n as u64, (2, 1)));
        for row in s.rows().chunks(2) {
            assert_eq!(row[0], -row[1], "rows stay whole");
            held[row[0] as usize] += 1;
        }
    }
    // 300 draws of 1 in 10: 30 each, standard deviation 5.2; by tenths of the text 1200, standard deviation 31.
    assert!(held.iter().all(|n| (8..=56).contains(n)), "{held:?}");
    for (i, tenth) in held.chunks(40).enumerate() {
        let sum: usize = tenth.iter().sum();
        assert!((1050..=1350).contains(&sum), "tenth {i}: {sum}");
    }
}

#[test]
fn samples_repeat_and_layers_draw_apart() {
    let rows = Rng::new(1).normals(300 * 4, 1.0);
    let of = |seed, layer, parts: usize| {
        let mut s = KeySample::new(2, 2, 50, seed, layer).unwrap();
        rows.chunks(4 * parts).for_each(|part| s.add(part).unwrap());
        s.rows().to_vec()
    };
    assert_eq!(of(3, 1, 300), of(3, 1, 7));
    assert_ne!(of(3, 1, 300), of(4, 1, 300));
    assert_ne!(of(3, 1, 300), of(3, 2, 300));
}

#[test]
fn bad_rows_are_named_and_nothing_is_added() {
    let mut s = KeySample::new(2, 3, 10, 0, 0).unwrap();
    s.add(&[0.5; 12]).unwrap();
    says(s.add(&[0.5; 13]), &["k: 13 elements", "[n, heads, dim]"]);
    for bad in [f32::NAN, f32::NEG_INFINITY] {
        let mut k = [1.0; 18];
        k[8] = bad;
        says(s.add(&k), &["k: row 1", &bad.to_string()]);
    }
    assert_eq!((s.len(), s.seen(), s.rows()), (2, 2, &[0.5; 12][..]));
    for (heads, dim, most) in [(0, 3, 10), (2, 0, 10), (2, 3, 0)] {
        says(KeySample::new(heads, dim, most, 0, 0), &["sample", "nothing to keep"]);
    }
}

#[test]
fn a_plan_holds_the_codebooks_of_each_layer() {
    let (heads, dim, n) = (2, 8, 200);
    let model = model(2, 4, heads, dim, 6);
    let k: Vec<Vec<f32>> = (0..2).map(|l| Rng::new(l).normals(n * heads * dim, 1.0 + l as f32)).collect();
    let samples: Vec<KeySample> = k.iter().map(|k| sample(k, heads, dim)).collect();
    let config = PqConfig { seed: 5, sink_rows: 3, recent_rows: 9, ..PqConfig::new(4, 16) };
    let mut steps = Vec::new();
    let (plan, report) = fit_pq(&config, &model, "abc", &samples, &mut |done, of| steps.push((done, of))).unwrap();
    assert_eq!(steps, [(1, 2), (2, 2)]);
    assert_eq!((plan.method.as_str(), plan.fingerprint.as_str()), ("pq", "abc"));
    assert_eq!((plan.sink_rows, plan.recent_rows, &plan.config), (3, 9, &FitConfig::Pq(config.clone())));
    for (l, (layer, k)) in plan.layers.iter().zip(&k).enumerate() {
        let settings = CodebookConfig { centroids: 16, seed: 5, ..CodebookConfig::new(4) };
        let books = fit_codebooks(k, heads, dim, &settings).unwrap();
        let format = QuantizedFormat::from(QuantizedCodec::Pq { subvectors: 4, centroids: 16 });
        assert_eq!(layer.keys, Side::Quantized(Quantized { format, codebooks: Some(books.values) }));
        assert_eq!(layer.values, Side::Quantized(QuantizedFormat::from(QuantizedCodec::Int4).into()));
        let report = &report.layers[l];
        // Variance of a head: that of 8 numbers; what is lost is a known part of it.
        for (head, relative) in report.heads.iter().enumerate() {
            let own: Vec<&[f32]> = k.chunks(dim).skip(head).step_by(heads).collect();
            let mean = |i: usize| own.iter().map(|x| f64::from(x[i])).sum::<f64>() / n as f64;
            let spread = |i: usize| own.iter().map(|x| (f64::from(x[i]) - mean(i)).powi(2)).sum::<f64>() / n as f64;
            let variance: f64 = (0..dim).map(spread).sum();
            assert!((relative - books.error[head] / variance).abs() < 1e-12);
            assert!((0.02..0.3).contains(relative), "{relative}");
        }
        assert!(report.heads[0].min(report.heads[1]) <= report.error && report.error <= report.heads[0].max(report.heads[1]));
        assert_eq!((report.layer, report.key_bytes, report.value_bytes), (l, 2 * 16, 2 * (16 + 4)));
    }
    assert_eq!((report.rows, report.fitted_rows), (n as u64, n));
    assert_eq!(report.size.bytes_per_token, 2.0 * 72.0);
    assert_eq!(report.size.fixed_bytes, 2 * 4 * heads * 16 * dim);
    assert_eq!(report.size.kept, plan.bytes_per_token() / plan.dense_bytes_per_token());
    let text = report.to_string();
    assert!(text.contains("200 calibration tokens, 200 fitted to") && text.lines().count() == 4, "{text}");
    // A file of it is read back whole.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pq.safetensors");
    plan.write(&path).unwrap();
    assert_eq!(Plan::read(&path).unwrap(), plan);
    // The same again; another seed makes another plan.
    let again = |config: &PqConfig| fit_pq(config, &model, "abc", &samples, &mut |_, _| ()).unwrap().0;
    assert_eq!(again(&config), plan);
    assert_ne!(again(&PqConfig { seed: 6, ..config }).layers, plan.layers);
}

#[test]
fn keys_that_do_not_vary_lose_nothing() {
    let samples = [sample(&[0.3; 20 * 4], 1, 4)];
    let config = PqConfig { values: None, ..PqConfig::new(2, 8) };
    let (plan, report) = fit_pq(&config, &model(1, 1, 1, 4, 4), "abc", &samples, &mut |_, _| ()).unwrap();
    assert_eq!((report.layers[0].error, report.layers[0].heads[0]), (0.0, 0.0));
    assert_eq!(plan.layers[0].values, Side::Dense);
    assert_eq!(plan.layer_bytes_per_token(0), 16 + 8);
}

#[test]
fn settings_and_samples_that_do_not_fit_are_named() {
    let model = model(1, 4, 2, 8, 6);
    let rows = Rng::new(1).normals(40 * 16, 1.0);
    let good = [sample(&rows, 2, 8)];
    let fit = |config: PqConfig, samples: &[KeySample]| fit_pq(&config, &model, "abc", samples, &mut |_, _| ());
    assert!(fit(PqConfig::new(4, 40), &good).is_ok());
    says(fit(PqConfig::new(3, 16), &good), &["m: 3", "8 dimensions"]);
    says(fit(PqConfig::new(0, 16), &good), &["m: 0"]);
    says(fit(PqConfig::new(4, 0), &good), &["c: 0", "1 to 256"]);
    says(fit(PqConfig::new(4, 257), &good), &["c: 257"]);
    says(fit(PqConfig::new(4, 41), &good), &["rows: 40 rows of layer 0 for 41 centroids", "more text"]);
    says(fit(PqConfig { rows: 15, ..PqConfig::new(4, 16) }, &good), &["rows: 15 rows for 16 centroids"]);
    says(fit(PqConfig::new(4, 16), &[]), &["samples: 0 layers", "1"]);
    says(fit(PqConfig::new(4, 16), &[sample(&rows, 4, 4)]), &["samples: layer 0", "(4, 4)"]);
    let values = |codec| PqConfig { values: Some(QuantizedFormat { group: Some(4), ..codec }), ..PqConfig::new(4, 16) };
    says(fit(values(QuantizedCodec::Int4.into()), &good), &["values", "a group of 4 does not divide 6"]);
    let pq = QuantizedCodec::Pq { subvectors: 2, centroids: 4 };
    says(fit(PqConfig { values: Some(pq.into()), ..PqConfig::new(4, 16) }, &good), &["values", "keys alone"]);
    let turned = QuantizedFormat { hadamard: true, ..QuantizedCodec::Int4.into() };
    says(fit(PqConfig { values: Some(turned), ..PqConfig::new(4, 16) }, &good), &["values: 6 values", "power of two"]);
}
