//! Caches that let rows go.

mod batch;
mod cache;
mod config;
mod decoded;
mod evictor;
mod observe;
mod policy;
mod select;
mod sequence;
mod step;
mod store;
mod tables;

pub use batch::EvictingBatch;
pub use cache::EvictingCache;
pub use config::EvictingConfig;
pub use evictor::Evictor;
pub use observe::Observed;
pub use policy::{Policy, Prompt, Scorer, Sharing, Size, WindowScore};
pub use select::Moment;
