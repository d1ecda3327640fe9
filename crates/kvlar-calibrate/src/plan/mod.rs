//! Plans: what calibration decides and decoding needs.

mod check;
mod file;
mod quantized;

pub use quantized::{Quantized, QuantizedCodec, QuantizedFormat};

use crate::config::{KeyBasis, Latent, RecalkvConfig};
use crate::error::{Error, Result};
use crate::pq::PqConfig;
use crate::shape::{LayerShape, ModelShape};
use serde::{Deserialize, Serialize};

/// The version of plan files that this build writes and reads.
pub const PLAN_FORMAT: u32 = 2;

/// The settings that a plan was fitted with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FitConfig {
    /// None: its formats were chosen, nothing was fitted.
    Chosen,
    /// Of [`crate::fit`].
    Recalkv(RecalkvConfig),
    /// Of [`crate::fit_pq`].
    Pq(PqConfig),
}

impl From<RecalkvConfig> for FitConfig {
    fn from(config: RecalkvConfig) -> Self {
        Self::Recalkv(config)
    }
}

impl From<PqConfig> for FitConfig {
    fn from(config: PqConfig) -> Self {
        Self::Pq(config)
    }
}

impl FitConfig {
    /// The plan's method, and how many of a sequence's first and last rows it leaves exact.
    fn method(&self) -> (&'static str, usize, usize) {
        match self {
            Self::Chosen => ("quantized", 0, 0),
            Self::Recalkv(c) => ("recalkv", c.sink_rows, c.recent_rows),
            Self::Pq(c) => ("pq", c.sink_rows, c.recent_rows),
        }
    }

    /// Those of ReCalKV.
    pub fn recalkv(&self) -> Option<&RecalkvConfig> {
        match self {
            Self::Recalkv(config) => Some(config),
            _ => None,
        }
    }

    /// What ranks are multiples of.
    fn multiple(&self) -> usize {
        self.recalkv().map_or(KERNEL_RANK, |c| c.multiple)
    }
}

/// What one layer's cache is made of, for every layer of one model.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Version of its file ([`PLAN_FORMAT`]); that of this build where an older file was read.
    pub format: u32,
    /// The method: `recalkv`, `pq`.
    pub method: String,
    /// Which model it was fitted to.
    pub fingerprint: String,
    /// Sizes of that model.
    pub model: ModelShape,
    /// The settings it was fitted with.
    pub config: FitConfig,
    /// First rows of a sequence that stay exact.
    pub sink_rows: usize,
    /// Last rows of a sequence that stay exact.
    pub recent_rows: usize,
    /// Layer by layer.
    pub layers: Vec<LayerPlan>,
}

/// What a plan's rows take.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PlanSize {
    /// Stored bytes of one token in all layers, scales and padding included.
    pub bytes_per_token: f64,
    /// The same of the 16-bit cache.
    pub dense_bytes_per_token: f64,
    /// Their ratio.
    pub kept: f64,
    /// Bytes that do not grow with the context: bases and codebooks.
    pub fixed_bytes: usize,
}

/// Keys and values of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerPlan {
    /// Keys, before RoPE where they are low rank, after it where they are quantized.
    pub keys: Side,
    /// Values.
    pub values: Side,
}

/// How keys or values are kept.
#[derive(Clone, Debug, PartialEq)]
pub enum Side {
    /// As the model's 16-bit rows: the budget reaches that far.
    Dense,
    /// As latents.
    LowRank(Factors),
    /// As codes.
    Quantized(Quantized),
}

/// Latents of head groups: z = encoder · y (y: the group's heads, one after another), ŷ_h = basis_h · z (+ mean_h).
#[derive(Clone, Debug, PartialEq)]
pub struct Factors {
    /// Kv heads of each group; the order inside a group is the order of the encoder's columns.
    pub groups: Vec<Vec<usize>>,
    /// Numbers of a latent, a multiple of the plan's `multiple`. Columns that the data did not fill are zero.
    pub rank: usize,
    /// Decoder [kv_heads, dim, rank].
    pub basis: Vec<f32>,
    /// Encoder [groups, rank, size · dim].
    pub encoder: Vec<f32>,
    /// What decoding adds, [kv_heads, dim]: the part of the mean that the basis does not reach, so that encoding needs no
    /// mean.
    pub mean: Option<Vec<f32>>,
    /// What a latent is stored as.
    pub latent: Latent,
}

impl Factors {
    /// The group of each kv head.
    pub fn group_of(&self) -> Vec<i32> {
        let mut of = vec![0; self.groups.iter().map(Vec::len).sum()];
        for (g, heads) in self.groups.iter().enumerate() {
            for h in heads {
                if let Some(slot) = of.get_mut(*h) {
                    *slot = g as i32;
                }
            }
        }
        of
    }

