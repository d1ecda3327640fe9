//! Gates of Fast KVzip (arXiv 2601.17668): a small network a layer that says from the hidden state of a token alone, the
//! input of the layer's attention after its norm, how much each kv head will need the token's key and value.
//!
//! A gate is taught what KVzip (arXiv 2505.23416) would score the token by: the largest attention weight that it gets while
//! the model repeats the context. That takes forward passes alone (`Llama::repeat_scores` of `kvlar-candle`); their results
//! are gathered in a [`GateSample`] a layer, which [`train_gates`] fits [`Gates`] to. Layers share no parameters.
//!
//! ```
//! use kvlar_calibrate::gate::*;
//! // 2 kv heads of 3 query heads each, hidden states of 8 numbers.
//! let mut sample = GateSample::new(8, 2, 3)?;
//! let hidden: Vec<f32> = (0..64 * 8).map(|i| (i as f32).sin()).collect();
//! let scores: Vec<f32> = (0..2 * 64).map(|i| if i % 5 == 0 { 0.9 } else { 0.01 }).collect();
//! sample.add(&hidden, &scores)?; // 64 tokens
//! let config = GateTraining { steps: 100, batch: 32, ..GateTraining::default() };
//! let (gates, report) = train_gates(&config, "model 1", &[Some(sample)], &|_done, _of| ())?;
//! let scores = gates.layer(0).unwrap().score(&hidden, gates.dtype())?; // [heads, tokens]
//! assert_eq!(scores.len(), 2 * 64);
//! println!("{report}");
//! # Ok::<(), kvlar_calibrate::Error>(())
//! ```

mod file;
mod measure;
mod network;
mod sample;
mod train;

pub use file::{GATE_FORMAT, Gates};
pub use measure::{GateMeasure, GateMeasures, GateReport, KEPT, THRESHOLD, measure_gates};
pub use network::loss_and_gradients;
pub use sample::GateSample;
pub use train::{GateTraining, train_gates};

use crate::error::{Error, Result};
use kvlar_reference::Dtype;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Sizes of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateShape {
    /// D: numbers of a hidden state.
    pub hidden: usize,
    /// H.
    pub kv_heads: usize,
    /// G: query heads a kv head.
    pub group: usize,
    /// D': the gate's own dimension.
    pub gate_dim: usize,
    /// S: learned sink keys.
    pub sinks: usize,
}

/// Names of a gate's tensors, in the order of [`GateShape::tensors`].
const NAMES: [&str; 7] = ["q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b"];

impl GateShape {
    /// Shapes of the tensors, by name: `q_proj.weight` `[H·G·D', D]` (row (h·G + g)·D' + j), `q_proj.bias` `[H·G·D']`,
    /// `k_proj.weight` `[H·D', D]`, `q_norm.weight` and `k_norm.weight` `[D']` (of all heads), `k_base` `[H, 1, S, D']` (sink
    /// keys, not normalised), `b` `[H, 1, G]`.
    pub fn tensors(&self) -> [(&'static str, Vec<usize>); 7] {
        let Self { hidden: d, kv_heads: h, group: g, gate_dim: dim, sinks: s } = *self;
        let shapes =
            [vec![h * g * dim, d], vec![h * g * dim], vec![h * dim, d], vec![dim], vec![dim], vec![h, 1, s, dim], vec![h, 1, g]];
        let mut shapes = shapes.into_iter();
        NAMES.map(|name| (name, shapes.next().unwrap_or_default()))
    }

    /// Numbers of a gate.
    pub fn parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

/// The gate of one layer. Tensors are as [`GateShape::tensors`] says, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    /// Sizes.
    pub shape: GateShape,
    /// `q_proj.weight`.
    pub q_proj: Vec<f32>,
    /// `q_proj.bias`.
    pub q_bias: Vec<f32>,
    /// `k_proj.weight`.
    pub k_proj: Vec<f32>,
    /// `q_norm.weight`.
    pub q_norm: Vec<f32>,
    /// `k_norm.weight`.
    pub k_norm: Vec<f32>,
    /// `k_base`.
    pub k_base: Vec<f32>,
    /// `b`.
    pub b: Vec<f32>,
}

impl Gate {
    /// A gate as training starts from it: projections and biases uniform in ±1/√D, norms 1, `k_base` and `b` 0. `layer` tells
    /// the random numbers of layers apart.
    ///
    /// # Errors
    /// [`Error::Op`] for a size of 0.
    pub fn init(shape: GateShape, seed: u64, layer: usize) -> Result<Self> {
        let mut rng = StdRng::from_seed(key([seed, layer as u64, 1]));
        let bound = 1.0 / (shape.hidden as f32).sqrt();
        let mut gate = Self::zeros(shape);
        for part in [&mut gate.q_proj, &mut gate.q_bias, &mut gate.k_proj] {
            part.iter_mut().for_each(|x| *x = rng.random_range(-bound..=bound));
        }
        gate.q_norm.fill(1.0);
        gate.k_norm.fill(1.0);
        gate.check()?;
        Ok(gate)
    }

