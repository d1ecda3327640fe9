//! What scores are planned from.

use super::plan::ScorePlan;
use crate::append::check_dim;
use crate::error::{invalid, unsupported};
use crate::{Device, Dtype, Result, abi};

/// Which rows get a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoredRows {
    /// Those before the queries' own.
    Prefix,
    /// All, the queries' own among them: in decode (H2O, TOVA), and of whole prompts.
    All,
    /// Those of a chunk of at most so many rows; queries see the first rows, the chunk and their own rows alone, and none is
    /// pooled. Reductions are [`ScoreReduction::Max`], both.
    Chunk(usize),
}

/// How some weights become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreReduction {
    /// Their sum.
    Sum,
    /// Their mean.
    Mean,
    /// The largest; NaN is the least.
    Max,
}

impl ScoreReduction {
    pub(super) fn abi(self) -> u32 {
        match self {
            Self::Sum => abi::KVLAR_REDUCE_SUM,
            Self::Mean => abi::KVLAR_REDUCE_MEAN,
            Self::Max => abi::KVLAR_REDUCE_MAX,
        }
    }
}

/// Pooling of a query head's scores along the rows that get one: stride 1, an odd kernel, padded by half of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// None.
    None,
    /// Mean, divided by the whole kernel at the borders too.
    Avg(usize),
    /// Largest; padding does not count.
    Max(usize),
}

impl Pooling {
    /// As the kernels know it, and rows to either side.
    pub(super) fn abi(self) -> (u32, usize) {
        match self {
            Self::None => (abi::KVLAR_POOL_NONE, 0),
            Self::Avg(kernel) => (abi::KVLAR_POOL_AVG, kernel / 2),
            Self::Max(kernel) => (abi::KVLAR_POOL_MAX, kernel / 2),
        }
    }
}

/// What [`ScorePlan`] is made from. Start from [`ScoreShape::window`], [`ScoreShape::column`] or [`ScoreShape::repeat`] and
/// change fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreShape {
    /// Type of q and of the key rows: bf16 or f16.
    pub dtype: Dtype,
    /// B.
    pub seqs: usize,
    /// Hq; query head h reads kv head h / (Hq / Hk).
    pub q_heads: usize,
    /// Hk.
    pub kv_heads: usize,
    /// W: queries of a sequence.
    pub queries: usize,
    /// Whether they are those of its rows 0, 1, .. (and at least as many as `rows`); else of its last rows.
    pub from_start: bool,
    /// T: capacity of a (sequence, kv head), the queries' rows among them.
    pub rows: usize,
    /// d; a multiple of 8 up to 256.
    pub head_dim: usize,
    /// Multiplies q·k.
    pub scale: f32,
    /// Which rows get a score.
    pub scored: ScoredRows,
    /// First: over the queries. A mean is over those whose rows there are.
    pub over_rows: ScoreReduction,
    /// Then: along the rows, each query head by itself.
    pub pool: Pooling,
    /// Last: over the query heads of a kv head.
    pub over_heads: ScoreReduction,
    /// Scores become this times what they were, plus the new ones: running sums (H2O). Not for chunks.
    pub accumulate: Option<f32>,
    /// Columns of scores beyond the rows that get one become −∞; else they are left as they are.
    pub fill: bool,
    /// Whether the lse of the queries is given: then there is one launch instead of two. Not for chunks.
    pub given_lse: bool,
}

impl ScoreShape {
    /// Attention of the last `window` queries over the rows before them: summed, pooled by a mean of 7, mean over a kv head's
    /// query heads (SnapKV, arXiv 2404.14469; DynamicKV, arXiv 2412.14838). `heads` = (Hq, Hk); scale 1/√d, filled.
    pub fn window(dtype: Dtype, seqs: usize, heads: (usize, usize), window: usize, rows: usize, head_dim: usize) -> Self {
        Self {
            dtype,
            seqs,
            q_heads: heads.0,
            kv_heads: heads.1,
            queries: window,
            from_start: false,
            rows,
            head_dim,
            scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            scored: ScoredRows::Prefix,
            over_rows: ScoreReduction::Sum,
            pool: Pooling::Avg(7),
            over_heads: ScoreReduction::Mean,
            accumulate: None,
            fill: true,
            given_lse: false,
        }
    }

