//! What a cache refuses.

use crate::SeqId;

/// An error of this crate. The cache is as it was before the call.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// The pool has too few free pages.
    #[error("the cache is full: {needed} {of} needed, {free} of {capacity} free; drop or truncate sequences, or make it larger")]
    OutOfPages {
        /// `pages`, or `pages of exact rows` (more sequences hold tokens than [`crate::CacheConfig::max_seqs`]).
        of: &'static str,
        /// By the call.
        needed: usize,
        /// Now.
        free: usize,
        /// Of the pool.
        capacity: usize,
    },
    /// A sequence would become longer than any may.
    #[error("sequence {seq} would hold {rows} tokens, the cache was made for {max}")]
    TooLong {
        /// The sequence.
        seq: SeqId,
        /// Asked for.
        rows: usize,
        /// Allowed.
        max: usize,
    },
    /// No such sequence: never created, or dropped.
    #[error("no sequence {0} in this cache")]
    UnknownSequence(SeqId),
    /// A sequence named twice in a batch, or one that is in an unfinished batch.
    #[error("sequence {0} is in a batch already")]
    Busy(SeqId),
    /// Rows that were committed cannot be taken back.
    #[error("sequence {seq}: cannot truncate to {rows} tokens, {committed} are committed")]
    Committed {
        /// The sequence.
        seq: SeqId,
        /// Asked for.
        rows: usize,
        /// Committed.
        committed: usize,
    },
    /// Rows that were encoded together cannot be taken back in part.
    #[error(
        "sequence {seq}: cannot truncate to {rows} tokens: rows are encoded in groups, of which {whole} tokens are whole; \
         truncate to those and append the others again (or make the cache with more rollback_rows)"
    )]
    PartOfGroup {
        /// The sequence.
        seq: SeqId,
        /// Asked for.
        rows: usize,
        /// Possible instead.
        whole: usize,
    },
    /// An argument that contradicts the cache or the batch.
    #[error("{arg}: {problem}")]
    Invalid {
        /// The argument.
        arg: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The device refused.
    #[error(transparent)]
    Device(#[from] kvlar::Error),
}

pub(crate) fn invalid<T>(arg: &'static str, problem: impl Into<String>) -> crate::Result<T> {
    Err(CacheError::Invalid { arg, problem: problem.into() })
}
