//! A cache against a model of it: what every sequence should hold, and what pages that takes.

use kvlar::{Codec, Device, Dtype, SimtOptions, Stream};
use kvlar_cache::{Batch, BatchShape, Cache, CacheConfig, CacheError, NewRows, Queries, SeqId};
use kvlar_calibrate::{
    Factors, Latent, LayerPlan, LayerShape, ModelShape, PLAN_FORMAT, PairLayout, Plan, RecalkvConfig, RopePairs, Side,
};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{AttendInput, compare};
use proptest::prelude::*;
use std::collections::BTreeMap;

const LAYERS: usize = 2;
const HEADS: usize = 2;
const Q_HEADS: usize = 4;
const DIM: usize = 16;
const PAGE: usize = 16;

fn config(codec: Codec, pages: usize) -> CacheConfig {
    CacheConfig {
        layers: LAYERS,
        kv_heads: HEADS,
        head_dim: DIM,
        value_dim: DIM,
        dtype: Dtype::F16,
        codec,
        page_rows: PAGE,
        pages,
        max_rows: 100,
    }
}

struct Lab {
    stream: Stream,
    cache: Cache,
    /// Tokens of each sequence, by name.
    model: BTreeMap<SeqId, Vec<u64>>,
    next_token: u64,
    codec: Codec,
    tolerance: Tolerance,
}

/// Latents that hold both heads' rows, the second head's first: nothing is lost, but all of the low-rank path is taken.
fn lossless() -> Side {
    let groups = vec![vec![1, 0]];
    let width = HEADS * DIM;
    let encoder = (0..width * width).map(|i| if i / width == i % width { 1.0 } else { 0.0 }).collect();
    let at = |head: usize| groups[0].iter().position(|&h| h == head).unwrap() * DIM;
    let select = |head: usize| (0..DIM * width).map(move |i| if at(head) + i / width == i % width { 1.0 } else { 0.0 });
    let basis = (0..HEADS).flat_map(select).collect();
    Side::LowRank(Factors { groups: groups.clone(), rank: width, basis, encoder, mean: None, latent: Latent::Model })
}

/// Low-rank keys and values in the first layer, low-rank keys beside dense values in the second.
fn plan() -> Plan {
    let layer = LayerShape { q_heads: Q_HEADS, kv_heads: HEADS, head_dim: DIM, value_dim: DIM };
    Plan {
        format: PLAN_FORMAT,
        method: "recalkv".into(),
        fingerprint: "a model".into(),
        model: ModelShape { layers: LAYERS, layer, hidden: 64, rope: RopePairs { rotary_dim: 0, layout: PairLayout::Half } },
        config: RecalkvConfig::default(),
        sink_rows: 0,
        recent_rows: 0,
        layers: vec![LayerPlan { keys: lossless(), values: lossless() }, LayerPlan { keys: lossless(), values: Side::Dense }],
    }
}

/// A token's key (or value) of a head in a layer, as f16 holds it.
fn row(token: u64, layer: usize, head: usize, value: bool) -> Vec<f32> {
    let mut rng = Rng::new(token * 64 + (layer * HEADS + head) as u64 * 2 + u64::from(value));
    kvlar_reference::Dtype::F16.round_all(&rng.normals(DIM, 1.0))
}

fn f16_bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()
}

impl Lab {
    fn new(codec: Codec, pages: usize) -> Self {
        let device = Device::reference();
        let (stream, cache) = (device.stream().unwrap(), Cache::new(&device, config(codec, pages)).unwrap());
        Self { stream, cache, model: BTreeMap::new(), next_token: 1, codec, tolerance: Tolerance::merge() }
    }

    /// Layers of a plan; results are as exact as the device's.
    fn planned(device: &Device, pages: usize, tolerance: Tolerance) -> Self {
        let stream = device.stream().unwrap();
        let cache = Cache::planned(device, &stream, config(Codec::F16, pages), &plan()).unwrap();
        Self { stream, cache, model: BTreeMap::new(), next_token: 1, codec: Codec::F16, tolerance }
    }

