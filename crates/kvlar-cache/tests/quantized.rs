//! Plans whose layers keep codes, each in its own format; and keys that are read back.

use crate::devices::on_every_device;
use crate::lab::{DIM, HEADS, LAYERS, Lab, Q_HEADS, config, exact_plan, latents, plan, row};
use kvlar::{Codec, Device, Format};
use kvlar_cache::{BatchShape, Cache, CacheConfig, CacheError};
use kvlar_calibrate::{FitConfig, LayerPlan, Plan, Quantized, QuantizedCodec, QuantizedFormat, Side};
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{Rope, RopeLayout, RopeScaling};

on_every_device!(
    layers_of_a_plan_are_those_of_a_cache_of_their_formats,
    batches_are_used_again,
    keys_in_codebooks_are_their_centroids,
    keys_are_read_back_as_they_are_stored,
    keys_of_latents_are_rebuilt_where_they_are_not_exact,
);

fn anything() -> Tolerance {
    Tolerance { absolute: f64::MAX, relative: 0.0, cosine: 2.0 }
}

fn side(format: impl Into<QuantizedFormat>) -> Side {
    Side::Quantized(format.into().into())
}

fn quantized(layers: [(Side, Side); LAYERS]) -> Plan {
    let layers = layers.into_iter().map(|(keys, values)| LayerPlan { keys, values }).collect();
    Plan { method: "quantized".into(), config: FitConfig::Chosen, layers, ..plan() }
}

/// Formats of plans, and what caches call them.
fn pairs() -> Vec<[(QuantizedFormat, Format); 2]> {
    let turned = |q: QuantizedCodec, codec: Codec| {
        (QuantizedFormat { hadamard: true, ..q.into() }, Format { hadamard: true, ..codec.into() })
    };
    let plain = |q: QuantizedCodec, codec: Codec| (q.into(), codec.into());
    vec![
        [plain(QuantizedCodec::Int8, Codec::Int8), plain(QuantizedCodec::Int8, Codec::Int8)],
        [turned(QuantizedCodec::Int4, Codec::Int4), plain(QuantizedCodec::Int2, Codec::Int2)],
        [plain(QuantizedCodec::Fp8, Codec::Fp8), plain(QuantizedCodec::Fp8, Codec::Fp8)],
        [plain(QuantizedCodec::Int4, Codec::Int4), plain(QuantizedCodec::Int8, Codec::Int8)],
    ]
}

/// Outputs of each layer in a few steps.
fn outputs(device: &Device, cache: Cache) -> Vec<Vec<f32>> {
    let mut lab = Lab::of(device.stream().unwrap(), cache, Codec::F16, anything());
    let (a, b) = (lab.create(), lab.create());
    let mut all = vec![Vec::new(); LAYERS];
    for new in [[(a, 20), (b, 3)], [(a, 1), (b, 1)], [(a, 4), (b, 9)]] {
        lab.extend(&new).unwrap();
        all.iter_mut().zip(&lab.outputs).for_each(|(all, out)| all.extend(out));
    }
    all
}

/// A plan's layers are what a cache made with their formats keeps, bit for bit, whatever the other layer is.
fn layers_of_a_plan_are_those_of_a_cache_of_their_formats(device: &Device) {
    let stream = device.stream().unwrap();
    let of_formats = |[keys, values]: [Format; 2]| {
        let cache = Cache::new(device, CacheConfig { keys, values, ..config(Codec::F16, 12) }).unwrap();
        (cache.bytes_per_token() / LAYERS, outputs(device, cache))
    };
    let all: Vec<_> = pairs().iter().map(|[k, v]| of_formats([k.1, v.1])).collect();
    let dense = of_formats([Codec::F16.into(), Codec::F16.into()]);
    for (first, second) in [(0, 0), (1, 0), (2, 3), (3, 1)] {
        let layer = |i: usize| (side(pairs()[i][0].0), side(pairs()[i][1].0));
        let p = quantized([layer(first), layer(second)]);
        let cache = Cache::planned(device, &stream, config(Codec::F16, 12), &p).unwrap();
        assert_eq!(cache.bytes_per_token(), all[first].0 + all[second].0);
        assert_eq!(cache.bytes_per_token() as f64, p.bytes_per_token());
        assert_eq!((cache.fixed_bytes(), p.fixed_bytes(), cache.rollback_rows()), (0, 0, usize::MAX));
        let got = outputs(device, cache);
        assert_eq!(got[0], all[first].1[0], "layer 0 of {first}, {second}");
        assert_eq!(got[1], all[second].1[1], "layer 1 of {first}, {second}");
        assert_ne!(got[0], dense.1[0]);
    }
    // A dense layer beside one of codes stays as it was.
    let p = quantized([(Side::Dense, Side::Dense), (side(pairs()[0][0].0), side(pairs()[0][1].0))]);
    let got = outputs(device, Cache::planned(device, &stream, config(Codec::F16, 12), &p).unwrap());
    assert_eq!((&got[0], &got[1]), (&dense.1[0], &all[0].1[1]));
}

