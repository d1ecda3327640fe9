//! The GPU backend: cudarc's driver calls behind our probe.

use super::probe::{Driver as Found, probe};
use super::{CAPTURED_ALREADY, DeviceGraphs, DeviceInfo, Driver, Home, Launch, Place, RawStream, Transfer, UNCAPTURABLE};
use crate::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};

/// A context and every kernel, loaded.
pub(super) struct Cuda {
    device: sys::CUdevice,
    context: sys::CUcontext,
    functions: HashMap<&'static str, sys::CUfunction>,
}

// SAFETY: handles of the driver may be used from any thread; the context is made current before each use.
unsafe impl Send for Cuda {}
// SAFETY: as above; the driver locks.
unsafe impl Sync for Cuda {}

fn check<T>(call: &'static str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|e| {
        let name = error_name(e);
        match e.0 as u32 {
            // Errors after which a context answers nothing else (CUDA driver API, CUresult).
            214 | 220 | 700 | 702 | 709 | 710 | 714..=719 => Error::ContextLost { call, name },
            code => Error::Cuda { call, code, name },
        }
    })
}

fn error_name(e: DriverError) -> &'static str {
    let mut name = std::ptr::null();
    // SAFETY: the driver gives a string of its own, or an error for a code that it does not know.
    let known = unsafe { sys::cuGetErrorName(e.0, &mut name) } == sys::CUresult::CUDA_SUCCESS && !name.is_null();
    // SAFETY: a static, NUL-terminated string.
    let text = known.then(|| unsafe { CStr::from_ptr(name) });
    text.and_then(|t| t.to_str().ok()).unwrap_or("unknown error")
}

/// The least driver that runs what the compiler made: any of its major version.
fn needed_version() -> i32 {
    let compiler = kvlar_kernels::MODULES.first().map_or("", |m| m.compiler);
    let major = compiler.trim_start_matches("nvcc ").split('.').next().and_then(|m| m.parse::<i32>().ok());
    1000 * major.unwrap_or(12)
}

/// Whether an architecture list (or its PTX of compute_80) runs on a GPU.
fn runs_on(archs: &[&str], (major, minor): (u32, u32)) -> bool {
    let native = |a: &&str| match a.trim_end_matches(['a', 'f']).parse::<u32>() {
        Ok(n) if a.ends_with(['a', 'f']) => n == 10 * major + minor,
        Ok(n) => n / 10 == major && n % 10 <= minor,
        Err(_) => false,
    };
    archs.iter().any(native) || major >= 8
}

fn check_arch(archs: &[&str], capability: (u32, u32)) -> Result<()> {
    if runs_on(archs, capability) {
        return Ok(());
    }
    let arch = format!("{}{}", capability.0, capability.1);
    Err(Error::NoKernelForArch { arch, built: format!("sm_{} and compute_80 PTX", archs.join(", sm_")) })
}

