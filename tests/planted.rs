//! The suites can fail: bugs planted into the kernels' sources, one at a time, are each found.
//!
//! A copy of `kernels/` gets one change, is compiled into a shared library, and runs a short form of the suites. The
//! unchanged copy must pass the same. Each runs in a process of its own, since a bug may write where it should not. What
//! no emulation can show is a missing fence: that needs a GPU.

use kvlar::{Codec, Device, Dtype, Emulation, MergeShape, RopeLayout, Schedule, SimtOptions};
use kvlar_reference::testing::Rng;
use kvlar_reference::tolerance::Tolerance;
use kvlar_reference::{Rope, RopeScaling, compare};
use kvlar_tests::Lab;
use kvlar_tests::append::AppendCase;
use kvlar_tests::attend::{AttendCase, AttendData, AttendRun, SegmentCase, check};
use kvlar_tests::pages::Layout;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

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

const BUGS: &[Bug] = &[
    bug(
        "dropped barrier before the rings become scratch",
        "attend/attend.cuh",
        "__syncthreads();  // all rings are drained",
        "// all rings are drained",
    ),
    bug(
        "dropped barrier after the unit is loaded",
        "attend/attend.cuh",
        "load_shared(unit);\n      __syncthreads();",
        "load_shared(unit);",
    ),
    bug(
        "wrong GQA map",
        "attend/warp.cuh",
        "head = shared.unit.head * int(p.group) + i % int(p.group);",
        "head = i % int(p.group) * int(p.kv_heads) + shared.unit.head;",
    ),
    bug(
        "swapped RoPE halves",
        "device/rope.cuh",
        "second ? __fmul_rn(partner, sin) : -__fmul_rn(partner, sin)",
        "second ? -__fmul_rn(partner, sin) : __fmul_rn(partner, sin)",
    ),
    bug("interleaved pairs taken as halves", "device/rope.cuh", ": i ^ 1];", ": (i < half ? i + half : i - half)];"),
    bug("off-by-one page", "attend/warp.cuh", "table, rows.row + 16 * b) : 0;", "table, max(0, rows.row + 16 * b - 1)) : 0;"),
    bug(
        "rows of a page not wrapped",
        "append/append.cu",
        "slot & ((1 << p.rows.page_rows_log2) - 1)",
        "slot & ((2 << p.rows.page_rows_log2) - 1)",
    ),
    bug("missing rescale of the output", "attend/warp.cuh", "state.o[i][n][e] *= factor;", ""),
    bug("missing rescale of the sum", "attend/warp.cuh", "state.sum[n][e] *= factor;", ""),
    bug(
        "splits merged with another split's state",
        "attend/attend.cuh",
        "const float2 state = __ldcg(reinterpret_cast<const float2*>(partial_state(slot, column)));",
        "const float2 state = __ldcg(reinterpret_cast<const float2*>(partial_state(slot_of_split(share, share.splits - 1 - s), column)));",
    ),
    bug("partial results share a slot", "attend/work_list.cuh", "(first_cell(cells, ctas, first) < unit_start ? 1 : 0)", "0"),
    bug("counter not left at zero", "device/ptx.cuh", "if (last) st_release(counter, 0);", ""),
    bug("lse in the wrong base", "attend/attend.cuh", "(top + __log2f(sum)) * kLn2", "top * kLn2 + __log2f(sum)"),
    bug("window off by one", "attend/warp.cuh", "query - position >= p.window)", "query - position > p.window)"),
    bug("causal mask off by one", "attend/warp.cuh", "position > query ||", "position >= query ||"),
    bug("one row too many", "attend/warp.cuh", "return r >= valid ||", "return r > valid ||"),
    bug(
        "a stage is read before it landed",
        "attend/warp.cuh",
        "ptx::cp_async_wait<kStages - 2>();",
        "ptx::cp_async_wait<kStages - 1>();",
    ),
    bug("a stage is overwritten while it is read", "attend/warp.cuh", "stage == 0 ? kStages - 1 : stage - 1", "stage"),
    bug("int8 zeros of keys forgotten", "attend/warp.cuh", "fmaf(k.x, x, k.y * q8_sum[n][e])", "(k.x * x)"),
    bug(
        "int8 zeros of values forgotten",
        "attend/warp.cuh",
        "state.zero[n][e] = fmaf(w[e], value_zero[b][h], state.zero[n][e]);",
        "",
    ),
    bug(
        "int8 codes truncated",
        "device/row_codec.cuh",
        "rintf(__fdiv_rn(__fsub_rn(x, a.zero), a.scale))",
        "truncf(__fdiv_rn(__fsub_rn(x, a.zero), a.scale))",
    ),
    bug(
        "sink logit in the wrong base",
        "attend/attend.cuh",
        "__ldg(p.sink_logits + head) * kLog2E",
        "__ldg(p.sink_logits + head)",
    ),
    bug(
        "soft-cap not returned to base 2",
        "attend/warp.cuh",
        "soft_cap(s[b][n][e], p.softcap) * kLog2E",
        "soft_cap(s[b][n][e], p.softcap)",
    ),
    bug(
        "tile bound ignores the window's lower end",
        "attend/unit.cuh",
        "u.lowest_query - p.window + 1",
        "u.highest_query - p.window + 1",
    ),
    bug("skipped slots are written", "append/append.cu", "if (slot < 0) return;", "if (slot < -2) return;"),
    bug(
        "dropped warp barrier between rotation and rows",
        "append/append.cu",
        "own[kLaneDims * lane + i] = x[i];\n    __syncwarp();",
        "own[kLaneDims * lane + i] = x[i];",
    ),
    bug("merge keeps vanished parts", "merge/merge.cu", "if (lse == -INFINITY) continue;", ""),
];

