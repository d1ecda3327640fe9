//! The emulation of PTX.

mod accesses;
mod harness;
mod instructions;
mod stalls;

use harness::{HEADER, Machine, entry};
use kvlar_ptx_emulation::{Style, translate};
use std::fmt::Write as _;

#[test]
fn lanes_exchange_values() {
    // Each lane: its number shuffled five ways, with and without segments of 8; a vote; what it finds in a register pair.
    let ways = [
        ("shfl.sync.up.b32 %r3|%p1, %r1, 3, 0, -1;", (|l| if l < 3 { l } else { l - 3 }) as fn(u64) -> u64),
        ("shfl.sync.down.b32 %r3|%p1, %r1, 3, 31, -1;", |l| if l + 3 > 31 { l } else { l + 3 }),
        ("shfl.sync.bfly.b32 %r3|%p1, %r1, 5, 31, -1;", |l| l ^ 5),
        ("shfl.sync.idx.b32 %r3|%p1, %r1, 37, 31, -1;", |_| 5),
        ("shfl.sync.up.b32 %r3|%p1, %r1, 3, 0x1800, -1;", |l| if l % 8 < 3 { l } else { l - 3 }),
        ("shfl.sync.down.b32 %r3|%p1, %r1, 3, 0x181f, -1;", |l| if l % 8 + 3 > 7 { l } else { l + 3 }),
        ("shfl.sync.idx.b32 %r3|%p1, %r1, 5, 0x181f, -1;", |l| l / 8 * 8 + 5),
        ("setp.gt.u32 %p2, %r1, 29; vote.sync.ballot.b32 %r3, %p2, -1;", |_| 0xc000_0000),
        ("setp.gt.u32 %p2, %r1, 29; vote.sync.any.pred %p3, %p2, -1; selp.u32 %r3, 1, 0, %p3;", |_| 1),
        ("setp.gt.u32 %p2, %r1, 29; vote.sync.all.pred %p3, %p2, -1; selp.u32 %r3, 1, 0, %p3;", |_| 0),
        ("redux.sync.add.u32 %r3, %r1, -1;", |_| 31 * 16),
        ("shr.u32 %r4, %r1, 4; match.any.sync.b32 %r3, %r4, -1;", |l| if l < 16 { 0xffff } else { 0xffff_0000 }),
    ];
    let mut body = String::from("mov.u32 %r1, %tid.x; mul.wide.u32 %rd1, %r1, 8; add.s64 %rd1, %rd0, %rd1;\n");
    for (i, (way, _)) in ways.iter().enumerate() {
        let _ = writeln!(body, "{way} cvt.u64.u32 %rd2, %r3; st.global.u64 [%rd1+{}], %rd2;", 256 * i);
    }
    for style in [Style::Calls, Style::Plain] {
        let Some(machine) = Machine::build(&entry("lanes", &body), style) else { return };
        let out = machine.unwrap().launch("lanes", 32, 0, 32 * ways.len()).unwrap();
        for (i, (way, expected)) in ways.iter().enumerate() {
            for lane in 0..32 {
                assert_eq!(out[32 * i + lane], expected(lane as u64), "{way} lane {lane}");
            }
        }
    }
}

#[test]
fn memory_branches_and_scopes() {
    // Two variables of shared memory and the dynamic part behind them; a loop; a scope with registers of its own; a guard.
    let body = "
        mov.u32 %r1, wide; st.shared.v2.u32 [%r1+8], {7, 8}; st.shared.u8 [narrow], 5;
        mov.u32 %r2, raw; mov.u32 %r3, 0;
        $L__loop:
        mul.lo.s32 %r4, %r3, 4; add.s32 %r5, %r2, %r4; st.shared.u32 [%r5], %r3;
        add.s32 %r3, %r3, 1; setp.lt.s32 %p1, %r3, 4; @%p1 bra $L__loop;
        ld.shared.v4.u32 {%r6, %r7, %r8, %r9}, [raw];
        { .reg .b32 %r6; mov.u32 %r6, 99; }
        add.s32 %r10, %r6, %r7; add.s32 %r10, %r10, %r8; add.s32 %r10, %r10, %r9;
        ld.shared.v2.u32 {%r11, %r12}, [wide+8]; ld.shared.u8 %rs1, [narrow]; cvt.u32.u16 %r13, %rs1;
        add.s32 %r10, %r10, %r11; add.s32 %r10, %r10, %r12; add.s32 %r10, %r10, %r13;
        @!%p1 add.s32 %r10, %r10, 1000; @%p1 add.s32 %r10, %r10, 5000;
        cvt.u64.u32 %rd1, %r10; st.global.u64 [%rd0], %rd1;
        mov.u32 %r20, 0x11223344; mov.b32 {%rs2, %rs3}, %r20; mov.b32 %r21, {%rs3, %rs2};
        mov.b64 %rd3, {%r20, %r21}; st.global.u64 [%rd0+8], %rd3;
        cvt.u64.u32 %rd4, %r2; cvta.shared.u64 %rd5, %rd4; ld.u32 %r22, [%rd5+12]; cvt.u64.u32 %rd6, %r22; st.global.u64 [%rd0+16], %rd6;
    ";
    let shared = ".shared .align 1 .u8 narrow;\n.shared .align 8 .b8 wide[16];\n.extern .shared .align 128 .b8 raw[];\n";
    let ptx = format!("{shared}{}", entry("memory", body));
    for style in [Style::Calls, Style::Plain] {
        let Some(machine) = Machine::build(&ptx, style) else { return };
        let machine = machine.unwrap();
        let out = machine.launch("memory", 1, 16, 3).unwrap();
        assert_eq!(out, [6 + 15 + 5 + 1000, 0x3344_1122_1122_3344, 3]);
        let error = machine.launch("memory", 1, 12, 3).unwrap_err();
        assert!(error.contains("4 bytes of shared memory at 140 of 140"), "{error}");
    }
}

