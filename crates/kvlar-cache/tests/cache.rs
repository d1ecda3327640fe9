//! Histories of a cache against a model of it, and what it refuses.

use crate::devices::{on_kernels, tolerance_of_latents};
use crate::lab::{DIM, HEADS, LAYERS, Lab, PAGE, Q_HEADS, config, exact_plan, plan};
use kvlar::{Codec, Device, Format};
use kvlar_cache::{Batch, BatchShape, Cache, CacheConfig, CacheError, Queries, SeqId};
use kvlar_calibrate::{Factors, KeyBasis, Latent, LayerPlan, Plan, RecalkvConfig, Side};
use kvlar_reference::compare;
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use proptest::prelude::*;
use std::collections::BTreeMap;

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
                lab.forked(a, copy);
                if let Some(&n) = committed.get(&a) {
                    committed.insert(copy, n);
                }
            }
            Op::Truncate(a, n) => {
                let Some(a) = pick(a) else { continue };
                let (held, floor) = (lab.model[&a].len(), committed.get(&a).copied().unwrap_or(0));
                let mut n = n;
                let mut result = lab.cache.truncate(a, n);
                if let Err(CacheError::PartOfGroup { whole, .. }) = result {
                    // Codes of a group come back together, where no more of it is held.
                    assert!(
                        lab.encoded.is_some()
                            && whole < n
                            && n - whole < lab.group
                            && (whole - lab.exact.0).is_multiple_of(lab.group)
                    );
                    assert!(n + lab.exact.2 < held || lab.lost.contains_key(&a), "{n} of {held} are within the rollback");
                    n = whole;
                    result = lab.cache.truncate(a, n);
                }
                assert_eq!(result.is_ok(), n <= held && n >= floor, "{result:?}");
                if result.is_ok() {
                    lab.truncated(a, n);
                }
            }
            Op::Commit(a, n) => {
                let Some(a) = pick(a) else { continue };
                let (held, floor) = (lab.model[&a].len(), committed.get(&a).copied().unwrap_or(0));
                let result = lab.cache.commit(a, n);
                assert_eq!(result.is_ok(), n <= held && n >= floor);
                if result.is_ok() {
                    committed.insert(a, n);
                    lab.held.entry(a).or_default().0 = n;
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
    let usage = lab.cache.usage();
    assert_eq!((usage.free, usage.exact_free, usage.used_bytes), (12, usage.exact_pages, 0));
    assert!(lab.cache.is_empty());
}

on_kernels!(planned_layers, int8_bases_of_a_plan);

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
    fn any_history_with_exact_rows_agrees_with_the_model(
        ops in ops(),
        sinks in 0..20usize,
        recent in 0..40usize,
        rollback in prop_oneof![Just(0), 0..40usize],
    ) {
        play(Lab::exact(&Device::reference(), 12, Tolerance::merge(), (sinks, recent, rollback)), &ops);
    }
    #[test]
    fn any_history_of_rows_that_are_encoded_later_agrees_with_the_model(
        ops in ops(),
        sinks in 0..20usize,
        recent in 0..40usize,
        rollback in prop_oneof![Just(0), 0..40usize],
        kind in 0..4usize,
        groups in prop_oneof![Just(1), Just(4)],
    ) {
        let channels = |group| Format { group: Some(group), ..Codec::Int4Channel.into() };
        let (formats, group) = match kind {
            0 => ([Codec::Int4.into(), Codec::Int8.into()], 16),
            1 => ([Codec::Int4Channel.into(), Codec::Int4.into()], 32),
            2 => ([Codec::Int2Channel.into(), Codec::Int2.into()], 32),
            _ => ([channels(64), Codec::Int8.into()], 64),
        };
        // Without exact rows, rows whose scales are their own are encoded at once: another test's.
        let recent = if kind == 0 && sinks == 0 { recent + 1 } else { recent };
        play(Lab::encoded(&Device::reference(), 12, Tolerance::merge(), (sinks, recent, rollback), formats, (group, groups)), &ops);
    }
    #[test]
    fn any_history_of_int8_rows_agrees_with_the_model(ops in ops()) {
        play(Lab::new([Codec::Int8, Codec::Int4, Codec::Int2, Codec::Fp8][ops.len() % 4], 12), &ops);
    }
}

