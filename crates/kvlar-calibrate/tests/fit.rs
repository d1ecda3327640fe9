//! Whole fits: `recalkv.md` §7 invariants 1 and 5, budgets, the ablation, presets, and every refusal.

use crate::common::{close, mixed, model, says};
use kvlar_calibrate::*;
use kvlar_reference::testing::Rng;

struct Data {
    model: ModelShape,
    moments: Vec<Moments>,
    /// Keys and values of each layer, [n, heads·dim].
    rows: Vec<[Vec<f32>; 2]>,
    out: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Data {
    /// `heads_of` shuffles the kv heads of the keys (and the query heads that read them).
    fn permuted(seed: u64, model: ModelShape, tokens: usize, heads_of: &[usize]) -> Self {
        let mut rng = Rng::new(seed);
        let s = model.layer;
        let mut data = Self { model, moments: Vec::new(), rows: Vec::new(), out: Vec::new(), values: Vec::new() };
        for layer in 0..model.layers {
            let w = rng.normals(s.kv_heads * s.value_dim * model.hidden, 0.2);
            let x = mixed(&mut rng, tokens, model.hidden, 12 + 6 * layer, 0.1);
            let v: Vec<f32> = x
                .chunks(model.hidden)
                .flat_map(|x| w.chunks(model.hidden).map(move |w| w.iter().zip(x).map(|(a, b)| a * b).sum()))
                .collect();
            let mut k = mixed(&mut rng, tokens, s.kv_heads * s.head_dim, 10 + 8 * layer, 0.1);
            k.iter_mut().enumerate().for_each(|(i, k)| *k += (i % 7) as f32); // keys have a mean
            let q = mixed(&mut rng, tokens, s.q_heads * s.head_dim, 20, 0.3);
            let shuffled = |rows: &[f32], per: usize, width: usize| -> Vec<f32> {
                let row = |r: &[f32]| {
                    heads_of.iter().flat_map(|h| r[h * per * width..(h + 1) * per * width].to_vec()).collect::<Vec<_>>()
                };
                rows.chunks(s.kv_heads * per * width).flat_map(row).collect()
            };
            let (k, q) = (shuffled(&k, 1, s.head_dim), shuffled(&q, s.heads_per_kv(), s.head_dim));
            let mut m = Moments::new(s).unwrap();
            m.add(&q, &k, &v).unwrap();
            data.moments.push(m);
            data.rows.push([k, v]);
            data.values.push(w);
            data.out.push(rng.normals(model.hidden * s.q_heads * s.value_dim, 1.0));
        }
        data
    }

    fn new(seed: u64, model: ModelShape, tokens: usize) -> Self {
        Self::permuted(seed, model, tokens, &(0..model.layer.kv_heads).collect::<Vec<_>>())
    }

    fn weights(&self) -> Weights<'_> {
        Weights { out: Some(&self.out), values: Some(&self.values) }
    }

    fn fit(&self, config: &RecalkvConfig) -> Result<(Plan, Report)> {
        self.fit_with(config, None)
    }

    fn fit_with(&self, config: &RecalkvConfig, importance: Option<&[[f64; 2]]>) -> Result<(Plan, Report)> {
        fit(config, &self.model, "m", &self.moments, importance, self.weights(), &mut |_, _| ())
    }
}

fn small() -> ModelShape {
    model(2, 8, 4, 16, 16)
}

fn config() -> RecalkvConfig {
    RecalkvConfig { multiple: 8, ..RecalkvConfig::default() }
}

/// Σ ‖y − ŷ‖² / Σ ‖y‖² of rows through a side.
fn relative_loss(side: &Side, y: &[f32]) -> f64 {
    let Side::LowRank(f) = side else { return 0.0 };
    let back = f.decode(&f.encode(y));
    let lost: f64 = y.iter().zip(&back).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    lost / y.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>()
}

