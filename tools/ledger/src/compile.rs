//! Compiles the kernels as the build does, but one cubin an architecture, and keeps what the tools say of each.

use crate::model::{Attend, Rebuild};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use std::{env, fs, thread};

/// nvcc and the disassembler.
pub struct Toolchain {
    nvcc: PathBuf,
    bin: PathBuf,
    /// `nvcc 13.0.88`.
    pub compiler: String,
    disassembler: String,
}

impl Toolchain {
    /// The one that `tools/cuda-toolchain` fetched into the repository at `root`, else `CUDA_HOME`'s, else that on `PATH`.
    pub fn find(root: &Path) -> Result<Toolchain, String> {
        let local = Some(root.join(".cuda/nvidia/cu13/bin"));
        let named = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        let has_both = |dir: &PathBuf| dir.join("nvcc").exists() && dir.join("cuobjdump").exists();
        let bin = [local, named].into_iter().flatten().chain(env::split_paths(&path)).find(has_both);
        let bin = bin.ok_or("no nvcc with cuobjdump: run tools/cuda-toolchain, or set CUDA_HOME")?;
        let version = |tool: &str| {
            let text = run(Command::new(bin.join(tool)).arg("--version"))?.0;
            let version = text.lines().find_map(|l| l.split(", V").nth(1)).map(|v| format!("{tool} {}", v.trim()));
            version.ok_or_else(|| format!("{tool}: no version in {text:?}"))
        };
        Ok(Toolchain {
            nvcc: bin.join("nvcc"),
            compiler: version("nvcc")?,
            disassembler: version("cuobjdump")?,
            bin: bin.clone(),
        })
    }

    /// A compilation from `ptx` to `code`, as the build does it.
    pub fn nvcc(&self, build: &BuildFlags, kernels: &Path, ptx: &str, code: &str) -> Command {
        let mut nvcc = Command::new(&self.nvcc);
        nvcc.args(&build.flags).arg(format!("-gencode=arch=compute_{ptx},code={code}")).arg("-I").arg(kernels);
        nvcc
    }

    /// What the disassembler says of a cubin.
    pub fn cuobjdump(&self, what: &str, cubin: &Path) -> Result<String, String> {
        let mut path = vec![self.bin.clone()]; // it looks for nvdisasm there
        path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
        let path = env::join_paths(path).map_err(|e| e.to_string())?;
        Ok(run(Command::new(self.bin.join("cuobjdump")).env("PATH", path).arg(what).arg(cubin))?.0)
    }
}

