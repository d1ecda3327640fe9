//! What a cache holds, and how many bytes that takes.

use crate::Result;
use crate::error::invalid;
use crate::layer::RowFormat;
use kvlar::{Dtype, Format};

/// What a [`crate::Cache`] is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheConfig {
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
    /// Of token-wise key rows: the type of `dtype`, or quantized.
    pub keys: Format,
    /// Of token-wise value rows: quantized where keys are.
    pub values: Format,
    /// First rows of a sequence that stay as they are, where keys or values are quantized; 0 where a plan says it
    /// ([`crate::Cache::planned`]).
    pub sink_rows: usize,
    /// Last rows of a sequence that stay as they are at least, likewise. Channel-wise formats keep those of the unfinished
    /// group too.
    pub recent_rows: usize,
    /// Tokens a page: a power of two, at least 16. 64 is good.
    pub page_rows: usize,
    /// Pages of the pool.
    pub pages: usize,
    /// Most tokens a sequence may hold.
    pub max_rows: usize,
    /// Sequences that hold tokens at a time. Room for rows that stay exact is made for so many, where a plan keeps some
    /// or formats do; otherwise it is not used.
    pub max_seqs: usize,
    /// How many of a sequence's last tokens [`crate::Cache::truncate`] can take back with the very same result as if they had
    /// never been, where recent rows stay exact; 0 is allowed, and more can be taken back, which leaves fewer rows exact
    /// (quantized rows: to whole groups). Exact rows are held for so many tokens more. Where none stay exact any number comes
    /// back, and it is not used.
    pub rollback_rows: usize,
}

impl CacheConfig {
    /// Key rows and value rows.
    fn rows(&self) -> [RowFormat; 2] {
        let of = |format, dim| RowFormat { format, heads: self.kv_heads, dim };
        [of(self.keys, self.head_dim), of(self.values, self.value_dim)]
    }

    /// Bytes that one token takes in all layers, with scales and padding; exact rows take more.
    pub fn bytes_per_token(&self) -> usize {
        self.layers * self.rows().iter().map(RowFormat::token_bytes).sum::<usize>()
    }

    /// Likewise, of the pages that `tokens` of one sequence take.
    pub fn bytes(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_rows) * self.page_bytes()
    }

    /// Likewise, of the pool: what a cache allocates for rows that are not exact.
    pub fn pool_bytes(&self) -> usize {
        self.pages * self.page_bytes()
    }

    fn page_bytes(&self) -> usize {
        self.layers * self.rows().iter().map(|r| r.bytes(self.page_rows)).sum::<usize>()
    }

    /// Entries of a sequence's page table.
    pub(crate) fn max_pages(&self) -> usize {
        self.max_rows.div_ceil(self.page_rows)
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.layers == 0 || self.kv_heads == 0 {
            return invalid("layers", format!("{} layers of {} kv heads", self.layers, self.kv_heads));
        }
        if !self.page_rows.is_power_of_two() || self.page_rows < 16 {
            return invalid("page_rows", format!("{} is not a power of two of at least 16", self.page_rows));
        }
        if self.pages == 0 || self.pages > i32::MAX as usize {
            return invalid("pages", format!("{} pages", self.pages));
        }
        if self.max_rows == 0 || self.max_rows > 1 << 30 {
            return invalid("max_rows", format!("{} is not between 1 and 2^30", self.max_rows));
        }
        if self.max_seqs == 0 || self.max_seqs > 1 << 20 {
            return invalid("max_seqs", format!("{} is not between 1 and 2^20", self.max_seqs));
        }
        Ok(())
    }
}
