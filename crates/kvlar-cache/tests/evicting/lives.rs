//! Forks, rollback and eviction in any order; rows as latents; running sums; what cannot be scored.

use super::choice::Scores;
use super::lab::{DIM, HEADS, LAYERS, Lab, Q_HEADS, config, keep_all};
use super::policies::{CODECS, gates};
use crate::devices::{on_every_device, tolerance_of_latents};
use kvlar::{Backend, Codec, Device};
use kvlar_cache::{CacheError, EvictingCache, EvictingConfig, Moment, Policy, SeqId, Size};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{HeadReduction, Pool, RowReduction, WindowColumns, WindowInput, score_window};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

on_every_device!(
    forks_live_on_when_one_evicts,
    what_is_not_committed_stays_and_comes_back,
    an_eviction_without_room_for_copies_changes_nothing,
    heavy_hitters_and_the_last_stay,
    the_last_query_decides_for_a_layer,
    layers_of_latents_are_evicted_as_a_whole,
    scores_that_are_no_numbers_are_the_least,
);

fn lab(device: &Device, policy: Policy) -> Lab {
    Lab::new(device, Codec::F16, 200, policy)
}

/// Scores of an engine, and what `share` of the tokens leaves of them beside 4 sinks.
fn give(lab: &mut Lab, seq: SeqId, seed: u64, share: f64) -> Vec<Vec<Vec<usize>>> {
    let tokens = lab.model[&seq].tokens.len();
    let values = Rng::new(seed).normals(LAYERS * HEADS * tokens, 1.0);
    let scores: Scores = lab.scores(seq, |l, h, p| values[(l * HEADS + h) * tokens + p]);
    for (l, of_layer) in scores.iter().enumerate() {
        lab.cache.set_scores(&lab.stream, seq, l, &of_layer.concat()).unwrap();
    }
    let committed = lab.model[&seq].committed;
    let forced = |p: usize| p < 4.min(committed) || p >= committed;
    let least = (0..tokens).filter(|&p| forced(p)).count();
    let k = ((share * tokens as f64).round() as usize).max(least) - least;
    lab.best_of_all(seq, &scores, |p| !forced(p), k * LAYERS * HEADS)
}

fn forks_live_on_when_one_evicts(device: &Device) {
    let mut lab = lab(device, Policy::kvzip(Size::Share(0.4)));
    let a = lab.create().unwrap();
    lab.extend(&[(a, 40)]).unwrap();
    let before = lab.fork(a).unwrap();
    lab.commit(a, 40).unwrap();
    let expected = give(&mut lab, a, 1, 0.4);
    let used = lab.cache.usage();
    lab.evict(a, Moment::Prompt, Some(expected)).unwrap();
    // The fork holds all of its pages still.
    assert_eq!(lab.cache.rows(before, 0).unwrap(), [40; HEADS]);
    assert!(lab.cache.usage().shared < used.shared);
    let after = lab.fork(a).unwrap();
    lab.extend(&[(a, 2), (before, 3), (after, 1)]).unwrap();
    lab.check();
    lab.remove(before).unwrap();
    lab.extend(&[(after, 20), (a, 1)]).unwrap();
    lab.check();
    lab.remove(a).unwrap();
    lab.check();
}

fn what_is_not_committed_stays_and_comes_back(device: &Device) {
    let mut lab = lab(device, Policy::kvzip(Size::Share(0.3)));
    let a = lab.create().unwrap();
    lab.extend(&[(a, 50)]).unwrap();
    lab.commit(a, 37).unwrap();
    let expected = give(&mut lab, a, 2, 0.3);
    lab.evict(a, Moment::Prompt, Some(expected)).unwrap();
    lab.extend(&[(a, 20)]).unwrap();
    lab.truncate(a, 45).unwrap();
    lab.extend(&[(a, 1)]).unwrap();
    lab.truncate(a, 37).unwrap();
    lab.extend(&[(a, 3)]).unwrap();
    lab.check();
    assert!(matches!(lab.truncate(a, 36), Err(CacheError::Committed { .. })));
    // Nothing is committed: nothing can go.
    let b = lab.create().unwrap();
    lab.extend(&[(b, 30)]).unwrap();
    lab.evict(b, Moment::Prompt, None).unwrap();
}

