//! Plans in an engine: what attention sees of sinks, latents and recent rows, and what taking tokens back leaves of it.

use crate::checkpoint::{Checkpoint, Variant};
use crate::devices;
use candle_core::Tensor;
use kvlar::{Backend, Codec, Device};
use kvlar_calibrate::{
    Budget, Factors, Latent, LayerShape, ModelShape, Moments, PairLayout, Plan, RecalkvConfig, RopePairs, Weighting, Weights,
};
use kvlar_candle::llama::{Llama, Logits, Protocol, RecallTask, attention_error, longest_question, perplexity, recall};
use kvlar_candle::{EngineError, KvShape, KvStore, PagedStore, Result, StoreConfig};
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, Dtype, attend, compare};

fn model() -> (Checkpoint, Llama) {
    let c = Checkpoint::write(&Variant { head_dim: 32, hidden: 96, theta: 100.0, ..Variant::llama("planned") });
    let model = Llama::load(c.folder()).unwrap();
    (c, model)
}

fn tokens(n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * i * 5 + i * 7 + 3) % 40) as u32).collect()
}

fn fitted(model: &Llama, layer: LayerShape, config: &RecalkvConfig) -> Plan {
    let (layers, rope) = (model.config().layers, RopePairs { rotary_dim: layer.head_dim, layout: PairLayout::Half });
    let shape = ModelShape { layers, layer, hidden: model.config().hidden, rope };
    let mut moments: Vec<Moments> = (0..layers).map(|_| Moments::new(layer).unwrap()).collect();
    model.capture(&tokens(100), |l, q, k, v| moments[l].add(q, k, v).map_err(|e| EngineError::Input(e.to_string()))).unwrap();
    kvlar_calibrate::fit(config, &shape, "m", &moments, None, Weights::default(), &mut |_, _| ()).unwrap().0
}

/// Half of the ranks of two heads together, and rows that stay exact.
fn plan(model: &Llama, (sink_rows, recent_rows): (usize, usize), latent: Latent) -> Plan {
    let config = RecalkvConfig {
        budget: Budget::Fixed { keys: 32, values: 32 },
        weighting_values: Weighting::None,
        latent_keys: latent,
        latent_values: latent,
        sink_rows,
        recent_rows,
        ..RecalkvConfig::default()
    };
    fitted(model, LayerShape { q_heads: 4, kv_heads: 2, head_dim: 32, value_dim: 32 }, &config)
}

fn store(device: &Device, model: &Llama, plan: &Plan, rollback_rows: usize) -> PagedStore {
    let config = StoreConfig { rollback_rows, page_rows: 16, ..StoreConfig::bf16(160) };
    PagedStore::planned(device, &model.kv_shape(), config, plan).unwrap()
}

fn floats(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

/// A store of which every attention is checked against exact attention over rows as the plan makes them.
struct Checked<'a> {
    store: PagedStore,
    plan: &'a Plan,
    shape: KvShape,
    /// Keys before RoPE and values of each layer, `[n, Hk, d]`, as the device holds them.
    rows: Vec<[Vec<f32>; 2]>,
    tolerance: Tolerance,
    /// Attentions that the plan's latents alone do not explain, and those that rows as they were given do not.
    told_apart: [usize; 2],
}

impl Checked<'_> {
    /// Rows `[n, Hk, d]` through latents, matrices and latents in bf16.
    fn rebuilt(f: &Factors, y: &[f32]) -> Vec<f32> {
        let bf16 = |x: &[f32]| Dtype::Bf16.round_all(x);
        let f = Factors { basis: bf16(&f.basis), encoder: bf16(&f.encoder), ..f.clone() };
        let z: Vec<f64> = f.encode(y).into_iter().map(|z| f64::from(Dtype::Bf16.round(z as f32))).collect();
        f.decode(&z).into_iter().map(|x| x as f32).collect()
    }

    /// Keys (0, rotated) or values (1), `[Hk, T, d]`, where rows that `exact` says are as they were given.
    fn side(&self, layer: usize, value: usize, exact: impl Fn(usize) -> bool) -> Vec<f32> {
        let (hk, d) = (self.shape.kv_heads, self.shape.head_dim);
        let given = &self.rows[layer][value];
        let sides = [&self.plan.layers[layer].keys, &self.plan.layers[layer].values];
        let rebuilt = Self::rebuilt(sides[value].factors().unwrap(), given);
        let row = |h: usize, t: usize| -> Vec<f32> {
            let at = (t * hk + h) * d..(t * hk + h + 1) * d;
            let y = if exact(t) { &given[at] } else { &rebuilt[at] };
            match value {
                1 => y.to_vec(),
                _ if exact(t) => Dtype::Bf16.round_all(&self.shape.rope.rotate(y, t as i64)),
                _ => self.shape.rope.rotate(y, t as i64),
            }
        };
        let total = given.len() / (hk * d);
        (0..hk).flat_map(|h| (0..total).map(move |t| (h, t))).flat_map(|(h, t)| row(h, t)).collect()
    }

    /// Attention of `q` where rows that `exact` says are as they were given.
    fn expected(&self, layer: usize, q: &[f32], exact: impl Fn(usize) -> bool) -> Vec<f32> {
        let (hq, hk, d) = (self.shape.q_heads, self.shape.kv_heads, self.shape.head_dim);
        let (total, new) = (self.rows[layer][0].len() / (hk * d), q.len() / (hq * d));
        let (k, v) = (self.side(layer, 0, &exact), self.side(layer, 1, &exact));
        let by_head = |x: &[f32], from: [usize; 2]| -> Vec<f32> {
            let [outer, inner] = from;
            let row = |(i, o): (usize, usize)| x[(o * inner + i) * d..(o * inner + i + 1) * d].to_vec();
            (0..inner).flat_map(|i| (0..outer).map(move |o| (i, o))).flat_map(row).collect()
        };
        let result = attend(&AttendInput {
            seqs: 1,
            q_heads: hq,
            kv_heads: hk,
            query_rows: new,
            rows: total,
            head_dim: d,
            value_dim: d,
            q: &by_head(&Dtype::Bf16.round_all(q), [new, hq]),
            k: &k,
            v: &v,
            ..AttendInput::default()
        });
        by_head(&result.unwrap().out, [hq, new])
    }
}

