//! Devices, and what they run launches on.

#[cfg(feature = "cuda")]
mod cuda;
mod host;
// Its tests, with drivers of their own, need no CUDA.
#[cfg(any(feature = "cuda", test))]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
mod probe;

use crate::{Buffer, Error, Result, Stream};
use std::fmt;
use std::sync::Arc;

pub(crate) const UNCAPTURABLE: &str = "only launches and copies between buffers can be captured";
pub(crate) const CAPTURED_ALREADY: &str = "the stream is being captured already";

/// How a device executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// The nvcc build on a GPU.
    Cuda,
    /// The same kernels emulated on the CPU.
    Simt,
    /// Plain Rust.
    Reference,
}

/// What plans need to know of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The GPU's name, or the backend's.
    pub name: String,
    /// Of a GPU.
    pub compute_capability: Option<(u32, u32)>,
    /// Streaming multiprocessors; plans make two CTAs for each where they fit.
    pub sm_count: u32,
    /// Dynamic shared memory that a CTA may have, bytes.
    pub shared_per_block: u32,
    /// Shared memory of an SM, bytes.
    pub shared_per_sm: u32,
}

/// How kernels are emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimtOptions {
    /// The schedule of threads: 0 = in order, odd = any order, even = one warp runs ahead.
    pub seed: u64,
    /// OS threads that run blocks; 0 = all cores.
    pub workers: u32,
    /// SMs to pretend.
    pub sm_count: u32,
    /// Bytes of shared memory an SM to pretend: 228 KB as of a Hopper GPU, 100 KB as of sm_86, sm_89 and sm_120.
    pub shared_per_sm: u32,
}

impl Default for SimtOptions {
    fn default() -> Self {
        Self { seed: 0, workers: 0, sm_count: 4, shared_per_sm: 228 << 10 }
    }
}

/// Runs one emulated launch; see [`kvlar_kernels::simt::launch`].
#[doc(hidden)]
pub type Emulation = Arc<dyn Fn(&str, [u32; 3], [u32; 3], u32, &[u8], u64, u32) -> std::result::Result<(), String> + Send + Sync>;

/// A launch as a plan gives it: entry point, grid, threads a CTA, dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    pub entry: &'static str,
    pub grid: u32,
    pub block: u32,
    pub shared_bytes: u32,
}

/// Bytes to be moved from one address of the device to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub from: u64,
    pub to: u64,
    pub bytes: usize,
}

/// Whose memory an allocation is of. The device reaches both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    Device,
    /// Page-locked, at one address for host and device.
    Host,
}

/// An address, and whose memory it is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub address: u64,
    pub home: Home,
}

pub(crate) type RawStream = *mut std::ffi::c_void;

/// What a backend does. Addresses are the backend's own.
pub(crate) trait Driver: Send + Sync {
    fn alloc(&self, bytes: usize, home: Home) -> Result<u64>;
    fn free(&self, address: u64, bytes: usize, home: Home);
    fn create_stream(&self) -> Result<RawStream>;
    fn destroy_stream(&self, stream: RawStream);
    fn synchronize(&self, stream: RawStream) -> Result<()>;
    fn upload(&self, stream: RawStream, to: Place, from: &[u8]) -> Result<()>;
    fn download(&self, stream: RawStream, from: Place, to: &mut [u8]) -> Result<()>;
    /// Between any two homes.
    fn copy(&self, stream: RawStream, transfer: Transfer) -> Result<()>;
    fn fill(&self, stream: RawStream, at: Place, byte: u8, bytes: usize) -> Result<()>;
    /// # Safety
    /// `params` is the entry's struct and its addresses are valid for what the kernel touches.
    unsafe fn launch(&self, stream: RawStream, launch: Launch, params: &[u8]) -> Result<()>;
    /// Device graphs; `None` where the stream records launches itself.
    fn graphs(&self) -> Option<&dyn DeviceGraphs> {
        None
    }
}

/// Graph capture by the driver.
pub(crate) trait DeviceGraphs {
    fn begin(&self, stream: RawStream) -> Result<()>;
    fn end(&self, stream: RawStream) -> Result<u64>;
    /// # Safety
    /// Everything the captured launches touch is still valid.
    unsafe fn launch(&self, graph: u64, stream: RawStream) -> Result<()>;
    fn destroy(&self, graph: u64);
}

