//! Checks `kernels/ledger/static.json`: what every kernel is once compiled, as far as that can be read without a GPU.
//!
//! For each entry point and architecture the ledger holds registers, memory, spills, and for the attend kernels the
//! instructions of their main loop with the issue time that they imply on an H200. Compiling again and comparing shows
//! what a change to a kernel (or to anything it includes) did to all of them: a register more may cost an SM one of its
//! CTAs, and twenty instructions in a loop may be what keeps it from the speed of memory.
//!
//! * `kvlar-ledger`: compile, compare, exit with 1 if anything differs or may not be.
//! * `kvlar-ledger --write`: compile and write the file.
//! * `kvlar-ledger --pairs`: count the instructions of pairs of quantized formats (`pairs.rs`).
//! * `kvlar-ledger --ptx 90a`: make the PTX that all code comes from (`tools/compiled`).
//! * `kvlar-ledger --path kvlar_attend_bf16_d128_n8 --archs 90a`: print the instructions that were counted.
//!
//! Needs `tools/cuda-toolchain` or a CUDA toolkit. What was compiled is kept in `target/ledger`.

mod compile;
mod ledger;
mod model;
mod pairs;
mod path;
mod sass;

use clap::Parser;
use compile::{BuildFlags, Compiler, Report, Toolchain, Unit};
use ledger::{Facts, Findings, Ledger};
use model::{Attend, LIMIT};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use std::{env, fs, thread};

/// Compiles all kernels and checks them against kernels/ledger/static.json.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Write the ledger instead of checking it.
    #[arg(long)]
    write: bool,
    /// Architectures, such as `80,90a` [default: those of a release].
    #[arg(long, value_delimiter = ',')]
    archs: Vec<String>,
    /// Compilers at a time [default: one a core].
    #[arg(short, long)]
    jobs: Option<usize>,
    /// Count the instructions of pairs of quantized formats anew, write `kernels/ledger/pairs.json`, and nothing else.
    #[arg(long, conflicts_with = "write")]
    pairs: bool,
    /// Print the fast paths of an attend kernel, or with --pairs that of a pair such as `int4, int4`, and nothing else.
    #[arg(long, value_name = "ENTRY", conflicts_with = "write")]
    path: Option<String>,
    /// Make the PTX that the units' code comes from, print its files, and nothing else. Units that ask for the architecture:
    /// for this one.
    #[arg(long, value_name = "ARCH", conflicts_with_all = ["write", "pairs", "path"])]
    ptx: Option<String>,
    /// With --ptx: with the lines of the source that instructions come from.
    #[arg(long, requires = "ptx")]
    lines: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is well.
