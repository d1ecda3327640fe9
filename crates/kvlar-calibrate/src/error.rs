//! What calibration refuses.

use std::path::PathBuf;

/// An error of this crate; its text says what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has another number of elements than the shapes imply.
    #[error("{tensor}: {found} elements; it must have {expected} ({shape})")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape in words.
        shape: &'static str,
        /// Elements that the shape makes.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// A NaN or an infinity in the data.
    #[error("{tensor}: row {row} holds {value}; calibrate on finite data (a model in f16 may overflow: run it in bf16 or f32)")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The first row that holds one.
        row: usize,
        /// What it holds.
        value: f64,
    },
    /// There is nothing to fit to.
    #[error("{0}: no rows; calibrate on at least one token")]
    Empty(String),
    /// A setting that the model or the method cannot take.
    #[error("{name}: {problem}")]
    Config {
        /// The setting.
        name: &'static str,
        /// What is wrong with it, and what it can be.
        problem: String,
    },
    /// A decomposition did not converge.
    #[error("{0} did not converge; the covariance may span too many orders of magnitude")]
    Numerical(&'static str),
    /// A plan for another model.
    #[error("the plan was fitted to model {plan}, this is model {model}; run `kvlar calibrate` on this model")]
    OtherModel {
        /// The plan's fingerprint.
        plan: String,
        /// The model's fingerprint.
        model: String,
    },
    /// A plan file of a version that this build cannot read.
    #[error("{}: plan format {found}, this build reads {known}; fit the plan again or use the build that wrote it", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version this build reads.
        known: u32,
    },
    /// A file that is not a whole, sound plan.
    #[error("{}: {problem}", path.display())]
    Plan {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of gates of a version that this build cannot read.
    #[error("{}: gates of format {found}, this build reads {known}; train them again or use the build that wrote them", path.display())]
    GateVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version this build reads.
        known: u32,
    },
    /// A file that does not hold whole, sound gates.
    #[error("{}: {problem}", path.display())]
    GateFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Gates of another model.
    #[error(
        "the gates were trained for model {gates}, this is model {model}; run `kvlar calibrate --method fast-kvzip` on this model"
    )]
    GatesOfOtherModel {
        /// The gates' fingerprint.
        gates: String,
        /// The model's fingerprint.
        model: String,
    },
    /// An input that an op's reference refuses.
    #[error(transparent)]
    Op(kvlar_reference::ReferenceError),
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn config<T>(name: &'static str, problem: impl Into<String>) -> Result<T> {
    Err(Error::Config { name, problem: problem.into() })
}

pub(crate) fn shape(tensor: &str, shape: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(Error::Shape { tensor: tensor.into(), shape, expected, found }) }
}

/// Refuses NaN and infinities in rows of `width` numbers.
pub(crate) fn finite(tensor: &str, values: &[f32], width: usize) -> Result<()> {
    match values.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::NotFinite { tensor: tensor.into(), row: at / width.max(1), value: f64::from(values[at]) }),
    }
}
