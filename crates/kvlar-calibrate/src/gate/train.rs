//! Training gates: plain SGD, each layer for itself.
//!
//! As in the released code of Fast KVzip (arXiv 2601.17668), but for two things. Parameters are f32 until they are done (there
//! they are updated in bf16). And `b` is added once, as its inference does (there training adds it twice).

use super::measure::measure_some;
use super::network::Network;
use super::{Gate, GateReport, GateSample, GateShape, Gates, key};
use crate::error::{Result, config as refuse};
use kvlar_reference::Dtype;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Steps between reports of progress.
const REPORT: usize = 50;

/// Settings of [`train_gates`]; the defaults are the paper's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateTraining {
    /// Updates of each layer's gate.
    pub steps: usize,
    /// Tokens of an update, drawn without replacement until fewer are left; then all are drawn anew.
    pub batch: usize,
    /// Learning rate after the warm-up ([`GateTraining::rate_at`]).
    pub rate: f64,
    /// Of SGD.
    pub momentum: f64,
    /// D': the gate's own dimension.
    pub gate_dim: usize,
    /// S: learned sink keys.
    pub sinks: usize,
    /// One token in so many is held out: the last of each so many. 0 = none.
    pub held_out: usize,
    /// What projections are rounded to in the end.
    #[serde(with = "super::file::dtype")]
    pub dtype: Dtype,
    /// Of the first parameters and of the batches: the same seed and samples give the same gates on one machine.
    pub seed: u64,
}

impl Default for GateTraining {
    fn default() -> Self {
        Self {
            steps: 5000,
            batch: 1000,
            rate: 0.2,
            momentum: 0.9,
            gate_dim: 16,
            sinks: 16,
            held_out: 100,
            dtype: Dtype::Bf16,
            seed: 0,
        }
    }
}

impl GateTraining {
    /// The learning rate of a step: in the first hundredth of the steps it rises from 0 towards a half; then it is whole until
    /// half of the steps are done, a half until three quarters are, and a quarter.
    pub fn rate_at(&self, step: usize) -> f64 {
        let warm = self.steps.div_ceil(100);
        let factor = if step < warm {
            step as f64 / (2 * warm) as f64
        } else if 2 * step < self.steps {
            1.0
        } else if 4 * step < 3 * self.steps {
            0.5
        } else {
            0.25
        };
        self.rate * factor
    }

    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming the setting.
    pub fn check(&self) -> Result<()> {
        for (name, size) in [("steps", self.steps), ("batch", self.batch), ("gate_dim", self.gate_dim), ("sinks", self.sinks)] {
            if size == 0 || size > 1 << 24 {
                return refuse(name, format!("{size} is not between 1 and {}", 1 << 24));
            }
        }
        if !(self.rate > 0.0 && self.rate.is_finite()) {
            return refuse("rate", format!("{} is not above 0", self.rate));
        }
        if !(0.0..1.0).contains(&self.momentum) {
            return refuse("momentum", format!("{} is outside [0, 1)", self.momentum));
        }
        if self.held_out == 1 {
            return refuse("held_out", "1: every token would be held out; take 0 (none) or at least 2");
        }
        Ok(())
    }

    fn is_held_out(&self, token: usize) -> bool {
        self.held_out > 0 && (token + 1).is_multiple_of(self.held_out)
    }
}

