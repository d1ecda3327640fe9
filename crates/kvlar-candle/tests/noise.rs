//! Logit noise: of stores whose keys are off by what is known.

use crate::checkpoint::{Checkpoint, Variant};
use crate::devices;
use candle_core::Tensor;
use kvlar::{Codec, Device, Format};
use kvlar_candle::llama::{AttentionError, Llama, attention_error};
use kvlar_candle::{KvShape, KvStore, PagedStore, Result, StoreConfig};

fn model(window: usize) -> (Checkpoint, Llama) {
    let model_type = if window > 0 { "mistral" } else { "llama" };
    let variant = Variant { head_dim: 32, hidden: 96, theta: 100.0, window, model_type, ..Variant::llama("noise") };
    let c = Checkpoint::write(&variant);
    let model = Llama::load(c.folder()).unwrap();
    assert_eq!(model.kv_shape().window as usize, window);
    (c, model)
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 5 + i * 7 + 3) % 40) as u32).collect()
}

/// A full cache, of which keys are read back with an error that `error(layer, token, kv head)` names, `[d]`.
struct Off<F> {
    store: PagedStore,
    shape: KvShape,
    error: F,
    /// Queries of each layer's attentions over such keys, `[Hq, d]` each, and their positions.
    queries: Vec<Vec<(usize, Vec<f32>)>>,
    readable: bool,
}

impl<F: Fn(usize, usize, usize) -> Vec<f32>> KvStore for Off<F> {
    fn len(&self) -> usize {
        self.store.len()
    }
    fn begin(&mut self, new: usize) -> Result<()> {
        self.store.begin(new)
    }
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.store.append(layer, k, v)
    }
    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let all = q.flatten_all()?.to_vec1::<f32>()?;
        let rows = all.chunks(self.shape.q_heads * self.shape.head_dim).map(<[f32]>::to_vec);
        self.queries[layer].extend(rows.enumerate().map(|(i, q)| (self.store.len() + i, q)));
        self.store.attend(layer, q)
    }
    fn finish(&mut self) -> Result<()> {
        self.store.finish()
    }
    fn cancel(&mut self) {
        self.store.cancel();
    }
    fn truncate(&mut self, rows: usize) -> Result<()> {
        self.store.truncate(rows)
    }
    fn bytes(&self) -> usize {
        self.store.bytes()
    }
    fn decoded_keys(&self, layer: usize) -> Result<Option<Vec<f32>>> {
        let (heads, d) = (self.shape.kv_heads, self.shape.head_dim);
        let Some(mut keys) = self.store.decoded_keys(layer)?.filter(|_| self.readable) else { return Ok(None) };
        for (i, key) in keys.chunks_mut(d).enumerate() {
            key.iter_mut().zip((self.error)(layer, i / heads, i % heads)).for_each(|(k, e)| *k += e);
        }
        Ok(Some(keys))
    }
}

fn full(model: &Llama) -> PagedStore {
    PagedStore::new(&Device::reference(), &model.kv_shape(), StoreConfig::bf16(64)).unwrap()
}

fn off<F: Fn(usize, usize, usize) -> Vec<f32>>(model: &Llama, error: F) -> Off<F> {
    let queries = vec![Vec::new(); model.config().layers];
    Off { store: full(model), shape: model.kv_shape(), error, queries, readable: true }
}

fn noises(e: &AttentionError) -> Vec<Option<f64>> {
    e.layers.iter().map(|l| l.logit_noise()).collect()
}

