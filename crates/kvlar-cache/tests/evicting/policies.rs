//! Each policy keeps what it should, in bits: what attention sees afterwards is what the model holds.

use super::lab::{HEADS, HIDDEN, LAYERS, Lab, Q_HEADS, config};
use crate::devices::on_every_device;
use kvlar::{Codec, Device};
use kvlar_cache::{CacheError, EvictingCache, EvictingConfig, Moment, Policy, Sharing, Size};
use kvlar_calibrate::gate::{Gate, GateShape, Gates};
use kvlar_reference::testing::Rng;
use kvlar_reference::{Dtype, HeadsInput, KeyMethod, LayerBudget, LayersInput, Pool, RowReduction, budget_heads, budget_layers};
use std::sync::Arc;

on_every_device!(
    keys_that_score_best_stay,
    lagkv_goes_lag_by_lag,
    streams_keep_their_ends,
    attention_of_the_last_tokens_decides,
    kvzip_keeps_the_best_of_all,
    gates_judge_a_prompt_chunk_by_chunk,
    gates_judge_again_while_decoding,
);

fn lab(device: &Device, codec: Codec, policy: Policy) -> Lab {
    Lab::new(device, codec, 200, policy)
}

/// Rows as they are, and codes, which are scored as what they decode to.
pub const CODECS: [Codec; 2] = [Codec::F16, Codec::Int4];

/// A prompt of some tokens, committed.
fn prompt(lab: &mut Lab, tokens: usize) -> kvlar_cache::SeqId {
    let seq = lab.create().unwrap();
    lab.extend(&[(seq, tokens)]).unwrap();
    lab.commit(seq, tokens).unwrap();
    seq
}

/// Gates with some will of their own: those of initialization score all alike.
pub fn gates() -> Arc<Gates> {
    let shape = GateShape { hidden: HIDDEN, kv_heads: HEADS, group: Q_HEADS / HEADS, gate_dim: 16, sinks: 16 };
    let layer = |l: usize| {
        let mut gate = Gate::init(shape, 3, l).unwrap();
        let mut rng = Rng::new(l as u64);
        gate.k_base = rng.normals(gate.k_base.len(), 1.0);
        gate.b = rng.normals(gate.b.len(), 0.5);
        Some(gate)
    };
    Arc::new(Gates::new("a model", Dtype::F16, (0..LAYERS).map(layer).collect()).unwrap())
}

fn keys_that_score_best_stay(device: &Device) {
    let policies =
        [(Policy::l2_norm(Size::Share(0.5)), KeyMethod::L2Norm), (Policy::keydiff(Size::Tokens(21)), KeyMethod::KeyDiff)];
    for ((policy, method), codec) in policies.into_iter().flat_map(|p| CODECS.map(|c| (p.clone(), c))) {
        let mut lab = lab(device, codec, policy);
        let seq = prompt(&mut lab, 50);
        let k = if method == KeyMethod::L2Norm { 25 } else { 21 };
        let expected = lab.best_of_each(seq, &lab.key_scores(seq, method), (0, 0), |_, _| k);
        lab.evict(seq, Moment::Prompt, Some(expected)).unwrap();
        lab.extend(&[(seq, 3)]).unwrap();
        lab.check();
        // Nothing is left to go, nor does it go while decoding.
        lab.evict(seq, Moment::Decode, None).unwrap();
    }
}

fn lagkv_goes_lag_by_lag(device: &Device) {
    for codec in CODECS {
        let mut lab = lab(device, codec, Policy::lagkv(Size::Tokens(40)));
        let seq = prompt(&mut lab, 60);
        // Shorter than two lags: all score alike, ties go to the first, beside the sinks.
        let expected = lab.best_of_each(seq, &lab.key_scores(seq, KeyMethod::LagKv), (4, 0), |_, _| 40);
        assert_eq!(expected[0][0], (0..40).collect::<Vec<_>>());
        lab.evict(seq, Moment::Prompt, Some(expected)).unwrap();
        lab.extend(&[(seq, 2)]).unwrap();
    }
}

fn streams_keep_their_ends(device: &Device) {
    let mut lab = lab(device, Codec::F16, Policy::streaming_llm(20));
    let seq = prompt(&mut lab, 50);
    let expected = lab.filter(seq, |_, _, i| !(4..34).contains(&i));
    lab.evict(seq, Moment::Prompt, Some(expected)).unwrap();
    for step in 1..=130 {
        lab.extend(&[(seq, 1)]).unwrap();
        lab.commit(seq, 50 + step).unwrap();
        let total = 50 + step;
        let rows = lab.model[&seq].rows[0][0].clone();
        let due = step % 64 == 0;
        let expected = due.then(|| lab.filter(seq, |_, _, i| rows[i] < 4 || rows[i] >= total - 16));
        lab.evict(seq, Moment::Decode, expected).unwrap();
    }
    assert!(lab.model[&seq].rows[0][0].len() < 30);
}

