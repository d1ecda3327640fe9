//! What can be chosen when a plan is fitted.

use crate::error::{Result, config};
use crate::shape::{LayerShape, ModelShape};
use serde::{Deserialize, Serialize};

/// How kv heads are put into groups that share a latent row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grouping {
    /// Heads in order: 0..g, g..2g, …
    Natural,
    /// The rule of ReCalKV's released code: pairs by descending CKA ([`crate::grouping::greedy`]).
    Greedy,
    /// Least discarded energy at the rank ([`crate::grouping::best`]).
    #[default]
    Best,
}

/// What an error of the reconstruction is weighted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weighting {
    /// Nothing: all dimensions count alike.
    #[default]
    None,
    /// Keys: the power of the queries in each rotary pair.
    Query,
    /// Values: what the output projection makes of them.
    Output,
}

/// How ranks are dealt out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Budget {
    /// Every layer, keys and values alike, keeps `kept` of its bytes.
    #[default]
    Uniform,
    /// In proportion to given importances, jointly over layers, keys and values: the released `fisher_uniform` rule
    /// ([`crate::budget::proportional`]).
    Proportional,
    /// Steps of `multiple` ranks go where they save most discarded energy a byte, relative to the matrix's whole
    /// energy, until nothing fits into `kept` any more ([`crate::budget::spectral`]).
    Spectral,
    /// These ranks a group, whatever `kept` says.
    Fixed {
        /// Rank of a key group.
        keys: usize,
        /// Rank of a value group.
        values: usize,
    },
}

/// What a latent is stored as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Latent {
    /// The model's 16-bit type.
    #[default]
    Model,
    /// 8 bits, a scale and a zero (f16) a row and group.
    Int8,
    /// 4 bits, a scale and a zero (f16) a row and group.
    Int4,
}

impl Latent {
    /// Bits of one number.
    pub fn bits(self) -> usize {
        match self {
            Self::Model => 16,
            Self::Int8 => 8,
            Self::Int4 => 4,
        }
    }

    /// Whether numbers are rounded to integers.
    pub fn is_quantized(self) -> bool {
        self != Self::Model
    }

    /// Bytes of a row's scale and zero.
    pub fn row_overhead(self) -> usize {
        if self.is_quantized() { 4 } else { 0 }
    }

    /// Stored bytes of one latent row, scale and zero included.
    pub fn row_bytes(self, rank: usize) -> usize {
        (rank * self.bits()).div_ceil(8) + self.row_overhead()
    }
}

/// What key bases are multiplied as when keys are rebuilt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyBasis {
    /// In 16 bits.
    #[default]
    Model,
    /// In 8 bits, with a scale a rotary pair, on 8-bit latents: half the tensor work, for groups that it bounds (large ones of
    /// high rank); about 0.4 % of a key is lost.
    Int8,
}

/// Where the basis of the values comes from. The paper's ablation "without OVC" is `WeightSvd`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ValueFit {
    /// Truncated SVD of W_v, without data.
    WeightSvd,
    /// OVC: that start, then rounds of updates (7), (8) on the calibration data ([`crate::ovc`]).
    Alternating {
        /// Rounds; the paper and the released code take 1.
        rounds: usize,
    },
    /// What the rounds converge to: PCA of the values.
    #[default]
    Closed,
}

/// Settings of a ReCalKV plan (arXiv 2505.24357).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RecalkvConfig {
    /// Bytes kept of the 16-bit cache's, per token, scales and padding counted, bases not: in (0, 1].
    pub kept: f64,
    /// Kv heads of a key group; divides the heads of a shard.
    pub key_group: usize,
    /// Kv heads of a value group; divides the heads of a shard.
    pub value_group: usize,
    /// How key heads are grouped.
    pub grouping: Grouping,
    /// How value heads are grouped; the paper keeps them in order.
    pub value_grouping: Grouping,
    /// Where value bases come from.
    pub values: ValueFit,
    /// `None` or `Query`.
    pub weighting_keys: Weighting,
    /// `None` or `Output`.
    pub weighting_values: Weighting,
    /// How ranks are dealt out.
    pub budget: Budget,
    /// Ranks are multiples of it; kernels want 32.
    pub multiple: usize,
    /// What key latents are stored as.
    pub latent_keys: Latent,
    /// What value latents are stored as.
    pub latent_values: Latent,
    /// What key bases are multiplied as.
    #[serde(default)]
    pub key_basis: KeyBasis,
    /// Rotate quantized latents so that their numbers are alike in size ([`crate::hadamard`]). Bases of latents that are
    /// not quantized stay as they are: any prefix of their columns is then the best basis of that rank.
    pub hadamard: bool,
    /// Fit key bases to the keys' deviation from their mean, and add the rest of the mean when decoding. Keys only:
    /// attention has no place for a mean of values.
    pub center: bool,
    /// Tensor-parallel shards: a group never has heads of two.
    pub shards: usize,
    /// First rows of a sequence that stay exact.
    pub sink_rows: usize,
    /// Last rows of a sequence that stay exact.
    pub recent_rows: usize,
}

