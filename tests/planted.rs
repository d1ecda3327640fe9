//! The suites can fail: bugs planted into the kernels' sources, one at a time, are each found.
//!
//! A copy of `kernels/` gets one change, is compiled into a shared library, and runs a short form of the suites. The
//! unchanged copy must pass the same. Each runs in a process of its own, since a bug may write where it should not. What
//! no emulation can show is a missing fence: that needs a GPU.

#[path = "planted_bugs/assembly.rs"]
mod assembly;
#[path = "planted_bugs/attend_cut.rs"]
mod attend_cut;
#[path = "planted_bugs/budget.rs"]
mod budget;
#[path = "planted_bugs/ceiling.rs"]
mod ceiling;
#[path = "planted_bugs/channels.rs"]
mod channels;
#[path = "planted_bugs/compact.rs"]
mod compact;
#[path = "planted_bugs/dense.rs"]
mod dense;
#[path = "planted_bugs/lowrank.rs"]
mod lowrank;
#[path = "planted_bugs/lowrank_bytes.rs"]
mod lowrank_bytes;
#[path = "planted_bugs/project.rs"]
mod project;
#[path = "planted_bugs/quantized.rs"]
mod quantized;
#[path = "planted_bugs/scan.rs"]
mod scan;
#[path = "planted_bugs/scan_select.rs"]
mod scan_select;
#[path = "planted_bugs/score.rs"]
mod score;
#[path = "planted_bugs/score_gate.rs"]
mod score_gate;
#[path = "planted_bugs/score_keys.rs"]
mod score_keys;
#[path = "planted_bugs/select.rs"]
mod select;
#[path = "planted_bugs/topp.rs"]
mod topp;

use kvlar::{Device, SimtOptions};
use kvlar_ptx_emulation::{INCLUDE, Style, translate};
use kvlar_tests::{Lab, emulation};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A change of one file: `from`, which occurs once, becomes `to`.
struct Bug {
    name: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

const fn bug(name: &'static str, file: &'static str, from: &'static str, to: &'static str) -> Bug {
    Bug { name, file, from, to }
}

/// What compiles a suite's source.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Compiler {
    /// That of the host, as the emulation is.
    Host,
    /// nvcc, whose PTX is translated for the emulation's runtime: for what no other compiler reads.
    Nvcc,
}

/// A part of the kernels that is compiled by itself, what is planted into it, and what must find it.
struct Suite {
    name: &'static str,
    by: Compiler,
    /// One translation unit.
    source: &'static str,
    bugs: &'static [Bug],
    /// A short form of the suites, within what `source` holds.
    run: fn(&Lab),
}

const SUITES: &[&Suite] = &[
    &assembly::SUITE,
    &attend_cut::SUITE,
    &budget::SUITE,
    &ceiling::SUITE,
    &channels::SUITE,
    &compact::SUITE,
    &dense::SUITE,
    &lowrank::SUITE,
    &lowrank_bytes::SUITE,
    &project::SUITE,
    &quantized::SUITE,
    &scan::SUITE,
    &scan_select::SUITE,
    &score::LSE,
    &score::SCORES,
    &score_gate::SUITE,
    &score_keys::SUITE,
    &select::SUITE,
    &topp::SUITE,
];

fn kernels() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// Compiler and flags of the emulation; `None` without a C++ compiler.
fn compiler() -> Option<Command> {
    let name = std::env::var("CXX").unwrap_or("c++".into());
    Command::new(&name).arg("--version").output().ok().filter(|r| r.status.success())?;
    let mut c = Command::new(name);
    c.args(["-std=c++17", "-fPIC", "-ffp-contract=off", "-pthread", "-DKVLAR_SIMT", "-x", "c++"]);
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("f16c") {
        c.arg("-march=x86-64-v3");
    }
    Some(c)
}