fn an_eviction_without_room_for_copies_changes_nothing(device: &Device) {
    let policy = Policy::kvzip(Size::Share(0.5));
    let mut lab = Lab::new(device, Codec::F16, 3 * LAYERS * HEADS, policy);
    let a = lab.create().unwrap();
    lab.extend(&[(a, 30)]).unwrap();
    lab.commit(a, 30).unwrap();
    let b = lab.fork(a).unwrap();
    let expected = give(&mut lab, a, 3, 0.5);
    let before = lab.cache.usage();
    let error = lab.cache.evict(&lab.stream, &mut lab.evictor, a, Moment::Prompt).unwrap_err();
    assert!(matches!(error, CacheError::OutOfPages { of: "pages", .. }));
    assert_eq!(lab.cache.usage(), before);
    lab.extend(&[(b, 0)]).unwrap();
    lab.remove(b).unwrap();
    lab.evict(a, Moment::Prompt, Some(expected)).unwrap();
    lab.extend(&[(a, 4)]).unwrap();
    lab.check();
}

/// Σ over steps of the attention that each row got from each step's queries, the mean over a kv head's query heads.
fn attention(lab: &Lab, seq: SeqId, sums: &mut Scores, last_only: bool) {
    let group = Q_HEADS / HEADS;
    for (l, h) in (0..LAYERS).flat_map(|l| (0..HEADS).map(move |h| (l, h))) {
        let k = lab.keys(seq, l, h, false);
        let rows = k.len() / DIM;
        let step = lab.queries[l].len() / Q_HEADS / DIM;
        let window = if last_only { 1 } else { step };
        let q: Vec<f32> = (h * group..(h + 1) * group)
            .flat_map(|head| lab.queries[l][(head * step + step - window) * DIM..(head + 1) * step * DIM].to_vec())
            .collect();
        let new = score_window(&WindowInput {
            seqs: 1,
            q_heads: group,
            kv_heads: 1,
            window,
            rows,
            head_dim: DIM,
            q: &q,
            k: &k,
            row_reduction: RowReduction::Sum,
            pool: Pool::None,
            head_reduction: HeadReduction::Mean,
            columns: WindowColumns::All,
            ..WindowInput::default()
        })
        .unwrap();
        let sums = &mut sums[l][h];
        if last_only {
            sums.clear();
        }
        sums.resize(rows, 0.0);
        sums.iter_mut().zip(new).for_each(|(sum, x)| *sum += x);
    }
}

fn heavy_hitters_and_the_last_stay(device: &Device) {
    let mut policy = Policy::h2o(20);
    policy.decode = Some(5);
    for codec in CODECS {
        let mut lab = Lab::new(device, codec, 200, policy.clone());
        let seq = lab.create().unwrap();
        let mut sums = vec![vec![Vec::new(); HEADS]; LAYERS];
        for step in 0..12 {
            lab.extend(&[(seq, if step == 0 { 30 } else { 2 })]).unwrap();
            let tokens = lab.model[&seq].tokens.len();
            lab.commit(seq, tokens).unwrap();
            attention(&lab, seq, &mut sums, false);
            let moment = if step == 0 { Moment::Prompt } else { Moment::Decode };
            let due = step == 0 || step % 3 == 0;
            let expected = due.then(|| lab.best_of_each(seq, &sums, (0, 10), |_, _| 20));
            let before = lab.model[&seq].rows.clone();
            lab.evict(seq, moment, expected).unwrap();
            // Sums stay with their rows.
            for (l, h) in (0..LAYERS).flat_map(|l| (0..HEADS).map(move |h| (l, h))) {
                let kept = &lab.model[&seq].rows[l][h];
                let of = |p: &usize| sums[l][h][before[l][h].iter().position(|x| x == p).unwrap()];
                sums[l][h] = kept.iter().map(of).collect();
            }
        }
    }
}

fn the_last_query_decides_for_a_layer(device: &Device) {
    for codec in CODECS {
        let mut lab = Lab::new(device, codec, 200, Policy::tova(12));
        lab.by_layer = true;
        let seq = lab.create().unwrap();
        for step in 0..10 {
            lab.extend(&[(seq, if step == 0 { 30 } else { 1 })]).unwrap();
            let tokens = lab.model[&seq].tokens.len();
            lab.commit(seq, tokens).unwrap();
            let mut scores = vec![vec![Vec::new(); HEADS]; LAYERS];
            attention(&lab, seq, &mut scores, true);
            for of_layer in &mut scores {
                let mean: Vec<f32> = of_layer[0].iter().zip(&of_layer[1]).map(|(a, b)| (a + b) / 2.0).collect();
                of_layer.fill(mean);
            }
            let moment = if step == 0 { Moment::Prompt } else { Moment::Decode };
            let expected = lab.best_of_each(seq, &scores, (0, 1), |_, _| 12);
            lab.evict(seq, moment, Some(expected)).unwrap();
        }
    }
}