/// Layers of one pair of formats share plans and a work list.
#[test]
fn a_batch_holds_one_work_list_a_pair_of_formats() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let bytes = |first: usize, second: usize| {
        let layer = |i: usize| (side(pairs()[i][0].0), side(pairs()[i][1].0));
        let p = quantized([layer(first), layer(second)]);
        let cache = Cache::planned(&device, &stream, config(Codec::F16, 4), &p).unwrap();
        let batch = cache.batch(BatchShape::new(2, 1, Q_HEADS)).unwrap();
        batch.bytes() - batch.workspace().size().bytes()
    };
    assert_eq!(bytes(0, 0), bytes(1, 1));
    assert!(bytes(0, 1) > bytes(0, 0));
}

/// A step's work list is made anew: one batch for all steps gives what a new one for each does, once a
/// sequence has more rows than a tile.
fn batches_are_used_again(device: &Device) {
    let stream = device.stream().unwrap();
    let p = quantized([
        (side(QuantizedCodec::Int8), side(QuantizedCodec::Int8)),
        (side(QuantizedCodec::Int4), side(QuantizedCodec::Int4)),
    ]);
    let run = |again: bool| {
        let cache = Cache::planned(device, &stream, config(Codec::F16, 12), &p).unwrap();
        let mut lab = Lab::of(device.stream().unwrap(), cache, Codec::F16, anything());
        let (a, b) = (lab.create(), lab.create());
        let mut batch = lab.cache.batch(BatchShape::new(2, 24, Q_HEADS)).unwrap();
        let mut all = Vec::new();
        for new in [[(a, 24), (b, 3)], [(b, 12), (a, 24)], [(a, 24), (b, 1)], [(b, 9), (a, 24)]] {
            if !again {
                batch = lab.cache.batch(BatchShape::new(2, 24, Q_HEADS)).unwrap();
            }
            lab.extend_in(&mut batch, &new).unwrap();
            all.extend(lab.outputs.concat());
        }
        all
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn what_no_cache_keeps_yet_is_named() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let refused = |p: &Plan| Cache::planned(&device, &stream, config(Codec::F16, 4), p).unwrap_err();
    let is_unsupported = |e: CacheError, words: &[&str]| {
        assert!(matches!(e, CacheError::Device(kvlar::Error::Unsupported { .. })), "{e}");
        let text = e.to_string();
        assert!(text.contains("unsupported") && words.iter().all(|w| text.contains(w)), "{text:?} does not say {words:?}");
    };
    let unsupported = |p: &Plan, words: &[&str]| is_unsupported(refused(p), words);
    let with =
        |keys: Side| quantized([(side(QuantizedCodec::Int8), side(QuantizedCodec::Int8)), (keys, side(QuantizedCodec::Int4))]);
    let channels = |group| side(QuantizedFormat { group: Some(group), ..QuantizedCodec::Int4Channel.into() });
    unsupported(&with(channels(8)), &["groups of 8 rows", "multiples of 16"]);
    let two = quantized([(channels(16), side(QuantizedCodec::Int8)), (channels(32), side(QuantizedCodec::Int8))]);
    let wide = CacheConfig { page_rows: 32, ..config(Codec::F16, 4) };
    let e = Cache::planned(&device, &stream, wide, &two).unwrap_err();
    assert!(e.to_string().contains("groups of 16 and of 32 rows"), "{e}");
    let e = refused(&with(side(QuantizedCodec::Int2Channel)));
    assert!(e.to_string().contains("page_rows: pages of 16 rows hold no whole groups of 32"), "{e}");
    let e = refused(&quantized([(latents(1.0), side(QuantizedCodec::Int8)), (Side::Dense, Side::Dense)]));
    assert!(matches!(e, CacheError::Invalid { arg: "plan", .. }), "{e}");
    assert!(e.to_string().contains("layer 0 has latents beside codes"), "{e}");
}

/// Keys of a sequence's tokens as the reference stores and reads them, `[n, Hk, d]`.
fn stored(tokens: &[u64], layer: usize, format: &Format) -> Vec<f32> {
    let storage = kvlar_reference::HeadStorage::from(format.reference());
    let keys = tokens.iter().flat_map(|&t| (0..HEADS).map(move |h| row(t, layer, h, false)));
    keys.flat_map(|k| storage.row(&k).unwrap()).collect()
}

mod on_kernels {
    use super::formats_without_attention_are_decoded_first;
    crate::devices::on_kernels!(formats_without_attention_are_decoded_first);
}

/// Formats that no kernel attends over are decoded first: kernels agree with the reference, which needs no decoding.
fn formats_without_attention_are_decoded_first(device: &Device) {
    let grouped = |codec: Codec| Format { group: Some(8), ..codec.into() };
    let rotated = Format { hadamard: true, ..Codec::Int8.into() };
    for [keys, values] in
        [[grouped(Codec::Int4), Codec::Int8.into()], [Codec::Int8.into(), rotated], [Codec::F16.into(), Codec::Int4.into()]]
    {
        let of = |device: &Device| {
            let cache = Cache::new(device, CacheConfig { keys, values, ..config(Codec::F16, 12) }).unwrap();
            let batch = cache.batch(BatchShape::new(2, 1, Q_HEADS)).unwrap();
            (batch.bytes(), outputs(device, cache))
        };
        let ((_, expected), (bytes, actual)) = (of(&Device::reference()), of(device));
        assert!(bytes >= 2 * HEADS * 100 * 2 * DIM * 2, "room for decoded rows");
        let tolerance = Tolerance::attend(kvlar_reference::Dtype::F16, kvlar_reference::Codec::F16, 40, 8.0);
        for (layer, (a, e)) in actual.iter().zip(&expected).enumerate() {
            kvlar_reference::compare::compare(a, e, tolerance)
                .unwrap_or_else(|e| panic!("{keys:?} {values:?} layer {layer}: {e}"));
        }
        // Beside exact rows, against the model.
        let mut lab = Lab::encoded(device, 12, tolerance, (3, 5, 0), [keys, values], (16, 1));
        let (a, b) = (lab.create(), lab.create());
        for new in [[(a, 30), (b, 3)], [(a, 1), (b, 1)], [(a, 4), (b, 40)]] {
            lab.extend(&new).unwrap();
        }
    }
}

/// Keys in codebooks: attention sees the nearest centroids.
fn keys_in_codebooks_are_their_centroids(device: &Device) {
    let stream = device.stream().unwrap();
    let codebooks = kvlar_reference::testing::Rng::new(3).normals(HEADS * 4 * DIM, 1.0);
    let format = QuantizedCodec::Pq { subvectors: 8, centroids: 4 }.into();
    let keys = Side::Quantized(Quantized { format, codebooks: Some(codebooks.clone()) });
    let p = quantized([(keys, side(QuantizedCodec::Int4)), (Side::Dense, Side::Dense)]);
    let cache = Cache::planned(device, &stream, config(Codec::F16, 12), &p).unwrap();
    assert_eq!((cache.fixed_bytes(), p.fixed_bytes()), (4 * codebooks.len(), 4 * codebooks.len()));
    assert_eq!(cache.bytes_per_token() as f64, p.bytes_per_token());
    let mut lab = Lab::of(device.stream().unwrap(), cache, Codec::F16, anything());
    let a = lab.create();
    lab.extend(&[(a, 20)]).unwrap();
    let read = lab.cache.decoded_keys(&lab.stream, a, 0, &Rope::none()).unwrap();
    for (i, (k, &token)) in read.chunks(HEADS * DIM).zip(&lab.model[&a]).enumerate() {
        for (h, k) in k.chunks(DIM).enumerate() {
            let books = kvlar_reference::Codebooks { subvectors: 8, centroids: 4, values: &codebooks };
            let head = books.head(h, DIM).unwrap();
            let codes = kvlar_reference::encode_pq(&row(token, 0, h, false), &head).unwrap();
            assert_eq!(k, kvlar_reference::decode_pq(&codes, DIM, &head).unwrap(), "row {i} head {h}");
        }
    }
}

fn keys_are_read_back_as_they_are_stored(device: &Device) {
    let stream = device.stream().unwrap();
    for [keys, values] in pairs() {
        let p = quantized([(side(keys.0), side(values.0)), (Side::Dense, Side::Dense)]);
        let cache = Cache::planned(device, &stream, config(Codec::F16, 12), &p).unwrap();
        let mut lab = Lab::of(device.stream().unwrap(), cache, Codec::F16, anything());
        // Two sequences, so that pages are not in order; pages shared and copied.
        let (a, b) = (lab.create(), lab.create());
        for new in [[(a, 20), (b, 17)], [(a, 19), (b, 1)]] {
            lab.extend(&new).unwrap();
        }
        lab.cache.truncate(a, 35).unwrap();
        lab.truncated(a, 35);
        let c = lab.cache.fork(a).unwrap();
        lab.forked(a, c);
        lab.extend(&[(c, 2)]).unwrap();
        for seq in [a, b, c] {
            for (layer, format) in [(0, keys.1), (1, Codec::F16.into())] {
                let read = lab.cache.decoded_keys(&lab.stream, seq, layer, &Rope::none()).unwrap();
                assert_eq!(read, stored(&lab.model[&seq], layer, &format), "{seq}, layer {layer}, {:?}", keys.0);
            }
        }
        let e = lab.cache.decoded_keys(&lab.stream, a, 2, &Rope::none()).unwrap_err();
        assert!(e.to_string().contains("layer: 2 of 2"), "{e}");
        lab.cache.remove(a).unwrap();
        assert_eq!(lab.cache.decoded_keys(&lab.stream, a, 0, &Rope::none()), Err(CacheError::UnknownSequence(a)));
        let empty = lab.cache.create();
        assert_eq!(lab.cache.decoded_keys(&lab.stream, empty, 0, &Rope::none()), Ok(Vec::new()));
    }
}

/// Low-rank keys are rebuilt and rotated; sinks and recent rows of them come as they were given.
fn keys_of_latents_are_rebuilt_where_they_are_not_exact(device: &Device) {
    let rope = Rope::new(100.0, DIM, RopeLayout::Half, RopeScaling::None);
    for (sinks, recent) in [(0, 0), (3, 0), (0, 5), (5, 7), (40, 0)] {
        let mut lab = Lab::exact(device, 12, anything(), (sinks, recent, 0));
        let a = lab.create();
        for n in [8, 8, 8, 6, 1, 1, 6] {
            lab.extend(&[(a, n)]).unwrap();
            let (until, from) = lab.cache.exact_rows(a).unwrap();
            for layer in 0..LAYERS {
                let read = lab.cache.decoded_keys(&lab.stream, a, layer, &rope).unwrap();
                let tokens = &lab.model[&a];
                let rows = tokens.iter().enumerate().flat_map(|(i, &t)| (0..HEADS).map(move |h| (i, row(t, layer, h, false))));
                // The lab's latents halve what they hold, which f16 does exactly; it appends without RoPE.
                let expected = rows.flat_map(|(i, k)| match i < until || i >= from {
                    true => k,
                    false => rope.rotate(&k.iter().map(|x| 0.5 * x).collect::<Vec<_>>(), i as i64),
                });
                assert_eq!(read, expected.collect::<Vec<f32>>(), "{sinks}, {recent}, {} tokens", tokens.len());
            }
        }
    }
}

/// An int8 basis is read as its codes and scales, int8 latents as they decode.
#[test]
fn keys_of_8_bit_latents_are_what_8_bits_hold() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let read = |latent, key_basis| {
        let mut p = exact_plan(1.0, (0, 0));
        p.config = kvlar_calibrate::RecalkvConfig { key_basis, ..Default::default() }.into();
        for side in p.layers.iter_mut().flat_map(|l| [&mut l.keys, &mut l.values]) {
            let Side::LowRank(f) = side else { continue };
            f.latent = latent;
            // No basis of ones and zeros, which 8 bits would hold exactly.
            f.basis.iter_mut().enumerate().for_each(|(i, x)| *x += 0.001 * (i % 7) as f32);
        }
        let cache = Cache::planned(&device, &stream, config(Codec::F16, 12), &p).unwrap();
        let mut lab = Lab::of(device.stream().unwrap(), cache, Codec::F16, anything());
        let a = lab.create();
        lab.extend(&[(a, 20)]).unwrap();
        lab.cache.decoded_keys(&lab.stream, a, 0, &Rope::none()).unwrap()
    };
    use kvlar_calibrate::{KeyBasis, Latent};
    let exact = read(Latent::Model, KeyBasis::Model);
    let error = |keys: Vec<f32>| {
        let sum = |f: &dyn Fn(f32, f32) -> f32| keys.iter().zip(&exact).map(|(a, b)| f(*a, *b).powi(2)).sum::<f32>();
        (sum(&|a, b| a - b) / sum(&|_, b| b)).sqrt()
    };
    let (latents, both) = (error(read(Latent::Int8, KeyBasis::Model)), error(read(Latent::Int8, KeyBasis::Int8)));
    assert!((1e-3..0.02).contains(&latents) && (latents..0.02).contains(&both), "{latents}, {both}");
    assert!(both > latents, "the basis loses something too");
    assert!((0.03..0.2).contains(&error(read(Latent::Int4, KeyBasis::Model))));
}
