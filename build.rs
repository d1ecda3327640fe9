//! Compiles `kernels/`.
//!
//! * Feature `simt`: every `.cu` for the host, against `kernels/simt`, into one static library (cfg `kvlar_simt`).
//!   Skipped with a warning where there is no C++17 compiler or the CPU is not x86-64.
//! * Feature `cuda`: every `.cu` by nvcc into one multi-architecture fatbin, embedded by `kernels/lib.rs`.
//!
//! Both are incremental: an object is made anew only if its flags, its source or a header it includes changed.
//! Nothing here touches the network or asks the machine for its GPU.
//!
//! Environment: `KVLAR_NVCC`, `KVLAR_CUDA_ARCHS` (such as `80,90a`, or `all`), `CUDA_COMPUTE_CAP`, `KVLAR_FATBIN_DIR`
//! (prebuilt fatbins, no nvcc), `KVLAR_SIMT_DIR` (the emulation that another build left in its `OUT_DIR`), `KVLAR_SIMT_SAN`
//! (`address` or `thread`), `KVLAR_SIMT_DEFINES` (extra macros), `KVLAR_DENY_WARNINGS` (of the host compiler; nvcc's always are).

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs};

#[path = "kernels/build/cuda.rs"]
mod cuda;
#[path = "kernels/build/host.rs"]
mod host;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(kvlar_simt)");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    for name in [
        "KVLAR_NVCC",
        "KVLAR_CUDA_ARCHS",
        "CUDA_COMPUTE_CAP",
        "KVLAR_FATBIN_DIR",
        "KVLAR_SIMT_DIR",
        "KVLAR_SIMT_SAN",
        "KVLAR_SIMT_DEFINES",
        "KVLAR_DENY_WARNINGS",
        "DOCS_RS",
    ] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let tree = Tree::read(Path::new("kernels"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    write_if_changed(&out.join("catalog.rs"), &tree.catalog());
    write_if_changed(&out.join("sources.rs"), &tree.sources());
    let docs = env::var_os("DOCS_RS").is_some();
    let simt = env::var_os("CARGO_FEATURE_SIMT").is_some() && !docs;
    write_if_changed(&out.join("simt_table.rs"), &host::table(&tree));
    if simt {
        host::build(&tree, &out);
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let modules = if docs { String::from("&[]") } else { cuda::build(&tree, &out) };
        write_if_changed(&out.join("modules.rs"), &modules);
    }
}

/// One `.cu` file: a translation unit, and under nvcc a module.
struct Unit {
    /// Path below `kernels/`, such as `attend/bf16.cu`.
    path: String,
    /// `attend_bf16`.
    name: String,
    /// The folder: `attend`.
    family: String,
    entries: Vec<String>,
    sources: Sources,
    /// Whether these ask which GPU architecture they are compiled for.
    per_arch: bool,
}

struct Tree {
    root: PathBuf,
    units: Vec<Unit>,
}

impl Tree {
    fn read(root: &Path) -> Tree {
        let mut units = Vec::new();
        for family in sorted(root) {
            for file in sorted(&family).into_iter().filter(|f| f.extension().is_some_and(|e| e == "cu")) {
                let path = file.strip_prefix(root).expect("below kernels").to_string_lossy().replace('\\', "/");
                let text = fs::read_to_string(&file).expect("readable source");
                let entries = text
                    .lines()
                    .filter_map(|l| l.trim().strip_prefix("GPU_EXPORT(")?.strip_suffix(')'))
                    .map(String::from)
                    .collect();
                let sources = Sources::of(root, &path);
                units.push(Unit {
                    name: path.trim_end_matches(".cu").replace('/', "_"),
                    family: path.split('/').next().unwrap_or_default().into(),
                    per_arch: sources.ask_for_the_architecture(),
                    sources,
                    path,
                    entries,
                });
            }
        }
        Tree { root: root.into(), units }
    }

    /// `&[Entry]` for `kernels/lib.rs`.
    fn catalog(&self) -> String {
        let mut s = String::from("&[\n");
        for u in &self.units {
            for e in &u.entries {
                let _ = writeln!(s, "    Entry {{ name: {e:?}, family: {:?}, module: {:?} }},", u.family, u.name);
            }
        }
        s + "]\n"
    }

    /// `&[Source]`, likewise.
    fn sources(&self) -> String {
        let mut s = String::from("&[\n");
        for u in self.units.iter().filter(|u| !u.entries.is_empty()) {
            let recipe = cuda::default_recipe(u);
            let _ = writeln!(s, "    Source {{ module: {:?}, family: {:?}, recipe: {recipe:?} }},", u.name, u.family);
        }
        s + "]\n"
    }
}

fn sorted(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
    all.sort();
    all
}

/// A file below `kernels/` and the headers that it includes with quotes, transitively: paths and texts.
struct Sources(BTreeMap<String, String>);

impl Sources {
    fn of(root: &Path, path: &str) -> Self {
        let (mut seen, mut open) = (BTreeMap::new(), vec![path.to_string()]);
        while let Some(p) = open.pop() {
            let Ok(text) = fs::read_to_string(root.join(&p)) else { continue };
            if seen.contains_key(&p) {
                continue;
            }
            let quoted = text.lines().filter_map(|l| l.trim().strip_prefix("#include \"")?.strip_suffix('"'));
            open.extend(quoted.map(String::from));
            seen.insert(p, text);
        }
        Self(seen)
    }

    fn ask_for_the_architecture(&self) -> bool {
        self.0.values().flat_map(|text| text.lines()).any(|l| l.contains("__CUDA_ARCH__") && !l.trim_start().starts_with("//"))
    }

    /// Of what the host compiler reads.
    fn host_digest(&self) -> String {
        Self::digest(self.0.iter())
    }

    /// Of what nvcc reads: without the emulation.
    fn device_digest(&self) -> String {
        Self::digest(self.0.iter().filter(|(path, _)| !path.starts_with("simt/")))
    }

    fn digest<'a>(of: impl Iterator<Item = (&'a String, &'a String)>) -> String {
        let mut hash = Sha256::new();
        for (path, text) in of {
            hash.update(path);
            hash.update(text);
        }
        hex(&hash.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn short_digest(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))[..16].to_string()
}

fn write_if_changed(path: &Path, text: &str) {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        fs::write(path, text).expect("writable OUT_DIR");
    }
}