#[test]
fn the_report_says_what_the_plan_does() {
    for (seed, center, hadamard) in [(0, false, false), (1, true, false), (2, true, true), (3, false, true)] {
        let data = Data::new(seed, small(), 300);
        for (latent, budget) in [
            (Latent::Model, Budget::Uniform),
            (Latent::Int8, Budget::Spectral),
            (Latent::Int4, Budget::Fixed { keys: 12, values: 9 }),
        ] {
            let c = RecalkvConfig { center, hadamard, latent_keys: latent, latent_values: latent, budget, kept: 0.3, ..config() };
            let mut seen = Vec::new();
            let progress = &mut |done, of| seen.push((done, of));
            let (plan, report) = fit(&c, &data.model, "m", &data.moments, None, data.weights(), progress).unwrap();
            let steps = if budget == Budget::Spectral { 4 } else { 2 };
            assert_eq!(seen, (1..=steps).map(|s| (s, steps)).collect::<Vec<_>>());
            assert_eq!((plan.format, plan.method.as_str(), plan.fingerprint.as_str()), (PLAN_FORMAT, "recalkv", "m"));
            for (l, layer) in plan.layers.iter().enumerate() {
                let r = &report.layers[l];
                for (side, said, y) in [(&layer.keys, &r.keys, &data.rows[l][0]), (&layer.values, &r.values, &data.rows[l][1])] {
                    let f = side.factors().unwrap();
                    assert_eq!((said.rank, &said.groups, said.bytes), (Some(f.rank), &f.groups, f.row_bytes()));
                    assert!(f.rank.is_multiple_of(8) && f.latent == latent);
                    assert!(
                        (said.discarded - relative_loss(side, y)).abs() < 1e-5,
                        "{} said, {} done",
                        said.discarded,
                        relative_loss(side, y)
                    );
                    assert!(said.discarded > 1e-6 && said.discarded < 0.5);
                    assert!(said.discarded_weighted <= said.discarded_natural * (1.0 + 1e-9));
                }
                assert_eq!(layer.keys.factors().unwrap().mean.is_some(), center);
                assert!(layer.values.factors().unwrap().mean.is_none());
                assert_eq!(r.keys.bytes + r.values.bytes, plan.layer_bytes_per_token(l));
            }
            assert_eq!(report.size.bytes_per_token, plan.bytes_per_token());
            close(report.size.kept, plan.bytes_per_token() / 512.0, 1e-12);
            assert_eq!((report.rows, report.size.fixed_bytes), (300, plan.fixed_bytes()));
            let text = report.to_string();
            assert!(text.lines().count() == 4 && text.contains("300 calibration tokens"), "{text}");
            assert_eq!(serde_json::from_str::<Report>(&serde_json::to_string(&report).unwrap()).unwrap().layers.len(), 2);
        }
    }
}

#[test]
fn the_mean_that_decoding_adds_makes_centred_pca() {
    let data = Data::new(4, small(), 200);
    let c =
        RecalkvConfig { center: true, weighting_keys: Weighting::None, budget: Budget::Fixed { keys: 8, values: 8 }, ..config() };
    let (plan, _) = data.fit(&c).unwrap();
    for (l, layer) in plan.layers.iter().enumerate() {
        let f = layer.keys.factors().unwrap();
        let keys = data.moments[l].keys();
        let least: f64 = f.groups.iter().map(|g| kvlar_calibrate::basis::tail_energy(keys, g, None, true, 8).unwrap()).sum();
        close(relative_loss(&layer.keys, &data.rows[l][0]), least / keys.energy(), 1e-5);
        // It is less than without the mean.
        let plain = data.fit(&RecalkvConfig { center: false, ..c.clone() }).unwrap().0;
        assert!(relative_loss(&layer.keys, &data.rows[l][0]) < relative_loss(&plain.layers[l].keys, &data.rows[l][0]));
    }
}

/// Invariant 1: at full rank nothing is lost, so neither is attention.
#[test]
fn full_rank_is_dense_or_exact() {
    let data = Data::new(5, small(), 200);
    for budget in [Budget::Uniform, Budget::Spectral, Budget::Fixed { keys: 32, values: 32 }] {
        let (plan, report) = data.fit(&RecalkvConfig { kept: 1.0, budget, ..config() }).unwrap();
        assert!(plan.layers.iter().all(|l| l.keys == Side::Dense && l.values == Side::Dense), "{budget:?}");
        assert_eq!((report.size.kept, report.size.fixed_bytes), (1.0, 0));
        assert!(report.to_string().contains("dense"));
    }
    for (weighting_keys, weighting_values) in [(Weighting::None, Weighting::None), (Weighting::Query, Weighting::Output)] {
        let c = RecalkvConfig {
            budget: Budget::Fixed { keys: 32, values: 32 },
            latent_keys: Latent::Int8,
            latent_values: Latent::Int8,
            weighting_keys,
            weighting_values,
            center: true,
            ..config()
        };
        let (plan, _) = data.fit(&c).unwrap();
        for (l, layer) in plan.layers.iter().enumerate() {
            assert!(relative_loss(&layer.keys, &data.rows[l][0]) < 1e-9);
            assert!(relative_loss(&layer.values, &data.rows[l][1]) < 1e-9);
        }
    }
}

