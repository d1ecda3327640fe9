//! What a bench file gives.

use crate::Rig;
use kvlar::{Result, Stream};
use serde_json::Value;

/// An op at a shape.
pub trait Case {
    /// Within the op, such as `bf16/b1/t4096`.
    fn name(&self) -> String;

    /// The shape, for the results file.
    fn parameters(&self) -> Value;

    /// Bytes that one launch must read and write: inputs once, outputs once.
    fn bytes(&self) -> usize;

    /// Of what multiplies and reads nothing: operations of one launch.
    fn operations(&self) -> usize {
        0
    }

    /// Device memory of one buffer set.
    fn set_bytes(&self) -> usize {
        self.bytes()
    }

    /// Buffer sets worth having; 1 where every launch works on the same memory anyway.
    fn max_sets(&self) -> usize {
        1024
    }

    /// Allocates `sets` buffer sets, filled with random data; outputs are NaN.
    ///
    /// # Errors
    /// Those of allocation and of the op's plan.
    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>>;
}

/// A case in the bench of another op, beside which it is measured: `PREFIX/NAME`.
#[derive(Clone, Debug)]
pub struct Prefixed<C>(pub &'static str, pub C);

impl<C: Case> Case for Prefixed<C> {
    fn name(&self) -> String {
        format!("{}/{}", self.0, self.1.name())
    }

    fn parameters(&self) -> Value {
        self.1.parameters()
    }

    fn bytes(&self) -> usize {
        self.1.bytes()
    }

    fn set_bytes(&self) -> usize {
        self.1.set_bytes()
    }

    fn max_sets(&self) -> usize {
        self.1.max_sets()
    }

    fn prepare(&self, rig: &Rig, sets: usize) -> Result<Box<dyn Launches>> {
        self.1.prepare(rig, sets)
    }
}

/// The buffers of a case, and its launches.
pub trait Launches {
    /// Enqueues one launch over buffer set `set`.
    ///
    /// # Errors
    /// Those of the op.
    fn launch(&mut self, stream: &Stream, set: usize) -> Result<()>;

    /// Called once after the first launches: refuses results that cannot be right, since the time of a launch that did
    /// nothing means nothing. The test suites check values.
    ///
    /// # Panics
    /// If a result is not finite or a kernel reported bad arguments.
    fn check(&self, rig: &Rig);
}