/// Trains a gate for each layer that has a [`GateSample`]; layers without one stay without a gate (their caches are not to be
/// evicted from). `progress` is told how many steps are done, of all layers together, and of how many; it is called by several
/// threads. The report measures the gates, rounded, on the tokens held out and on as many of those trained on.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for settings that make no sense, no samples, samples of different shapes or lengths, fewer tokens than a
/// batch takes, and a loss that stops being finite.
pub fn train_gates(
    config: &GateTraining,
    fingerprint: &str,
    samples: &[Option<GateSample>],
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(Gates, GateReport)> {
    config.check()?;
    let gated: Vec<(usize, &GateSample)> = samples.iter().enumerate().filter_map(|(l, s)| Some((l, s.as_ref()?))).collect();
    let Some(&(_, first)) = gated.first() else {
        return refuse("samples", "no layer has one: there is nothing to train");
    };
    for (l, s) in &gated {
        if (s.shape(), s.len()) != (first.shape(), first.len()) {
            return refuse("samples", format!("layer {l} has other sizes or tokens than the layers before it"));
        }
    }
    let (hidden, kv_heads, group) = first.shape();
    let shape = GateShape { hidden, kv_heads, group, gate_dim: config.gate_dim, sinks: config.sinks };
    let tokens: Vec<usize> = (0..first.len()).filter(|t| !config.is_held_out(*t)).collect();
    if tokens.len() < config.batch {
        let (n, b) = (tokens.len(), config.batch);
        return refuse("batch", format!("{n} tokens to train on, a batch takes {b}: train on more text, or take fewer"));
    }
    let (done, all) = (AtomicUsize::new(0), gated.len() * config.steps);
    let report = |steps: usize| progress(done.fetch_add(steps, Ordering::Relaxed) + steps, all);
    let trained: Vec<Gate> =
        gated.par_iter().map(|(l, sample)| train(config, shape, *l, sample, &tokens, &report)).collect::<Result<_>>()?;
    let mut layers: Vec<Option<Gate>> = vec![None; samples.len()];
    gated.iter().zip(trained).for_each(|((l, _), gate)| layers[*l] = Some(gate));
    let gates = Gates::new(fingerprint, config.dtype, layers)?;
    let held_out: Vec<usize> = (0..first.len()).filter(|t| config.is_held_out(*t)).collect();
    // As many, and as evenly spaced.
    let seen: Vec<usize> = match held_out.len() {
        0 => tokens,
        n => (0..n).map(|i| tokens[i * tokens.len() / n]).collect(),
    };
    let report = GateReport {
        tokens: first.len(),
        trained: measure_some(&gates, samples, &seen)?,
        held_out: if held_out.is_empty() { None } else { Some(measure_some(&gates, samples, &held_out)?) },
    };
    Ok((gates, report))
}

fn train(
    config: &GateTraining,
    shape: GateShape,
    layer: usize,
    sample: &GateSample,
    tokens: &[usize],
    report: &(dyn Fn(usize) + Sync),
) -> Result<Gate> {
    let mut gate = Gate::init(shape, config.seed, layer)?;
    let (mut gradients, mut velocity) = (Gate::zeros(shape), Gate::zeros(shape));
    let (mut network, mut batches) = (Network::default(), Batches::new(tokens, config.batch, config.seed));
    let (mut hidden, mut targets) = (Vec::new(), Vec::new());
    for step in 0..config.steps {
        sample.gather(batches.next(), &mut hidden, &mut targets);
        let loss = network.backward(&gate, &hidden, &targets, &mut gradients);
        if !loss.is_finite() {
            return diverged(config, layer, step);
        }
        let (rate, momentum) = (config.rate_at(step) as f32, config.momentum as f32);
        let parts = gate.tensors_mut().into_iter().zip(velocity.tensors_mut()).zip(gradients.tensors());
        for ((parameters, velocity), gradients) in parts {
            for ((p, v), g) in parameters.iter_mut().zip(velocity).zip(gradients) {
                *v = momentum * *v + g;
                *p -= rate * *v;
            }
        }
        if (step + 1) % REPORT == 0 || step + 1 == config.steps {
            report(step % REPORT + 1);
        }
    }
    if gate.check().is_err() { diverged(config, layer, config.steps) } else { Ok(gate) }
}

fn diverged<T>(config: &GateTraining, layer: usize, steps: usize) -> Result<T> {
    refuse("rate", format!("{}: the gate of layer {layer} is not finite after {steps} steps; take less", config.rate))
}

/// Batches of tokens; what is left of an epoch when it is less than a batch is dropped.
struct Batches {
    order: Vec<usize>,
    batch: usize,
    next: usize,
    rng: StdRng,
}

impl Batches {
    /// The same for every layer.
    fn new(tokens: &[usize], batch: usize, seed: u64) -> Self {
        let rng = StdRng::from_seed(key([seed, u64::MAX, 2]));
        Self { order: tokens.to_vec(), batch, next: usize::MAX, rng }
    }

    fn next(&mut self) -> &[usize] {
        if self.next.saturating_add(self.batch) > self.order.len() {
            self.order.shuffle(&mut self.rng);
            self.next = 0;
        }
        self.next += self.batch;
        &self.order[self.next - self.batch..self.next]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_sees_no_token_twice() {
        let tokens: Vec<usize> = (10..21).collect();
        let mut batches = Batches::new(&tokens, 3, 7);
        let mut epochs = Vec::new();
        for _ in 0..4 {
            let epoch: Vec<usize> = (0..3).flat_map(|_| batches.next().to_vec()).collect();
            let mut seen = epoch.clone();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len(), 9, "{epoch:?}");
            assert!(seen.iter().all(|t| tokens.contains(t)));
            epochs.push(epoch);
        }
        // Each in an order of its own, so that other tokens are left over.
        assert!((1..4).all(|i| !epochs[..i].contains(&epochs[i])));
        let mut again = Batches::new(&tokens, 3, 7);
        assert_eq!(again.next(), &epochs[0][..3]);
        assert_ne!(Batches::new(&tokens, 3, 8).next(), &epochs[0][..3]);
    }
}
