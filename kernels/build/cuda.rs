//! The GPU build of the kernels.

use super::*;

/// Architectures of our own builds: the portable path for all GPUs since sm_80, and Hopper's own.
const DEFAULT: [&str; 2] = ["80", "90a"];
/// Architectures of a release.
// sm_86 to sm_89 run sm_80's: nothing here uses what they have beyond it, and compiled for them the counted loops are the same
// but for an instruction or two in hundreds.
const RELEASE: &[&str] = &["80", "90a", "100", "120"];
/// The PTX that comes along for GPUs that are newer than all of these. Units that do not ask for the architecture
/// (`__CUDA_ARCH__`) are compiled to it alone, and their code for every architecture is made from it.
const PTX: &[&str] = &["80"];
const FLAGS: &[&str] = &["-std=c++17", "-O3", "-lineinfo", "-Werror", "all-warnings", "-Xfatbin", "-compress-all"];

/// Builds the fatbins; returns the Rust source of `&[Module]`.
pub fn build(tree: &Tree, out: &Path) -> String {
    let archs = architectures();
    let mut modules = String::from("&[\n");
    let prebuilt = env::var_os("KVLAR_FATBIN_DIR").map(PathBuf::from);
    let dir = prebuilt.clone().unwrap_or_else(|| out.join("fatbins"));
    let (mut jobs, mut all) = (Vec::new(), Vec::new());
    let toolkit = if prebuilt.is_none() { Some(find_nvcc()) } else { None };
    let version = toolkit.as_ref().map_or(String::from("prebuilt"), |nvcc| version_of(nvcc));
    for u in tree.units.iter().filter(|u| !u.entries.is_empty()) {
        let source_hash = short_digest(&format!("{} {version}", recipe(u, &archs)));
        let fatbin = match &toolkit {
            None => dir.join(format!("{}.fatbin", u.name)),
            Some(nvcc) => {
                let fatbin = dir.join(format!("{}-{source_hash}.fatbin", u.name));
                let mut command = Command::new(nvcc);
                command.args(flags(u, &archs)).arg("-I").arg(&tree.root).arg("-fatbin").arg(tree.root.join(&u.path));
                jobs.push((command, fatbin.clone()));
                fatbin
            }
        };
        let _ = writeln!(
            modules,
            "    Module {{ name: {:?}, fatbin: include_bytes!({:?}), source_hash: {source_hash:?}, archs: &{archs:?}, compiler: {version:?} }},",
            u.name,
            fs::canonicalize(fatbin.parent().unwrap_or(&dir)).unwrap_or(dir.clone()).join(fatbin.file_name().unwrap_or_default()),
        );
        all.push(fatbin);
    }
    if prebuilt.is_none() {
        fs::create_dir_all(&dir).expect("writable OUT_DIR");
        if let Err(text) = run_all(jobs) {
            panic!("nvcc failed:\n{text}");
        }
        for stale in sorted(&dir).into_iter().filter(|p| !all.contains(p)) {
            let _ = fs::remove_file(stale);
        }
    }
    modules + "]\n"
}

fn flags(u: &Unit, archs: &[String]) -> Vec<String> {
    let ptx = PTX[0];
    let own = archs.iter().map(|a| format!("-gencode=arch=compute_{},code=sm_{a}", if u.per_arch { a } else { ptx }));
    let newer = format!("-gencode=arch=compute_{ptx},code=compute_{ptx}");
    FLAGS.iter().map(|f| f.to_string()).chain(own).chain([newer]).collect()
}

/// What a unit is compiled from and how, but for the compiler.
fn recipe(u: &Unit, archs: &[String]) -> String {
    format!("{} {:?}", u.sources.device_digest(), flags(u, archs))
}

/// Likewise, for the architectures that the ledger of GPU runs speaks of.
pub fn default_recipe(u: &Unit) -> String {
    recipe(u, &DEFAULT.map(String::from))
}

/// `KVLAR_CUDA_ARCHS`, else `CUDA_COMPUTE_CAP`, else the default list. Accepts `80`, `8.6`, `90a`, lists and `all`.
fn architectures() -> Vec<String> {
    let given = ["KVLAR_CUDA_ARCHS", "CUDA_COMPUTE_CAP"]
        .iter()
        .find_map(|n| Some((n, env::var(n).ok().filter(|v| !v.trim().is_empty())?)));
    let Some((name, text)) = given else { return DEFAULT.iter().map(|a| a.to_string()).collect() };
    if text.trim() == "all" {
        return RELEASE.iter().map(|a| a.to_string()).collect();
    }
    let list: Vec<String> = text.split([',', ' ', ';']).filter(|a| !a.is_empty()).map(|a| a.replace('.', "")).collect();
    for a in &list {
        let number: u32 = a.trim_end_matches(['a', 'f']).parse().unwrap_or(0);
        assert!(number >= 80, "{name}: {a:?} is not an architecture that the kernels support (sm_80 and later)");
    }
    list
}

fn find_nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("KVLAR_NVCC").or(env::var_os("NVCC")) {
        return nvcc.into();
    }
    let below = |root: PathBuf| Some(root.join("bin/nvcc")).filter(|p| p.exists());
    let local = fs::canonicalize(".cuda/nvidia/cu13").ok().and_then(below);
    let named = ["CUDA_HOME", "CUDA_PATH"].iter().find_map(|n| below(env::var_os(n)?.into()));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|d| d.join("nvcc")).find(|p| p.exists());
    local.or(named).or(on_path).unwrap_or_else(|| {
        panic!("feature `cuda` needs nvcc: run tools/cuda-toolchain, or set KVLAR_NVCC to the compiler (or KVLAR_FATBIN_DIR to prebuilt fatbins)")
    })
}

fn version_of(nvcc: &Path) -> String {
    let text = Command::new(nvcc).arg("--version").output().map(|r| String::from_utf8_lossy(&r.stdout).into_owned());
    let text = text.unwrap_or_else(|e| panic!("{}: {e}", nvcc.display()));
    text.lines()
        .find_map(|l| l.split(", V").nth(1))
        .map_or_else(|| panic!("{}: no version in {text:?}", nvcc.display()), |v| format!("nvcc {v}"))
}
