//! Training of gates: derivatives against finite differences of plain f64 loops, the schedule, and what training achieves.

use crate::common::{close, says};
use kvlar_calibrate::gate::*;
use kvlar_reference::Dtype;
use kvlar_reference::testing::Rng;

const SHAPES: [GateShape; 3] = [
    GateShape { hidden: 5, kv_heads: 1, group: 1, gate_dim: 4, sinks: 1 },
    GateShape { hidden: 7, kv_heads: 2, group: 3, gate_dim: 4, sinks: 5 },
    GateShape { hidden: 12, kv_heads: 3, group: 2, gate_dim: 16, sinks: 16 },
];

/// A gate with no tensor at its start.
fn random(shape: GateShape, seed: u64) -> Gate {
    let mut gate = Gate::init(shape, seed, 0).unwrap();
    let mut rng = Rng::new(seed);
    for (part, size) in
        [(&mut gate.q_norm, 0.3), (&mut gate.k_norm, 0.3), (&mut gate.k_base, 0.8), (&mut gate.b, 0.5), (&mut gate.q_bias, 0.2)]
    {
        let n = part.len();
        part.iter_mut().zip(rng.normals(n, size)).for_each(|(x, r)| *x += r);
    }
    gate
}

/// Scores of tokens in (0, 1), [H, T].
fn targets(rng: &mut Rng, n: usize) -> Vec<f32> {
    rng.normals(n, 2.0).into_iter().map(|x| 1.0 / (1.0 + (1.0 - x).exp())).collect()
}

/// Tensors of a gate in f64, in the order of its shape.
fn wide(gate: &Gate) -> Vec<Vec<f64>> {
    gate.tensors().iter().map(|t| t.iter().map(|x| f64::from(*x)).collect()).collect()
}

/// Scores [H, T], by plain loops: `[wq, bq, wk, norm of q, norm of k, sinks, b]`.
fn plain(s: GateShape, tensors: &[Vec<f64>], hidden: &[f32]) -> Vec<f64> {
    let [wq, bq, wk, nq, nk, base, b] = tensors else { panic!("seven tensors") };
    let dim = s.gate_dim;
    let row = |w: &[f64], r: usize, x: &[f32]| (0..s.hidden).map(|i| w[r * s.hidden + i] * f64::from(x[i])).sum::<f64>();
    let norm = |x: Vec<f64>, w: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / dim as f64;
        x.iter().zip(w).map(|(x, w)| x / (mean + 1e-6).sqrt() * w).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt();
    let mut scores = Vec::new();
    for h in 0..s.kv_heads {
        for x in hidden.chunks(s.hidden) {
            let k = norm((0..dim).map(|j| row(wk, h * dim + j, x)).collect(), nk);
            let mut sum = 0.0;
            for g in 0..s.group {
                let first = (h * s.group + g) * dim;
                let q = norm((0..dim).map(|j| row(wq, first + j, x) + bq[first + j]).collect(), nq);
                let own = (dot(&q, &k) + b[h * s.group + g]).exp();
                let sinks: f64 = (0..s.sinks).map(|i| dot(&q, &base[(h * s.sinks + i) * dim..][..dim]).exp()).sum();
                sum += own / (own + sinks);
            }
            scores.push(sum / s.group as f64);
        }
    }
    scores
}

fn plain_loss(s: GateShape, tensors: &[Vec<f64>], hidden: &[f32], scores: &[f32]) -> f64 {
    let tokens = hidden.len() / s.hidden;
    let p = plain(s, tensors, hidden);
    p.iter().zip(scores).map(|(p, y)| f64::from(*y) * p.ln() + (1.0 - f64::from(*y)) * (1.0 - p).ln()).sum::<f64>()
        / -(tokens as f64)
}