/// Its standard output and standard error, if it succeeds.
pub fn run(command: &mut Command) -> Result<(String, String), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let result = command.output().map_err(|e| format!("{program}: {e}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&result.stdout), text(&result.stderr));
    if result.status.success() { Ok((out, err)) } else { Err(format!("{command:?}\n{out}{err}")) }
}

/// How the build compiles. Read from its source, so that there is no second list to keep.
pub struct BuildFlags {
    /// Those that decide what code comes out.
    pub flags: Vec<String>,
    /// Architectures of a release.
    pub archs: Vec<String>,
    /// What units that do not ask for the architecture are compiled to.
    pub ptx: String,
}

impl BuildFlags {
    /// From the text of `kernels/build/cuda.rs`.
    pub fn parse(source: &str) -> Result<BuildFlags, String> {
        let list = |name: &str| {
            let body = source.split_once(&format!("const {name}: &[&str] = &[")).and_then(|s| s.1.split_once("];"));
            let body = body.ok_or_else(|| format!("kernels/build/cuda.rs: no list {name}"))?.0;
            Ok::<_, String>(body.split('"').skip(1).step_by(2).map(String::from).collect::<Vec<_>>())
        };
        // Line numbers don't change instructions, and a cubin is no fatbin.
        let mut flags = Vec::new();
        let mut all = list("FLAGS")?.into_iter();
        while let Some(flag) = all.next() {
            match flag.as_str() {
                "-lineinfo" => {}
                "-Xfatbin" => _ = all.next(),
                _ => flags.push(flag),
            }
        }
        let ptx = list("PTX")?.pop().ok_or("kernels/build/cuda.rs: PTX names no architecture")?;
        Ok(BuildFlags { flags, archs: list("RELEASE")?, ptx })
    }
}

/// Whether the ledger says something of a kernel's loops.
pub fn has_loops(entry: &str) -> bool {
    Attend::of(entry).is_some() || Rebuild::of(entry).is_some()
}

/// One `.cu` file with entry points.
pub struct Unit {
    /// `attend_bf16`.
    pub name: String,
    source: PathBuf,
    pub entries: Vec<String>,
    digest: String,
    /// Whether it asks for the architecture.
    per_arch: bool,
    making_ptx: Mutex<()>,
}

/// The units below `kernels`, in order.
pub fn units(kernels: &Path) -> Result<Vec<Unit>, String> {
    let mut all = Vec::new();
    for family in sorted(kernels)? {
        for source in if family.is_dir() { sorted(&family)? } else { Vec::new() } {
            if source.extension().is_none_or(|e| e != "cu") {
                continue;
            }
            let text = read(&source)?;
            let entries: Vec<String> =
                text.lines().filter_map(|l| Some(l.trim().strip_prefix("GPU_EXPORT(")?.strip_suffix(')')?.into())).collect();
            if !entries.is_empty() {
                let path = source.strip_prefix(kernels).unwrap_or(&source).to_string_lossy().replace('\\', "/");
                // As the build decides it.
                let asks = |l: &str| l.contains("__CUDA_ARCH__") && !l.trim_start().starts_with("//");
                let per_arch = with_headers(kernels, &[&path]).values().any(|text| text.lines().any(asks));
                all.push(Unit {
                    name: path.trim_end_matches(".cu").replace('/', "_"),
                    source,
                    entries,
                    digest: digest(kernels, &[&path], ""),
                    per_arch,
                    making_ptx: Mutex::default(),
                });
            }
        }
    }
    Ok(all)
}

fn sorted(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let mut all: Vec<_> = entries.flatten().map(|e| e.path()).collect();
    all.sort();
    Ok(all)
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))
}

/// Sources below `root` and the headers that they include with quotes, transitively, as nvcc reads them: without the emulation.
fn with_headers(root: &Path, sources: &[&str]) -> BTreeMap<String, String> {
    let (mut seen, mut open) = (BTreeMap::new(), sources.iter().map(|s| s.to_string()).collect::<Vec<_>>());
    while let Some(p) = open.pop() {
        if p.starts_with("simt/") || seen.contains_key(&p) {
            continue;
        }
        let Ok(text) = fs::read_to_string(root.join(&p)) else { continue };
        open.extend(text.lines().filter_map(|l| Some(l.trim().strip_prefix("#include \"")?.strip_suffix('"')?.into())));
        seen.insert(p, text);
    }
    seen
}

/// Of sources below `root`, of all that they include, and of `more`: the same wherever and with whatever it is made (FNV-1a).
pub fn digest(root: &Path, sources: &[&str], more: &str) -> String {
    let all = with_headers(root, sources);
    let bytes = all.iter().flat_map(|(path, text)| path.bytes().chain(text.bytes())).chain(more.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    format!("{hash:016x}")
}

/// What the tools say of a unit compiled for an architecture.
pub struct Report {
    /// `ptxas -v`.
    pub assembler: String,
    /// `cuobjdump -res-usage`.
    pub usage: String,
    /// `cuobjdump -sass`, without encodings.
    pub sass: String,
}

/// Compiles units; whatever it did before for the same sources, flags and tools it takes from `cache`.
pub struct Compiler<'a> {
    pub tools: &'a Toolchain,
    pub build: &'a BuildFlags,
    pub kernels: &'a Path,
    pub cache: &'a Path,
}