    fn zeros(shape: GateShape) -> Self {
        let mut parts = shape.tensors().into_iter().map(|(_, shape)| vec![0.0; shape.iter().product()]);
        Self::of(shape, || parts.next().unwrap_or_default())
    }

    /// A gate of tensors that come in order.
    fn of(shape: GateShape, mut next: impl FnMut() -> Vec<f32>) -> Self {
        let (q_proj, q_bias, k_proj, q_norm) = (next(), next(), next(), next());
        Self { shape, q_proj, q_bias, k_proj, q_norm, k_norm: next(), k_base: next(), b: next() }
    }

    /// The tensors in the order of [`GateShape::tensors`].
    pub fn tensors(&self) -> [&[f32]; 7] {
        [&self.q_proj, &self.q_bias, &self.k_proj, &self.q_norm, &self.k_norm, &self.k_base, &self.b]
    }

    fn tensors_mut(&mut self) -> [&mut Vec<f32>; 7] {
        [&mut self.q_proj, &mut self.q_bias, &mut self.k_proj, &mut self.q_norm, &mut self.k_norm, &mut self.k_base, &mut self.b]
    }

    /// As the reference op takes it.
    pub fn view(&self) -> kvlar_reference::Gate<'_> {
        kvlar_reference::Gate {
            hidden_dim: self.shape.hidden,
            kv_heads: self.shape.kv_heads,
            group: self.shape.group,
            gate_dim: self.shape.gate_dim,
            sinks: self.shape.sinks,
            q_proj: &self.q_proj,
            q_bias: &self.q_bias,
            k_proj: &self.k_proj,
            q_norm: &self.q_norm,
            k_norm: &self.k_norm,
            k_base: &self.k_base,
            b: &self.b,
        }
    }

    /// Refuses tensors of the wrong size, sizes of 0 and numbers that are not finite.
    ///
    /// # Errors
    /// [`Error::Op`] naming the tensor.
    pub fn check(&self) -> Result<()> {
        self.view().check().map_err(Error::Op)
    }

    /// Scores `[H, T]` of hidden states `[T, D]`, by the reference ([`kvlar_reference::score_gate`]).
    ///
    /// # Errors
    /// [`Error::Op`] for tensors that do not fit together or hidden states that are no whole rows.
    pub fn score(&self, hidden: &[f32], dtype: Dtype) -> Result<Vec<f32>> {
        kvlar_reference::score_gate(hidden, &self.view(), dtype).map_err(Error::Op)
    }

    /// Rounds what the released gates hold in the model's type: projections, biases and `b`.
    fn round(&mut self, dtype: Dtype) {
        for part in [&mut self.q_proj, &mut self.q_bias, &mut self.k_proj, &mut self.b] {
            *part = dtype.round_all(part);
        }
    }
}

/// A seed of the random generator for each use of it.
fn key(parts: [u64; 3]) -> [u8; 32] {
    let mut key = [0u8; 32];
    parts.iter().zip(key.chunks_exact_mut(8)).for_each(|(part, bytes)| bytes.copy_from_slice(&part.to_le_bytes()));
    key
}