#[test]
fn gradients_are_finite_differences() {
    for (i, s) in SHAPES.into_iter().enumerate() {
        let mut rng = Rng::new(40 + i as u64);
        let gate = random(s, 9 + i as u64);
        let hidden = rng.normals(6 * s.hidden, 1.0);
        let scores = targets(&mut rng, 6 * s.kv_heads);
        let (loss, gradients) = loss_and_gradients(&gate, &hidden, &scores).unwrap();
        let mut tensors = wide(&gate);
        close(loss, plain_loss(s, &tensors, &hidden, &scores), 1e-6);
        for (part, (name, _)) in s.tensors().iter().enumerate() {
            let found = gradients.tensors()[part];
            assert_eq!(found.len(), tensors[part].len());
            let size = (found.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / found.len() as f64).sqrt();
            assert!(size > 1e-4, "{s:?}: {name} has no gradient to compare");
            for at in (0..found.len()).step_by(1 + found.len() / 150) {
                let mut loss_at = |step: f64| {
                    let stored = tensors[part][at];
                    tensors[part][at] = stored + step;
                    let loss = plain_loss(s, &tensors, &hidden, &scores);
                    tensors[part][at] = stored;
                    loss
                };
                let expected = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5;
                let apart = (f64::from(found[at]) - expected).abs();
                assert!(apart < 1e-4 * size, "{s:?}: {name}, number {at}: {} instead of {expected}", found[at]);
            }
        }
    }
}

#[test]
fn scores_of_the_reference_are_those_of_plain_loops() {
    for (i, s) in SHAPES.into_iter().enumerate() {
        let gate = random(s, 3 + i as u64);
        let hidden = Rng::new(1).normals(9 * s.hidden, 1.0);
        let scores = gate.score(&hidden, Dtype::F32).unwrap();
        scores.iter().zip(plain(s, &wide(&gate), &hidden)).for_each(|(a, b)| close(f64::from(*a), b, 1e-6));
    }
}

/// |l| ≤ 4 and 16 sinks of logit 0.
#[test]
fn first_scores_are_within_bounds() {
    let s = GateShape { hidden: 24, kv_heads: 2, group: 2, gate_dim: 16, sinks: 16 };
    let (mut least, mut most) = (1f32, 0f32);
    for seed in 0..8 {
        let gate = Gate::init(s, seed, 3).unwrap();
        let bound = 1.0 / 24f32.sqrt();
        for part in [&gate.q_proj, &gate.q_bias, &gate.k_proj] {
            assert!(part.iter().all(|x| x.abs() <= bound) && part.iter().any(|x| x.abs() > 0.9 * bound));
        }
        assert!(gate.q_norm.iter().chain(&gate.k_norm).all(|x| *x == 1.0));
        assert!(gate.k_base.iter().chain(&gate.b).all(|x| *x == 0.0));
        for x in gate.score(&Rng::new(seed).normals(200 * 24, 4.0), Dtype::F32).unwrap() {
            (least, most) = (least.min(x), most.max(x));
        }
    }
    assert!(least >= 0.001_143_4 && most <= 0.773_365_3, "{least} to {most}");
    assert!(least < 0.01 && most > 0.3, "{least} to {most}");
    let one = GateShape { hidden: 1, kv_heads: 1, group: 1, gate_dim: 1, sinks: 1 };
    assert_ne!(Gate::init(s, 1, 0).unwrap(), Gate::init(s, 1, 1).unwrap());
    assert_ne!(Gate::init(s, 1, 0).unwrap(), Gate::init(s, 2, 0).unwrap());
    assert!(Gate::init(one, 0, 0).is_ok());
    says(Gate::init(GateShape { sinks: 0, ..one }, 0, 0), &["k_base", "dimension of 0"]);
}