impl Compiler<'_> {
    /// The report, and whether it had to be made.
    fn report(&self, unit: &Unit, arch: &str) -> Result<(Report, bool), String> {
        let stem = format!("{}-sm_{arch}-", unit.name);
        let base = self.base(&stem, unit);
        let file = |ending: &str| base.with_extension(ending);
        // Written last and renamed into place, the disassembly says that all of it is there.
        if !file("sass").exists() {
            self.remove(&stem)?;
            self.make(unit, arch, &file).map_err(|e| format!("{} for sm_{arch}: {e}", unit.name))?;
            return Ok((self.read(&file)?, true));
        }
        Ok((self.read(&file)?, false))
    }

    /// Where to keep what comes of a unit, less the ending; `stem` says what it is.
    fn base(&self, stem: &str, unit: &Unit) -> PathBuf {
        let mut hash = DefaultHasher::new();
        for part in [&unit.digest, &self.tools.compiler, &self.tools.disassembler].into_iter().chain(&self.build.flags) {
            hash.write(part.as_bytes());
            hash.write_u8(0);
        }
        self.cache.join(format!("{stem}{:016x}", hash.finish()))
    }

    /// Removes what is kept under a stem.
    fn remove(&self, stem: &str) -> Result<(), String> {
        let is_of_it = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(stem));
        sorted(self.cache)?.iter().filter(|p| is_of_it(p)).for_each(|stale| _ = fs::remove_file(stale));
        Ok(())
    }

    fn make(&self, unit: &Unit, arch: &str, file: &dyn Fn(&str) -> PathBuf) -> Result<(), String> {
        let cubin = file("cubin");
        let (source, ptx) = if unit.per_arch {
            (unit.source.clone(), arch)
        } else {
            (self.ptx(unit, &self.build.ptx, false)?, self.build.ptx.as_str())
        };
        let mut nvcc = self.nvcc(ptx, &format!("sm_{arch}"));
        let (out, err) = run(nvcc.args(["-Xptxas", "-v", "-cubin"]).arg(source).arg("-o").arg(&cubin))?;
        let write = |to: PathBuf, text: String| fs::write(&to, text).map_err(|e| format!("{}: {e}", to.display()));
        write(file("ptxas"), out + &err)?;
        write(file("usage"), self.tools.cuobjdump("-res-usage", &cubin)?)?;
        // Disassembling takes as long as assembling: only where loops are looked into.
        let disassembled = unit.entries.iter().any(|e| has_loops(e));
        let sass = if disassembled { self.tools.cuobjdump("-sass", &cubin)? } else { String::new() };
        write(file("part"), crate::sass::without_encodings(&sass))?;
        let _ = fs::remove_file(&cubin);
        fs::rename(file("part"), file("sass")).map_err(|e| e.to_string())
    }

    fn nvcc(&self, ptx: &str, code: &str) -> Command {
        self.tools.nvcc(self.build, self.kernels, ptx, code)
    }

    /// The PTX of a unit, for an architecture, with the source's line numbers or without; whoever is first makes it, the others wait.
    fn ptx(&self, unit: &Unit, arch: &str, lines: bool) -> Result<PathBuf, String> {
        let _turn = unit.making_ptx.lock().unwrap_or_else(|e| e.into_inner());
        let stem = format!("{}-compute_{arch}{}-", unit.name, if lines { "-lines" } else { "" });
        let base = self.base(&stem, unit);
        // Another process may be making the same.
        let (path, part) = (base.with_extension("ptx"), base.with_extension(format!("{}.part", std::process::id())));
        if !path.exists() {
            self.remove(&stem)?;
            let mut nvcc = self.nvcc(arch, &format!("compute_{arch}"));
            nvcc.args(lines.then_some("-lineinfo")).arg("-ptx").arg(&unit.source).arg("-o").arg(&part);
            run(&mut nvcc)?;
            fs::rename(part, &path).map_err(|e| e.to_string())?;
        }
        Ok(path)
    }

    /// The PTX that the code of all architectures is made from, or of units that ask for the architecture, that for `own`.
    pub fn shipped_ptx(&self, unit: &Unit, own: &str, lines: bool) -> Result<PathBuf, String> {
        self.ptx(unit, if unit.per_arch { own } else { &self.build.ptx }, lines)
    }

    fn read(&self, file: &dyn Fn(&str) -> PathBuf) -> Result<Report, String> {
        Ok(Report { assembler: read(&file("ptxas"))?, usage: read(&file("usage"))?, sass: read(&file("sass"))? })
    }

    /// Hands every unit's report for every architecture to `each`, on `jobs` threads. Returns what `each` returned,
    /// in no particular order, and how many units had to be compiled.
    pub fn each<T: Send>(
        &self,
        units: &[Unit],
        archs: &[String],
        jobs: usize,
        each: impl Fn(&Unit, &str, &Report) -> T + Sync,
    ) -> Result<(Vec<T>, usize), String> {
        fs::create_dir_all(self.cache).map_err(|e| format!("{}: {e}", self.cache.display()))?;
        // Unit after unit: two threads seldom want the same PTX.
        let work: Vec<(&Unit, &String)> = archs.iter().flat_map(|a| units.iter().map(move |u| (u, a))).collect();
        let compiled = AtomicUsize::new(0);
        let all = in_parallel(&work, jobs, |(unit, arch)| {
            let start = Instant::now();
            let (report, made) = self.report(unit, arch)?;
            if made {
                let n = compiled.fetch_add(1, Ordering::Relaxed) + 1;
                let seconds = start.elapsed().as_secs_f64();
                let _ = writeln!(std::io::stderr(), "compiled {n}: {} for sm_{arch}, {seconds:.1} s", unit.name);
            }
            Ok(each(unit, arch, &report))
        });
        all.map(|all| (all, compiled.into_inner()))
    }
}

