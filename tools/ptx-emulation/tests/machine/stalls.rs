//! The model of what threads wait for.

use crate::harness::{Machine, entry, run};
use crate::instructions::{CASES, program_of_cases};
use kvlar_ptx_emulation::Style;
use std::process::Command;

/// What an entry does, and between which cycles the last of its two warps ends, where a load takes 1000.
const CHAINS: [(&str, &str, [u64; 2]); 14] = [
    ("dependent", "st.global.u64 [%rd0], %rd0; ld.global.u64 %rd1, [%rd0]; ld.global.u64 %rd2, [%rd1]; ld.global.u64 %rd3, [%rd2]; add.s64 %rd4, %rd3, 1;", [3000, 3020]),
    (
        "independent",
        "ld.global.u64 %rd1, [%rd0]; ld.global.u64 %rd2, [%rd0+8]; ld.global.u64 %rd3, [%rd0+16]; add.s64 %rd4, %rd1, %rd2;
         add.s64 %rd5, %rd4, %rd3;",
        [1000, 1020],
    ),
    // What nothing uses, nothing waits for; a branch waits for its predicate, and what follows it comes later.
    ("unused", "ld.global.u64 %rd1, [%rd0];", [0, 20]),
    (
        "branch",
        "ld.global.u64 %rd1, [%rd0]; setp.eq.s64 %p1, %rd1, 0; @%p1 bra $L_end; ld.global.u64 %rd2, [%rd0]; add.s64 %rd3, %rd2, 1;
         $L_end:",
        [2000, 2030],
    ),
    ("not_taken", "setp.eq.s64 %p1, %rd0, 0; @%p1 ld.global.u64 %rd1, [%rd0]; add.s64 %rd2, %rd1, 1;", [0, 40]),
    // What is jumped over is arithmetic: predicates do, and the second load need not wait.
    (
        "predicated",
        "ld.global.u64 %rd1, [%rd0]; mov.u64 %rd2, 0; setp.eq.s64 %p1, %rd1, 0; @%p1 bra $L_next; add.s64 %rd2, %rd0, 1;
         $L_next: ld.global.u64 %rd3, [%rd0+8]; mov.u64 %rd4, 0; setp.eq.s64 %p2, %rd3, 0; @%p2 bra $L_end; add.s64 %rd4, %rd3, 1;
         $L_end: add.s64 %rd5, %rd2, %rd4;",
        [1000, 1030],
    ),
    // What is not done waits for the vote that says so.
    ("skipped", "setp.eq.s64 %p1, %rd0, 0; vote.sync.any.pred %p2, %p1, -1; @%p2 add.s64 %rd2, %rd0, 1;", [35, 45]),
    // The first warp is late, and then the second: a barrier waits for both, one after the other.
    (
        "barrier",
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @!%p1 bra $L_second; ld.global.u64 %rd1, [%rd0]; add.s64 %rd2, %rd1, 1;
         $L_second: bar.sync 0; @%p1 bra $L_first; ld.global.u64 %rd3, [%rd0]; add.s64 %rd4, %rd3, 1; $L_first: bar.sync 0;",
        [2000, 2120],
    ),
    // Without it they wait at the same time.
    (
        "no_barrier",
        "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @!%p1 bra $L_second; ld.global.u64 %rd1, [%rd0]; add.s64 %rd2, %rd1, 1;
         $L_second: @%p1 bra $L_first; ld.global.u64 %rd3, [%rd0]; add.s64 %rd4, %rd3, 1; $L_first: bar.sync 0;",
        [1000, 1120],
    ),
    // One lane loads, and all have it by a shuffle; or come after it by meeting it.
    (
        "shuffle",
        "mov.u32 %r1, %laneid; setp.ne.u32 %p1, %r1, 0; @%p1 bra $L_all; ld.global.u32 %r2, [%rd0];
         $L_all: shfl.sync.idx.b32 %r3|%p2, %r2, 0, 31, -1; @%p1 bra $L_other; bra $L_end;
         $L_other: add.s32 %r4, %r3, 1; cvt.s64.s32 %rd2, %r3; and.b64 %rd2, %rd2, 0; add.s64 %rd2, %rd2, %rd0;
         ld.global.u64 %rd3, [%rd2]; add.s64 %rd4, %rd3, 1; $L_end:",
        [2000, 2100],
    ),
    (
        "warp",
        "mov.u32 %r1, %laneid; setp.ne.u32 %p1, %r1, 0; @%p1 bra $L_all; ld.global.u32 %r2, [%rd0]; add.s32 %r3, %r2, 1;
         $L_all: bar.warp.sync -1; @!%p1 bra $L_end; ld.global.u32 %r4, [%rd0]; add.s32 %r5, %r4, 1; $L_end:",
        [2000, 2060],
    ),
    // The older of two groups may be waited for alone; it was not begun earlier by more than the shared load took.
    (
        "copies",
        "mov.u32 %r1, raw; cp.async.cg.shared.global [%r1], [%rd0], 16; cp.async.commit_group; ld.shared.u32 %r2, [%r1+16];
         and.b32 %r2, %r2, 0; add.s32 %r3, %r1, %r2; cp.async.cg.shared.global [%r3+16], [%rd0], 16; cp.async.commit_group;
         cp.async.wait_group 1; ld.shared.u32 %r4, [%r1]; add.s32 %r5, %r4, 1; cp.async.wait_group 0;",
        [1035, 1060],
    ),
    ("fence", "st.global.u64 [%rd0+24], 1; membar.gl; st.global.u64 [%rd0+24], 2;", [500, 520]),
    ("atomic", "atom.acq_rel.gpu.global.add.u32 %r1, [%rd0+24], 1; add.s32 %r2, %r1, 1;", [1000, 1020]),
];

