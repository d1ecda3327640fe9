//! Shapes of the model that is calibrated.

use crate::error::{Result, config};
use serde::{Deserialize, Serialize};

/// No model is larger in any size; a damaged plan may claim to be.
const LARGEST: usize = 1 << 20;

/// Sizes of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerShape {
    /// Query heads, Hq.
    pub q_heads: usize,
    /// Key-value heads, Hk; divides Hq.
    pub kv_heads: usize,
    /// Dimension of a key, d.
    pub head_dim: usize,
    /// Dimension of a value, dv.
    pub value_dim: usize,
}

impl LayerShape {
    /// The same sizes, if they make sense.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a zero or absurd size, or kv heads that do not divide the query heads.
    pub fn checked(self) -> Result<Self> {
        let Self { q_heads, kv_heads, head_dim, value_dim } = self;
        if q_heads == 0 || kv_heads == 0 || head_dim == 0 || value_dim == 0 {
            return config("layer shape", format!("{self:?} has a zero size"));
        }
        if [q_heads, kv_heads, head_dim, value_dim].iter().any(|n| *n > LARGEST) {
            return config("layer shape", format!("{self:?} has a size above {LARGEST}"));
        }
        if !q_heads.is_multiple_of(kv_heads) {
            return config("layer shape", format!("{kv_heads} kv heads do not divide {q_heads} query heads"));
        }
        Ok(self)
    }

    /// Query heads that read one kv head, G = Hq / Hk.
    pub fn heads_per_kv(&self) -> usize {
        self.q_heads / self.kv_heads.max(1)
    }

    /// Bytes of one token's keys and values in this layer at 16 bit.
    pub fn dense_bytes(&self) -> usize {
        2 * self.kv_heads * (self.head_dim + self.value_dim)
    }
}

/// Which two dimensions of a key rotate together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PairLayout {
    /// Pairs (i, i + rot/2), as Llama and NeoX.
    #[default]
    Half,
    /// Pairs (2i, 2i + 1), as GPT-J.
    Interleaved,
}

/// The rotary pairs of a key: what makes the power of a query a property of the pair, not of the dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RopePairs {
    /// Dimensions that rotate, even; those beyond it are untouched. 0 = no RoPE.
    pub rotary_dim: usize,
    /// Which two rotate together.
    pub layout: PairLayout,
}

impl RopePairs {
    /// The dimension that rotates with `dim`; itself where nothing rotates.
    pub fn partner(&self, dim: usize) -> usize {
        if dim >= self.rotary_dim {
            return dim;
        }
        match self.layout {
            PairLayout::Half => (dim + self.rotary_dim / 2) % self.rotary_dim,
            PairLayout::Interleaved => dim ^ 1,
        }
    }
}

/// Sizes of a model whose attention layers are all alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Attention layers, L.
    pub layers: usize,
    /// The sizes of each.
    pub layer: LayerShape,
    /// Width of the residual stream, D.
    pub hidden: usize,
    /// Rotary pairs of queries and keys.
    pub rope: RopePairs,
}

impl ModelShape {
    /// The same sizes, if they make sense.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a zero size, or a rotary dimension that is odd or above the head's.
    pub fn checked(self) -> Result<Self> {
        self.layer.checked()?;
        if [self.layers, self.hidden].iter().any(|n| *n == 0 || *n > LARGEST) {
            return config("model shape", format!("{} layers of width {}: each is 1 to {LARGEST}", self.layers, self.hidden));
        }
        let rot = self.rope.rotary_dim;
        if rot > self.layer.head_dim || !rot.is_multiple_of(2) {
            return config("rotary_dim", format!("{rot} is not an even number up to the head's {}", self.layer.head_dim));
        }
        Ok(self)
    }
}
