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
