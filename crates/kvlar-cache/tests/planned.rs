//! Plans that calibration writes: layers that are dense in part, sizes that are not those of the cache, what is allocated.

use crate::devices::{on_every_device, tolerance_of_latents};
use crate::lab::{DIM, HEADS, Lab, Q_HEADS, config, exact_plan, latents, plan};
use kvlar::{Codec, Device};
use kvlar_cache::{BatchShape, Cache};
use kvlar_calibrate::{Factors, Latent, LayerPlan, Plan, Side};

on_every_device!(dense_keys_beside_low_rank_values, a_batch_counts_every_work_list);

/// Heads of 16 dimensions: their keys are latents of 32, the least that kernels take, and half of it is zeros.
fn dense_keys_beside_low_rank_values(device: &Device) {
    let stream = device.stream().unwrap();
    let mut p = exact_plan(0.5, (5, 7));
    p.layers[0].keys = Side::Dense;
    p.layers[1] = LayerPlan { keys: latents(0.5), values: latents(0.5) };
    let cache = Cache::planned(device, &stream, config(Codec::F16, 6), &p).unwrap();
    // What the plan says is what is stored and held: padding and the identity included.
    assert_eq!(cache.bytes_per_token() as f64, p.bytes_per_token());
    assert_eq!(cache.bytes_per_token(), (2 * HEADS * 32 + 2 * HEADS * DIM) + 2 * 2 * HEADS * DIM);
    assert_eq!(cache.fixed_bytes(), p.fixed_bytes());
    let mut lab = Lab::of(stream, cache, Codec::F16, tolerance_of_latents(device));
    (lab.factor, lab.exact, lab.dense_keys) = (0.5, (5, 7, 0), Some(0));
    lab.dense_values = None;
    let a = lab.create();
    for n in [8, 8, 8, 3, 1] {
        lab.extend(&[(a, n)]).unwrap();
    }
}

#[test]
fn plans_of_other_sizes_are_refused_whatever_they_keep() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let dense = || LayerPlan { keys: Side::Dense, values: Side::Dense };
    let refused = |change: &dyn Fn(&mut Plan), words: &[&str]| {
        let mut p = Plan { layers: vec![dense(), dense()], ..plan() };
        Cache::planned(&device, &stream, config(Codec::F16, 4), &p).unwrap();
        change(&mut p);
        let e = Cache::planned(&device, &stream, config(Codec::F16, 4), &p).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{e:?} does not say {words:?}");
    };
    refused(&|p| p.model.layer.kv_heads = 4, &["4 kv heads", "the cache has 2"]);
    refused(&|p| p.model.layer.head_dim = 32, &["keys of 32", "16"]);
    refused(&|p| p.model.layer.value_dim = 8, &["values of 8", "16"]);
    refused(&|p| p.layers.push(dense()), &["3 layers", "2"]);
}

/// Layers whose heads form other sets need another work list.
fn a_batch_counts_every_work_list(device: &Device) {
    let stream = device.stream().unwrap();
    let bytes = |second: Side| {
        let mut p = plan();
        p.layers = vec![LayerPlan { keys: latents(1.0), values: Side::Dense }, LayerPlan { keys: second, values: Side::Dense }];
        let cache = Cache::planned(device, &stream, config(Codec::F16, 4), &p).unwrap();
        let batch = cache.batch(BatchShape::new(2, 1, Q_HEADS)).unwrap();
        batch.bytes() - batch.workspace().size().bytes()
    };
    let alone = Side::LowRank(Factors {
        groups: (0..HEADS).map(|h| vec![h]).collect(),
        rank: 32,
        basis: vec![0.0; HEADS * DIM * 32],
        encoder: vec![0.0; HEADS * DIM * 32],
        mean: None,
        latent: Latent::Model,
    });
    let (one, two) = (bytes(latents(1.0)), bytes(alone));
    assert!(two > one, "two work lists take {two} bytes, one {one}");
    let mixed = bytes(Side::Dense);
    assert!(mixed > one, "a list for the dense layer, too, and yet {mixed} bytes instead of {one}");
}
