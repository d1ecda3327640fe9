//! Translates PTX into C++ for the runtime of the kernels' emulation (`kernels/simt`): what nvcc made of them then runs on a CPU.
//!
//! `kernels/simt` runs the kernels' sources, as the host's compiler reads them. What it cannot see is what is there for nvcc alone
//! (inline assembly, its operands and clobbers), what nvcc makes of the rest (contraction, reordering, read-only loads), and where a
//! GPU is stricter than a CPU (alignment, the bounds of shared memory). PTX has all of that, and is what all our machine code is made
//! from. What is still of a GPU alone: ptxas, the order of memory between threads, what approximate functions return in their last
//! bits, and time.

mod emit;
mod plain;
mod stalls;
mod syntax;

/// The folder of `machine.h`, which translations include; `kernels/` is the other folder that they need.
pub const INCLUDE: &str = env!("CARGO_MANIFEST_DIR");

/// How translations are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// The most common instructions are expressions: a compiler is done several times as soon.
    Plain,
    /// Every instruction is a call of `machine.h`.
    Calls,
    /// Plain, and whatever accesses memory is counted: for a compiler with `KVLAR_ACCESSES` defined (`accesses.h`).
    Accesses,
    /// Plain, and registers and threads have clocks: for a compiler with `KVLAR_STALLS` defined (`stalls.h`).
    Stalls,
}

/// The C++ of a file of PTX: a descriptor `kvlar_simt_kernel_<entry>` for each of its entries, as `kernels/simt/host.h` has them.
///
/// # Errors
/// What the file has that nvcc does not make of our kernels, and where. (Of instructions the C++ compiler says it.)
pub fn translate(ptx: &str, style: Style) -> Result<String, String> {
    emit::emit(&syntax::parse(ptx)?, style)
}