#[test]
fn the_schedule_is_the_papers() {
    let config = GateTraining::default();
    assert_eq!((config.steps, config.batch, config.momentum, config.gate_dim, config.sinks), (5000, 1000, 0.9, 16, 16));
    let golden =
        [(0, 0.0), (1, 0.002), (49, 0.098), (50, 0.2), (2499, 0.2), (2500, 0.1), (3749, 0.1), (3750, 0.05), (4999, 0.05)];
    for (step, rate) in golden {
        assert!((config.rate_at(step) - rate).abs() < 1e-12, "step {step}: {}", config.rate_at(step));
    }
    let short = GateTraining { steps: 10, rate: 1.0, ..config };
    let rates: Vec<f64> = (0..10).map(|s| short.rate_at(s)).collect();
    assert_eq!(rates, [0.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]);
}

/// Tokens whose scores a hidden gate gives: what can be learned.
fn sample(seed: u64, tokens: usize) -> GateSample {
    let s = GateShape { hidden: 12, kv_heads: 2, group: 2, gate_dim: 4, sinks: 2 };
    let mut sample = GateSample::new(s.hidden, s.kv_heads, s.group).unwrap();
    let hidden = Rng::new(seed).normals(tokens * s.hidden, 1.0);
    let mut teacher = random(s, 77);
    teacher.q_norm.iter_mut().for_each(|x| *x *= 2.0);
    sample.add(&hidden, &teacher.score(&hidden, Dtype::F32).unwrap()).unwrap();
    sample
}

fn few(steps: usize) -> GateTraining {
    GateTraining { steps, batch: 64, gate_dim: 4, sinks: 4, held_out: 10, ..GateTraining::default() }
}

fn quiet(_: usize, _: usize) {}

/// The first step has rate 0, the second half of it, with momentum of both: −0.5 · 1.9 · rate · gradient.
#[test]
fn two_steps_are_those_of_sgd() {
    let s = GateShape { hidden: 12, kv_heads: 2, group: 2, gate_dim: 4, sinks: 4 };
    let mut rng = Rng::new(8);
    let hidden: Vec<f32> = Dtype::Bf16.round_all(&rng.normals(40 * 12, 1.0));
    let scores = targets(&mut rng, 40 * 2);
    let mut sample = GateSample::new(12, 2, 2).unwrap();
    sample.add(&hidden, &scores).unwrap();
    let config = GateTraining { batch: 40, held_out: 0, dtype: Dtype::F32, seed: 5, ..few(2) };
    let (gates, report) = train_gates(&config, "m", &[None, Some(sample)], &quiet).unwrap();
    assert!(report.held_out.is_none() && report.trained.tokens == 40);
    let first = Gate::init(s, 5, 1).unwrap();
    let (_, gradients) = loss_and_gradients(&first, &hidden, &scores).unwrap();
    for ((trained, first), gradients) in gates.layer(1).unwrap().tensors().iter().zip(first.tensors()).zip(gradients.tensors()) {
        for ((x, first), g) in trained.iter().zip(first).zip(gradients) {
            close(f64::from(*x), f64::from(first - 0.5 * 1.9 * 0.2 * g), 1e-6);
        }
    }
}