/// The one that `tools/cuda-toolchain` fetches, `KVLAR_NVCC`, or that on `PATH`.
fn nvcc() -> Option<Command> {
    let fetched = kernels().join("../.cuda/nvidia/cu13/bin/nvcc");
    let named = std::env::var_os("KVLAR_NVCC").map(PathBuf::from);
    let all = [named, fetched.exists().then_some(fetched), Some("nvcc".into())];
    all.into_iter().flatten().find(|nvcc| Command::new(nvcc).arg("--version").output().is_ok()).map(Command::new)
}

fn run(command: &mut Command) {
    let r = command.output().expect("a compiler");
    assert!(r.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&r.stderr));
}

fn copy_tree(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for entry in std::fs::read_dir(from).expect("kernels").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("a copy");
        }
    }
}

/// What all builds share, in a folder.
struct Common {
    dir: PathBuf,
    runtime: Vec<PathBuf>,
}

impl Common {
    fn build(dir: &Path) -> Self {
        let object = |name: &str| {
            let (source, object) = (kernels().join(format!("simt/{name}.cpp")), dir.join(format!("{name}.o")));
            run(compiler().expect("a compiler").arg("-O2").arg("-I").arg(kernels()).arg("-c").arg(source).arg("-o").arg(&object));
            object
        };
        let runtime = ["runtime", "collectives", "mbarrier"].map(object).to_vec();
        // Reading the emulation's header takes half as long as compiling most suites: once is enough. A copy, since what is
        // precompiled is looked for beside the header.
        let header = dir.join("host.h");
        std::fs::copy(kernels().join("simt/host.h"), &header).expect("a copy");
        let mut precompile = compiler().expect("a compiler");
        precompile
            .args(["-w", "-c", "-x", "c++-header"])
            .arg("-I")
            .arg(kernels())
            .arg(&header)
            .arg("-o")
            .arg(dir.join("host.h.gch"));
        run(&mut precompile);
        Self { dir: dir.into(), runtime }
    }
}

/// The emulation of the sources with one bug, or none.
fn build(dir: &Path, common: &Common, suite: &Suite, bug: Option<&Bug>) -> PathBuf {
    let tree = dir.join("kernels");
    copy_tree(&kernels(), &tree);
    if let Some(b) = bug {
        let path = tree.join(b.file);
        let text = std::fs::read_to_string(&path).expect(b.file);
        assert_eq!(text.matches(b.from).count(), 1, "{}: {:?} is not there once: adapt the bug to the source", b.name, b.from);
        std::fs::write(&path, text.replace(b.from, b.to)).expect("a file");
    }
    let (source, object, library) = (dir.join("short.cu"), dir.join("short.o"), dir.join("libshort.so"));
    std::fs::write(&source, suite.source).expect("a file");
    // Without warnings as errors: a bug may leave something unused. Without optimization: compiling takes longer than running.
    let mut compile = compiler().expect("a compiler");
    compile.arg("-w").arg("-include").arg(common.dir.join("host.h")).arg("-I").arg(&tree);
    match suite.by {
        Compiler::Host => _ = compile.arg("-c").arg(&source),
        Compiler::Nvcc => {
            let (ptx, translated) = (dir.join("short.ptx"), dir.join("short.cpp"));
            let mut nvcc = nvcc().expect("nvcc");
            run(nvcc
                .args(["-std=c++17", "-O3", "-w", "-arch=compute_90a", "-ptx", "-I"])
                .arg(&tree)
                .arg(&source)
                .arg("-o")
                .arg(&ptx));
            let text = std::fs::read_to_string(ptx).expect("PTX");
            std::fs::write(&translated, translate(&text, Style::Plain).expect("PTX that is understood")).expect("a file");
            compile.arg("-fno-strict-aliasing").arg("-I").arg(INCLUDE).arg("-c").arg(translated);
        }
    }
    run(compile.arg("-o").arg(&object));
    let name = std::env::var("CXX").unwrap_or("c++".into());
    run(Command::new(name)
        .args(["-shared", "-Wl,-Bsymbolic", "-pthread", "-o"])
        .arg(&library)
        .arg(&object)
        .args(&common.runtime));
    library
}

