//! Is there a CUDA driver that works? Asked through our own handle on the library: cudarc panics without one.

use crate::{Error, Result};
use libloading::Library;
use std::ffi::c_int;

/// Names of the driver library.
#[cfg(windows)]
const NAMES: &[&str] = &["nvcuda.dll"];
/// Names of the driver library.
#[cfg(not(windows))]
const NAMES: &[&str] = &["libcuda.so.1", "libcuda.so"];

const NO_DEVICE: c_int = 100;
const SYSTEM_DRIVER_MISMATCH: c_int = 803;

/// What the driver says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    /// As cuDriverGetVersion says: 13000 for CUDA 13.0.
    pub version: i32,
    pub devices: usize,
}

/// Loads and initializes the driver; `need` is the least version that will do.
pub fn probe(need: i32) -> Result<Driver> {
    probe_library(NAMES, need)
}

fn probe_library(names: &[&str], need: i32) -> Result<Driver> {
    // SAFETY: loading the driver runs its initializers, which every CUDA program does.
    let open = |name: &&str| unsafe { Library::new(*name) }.ok();
    let Some((name, library)) = names.iter().find_map(|name| Some((*name, open(name)?))) else {
        return Err(Error::NoDriver { tried: names.join(", ") });
    };
    let stub = |symbol| Error::StubDriver { library: name.into(), symbol };
    macro_rules! call {
        ($symbol:literal, $signature:ty, $($argument:expr),*) => {{
            // SAFETY: the signature is the driver API's.
            let f = unsafe { library.get::<$signature>(concat!($symbol, "\0").as_bytes()) }.map_err(|_| stub($symbol))?;
            // SAFETY: as above; the pointers are to locals.
            unsafe { f($($argument),*) }
        }};
    }
    let mut version = 0;
    // The version needs no initialization, and an old driver may fail to initialize.
    check("cuDriverGetVersion", call!("cuDriverGetVersion", unsafe extern "C" fn(*mut c_int) -> c_int, &mut version))?;
    if version == 0 {
        return Err(stub("working cuDriverGetVersion"));
    }
    if version < need {
        return Err(Error::DriverTooOld { have: version, need });
    }
    match call!("cuInit", unsafe extern "C" fn(u32) -> c_int, 0) {
        NO_DEVICE => return Err(Error::NoDevice { ordinal: 0, count: 0 }),
        code => check("cuInit", code)?,
    }
    let mut devices = 0;
    check("cuDeviceGetCount", call!("cuDeviceGetCount", unsafe extern "C" fn(*mut c_int) -> c_int, &mut devices))?;
    // The library stays loaded: cudarc opens it again and keeps it.
    std::mem::forget(library);
    Ok(Driver { version, devices: usize::try_from(devices).unwrap_or(0) })
}

fn check(call: &'static str, code: c_int) -> Result<()> {
    match code {
        0 => Ok(()),
        SYSTEM_DRIVER_MISMATCH => Err(Error::Cuda { call, code: 803, name: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH" }),
        code => Err(Error::Cuda { call, code: code.unsigned_abs(), name: "see the CUDA driver API's error list" }),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