/// Invariant 5: renaming heads renames the plan.
#[test]
fn a_permutation_of_heads_permutes_the_plan() {
    let order = [2, 0, 3, 1]; // new head i is old head order[i]
    for grouping in [Grouping::Greedy, Grouping::Best] {
        let c = RecalkvConfig { grouping, kept: 0.4, ..config() };
        let (plain, _) = Data::new(6, small(), 300).fit(&c).unwrap();
        let data = Data::permuted(6, small(), 300, &order);
        let (turned, _) = data.fit(&c).unwrap();
        for (l, (a, b)) in plain.layers.iter().zip(&turned.layers).enumerate() {
            let (a, b) = (a.keys.factors().unwrap(), b.keys.factors().unwrap());
            let renamed = |g: &Vec<usize>| g.iter().map(|h| order[*h]).collect();
            assert_eq!(grouping::canonical(b.groups.iter().map(renamed).collect()), a.groups, "{grouping:?}");
            // The same rows come back, under their new names.
            let rows = &data.rows[l][0];
            let old: Vec<f32> = rows
                .chunks(64)
                .flat_map(|r| {
                    (0..4)
                        .flat_map(|h| {
                            let at = order.iter().position(|o| *o == h).unwrap();
                            r[at * 16..(at + 1) * 16].to_vec()
                        })
                        .collect::<Vec<_>>()
                })
                .collect();
            let (x, y) = (a.decode(&a.encode(&old)), b.decode(&b.encode(rows)));
            for (i, y) in y.iter().enumerate() {
                close(x[i / 64 * 64 + order[i % 64 / 16] * 16 + i % 16], *y, 1e-4);
            }
        }
    }
}

#[test]
fn ranks_follow_the_budget() {
    let data = Data::new(7, small(), 200);
    let ranks = |c: &RecalkvConfig, importance: Option<&[[f64; 2]]>| -> Vec<[Option<usize>; 2]> {
        let (plan, report) = data.fit_with(c, importance).unwrap();
        close(report.size.kept, plan.bytes_per_token() / plan.dense_bytes_per_token(), 1e-15);
        plan.layers.iter().map(|l| [&l.keys, &l.values].map(|s| s.factors().map(|f| f.rank))).collect()
    };
    let uniform = RecalkvConfig { kept: 0.5, ..config() };
    assert_eq!(ranks(&uniform, None), [[Some(16); 2]; 2]);
    // 8 bit: 32 bytes for a group of r + 4: r = 28, halfway, so the even multiple.
    let int8 = RecalkvConfig { latent_keys: Latent::Int8, ..uniform.clone() };
    assert_eq!(ranks(&int8, None), [[Some(32), Some(16)]; 2]);
    // 64 ranks a matrix, 128 of 256 dealt out 1 : 3 : 4 : 8 → 8, 24, 32, 64 → halved for two groups; the last is full.
    let fisher = RecalkvConfig { budget: Budget::Proportional, ..uniform.clone() };
    assert_eq!(ranks(&fisher, Some(&[[1.0, 3.0], [4.0, 8.0]])), [[Some(8), Some(16)], [Some(16), None]]);
    // Groups of four key heads; each value head alone.
    let wide = RecalkvConfig { key_group: 4, value_group: 1, ..uniform.clone() };
    assert_eq!(ranks(&wide, None), [[Some(32), Some(8)]; 2]);
    let spectral = RecalkvConfig { budget: Budget::Spectral, kept: 0.4, multiple: 2, ..config() };
    let (plan, report) = data.fit(&spectral).unwrap();
    assert!(plan.bytes_per_token() <= 0.4 * plan.dense_bytes_per_token() && report.size.kept > 0.3);
    // Its sum of weighted relative losses is less than that of uniform ranks of as many bytes.
    let (_, same) = data.fit(&RecalkvConfig { budget: Budget::Uniform, kept: 0.25, ..spectral.clone() }).unwrap();
    let (_, best) = data.fit(&RecalkvConfig { kept: same.size.kept, ..spectral }).unwrap();
    let sum = |r: &Report| r.layers.iter().map(|l| l.keys.discarded_weighted + l.values.discarded_weighted).sum::<f64>();
    assert!(best.size.kept <= same.size.kept && sum(&best) < sum(&same), "{} against {}", sum(&best), sum(&same));
}

