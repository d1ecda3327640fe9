//! What an engine refuses.

use std::path::PathBuf;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// A file of a checkpoint is not there.
    #[error("{}: no such file ({why})", path.display())]
    MissingFile {
        /// The file.
        path: PathBuf,
        /// What needs it.
        why: String,
    },
    /// A file of a checkpoint cannot be used.
    #[error("{}: {problem}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A checkpoint lacks a tensor that its configuration calls for.
    #[error("{}: no tensor {name:?}", path.display())]
    MissingTensor {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor has another shape than its configuration says.
    #[error("{}: tensor {name:?} is {found:?}, config.json makes it {expected:?}", path.display())]
    BadTensor {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// As stored.
        found: Vec<usize>,
        /// As configured.
        expected: Vec<usize>,
    },
    /// A prompt or a sequence that the model or store cannot take.
    #[error("{0}")]
    Input(String),
    /// The cache refused.
    #[error(transparent)]
    Cache(#[from] kvlar_cache::CacheError),
    /// A device refused.
    #[error(transparent)]
    Device(#[from] kvlar::Error),
    /// Tensor arithmetic failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl EngineError {
    /// Whether the device has no kernel for what was asked for: another method, or another device, may do.
    pub fn is_unsupported(&self) -> bool {
        use kvlar::Error::Unsupported;
        use kvlar_cache::CacheError;
        matches!(self, Self::Device(Unsupported { .. }) | Self::Cache(CacheError::Device(Unsupported { .. })))
    }
}