    fn create(&mut self) -> SeqId {
        let seq = self.cache.create();
        self.model.insert(seq, Vec::new());
        seq
    }

    /// Adds tokens to sequences in one step and checks what attention sees of all of them.
    fn extend(&mut self, new: &[(SeqId, usize)]) -> Result<(), CacheError> {
        let rows = new.iter().map(|n| n.1).max().unwrap_or(0).max(1);
        let mut batch = self.cache.batch(BatchShape::new(new.len().max(1), rows, Q_HEADS))?;
        self.cache.begin(&self.stream, &mut batch, new)?;
        let mut tokens = self.model.clone();
        for (seq, n) in new {
            let ids = self.next_token..self.next_token + *n as u64;
            tokens.get_mut(seq).unwrap().extend(ids);
            self.next_token += *n as u64;
        }
        for layer in 0..LAYERS {
            self.layer(&mut batch, new, rows, &tokens, layer);
        }
        self.cache.finish(&mut batch)?;
        self.model = tokens;
        Ok(())
    }

    fn layer(
        &mut self,
        batch: &mut Batch,
        new: &[(SeqId, usize)],
        rows: usize,
        tokens: &BTreeMap<SeqId, Vec<u64>>,
        layer: usize,
    ) {
        let device = self.stream.device().clone();
        let upload = |x: &[f32]| {
            let mut buffer = device.alloc(2 * x.len()).unwrap();
            self.stream.upload(&mut buffer, 0, &f16_bytes(x)).unwrap();
            buffer
        };
        // Rows of padding are NaN: they must not be stored, nor seen.
        let fill = |value: bool| -> Vec<f32> {
            let mut x = Vec::new();
            for ((seq, n), head) in new.iter().flat_map(|s| (0..HEADS).map(move |h| (s, h))) {
                let all = &tokens[seq];
                x.extend(all[all.len() - n..].iter().flat_map(|&t| row(t, layer, head, value)));
                x.extend(std::iter::repeat_n(f32::NAN, (rows - n) * DIM));
            }
            x
        };
        let (k, v) = (upload(&fill(false)), upload(&fill(true)));
        let new_rows = NewRows { k: k.view(), k_strides: None, v: v.view(), v_strides: None };
        self.cache.append(&self.stream, batch, layer, new_rows, None).unwrap();
        let queries =
            kvlar_reference::Dtype::F16.round_all(&Rng::new(layer as u64).normals(new.len() * Q_HEADS * rows * DIM, 1.0));
        let q = upload(&queries);
        let mut out = device.alloc(queries.len() * 4).unwrap();
        self.stream.fill(&mut out, 0..queries.len() * 4, 0xff).unwrap();
        let args = Queries {
            q: q.view(),
            q_strides: None,
            out: out.view_mut(),
            out_strides: None,
            lse: None,
            sink_logits: None,
            rope: None,
        };
        self.cache.attend(&self.stream, batch, layer, args).unwrap();
        let mut bytes = vec![0u8; out.len()];
        self.stream.download(&out, 0, &mut bytes).unwrap();
        let actual: Vec<f32> = bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert!(batch.workspace().status(&self.stream).unwrap().is_clean());
        for (i, (seq, n)) in new.iter().enumerate() {
            let all = &tokens[seq];
            let dense = |value| -> Vec<f32> {
                let stored = |x: Vec<f32>| {
                    let codec = self.codec.reference();
                    let r = kvlar_reference::encode_row(&x, codec, DIM).unwrap();
                    kvlar_reference::decode_row(&r.codes, &r.params, DIM, codec, DIM).unwrap()
                };
                (0..HEADS).flat_map(|h| all.iter().flat_map(move |&t| stored(row(t, layer, h, value)))).collect()
            };
            let (k, v) = (dense(false), dense(true));
            let positions: Vec<i32> = (0..rows).map(|s| if s < *n { (all.len() - n + s) as i32 } else { -1 }).collect();
            let expected = kvlar_reference::attend(&AttendInput {
                seqs: 1,
                q_heads: Q_HEADS,
                kv_heads: HEADS,
                query_rows: rows,
                rows: all.len(),
                head_dim: DIM,
                value_dim: DIM,
                q: &queries[i * Q_HEADS * rows * DIM..(i + 1) * Q_HEADS * rows * DIM],
                k: &k,
                v: &v,
                q_positions: Some(&positions),
                ..Default::default()
            })
            .unwrap();
            let actual = &actual[i * Q_HEADS * rows * DIM..(i + 1) * Q_HEADS * rows * DIM];
            compare::compare(actual, &expected.out, self.tolerance).unwrap_or_else(|e| panic!("{seq} layer {layer}: {e}"));
        }
    }