impl KvStore for Checked<'_> {
    fn len(&self) -> usize {
        self.store.len()
    }
    fn begin(&mut self, new: usize) -> Result<()> {
        self.store.begin(new)
    }
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        for (rows, new) in self.rows[layer].iter_mut().zip([k, v]) {
            rows.extend(Dtype::Bf16.round_all(&floats(new)));
        }
        self.store.append(layer, k, v)
    }
    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        let out = self.store.attend(layer, q)?;
        let (actual, q) = (floats(&out), floats(q));
        let (sinks, recent) = (self.plan.sink_rows, self.plan.recent_rows);
        let total = self.rows[layer][0].len() / (self.shape.kv_heads * self.shape.head_dim);
        let latents = total.saturating_sub(recent).saturating_sub(sinks);
        let first = if recent == 0 { total } else { sinks + latents / 16 * 16 };
        let expected = self.expected(layer, &q, |t| t < sinks || t >= first);
        compare::compare(&actual, &expected, self.tolerance).unwrap_or_else(|e| panic!("layer {layer} of {total}: {e}"));
        // What is read back, in the midst of the step, is what attention saw.
        let (hk, d) = (self.shape.kv_heads, self.shape.head_dim);
        let keys = self.store.decoded_keys(layer)?.expect("keys can be read back");
        let keys: Vec<f32> = (0..hk).flat_map(|h| keys.chunks(d).skip(h).step_by(hk)).flatten().copied().collect();
        let rounding = Tolerance { absolute: 0.03, relative: 0.01, cosine: 1e-5 };
        let is = |t: usize| t < sinks || t >= first;
        compare::compare(&keys, &self.side(layer, 0, is), rounding).unwrap_or_else(|e| panic!("keys of layer {layer}: {e}"));
        for (i, all) in [false, true].into_iter().enumerate() {
            let other = self.expected(layer, &q, |_| all);
            self.told_apart[i] += usize::from(compare::compare(&actual, &other, self.tolerance).is_err());
        }
        Ok(out)
    }
    fn max_step(&self) -> usize {
        self.store.max_step()
    }
    fn rollback(&self) -> usize {
        self.store.rollback()
    }
    fn finish(&mut self) -> Result<()> {
        self.store.finish()
    }
    fn cancel(&mut self) {
        self.store.cancel();
    }
    fn truncate(&mut self, rows: usize) -> Result<()> {
        let (width, all) = (self.shape.kv_heads * self.shape.head_dim, &mut self.rows);
        all.iter_mut().flatten().for_each(|side| side.truncate(rows * width));
        self.store.truncate(rows)
    }
    fn bytes(&self) -> usize {
        self.store.bytes()
    }
}

#[test]
fn engines_attend_over_what_a_plan_keeps() {
    let (_c, model) = model();
    let tokens = tokens(60);
    for device in devices::all() {
        for exact in [(0, 0), (3, 0), (3, 5), (5, 20)] {
            let plan = plan(&model, exact, Latent::Model);
            let rows = vec![[Vec::new(), Vec::new()]; plan.layers.len()];
            let tolerance = Tolerance::attend_lowrank(Dtype::Bf16, 60, 6.0, 4.0);
            let store = store(&device, &model, &plan, 64);
            let mut store = Checked { store, plan: &plan, shape: model.kv_shape(), rows, tolerance, told_apart: [0, 0] };
            model.prefill(&mut store, &tokens[..30], Logits::Last).unwrap();
            model.extend(&mut store, &tokens[30..31], Logits::Last).unwrap();
            model.extend(&mut store, &tokens[31..48], Logits::Last).unwrap();
            store.truncate(38).unwrap();
            model.extend(&mut store, &tokens[38..60], Logits::Last).unwrap();
            let [exact_matters, latents_matter] = store.told_apart.map(|n| n > 0);
            assert_eq!((exact_matters, latents_matter), (exact != (0, 0), true), "{exact:?}");
        }
    }
}

