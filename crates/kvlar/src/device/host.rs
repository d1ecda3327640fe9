//! The CPU backends: memory is the process's own, launches run to their end at once.

use super::{DeviceInfo, Driver, Emulation, Home, Launch, Place, RawStream, SimtOptions, Transfer};
use crate::{Error, Result, reference};
use std::alloc::{Layout, alloc_zeroed, dealloc};

/// Alignment of allocations, as of cuMemAlloc.
const ALIGN: usize = 256;

pub(super) enum Host {
    Reference,
    Emulated(SimtOptions, Emulation),
}

/// Plans are made as for a GPU with few SMs.
pub(super) fn info(name: &str, SimtOptions { sm_count, shared_per_sm, .. }: SimtOptions) -> DeviceInfo {
    let shared_per_block = shared_per_sm.saturating_sub(1 << 10); // CUDA keeps 1 KB
    DeviceInfo { name: name.into(), compute_capability: None, sm_count, shared_per_block, shared_per_sm }
}

fn layout(bytes: usize) -> Result<Layout> {
    Layout::from_size_align(bytes, ALIGN).map_err(|_| Error::OutOfMemory { bytes })
}

impl Driver for Host {
    fn alloc(&self, bytes: usize, _: Home) -> Result<u64> {
        // SAFETY: the size is not 0 (Buffer::new).
        let p = unsafe { alloc_zeroed(layout(bytes)?) };
        if p.is_null() { Err(Error::OutOfMemory { bytes }) } else { Ok(p as u64) }
    }

    fn free(&self, address: u64, bytes: usize, _: Home) {
        if let Ok(layout) = layout(bytes) {
            // SAFETY: allocated above with the same layout; freed once, by Buffer::drop.
            unsafe { dealloc(address as *mut u8, layout) }
        }
    }

    fn create_stream(&self) -> Result<RawStream> {
        Ok(std::ptr::null_mut())
    }
    fn destroy_stream(&self, _: RawStream) {}
    fn synchronize(&self, _: RawStream) -> Result<()> {
        Ok(())
    }

    fn upload(&self, _: RawStream, to: Place, from: &[u8]) -> Result<()> {
        // SAFETY: Stream checked the range against its buffer, which nobody else can be using: launches have ended.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.address as *mut u8, from.len()) };
        Ok(())
    }

    fn download(&self, _: RawStream, from: Place, to: &mut [u8]) -> Result<()> {
        // SAFETY: as for upload.
        unsafe { std::ptr::copy_nonoverlapping(from.address as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy(&self, _: RawStream, Transfer { from, to, bytes }: Transfer) -> Result<()> {
        // SAFETY: as for upload; the ranges may overlap.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn fill(&self, _: RawStream, at: Place, byte: u8, bytes: usize) -> Result<()> {
        // SAFETY: as for upload.
        unsafe { std::ptr::write_bytes(at.address as *mut u8, byte, bytes) };
        Ok(())
    }

    unsafe fn launch(&self, _: RawStream, launch: Launch, params: &[u8]) -> Result<()> {
        match self {
            Self::Reference => {
                // SAFETY: the caller's promise.
                unsafe { reference::run(launch.entry, params) }
            }
            Self::Emulated(options, emulation) => {
                let (grid, block) = ([launch.grid, 1, 1], [launch.block, 1, 1]);
                emulation(launch.entry, grid, block, launch.shared_bytes, params, options.seed, options.workers)
                    .map_err(Error::Emulation)
            }
        }
    }
}
