//! What an evicting cache holds.

use crate::error::invalid;
use crate::layer::RowFormat;
use crate::{CacheConfig, Result};
use kvlar::{Dtype, Format};

/// What an [`crate::EvictingCache`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvictingConfig {
    /// L.
    pub layers: usize,
    /// Hk.
    pub kv_heads: usize,
    /// d; a multiple of 8 up to 256.
    pub head_dim: usize,
    /// dv; likewise.
    pub value_dim: usize,
    /// Type of q, k and v: bf16 or f16.
    pub dtype: Dtype,
    /// Of key rows: the type of `dtype`, or a token-wise code.
    pub keys: Format,
    /// Of value rows: quantized where keys are.
    pub values: Format,
    /// Rows a page: a power of two, at least 16. Half a page a head and layer is lost on average.
    pub page_rows: usize,
    /// Pages of the pool. A page holds rows of one kv head of one layer; of all heads of a layer that keeps latents.
    pub pages: usize,
    /// Most rows that a head holds, and most tokens a sequence may ever have had at a time without eviction.
    pub max_rows: usize,
    /// Sequences at a time.
    pub max_seqs: usize,
    /// Tokens whose scores wait, where a policy has gates: those of a prompt's chunk and of the window that stays, or those
    /// between two evictions while decoding.
    pub staged: usize,
}

impl EvictingConfig {
    /// Pages that a sequence takes whose heads hold `rows` rows each.
    pub fn pages_of(&self, rows: usize) -> usize {
        self.layers * self.kv_heads * rows.div_ceil(self.page_rows)
    }

    /// Key rows and value rows of one head.
    pub(super) fn rows(&self) -> [RowFormat; 2] {
        let of = |format, dim| RowFormat { format, heads: 1, dim };
        [of(self.keys, self.head_dim), of(self.values, self.value_dim)]
    }

    /// As a cache whose heads share pages takes it, with that many pages.
    pub(super) fn shared(&self, pages: usize) -> CacheConfig {
        CacheConfig {
            layers: self.layers,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            value_dim: self.value_dim,
            dtype: self.dtype,
            keys: self.keys,
            values: self.values,
            sink_rows: 0,
            recent_rows: 0,
            page_rows: self.page_rows,
            pages,
            max_rows: self.max_rows,
            max_seqs: self.max_seqs,
            rollback_rows: 0,
        }
    }

    /// Entries of a head's page table.
    pub(super) fn max_pages(&self) -> usize {
        self.max_rows.div_ceil(self.page_rows)
    }

    pub(super) fn check(&self) -> Result<()> {
        self.shared(self.pages).check()?;
        for format in [self.keys, self.values] {
            if format.codec.is_channel_wise() {
                let what = format!("{:?} rows: codes of a group of rows cannot be evicted one by one", format.codec);
                return Err(kvlar::Error::Unsupported { op: "evicting cache", what }.into());
            }
        }
        if self.layers.saturating_mul(self.kv_heads).saturating_mul(self.max_rows) > 1 << 36 {
            let Self { layers, kv_heads, max_rows, .. } = self;
            return invalid("max_rows", format!("{layers} layers of {kv_heads} heads of {max_rows} rows are more than 2^36"));
        }
        Ok(())
    }
}