#[test]
fn what_a_gpu_would_not_do_is_an_error() {
    let wrong = [
        ("mov.u32 %r1, 1026; st.shared.u32 [%r1], 1;", "misaligned address of shared memory"),
        ("add.s64 %rd1, %rd0, 8; ld.global.v2.u64 {%rd2, %rd3}, [%rd1];", "misaligned address: 16 bytes"),
        ("mov.u32 %r1, 0; ld.shared.u32 %r2, [%r1];", "4 bytes of shared memory at -1024 of 64"),
        ("st.global.u32 [%rd0+8], 1; ld.global.nc.u8 %r1, [%rd0+11];", "ld.global.nc of what the launch itself has written"),
        ("mov.u32 %r1, %tid.x; shfl.sync.idx.b32 %r3|%p1, %r1, 0, 31, 1; setp.eq.s32 %p2, %r1, 1;", "not in its own mask"),
    ];
    let entries: Vec<_> = wrong.iter().enumerate().map(|(i, (body, _))| entry(&format!("wrong{i}"), body)).collect();
    let Some(machine) = Machine::build(&entries.concat(), Style::Plain) else { return };
    let machine = machine.unwrap();
    for (i, (body, expected)) in wrong.iter().enumerate() {
        let error = machine.launch(&format!("wrong{i}"), 2, 64, 4).expect_err(body);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn caches_do_not_follow_other_ctas() {
    // A CTA writes its own word, and reads that of the one before it.
    let reading = |how: &str| {
        format!(
            "mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd1, %r1, 8; add.s64 %rd1, %rd0, %rd1; setp.eq.s32 %p1, %r1, 0; @%p1 bra $L_first;\n\
             {how}.u32 %r2, [%rd1+-8];\n$L_first:\nst.global.u32 [%rd1], %r1;\n"
        )
    };
    let ways = ["ld.global", "ld.global.nc", "ld", "ld.global.cg"];
    let entries: Vec<_> = ways.iter().enumerate().map(|(i, how)| entry(&format!("way{i}"), &reading(how))).collect();
    let Some(machine) = Machine::build(&entries.concat(), Style::Plain) else { return };
    let machine = machine.unwrap();
    let error = |i: usize| machine.launch_blocks(&format!("way{i}"), 2, 1, 0, 2).err().unwrap_or_default();
    assert!(error(0).contains("a load by L1 of what another CTA of the launch has written"), "{}", error(0));
    assert!(error(1).contains("ld.global.nc of what the launch itself has written"), "{}", error(1));
    assert!(error(2).contains("a load by L1"), "{}", error(2));
    assert_eq!(error(3), "");
    // What an earlier launch wrote is there for all.
    let once = |i: usize| machine.launch_blocks(&format!("way{i}"), 1, 1, 0, 2).err().unwrap_or_default();
    assert_eq!([once(0), once(1)], ["", ""]);
}

#[test]
fn what_is_not_understood_is_an_error() {
    let of = |ptx: &str| translate(&format!("{HEADER}{ptx}"), Style::Plain).unwrap_err();
    assert!(of(".visible .func f()\n{\nret;\n}\n").contains("no entry"));
    assert!(of(".global .b32 counter;\n").contains(".global .b32 counter"));
    assert!(of(&entry("e", "mov.u32 %r1, %r2000;\n")).contains("r2000 is neither register nor variable"));
    assert!(of(&entry("e", "mov.u32 %r1, elsewhere;\n")).contains("elsewhere"));
    assert!(of(&entry("e", "ld.global.u32 %r1, [%f1];\n")).contains("f1 holds no address"));
    assert!(of(&entry("e", "mov.u32 %r1, ;;\nmov").replace("ret;\n}", "")).contains("line"));
    // An instruction that is not there is one that does not compile.
    let Some(machine) = Machine::build(&entry("e", "ex3.approx.f32 %f1, %f2;\n"), Style::Plain) else { return };
    assert!(machine.err().unwrap().contains("ex3_approx"));
}