/// Has nothing to do but in the process that [`stalls_follow_what_is_waited_for`] begins: they are printed when a process ends.
#[test]
fn stalls_of_a_child() {
    if std::env::var_os("KVLAR_STALLS").is_none() {
        return;
    }
    let located = |body: &str| format!(".loc 1 7 1\n{}", body.replacen(";", ";\n.loc 1 8 1\n", 1));
    let entries: String = CHAINS.iter().map(|(name, body, _)| entry(name, &located(body))).collect();
    let ptx = format!(
        ".extern .shared .align 128 .b8 raw[];\n.file 1 \"/somewhere/kernels/made/up.cu\"\n{entries}{}",
        program_of_cases()
    );
    let machine = Machine::build(&ptx, Style::Stalls).expect("a compiler").unwrap();
    for (name, ..) in CHAINS {
        machine.launch_blocks(name, 2, 64, 128, 4).unwrap();
    }
    // Results are what they are without clocks.
    let out = machine.launch("cases", 1, 0, CASES.len());
    for ((instruction, _, operands, expected), got) in CASES.iter().zip(out.unwrap()) {
        assert_eq!(got, *expected, "{instruction} {operands:?}: {got:#x}, not {expected:#x}");
    }
}

#[test]
fn stalls_follow_what_is_waited_for() {
    if Machine::build("", Style::Plain).is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stalls.tsv");
    let mut child = Command::new(std::env::current_exe().unwrap());
    run(child.args(["--exact", "stalls::stalls_of_a_child"]).env("KVLAR_STALLS", &path).env("KVLAR_STALLS_GLOBAL", "1000"))
        .unwrap();
    let all = std::fs::read_to_string(path).unwrap();
    for (name, body, [least, most]) in CHAINS {
        let line = all
            .lines()
            .find_map(|l| l.strip_prefix(&format!("entry\t{name}\t")))
            .unwrap_or_else(|| panic!("no {name} in\n{all}"));
        let [launches, ctas, sum, longest] = line.split('\t').map(|n| n.parse::<u64>().unwrap()).collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        assert_eq!([launches, ctas, sum], [1, 2, 2 * longest], "{name}: {line}");
        assert!((least..=most).contains(&longest), "{name}: {longest} cycles, not {least} to {most}\n{body}\n{all}");
    }
    // Who waits, and for what, by lines.
    let waits = "wait\tindependent\tmade/up.cu:8\tadd.s64\tmade/up.cu:8\tld.global.u64\t2\t";
    assert!(all.contains(waits), "no {waits:?} in\n{all}");
    // In both CTAs half of the threads wait at each of the barriers.
    let others = all.lines().find_map(|l| l.strip_prefix("others\tbarrier\tmade/up.cu:8\tbar.sync\t")).expect(&all);
    assert!((1900..=2200).contains(&others.parse::<u64>().unwrap()), "{others} cycles in\n{all}");
}
