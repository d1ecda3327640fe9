//! The device code of kvlar as a crate: parameter structs, the catalog of entry points, embedded fatbins
//! (feature `cuda`) and the CPU emulation of the same sources (feature `simt`).
//!
//! Launch through the crate `kvlar`; nothing here checks what a kernel is given.

#[rustfmt::skip]
#[allow(missing_docs, non_upper_case_globals, non_camel_case_types)]
pub mod params;
pub mod simt;

/// An entry point: one `extern "C" __global__` function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The symbol, such as `kvlar_attend_bf16_d128_n8`.
    pub name: &'static str,
    /// The folder of `kernels/` it lives in.
    pub family: &'static str,
    /// The module that holds it: one translation unit.
    pub module: &'static str,
}

/// Every entry point, found in the sources by the build.
pub static ENTRIES: &[Entry] = include!(concat!(env!("OUT_DIR"), "/catalog.rs"));

/// What a module is compiled from, in builds without GPU code too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Such as `attend_bf16`.
    pub module: &'static str,
    /// The folder of `kernels/` it lives in.
    pub family: &'static str,
    /// Digest of sources, and flags for the default architectures. A module's source hash is the beginning of the SHA-256, in
    /// hexadecimal digits, of this, a space and the compiler's version.
    pub recipe: &'static str,
}

/// Of every module.
pub static SOURCES: &[Source] = include!(concat!(env!("OUT_DIR"), "/sources.rs"));

/// A compiled translation unit.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Such as `attend_bf16`.
    pub name: &'static str,
    /// Machine code for each of `archs`, and PTX of compute_80.
    pub fatbin: &'static [u8],
    /// Digest of sources, flags and compiler: what the ledger of GPU runs speaks of.
    pub source_hash: &'static str,
    /// Architectures with machine code, such as `90a`.
    pub archs: &'static [&'static str],
    /// The compiler's version.
    pub compiler: &'static str,
}

/// Every module; empty without feature `cuda`.
#[cfg(feature = "cuda")]
pub static MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/modules.rs"));
/// Every module; empty without feature `cuda`.
#[cfg(not(feature = "cuda"))]
pub static MODULES: &[Module] = &[];

/// Runs of the test suite on GPUs, as JSON: see `ledger/README.md`.
pub const GPU_LEDGER: &str = include_str!("ledger/gpu.json");
