//! Entries of PTX, compiled and launched.

use kvlar_ptx_emulation::{INCLUDE, Style, translate};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

pub const HEADER: &str = ".version 9.0\n.target sm_90a\n.address_size 64\n";
const REGISTERS: &str = ".reg .pred %p<1000>; .reg .b16 %rs<1000>; .reg .b32 %r<1000>; .reg .b64 %rd<1000>; .reg .f32 %f<1000>; \
                         .reg .f64 %fd<1000>;\n";

/// An entry `name` with the address that it is given in `%rd0`.
pub fn entry(name: &str, body: &str) -> String {
    format!(
        ".visible .entry {name}(\n.param .u64 {name}_param_0\n)\n.maxntid 32, 1, 1\n{{\n{REGISTERS}ld.param.u64 %rd0, [{name}_param_0];\n\
         {body}ret;\n}}\n"
    )
}

fn compiler() -> Command {
    Command::new(std::env::var_os("CXX").unwrap_or("c++".into()))
}

pub fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| e.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// The emulation of a file of PTX.
pub struct Machine(libloading::Library, #[expect(dead_code, reason = "the library's folder")] tempfile::TempDir);

impl Machine {
    /// `Err` with what the translation or the compiler says; `None` where there is no compiler or no emulation.
    pub fn build(ptx: &str, style: Style) -> Option<Result<Self, String>> {
        if !cfg!(target_arch = "x86_64") || compiler().arg("--version").output().is_err() {
            eprintln!("skipped: no C++ compiler, or not an x86-64 CPU");
            return None;
        }
        Some(Self::try_build(ptx, style))
    }

    fn try_build(ptx: &str, style: Style) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let (source, library) = (folder.path().join("machine.cpp"), folder.path().join("libmachine.so"));
        std::fs::write(&source, translate(&format!("{HEADER}{ptx}"), style)?).map_err(|e| e.to_string())?;
        let kernels = Path::new(INCLUDE).join("../../kernels");
        let mut command = compiler();
        command.args([
            "-std=c++17",
            "-w",
            "-fPIC",
            "-shared",
            "-pthread",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-DKVLAR_SIMT",
        ]);
        command
            .args((style == Style::Accesses).then_some("-DKVLAR_ACCESSES"))
            .args((style == Style::Stalls).then_some("-DKVLAR_STALLS"))
            .arg("-Wl,-Bsymbolic")
            .arg("-I")
            .arg(&kernels)
            .arg("-I")
            .arg(INCLUDE)
            .arg("-o")
            .arg(&library)
            .arg(&source);
        run(command.args(Self::runtime()?))?;
        // SAFETY: it has no initializers of note.
        Ok(Self(unsafe { libloading::Library::new(library) }.map_err(|e| e.to_string())?, folder))
    }

    /// The emulation's runtime, compiled once for all tests.
    fn runtime() -> Result<&'static [PathBuf], String> {
        static COMPILED: OnceLock<Result<Vec<PathBuf>, String>> = OnceLock::new();
        let compile = |name: &str| {
            let (folder, kernels) = (Path::new(env!("CARGO_TARGET_TMPDIR")), Path::new(INCLUDE).join("../../kernels"));
            // Another process may be linking the object of that name.
            let (object, part) = (folder.join(format!("{name}.o")), folder.join(format!("{name}.{}.part", std::process::id())));
            let mut command = compiler();
            command
                .args(["-std=c++17", "-w", "-fPIC", "-pthread", "-ffp-contract=off", "-DKVLAR_SIMT", "-c", "-I"])
                .arg(&kernels);
            run(command.arg(kernels.join(format!("simt/{name}.cpp"))).arg("-o").arg(&part))?;
            std::fs::rename(part, &object).map_err(|e| e.to_string())?;
            Ok(object)
        };
        let all = || ["runtime", "collectives", "mbarrier"].into_iter().map(compile).collect();
        COMPILED.get_or_init(all).as_deref().map_err(String::clone)
    }

    /// Runs one block of an entry, in lane order; what it wrote to the words that it was given.
    pub fn launch(&self, name: &str, threads: u32, shared_bytes: u32, words: usize) -> Result<Vec<u64>, String> {
        self.launch_blocks(name, 1, threads, shared_bytes, words)
    }

    /// Likewise several, one after another.
    pub fn launch_blocks(
        &self,
        name: &str,
        blocks: u32,
        threads: u32,
        shared_bytes: u32,
        words: usize,
    ) -> Result<Vec<u64>, String> {
        type Launch = unsafe extern "C" fn(*const c_void, *const u32, *const u32, u32, *const c_void, u32, u64, u32) -> c_int;
        let mut out = vec![0xabab_abab_abab_ababu64; words];
        let parameters = out.as_mut_ptr() as u64;
        // SAFETY: of these types; the entry writes to `out` alone.
        unsafe {
            let kernel =
                self.0.get::<*const c_void>(format!("kvlar_simt_kernel_{name}\0").as_bytes()).map_err(|e| e.to_string())?;
            let launch = self.0.get::<Launch>(b"kvlar_simt_launch\0").map_err(|e| e.to_string())?;
            let error =
                self.0.get::<unsafe extern "C" fn() -> *const c_char>(b"kvlar_simt_last_error\0").map_err(|e| e.to_string())?;
            let kernel = kernel.try_as_raw_ptr().expect("an address");
            let (grid, block) = ([blocks, 1, 1], [threads, 1, 1]);
            let given = (&raw const parameters).cast();
            if launch(kernel, grid.as_ptr(), block.as_ptr(), shared_bytes, given, 8, 0, 1) != 0 {
                return Err(CStr::from_ptr(error()).to_string_lossy().into_owned());
            }
        }
        Ok(out)
    }
}