pub(super) fn open(ordinal: usize) -> Result<(DeviceInfo, Cuda)> {
    let Found { devices, .. } = probe(needed_version())?;
    if ordinal >= devices {
        return Err(Error::NoDevice { ordinal, count: devices });
    }
    let device = check("cuDeviceGet", result::device::get(ordinal as i32))?;
    // SAFETY: the device exists.
    let attribute = |a| check("cuDeviceGetAttribute", unsafe { result::device::get_attribute(device, a) }).map(|x| x as u32);
    let capability = (
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let archs = kvlar_kernels::MODULES.first().map_or(&[][..], |m| m.archs);
    check_arch(archs, capability)?;
    let info = DeviceInfo {
        name: check("cuDeviceGetName", result::device::get_name(device))?,
        compute_capability: Some(capability),
        sm_count: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_per_sm: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
    };
    // SAFETY: the device exists; released in drop.
    let context = check("cuDevicePrimaryCtxRetain", unsafe { result::primary_ctx::retain(device) })?;
    let mut cuda = Cuda { device, context, functions: HashMap::new() };
    cuda.load(&info)?;
    Ok((info, cuda))
}

impl Cuda {
    /// Loads all kernels and raises their limit of dynamic shared memory, so that a launch has nothing to set up.
    fn load(&mut self, info: &DeviceInfo) -> Result<()> {
        self.bind()?;
        for module in kvlar_kernels::MODULES {
            // SAFETY: an image that nvcc made, alive for the whole program. It is never unloaded: the primary context may
            // be shared, and functions must outlive every graph.
            let handle = check("cuModuleLoadData", unsafe { result::module::load_data(module.fatbin.as_ptr().cast()) })?;
            for entry in kvlar_kernels::ENTRIES.iter().filter(|e| e.module == module.name) {
                let name = CString::new(entry.name).map_err(|_| Error::BuiltWithout("cuda"))?;
                // SAFETY: the module exists.
                let f = check("cuModuleGetFunction", unsafe { result::module::get_function(handle, name) })?;
                // SAFETY: the function exists.
                let fixed = unsafe {
                    result::function::get_function_attribute(f, FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
                };
                let dynamic = info.shared_per_block as i32 - check("cuFuncGetAttribute", fixed)?;
                let limit = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function exists.
                check("cuFuncSetAttribute", unsafe { result::function::set_function_attribute(f, limit, dynamic) })?;
                self.functions.insert(entry.name, f);
            }
        }
        Ok(())
    }

    /// Its address is the host's and the device's: all our GPUs have unified addresses.
    fn alloc_host(&self, bytes: usize) -> Result<u64> {
        // SAFETY: the context is current; freed by `free`.
        let memory = match unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => return Err(Error::OutOfMemory { bytes }),
            other => check("cuMemHostAlloc", other)?,
        };
        // SAFETY: just allocated, and known to nobody else.
        unsafe { std::ptr::write_bytes(memory.cast::<u8>(), 0, bytes) };
        Ok(memory as u64)
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained.
        check("cuCtxSetCurrent", unsafe { result::ctx::set_current(self.context) })
    }
}

impl Cuda {
    fn is_capturing(&self, raw: RawStream) -> Result<bool> {
        self.bind()?;
        // The legacy default stream cannot be captured, and asking for it is an error while another is.
        if raw.is_null() {
            return Ok(false);
        }
        // SAFETY: the stream exists.
        let status = check("cuStreamIsCapturing", unsafe { result::stream::is_capturing(stream(raw)) })?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Refuses what a capture cannot hold, before the driver does: that would end the capture.
    fn uncaptured(&self, raw: RawStream) -> Result<()> {
        if self.is_capturing(raw)? {
            return Err(Error::Capture(UNCAPTURABLE));
        }
        Ok(())
    }
}

/// Whether memory of the host is page-locked: by this process, for this driver.
fn is_page_locked(of: &[u8]) -> bool {
    let mut kind = 0u32;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    // SAFETY: the attribute is of 32 bits; any address may be asked for, and a pageable one is an error.
    let known = unsafe { sys::cuPointerGetAttribute((&raw mut kind).cast(), attribute, of.as_ptr() as u64) };
    known == sys::CUresult::CUDA_SUCCESS
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // SAFETY: retained in `open`; memory and streams keep the device alive, so none is left.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

fn stream(raw: RawStream) -> sys::CUstream {
    raw.cast()
}

impl Driver for Cuda {
    fn alloc(&self, bytes: usize, home: Home) -> Result<u64> {
        self.bind()?;
        if home == Home::Host {
            return self.alloc_host(bytes);
        }
        // SAFETY: the context is current; freed by `free`.
        let address = match unsafe { result::malloc_sync(bytes) } {
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => return Err(Error::OutOfMemory { bytes }),
            other => check("cuMemAlloc", other)?,
        };
        // SAFETY: just allocated.
        let zeroed = check("cuMemsetD8", unsafe { result::memset_d8_sync(address, 0, bytes) })
            // That call only enqueues, on the default stream, which our non-blocking streams do not wait for.
            // SAFETY: the default stream always exists.
            .and_then(|()| check("cuStreamSynchronize", unsafe { result::stream::synchronize(result::stream::null()) }));
        if let Err(e) = zeroed {
            self.free(address, bytes, Home::Device);
            return Err(e);
        }
        Ok(address)
    }

    fn free(&self, address: u64, _: usize, home: Home) {
        if self.bind().is_err() {
            return;
        }
        match home {
            // SAFETY: from `alloc`, freed once. cuMemFree waits for work that uses it.
            Home::Device => _ = unsafe { result::free_sync(address) },
            Home::Host => {
                // cuMemFreeHost does not say that it waits.
                let _ = result::ctx::synchronize();
                // SAFETY: from `alloc`, freed once.
                let _ = unsafe { result::free_host(address as *mut c_void) };
            }
        }
    }

    fn create_stream(&self) -> Result<RawStream> {
        self.bind()?;
        Ok(check("cuStreamCreate", result::stream::create(result::stream::StreamKind::NonBlocking))?.cast())
    }

    fn destroy_stream(&self, raw: RawStream) {
        if self.bind().is_ok() {
            // SAFETY: created above, destroyed once.
            let _ = unsafe { result::stream::destroy(stream(raw)) };
        }
    }

    fn synchronize(&self, raw: RawStream) -> Result<()> {
        self.uncaptured(raw)?;
        // SAFETY: the stream exists.
        check("cuStreamSynchronize", unsafe { result::stream::synchronize(stream(raw)) })
    }

    fn upload(&self, raw: RawStream, to: Place, from: &[u8]) -> Result<()> {
        if to.home == Home::Host {
            self.synchronize(raw)?;
            // SAFETY: the range was checked, and the stream's work on it has ended.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.address as *mut u8, from.len()) };
            return Ok(());
        }
        self.uncaptured(raw)?;
        self.copy(raw, Transfer { from: from.as_ptr() as u64, to: to.address, bytes: from.len() })?;
        // Pageable memory has been staged by now. Page-locked memory, which an engine may have, is read when it is its turn.
        if is_page_locked(from) { self.synchronize(raw) } else { Ok(()) }
    }

    fn download(&self, raw: RawStream, from: Place, to: &mut [u8]) -> Result<()> {
        if from.home == Home::Host {
            self.synchronize(raw)?;
            // SAFETY: as for uploads.
            unsafe { std::ptr::copy_nonoverlapping(from.address as *const u8, to.as_mut_ptr(), to.len()) };
            return Ok(());
        }
        self.uncaptured(raw)?;
        self.copy(raw, Transfer { from: from.address, to: to.as_mut_ptr() as u64, bytes: to.len() })?;
        self.synchronize(raw)
    }

    fn copy(&self, raw: RawStream, Transfer { from, to, bytes }: Transfer) -> Result<()> {
        if bytes == 0 {
            return Ok(()); // an empty buffer has no address
        }
        self.bind()?;
        // SAFETY: the ranges were checked, and callers keep their own memory until the copy is done. Addresses tell the
        // driver whose memory each is.
        check("cuMemcpyAsync", unsafe { sys::cuMemcpyAsync(to, from, bytes, stream(raw)) }.result())
    }

    fn fill(&self, raw: RawStream, at: Place, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(()); // an empty buffer has no address
        }
        if at.home == Home::Host {
            self.synchronize(raw)?;
            // SAFETY: as for uploads.
            unsafe { std::ptr::write_bytes(at.address as *mut u8, byte, bytes) };
            return Ok(());
        }
        self.uncaptured(raw)?;
        // SAFETY: the range was checked.
        check("cuMemsetD8Async", unsafe { result::memset_d8_async(at.address, byte, bytes, stream(raw)) })
    }

    unsafe fn launch(&self, raw: RawStream, launch: Launch, params: &[u8]) -> Result<()> {
        self.bind()?;
        let Some(&function) = self.functions.get(launch.entry) else {
            return Err(Error::Unsupported { op: launch.entry, what: "entry point: this build does not have it".into() });
        };
        // The driver copies the struct while it enqueues.
        let mut arguments = [params.as_ptr().cast_mut().cast::<c_void>()];
        let (grid, block) = ((launch.grid, 1, 1), (launch.block, 1, 1));
        // SAFETY: the caller's promise.
        let launched = unsafe { result::launch_kernel(function, grid, block, launch.shared_bytes, stream(raw), &mut arguments) };
        check("cuLaunchKernel", launched)
    }

    fn graphs(&self) -> Option<&dyn DeviceGraphs> {
        Some(self)
    }
}

impl DeviceGraphs for Cuda {
    fn begin(&self, raw: RawStream) -> Result<()> {
        if raw.is_null() {
            return Err(Error::Capture("the legacy default stream cannot be captured: use a stream of your own"));
        }
        if self.is_capturing(raw)? {
            return Err(Error::Capture(CAPTURED_ALREADY));
        }
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream exists.
        check("cuStreamBeginCapture", unsafe { result::stream::begin_capture(stream(raw), mode) })
    }

    fn end(&self, raw: RawStream) -> Result<u64> {
        self.bind()?;
        // SAFETY: the stream exists.
        let graph = check("cuStreamEndCapture", unsafe { result::stream::end_capture(stream(raw)) })?;
        if graph.is_null() {
            return Err(Error::Capture("the capture was invalidated"));
        }
        // SAFETY: the graph exists.
        let executable = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: destroyed once; its executable form lives on its own.
        let _ = unsafe { result::graph::destroy(graph) };
        Ok(check("cuGraphInstantiate", executable)? as u64)
    }

    unsafe fn launch(&self, graph: u64, raw: RawStream) -> Result<()> {
        self.bind()?;
        // SAFETY: the graph is alive (Graph owns it); the caller's promise for what it touches.
        check("cuGraphLaunch", unsafe { result::graph::launch(graph as sys::CUgraphExec, stream(raw)) })
    }

    fn destroy(&self, graph: u64) {
        if self.bind().is_ok() {
            // SAFETY: made in `end`, destroyed once.
            let _ = unsafe { result::graph::exec_destroy(graph as sys::CUgraphExec) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_that_the_build_serves() {
        assert!(runs_on(&["80", "90a"], (9, 0)) && runs_on(&["80", "90a"], (8, 6)));
        assert!(runs_on(&["80"], (12, 0)), "PTX is compiled by the driver");
        let e = check_arch(&["80", "90a"], (7, 5)).unwrap_err();
        assert!(e.to_string().contains("75") && e.to_string().contains("sm_80, sm_90a"), "{e}");
    }

    #[test]
    fn a_machine_without_a_gpu_gets_an_error_and_no_panic() {
        if let Err(e) = open(0) {
            assert!(!e.to_string().is_empty());
        }
        assert!(matches!(
            open(4096),
            Err(Error::NoDevice { .. } | Error::NoDriver { .. } | Error::StubDriver { .. } | Error::DriverTooOld { .. })
        ));
    }
}