struct Inner {
    backend: Backend,
    info: DeviceInfo,
    driver: Box<dyn Driver>,
}

/// Where ops run. Cheap to clone; clones are the same device.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

impl Device {
    /// GPU number `ordinal`. Loads all kernels, so that no launch has to.
    ///
    /// # Errors
    /// One error each for a build without feature `cuda`, no driver, a stub driver, an old driver, no such device, and a
    /// GPU that the build has no kernels for.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            let (info, driver) = cuda::open(ordinal)?;
            Ok(Self(Arc::new(Inner { backend: Backend::Cuda, info, driver: Box::new(driver) })))
        }
        #[cfg(not(feature = "cuda"))]
        {
            let _ = ordinal;
            Err(Error::BuiltWithout("cuda"))
        }
    }

    /// The kernels, emulated on this machine's CPU.
    ///
    /// # Errors
    /// [`Error::BuiltWithout`] if the build could not compile them (feature `simt`, x86-64, a C++17 compiler).
    pub fn simt(options: SimtOptions) -> Result<Self> {
        if !kvlar_kernels::simt::available() {
            return Err(Error::BuiltWithout("simt"));
        }
        let info = host::info("CPU emulation", options);
        let linked: Emulation = Arc::new(|entry, grid, block, shared_bytes, params, seed, workers| {
            // SAFETY: called by `Host::launch` alone, whose caller promises what this needs.
            unsafe { kvlar_kernels::simt::launch(entry, grid, block, shared_bytes, params, seed, workers) }
        });
        Ok(Self(Arc::new(Inner { backend: Backend::Simt, info, driver: Box::new(host::Host::Emulated(options, linked)) })))
    }

    /// The emulation of another build of the kernels than the one that is linked: how tests show that a planted bug is found.
    ///
    /// # Safety
    /// `emulation` touches nothing but what the parameter struct names, as [`kvlar_kernels::simt::launch`] does.
    #[doc(hidden)]
    pub unsafe fn simt_through(options: SimtOptions, emulation: Emulation) -> Self {
        let info = host::info("CPU emulation of other kernels", options);
        Self(Arc::new(Inner { backend: Backend::Simt, info, driver: Box::new(host::Host::Emulated(options, emulation)) }))
    }

    /// Plain Rust on the CPU: interprets the same launches, slowly and exactly.
    pub fn reference() -> Self {
        let info = host::info("CPU reference", SimtOptions::default());
        Self(Arc::new(Inner { backend: Backend::Reference, info, driver: Box::new(host::Host::Reference) }))
    }

    /// How it executes.
    pub fn backend(&self) -> Backend {
        self.0.backend
    }

    /// What plans know of it.
    pub fn info(&self) -> &DeviceInfo {
        &self.0.info
    }

    /// A new stream. Create streams up front: a driver may synchronize to make one.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn stream(&self) -> Result<Stream> {
        Stream::create(self)
    }

    /// An engine's own `CUstream` (null = the legacy default stream). It is not destroyed with the returned stream.
    ///
    /// # Safety
    /// `raw` belongs to this device and outlives the returned stream.
    pub unsafe fn wrap_stream(&self, raw: *mut std::ffi::c_void) -> Stream {
        Stream::borrow(self, raw)
    }

    /// Zeroed memory of exactly `bytes`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        Buffer::new(self, bytes, Home::Device)
    }

    /// Zeroed, page-locked memory of the host, which launches read and write over the link to it, and copies to and from
    /// which run beside launches of other streams. Allocate it up front: a driver takes long, and may synchronize.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn alloc_host(&self, bytes: usize) -> Result<Buffer> {
        Buffer::new(self, bytes, Home::Host)
    }

    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.0.driver
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device").field("backend", &self.0.backend).field("info", &self.0.info).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn a_build_without_cuda_says_so() {
        assert_eq!(Device::cuda(0).unwrap_err(), Error::BuiltWithout("cuda"));
    }

    #[test]
    fn clones_are_the_same_device_and_others_are_not() {
        let a = Device::reference();
        assert!(a.is(&a.clone()) && !a.is(&Device::reference()));
    }
}