/// "Neither, HSR, OVC, both" of the paper's table 3.
#[test]
fn the_ablation_can_be_expressed_and_each_part_helps() {
    for seed in 0..3 {
        let data = Data::new(10 + seed, small(), 300);
        let arm = |grouping, values| {
            let c = RecalkvConfig {
                grouping,
                values,
                weighting_values: Weighting::None,
                weighting_keys: Weighting::None,
                kept: 0.25,
                ..config()
            };
            let (_, report) = data.fit(&c).unwrap();
            let sum = |of: fn(&LayerReport) -> f64| report.layers.iter().map(of).sum::<f64>();
            (sum(|l| l.keys.discarded), sum(|l| l.values.discarded))
        };
        let neither = arm(Grouping::Natural, ValueFit::WeightSvd);
        let hsr = arm(Grouping::Best, ValueFit::WeightSvd);
        let ovc = arm(Grouping::Natural, ValueFit::Alternating { rounds: 1 });
        let both = arm(Grouping::Best, ValueFit::Alternating { rounds: 1 });
        let closed = arm(Grouping::Best, ValueFit::Closed);
        assert!(hsr.0 <= neither.0 && hsr.1 == neither.1);
        assert!(ovc.1 < neither.1 && ovc.0 == neither.0);
        assert_eq!(both, (hsr.0, ovc.1));
        assert!(closed.1 <= both.1 * (1.0 + 1e-9));
        let settled = arm(Grouping::Best, ValueFit::Alternating { rounds: 300 });
        assert!((settled.1 - closed.1).abs() <= 0.02 * closed.1, "{} and {}", settled.1, closed.1);
        assert_eq!(arm(Grouping::Best, ValueFit::Alternating { rounds: 0 }), hsr);
    }
}

#[test]
fn groups_of_a_plan_stay_inside_shards() {
    let data = Data::new(20, model(1, 8, 8, 8, 8), 200);
    let c = RecalkvConfig { shards: 2, value_grouping: Grouping::Best, grouping: Grouping::Greedy, ..config() };
    let (plan, _) = data.fit(&c).unwrap();
    for side in [&plan.layers[0].keys, &plan.layers[0].values] {
        let groups = &side.factors().unwrap().groups;
        assert!(groups.iter().all(|g| g.iter().all(|h| h / 4 == g[0] / 4)), "{groups:?}");
    }
}

#[test]
fn few_tokens_give_finite_padded_factors() {
    let data = Data::new(21, small(), 3);
    for c in [
        config(),
        RecalkvConfig { values: ValueFit::Alternating { rounds: 2 }, center: true, latent_keys: Latent::Int4, ..config() },
    ] {
        let (plan, _) = data.fit(&c).unwrap();
        for (l, layer) in plan.layers.iter().enumerate() {
            assert_eq!(layer.keys.factors().unwrap().rank % 8, 0);
            assert!(relative_loss(&layer.keys, &data.rows[l][0]) < 1e-8, "three rows fit into any rank");
            let dir = tempfile::tempdir().unwrap();
            plan.write(&dir.path().join("p")).unwrap(); // refuses what is not finite
        }
    }
}

#[test]
fn the_same_input_gives_the_same_plan() {
    let data = Data::new(22, small(), 150);
    let c = RecalkvConfig { budget: Budget::Spectral, ..config() };
    let (first, _) = data.fit(&c).unwrap();
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(one.install(|| data.fit(&c).unwrap().0), first);
}

#[test]
fn an_8_bit_basis_needs_8_bit_latents() {
    let c = RecalkvConfig { key_basis: KeyBasis::Int8, latent_values: Latent::Int8, ..config() };
    says(c.check(&small()), &["key_basis", "8-bit"]);
    RecalkvConfig { latent_keys: Latent::Int8, ..c }.check(&small()).unwrap();
}