#[test]
fn errors_of_attention_are_measured_on_every_backend() {
    let (_c, model) = model();
    let tokens = tokens(50);
    // Without recent rows the size of steps makes no difference.
    let plan = plan(&model, (3, 0), Latent::Model);
    let mut errors = Vec::new();
    for device in devices::all() {
        let mut exact = PagedStore::new(&device, &model.kv_shape(), StoreConfig::bf16(64)).unwrap();
        let mut planned = store(&device, &model, &plan, 0);
        errors.push(attention_error(&model, &mut exact, &mut planned, &tokens).unwrap().relative());
        assert_eq!((exact.len(), planned.len()), (50, 50));
        let (nll, n) = perplexity(&model, &mut store(&device, &model, &plan, 0), &tokens).unwrap();
        assert!(nll > 0.0 && n == 25);
    }
    assert!(errors.iter().all(|e| *e > 1e-3 && (e / errors[0] - 1.0).abs() < 0.02), "{errors:?}");
}

/// Runs as [`recall`] does: a context, questions one after the other, each taken back; the logits of the last.
fn logits(model: &Llama, store: &mut PagedStore, context: &[u32], questions: &[&[u32]]) -> Vec<f32> {
    model.prefill(store, context, Logits::Last).unwrap();
    let mut last = Vec::new();
    for q in questions {
        last = floats(&model.extend(store, q, Logits::All).unwrap());
        store.truncate(context.len()).unwrap();
    }
    last
}

#[test]
fn every_question_starts_from_the_same_context() {
    let (_c, model) = model();
    let (context, long, short) = (tokens(60), tokens(37), [5, 9, 2]);
    let plan = plan(&model, (3, 12), Latent::Model);
    for device in devices::all() {
        let run =
            |rollback, questions: &[&[u32]]| logits(&model, &mut store(&device, &model, &plan, rollback), &context, questions);
        let alone = run(37, &[&short[..]]);
        assert_eq!(run(37, &[&long[..], &short]), alone);
        assert_eq!(run(37, &[&short[..], &long, &short]), alone);
        if device.backend() == Backend::Reference {
            // Where nothing is held for it, the first question leaves fewer rows exact.
            assert_ne!(run(0, &[&long[..], &short]), alone);
        }
    }
}

#[test]
fn questions_longer_than_the_rollback_are_refused() {
    let (_c, model) = model();
    let line = r#"{"context": "t5 t6 t7", "questions": [{"question": "t8", "answer": "t9"}, {"question": "t8 t9 t4", "answer": "t11 t12"}]}"#;
    let task = &RecallTask::parse(line).unwrap()[0];
    assert_eq!(longest_question(&model, task).unwrap(), 4);
    let plan = plan(&model, (0, 4), Latent::Model);
    let ask = |rollback| recall(&model, &mut store(&Device::reference(), &model, &plan, rollback), task, Protocol::Context);
    let e = ask(3).unwrap_err().to_string();
    assert!(e.contains("a question of 4 tokens") && e.contains("rollback_rows of 4"), "{e}");
    assert_eq!(ask(4).unwrap().questions, 2);
    // Without recent rows that stay exact there is nothing to hold.
    let mut plain =
        PagedStore::new(&Device::reference(), &model.kv_shape(), StoreConfig::of(Codec::Int8, Codec::Int8, 64)).unwrap();
    assert_eq!(plain.rollback(), usize::MAX);
    assert_eq!(recall(&model, &mut plain, task, Protocol::Context).unwrap().questions, 2);
}

/// A store that takes four tokens a step, and fails at an append.
struct Failing {
    store: PagedStore,
    /// Appends until then.
    left: usize,
}