    /// Kv heads.
    pub fn heads(&self) -> usize {
        self.groups.iter().map(Vec::len).sum()
    }

    /// Numbers of a head.
    pub fn dim(&self) -> usize {
        self.basis.len() / (self.heads() * self.rank).max(1)
    }

    /// Stored bytes of one token: all groups, scales, zeros and padding columns included.
    pub fn row_bytes(&self) -> usize {
        self.groups.len() * self.latent.row_bytes(self.rank)
    }

    /// Bytes that do not grow with the context: encoder and decoder at 16 bit, the mean in f32. Lines of the encoder that
    /// only pad the rank beyond the rows' width are not held.
    pub fn fixed_bytes(&self) -> usize {
        let width = self.heads() / self.groups.len().max(1) * self.dim();
        let encoder = self.groups.len() * self.rank.min(width) * width;
        2 * (self.basis.len() + encoder) + 4 * self.mean.as_ref().map_or(0, Vec::len)
    }

    /// Latents of rows y [n, kv_heads, dim]: [n, groups, rank], in f64.
    pub fn encode(&self, y: &[f32]) -> Vec<f64> {
        let (heads, dim, rank) = (self.heads(), self.dim(), self.rank);
        let mut latents = Vec::new();
        for row in y.chunks_exact((heads * dim).max(1)) {
            let mut at = 0;
            for group in &self.groups {
                let width = group.len() * dim;
                for line in self.encoder[at..at + rank * width].chunks_exact(width) {
                    let parts = group.iter().zip(line.chunks_exact(dim));
                    latents.push(parts.map(|(h, e)| dot(e, row[h * dim..(h + 1) * dim].iter().map(|x| f64::from(*x)))).sum());
                }
                at += rank * width;
            }
        }
        latents
    }

    /// Rows of latents [n, groups, rank]: [n, kv_heads, dim], in f64.
    pub fn decode(&self, latents: &[f64]) -> Vec<f64> {
        let (dim, rank, of) = (self.dim(), self.rank, self.group_of());
        let mut rows = Vec::new();
        for z in latents.chunks_exact((self.groups.len() * rank).max(1)) {
            for (h, g) in of.iter().enumerate() {
                let z = &z[*g as usize * rank..][..rank];
                for i in 0..dim {
                    let line = &self.basis[(h * dim + i) * rank..][..rank];
                    let mean = self.mean.as_ref().map_or(0.0, |m| f64::from(m[h * dim + i]));
                    rows.push(mean + dot(line, z.iter().copied()));
                }
            }
        }
        rows
    }
}

fn dot(a: &[f32], b: impl Iterator<Item = f64>) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * y).sum()
}

impl Side {
    /// The factors, where there are any.
    pub fn factors(&self) -> Option<&Factors> {
        match self {
            Self::LowRank(f) => Some(f),
            Self::Dense | Self::Quantized(_) => None,
        }
    }

    /// Formats and codebooks, where there are any.
    pub fn quantized(&self) -> Option<&Quantized> {
        match self {
            Self::Quantized(q) => Some(q),
            Self::Dense | Self::LowRank(_) => None,
        }
    }

    fn row_bytes(&self, heads: usize, dim: usize) -> usize {
        match self {
            Self::Dense => 2 * heads * dim,
            Self::LowRank(f) => f.row_bytes(),
            Self::Quantized(q) => heads * q.format.row_bytes(dim),
        }
    }

    fn fixed_bytes(&self) -> usize {
        match self {
            Self::Dense => 0,
            Self::LowRank(f) => f.fixed_bytes(),
            Self::Quantized(q) => q.fixed_bytes(),
        }
    }
}

/// Ranks are padded to this where keys are rebuilt.
const KERNEL_RANK: usize = 32;

impl LayerPlan {
    /// Keys that stay dense beside low-rank values: caches keep them as latents of full rank, one group a head, so that
    /// one attention reads both.
    fn has_identity_keys(&self) -> bool {
        self.keys == Side::Dense && self.values.factors().is_some()
    }

    /// Stored bytes of one token's keys and of its values, scales, zeros and padding included.
    pub fn bytes_per_token(&self, shape: &LayerShape) -> [usize; 2] {
        let width = if self.has_identity_keys() { shape.head_dim.next_multiple_of(KERNEL_RANK) } else { shape.head_dim };
        [self.keys.row_bytes(shape.kv_heads, width), self.values.row_bytes(shape.kv_heads, shape.value_dim)]
    }