#[test]
fn presets_clamp_to_the_model() {
    let llama3 = LayerShape { q_heads: 32, kv_heads: 8, head_dim: 128, value_dim: 128 };
    for (preset, group, ranks, kept) in [
        (Preset::Speed, 2, (64, 128), 0.375),
        (Preset::Quality, 2, (128, 192), 328.0 / 1024.0),
        (Preset::Capacity, 4, (128, 256), 392.0 / 2048.0),
    ] {
        let c = preset.config(&llama3, 1);
        assert_eq!((c.key_group, c.value_group), (group, group));
        assert_eq!(c.budget, Budget::Fixed { keys: ranks.0, values: ranks.1 });
        close(c.kept, kept, 1e-12);
        c.check(&ModelShape { layer: llama3, ..model(1, 32, 8, 128, 128) }).unwrap();
        // Odd heads, one head, tiny heads: still settings that fit.
        for (q, kv, d) in [(9, 3, 64), (4, 1, 80), (6, 6, 16)] {
            let data = Data::new(30, ModelShape { hidden: 32, ..model(1, q, kv, d, d) }, 20);
            let (plan, report) = data.fit(&preset.config(&data.model.layer, 1)).unwrap();
            assert!(report.size.kept <= 1.0 && plan.layers.len() == 1);
        }
    }
}

#[test]
fn presets_keep_groups_inside_shards() {
    let llama3 = LayerShape { q_heads: 32, kv_heads: 8, head_dim: 128, value_dim: 128 };
    for (preset, shards, group) in [
        (Preset::Capacity, 2, 4),
        (Preset::Capacity, 4, 2),
        (Preset::Capacity, 8, 1),
        (Preset::Speed, 4, 2),
        (Preset::Quality, 8, 1),
    ] {
        let c = preset.config(&llama3, shards);
        assert_eq!((c.key_group, c.value_group, c.shards), (group, group, shards), "{preset:?} in {shards}");
        c.check(&ModelShape { layer: llama3, ..model(1, 32, 8, 128, 128) }).unwrap();
    }
    // The largest divisor of a shard's heads: 3 of 6, not 2.
    let nine = LayerShape { q_heads: 18, kv_heads: 18, head_dim: 64, value_dim: 64 };
    assert_eq!(Preset::Capacity.config(&nine, 2).key_group, 3);
    // Shards that do not divide the heads are for the check to refuse.
    for shards in [0, 3, 100] {
        let c = Preset::Speed.config(&llama3, shards);
        says(c.check(&ModelShape { layer: llama3, ..model(1, 32, 8, 128, 128) }), &["shards"]);
    }
}

/// What one attention can read: 8-bit values need 8-bit keys, though a budget would leave those dense.
#[test]
fn keys_beside_quantized_values_are_never_dense() {
    let data = Data::new(23, small(), 200);
    let int8 = RecalkvConfig { latent_keys: Latent::Int8, latent_values: Latent::Int8, ..config() };
    // Keys get the whole of a layer, values a little.
    let fisher = RecalkvConfig { budget: Budget::Proportional, kept: 0.6, ..int8.clone() };
    let (plan, report) = data.fit_with(&fisher, Some(&[[100.0, 1.0], [100.0, 1.0]])).unwrap();
    for (layer, report) in plan.layers.iter().zip(&report.layers) {
        let (k, v) = (layer.keys.factors().expect("dense keys"), layer.values.factors().unwrap());
        assert_eq!((k.rank, k.latent, v.latent), (32, Latent::Int8, Latent::Int8));
        assert_eq!((report.keys.rank, report.keys.bytes), (Some(32), 2 * 36));
    }
    for (l, layer) in plan.layers.iter().enumerate() {
        assert!(relative_loss(&layer.keys, &data.rows[l][0]) < 1e-9);
    }
    // Nothing has to be quantized where values are not, or are dense.
    let plain = RecalkvConfig { latent_values: Latent::Model, latent_keys: Latent::Model, ..fisher };
    let (plan, _) = data.fit_with(&plain, Some(&[[100.0, 1.0], [100.0, 1.0]])).unwrap();
    assert!(plan.layers.iter().all(|l| l.keys == Side::Dense && l.values != Side::Dense));
    let (plan, _) = data.fit(&RecalkvConfig { kept: 1.0, ..int8.clone() }).unwrap();
    assert!(plan.layers.iter().all(|l| l.keys == Side::Dense && l.values == Side::Dense));
    // Heads of 4 in steps of 64: latents of keys would take more than the keys do, those of values do not.
    let tiny = Data::new(24, ModelShape { hidden: 32, ..model(1, 8, 4, 4, 64) }, 200);
    for budget in [Budget::Spectral, Budget::Uniform, Budget::Fixed { keys: 8, values: 8 }] {
        let c = RecalkvConfig { multiple: 64, kept: 0.6, budget, ..int8.clone() };
        let (plan, report) = tiny.fit(&c).unwrap();
        assert_eq!(plan.layers[0].keys.factors().expect("dense keys").rank, 64);
        assert_eq!(report.layers[0].keys.bytes, 2 * 68);
        assert!(plan.layers[0].values != Side::Dense);
    }
    let mixed = RecalkvConfig { latent_keys: Latent::Int4, ..int8 };
    says(data.fit(&mixed), &["latent_values", "Int8 beside Int4"]);
}

