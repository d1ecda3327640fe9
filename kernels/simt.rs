//! The kernels on the CPU, one fiber a CUDA thread (`kernels/simt`).

/// Whether the emulation was built: feature `simt`, an x86-64 CPU and a C++17 compiler.
pub const fn available() -> bool {
    cfg!(kvlar_simt)
}

/// What a driver calls its device that has none (`tools/emulated-driver`): what runs there is emulated, whatever the backend.
pub const DRIVER_DEVICE: &str = "no GPU: an emulated driver";

/// Runs one launch to its end. `seed` chooses the schedule (0 = lane order), `workers` the OS threads (0 = all cores).
///
/// # Errors
/// What the launch checks found: an unknown entry, a bad grid, a parameter struct of the wrong size, a deadlock, a
/// divergent collective, an asynchronous copy never waited for, a data race (in the race-detecting build).
///
/// # Safety
/// `params` is the entry's parameter struct, and every address in it is valid for what the kernel touches.
pub unsafe fn launch(
    entry: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    params: &[u8],
    seed: u64,
    workers: u32,
) -> Result<(), String> {
    // SAFETY: the caller's promise.
    unsafe { imp::launch(entry, grid, block, shared_bytes, params, seed, workers) }
}

/// The size of an entry's parameter struct, bytes; `None` for an unknown entry, or in a build without the emulation.
pub fn parameter_bytes(entry: &str) -> Option<usize> {
    imp::parameter_bytes(entry)
}

#[cfg(kvlar_simt)]
mod imp {
    use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

    /// `KernelDesc` of `simt/host.h`.
    #[repr(C)]
    pub struct Descriptor {
        name: *const c_char,
        entry: *const c_void,
        parameter_bytes: c_uint,
        fixed_shared_bytes: c_uint,
    }

    unsafe extern "C" {
        fn kvlar_simt_launch(
            kernel: *const Descriptor,
            grid: *const c_uint,
            block: *const c_uint,
            shared_bytes: c_uint,
            params: *const c_void,
            params_bytes: c_uint,
            seed: u64,
            workers: c_uint,
        ) -> c_int;
        fn kvlar_simt_last_error() -> *const c_char;
    }

    include!(concat!(env!("OUT_DIR"), "/simt_table.rs"));

    /// See [`super::parameter_bytes`].
    pub fn parameter_bytes(entry: &str) -> Option<usize> {
        // SAFETY: a static of the linked library, which nothing writes.
        descriptor(entry).map(|kernel| unsafe { (*kernel).parameter_bytes } as usize)
    }

    /// See [`super::launch`].
    ///
    /// # Safety
    /// As there.
    pub unsafe fn launch(
        entry: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: u32,
        params: &[u8],
        seed: u64,
        workers: u32,
    ) -> Result<(), String> {
        let kernel = descriptor(entry).ok_or_else(|| format!("{entry}: no such entry point"))?;
        // The struct is read through its own type: give it an aligned copy.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut aligned)[..params.len()].copy_from_slice(params);
        // SAFETY: the descriptor is a static of the linked library, the arrays outlive the call, and the parameters are
        // what the caller promised.
        let code = unsafe {
            kvlar_simt_launch(
                kernel,
                grid.as_ptr(),
                block.as_ptr(),
                shared_bytes,
                aligned.as_ptr().cast(),
                params.len() as c_uint,
                seed,
                workers,
            )
        };
        if code == 0 {
            return Ok(());
        }
        // SAFETY: a NUL-terminated text of this thread, valid until its next launch.
        Err(unsafe { CStr::from_ptr(kvlar_simt_last_error()) }.to_string_lossy().into_owned())
    }
}

#[cfg(not(kvlar_simt))]
mod imp {
    /// See [`super::parameter_bytes`].
    pub fn parameter_bytes(_: &str) -> Option<usize> {
        None
    }

    /// See [`super::launch`].
    ///
    /// # Safety
    /// Nothing is run.
    pub unsafe fn launch(_: &str, _: [u32; 3], _: [u32; 3], _: u32, _: &[u8], _: u64, _: u32) -> Result<(), String> {
        Err("this build has no kernel emulation (feature `simt`, an x86-64 CPU, a C++17 compiler)".into())
    }
}
