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
mod tests {
    use super::*;
    use std::process::Command;

    /// A library with these C functions in the place of the driver; `None` without a compiler.
    fn fake(name: &str, code: &str) -> Option<String> {
        let dir = std::env::temp_dir().join(format!("kvlar-fake-driver-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (source, library) = (dir.join("driver.c"), dir.join("libcuda.so.1"));
        std::fs::write(&source, code).unwrap();
        let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status();
        let built = built.map(|s| s.success()).unwrap_or(false);
        if !built {
            eprintln!("skipped: no C compiler");
        }
        built.then(|| library.to_string_lossy().into_owned())
    }

    const VERSION: &str = "int cuDriverGetVersion(int* v) { *v = 13000; return 0; }";

    #[test]
    fn no_library_is_no_driver() {
        let e = probe_library(&["libkvlar-no-such-driver.so"], 13000).unwrap_err();
        assert!(matches!(&e, Error::NoDriver { tried } if tried.contains("no-such-driver")), "{e}");
    }

    #[test]
    fn a_library_without_symbols_is_a_stub() {
        let Some(library) = fake("stub", "int nothing;") else { return };
        let e = probe_library(&[&library], 13000).unwrap_err();
        assert!(matches!(e, Error::StubDriver { symbol: "cuDriverGetVersion", .. }), "{e}");
        let Some(library) = fake("half", VERSION) else { return };
        let e = probe_library(&[&library], 13000).unwrap_err();
        assert!(matches!(e, Error::StubDriver { symbol: "cuInit", .. }), "{e}");
    }

    #[test]
    fn an_old_driver_says_which_version_it_has() {
        let Some(library) = fake("old", "int cuDriverGetVersion(int* v) { *v = 12020; return 0; }") else { return };
        let e = probe_library(&[&library], 13000).unwrap_err();
        assert_eq!(e, Error::DriverTooOld { have: 12020, need: 13000 });
        assert!(e.to_string().contains("12.2") && e.to_string().contains("13.0"), "{e}");
    }

    #[test]
    fn a_driver_without_devices_and_one_with_two() {
        let Some(library) = fake("empty", &format!("{VERSION} int cuInit(unsigned f) {{ return 100; }}")) else { return };
        assert_eq!(probe_library(&[&library], 13000), Err(Error::NoDevice { ordinal: 0, count: 0 }));
        let two = "int cuInit(unsigned f) { return 0; } int cuDeviceGetCount(int* n) { *n = 2; return 0; }";
        let Some(library) = fake("two", &format!("{VERSION} {two}")) else { return };
        assert_eq!(probe_library(&[&library], 13000), Ok(Driver { version: 13000, devices: 2 }));
    }
}
