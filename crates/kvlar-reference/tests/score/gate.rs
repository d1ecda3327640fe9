//! The gate of Fast KVzip.

use super::{close, refused};
use half::bf16;
use kvlar_reference::testing::Rng;
use kvlar_reference::{Dtype, Gate, score_gate};
use proptest::prelude::*;

#[derive(Clone)]
struct Weights {
    /// D, H, G, D', S.
    sizes: [usize; 5],
    q_proj: Vec<f32>,
    q_bias: Vec<f32>,
    k_proj: Vec<f32>,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    k_base: Vec<f32>,
    b: Vec<f32>,
}

impl Weights {
    /// Random projections; norms, sink keys and b as training starts.
    fn initial(rng: &mut Rng, sizes: [usize; 5]) -> Self {
        let [d, h, g, dim, s] = sizes;
        Self {
            sizes,
            q_proj: bf16s(&rng.normals(h * g * dim * d, 1.0)),
            q_bias: bf16s(&rng.normals(h * g * dim, 1.0)),
            k_proj: bf16s(&rng.normals(h * dim * d, 1.0)),
            q_norm: vec![1.0; dim],
            k_norm: vec![1.0; dim],
            k_base: vec![0.0; h * s * dim],
            b: vec![0.0; h * g],
        }
    }

    fn random(rng: &mut Rng, sizes: [usize; 5]) -> Self {
        let [_, h, g, dim, s] = sizes;
        let (q_norm, k_norm) = (rng.normals(dim, 1.0), rng.normals(dim, 1.0));
        let (k_base, b) = (rng.normals(h * s * dim, 1.0), rng.normals(h * g, 0.5));
        Self { q_norm, k_norm, k_base, b, ..Self::initial(rng, sizes) }
    }

    fn gate(&self) -> Gate<'_> {
        let [hidden_dim, kv_heads, group, gate_dim, sinks] = self.sizes;
        let Self { q_proj, q_bias, k_proj, q_norm, k_norm, k_base, b, .. } = self;
        Gate { hidden_dim, kv_heads, group, gate_dim, sinks, q_proj, q_bias, k_proj, q_norm, k_norm, k_base, b }
    }

    fn score(&self, hidden: &[f32], dtype: Dtype) -> Vec<f32> {
        score_gate(hidden, &self.gate(), dtype).unwrap()
    }

    /// One score in the form that does not overflow, from the formulas as they are written down.
    fn by_formula(&self, x: &[f32], h: usize, round: fn(f64) -> f64) -> f64 {
        let [d, _, group, dim, sinks] = self.sizes;
        let linear = |weights: &[f32], row: usize, bias: f64| {
            let products = weights[row * d..][..d].iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            round(products.sum::<f64>() + bias)
        };
        let rms = |x: Vec<f64>, weights: &[f32]| -> Vec<f64> {
            let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / dim as f64 + 1e-6).sqrt();
            x.iter().zip(weights).map(|(x, w)| round(x * r) * f64::from(*w)).collect()
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>() / (dim as f64).sqrt();
        let k = rms((0..dim).map(|j| linear(&self.k_proj, h * dim + j, 0.0)).collect(), &self.k_norm);
        let of = |g: usize| {
            let row = |j: usize| (h * group + g) * dim + j;
            let q = rms((0..dim).map(|j| linear(&self.q_proj, row(j), self.q_bias[row(j)].into())).collect(), &self.q_norm);
            let logit = dot(&q, &k) + f64::from(self.b[h * group + g]);
            let base = |s: usize| self.k_base[(h * sinks + s) * dim..][..dim].iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let sums: Vec<f64> = (0..sinks).map(|s| dot(&q, &base(s))).collect();
            let top = sums.iter().copied().fold(f64::MIN, f64::max);
            1.0 / (1.0 + (top + sums.iter().map(|c| (c - top).exp()).sum::<f64>().ln() - logit).exp())
        };
        (0..group).map(of).sum::<f64>() / group as f64
    }
}

fn bf16s(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
}

/// H = 1, D = D' = 4, S = 2, W_k = 1 and W_q = ±1 in each of its groups.
fn identity(signs: &[f32]) -> Weights {
    let unit = |sign: f32| (0..16).map(move |i| if i / 4 == i % 4 { sign } else { 0.0 });
    Weights {
        sizes: [4, 1, signs.len(), 4, 2],
        q_proj: signs.iter().flat_map(|&s| unit(s)).collect(),
        q_bias: vec![0.0; 4 * signs.len()],
        k_proj: unit(1.0).collect(),
        q_norm: vec![1.0; 4],
        k_norm: vec![1.0; 4],
        k_base: vec![0.0; 8],
        b: vec![0.0; signs.len()],
    }
}

#[track_caller]
fn exactly(scores: &[f32], expected: f64) {
    assert!(scores.len() == 1 && (f64::from(scores[0]) - expected).abs() < 5e-8, "{scores:?} instead of {expected}");
}