    /// Causal attention of all rows' queries, summed, mean over a kv head's query heads (H2O, arXiv 2306.14048).
    pub fn column(dtype: Dtype, seqs: usize, heads: (usize, usize), rows: usize, head_dim: usize) -> Self {
        let window = Self::window(dtype, seqs, heads, rows, rows, head_dim);
        Self { from_start: true, scored: ScoredRows::All, pool: Pooling::None, ..window }
    }

    /// The largest attention that a row of a chunk of up to `chunk` rows gets from any of `queries` queries that repeat it
    /// (KVzip, arXiv 2505.23416). `rows`: of the context and the repeating text.
    pub fn repeat(
        dtype: Dtype,
        seqs: usize,
        heads: (usize, usize),
        queries: usize,
        chunk: usize,
        rows: usize,
        head_dim: usize,
    ) -> Self {
        let (over_rows, over_heads) = (ScoreReduction::Max, ScoreReduction::Max);
        let window = Self::window(dtype, seqs, heads, queries, rows, head_dim);
        Self { scored: ScoredRows::Chunk(chunk), over_rows, pool: Pooling::None, over_heads, ..window }
    }

    /// Query heads a kv head.
    pub(super) fn group(&self) -> usize {
        self.q_heads / self.kv_heads.max(1)
    }

    /// Columns of scores: rows of a (sequence, kv head) that may get one.
    pub fn columns(&self) -> usize {
        match self.scored {
            ScoredRows::Prefix => self.rows - self.queries.min(self.rows),
            ScoredRows::All => self.rows,
            ScoredRows::Chunk(rows) => rows,
        }
    }

    fn check(&self) -> Result<()> {
        if self.dtype == Dtype::F32 {
            return unsupported("score", "type f32 of q: bf16 and f16 are");
        }
        check_dim("score", "head_dim", self.head_dim)?;
        if self.kv_heads == 0 || self.q_heads == 0 || !self.q_heads.is_multiple_of(self.kv_heads) {
            return invalid("q_heads", format!("{} query heads are not a multiple of {} kv heads", self.q_heads, self.kv_heads));
        }
        if !self.scale.is_finite() {
            return invalid("scale", format!("{} is not finite", self.scale));
        }
        if self.rows > 1 << 30 {
            return invalid("rows", format!("{} rows are more than 2^30", self.rows));
        }
        if self.queries == 0 || (!self.from_start && self.queries > self.rows) {
            return invalid("queries", format!("{} queries are not those of {} rows", self.queries, self.rows));
        }
        if self.from_start && self.queries < self.rows {
            return invalid("queries", format!("{} rows have {} queries: from the start each has one", self.rows, self.queries));
        }
        if self.group().saturating_mul(self.queries) > 1 << 30 {
            return invalid("queries", format!("{} of {} heads are more than 2^30", self.queries, self.group()));
        }
        if let Pooling::Avg(kernel) | Pooling::Max(kernel) = self.pool
            && kernel.is_multiple_of(2)
        {
            return invalid("pool", format!("a kernel of {kernel} rows is not odd"));
        }
        if let Some(decay) = self.accumulate
            && !decay.is_finite()
        {
            return invalid("accumulate", format!("a decay of {decay} is not finite"));
        }
        self.check_chunk()
    }

    fn check_chunk(&self) -> Result<()> {
        let reductions = [self.over_rows, self.over_heads];
        let ScoredRows::Chunk(chunk) = self.scored else {
            if self.over_rows == ScoreReduction::Max {
                return unsupported("score", "the largest weight over queries, but for a chunk");
            }
            return Ok(());
        };
        if reductions != [ScoreReduction::Max; 2] || self.pool != Pooling::None || self.from_start {
            return unsupported("score", "scores of a chunk that are not the largest weight of all its queries");
        }
        if self.accumulate.is_some() || self.given_lse {
            return unsupported("score", "running sums of a chunk, or a given lse: that of all rows is another");
        }
        if chunk > self.rows - self.queries {
            return invalid("chunk", format!("{chunk} rows are more than the {} before the queries'", self.rows - self.queries));
        }
        Ok(())
    }

    /// Validates, and picks the kernels, their grids and how much scratch they need.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a type, head dimension or size without a kernel; [`crate::Error::Invalid`] for a
    /// contradiction.
    pub fn plan(&self, device: &Device) -> Result<ScorePlan> {
        self.check()?;
        ScorePlan::new(*self, device.info())
    }
}