/// The same on the emulated kernels, with one history: forks, copies on write, truncation, up to 8 tokens a step.
fn planned_layers(device: &Device) {
    let tolerance = tolerance_of_latents(device);
    run_on_kernels(Lab::planned(device, 12, tolerance));
    for exact in [(0, 7, 0), (5, 0, 9), (5, 7, 3), (16, 16, 20)] {
        run_on_kernels(Lab::exact(device, 12, tolerance, exact));
    }
}

fn run_on_kernels(mut lab: Lab) {
    let device = lab.stream.device().clone();
    let a = lab.create();
    for n in [8, 8, 5] {
        lab.extend(&[(a, n)]).unwrap();
    }
    let b = lab.cache.fork(a).unwrap();
    lab.forked(a, b);
    lab.extend(&[(a, 1), (b, 3)]).unwrap();
    lab.cache.truncate(b, 17).unwrap();
    lab.truncated(b, 17);
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

/// A plan with int8 latents and an int8 basis: kernels agree with the reference, and both with a 16-bit basis but for
/// what 8 bits lose.
fn int8_bases_of_a_plan(device: &Device) {
    let outputs = |device: &Device, key_basis| {
        let mut p = plan();
        p.config = RecalkvConfig { key_basis, ..RecalkvConfig::default() }.into();
        let mut rng = Rng::new(7);
        for layer in &mut p.layers {
            for side in [&mut layer.keys, &mut layer.values] {
                let Side::LowRank(f) = side else { continue };
                f.latent = Latent::Int8;
                f.basis.iter_mut().for_each(|x| *x += 0.1 * rng.normal());
            }
        }
        let stream = device.stream().unwrap();
        let cache = Cache::planned(device, &stream, config(Codec::F16, 12), &p).unwrap();
        let anything = Tolerance { absolute: f64::MAX, relative: 0.0, cosine: 2.0 };
        let mut lab = Lab::of(stream, cache, Codec::F16, anything);
        let a = lab.create();
        for n in [8, 8, 8, 3] {
            lab.extend(&[(a, n)]).unwrap();
        }
        (lab.cache.fixed_bytes(), lab.outputs.concat())
    };
    let (bytes, reference) = outputs(&Device::reference(), KeyBasis::Int8);
    let (_, kernels) = outputs(device, KeyBasis::Int8);
    let tolerance = tolerance_of_latents(device);
    compare::compare(&kernels, &reference, tolerance).unwrap();
    let (more_bytes, wide) = outputs(device, KeyBasis::Model);
    assert!(bytes < more_bytes);
    compare::compare(&wide, &reference, Tolerance { absolute: 0.1, relative: 0.0, cosine: 1e-3 }).unwrap();
    assert!(compare::compare(&wide, &reference, tolerance).is_err(), "nothing was lost: was the basis in 8 bits?");
}

#[test]
fn a_batch_of_another_cache_is_refused() {
    let device = Device::reference();
    // Equal configurations, other layers.
    let (mut planned, mut dense) = (Lab::planned(&device, 4, Tolerance::merge()), Lab::new(Codec::F16, 4));
    let (a, b) = (planned.create(), dense.create());
    let mut batch = dense.cache.batch(BatchShape::new(1, 1, Q_HEADS)).unwrap();
    let is_refused = |result: Result<(), CacheError>| {
        assert!(matches!(result, Err(CacheError::Invalid { arg: "batch", .. })), "{result:?}");
    };
    is_refused(planned.cache.begin(&planned.stream, &mut batch, &[(a, 1)]));
    // Its step is the other cache's to end, and goes on.
    assert_eq!(a, b);
    dense.cache.begin(&dense.stream, &mut batch, &[(b, 1)]).unwrap();
    is_refused(planned.cache.finish(&mut batch));
    is_refused(planned.cache.cancel(&mut batch));
    assert_eq!(dense.cache.truncate(b, 0), Err(CacheError::Busy(b)));
    dense.cache.finish(&mut batch).unwrap();
    assert_eq!((planned.cache.len(a), dense.cache.len(b)), (Ok(0), Ok(1)));
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
    let mut lab = Lab::of(stream, cache, Codec::F16, tolerance);
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
    lab.forked(a, b);
    assert_eq!((lab.cache.usage().free, lab.cache.usage().shared), (6, 2));
    lab.extend(&[(b, 1)]).unwrap(); // into the shared half of the second page
    assert_eq!((lab.cache.usage().free, lab.cache.usage().shared), (5, 1));
    lab.extend(&[(a, 1)]).unwrap(); // now its only owner
    assert_eq!(lab.cache.usage().free, 5);
    // On a page boundary nothing needs to be copied.
    let c = lab.create();
    lab.extend(&[(c, PAGE)]).unwrap();
    let d = lab.cache.fork(c).unwrap();
    lab.forked(c, d);
    lab.extend(&[(d, 1)]).unwrap();
    assert_eq!(lab.cache.usage().free, 3);
}

#[test]
fn two_writers_of_one_page_take_one_copy() {
    let mut lab = Lab::new(Codec::F16, 3);
    let a = lab.create();
    lab.extend(&[(a, 20)]).unwrap();
    let b = lab.cache.fork(a).unwrap();
    lab.forked(a, b);
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
    assert_eq!(e, CacheError::OutOfPages { of: "pages", needed: 1, free: 0, capacity: 4 });
    assert!(e.to_string().contains("1 pages needed"), "{e}");
    assert_eq!(lab.cache.usage(), before);
    lab.extend(&[(a, 5)]).unwrap();
    lab.cache.truncate(a, 16).unwrap();
    lab.truncated(a, 16);
    lab.extend(&[(a, 1), (b, 20)]).unwrap();
    lab.check();
}

/// Exact rows have pages of their own: enough for as many sequences as the configuration says, however long their steps.
#[test]
fn exact_rows_of_max_seqs_sequences_have_room() {
    let exact = (5, 30, 10);
    let mut lab = Lab::exact(&Device::reference(), 12, Tolerance::merge(), exact);
    let one = CacheConfig { max_seqs: 1, rollback_rows: 10, ..config(Codec::F16, 12) };
    lab.cache = Cache::planned(lab.stream.device(), &lab.stream, one, &exact_plan(lab.factor, (5, 30))).unwrap();
    let a = lab.create();
    for n in [50, 45] {
        lab.extend(&[(a, n)]).unwrap();
    }
    lab.cache.remove(a).unwrap();
    lab.model.remove(&a);
    // Or for more that are short: one page of sinks and two of recent rows each.
    for _ in 0..3 {
        let seq = lab.create();
        lab.extend(&[(seq, 30)]).unwrap();
    }
    let (seq, before) = (lab.create(), lab.cache.usage());
    let e = lab.extend(&[(seq, 30)]).unwrap_err();
    assert_eq!(e, CacheError::OutOfPages { of: "pages of exact rows", needed: 3, free: 0, capacity: 9 });
    assert_eq!(lab.cache.usage(), before);
}

#[test]
fn misuse_is_named() {
    let mut lab = Lab::new(Codec::F16, 4);
    let a = lab.create();
    lab.extend(&[(a, 10)]).unwrap();
    let mut batch = lab.cache.batch(BatchShape::new(1, 4, Q_HEADS)).unwrap();
    assert!(matches!(lab.cache.finish(&mut batch), Err(CacheError::Invalid { arg: "batch", .. })));
    let begin = |cache: &mut Cache, batch: &mut Batch, new: &[(SeqId, usize)]| cache.begin(&lab.stream, batch, new);
    let mut wide = lab.cache.batch(BatchShape::new(1, 95, Q_HEADS)).unwrap();
    assert_eq!(begin(&mut lab.cache, &mut wide, &[(a, 95)]).unwrap_err(), CacheError::TooLong { seq: a, rows: 105, max: 100 });
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
    for (codec, row) in
        [(Codec::F16, 2 * DIM), (Codec::Int8, DIM + 4), (Codec::Int4, (DIM / 2).next_multiple_of(16) + 4), (Codec::Fp8, DIM)]
    {
        let lab = Lab::new(codec, 5);
        let c = lab.cache.config();
        assert_eq!(c.bytes_per_token(), LAYERS * HEADS * 2 * row);
        assert_eq!(c.bytes(1), PAGE * c.bytes_per_token());
        assert_eq!(c.bytes(PAGE + 1), 2 * PAGE * c.bytes_per_token());
        assert_eq!(lab.cache.usage().bytes, 5 * PAGE * c.bytes_per_token());
        assert_eq!(lab.cache.usage().used_bytes, 0);
    }
}
