//! What the driver knows of a kernel, and whether it can be launched.

use crate::device::{REGISTERS_PER_SM, SHARED_PER_BLOCK};
use cudarc::driver::sys::CUresult;
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::LazyLock;

/// The architecture whose registers count: that of [`crate::device::CAPABILITY`].
const ARCH: &str = "90a";
/// Where the compiler's shared memory does not contain the system's own.
const ARCH_OF_SHARED: &str = "80";
const THREADS: u32 = 1024;
/// Dynamic shared memory that a function has without asking for more.
const SHARED_UNASKED: u32 = 48 << 10;
/// Registers are given to a warp by as many.
const REGISTERS_AT_ONCE: u32 = 256;

#[derive(Deserialize)]
struct Ledger {
    entries: Vec<Known>,
}

#[derive(Deserialize)]
struct Known {
    entry: String,
    arch: String,
    registers: u32,
    shared: u32,
}

static LEDGER: LazyLock<HashMap<(String, String), (u32, u32)>> = LazyLock::new(|| {
    let ledger: Ledger = serde_json::from_str(include_str!("../../../kernels/ledger/static.json")).expect("the static ledger");
    ledger.entries.into_iter().map(|k| ((k.entry, k.arch), (k.registers, k.shared))).collect()
});

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    pub entry: &'static str,
    pub parameter_bytes: usize,
    pub registers: u32,
    pub shared_bytes: u32,
    pub dynamic_limit: u32,
}

/// A launch, with its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    pub entry: &'static str,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared_bytes: u32,
    pub parameters: Vec<u8>,
}

impl Function {
    pub fn find(name: &str) -> Option<Self> {
        let entry = kvlar_kernels::ENTRIES.iter().find(|e| e.name == name)?.name;
        let parameter_bytes = kvlar_kernels::simt::parameter_bytes(entry)?;
        let known = |arch: &str| LEDGER.get(&(entry.to_string(), arch.to_string())).copied();
        let ((registers, _), (_, shared_bytes)) = (known(ARCH)?, known(ARCH_OF_SHARED)?);
        Some(Self { entry, parameter_bytes, registers, shared_bytes, dynamic_limit: SHARED_UNASKED })
    }

    pub fn set_dynamic_limit(&mut self, bytes: u32) -> Result<(), CUresult> {
        if bytes > SHARED_PER_BLOCK - self.shared_bytes {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        self.dynamic_limit = bytes;
        Ok(())
    }

    /// Whether a GPU would take the launch.
    pub fn check(&self, grid: [u32; 3], block: [u32; 3], shared_bytes: u32) -> Result<(), CUresult> {
        let threads = block.iter().map(|&n| u64::from(n)).product::<u64>();
        let empty = grid.contains(&0) || block.contains(&0);
        if empty || grid[0] > i32::MAX as u32 || grid[1].max(grid[2]) > 65_535 || threads > u64::from(THREADS) || block[2] > 64 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        if shared_bytes > self.dynamic_limit {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        let of_a_warp = (32 * self.registers).next_multiple_of(REGISTERS_AT_ONCE);
        if threads.div_ceil(32) as u32 * of_a_warp > REGISTERS_PER_SM {
            return Err(CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
        }
        Ok(())
    }
}
