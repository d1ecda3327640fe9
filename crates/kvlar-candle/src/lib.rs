//! candle adapters for kvlar, and (feature `llama`) an engine that runs Hugging Face checkpoints of the Llama family with
//! its KV cache in kvlar.
//!
//! ```no_run
//! use kvlar_candle::llama::{Llama, generate, Sampling};
//! use kvlar_candle::{PagedStore, StoreConfig};
//! let model = Llama::load("path/to/checkpoint")?;
//! let mut store = PagedStore::new(&kvlar::Device::reference(), &model.kv_shape(), StoreConfig::bf16(4096))?;
//! let text = generate(&model, &mut store, "Once", 64, Sampling::Greedy, |_piece| ())?;
//! # Ok::<(), kvlar_candle::EngineError>(())
//! ```

mod error;
mod evicting;
#[cfg(feature = "llama")]
pub mod llama;
mod paged;
mod steps;
mod store;

pub use error::EngineError;
pub use evicting::{EvictingStore, EvictingStoreConfig};
pub use paged::{PagedStore, StoreConfig};
pub use store::{KvShape, KvStore, Moment};

/// The crate's result.
pub type Result<T> = std::result::Result<T, EngineError>;
