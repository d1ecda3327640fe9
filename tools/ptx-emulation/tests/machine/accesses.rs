//! Counts of shared and global accesses.

use crate::harness::{Machine, entry, run};
use kvlar_ptx_emulation::Style;
use std::fmt::Write as _;
use std::process::Command;

/// The instruction, the bytes between lanes, and cycles or sectors: what is needed, and what there is at least to it.
const PATTERNS: [(&str, u32, [u32; 2]); 10] = [
    ("ld.shared.u32 %r3", 4, [1, 1]),
    ("ld.shared.u32 %r3", 8, [2, 1]),
    ("ld.shared.u32 %r3", 128, [32, 1]),
    ("ld.shared.u32 %r3", 0, [1, 1]),
    ("ld.shared.u8 %r3", 1, [1, 1]),
    ("ld.shared.v4.u32 {%r3, %r4, %r5, %r6}", 16, [4, 4]),
    ("ld.shared.v4.u32 {%r3, %r4, %r5, %r6}", 128, [32, 4]),
    ("ld.global.u32 %r3", 4, [4, 4]),
    ("ld.global.u32 %r3", 64, [32, 4]),
    ("ld.global.v4.u32 {%r3, %r4, %r5, %r6}", 16, [16, 16]),
];

/// Has nothing to do but in the process that [`accesses_are_counted`] begins: counts are printed when a process ends.
#[test]
fn accesses_of_a_child() {
    if std::env::var_os("KVLAR_ACCESSES").is_none() {
        return;
    }
    let mut body = String::from("mov.u32 %r1, %tid.x; add.s64 %rd0, %rd0, 127; and.b64 %rd0, %rd0, -128;\n");
    for (i, (load, step, _)) in PATTERNS.iter().enumerate() {
        let _ = writeln!(body, ".loc 7 {} 1, function_name $L_f, inlined_at 1 {} 3", 900 + i, 100 + i);
        let _ = match load.contains("shared") {
            true => writeln!(body, "mul.lo.u32 %r2, %r1, {step}; add.u32 %r2, %r2, raw; {load}, [%r2];"),
            false => writeln!(body, "mul.wide.u32 %rd1, %r1, {step}; add.s64 %rd1, %rd1, %rd0; {load}, [%rd1];"),
        };
    }
    let files =
        ".file 1 \"/somewhere/kernels/made/up.cu\"\n.file 7 \"/elsewhere/cuda_fp16.hpp\"\n.section .debug_str\n{\n.b8 0\n}\n";
    let ptx = format!(".extern .shared .align 128 .b8 raw[];\n{}{files}", entry("patterns", &body));
    let machine = Machine::build(&ptx, Style::Accesses).expect("a compiler").unwrap();
    machine.launch_blocks("patterns", 2, 32, 32 * 128, 512).unwrap();
}

#[test]
fn accesses_are_counted() {
    if Machine::build("", Style::Plain).is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("accesses.tsv");
    let mut child = Command::new(std::env::current_exe().unwrap());
    run(child.args(["--exact", "accesses::accesses_of_a_child"]).env("KVLAR_ACCESSES", &path)).unwrap();
    let counts = std::fs::read_to_string(path).unwrap();
    for (i, (load, step, [needed, least])) in PATTERNS.iter().enumerate() {
        let (name, space) = (load.split(' ').next().unwrap(), if load.contains("shared") { "shared" } else { "global" });
        // One request in each of the two blocks.
        let expected = format!("{space}\tpatterns\tmade/up.cu:{}\t{name}\t2\t{}\t{}\n", 100 + i, 2 * needed, 2 * least);
        assert!(counts.contains(&expected), "{load}, {step} bytes apart: no {expected:?} in\n{counts}");
    }
}