impl KvStore for Failing {
    fn len(&self) -> usize {
        self.store.len()
    }
    fn begin(&mut self, new: usize) -> Result<()> {
        assert!(new <= 4);
        self.store.begin(new)
    }
    fn append(&mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<()> {
        self.left = self.left.checked_sub(1).ok_or_else(|| EngineError::Input("out of luck".into()))?;
        self.store.append(layer, k, v)
    }
    fn attend(&mut self, layer: usize, q: &Tensor) -> Result<Tensor> {
        self.store.attend(layer, q)
    }
    fn max_step(&self) -> usize {
        4
    }
    fn rollback(&self) -> usize {
        self.store.rollback()
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
}

#[test]
fn a_long_extension_is_kept_whole_or_not_at_all() {
    let (_c, model) = model();
    let tokens = tokens(100);
    let plan = plan(&model, (3, 12), Latent::Model);
    let run = |fail_at: Option<usize>| {
        let mut store = store(&Device::reference(), &model, &plan, 40);
        model.prefill(&mut store, &tokens[..50], Logits::Last).unwrap();
        let mut store = Failing { store, left: usize::MAX };
        if let Some(n) = fail_at {
            store.left = n;
            let e = model.extend(&mut store, &tokens[50..93], Logits::All).unwrap_err();
            assert!(e.to_string().contains("out of luck"), "{e}");
            store.left = usize::MAX;
        }
        assert_eq!(store.len(), 50);
        floats(&model.extend(&mut store, &tokens[93..100], Logits::All).unwrap())
    };
    let plain = run(None);
    // In the first step, in the second layer of the third, in the last.
    for n in [0, 5, 21] {
        assert_eq!(run(Some(n)), plain, "after {n} appends");
    }
    // Eleven steps fit, as ten can be taken back; a twelfth is refused before anything runs.
    let mut store = Failing { store: store(&Device::reference(), &model, &plan, 40), left: usize::MAX };
    let e = model.extend(&mut store, &tokens[..45], Logits::Last).unwrap_err().to_string();
    assert!(e.contains("45 tokens at once") && e.contains("up to 44") && e.contains("rollback_rows"), "{e}");
    assert!(store.is_empty());
    model.extend(&mut store, &tokens[..44], Logits::Last).unwrap();
    // A bad token anywhere is found before anything runs, too.
    assert!(matches!(model.extend(&mut store, &[[3; 40], [99; 40]].concat()[..44], Logits::Last), Err(EngineError::Input(_))));
    assert_eq!(store.len(), 44);
}

/// Heads whose dimensions are no multiple of 32: ranks are padded, dense keys beside latents too.
#[test]
fn plans_of_odd_heads_run() {
    let c = Checkpoint::write(&Variant { head_dim: 40, hidden: 96, ..Variant::llama("odd") });
    let model = Llama::load(c.folder()).unwrap();
    let layer = LayerShape { q_heads: 4, kv_heads: 2, head_dim: 40, value_dim: 40 };
    let int8 = RecalkvConfig { latent_keys: Latent::Int8, latent_values: Latent::Int8, ..RecalkvConfig::default() };
    for (config, dense_keys, lost) in [
        (RecalkvConfig { budget: Budget::Fixed { keys: 40, values: 32 }, ..RecalkvConfig::default() }, true, 0.02..0.5),
        (RecalkvConfig { budget: Budget::Fixed { keys: 40, values: 40 }, ..int8.clone() }, false, 1e-3..0.02),
        (
            RecalkvConfig { budget: Budget::Fixed { keys: 40, values: 40 }, hadamard: false, center: true, ..int8 },
            false,
            1e-3..0.02,
        ),
    ] {
        let config = RecalkvConfig {
            key_group: 1,
            value_group: 1,
            sink_rows: 3,
            recent_rows: 0,
            weighting_values: Weighting::None,
            ..config
        };
        let plan = fitted(&model, layer, &config);
        assert!(plan.layers.iter().all(|l| l.keys.factors().is_none() == dense_keys && l.values.factors().is_some()));
        let mut errors = Vec::new();
        for device in devices::all() {
            let mut exact = PagedStore::new(&device, &model.kv_shape(), StoreConfig::bf16(64)).unwrap();
            let mut planned = store(&device, &model, &plan, 0);
            assert_eq!(planned.cache().fixed_bytes(), plan.fixed_bytes());
            assert_eq!(planned.cache().bytes_per_token() as f64, plan.bytes_per_token());
            errors.push(attention_error(&model, &mut exact, &mut planned, &tokens(50)).unwrap().relative());
        }
        assert!(errors.iter().all(|e| lost.contains(e)), "{errors:?} instead of {lost:?}");
    }
}

/// Latents of 4 bits have no kernels yet; that is told from what is wrong.
#[test]
fn what_has_no_kernel_is_told_from_other_errors() {
    let (_c, model) = model();
    let plan = plan(&model, (0, 0), Latent::Int4);
    let prefill = |device: &Device, tokens: &[u32]| model.prefill(&mut store(device, &model, &plan, 0), tokens, Logits::Last);
    for device in devices::with_kernels() {
        assert!(prefill(&device, &tokens(5)).unwrap_err().is_unsupported());
        assert!(!prefill(&device, &[99]).unwrap_err().is_unsupported());
    }
    prefill(&Device::reference(), &tokens(5)).unwrap();
}