    /// Bytes of its bases and encoders at 16 bit, means and codebooks in f32; of dense keys beside low-rank values, the
    /// identity that makes latents of them.
    pub fn fixed_bytes(&self, shape: &LayerShape) -> usize {
        let padded = shape.head_dim.next_multiple_of(KERNEL_RANK);
        let identity = if self.has_identity_keys() { 2 * shape.kv_heads * shape.head_dim * (shape.head_dim + padded) } else { 0 };
        identity + self.keys.fixed_bytes() + self.values.fixed_bytes()
    }
}

impl Plan {
    /// Refuses a model that the plan was not fitted to.
    ///
    /// # Errors
    /// [`Error::OtherModel`] naming both fingerprints.
    pub fn check_model(&self, fingerprint: &str) -> Result<()> {
        if self.fingerprint == fingerprint {
            return Ok(());
        }
        Err(Error::OtherModel { plan: self.fingerprint.clone(), model: fingerprint.into() })
    }

    /// A plan of what was fitted, of the current format.
    pub(crate) fn fitted(fingerprint: &str, model: &ModelShape, config: FitConfig, layers: Vec<LayerPlan>) -> Self {
        let (method, sink_rows, recent_rows) = config.method();
        let (method, fingerprint) = (method.into(), fingerprint.into());
        Self { format: PLAN_FORMAT, method, fingerprint, model: *model, config, sink_rows, recent_rows, layers }
    }

    /// What its rows take.
    pub fn size(&self) -> PlanSize {
        let (bytes, dense) = (self.bytes_per_token(), self.dense_bytes_per_token());
        let kept = bytes / dense;
        PlanSize { bytes_per_token: bytes, dense_bytes_per_token: dense, kept, fixed_bytes: self.fixed_bytes() }
    }

    /// Stored bytes of one token in one layer, scales, zeros and padding included; 0 beyond the last layer.
    pub fn layer_bytes_per_token(&self, layer: usize) -> usize {
        self.layers.get(layer).map_or(0, |l| l.bytes_per_token(&self.model.layer).iter().sum())
    }

    /// Stored bytes of one token in all layers. Sink and recent rows, which stay at 16 bit, are not part of it.
    pub fn bytes_per_token(&self) -> f64 {
        (0..self.layers.len()).map(|l| self.layer_bytes_per_token(l)).sum::<usize>() as f64
    }

    /// Bytes of one token in the 16-bit cache.
    pub fn dense_bytes_per_token(&self) -> f64 {
        (self.layers.len() * self.model.layer.dense_bytes()) as f64
    }

    /// What key bases are multiplied as.
    pub fn key_basis(&self) -> KeyBasis {
        self.config.recalkv().map_or(KeyBasis::Model, |c| c.key_basis)
    }

    /// Bytes that do not grow with the context: bases and codebooks, as a cache holds them.
    pub fn fixed_bytes(&self) -> usize {
        let bytes: usize = self.layers.iter().map(|l| l.fixed_bytes(&self.model.layer)).sum();
        if self.key_basis() == KeyBasis::Model {
            return bytes;
        }
        // A byte a number, and an f32 scale a pair of padded dimensions.
        let keys = || self.layers.iter().filter_map(|l| l.keys.factors());
        let scales: usize = keys().map(|f| 4 * f.heads() * f.dim().next_multiple_of(KERNEL_RANK) / 2).sum();
        bytes + scales - keys().map(|f| f.basis.len()).sum::<usize>()
    }

    /// Bytes kept of the 16-bit cache's for a context of `tokens`: exact sink and recent rows, bases and codebooks counted.
    /// Recent rows are latents too, but not codes yet; what a cache keeps exact beyond them, less than a group, is not counted.
    /// Sequences share bases and codebooks; this is what one alone pays.
    pub fn kept(&self, tokens: usize) -> f64 {
        let (sinks, dense) = (tokens.min(self.sink_rows), self.model.layer.dense_bytes());
        let exact = tokens.min(sinks + self.recent_rows);
        let of_layer = |(l, layer): (usize, &LayerPlan)| match (&layer.keys, &layer.values) {
            (Side::Dense, Side::Dense) => tokens * dense,
            (Side::LowRank(_), _) | (_, Side::LowRank(_)) => (tokens - sinks) * self.layer_bytes_per_token(l) + exact * dense,
            _ => (tokens - exact) * self.layer_bytes_per_token(l) + exact * dense,
        };
        let bytes = self.layers.iter().enumerate().map(of_layer).sum::<usize>() as f64;
        (bytes + self.fixed_bytes() as f64) / (self.dense_bytes_per_token() * tokens.max(1) as f64)
    }
}

/// What a plan file says of a side, beside its tensors.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum SideHeader {
    Dense,
    LowRank { groups: Vec<Vec<usize>>, rank: usize, latent: Latent, mean: bool },
    Quantized(QuantizedFormat),
}