#[test]
fn scores_by_hand() {
    let x = [1.0, 2.0, 2.0, 4.0];
    let one = identity(&[1.0]);
    exactly(&one.score(&x, Dtype::F32), 0.786_985_988_5);
    let biased = Weights { b: vec![0.5], ..one };
    exactly(&biased.score(&x, Dtype::F32), 0.858_981_039_9);
    let based = Weights { k_base: vec![1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, -0.5], ..biased };
    exactly(&based.score(&x, Dtype::F32), 0.856_557_160_8);
    exactly(&identity(&[1.0, -1.0]).score(&x, Dtype::F32), 0.425_182_472_9);
    // The same from bias alone: it is normalised with the projection.
    let turned = Weights { q_bias: vec![2.0, 4.0, 4.0, 8.0], ..identity(&[0.0]) };
    exactly(&turned.score(&x, Dtype::F32), 0.786_986_008_6);
}

#[test]
fn sixteen_even_sinks() {
    // The logit from b, as no query has a direction; and from the norm's weights at D' = 1, where directions are ±1.
    let expected = [0.001_143_418_5, 0.008_387_509_8, 1.0 / 17.0, 0.315_919_379_9, 0.773_365_166_2];
    for (logit, expected) in [-4.0, -2.0, 0.0, 2.0, 4.0].into_iter().zip(expected) {
        let still = Weights { sizes: [4, 1, 1, 4, 16], q_norm: vec![0.0; 4], k_base: vec![0.0; 64], ..identity(&[1.0]) };
        exactly(&Weights { b: vec![logit], ..still }.score(&[1.0, 2.0, 3.0, 4.0], Dtype::Bf16), expected);
        let ones = || vec![1.0];
        let line = Weights {
            sizes: [1, 1, 1, 1, 16],
            q_proj: ones(),
            q_bias: vec![0.0],
            k_proj: ones(),
            q_norm: vec![logit],
            k_norm: ones(),
            k_base: vec![0.0; 16],
            b: vec![0.0],
        };
        exactly(&line.score(&[1000.0], Dtype::F32), expected);
    }
}

