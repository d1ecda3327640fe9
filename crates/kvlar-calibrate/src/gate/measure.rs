//! How well gates say what their teacher says.

use super::network::{Network, cross_entropy};
use super::{GateSample, Gates};
use crate::error::{Result, config as refuse};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What both must say alike: whether a score is at least this.
pub const THRESHOLD: f64 = 0.05;
/// The share of pairs of token and kv head that is kept when choices are compared.
pub const KEPT: f64 = 0.3;

/// Tokens that are scored at a time.
const BATCH: usize = 1024;

/// One layer's gate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateMeasure {
    /// Which.
    pub layer: usize,
    /// Binary cross-entropy, mean over heads and tokens.
    pub loss: f64,
    /// The least that it can be: the teacher's own scores against themselves.
    pub floor: f64,
    /// Share of pairs of which gate and teacher say alike whether they reach [`THRESHOLD`].
    pub agreement: f64,
    /// Share of the [`KEPT`] highest pairs by the teacher that are among the gate's as many highest, within the layer.
    /// A gate that knew nothing would have [`KEPT`].
    pub overlap: f64,
}

/// All gated layers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateMeasures {
    /// Tokens measured on.
    pub tokens: usize,
    /// Layer by layer.
    pub layers: Vec<GateMeasure>,
    /// As [`GateMeasure::agreement`], over all layers.
    pub agreement: f64,
    /// As [`GateMeasure::overlap`], but for the highest pairs of all layers together, as eviction chooses them.
    pub overlap: f64,
}

/// What training achieved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GateReport {
    /// Tokens, those held out among them.
    pub tokens: usize,
    /// On tokens trained on.
    pub trained: GateMeasures,
    /// On tokens of the same texts that training did not see.
    pub held_out: Option<GateMeasures>,
}

/// Measures gates on tokens, such as of texts that they were not trained on. Layers are those of the gates; samples of layers
/// without a gate are not looked at.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for samples that are missing, of other shapes or lengths, or empty.
pub fn measure_gates(gates: &Gates, samples: &[Option<GateSample>]) -> Result<GateMeasures> {
    let tokens = samples.iter().flatten().map(GateSample::len).min().unwrap_or(0);
    measure_some(gates, samples, &(0..tokens).collect::<Vec<_>>())
}

/// Scores of gate and teacher, token after token.
struct Scores {
    gate: Vec<f32>,
    teacher: Vec<f32>,
}

pub(super) fn measure_some(gates: &Gates, samples: &[Option<GateSample>], tokens: &[usize]) -> Result<GateMeasures> {
    if tokens.is_empty() {
        return refuse("samples", "no tokens to measure gates on");
    }
    let gated: Vec<(usize, &super::Gate)> = gates.gated().collect();
    let measured = gated.par_iter().map(|&(layer, gate)| {
        let Some(sample) = samples.get(layer).and_then(Option::as_ref) else {
            return refuse("samples", format!("none of layer {layer}, which has a gate"));
        };
        let s = gate.shape;
        if sample.shape() != (s.hidden, s.kv_heads, s.group) || tokens.iter().any(|t| *t >= sample.len()) {
            return refuse("samples", format!("that of layer {layer} is of another shape than its gate, or shorter than others"));
        }
        let (mut network, mut scores) = (Network::default(), Scores { gate: Vec::new(), teacher: Vec::new() });
        let (mut hidden, mut targets, mut loss, mut floor) = (Vec::new(), Vec::new(), 0.0, 0.0);
        for batch in tokens.chunks(BATCH) {
            sample.gather(batch, &mut hidden, &mut targets);
            for (p, y) in network.forward(gate, &hidden).into_iter().zip(&targets) {
                loss += cross_entropy(p, f64::from(*y));
                floor += cross_entropy(f64::from(*y), f64::from(*y));
                scores.gate.push(p as f32);
                scores.teacher.push(*y);
            }
        }
        let n = scores.gate.len() as f64;
        let measure = GateMeasure {
            layer,
            loss: loss / n,
            floor: floor / n,
            agreement: agreement(&scores),
            overlap: overlap(&scores.gate, &scores.teacher),
        };
        Ok((measure, scores))
    });
    let (layers, scores): (Vec<GateMeasure>, Vec<Scores>) = measured.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    let all = |of: fn(Scores) -> Vec<f32>, scores: Vec<Scores>| scores.into_iter().flat_map(of).collect::<Vec<f32>>();
    let agreement = layers.iter().map(|l| l.agreement).sum::<f64>() / layers.len() as f64;
    let teacher: Vec<f32> = scores.iter().flat_map(|s| s.teacher.iter().copied()).collect();
    let gate = all(|s| s.gate, scores);
    Ok(GateMeasures { tokens: tokens.len(), layers, agreement, overlap: overlap(&gate, &teacher) })
}

fn agreement(scores: &Scores) -> f64 {
    let reaches = |x: &f32| f64::from(*x) >= THRESHOLD;
    let alike = scores.gate.iter().zip(&scores.teacher).filter(|(p, y)| reaches(p) == reaches(y)).count();
    alike as f64 / scores.gate.len() as f64
}

/// Share of the highest scores of one that are among the highest of the other.
fn overlap(a: &[f32], b: &[f32]) -> f64 {
    let kept = ((a.len() as f64 * KEPT) as usize).max(1);
    let best = |scores: &[f32]| {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_unstable_by(|&i, &j| scores[j].total_cmp(&scores[i]).then(i.cmp(&j)));
        let mut is_best = vec![false; scores.len()];
        order[..kept].iter().for_each(|&i| is_best[i] = true);
        is_best
    };
    let both = best(a).into_iter().zip(best(b)).filter(|(a, b)| *a && *b).count();
    both as f64 / kept as f64
}

impl fmt::Display for GateMeasures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |x: f64| format!("{:.2} %", 100.0 * x);
        writeln!(f, "{:>5} {:>9} {:>9} {:>10} {:>10}", "layer", "loss", "least", "agreement", "best 30 %")?;
        for l in &self.layers {
            let (agreement, overlap) = (percent(l.agreement), percent(l.overlap));
            writeln!(f, "{:>5} {:>9.4} {:>9.4} {agreement:>10} {overlap:>10}", l.layer, l.loss, l.floor)?;
        }
        let (agreement, overlap) = (percent(self.agreement), percent(self.overlap));
        write!(f, "{:>5} {:>9} {:>9} {agreement:>10} {overlap:>10}", "all", "", "")
    }
}

impl fmt::Display for GateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.held_out {
            Some(m) => write!(f, "{} of {} tokens held out:\n{m}", m.tokens, self.tokens),
            None => write!(f, "{} tokens, all trained on:\n{}", self.tokens, self.trained),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_compared() {
        let teacher = [0.9, 0.1, 0.8, 0.2, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(overlap(&teacher, &teacher), 1.0);
        assert_eq!(overlap(&[0.5, 0.0, 0.4, 0.0, 0.1, 0.3, 0.0, 0.0, 0.0, 0.0], &teacher), 2.0 / 3.0);
        assert_eq!(overlap(&[0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0], &teacher), 0.0);
        let at = |gate: &[f32], teacher: &[f32]| agreement(&Scores { gate: gate.into(), teacher: teacher.into() });
        assert_eq!(at(&[0.049, 0.051, 0.9, 0.0], &[0.06, 0.06, 0.06, 0.06]), 0.5);
    }
}