fn layers_of_latents_are_evicted_as_a_whole(device: &Device) {
    let gates = gates();
    let stream = device.stream().unwrap();
    let policy = Policy::fast_kvzip(gates.clone(), 0.4, 4);
    let cache = EvictingCache::planned(device, &stream, config(Codec::F16, 100), policy, &crate::lab::plan()).unwrap();
    let mut lab = Lab::of(stream, cache, Codec::F16);
    lab.by_layer = true;
    lab.tolerance = match device.backend() {
        Backend::Reference => Tolerance::attend(kvlar_reference::Dtype::F16, kvlar_reference::Codec::F16, 200, 4.0),
        _ => tolerance_of_latents(device),
    };
    let seq = lab.create().unwrap();
    // Kernels attend over latents from 8 tokens at a time.
    for n in [8, 8, 8, 8, 8, 8, 8, 4] {
        lab.extend(&[(seq, n)]).unwrap();
    }
    lab.commit(seq, 60).unwrap();
    // The largest of the heads' scores; 2 % of 60 tokens are 1.
    let mut scores = lab.gate_scores(seq, &gates);
    for of_layer in &mut scores {
        let most: Vec<f32> = of_layer[0].iter().zip(&of_layer[1]).map(|(a, b)| a.max(*b)).collect();
        of_layer.fill(most);
    }
    let keep = (2.0 * 59.0 * (24.0 - 1.0) / 59.0) as usize;
    // One row stands for both heads of a layer.
    let mut all: Vec<(f32, usize, usize)> = (0..LAYERS).flat_map(|l| (0..59).map(move |p| (0.0, l, p))).collect();
    all.iter_mut().for_each(|x| x.0 = scores[x.1][0][x.2]);
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let kept: Vec<(usize, usize)> = all[..keep].iter().map(|x| (x.1, x.2)).collect();
    let expected = lab.filter(seq, |l, _, i| i == 59 || kept.contains(&(l, i)));
    lab.evict(seq, Moment::Chunk { prompt: 60 }, Some(expected)).unwrap();
    lab.extend(&[(seq, 5)]).unwrap();
    lab.check();
    // Attention reads latents, scores do not.
    let snapkv = Policy::snapkv(Size::Share(0.5));
    let error = EvictingCache::planned(device, &lab.stream, config(Codec::F16, 100), snapkv, &crate::lab::plan()).unwrap_err();
    assert!(matches!(error, CacheError::Device(kvlar::Error::Unsupported { .. })));
    // Rows that stay exact beside latents have another format.
    let plan = crate::lab::exact_plan(1.0, (4, 16));
    let keep = keep_all();
    let error = EvictingCache::planned(device, &lab.stream, config(Codec::F16, 100), keep, &plan).unwrap_err();
    assert!(matches!(error, CacheError::Invalid { arg: "plan", .. }));
}

fn scores_that_are_no_numbers_are_the_least(device: &Device) {
    let mut lab = lab(device, Policy::kvzip(Size::Tokens(10)));
    let seq = lab.create().unwrap();
    lab.extend(&[(seq, 20)]).unwrap();
    lab.commit(seq, 20).unwrap();
    let score = |_: usize, _: usize, p: usize| match p {
        0..8 => f32::NAN,
        8 => f32::NEG_INFINITY,
        9 => f32::INFINITY,
        p => p as f32,
    };
    let scores = lab.scores(seq, score);
    for (l, of_layer) in scores.iter().enumerate() {
        lab.cache.set_scores(&lab.stream, seq, l, &of_layer.concat()).unwrap();
    }
    let expected = lab.filter(seq, |_, _, i| i < 4 || i == 9 || i >= 15);
    lab.evict(seq, Moment::Prompt, Some(expected)).unwrap();
}

/// What may happen to a cache.
#[derive(Clone, Debug)]
enum Event {
    Extend(usize, usize),
    Both(usize, usize),
    Fork(usize),
    Truncate(usize, usize),
    Commit(usize, usize),
    Evict(usize, u64),
    Remove(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (0usize..4, 0usize..20).prop_map(|(s, n)| Event::Extend(s, n)),
        2 => (0usize..4, 1usize..6).prop_map(|(s, n)| Event::Both(s, n)),
        2 => (0usize..4).prop_map(Event::Fork),
        2 => (0usize..4, 0usize..30).prop_map(|(s, n)| Event::Truncate(s, n)),
        2 => (0usize..4, 0usize..30).prop_map(|(s, n)| Event::Commit(s, n)),
        3 => (0usize..4, any::<u64>()).prop_map(|(s, seed)| Event::Evict(s, seed)),
        1 => (0usize..4).prop_map(Event::Remove),
    ]
}