#[test]
fn far_logits_are_0_and_1() {
    let x = [1.0, 2.0, 2.0, 4.0];
    for (b, expected) in [(-3e4, 0.0), (-800.0, 0.0), (800.0, 1.0), (3e4, 1.0)] {
        assert_eq!(Weights { b: vec![b], ..identity(&[1.0]) }.score(&x, Dtype::Bf16), [expected]);
    }
    // A sink that takes everything; one that takes nothing leaves the other.
    let sink = |k_base: [f32; 8]| Weights { k_base: k_base.into(), ..identity(&[1.0]) }.score(&x, Dtype::F32);
    assert_eq!(sink([3e4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), [0.0]);
    exactly(&sink([-3e4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), 1.0 / (1.0 + (-25f64 / (2.0 * 6.250_001)).exp()));
}

#[test]
fn a_token_that_is_not_finite_scores_0() {
    let mut rng = Rng::new(3);
    let (d, tokens) = (8, 5);
    let weights = Weights::random(&mut rng, [d, 2, 3, 4, 2]);
    let hidden = bf16s(&rng.normals(tokens * d, 1.0));
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let clean = weights.score(&hidden, dtype);
        assert!(clean.iter().all(|x| *x > 0.0));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut hidden = hidden.clone();
            hidden[2 * d + 1] = bad;
            for (i, (a, b)) in weights.score(&hidden, dtype).iter().zip(&clean).enumerate() {
                assert_eq!(*a, if i % tokens == 2 { 0.0 } else { *b });
            }
        }
        // Finite, but not its projection where types are narrow.
        let mut hidden = hidden.clone();
        hidden[2 * d..3 * d].iter_mut().for_each(|x| *x *= 65504.0);
        let scores = weights.score(&hidden, dtype);
        assert!([2, 7].iter().all(|&i| (scores[i] == 0.0) == (dtype == Dtype::F16)), "{scores:?}");
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let weights = Weights::random(&mut Rng::new(4), [4, 2, 3, 2, 5]);
    let hidden = [0.0; 8];
    let good = weights.gate();
    let fails = |gate: Gate<'_>, words: &str| refused(score_gate(&hidden, &gate, Dtype::Bf16), words);
    score_gate(&hidden, &good, Dtype::Bf16).unwrap();
    assert_eq!(score_gate(&[], &good, Dtype::Bf16).unwrap(), []);
    refused(score_gate(&hidden[1..], &good, Dtype::Bf16), "hidden: 7 values");
    fails(Gate { q_proj: &good.q_proj[1..], ..good }, "q_proj.weight: expected shape [12, 4]");
    fails(Gate { q_bias: &good.q_bias[1..], ..good }, "q_proj.bias: expected shape [12]");
    fails(Gate { k_proj: &good.k_proj[1..], ..good }, "k_proj.weight: expected shape [4, 4]");
    fails(Gate { q_norm: &good.q_norm[1..], ..good }, "q_norm.weight: expected shape [2]");
    fails(Gate { k_norm: &good.k_norm[1..], ..good }, "k_norm.weight: expected shape [2]");
    fails(Gate { k_base: &good.k_base[1..], ..good }, "k_base: expected shape [2, 1, 5, 2]");
    fails(Gate { b: &good.b[1..], ..good }, "b: expected shape [2, 1, 3]");
    fails(Gate { hidden_dim: 0, ..good }, "hidden: ");
    fails(Gate { kv_heads: 0, ..good }, "k_proj.weight: ");
    fails(Gate { group: 0, ..good }, "q_proj.weight: ");
    fails(Gate { gate_dim: 0, ..good }, "q_norm.weight: ");
    fails(Gate { sinks: 0, ..good }, "k_base: ");
    let nan = vec![f32::NAN; 48];
    fails(Gate { q_proj: &nan, ..good }, "q_proj.weight: NaN");
    fails(Gate { q_bias: &nan[..12], ..good }, "q_proj.bias: NaN");
    fails(Gate { k_proj: &nan[..16], ..good }, "k_proj.weight: NaN");
    fails(Gate { q_norm: &nan[..2], ..good }, "q_norm.weight: NaN");
    fails(Gate { k_norm: &nan[..2], ..good }, "k_norm.weight: NaN");
    fails(Gate { k_base: &nan[..20], ..good }, "k_base: NaN");
    fails(Gate { b: &[f32::INFINITY; 6], ..good }, "b: inf");
}

/// D, H, G, D', S.
fn sizes() -> impl Strategy<Value = [usize; 5]> {
    (1..20usize, 1..4usize, 1..4usize, 1..9usize, 1..6usize).prop_map(|(d, h, g, dim, s)| [d, h, g, dim, s])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn is_its_formula(sizes in sizes(), tokens in 0..6usize, seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let weights = Weights::random(&mut rng, sizes);
        let [d, h, ..] = sizes;
        let hidden = bf16s(&rng.normals(tokens * d, 1.0));
        let expected = |round: fn(f64) -> f64| {
            let of = |h: usize| hidden.chunks(d).map(|x| weights.by_formula(x, h, round)).collect::<Vec<_>>();
            (0..h).flat_map(of).collect::<Vec<_>>()
        };
        close(&weights.score(&hidden, Dtype::F32), &expected(|x| x));
        close(&weights.score(&hidden, Dtype::Bf16), &expected(|x| bf16::from_f32(x as f32).to_f64()));
    }

    #[test]
    fn a_token_is_scored_by_itself(sizes in sizes(), tokens in 1..12usize, seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let weights = Weights::random(&mut rng, sizes);
        let [d, h, ..] = sizes;
        let hidden = rng.normals(tokens * d, 1.0);
        let scores = weights.score(&hidden, Dtype::Bf16);
        prop_assert!(scores.iter().all(|x| (0.0..=1.0).contains(x)));
        let order = rng.permutation(tokens);
        let moved: Vec<f32> = order.iter().flat_map(|&t| hidden[t * d..][..d].to_vec()).collect();
        let expected: Vec<f32> = (0..h).flat_map(|h| order.iter().map(|&t| scores[h * tokens + t]).collect::<Vec<_>>()).collect();
        prop_assert_eq!(weights.score(&moved, Dtype::Bf16), expected);
        // In two chunks.
        let cut = rng.below(tokens + 1);
        let (first, last) = (weights.score(&hidden[..cut * d], Dtype::Bf16), weights.score(&hidden[cut * d..], Dtype::Bf16));
        let joined: Vec<f32> = (0..h).flat_map(|h| [&first[h * cut..][..cut], &last[h * (tokens - cut)..][..tokens - cut]].concat()).collect();
        prop_assert_eq!(joined, scores);
    }

    #[test]
    fn an_untrained_gate_has_bounds([d, h, g, _, _] in sizes(), seed in any::<u64>()) {
        let mut rng = Rng::new(seed);
        let weights = Weights::initial(&mut rng, [d, h, g, 16, 16]);
        let scale = [1e-3, 1.0, 1e3][rng.below(3)];
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let scores = weights.score(&rng.normals(4 * d, scale), dtype);
            // |l| <= 4 of 16 even sinks; a rounded unit vector may be a little longer.
            let slack = if dtype == Dtype::F32 { 1e-7 } else { 1e-2 };
            prop_assert!(scores.iter().all(|&x| x > 0.001_143_4 * (1.0 - 4.0 * slack) && x < 0.773_365_2 * (1.0 + slack)), "{scores:?}");
        }
    }
}