fn kernels() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../kernels")
}

/// What the short suites need, in one translation unit.
const SOURCE: &str = r#"
#include "attend/attend.cuh"
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d64_n8, 64, 1, __nv_bfloat16, false)
GPU_EXPORT(kvlar_attend_bf16_d64_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_int8_d64_n8, 64, 1, __nv_bfloat16, true)
GPU_EXPORT(kvlar_attend_bf16_int8_d64_n8)
#include "attend/schedule.cu"
#include "append/append.cu"
#include "encode/encode.cu"
#include "merge/merge.cu"
"#;

/// Compiler and flags of the emulation; `None` without a C++ compiler.
fn compiler() -> Option<Command> {
    let name = std::env::var("CXX").unwrap_or("c++".into());
    Command::new(&name).arg("--version").output().ok().filter(|r| r.status.success())?;
    let mut c = Command::new(name);
    c.args(["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-pthread", "-DKVLAR_SIMT", "-x", "c++"]);
    if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("f16c") {
        c.arg("-march=x86-64-v3");
    }
    Some(c)
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

/// The emulation of the sources with one bug, or none.
fn build(dir: &Path, runtime: &[PathBuf], bug: Option<&Bug>) -> PathBuf {
    let tree = dir.join("kernels");
    copy_tree(&kernels(), &tree);
    if let Some(b) = bug {
        let path = tree.join(b.file);
        let text = std::fs::read_to_string(&path).expect(b.file);
        assert_eq!(text.matches(b.from).count(), 1, "{}: {:?} is not there once: adapt the bug to the source", b.name, b.from);
        std::fs::write(&path, text.replace(b.from, b.to)).expect("a file");
    }
    let (source, object, library) = (dir.join("short.cu"), dir.join("short.o"), dir.join("libshort.so"));
    std::fs::write(&source, SOURCE).expect("a file");
    // Without warnings as errors: a bug may leave something unused.
    run(compiler().expect("a compiler").arg("-w").arg("-I").arg(&tree).arg("-c").arg(&source).arg("-o").arg(&object));
    let name = std::env::var("CXX").unwrap_or("c++".into());
    run(Command::new(name).args(["-shared", "-Wl,-Bsymbolic", "-pthread", "-o"]).arg(&library).arg(&object).args(runtime));
    library
}

type LaunchFn = unsafe extern "C" fn(*const c_void, *const u32, *const u32, u32, *const c_void, u32, u64, u32) -> c_int;

fn load(path: &Path) -> Emulation {
    // SAFETY: the library was just built from our sources; it has no initializers of note.
    let library = unsafe { Library::new(path) }.expect("a library");
    Arc::new(move |entry, grid, block, shared_bytes, params, seed, workers| {
        // SAFETY: a static of that name and type in our library, where it exists.
        let kernel = unsafe { library.get::<*const c_void>(format!("kvlar_simt_kernel_{entry}\0").as_bytes()) };
        let kernel = kernel.map_err(|_| format!("{entry} is not in the short build"))?;
        // SAFETY: a function of the emulation's interface.
        let launch = unsafe { library.get::<LaunchFn>(b"kvlar_simt_launch\0") }.map_err(|e| e.to_string())?;
        // SAFETY: as above.
        let error = unsafe { library.get::<unsafe extern "C" fn() -> *const c_char>(b"kvlar_simt_last_error\0") }
            .map_err(|e| e.to_string())?;
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut aligned)[..params.len()].copy_from_slice(params);
        // SAFETY: the parameters are what the launcher checked. A planted bug may still reach out of bounds, which is why
        // this process has nothing else to do.
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

/// A short form of the suites, within what [`SOURCE`] holds.
fn short_suites(lab: &Lab) {
    let base = |lengths: &[usize]| AttendCase::new(Dtype::Bf16, (4, 2), 64, lengths);
    let cases = [
        base(&[37, 5, 64]),
        base(&[70, 129]).with(|c| (c.q_heads, c.kv_heads) = (6, 3)),
        base(&[85, 33]).with(|c| (c.query_rows, c.window) = (3, 20)),
        base(&[60, 100]).with(|c| {
            (c.window, c.query_rows, c.q_positions) = (7, 2, true);
            (c.segments[0].positions, c.segments[0].layout) = (true, Layout::PerHead(16));
        }),
        base(&[500, 20, 0]).with(|c| c.sinks = true),
        base(&[3000]).with(|c| (c.q_size, c.query_rows) = (40.0, 3)),
        base(&[50, 30]).with(|c| c.softcap = 5.0),
        base(&[300, 120]).with(|c| c.segments[0].codec = Codec::Int8),
        base(&[400, 90]).with(|c| c.schedule = Schedule::Own).with(|c| c.segments[0].capacity = 700),
        base(&[0, 0]).with(|c| {
            let segment = |codec, layout, lengths: [usize; 2]| SegmentCase {
                codec,
                layout,
                capacity: 96,
                lengths: lengths.to_vec(),
                positions: false,
            };
            c.segments = vec![
                segment(Codec::Bf16, Layout::Contiguous, [4, 4]),
                segment(Codec::Int8, Layout::Hnd(32), [90, 33]),
                segment(Codec::Bf16, Layout::Nhd(16), [17, 1]),
            ];
        }),
    ];
    for case in &cases {
        check(lab, case).unwrap_or_else(|e| panic!("{e}"));
    }
    // Twice through one workspace: counters must be as they were.
    let data = AttendData::new(&base(&[600, 50]));
    let mut run = AttendRun::new(lab, &data);
    run.enqueue();
    let first = run.result();
    run.poison();
    run.enqueue();
    assert_eq!(first, run.result(), "two runs differ");
    for codec in [Codec::Bf16, Codec::Int8] {
        AppendCase { slots: Some(vec![39, -1, 0, 17, 16, -1, -1, 31, 32, 3]), ..AppendCase::new(Dtype::Bf16, codec, 64) }
            .check(lab);
        let rope = Rope::new(10000.0, 48, RopeLayout::Interleaved, RopeScaling::None);
        AppendCase { rope, ..AppendCase::new(Dtype::F16, codec, 64) }.check(lab);
    }
    let (n, rows, dim) = (3, 2, 64);
    let mut rng = Rng::new(2);
    let mut parts = rng.normals(n * rows * dim, 1.0);
    let mut lse = rng.normals(n * rows, 3.0);
    lse[2] = f32::NEG_INFINITY;
    parts[2 * dim..3 * dim].fill(f32::NAN);
    let (p, l) = (lab.upload(&parts), lab.upload(&lse));
    let (mut out, mut merged) = (lab.poisoned(4 * rows * dim), lab.poisoned(4 * rows));
    let plan = MergeShape { parts: n, rows, dim }.plan(&lab.device).expect("a plan");
    plan.launch(&lab.stream, p.view(), l.view(), &mut out.view_mut(), &mut merged.view_mut()).expect("merge");
    let expected = kvlar_reference::merge(&parts, &lse, n, rows, dim).expect("a case");
    compare::compare(&lab.download::<f32>(&out), &expected.0, Tolerance::merge()).unwrap_or_else(|e| panic!("{e}"));
}

/// Names the library that [`short_suites_of_a_library`] runs; unset, it has nothing to do.
const LIBRARY: &str = "KVLAR_PLANTED_LIBRARY";

/// The child process: the short suites under several thread schedules.
#[test]
fn short_suites_of_a_library() {
    let Some(library) = std::env::var_os(LIBRARY) else { return };
    let emulation = load(Path::new(&library));
    for seed in 0..5 {
        let options = SimtOptions { seed, workers: 1, sm_count: 3 };
        // SAFETY: a short build behaves as the linked one, but for its bug, and this process is its own.
        short_suites(&Lab::new(unsafe { Device::simt_through(options, emulation.clone()) }));
    }
}

/// Whether the short suites fail on a library.
fn found(library: &Path) -> bool {
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    let output = child.args(["--exact", "short_suites_of_a_library"]).env(LIBRARY, library).output().expect("a process");
    !output.status.success()
}

#[test]
fn planted_bugs_are_found() {
    if compiler().is_none() || !kvlar_kernels::simt::available() {
        eprintln!("skipped: no C++ compiler or no emulation");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let runtime: Vec<PathBuf> = ["runtime", "collectives", "mbarrier"].map(|name| dir.path().join(format!("{name}.o"))).to_vec();
    for object in &runtime {
        let source = kernels().join("simt").join(object.with_extension("cpp").file_name().expect("a name"));
        run(compiler().expect("a compiler").arg("-O2").arg("-I").arg(kernels()).arg("-c").arg(source).arg("-o").arg(object));
    }
    let sound = build(&dir.path().join("sound"), &runtime, None);
    assert!(!found(&sound), "the unchanged kernels fail the short suites");
    let next = std::sync::Mutex::new(BUGS.iter().enumerate());
    let missed = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let Some((i, bug)) = next.lock().expect("a lock").next() else { break };
                    if !found(&build(&dir.path().join(i.to_string()), &runtime, Some(bug))) {
                        missed.lock().expect("a lock").push(bug.name);
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().expect("a lock");
    println!("{} planted bugs, {} found", BUGS.len(), BUGS.len() - missed.len());
    assert!(missed.is_empty(), "not found: {missed:?}");
}