#[test]
fn exact_keys_have_no_noise_and_codes_have_some() {
    let (_c, model) = model(0);
    for device in devices::all() {
        let measure = |config: StoreConfig| {
            let store = |config| PagedStore::new(&device, &model.kv_shape(), config).unwrap();
            attention_error(&model, &mut store(StoreConfig::bf16(64)), &mut store(config), &tokens(50)).unwrap()
        };
        let of = |codec: Codec| measure(StoreConfig::of(codec, codec, 64));
        let same = of(Codec::Bf16);
        assert_eq!((same.relative(), noises(&same)), (0.0, vec![Some(0.0); 2]));
        let [int8, int4, int2] = [Codec::Int8, Codec::Int4, Codec::Int2].map(|c| noises(&of(c)));
        for layer in 0..2 {
            let [a, b, c] = [&int8, &int4, &int2].map(|n| n[layer].unwrap());
            // 16 times the step from 8 bits to 4, 5 times to 2.
            assert!(a > 0.0 && (8.0..30.0).contains(&(b / a)) && (2.0..10.0).contains(&(c / b)), "{a} {b} {c}");
        }
        // What values lose is no noise of the logits.
        let rotated = Format { hadamard: true, ..Codec::Int4.into() };
        let [one, other] = [Codec::Int2, Codec::Int8].map(|v| measure(StoreConfig::of(rotated, v, 64)));
        assert_eq!(noises(&one), noises(&other));
        assert!(one.relative() > other.relative());
    }
}

/// Against the definition, query by query.
#[test]
fn noise_is_the_spread_of_logit_errors_over_visible_rows() {
    for window in [0, 9] {
        let (_c, model) = model(window);
        let error = |layer: usize, t: usize, h: usize| -> Vec<f32> {
            (0..32).map(|i| 0.02 * (layer + 1) as f32 * ((t * 37 + h * 11 + i * 5) % 13) as f32).collect()
        };
        let mut other = off(&model, error);
        let measured = attention_error(&model, &mut full(&model), &mut other, &tokens(40)).unwrap();
        assert_eq!(measured.relative(), 0.0);
        for (layer, noise) in noises(&measured).into_iter().enumerate() {
            let (mut sum, mut count) = (0.0, 0);
            for (position, q) in &other.queries[layer] {
                for (h, q) in q.chunks(32).enumerate() {
                    let first = if window == 0 { 0 } else { (position + 1).saturating_sub(window) };
                    let logit = |t: usize| {
                        let e = error(layer, t, h / 2);
                        q.iter().zip(e).map(|(q, e)| f64::from(*q) * f64::from(e)).sum::<f64>() / 32f64.sqrt()
                    };
                    let all: Vec<f64> = (first..=*position).map(logit).collect();
                    let mean = all.iter().sum::<f64>() / all.len() as f64;
                    sum += all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64;
                    count += 1;
                }
            }
            assert_eq!(count, 20 * 4);
            let expected = (sum / f64::from(count)).sqrt();
            assert!(
                expected > 0.01 && (noise.unwrap() / expected - 1.0).abs() < 1e-3,
                "window {window}, layer {layer}: {noise:?} is not {expected}"
            );
        }
    }
}

#[test]
fn shifts_are_no_noise_and_nan_is_not_hidden() {
    let (_c, model) = model(0);
    let measure = |other: &mut dyn KvStore| attention_error(&model, &mut full(&model), other, &tokens(40)).unwrap();
    // The same for every key: all logits of a query move alike.
    let shifted = measure(&mut off(&model, |_, _, _| vec![0.5; 32]));
    assert!(noises(&shifted).iter().all(|n| n.unwrap() < 1e-5), "{shifted:?}");
    let nan = measure(&mut off(&model, |layer, t, _| vec![if (layer, t) == (1, 7) { f32::NAN } else { 0.0 }; 32]));
    assert!(noises(&nan)[0] == Some(0.0) && noises(&nan)[1].unwrap().is_nan() && nan.largest_noise().unwrap().is_nan());
    assert_eq!(nan.relative(), 0.0);
    // A key that no query of the second half sees.
    let unseen = measure(&mut off(&model, |_, t, _| vec![if t == 40 { f32::NAN } else { 0.0 }; 32]));
    assert_eq!(unseen.largest_noise(), Some(0.0));
    let mut closed = Off { readable: false, ..off(&model, |_, _, _| Vec::new()) };
    let closed = measure(&mut closed);
    assert_eq!((noises(&closed), closed.largest_noise()), (vec![None; 2], None));
}
