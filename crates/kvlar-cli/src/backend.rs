//! Choosing a device on the command line.

use clap::ValueEnum;
use kvlar::{Device, Error, SimtOptions};

/// How ops are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    /// Plain Rust.
    Reference,
    /// The kernels, emulated on the CPU.
    Simt,
    /// The kernels on a GPU.
    Cuda,
}

impl Backend {
    pub fn open(self) -> Result<Device, Error> {
        match self {
            Self::Reference => Ok(Device::reference()),
            Self::Simt => Device::simt(SimtOptions::default()),
            Self::Cuda => Device::cuda(0),
        }
    }

    /// A GPU if there is one, else the reference: where nothing was asked for.
    pub fn best() -> (Self, Device) {
        match Device::cuda(0) {
            Ok(device) => (Self::Cuda, device),
            Err(_) => (Self::Reference, Device::reference()),
        }
    }
}
