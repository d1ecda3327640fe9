//! What can be wrong with an op's inputs.

use std::fmt;

/// An input that an op cannot be computed from; the text names it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReferenceError {
    /// A tensor has another number of elements than its shape says.
    Shape {
        /// The tensor's name in `OPS.md`.
        tensor: &'static str,
        /// Its shape as the other inputs imply it.
        expected: Vec<usize>,
        /// Elements found.
        elements: usize,
    },
    /// A value is out of its range.
    Value {
        /// The input's name.
        name: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl fmt::Display for ReferenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { tensor, expected, elements } => {
                write!(f, "{tensor}: expected shape {expected:?}, found {elements} elements")
            }
            Self::Value { name, problem } => write!(f, "{name}: {problem}"),
        }
    }
}

impl std::error::Error for ReferenceError {}

pub(crate) fn shape(tensor: &'static str, elements: usize, expected: &[usize]) -> Result<(), ReferenceError> {
    if elements == expected.iter().product::<usize>() {
        return Ok(());
    }
    Err(ReferenceError::Shape { tensor, expected: expected.to_vec(), elements })
}

pub(crate) fn value<T>(name: &'static str, problem: impl Into<String>) -> Result<T, ReferenceError> {
    Err(ReferenceError::Value { name, problem: problem.into() })
}