fn attention_of_the_last_tokens_decides(device: &Device) {
    let base = 12;
    for (policy, window, over_rows, pool) in [
        (Policy::snapkv(Size::Tokens(32 + base)), 32, RowReduction::Mean, Pool::Max(7)),
        (Policy::pyramidkv(Size::Tokens(32 + base)), 32, RowReduction::Mean, Pool::Max(7)),
        (Policy::dynamickv(Size::Tokens(8 + base)), 8, RowReduction::Sum, Pool::Avg(7)),
        (Policy::adakv(Size::Tokens(32 + base)), 32, RowReduction::Mean, Pool::Max(7)),
    ] {
        let sharing = policy.sharing;
        for codec in CODECS {
            let mut lab = lab(device, codec, policy.clone());
            let seq = prompt(&mut lab, 90);
            let scores = lab.window_scores(seq, window, over_rows, pool);
            let rows = 90 - window;
            let flat: Vec<f32> = scores.concat().concat();
            assert_eq!(flat.len(), LAYERS * HEADS * rows);
            let layers = |method| {
                let (r_max, interval, beta) = (10.0, 4, 20);
                budget_layers(&LayersInput {
                    layers: LAYERS,
                    heads: HEADS,
                    rows,
                    scores: &flat,
                    base,
                    method,
                    r_max,
                    interval,
                    beta,
                })
                .unwrap()
            };
            let budget: Vec<Vec<i32>> = match sharing {
                Sharing::Pyramid { .. } => layers(LayerBudget::Pyramid).iter().map(|&n| vec![n; HEADS]).collect(),
                Sharing::Dynamic { .. } => layers(LayerBudget::DynamicKv).iter().map(|&n| vec![n; HEADS]).collect(),
                Sharing::Heads { alpha } => {
                    let of = |scores: &Vec<Vec<f32>>| {
                        budget_heads(&HeadsInput { heads: HEADS, rows, scores: &scores.concat(), base, alpha }).unwrap()
                    };
                    scores.iter().map(of).collect()
                }
                _ => vec![vec![base as i32; HEADS]; LAYERS],
            };
            let expected = lab.best_of_each(seq, &scores, (0, window), |l, h| window + budget[l][h] as usize);
            let lengths: Vec<usize> = expected.concat().iter().map(Vec::len).collect();
            let ragged = lengths.iter().any(|n| *n != lengths[0]);
            assert_eq!(ragged, !matches!(sharing, Sharing::Each), "{lengths:?}");
            lab.evict(seq, Moment::Prompt, Some(expected)).unwrap();
            lab.prompt = false;
            for _ in 0..3 {
                lab.extend(&[(seq, 1)]).unwrap();
            }
            lab.check();
        }
    }
}

fn kvzip_keeps_the_best_of_all(device: &Device) {
    for floor in [0, 3] {
        let policy = Policy::kvzip(Size::Share(0.3));
        let mut lab = lab(device, Codec::F16, Policy { sharing: Sharing::All { floor, strict: false }, ..policy });
        let seq = prompt(&mut lab, 50);
        let score = |l: usize, h: usize, p: usize| ((l * 31 + h * 17 + p * 7) % 23) as f32 + if l == 0 { 20.0 } else { 0.0 };
        let scores = lab.scores(seq, score);
        for (l, of_layer) in scores.iter().enumerate() {
            lab.cache.set_scores(&lab.stream, seq, l, &of_layer.concat()).unwrap();
        }
        let mut expected = lab.best_of_all(seq, &scores, |p| p >= 4, 15 * 4 - 16);
        if floor > 0 {
            // Each head's best first, then the best of the others.
            let best = lab.best_of_each(seq, &scores, (4, 0), |_, _| 4 + floor);
            let left = 15 * 4 - best.concat().iter().map(Vec::len).sum::<usize>();
            let mut others = scores.clone();
            for (l, h) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                best[l][h].iter().for_each(|&p| others[l][h][p] = f32::NAN);
            }
            let more = lab.best_of_all(seq, &others, |_| true, left);
            expected = lab.filter(seq, |l, h, i| best[l][h].contains(&i) || more[l][h].contains(&i));
        }
        assert!(expected[0][0].len() > expected[1][0].len());
        lab.evict(seq, Moment::Prompt, Some(expected)).unwrap();
        lab.extend(&[(seq, 3)]).unwrap();
        // What is gone cannot be scored.
        assert!(matches!(lab.cache.set_scores(&lab.stream, seq, 0, &[0.0; 106]), Err(CacheError::Invalid { .. })));
    }
}