#[test]
fn gates_learn_what_can_be_learned() {
    let samples = [Some(sample(1, 1200)), None, Some(sample(2, 1200))];
    let config = GateTraining { steps: 2000, batch: 200, ..few(0) };
    let last = std::sync::Mutex::new(Vec::new());
    let (gates, report) = train_gates(&config, "a model", &samples, &|done, of| last.lock().unwrap().push((done, of))).unwrap();
    let mut last = last.into_inner().unwrap();
    last.sort_unstable();
    assert_eq!((last.len(), last[last.len() - 1]), (80, (4000, 4000)));
    assert_eq!((gates.fingerprint(), gates.dtype(), gates.layers().len()), ("a model", Dtype::Bf16, 3));
    assert!(gates.layer(1).is_none() && gates.layer(9).is_none());
    assert_eq!(gates.gated().map(|(l, _)| l).collect::<Vec<_>>(), [0, 2]);
    let held_out = report.held_out.clone().unwrap();
    assert_eq!((report.tokens, held_out.tokens, report.trained.tokens), (1200, 120, 120));
    let untrained = (0..3).map(|l| (l != 1).then(|| Gate::init(gates.shape(), 0, l).unwrap())).collect();
    let untrained = measure_gates(&Gates::new("a model", Dtype::F32, untrained).unwrap(), &samples).unwrap();
    for (m, u) in held_out.layers.iter().zip(&untrained.layers) {
        assert_eq!(m.layer, u.layer);
        let (lost, at_first) = (m.loss - m.floor, u.loss - u.floor);
        assert!(lost > 0.0 && lost < 0.25 * at_first, "layer {}: {lost} above the least, {at_first} untrained", m.layer);
        assert!(m.agreement > 0.85 && m.overlap > 0.75 && u.overlap < 0.65, "{m:?} {u:?}");
    }
    assert!(held_out.overlap > 0.75 && held_out.agreement > 0.85, "{held_out:?}");
    let text = report.to_string();
    assert!(text.contains("120 of 1200 tokens held out") && text.contains("agreement"), "{text}");
}

#[test]
fn the_same_seed_gives_the_same_gates() {
    let samples = [Some(sample(1, 200)), Some(sample(2, 200))];
    let train = |config: &GateTraining, samples: &[Option<GateSample>]| train_gates(config, "m", samples, &quiet).unwrap();
    let (gates, report) = train(&few(60), &samples);
    assert_eq!((&gates, &report), (&train(&few(60), &samples).0, &train(&few(60), &samples).1));
    let one = elsewhere(|| train(&few(60), &samples).0);
    assert_eq!(gates, one);
    assert_ne!(gates, train(&GateTraining { seed: 1, ..few(60) }, &samples).0);
    // A layer does not depend on the others.
    let alone = train(&few(60), &[None, samples[1].clone()]).0;
    assert_eq!(gates.layer(1), alone.layer(1));
}

/// Runs in a thread of its own.
fn elsewhere<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|s| s.spawn(f).join().unwrap())
}

#[test]
fn what_is_held_out_is_not_learned() {
    let mut rng = Rng::new(4);
    let hidden = rng.normals(100 * 12, 1.0);
    let scores = targets(&mut rng, 100 * 2);
    let of = |change: usize| {
        let mut scores = scores.clone();
        (0..2).for_each(|h| scores[h * 100 + change] = 0.0);
        let mut sample = GateSample::new(12, 2, 2).unwrap();
        // In two parts: tokens are counted on.
        let part =
            |from: usize, to: usize| (0..2).flat_map(|h| scores[h * 100 + from..h * 100 + to].to_vec()).collect::<Vec<_>>();
        sample.add(&hidden[..37 * 12], &part(0, 37)).unwrap();
        sample.add(&hidden[37 * 12..], &part(37, 100)).unwrap();
        assert_eq!((sample.len(), sample.is_empty(), sample.shape()), (100, false, (12, 2, 2)));
        train_gates(&few(20), "m", &[Some(sample)], &quiet).unwrap()
    };
    let (last, other) = (of(99), of(9));
    assert_eq!(last.0, other.0);
    assert_ne!(last.1.held_out, other.1.held_out);
    assert_ne!(last.0, of(98).0);
}