fn run(args: &Args) -> Result<bool, String> {
    let start = Instant::now();
    let root = fs::canonicalize(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")).map_err(|e| e.to_string())?;
    let kernels = root.join("kernels");
    let tools = Toolchain::find(&root)?;
    let build = fs::read_to_string(kernels.join("build/cuda.rs")).map_err(|e| format!("kernels/build/cuda.rs: {e}"))?;
    let build = BuildFlags::parse(&build)?;
    let archs = if args.archs.is_empty() { build.archs.clone() } else { args.archs.clone() };
    let units = compile::units(&kernels)?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let cache = target.join("ledger");
    let compiler = Compiler { tools: &tools, build: &build, kernels: &kernels, cache: &cache };
    let jobs = args.jobs.or_else(|| thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);

    if let Some(arch) = &args.ptx {
        fs::create_dir_all(&cache).map_err(|e| format!("{}: {e}", cache.display()))?;
        let mut files = compile::in_parallel(&units, jobs, |u| Ok((u.name.clone(), compiler.shipped_ptx(u, arch, args.lines)?)))?;
        files.sort();
        files.iter().for_each(|(unit, file)| println!("{unit} {}", file.display()));
        return Ok(true);
    }
    if args.pairs {
        let show = |formats: &str, path: &[&sass::Instruction]| {
            if args.path.as_deref() == Some(formats) {
                path.iter().for_each(|i| println!("{:#06x} {} {}", i.address, i.opcode, i.operands));
            }
        };
        let pairs = pairs::measure(&tools, &build, &kernels, &cache, show)?;
        if args.path.is_some() {
            return Ok(true);
        }
        let text = serde_json::to_string_pretty(&pairs).map_err(|e| e.to_string())? + "\n";
        fs::write(kernels.join("ledger/pairs.json"), text).map_err(|e| format!("kernels/ledger/pairs.json: {e}"))?;
        print_pairs(&pairs);
        return Ok(true);
    }
    if let Some(entry) = &args.path {
        let units: Vec<Unit> = units.into_iter().filter(|u| u.entries.contains(entry)).collect();
        if units.is_empty() {
            return Err(format!("no kernel is called {entry}"));
        }
        let (paths, _) = compiler.each(&units, &archs, jobs, |_, arch, report| print_path(entry, arch, report))?;
        return paths.into_iter().collect::<Result<(), _>>().map(|()| true);
    }

    let (measured, compiled) = compiler.each(&units, &archs, jobs, measure)?;
    let mut found = Findings::default();
    let mut entries = Vec::new();
    for result in measured.into_iter().flatten() {
        match result {
            Ok(facts) => entries.push(facts),
            Err(e) => found.errors.push(e),
        }
    }
    found.errors.sort();
    let actual = Ledger::new(tools.compiler.clone(), entries);
    actual.entries.iter().for_each(|f| found.judge(f));

    let file = kernels.join("ledger/static.json");
    let committed = fs::read_to_string(&file).ok().map(|t| serde_json::from_str::<Ledger>(&t));
    let count = actual.entries.len();
    if args.write {
        let others: Vec<&String> = build.archs.iter().filter(|a| !archs.contains(a)).collect();
        write(&file, actual, committed.and_then(Result::ok), &others)?;
    } else {
        match committed {
            None => found.errors.push("kernels/ledger/static.json is missing: write it with --write".into()),
            Some(Err(e)) => found.errors.push(format!("kernels/ledger/static.json: {e}")),
            Some(Ok(committed)) => found.compare(&committed, &actual, &archs),
        }
    }
    match pairs::check(&tools, &build, &kernels) {
        Ok(pairs) => {
            let beyond = pairs.pairs.iter().filter(|p| p.issue_percent > LIMIT);
            found.notes.extend(beyond.map(|p| format!("{}: {} % of the floor to issue", p.formats, p.issue_percent)));
        }
        // Written by another option: a step of its own.
        Err(e) if args.write => found.notes.push(e),
        Err(e) => found.errors.push(e),
    }
    found.notes.iter().for_each(|n| println!("note: {n}"));
    found.errors.iter().for_each(|e| println!("error: {e}"));
    println!(
        "static ledger {}: {count} entries over {} architectures, {compiled} of {} units compiled, {} errors, {} notes, {:.0} s",
        if args.write { "written" } else { "checked" },
        archs.len(),
        units.len() * archs.len(),
        found.errors.len(),
        found.notes.len(),
        start.elapsed().as_secs_f64()
    );
    Ok(found.errors.is_empty())
}

fn print_pairs(pairs: &pairs::Pairs) {
    println!(
        "{:<32} {:>9} {:>10} {:>11} {:>9} {:>9} {:>7}",
        "keys, values", "registers", "tile", "per element", "floor us", "issue us", "%"
    );
    for p in &pairs.pairs {
        let tile = format!("{}/{}", p.tile, p.rows);
        println!(
            "{:<32} {:>9} {tile:>10} {:>11.2} {:>9.1} {:>9.1} {:>7.1}",
            p.formats, p.registers, p.per_element, p.floor, p.issue, p.issue_percent
        );
    }
}

/// The facts of a unit's entry points, or why there are none.
fn measure(unit: &Unit, arch: &str, report: &Report) -> Vec<Result<Facts, String>> {
    let (usages, spills) = (sass::usages(&report.usage), sass::spills(&report.assembler));
    let mut bodies = sass::functions(&report.sass);
    let one = |entry: &String| {
        let body = bodies.remove(entry).or_else(|| (!compile::has_loops(entry)).then(Vec::new));
        let (Some(&usage), Some(&spills), Some(body)) = (usages.get(entry), spills.get(entry), body) else {
            return Err(format!("{entry} sm_{arch}: not in the compiled unit"));
        };
        Facts::measure(entry, arch, usage, spills, body)
    };
    unit.entries.iter().map(one).collect()
}

/// Writes what was measured. Lines of a release's other architectures stay, unless another compiler made them.
fn write(file: &Path, actual: Ledger, committed: Option<Ledger>, others: &[&String]) -> Result<(), String> {
    let Ledger { compiler, mut entries } = actual;
    let kept = committed.into_iter().flat_map(|l| l.entries.into_iter().map(move |f| (l.compiler.clone(), f)));
    for (made_by, facts) in kept.filter(|(_, f)| others.contains(&&f.arch)) {
        if made_by != compiler {
            return Err(format!(
                "{} holds figures of {made_by} for sm_{}: write all architectures at once",
                file.display(),
                facts.arch
            ));
        }
        entries.push(facts);
    }
    let text = Ledger::new(compiler, entries).to_text().map_err(|e| e.to_string())?;
    fs::write(file, text).map_err(|e| format!("{}: {e}", file.display()))
}

fn print_path(entry: &str, arch: &str, report: &Report) -> Result<(), String> {
    let attend = Attend::of(entry).ok_or_else(|| format!("{entry} is no attend kernel"))??;
    let body = sass::functions(&report.sass).remove(entry).ok_or_else(|| format!("{entry}: not in the compiled unit"))?;
    let graph = path::Graph::new(body)?;
    let mut text = String::new();
    for (n, main) in graph.main_loops().iter().enumerate() {
        let path = graph.fast_path(main, attend.work()).unwrap_or_default();
        text += &format!("{entry} sm_{arch}, loop {n}: {} of {} instructions\n", path.len(), graph.size(main));
        let mut next = None;
        for i in path {
            if next.is_some_and(|n| n != i.address) {
                text += "        ...\n";
            }
            next = Some(i.address + 16);
            text += &format!("{:6x} {} {} {}\n", i.address, if i.guarded { "@" } else { " " }, i.opcode, i.operands);
        }
    }
    print!("{text}");
    Ok(())
}