    /// The books: lengths, and that pages are neither lost nor invented.
    fn check(&self) {
        for (seq, tokens) in &self.model {
            assert_eq!(self.cache.len(*seq).unwrap(), tokens.len());
        }
        let usage = self.cache.usage();
        assert_eq!(usage.sequences, self.model.len());
        assert_eq!(usage.bytes, self.cache.config().pool_bytes());
        let least: usize = self.model.values().map(|t| t.len().div_ceil(PAGE)).max().unwrap_or(0);
        let most: usize = self.model.values().map(|t| t.len().div_ceil(PAGE)).sum();
        let used = usage.pages - usage.free;
        assert!((least..=most).contains(&used), "{used} pages used, between {least} and {most} expected");
        assert_eq!(usage.used_bytes, used * usage.bytes / usage.pages);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Create,
    Extend(usize, usize, usize, usize),
    Fork(usize),
    Truncate(usize, usize),
    Commit(usize, usize),
    Remove(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let index = 0..6usize;
    let op = prop_oneof![
        2 => Just(Op::Create),
        6 => (index.clone(), 0..24usize, index.clone(), 0..24usize).prop_map(|(a, n, b, m)| Op::Extend(a, n, b, m)),
        3 => index.clone().prop_map(Op::Fork),
        3 => (index.clone(), 0..40usize).prop_map(|(a, n)| Op::Truncate(a, n)),
        1 => (index.clone(), 0..40usize).prop_map(|(a, n)| Op::Commit(a, n)),
        1 => index.prop_map(Op::Remove),
    ];
    proptest::collection::vec(op, 1..40)
}

fn play(mut lab: Lab, ops: &[Op]) {
    let mut committed: BTreeMap<SeqId, usize> = BTreeMap::new();
    for op in ops {
        let ids: Vec<SeqId> = lab.model.keys().copied().collect();
        let pick = |i: usize| (!ids.is_empty()).then(|| ids[i % ids.len()]);
        match *op {
            Op::Create => {
                lab.create();
            }
            Op::Extend(a, n, b, m) => {
                let (Some(a), Some(b)) = (pick(a), pick(b)) else { continue };
                let new = if a == b { vec![(a, n)] } else { vec![(a, n), (b, m)] };
                let before = (lab.cache.usage(), lab.model.clone());
                match lab.extend(&new) {
                    Ok(()) => {}
                    Err(CacheError::OutOfPages { needed, free, .. }) => {
                        assert!(needed > free);
                        assert_eq!((lab.cache.usage(), lab.model.clone()), before, "an error left something behind");
                    }
                    Err(CacheError::TooLong { .. }) => assert_eq!((lab.cache.usage(), lab.model.clone()), before),
                    Err(e) => panic!("{e}"),
                }
            }
            Op::Fork(a) => {
                let Some(a) = pick(a) else { continue };
                let copy = lab.cache.fork(a).unwrap();
                let tokens = lab.model[&a].clone();
                lab.model.insert(copy, tokens);
                if let Some(&n) = committed.get(&a) {
                    committed.insert(copy, n);
                }
            }
            Op::Truncate(a, n) => {
                let Some(a) = pick(a) else { continue };
                let (held, floor) = (lab.model[&a].len(), committed.get(&a).copied().unwrap_or(0));
                let result = lab.cache.truncate(a, n);
                assert_eq!(result.is_ok(), n <= held && n >= floor, "{result:?}");
                if result.is_ok() {
                    lab.model.get_mut(&a).unwrap().truncate(n);
                }
            }
            Op::Commit(a, n) => {
                let Some(a) = pick(a) else { continue };
                let (held, floor) = (lab.model[&a].len(), committed.get(&a).copied().unwrap_or(0));
                let result = lab.cache.commit(a, n);
                assert_eq!(result.is_ok(), n <= held && n >= floor);
                if result.is_ok() {
                    committed.insert(a, n);
                }
            }
            Op::Remove(a) => {
                let Some(a) = pick(a) else { continue };
                lab.cache.remove(a).unwrap();
                lab.model.remove(&a);
                committed.remove(&a);
                assert_eq!(lab.cache.len(a), Err(CacheError::UnknownSequence(a)));
            }
        }
        lab.check();
    }
    // Everything that is left is still right, and gives its pages back.
    for seq in lab.model.keys().copied().collect::<Vec<_>>() {
        match lab.extend(&[(seq, 1)]) {
            Ok(()) | Err(CacheError::OutOfPages { .. } | CacheError::TooLong { .. }) => {}
            Err(e) => panic!("{e}"),
        }
        lab.cache.remove(seq).unwrap();
    }
    assert_eq!(lab.cache.usage().free, 12);
    assert!(lab.cache.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn any_history_agrees_with_the_model(ops in ops()) {
        play(Lab::new(Codec::F16, 12), &ops);
    }
    #[test]
    fn any_history_of_planned_layers_agrees_with_the_model(ops in ops()) {
        play(Lab::planned(&Device::reference(), 12, Tolerance::merge()), &ops);
    }
    #[test]
    fn any_history_of_int8_rows_agrees_with_the_model(ops in ops()) {
        play(Lab::new(Codec::Int8, 12), &ops);
    }
}

/// The same on the emulated kernels, with one history: forks, copies on write, truncation, up to 8 tokens a step.
#[test]
fn planned_layers_run_on_kernels() {
    let Ok(device) = Device::simt(SimtOptions { seed: 1, workers: 1, sm_count: 3 }) else { return };
    let f16 = kvlar_reference::Dtype::F16;
    let mut lab = Lab::planned(&device, 12, Tolerance::attend_lowrank(f16, 100, 4.0, 1.0));
    let a = lab.create();
    for n in [8, 8, 5] {
        lab.extend(&[(a, n)]).unwrap();
    }
    let b = lab.cache.fork(a).unwrap();
    lab.model.insert(b, lab.model[&a].clone());
    lab.extend(&[(a, 1), (b, 3)]).unwrap();
    lab.cache.truncate(b, 17).unwrap();
    lab.model.get_mut(&b).unwrap().truncate(17);
    lab.extend(&[(b, 8), (a, 2)]).unwrap();
    // A prefill's attention is the engine's own: a long step is refused by attend, not by begin.
    let mut batch = lab.cache.batch(BatchShape::new(1, 9, Q_HEADS)).unwrap();
    lab.cache.begin(&lab.stream, &mut batch, &[(a, 9)]).unwrap();
    let (q, mut out) = (device.alloc(2 * Q_HEADS * 9 * DIM).unwrap(), device.alloc(4 * Q_HEADS * 9 * DIM).unwrap());
    let queries = Queries {
        q: q.view(),
        q_strides: None,
        out: out.view_mut(),
        out_strides: None,
        lse: None,
        sink_logits: None,
        rope: None,
    };
    let refused = lab.cache.attend(&lab.stream, &mut batch, 0, queries);
    assert!(matches!(refused, Err(CacheError::Invalid { arg: "new tokens", .. })), "{refused:?}");
    lab.cache.cancel(&mut batch).unwrap();
}

#[test]
fn a_batch_of_another_cache_is_refused() {
    let device = Device::reference();
    // Equal configurations, other layers.
    let (mut planned, dense) = (Lab::planned(&device, 4, Tolerance::merge()), Lab::new(Codec::F16, 4));
    let a = planned.create();
    let mut batch = dense.cache.batch(BatchShape::new(1, 1, Q_HEADS)).unwrap();
    let refused = planned.cache.begin(&planned.stream, &mut batch, &[(a, 1)]);
    assert!(matches!(refused, Err(CacheError::Invalid { arg: "batch", .. })), "{refused:?}");
}

/// Layers that a plan leaves dense keep the model's type, whatever the configuration's codec.
#[test]
fn dense_layers_of_a_plan() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let mut p = plan();
    p.layers[1] = LayerPlan { keys: Side::Dense, values: Side::Dense };
    let cache = Cache::planned(&device, &stream, config(Codec::Int8, 6), &p).unwrap();
    let tolerance = Tolerance::merge();
    let mut lab = Lab { stream, cache, model: BTreeMap::new(), next_token: 1, codec: Codec::F16, tolerance };
    let a = lab.create();
    lab.extend(&[(a, 20)]).unwrap();
    lab.extend(&[(a, 1)]).unwrap();
}

#[test]
fn plans_of_another_shape_are_refused() {
    let device = Device::reference();
    let stream = device.stream().unwrap();
    let refused = |change: &dyn Fn(&mut Plan), word: &str| {
        let mut p = plan();
        change(&mut p);
        let e = Cache::planned(&device, &stream, config(Codec::F16, 4), &p).unwrap_err().to_string();
        assert!(e.contains(word), "{e:?} does not say {word:?}");
    };
    refused(&|p| p.layers.truncate(1), "1 layers");
    let factors = |p: &mut Plan, change: &dyn Fn(&mut Factors)| {
        let Side::LowRank(f) = &mut p.layers[0].keys else { return };
        change(f);
    };
    refused(&|p| factors(p, &|f| f.groups = vec![vec![0, 1, 2]]), "heads");
    let int8_values = |p: &mut Plan| {
        let Side::LowRank(f) = &mut p.layers[0].values else { return };
        f.latent = Latent::Int8;
    };
    refused(&int8_values, "beside");
    refused(
        &|p| {
            factors(p, &|f| {
                (f.rank, f.basis) = (16, vec![0.0; HEADS * DIM * 16]);
            });
        },
        "multiple of 32",
    );
}

#[test]
fn a_fork_shares_pages_until_it_writes() {
    let mut lab = Lab::new(Codec::F16, 8);
    let a = lab.create();
    lab.extend(&[(a, 20)]).unwrap();
    assert_eq!(lab.cache.usage().free, 6);
    let b = lab.cache.fork(a).unwrap();
    lab.model.insert(b, lab.model[&a].clone());
    assert_eq!((lab.cache.usage().free, lab.cache.usage().shared), (6, 2));
    lab.extend(&[(b, 1)]).unwrap(); // into the shared half of the second page
    assert_eq!((lab.cache.usage().free, lab.cache.usage().shared), (5, 1));
    lab.extend(&[(a, 1)]).unwrap(); // now its only owner
    assert_eq!(lab.cache.usage().free, 5);
    // On a page boundary nothing needs to be copied.
    let c = lab.create();
    lab.extend(&[(c, PAGE)]).unwrap();
    let d = lab.cache.fork(c).unwrap();
    lab.model.insert(d, lab.model[&c].clone());
    lab.extend(&[(d, 1)]).unwrap();
    assert_eq!(lab.cache.usage().free, 3);
}

#[test]
fn two_writers_of_one_page_take_one_copy() {
    let mut lab = Lab::new(Codec::F16, 3);
    let a = lab.create();
    lab.extend(&[(a, 20)]).unwrap();
    let b = lab.cache.fork(a).unwrap();
    lab.model.insert(b, lab.model[&a].clone());
    lab.extend(&[(a, 3), (b, 5)]).unwrap(); // one free page is enough
    assert_eq!(lab.cache.usage().free, 0);
}

#[test]
fn exhaustion_changes_nothing_and_can_be_recovered_from() {
    let mut lab = Lab::new(Codec::F16, 4);
    let (a, b) = (lab.create(), lab.create());
    lab.extend(&[(a, 40), (b, 10)]).unwrap();
    let before = lab.cache.usage();
    let e = lab.extend(&[(a, 5), (b, 20)]).unwrap_err();
    assert_eq!(e, CacheError::OutOfPages { needed: 1, free: 0, capacity: 4 });
    assert!(e.to_string().contains("1 pages needed"), "{e}");
    assert_eq!(lab.cache.usage(), before);
    lab.extend(&[(a, 5)]).unwrap();
    lab.cache.truncate(a, 16).unwrap();
    lab.model.get_mut(&a).unwrap().truncate(16);
    lab.extend(&[(a, 1), (b, 20)]).unwrap();
    lab.check();
}

#[test]
fn misuse_is_named() {
    let mut lab = Lab::new(Codec::F16, 4);
    let a = lab.create();
    lab.extend(&[(a, 10)]).unwrap();
    let mut batch = lab.cache.batch(BatchShape::new(1, 4, Q_HEADS)).unwrap();
    assert!(matches!(lab.cache.finish(&mut batch), Err(CacheError::Invalid { arg: "batch", .. })));
    let begin = |cache: &mut Cache, batch: &mut Batch, new: &[(SeqId, usize)]| cache.begin(&lab.stream, batch, new);
    assert_eq!(begin(&mut lab.cache, &mut batch, &[(a, 95)]).unwrap_err(), CacheError::TooLong { seq: a, rows: 105, max: 100 });
    assert!(matches!(begin(&mut lab.cache, &mut batch, &[(a, 5)]), Err(CacheError::Invalid { arg: "new tokens", .. })));
    let b = lab.cache.create();
    assert!(matches!(begin(&mut lab.cache, &mut batch, &[(a, 1), (b, 1)]), Err(CacheError::Invalid { arg: "sequences", .. })));
    begin(&mut lab.cache, &mut batch, &[(a, 1)]).unwrap();
    for e in [
        lab.cache.truncate(a, 0).unwrap_err(),
        lab.cache.fork(a).unwrap_err(),
        lab.cache.remove(a).unwrap_err(),
        lab.cache.commit(a, 1).unwrap_err(),
        begin(&mut lab.cache, &mut batch, &[(b, 1)]).unwrap_err(),
    ] {
        assert_eq!(e, CacheError::Busy(a));
    }
    lab.cache.cancel(&mut batch).unwrap();
    assert_eq!(lab.cache.len(a), Ok(10));
    lab.cache.commit(a, 8).unwrap();
    assert_eq!(lab.cache.truncate(a, 7).unwrap_err(), CacheError::Committed { seq: a, rows: 7, committed: 8 });
    assert!(matches!(lab.cache.truncate(a, 11), Err(CacheError::Invalid { .. })));
    let device = Device::reference();
    assert!(matches!(
        Cache::new(&device, CacheConfig { page_rows: 24, ..config(Codec::F16, 4) }),
        Err(CacheError::Invalid { arg: "page_rows", .. })
    ));
    assert!(matches!(
        Cache::new(&device, CacheConfig { pages: 0, ..config(Codec::F16, 4) }),
        Err(CacheError::Invalid { arg: "pages", .. })
    ));
    assert!(matches!(lab.cache.batch(BatchShape::new(1, 1, 3)), Err(CacheError::Device(_))));
}

#[test]
fn sizes_are_what_is_allocated() {
    for (codec, row) in [(Codec::F16, 2 * DIM), (Codec::Int8, DIM + 4)] {
        let lab = Lab::new(codec, 5);
        let c = lab.cache.config();
        assert_eq!(c.bytes_per_token(), LAYERS * HEADS * 2 * row);
        assert_eq!(c.bytes(1), PAGE * c.bytes_per_token());
        assert_eq!(c.bytes(PAGE + 1), 2 * PAGE * c.bytes_per_token());
        assert_eq!(lab.cache.usage().bytes, 5 * PAGE * c.bytes_per_token());
        assert_eq!(lab.cache.usage().used_bytes, 0);
    }
}