/// Runs the commands whose outputs are missing, as many at a time as cargo allows. Outputs appear only when whole.
fn run_all(jobs: Vec<(Command, PathBuf)>) -> Result<(), String> {
    let limit = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1usize);
    let queue = Mutex::new(jobs.into_iter().filter(|(_, out)| !out.exists()).collect::<Vec<_>>());
    let failure = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..limit {
            scope.spawn(|| {
                while failure.lock().unwrap().is_none() {
                    let Some((mut command, out)) = queue.lock().unwrap().pop() else { break };
                    let part = out.with_extension("part");
                    let result = command.arg("-o").arg(&part).output();
                    let problem = match result {
                        Ok(r) if r.status.success() => fs::rename(&part, &out).err().map(|e| format!("{}: {e}", out.display())),
                        Ok(r) => Some(format!(
                            "{} {:?}\n{}{}",
                            command.get_program().to_string_lossy(),
                            command.get_args().collect::<Vec<_>>(),
                            String::from_utf8_lossy(&r.stdout),
                            String::from_utf8_lossy(&r.stderr)
                        )),
                        Err(e) => Some(format!("{}: {e}", command.get_program().to_string_lossy())),
                    };
                    if problem.is_some() {
                        *failure.lock().unwrap() = problem;
                    }
                }
            });
        }
    });
    failure.into_inner().unwrap().map_or(Ok(()), Err)
}