/// What `each` makes of all, in no particular order, on `jobs` threads; the first error ends it.
pub fn in_parallel<W: Sync, T: Send>(
    work: &[W],
    jobs: usize,
    each: impl Fn(&W) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Ok(Vec::new())));
    thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, work.len().max(1)) {
            scope.spawn(|| {
                while let Some(one) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let one = each(one);
                    let mut results = results.lock().unwrap_or_else(|e| e.into_inner());
                    match (results.as_mut(), one) {
                        (Ok(all), Ok(one)) => all.push(one),
                        (Ok(_), Err(e)) => {
                            *results = Err(e);
                            next.store(work.len(), Ordering::Relaxed);
                        }
                        (Err(_), _) => {}
                    }
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernels() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels")
    }

    #[test]
    fn the_builds_flags_are_found() {
        let build = BuildFlags::parse(&read(&kernels().join("build/cuda.rs")).unwrap()).unwrap();
        assert!(build.flags.contains(&"-O3".into()) && build.flags.contains(&"all-warnings".into()), "{:?}", build.flags);
        assert!(build.archs.contains(&"80".into()) && build.archs.contains(&"90a".into()), "{:?}", build.archs);
        assert_eq!(build.ptx, "80");
        let text = r#"const RELEASE: &[&str] = &["80"]; const PTX: &[&str] = &["80"]; const FLAGS: &[&str] = &["-O3", "-lineinfo",
            "-Xfatbin", "-compress-all",];"#;
        assert_eq!(BuildFlags::parse(text).unwrap().flags, ["-O3"]);
        assert!(BuildFlags::parse("").is_err());
    }

    #[test]
    fn units_are_the_sources_with_entry_points() {
        let all = units(&kernels()).unwrap();
        let bf16 = all.iter().find(|u| u.name == "attend_bf16").unwrap();
        assert!(bf16.entries.contains(&"kvlar_attend_bf16_d128_n8".into()));
        assert!(all.iter().all(|u| !u.entries.is_empty()));
        assert_eq!(bf16.digest, units(&kernels()).unwrap().iter().find(|u| u.name == "attend_bf16").unwrap().digest);
        assert_ne!(bf16.digest, all.iter().find(|u| u.name == "attend_f16").unwrap().digest);
        let per_arch = |name: &str| all.iter().find(|u| u.name == name).unwrap().per_arch;
        assert!(per_arch("conformance_memory") && !per_arch("attend_bf16"));
    }
}
