//! Everything that can go wrong, and what to do about it.

/// An error of this crate. Nothing was enqueued where one is returned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This build lacks a feature.
    #[error("built without feature `{0}`: enable it in Cargo.toml (or on the command line: --features {0})")]
    BuiltWithout(&'static str),
    /// No CUDA driver library could be opened.
    #[error("no CUDA driver: could not open {tried}; install the NVIDIA driver, or use the CPU backends")]
    NoDriver {
        /// Names that were tried.
        tried: String,
    },
    /// The driver library lacks a symbol: a stub that some containers carry.
    #[error("the CUDA driver library {library} is a stub (no {symbol}): mount the host's driver into the container")]
    StubDriver {
        /// The library.
        library: String,
        /// The missing symbol.
        symbol: &'static str,
    },
    /// The driver reports no GPU, or not this one.
    #[error("no CUDA device {ordinal}: the driver sees {count} (check CUDA_VISIBLE_DEVICES)")]
    NoDevice {
        /// Asked for.
        ordinal: usize,
        /// Present.
        count: usize,
    },
    /// The driver is older than the kernels need.
    #[error("the CUDA driver supports CUDA {}.{}, the kernels need {}.{}: update the driver", have / 1000, have % 1000 / 10, need / 1000, need % 1000 / 10)]
    DriverTooOld {
        /// As cuDriverGetVersion says.
        have: i32,
        /// Likewise.
        need: i32,
    },
    /// No machine code for this GPU.
    #[error("no kernels for compute capability {arch}: this build has {built}; rebuild with KVLAR_CUDA_ARCHS={arch}")]
    NoKernelForArch {
        /// Of the GPU, such as `7.5`.
        arch: String,
        /// Of the build.
        built: String,
    },
    /// A combination that has no kernel.
    #[error("{op}: unsupported {what}")]
    Unsupported {
        /// The op.
        op: &'static str,
        /// What is not supported, and what is.
        what: String,
    },
    /// A shape or argument that contradicts another.
    #[error("{arg}: {problem}")]
    Invalid {
        /// The argument.
        arg: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// An argument's memory is smaller than what the op would touch.
    #[error("{arg}: {have} bytes, the op reaches {need}")]
    Bounds {
        /// The argument.
        arg: &'static str,
        /// Bytes needed.
        need: usize,
        /// Bytes there are.
        have: usize,
    },
    /// An address or stride that vector accesses cannot use.
    #[error("{arg}: {value} is not a multiple of {need}")]
    Alignment {
        /// The argument.
        arg: &'static str,
        /// The multiple.
        need: usize,
        /// Address or stride.
        value: u64,
    },
    /// A plan was used with something made for another device or plan.
    #[error("{arg} was made for another {what}")]
    Mismatch {
        /// The argument.
        arg: &'static str,
        /// Device or plan.
        what: &'static str,
    },
    /// Memory could not be allocated.
    #[error("out of memory: {bytes} bytes")]
    OutOfMemory {
        /// Asked for.
        bytes: usize,
    },
    /// The emulation stopped a launch.
    #[error("emulated kernel failed: {0}")]
    Emulation(String),
    /// The reference could not compute an op.
    #[error("reference: {0}")]
    Reference(String),
    /// Capture was used out of turn.
    #[error("graph capture: {0}")]
    Capture(&'static str),
    /// A CUDA call failed.
    #[error("{call} failed: {name} ({code})")]
    Cuda {
        /// The driver function.
        call: &'static str,
        /// CUresult.
        code: u32,
        /// Its name.
        name: &'static str,
    },
    /// A kernel faulted: every further call on this context fails.
    #[error(
        "the CUDA context is lost ({call}: {name}): an earlier kernel faulted; restart the process (compute-sanitizer finds the kernel)"
    )]
    ContextLost {
        /// The driver function that told.
        call: &'static str,
        /// The error's name.
        name: &'static str,
    },
}

pub(crate) fn invalid<T>(arg: &'static str, problem: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid { arg, problem: problem.into() })
}

pub(crate) fn unsupported<T>(op: &'static str, what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Unsupported { op, what: what.into() })
}

pub(crate) fn aligned(arg: &'static str, value: u64, need: usize) -> Result<(), Error> {
    if value.is_multiple_of(need as u64) { Ok(()) } else { Err(Error::Alignment { arg, need, value }) }
}