impl Default for RecalkvConfig {
    /// Half the bytes, groups of 2 kv heads, everything data-driven that costs nothing at run time.
    fn default() -> Self {
        Self {
            kept: 0.5,
            key_group: 2,
            value_group: 2,
            grouping: Grouping::Best,
            value_grouping: Grouping::Natural,
            values: ValueFit::Closed,
            weighting_keys: Weighting::Query,
            weighting_values: Weighting::Output,
            budget: Budget::Uniform,
            multiple: 32,
            latent_keys: Latent::Model,
            latent_values: Latent::Model,
            key_basis: KeyBasis::Model,
            hadamard: true,
            center: false,
            shards: 1,
            sink_rows: 4,
            recent_rows: 64,
        }
    }
}

impl RecalkvConfig {
    /// Refuses settings that `model` cannot have.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) naming the setting.
    pub fn check(&self, model: &ModelShape) -> Result<()> {
        model.checked()?;
        let heads = model.layer.kv_heads;
        if !(self.kept > 0.0 && self.kept <= 1.0) {
            return config("kept", format!("{} is outside (0, 1]", self.kept));
        }
        if self.shards == 0 || !heads.is_multiple_of(self.shards) {
            return config("shards", format!("{} does not divide {heads} kv heads", self.shards));
        }
        let per_shard = heads / self.shards;
        for (name, size) in [("key_group", self.key_group), ("value_group", self.value_group)] {
            if size == 0 || !per_shard.is_multiple_of(size) {
                return config(name, format!("{size} does not divide the {per_shard} kv heads of a shard"));
            }
        }
        check_multiple(self.multiple)?;
        if self.weighting_keys == Weighting::Output {
            return config("weighting_keys", "keys do not meet the output projection; use none or query");
        }
        if self.weighting_values == Weighting::Query {
            return config("weighting_values", "values do not meet the queries; use none or output");
        }
        if self.key_basis == KeyBasis::Int8 && self.latent_keys != Latent::Int8 {
            return config("key_basis", "an 8-bit basis multiplies 8-bit key latents alone");
        }
        if self.latent_values.is_quantized() && self.latent_values != self.latent_keys {
            let (values, keys) = (self.latent_values, self.latent_keys);
            return config("latent_values", format!("{values:?} beside {keys:?} keys: quantize both alike, or keys alone"));
        }
        if let Budget::Fixed { keys, values } = self.budget {
            let sides = [
                ("keys", keys, self.key_group * model.layer.head_dim),
                ("values", values, self.value_group * model.layer.value_dim),
            ];
            for (side, rank, full) in sides {
                if rank == 0 || rank > full {
                    return config("rank", format!("{rank} for {side} is outside 1..={full} (group size x head dimension)"));
                }
            }
        }
        Ok(())
    }
}

/// Ranks are steps of at most this.
const LARGEST_MULTIPLE: usize = 1 << 16;

/// Refuses steps of ranks that make no sense.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config).
pub(crate) fn check_multiple(multiple: usize) -> Result<()> {
    if multiple == 0 || multiple > LARGEST_MULTIPLE {
        return config("multiple", format!("{multiple} is no step of ranks between 1 and {LARGEST_MULTIPLE}; kernels want 32"));
    }
    Ok(())
}

/// Named settings. Ranks are relative to the head dimension and groups are clamped to the heads of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Fastest decoding: pairs of heads, r_k = d/2, r_v = dv a pair, 16-bit latents (d = 128: 64 and 128; 3/8 of the bytes).
    Speed,
    /// Least error: pairs of heads, r_k = d, r_v = 1.5 dv a pair, 8-bit latents (d = 128: 128 and 192; about 0.32).
    Quality,
    /// Most tokens: groups of 4 heads, r_k = d, r_v = 2 dv a group, 8-bit latents (d = 128: 128 and 256; about 0.19), and
    /// 8-bit key bases, since tensor cores bound such groups.
    Capacity,
}

impl Preset {
    /// The settings for a model of these heads, in so many tensor-parallel shards.
    pub fn config(self, shape: &LayerShape, shards: usize) -> RecalkvConfig {
        let (group, keys, values, latent, key_basis) = match self {
            Self::Speed => (2, 0.5, 1.0, Latent::Model, KeyBasis::Model),
            Self::Quality => (2, 1.0, 1.5, Latent::Int8, KeyBasis::Model),
            Self::Capacity => (4, 1.0, 2.0, Latent::Int8, KeyBasis::Int8),
        };
        let multiple = 32;
        let wanted = group as f64;
        let heads = shape.kv_heads / shards.max(1);
        let group = (1..=group).rev().find(|g| heads.is_multiple_of(*g)).unwrap_or(1);
        // A smaller group keeps the same share of its dimensions.
        let rank = |heads_kept: f64, dim: usize| {
            let full = group * dim;
            let exact = heads_kept / wanted * full as f64;
            (((exact / multiple as f64).round() as usize).max(1) * multiple).min(full)
        };
        let (keys, values) = (rank(keys, shape.head_dim), rank(values, shape.value_dim));
        let mut config = RecalkvConfig {
            key_group: group,
            value_group: group,
            budget: Budget::Fixed { keys, values },
            latent_keys: latent,
            latent_values: latent,
            key_basis,
            multiple,
            shards,
            ..RecalkvConfig::default()
        };
        let row = latent.row_bytes(keys) + latent.row_bytes(values);
        config.kept = ((shape.kv_heads / group * row) as f64 / shape.dense_bytes() as f64).min(1.0);
        config
    }
}