#[test]
fn a_gate_that_is_its_own_teacher_is_faultless() {
    let s = GateShape { hidden: 7, kv_heads: 2, group: 3, gate_dim: 4, sinks: 5 };
    let gate = random(s, 2);
    let hidden = Dtype::Bf16.round_all(&Rng::new(3).normals(1500 * 7, 1.0));
    let mut sample = GateSample::new(7, 2, 3).unwrap();
    sample.add(&hidden, &gate.score(&hidden, Dtype::F32).unwrap()).unwrap();
    let gates = Gates::new("m", Dtype::F32, vec![None, Some(gate)]).unwrap();
    let m = measure_gates(&gates, &[None, Some(sample.clone())]).unwrap();
    assert_eq!((m.tokens, m.layers.len(), m.layers[0].layer), (1500, 1, 1));
    close(m.layers[0].loss, m.layers[0].floor, 1e-9);
    assert!(m.agreement > 0.999 && m.overlap > 0.998, "{m:?}");
    says(measure_gates(&gates, &[]), &["no tokens"]);
    says(measure_gates(&gates, &[Some(sample.clone()), None]), &["none of layer 1"]);
    let mut other = GateSample::new(7, 3, 2).unwrap();
    other.add(&[0.0; 7], &[0.5; 3]).unwrap();
    says(measure_gates(&gates, &[None, Some(other)]), &["layer 1", "another shape"]);
}

#[test]
fn data_that_does_not_do_is_named() {
    let gate = random(SHAPES[0], 1);
    says(loss_and_gradients(&gate, &[0.0; 9], &[0.5]), &["hidden", "[T, D]"]);
    says(loss_and_gradients(&gate, &[0.0; 10], &[0.5]), &["scores", "[H, T]"]);
    says(loss_and_gradients(&gate, &[f32::NAN; 5], &[0.5]), &["hidden", "NaN"]);
    says(loss_and_gradients(&gate, &[0.0; 5], &[f32::NAN]), &["scores", "NaN"]);
    for (d, h, g) in [(0, 1, 1), (1, 0, 1), (1, 1, 0)] {
        says(GateSample::new(d, h, g), &["sample", "kv heads"]);
    }
    let mut sample = GateSample::new(3, 2, 1).unwrap();
    says(sample.add(&[0.0; 4], &[0.0; 2]), &["hidden", "[T, D]"]);
    says(sample.add(&[0.0; 6], &[0.0; 2]), &["scores", "[H, T]"]);
    says(sample.add(&[0.0, 0.0, 0.0, 0.0, f32::INFINITY, 0.0], &[0.0; 4]), &["hidden", "row 1", "inf"]);
    says(sample.add(&[0.0; 6], &[0.0, 0.0, f32::NAN, 0.0]), &["scores", "row 1", "NaN"]);
    for bad in [-0.1, 1.1] {
        says(sample.add(&[0.0; 3], &[0.5, bad]), &["scores", "between 0 and 1"]);
    }
    assert!(sample.is_empty());
    sample.add(&[f32::MAX, f32::MIN, 0.0], &[0.0, 1.0]).unwrap();
    assert_eq!(sample.len(), 1);
}

#[test]
fn settings_that_do_not_do_are_named() {
    let c = || few(10);
    let bad = |config: GateTraining, words: &[&str]| says(train_gates(&config, "m", &[Some(sample(1, 100))], &quiet), words);
    bad(GateTraining { steps: 0, ..c() }, &["steps: 0"]);
    bad(GateTraining { batch: 0, ..c() }, &["batch: 0"]);
    bad(GateTraining { gate_dim: 0, ..c() }, &["gate_dim: 0"]);
    bad(GateTraining { sinks: usize::MAX, ..c() }, &["sinks"]);
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        bad(GateTraining { rate, ..c() }, &["rate"]);
    }
    for momentum in [1.0, -0.1, f64::NAN] {
        bad(GateTraining { momentum, ..c() }, &["momentum"]);
    }
    bad(GateTraining { held_out: 1, ..c() }, &["held_out", "every token"]);
    bad(GateTraining { batch: 91, ..c() }, &["90 tokens to train on, a batch takes 91", "more text"]);
    bad(GateTraining { rate: 1e38, ..c() }, &["rate", "the gate of layer 0 is not finite", "take less"]);
    says(train_gates(&c(), "m", &[None, None], &quiet), &["samples", "nothing to train"]);
    says(train_gates(&c(), "m", &[Some(sample(1, 100)), Some(sample(1, 101))], &quiet), &["layer 1", "other sizes"]);
}
