//! Emulations in shared libraries: with a bug planted, or compiled under a sanitizer. The program that runs the suites stays
//! the same.

use kvlar::Emulation;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// The one that `KVLAR_SIMT_LIBRARY` names, for all suites to run in place of the linked one (`tools/sanitize`).
pub fn named() -> Option<Emulation> {
    static NAMED: OnceLock<Option<Emulation>> = OnceLock::new();
    let load = || {
        let path = std::env::var_os("KVLAR_SIMT_LIBRARY")?;
        // SAFETY: whoever sets the variable promises it.
        Some(unsafe { load(Path::new(&path)) })
    };
    NAMED.get_or_init(load).clone()
}

type LaunchFn = unsafe extern "C" fn(*const c_void, *const u32, *const u32, u32, *const c_void, u32, u64, u32) -> c_int;

/// Loads one.
///
/// # Safety
/// It was built from `kernels/`, changed or not, and reaches no further than the parameters of a launch let it.
pub unsafe fn load(path: &Path) -> Emulation {
    // SAFETY: the caller's promise; the emulation has no initializers of note.
    let library = unsafe { Library::new(path) }.expect("a library");
    Arc::new(move |entry, grid, block, shared_bytes, params, seed, workers| {
        // SAFETY: a static of that name and type in our library, where it exists.
        let kernel = unsafe { library.get::<*const c_void>(format!("kvlar_simt_kernel_{entry}\0").as_bytes()) };
        let kernel = kernel.map_err(|_| format!("{entry} is not in this build"))?;
        // SAFETY: a function of the emulation's interface.
        let launch = unsafe { library.get::<LaunchFn>(b"kvlar_simt_launch\0") }.map_err(|e| e.to_string())?;
        // SAFETY: as above.
        let error = unsafe { library.get::<unsafe extern "C" fn() -> *const c_char>(b"kvlar_simt_last_error\0") }
            .map_err(|e| e.to_string())?;
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut aligned)[..params.len()].copy_from_slice(params);
        // SAFETY: the parameters are what the launcher checked, and the caller of `load` vouches for the kernel.
        let code = unsafe {
            launch(
                kernel.try_as_raw_ptr().expect("an address"),
                grid.as_ptr(),
                block.as_ptr(),
                shared_bytes,
                aligned.as_ptr().cast(),
                params.len() as u32,
                seed,
                workers,
            )
        };
        if code == 0 {
            return Ok(());
        }
        // SAFETY: a NUL-terminated text of this thread.
        Err(unsafe { CStr::from_ptr(error()) }.to_string_lossy().into_owned())
    })
}