fn gates_judge_a_prompt_chunk_by_chunk(device: &Device) {
    for codec in [Codec::F16, Codec::Int4] {
        let gates = gates();
        // 2 % of 100 tokens are 2.
        let policy = Policy::fast_kvzip(gates.clone(), 0.3, 10);
        let mut lab = Lab::new(device, codec, 200, policy);
        let seq = lab.create().unwrap();
        let (rate, mut judged) = ((30.0 - 2.0) / 98.0, 0);
        for chunk in [40, 33, 27] {
            lab.extend(&[(seq, chunk)]).unwrap();
            let tokens = lab.model[&seq].tokens.len();
            lab.commit(seq, tokens).unwrap();
            let region = judged..tokens - 2;
            let keep = (4.0 * region.len() as f64 * rate) as usize;
            let expected = lab.best_of_all(seq, &lab.gate_scores(seq, &gates), |p| region.contains(&p), keep);
            lab.evict(seq, Moment::Chunk { prompt: 100 }, Some(expected)).unwrap();
            judged = tokens - 2;
        }
        let kept: usize = lab.model[&seq].rows.concat().iter().map(Vec::len).sum();
        assert!((116..=120).contains(&kept), "{kept} of 400");
        assert!(lab.cache.sequence_bytes(seq).unwrap() < 400 * 4 * 8 * 4);
        lab.prompt = false;
        lab.extend(&[(seq, 1)]).unwrap();
        lab.evict(seq, Moment::Decode, None).unwrap();
    }
}

fn gates_judge_again_while_decoding(device: &Device) {
    let gates = gates();
    let mut policy = Policy::fast_kvzip_decode(gates.clone(), 24);
    (policy.recent, policy.decode) = (10, Some(12));
    let mut lab = lab(device, Codec::F16, policy);
    let seq = lab.create().unwrap();
    for step in 1..=100 {
        lab.extend(&[(seq, 1)]).unwrap();
        let tokens = lab.model[&seq].tokens.len();
        assert_eq!(tokens, step);
        lab.commit(seq, tokens).unwrap();
        let rows: usize = lab.model[&seq].rows.concat().iter().map(Vec::len).sum();
        let due = step % 12 == 0 && rows > 24 * 4;
        let expected = due.then(|| {
            let competes = |p: usize| p >= 4 && p < tokens - 10;
            lab.best_of_all(seq, &lab.gate_scores(seq, &gates), competes, (24 - 14) * 4)
        });
        lab.evict(seq, Moment::Decode, expected).unwrap();
    }
    let rows: usize = lab.model[&seq].rows.concat().iter().map(Vec::len).sum();
    assert_eq!(rows, 24 * 4 + 4 * 4);
}

#[test]
fn policies_that_contradict_themselves_are_refused() {
    let device = Device::reference();
    let new = |config: EvictingConfig, policy| EvictingCache::new(&device, config, policy).map(|_| ());
    let f16 = config(Codec::F16, 100);
    let invalid = |arg: &str, policy: Policy| match new(f16, policy).unwrap_err() {
        CacheError::Invalid { arg: a, .. } => assert_eq!(a, arg),
        e => panic!("{e}"),
    };
    invalid("size", Policy::snapkv(Size::Share(0.0)));
    invalid("size", Policy::snapkv(Size::Share(f64::NAN)));
    invalid("size", Policy::snapkv(Size::Tokens(31)));
    invalid("decode", Policy { decode: Some(0), ..Policy::l2_norm(Size::Share(0.5)) });
    invalid("decode", Policy { decode: Some(8), ..Policy::snapkv(Size::Share(0.5)) });
    invalid("alpha", Policy { sharing: Sharing::Heads { alpha: 1.5 }, ..Policy::snapkv(Size::Share(0.5)) });
    invalid("beta", Policy { sharing: Sharing::Pyramid { beta: 0 }, ..Policy::snapkv(Size::Share(0.5)) });
    invalid("r_max", Policy { sharing: Sharing::Dynamic { r_max: 0.0, interval: 4 }, ..Policy::snapkv(Size::Share(0.5)) });
    invalid("floor", Policy { sharing: Sharing::All { floor: 2, strict: true }, ..Policy::kvzip(Size::Share(0.5)) });
    invalid("prompt", Policy { prompt: kvlar_cache::Prompt::EachChunk, ..Policy::kvzip(Size::Share(0.5)) });
    let deeper = EvictingConfig { layers: LAYERS + 1, ..f16 };
    assert!(matches!(new(deeper, Policy::fast_kvzip(gates(), 0.5, 4)), Err(CacheError::Invalid { arg: "gates", .. })));
    let wider = EvictingConfig { kv_heads: 4, ..f16 };
    assert!(matches!(new(wider, Policy::fast_kvzip(gates(), 0.5, 4)), Err(CacheError::Invalid { arg: "gates", .. })));
    let unstaged = EvictingConfig { staged: 0, ..f16 };
    assert!(matches!(new(unstaged, Policy::fast_kvzip(gates(), 0.5, 4)), Err(CacheError::Invalid { arg: "staged", .. })));
    let mut lab = lab(&device, Codec::F16, Policy::fast_kvzip(gates(), 0.5, 4));
    let seq = lab.create().unwrap();
    // More tokens than scores of can wait.
    assert!(matches!(lab.extend(&[(seq, 121)]), Err(CacheError::Invalid { arg: "new tokens", .. })));
    let other = EvictingCache::new(&device, f16, Policy::kvzip(Size::Share(0.5))).unwrap();
    let mut evictor = other.evictor().unwrap();
    let error = lab.cache.evict(&lab.stream, &mut evictor, seq, Moment::Prompt).unwrap_err();
    assert!(matches!(error, CacheError::Invalid { arg: "evictor", .. }));
}
