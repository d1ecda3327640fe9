//! The KV cache of running sequences.
//!
//! A [`Cache`] owns a pool of pages of fixed capacity. A page holds `page_rows` consecutive tokens of one sequence, in
//! every layer and kv head; sequences that [fork](Cache::fork) share pages, and a page with two owners is copied before
//! it is written (prefix caching, beams). Whatever fails, fails before anything has changed.
//!
//! A decode step (or a prefill chunk) is
//! [`begin`](Cache::begin), which makes room and uploads tables; for each layer [`append`](Cache::append) and
//! [`attend`](Cache::attend), which only enqueue; [`finish`](Cache::finish), after which the new tokens are part of their
//! sequences ([`cancel`](Cache::cancel): as if nothing had been).
//!
//! An [`EvictingCache`] lets tokens go as a [`Policy`] says: there each kv head of each layer has pages and a length of its own.
//!
//! [`Cache::new`] keeps token-wise rows; [`Cache::planned`] keeps what a plan of `kvlar-calibrate` says, layer by layer:
//! latents, and beside them a sequence's first and last rows as they were, or codes of each layer's own format.

mod batch;
mod cache;
mod config;
mod error;
mod evict;
mod exact;
mod layer;
mod pages;
mod quantized;
mod sequence;
mod step;
mod tables;
mod turn;

pub use batch::{Batch, BatchShape};
pub use cache::{Cache, SeqId, Usage};
pub use config::CacheConfig;
pub use error::CacheError;
pub use evict::{
    EvictingBatch, EvictingCache, EvictingConfig, Evictor, Moment, Observed, Policy, Prompt, Scorer, Sharing, Size, WindowScore,
};
pub use step::{NewRows, Queries};

/// The crate's result.
pub type Result<T> = std::result::Result<T, CacheError>;