#[test]
fn every_wrong_setting_is_named() {
    let data = Data::new(40, small(), 20);
    type Edit = fn(&mut RecalkvConfig);
    let cases: &[(Edit, &[&str])] = &[
        (|c| c.kept = 0.0, &["kept", "0 is outside (0, 1]"]),
        (|c| c.kept = 1.1, &["kept"]),
        (|c| c.kept = f64::NAN, &["kept"]),
        (|c| c.key_group = 3, &["key_group", "3 does not divide the 4"]),
        (|c| c.value_group = 0, &["value_group"]),
        (|c| c.shards = 3, &["shards", "3 does not divide 4"]),
        (|c| (c.shards, c.key_group) = (4, 2), &["key_group", "1 kv heads of a shard"]),
        (|c| c.multiple = 0, &["multiple", "0 is no step"]),
        (|c| c.multiple = 65537, &["multiple", "65537"]),
        (|c| c.multiple = usize::MAX, &["multiple"]),
        (|c| c.latent_values = Latent::Int8, &["latent_values", "Int8 beside Model"]),
        (|c| c.weighting_keys = Weighting::Output, &["weighting_keys"]),
        (|c| c.weighting_values = Weighting::Query, &["weighting_values"]),
        (|c| c.budget = Budget::Proportional, &["importance", "2 layers"]),
        (|c| c.budget = Budget::Fixed { keys: 33, values: 8 }, &["rank", "33 for keys", "1..=32"]),
        (|c| c.budget = Budget::Fixed { keys: 8, values: 0 }, &["rank", "0 for values"]),
    ];
    for (edit, words) in cases {
        let mut c = config();
        edit(&mut c);
        says(data.fit(&c), words);
    }
    let fisher = RecalkvConfig { budget: Budget::Proportional, ..config() };
    says(data.fit_with(&fisher, Some(&[[1.0, 1.0]])), &["importance"]);
    says(data.fit_with(&fisher, Some(&[[1.0, 1.0], [f64::NAN, 1.0]])), &["importance", "NaN"]);
    says(data.fit_with(&fisher, Some(&[[0.0; 2]; 2])), &["importance", "sum to 0"]);
    let run = |moments: &[Moments], weights: Weights<'_>, c: &RecalkvConfig| {
        fit(c, &data.model, "m", moments, None, weights, &mut |_, _| ())
    };
    says(run(&data.moments[..1], data.weights(), &config()), &["moments", "1 layers", "2"]);
    let empty = [Moments::new(data.model.layer).unwrap(), data.moments[1].clone()];
    says(run(&empty, data.weights(), &config()), &["layer 0", "no rows"]);
    let other = Moments::new(LayerShape { head_dim: 8, ..data.model.layer }).unwrap();
    says(run(&[data.moments[0].clone(), other], data.weights(), &config()), &["moments", "layer 1"]);
    says(run(&data.moments, Weights::default(), &config()), &["out_weight"]);
    let svd = RecalkvConfig { values: ValueFit::WeightSvd, ..config() };
    says(run(&data.moments, Weights { values: None, ..data.weights() }, &svd), &["value_weight"]);
    says(run(&data.moments, Weights { out: Some(&data.out[..1]), values: None }, &config()), &["out_weight", "1 layers"]);
    let mut broken = data.out.clone();
    broken[1][5] = f32::NAN;
    says(run(&data.moments, Weights { out: Some(&broken), values: None }, &config()), &["out_weight of layer 1", "NaN"]);
    broken[1].pop();
    says(run(&data.moments, Weights { out: Some(&broken), values: None }, &config()), &["out_weight of layer 1", "elements"]);
    let odd = ModelShape { rope: RopePairs { rotary_dim: 17, layout: PairLayout::Half }, ..data.model };
    says(fit(&config(), &odd, "m", &data.moments, None, data.weights(), &mut |_, _| ()), &["rotary_dim", "17"]);
}