/// A history, how many pages there are, and whether rows go by their age.
fn histories() -> impl Strategy<Value = (Vec<Event>, usize, bool)> {
    (proptest::collection::vec(event(), 1..30), 20usize..90, any::<bool>())
}

/// Whatever happens, in any order: heads hold what the model says, attention sees it, and no page is lost or shared wrongly.
fn play(device: &Device, (events, pages, by_age): (Vec<Event>, usize, bool)) -> Result<(), TestCaseError> {
    let policy = if by_age { Policy::streaming_llm(9) } else { Policy::kvzip(Size::Share(0.5)) };
    let config = EvictingConfig { pages, ..config(Codec::F16, pages) };
    let cache = EvictingCache::new(device, config, policy).unwrap();
    let mut lab = Lab::of(device.stream().unwrap(), cache, Codec::F16);
    lab.create().unwrap();
    for event in events {
        let names: Vec<SeqId> = lab.model.keys().copied().collect();
        let Some(&first) = names.first() else {
            lab.create().unwrap();
            continue;
        };
        let of = |i: usize| names[i % names.len()];
        let before = lab.cache.usage();
        let result = match event {
            Event::Extend(i, n) => lab.extend(&[(of(i), n)]),
            Event::Both(i, n) if of(i) != first => lab.extend(&[(of(i), n), (first, 1)]),
            Event::Both(i, n) => lab.extend(&[(of(i), n)]),
            Event::Fork(i) => lab.fork(of(i)).map(|_| ()),
            Event::Truncate(i, n) => lab.truncate(of(i), n),
            Event::Commit(i, n) => lab.commit(of(i), n),
            Event::Remove(i) => lab.remove(of(i)),
            Event::Evict(i, seed) => evict(&mut lab, of(i), by_age, seed),
        };
        if let Err(e) = result {
            let expected = matches!(
                e,
                CacheError::OutOfPages { .. }
                    | CacheError::TooLong { .. }
                    | CacheError::Committed { .. }
                    | CacheError::Invalid { arg: "tokens", .. }
            );
            prop_assert!(expected, "{e}");
            prop_assert_eq!(lab.cache.usage(), before);
        }
        lab.check();
    }
    let names: Vec<SeqId> = lab.model.keys().copied().collect();
    for seq in names {
        lab.remove(seq).unwrap();
    }
    prop_assert_eq!(lab.cache.usage().free, lab.cache.usage().pages);
    Ok(())
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(48))]
    #[test]
    fn caches_do_as_their_model(history in histories()) {
        play(&Device::reference(), history)?;
    }
}

/// The same few each time.
fn a_few_histories(device: &Device) {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(cases(6), rng).run(&histories(), |history| play(device, history)).unwrap();
}

mod histories_on_kernels {
    use crate::devices::on_kernels;

    use super::a_few_histories;
    on_kernels!(a_few_histories);
}

/// What the policy does at the end of a prompt, by scores of its own.
fn evict(lab: &mut Lab, seq: SeqId, by_age: bool, seed: u64) -> Result<(), CacheError> {
    let s = &lab.model[&seq];
    let (tokens, committed) = (s.tokens.len(), s.committed);
    let recent_from = if by_age { tokens.saturating_sub(5).min(committed) } else { committed };
    let forced = move |p: usize| p < 4 || p >= recent_from;
    let whole = s.rows.concat().iter().all(|rows| rows.len() == tokens);
    let mut least = 4.min(recent_from) + tokens - recent_from;
    let expected = if by_age {
        s.rows
            .concat()
            .iter()
            .any(|rows| rows.len() > least)
            .then(|| lab.filter(seq, |l, h, i| forced(lab.model[&seq].rows[l][h][i])))
    } else if whole {
        least = least.max((0.5 * tokens as f64).round() as usize);
        let expected = give(lab, seq, seed, 0.5);
        (tokens > least).then_some(expected)
    } else {
        // Its scores are known no more: what would stay is for other tests to say.
        return Ok(());
    };
    let some = lab.cache.evict(&lab.stream, &mut lab.evictor, seq, Moment::Prompt)?;
    assert_eq!(some, expected.is_some());
    lab.cache.collect(&lab.stream, &mut lab.evictor, seq)?;
    if let Some(rows) = expected {
        lab.model.get_mut(&seq).unwrap().rows = rows;
    }
    Ok(())
}