/// Names the library that [`short_suites_of_a_library`] runs; unset, it has nothing to do.
const LIBRARY: &str = "KVLAR_PLANTED_LIBRARY";
/// Names the suite.
const SUITE: &str = "KVLAR_PLANTED_SUITE";

/// The child process: the short suites under several thread schedules.
#[test]
fn short_suites_of_a_library() {
    let Some(library) = std::env::var_os(LIBRARY) else { return };
    let name = std::env::var(SUITE).expect("a suite's name");
    let suite = SUITES.iter().find(|s| s.name == name).expect("a suite");
    // SAFETY: it was just built from our sources. A planted bug may still reach out of bounds, which is why this process has
    // nothing else to do.
    let emulation = unsafe { emulation::load(Path::new(&library)) };
    for seed in 0..4 {
        let options = SimtOptions { seed, workers: 1, sm_count: 3, ..SimtOptions::default() };
        // SAFETY: a short build behaves as the linked one, but for its bug, and this process is its own.
        (suite.run)(&Lab::new(unsafe { Device::simt_through(options, emulation.clone()) }));
    }
}

/// Whether the short suites fail on a library.
fn found(suite: &Suite, library: &Path) -> bool {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    let output = child
        .args(["--exact", "planted::short_suites_of_a_library"])
        .env(LIBRARY, library)
        .env(SUITE, suite.name)
        .output()
        .expect("a process");
    !output.status.success()
}

#[test]
fn planted_bugs_are_found() {
    if compiler().is_none() || !kvlar_kernels::simt::available() {
        eprintln!("skipped: no C++ compiler or no emulation");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let common = Common::build(dir.path());
    // One suite's alone, where its name is given.
    let chosen = std::env::var("KVLAR_PLANTED_ONLY").ok();
    let can_be_built = |s: &Suite| s.by == Compiler::Host || nvcc().is_some();
    let of_interest = |s: &&&Suite| chosen.as_ref().map_or(can_be_built(s), |name| name == s.name);
    if nvcc().is_none() {
        eprintln!("skipped: bugs in assembly, for want of nvcc (tools/cuda-toolchain)");
    }
    for suite in SUITES.iter().filter(of_interest) {
        let sound = build(&dir.path().join(suite.name), &common, suite, None);
        assert!(!found(suite, &sound), "the unchanged kernels fail the short suites: {}", suite.name);
    }
    let all: Vec<(&Suite, &Bug)> = SUITES.iter().filter(of_interest).flat_map(|s| s.bugs.iter().map(move |b| (*s, b))).collect();
    // `KVLAR_PLANTED_SHARE=i/n`: every n-th bug, beginning with the i-th from 0.
    let share = std::env::var("KVLAR_PLANTED_SHARE").ok().map(|share| {
        let (i, n) = share.split_once('/').expect("KVLAR_PLANTED_SHARE is i/n");
        (i.parse::<usize>().expect("a number"), n.parse::<usize>().expect("a number"))
    });
    assert!(share.is_none_or(|(i, n)| i < n), "KVLAR_PLANTED_SHARE is i/n, i below n");
    let all: Vec<_> = all.into_iter().enumerate().filter(|(b, _)| share.is_none_or(|(i, n)| b % n == i)).map(|x| x.1).collect();
    let next = std::sync::Mutex::new(all.iter().enumerate());
    let missed = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let Some((i, (suite, bug))) = next.lock().expect("a lock").next() else { break };
                    if !found(suite, &build(&dir.path().join(i.to_string()), &common, suite, Some(bug))) {
                        missed.lock().expect("a lock").push(bug.name);
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().expect("a lock");
    println!("{} planted bugs, {} found", all.len(), all.len() - missed.len());
    assert!(missed.is_empty(), "not found: {missed:?}");
}
