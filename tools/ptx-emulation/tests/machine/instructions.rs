//! Instructions, one at a time, against what "PTX ISA" says of them: by calls and spelled out.

use crate::harness::{Machine, entry};
use kvlar_ptx_emulation::Style;
use std::fmt::Write as _;

/// An instruction, the type of its destination, its operands as they stand in PTX with their types, and the bits that come of it.
pub type Case = (&'static str, &'static str, &'static [(&'static str, &'static str)], u64);

const ONE: (&str, &str) = ("f32", "0f3F800000");
const TWO: (&str, &str) = ("f32", "0f40000000");
const NAN: (&str, &str) = ("f32", "0fFFC01234");
const CANONICAL: u64 = 0x7fff_ffff;

pub const CASES: &[Case] = &[
    // Integers: section 9.7.1
    ("add.s32", "b32", &[("b32", "2147483647"), ("b32", "1")], 0x8000_0000),
    ("add.s64", "b64", &[("b64", "-1"), ("b64", "2")], 1),
    ("sub.s32", "b32", &[("b32", "0"), ("b32", "1")], 0xffff_ffff),
    ("sub.s64", "b64", &[("b64", "0"), ("b64", "1")], u64::MAX),
    ("mul.lo.s32", "b32", &[("b32", "65537"), ("b32", "65537")], 0x0002_0001),
    ("mul.lo.s64", "b64", &[("b64", "4294967297"), ("b64", "4294967297")], 0x2_0000_0001),
    ("mul.hi.s32", "b32", &[("b32", "-2"), ("b32", "3")], 0xffff_ffff),
    ("mul.hi.u32", "b32", &[("b32", "-2"), ("b32", "3")], 2),
    ("mul.wide.s32", "b64", &[("b32", "-2"), ("b32", "3")], -6i64 as u64),
    ("mul.wide.u32", "b64", &[("b32", "-2"), ("b32", "3")], 3 * 0xffff_fffe),
    ("mad.lo.s32", "b32", &[("b32", "-3"), ("b32", "5"), ("b32", "7")], -8i32 as u32 as u64),
    ("div.s32", "b32", &[("b32", "-7"), ("b32", "2")], -3i32 as u32 as u64),
    ("div.u32", "b32", &[("b32", "-7"), ("b32", "2")], 0xffff_fff9 / 2),
    ("div.s32", "b32", &[("b32", "-2147483648"), ("b32", "-1")], 0x8000_0000),
    ("rem.s32", "b32", &[("b32", "-7"), ("b32", "2")], 0xffff_ffff),
    ("rem.u64", "b64", &[("b64", "-7"), ("b64", "10")], (u64::MAX - 6) % 10),
    ("min.s32", "b32", &[("b32", "-1"), ("b32", "1")], 0xffff_ffff),
    ("min.u32", "b32", &[("b32", "-1"), ("b32", "1")], 1),
    ("max.s32", "b32", &[("b32", "-1"), ("b32", "1")], 1),
    ("max.u32", "b32", &[("b32", "-1"), ("b32", "1")], 0xffff_ffff),
    ("neg.s32", "b32", &[("b32", "5")], -5i32 as u32 as u64),
    ("abs.s32", "b32", &[("b32", "-5")], 5),
    ("popc.b32", "b32", &[("b32", "-1")], 32),
    ("clz.b32", "b32", &[("b32", "1")], 31),
    ("clz.b32", "b32", &[("b32", "0")], 32),
    ("brev.b32", "b32", &[("b32", "1")], 0x8000_0000),
    ("bfind.shiftamt.u32", "b32", &[("b32", "256")], 23),
    ("bfind.shiftamt.u32", "b32", &[("b32", "0")], 0xffff_ffff),
    ("bfi.b32", "b32", &[("b32", "0x1f"), ("b32", "0"), ("b32", "4"), ("b32", "4")], 0xf0),
    ("bfi.b32", "b32", &[("b32", "3"), ("b32", "0"), ("b32", "1"), ("b32", "31")], 6),
    ("bfi.b64", "b64", &[("b64", "1"), ("b64", "2"), ("b32", "32"), ("b32", "32")], 0x1_0000_0002),
    ("dp4a.s32.s32", "b32", &[("b32", "0x01ff02fe"), ("b32", "0x03030303"), ("b32", "10")], 10),
    ("dp4a.u32.u32", "b32", &[("b32", "0x01ff02fe"), ("b32", "0x03030303"), ("b32", "10")], 10 + 3 * (1 + 255 + 2 + 254)),
    // Bits: 9.7.8
    ("and.b32", "b32", &[("b32", "12"), ("b32", "10")], 8),
    ("or.b64", "b64", &[("b64", "12"), ("b64", "10")], 14),
    ("xor.b32", "b32", &[("b32", "12"), ("b32", "10")], 6),
    ("not.b32", "b32", &[("b32", "12")], !12u32 as u64),
    ("and.b16", "b16", &[("b16", "258"), ("b16", "255")], 2),
    ("shl.b32", "b32", &[("b32", "3"), ("b32", "31")], 0x8000_0000),
    ("shl.b32", "b32", &[("b32", "3"), ("b32", "32")], 0),
    ("shl.b64", "b64", &[("b64", "3"), ("b32", "33")], 3 << 33),
    ("shr.u32", "b32", &[("b32", "-1"), ("b32", "31")], 1),
    ("shr.s32", "b32", &[("b32", "-8"), ("b32", "1")], -4i32 as u32 as u64),
    ("shr.s32", "b32", &[("b32", "-8"), ("b32", "99")], 0xffff_ffff),
    ("shr.u64", "b64", &[("b64", "-1"), ("b32", "64")], 0),
    ("shf.l.wrap.b32", "b32", &[("b32", "0x80000000"), ("b32", "1"), ("b32", "33")], 3),
    ("shf.r.wrap.b32", "b32", &[("b32", "0x80000000"), ("b32", "1"), ("b32", "1")], 0xc000_0000),
    ("lop3.b32", "b32", &[("b32", "0xff00ff00"), ("b32", "0xf0f0f0f0"), ("b32", "0xcccccccc"), ("n", "0xf0")], 0xff00_ff00),
    ("lop3.b32", "b32", &[("b32", "0xff00ff00"), ("b32", "0xf0f0f0f0"), ("b32", "0xcccccccc"), ("n", "0xcc")], 0xf0f0_f0f0),
    ("lop3.b32", "b32", &[("b32", "0xff00ff00"), ("b32", "0xf0f0f0f0"), ("b32", "0xcccccccc"), ("n", "0xea")], 0xfccc_fccc),
    ("prmt.b32", "b32", &[("b32", "0x33221100"), ("b32", "0x77665544"), ("b32", "0x7214")], 0x7722_1144),
    ("prmt.b32", "b32", &[("b32", "0x33228100"), ("b32", "0x77665544"), ("b32", "0x8190")], 0x0081_0000 | 0xff00),
    // Comparison and selection: 9.7.6
    ("setp.lt.s32", "pred", &[("b32", "-1"), ("b32", "1")], 1),
    ("setp.lt.u32", "pred", &[("b32", "-1"), ("b32", "1")], 0),
    ("setp.ge.s64", "pred", &[("b64", "-1"), ("b64", "-1")], 1),
    ("setp.ne.s16", "pred", &[("b16", "3"), ("b16", "4")], 1),
    ("setp.eq.f32", "pred", &[NAN, NAN], 0),
    ("setp.neu.f32", "pred", &[NAN, NAN], 1),
    ("setp.lt.f32", "pred", &[ONE, TWO], 1),
    ("setp.ltu.f32", "pred", &[NAN, TWO], 1),
    ("setp.leu.f32", "pred", &[TWO, ONE], 0),
    ("setp.gtu.f32", "pred", &[ONE, NAN], 1),
    ("setp.geu.f32", "pred", &[ONE, TWO], 0),
    ("setp.gt.f32", "pred", &[NAN, ONE], 0),
    ("setp.num.f32", "pred", &[ONE, TWO], 1),
    ("setp.nan.f32", "pred", &[ONE, NAN], 1),
    ("selp.b32", "b32", &[("b32", "5"), ("b32", "6"), ("pred", "1")], 5),
    ("selp.b32", "b32", &[("b32", "5"), ("b32", "6"), ("pred", "0")], 6),
    ("not.pred", "pred", &[("pred", "0")], 1),
    ("xor.pred", "pred", &[("pred", "1"), ("pred", "1")], 0),
    // Floats: 9.7.3
    ("add.f32", "f32", &[ONE, TWO], 0x4040_0000),
    ("add.f32", "f32", &[("f32", "0f7F800000"), ("f32", "0fFF800000")], CANONICAL),
    ("sub.f32", "f32", &[ONE, NAN], CANONICAL),
    ("mul.f32", "f32", &[TWO, TWO], 0x4080_0000),
    ("mul.f32", "f32", &[("f32", "0f00000000"), ("f32", "0f7F800000")], CANONICAL),
    // (1 + 2^-12)^2 - (1 + 2^-11) is 2^-24 where the product is not rounded, and nothing where it is.
    ("fma.rn.f32", "f32", &[("f32", "0f3F800800"), ("f32", "0f3F800800"), ("f32", "0fBF801000")], 0x3380_0000),
    ("min.f32", "f32", &[NAN, ONE], 0x3f80_0000),
    ("max.f32", "f32", &[ONE, NAN], 0x3f80_0000),
    ("max.f32", "f32", &[NAN, NAN], CANONICAL),
    ("min.f32", "f32", &[("f32", "0f00000000"), ("f32", "0f80000000")], 0x8000_0000),
    ("min.f32", "f32", &[("f32", "0f80000000"), ("f32", "0f00000000")], 0x8000_0000),
    ("max.f32", "f32", &[("f32", "0f80000000"), ("f32", "0f00000000")], 0),
    ("max.f32", "f32", &[("f32", "0f00000000"), ("f32", "0f80000000")], 0),
    ("neg.f32", "f32", &[("f32", "0f00000000")], 0x8000_0000),
    ("abs.f32", "f32", &[("f32", "0fC0000000")], 0x4000_0000),
    ("div.rn.f32", "f32", &[ONE, ("f32", "0f40400000")], 0x3eaa_aaab),
    ("rcp.rn.f32", "f32", &[("f32", "0f40400000")], 0x3eaa_aaab),
    ("sqrt.rn.f32", "f32", &[TWO], 0x3fb5_04f3),
    ("sqrt.rn.f32", "f32", &[("f32", "0fBF800000")], CANONICAL),
    ("ex2.approx.ftz.f32", "f32", &[TWO], 0x4080_0000),
    ("lg2.approx.f32", "f32", &[TWO], 0x3f80_0000),
    ("fma.rn.f16x2", "b32", &[("b32", "0x3c004000"), ("b32", "0x42003c00"), ("b32", "0x3c003c00")], 0x4400_4200),
    ("mul.rn.f64", "f64", &[("f64", "0d4000000000000000"), ("f64", "0d3FE0000000000000")], 0x3ff0_0000_0000_0000),
    // Conversions: 9.7.9
    ("cvt.s64.s32", "b64", &[("b32", "-1")], u64::MAX),
    ("cvt.u64.u32", "b64", &[("b32", "-1")], 0xffff_ffff),
    ("cvt.u32.u64", "b32", &[("b64", "4294967301")], 5),
    ("cvt.u16.u32", "b16", &[("b32", "65537")], 1),
    ("cvt.u32.u16", "b32", &[("b16", "65535")], 65535),
    ("cvt.s32.s8", "b32", &[("b16", "0x1ff")], 0xffff_ffff),
    ("cvt.rn.f32.s32", "f32", &[("b32", "-16777217")], 0xcb80_0000),
    ("cvt.rn.f32.u32", "f32", &[("b32", "-1")], 0x4f80_0000),
    ("cvt.rzi.s32.f32", "b32", &[("f32", "0fC03FFFFF")], -2i32 as u32 as u64),
    ("cvt.rzi.s32.f32", "b32", &[("f32", "0f4F000000")], 0x7fff_ffff),
    ("cvt.rzi.s32.f32", "b32", &[NAN], 0),
    ("cvt.rzi.u32.f32", "b32", &[("f32", "0fBF800000")], 0),
    ("cvt.rzi.u32.f32", "b32", &[("f32", "0f4F800000")], 0xffff_ffff),
    ("cvt.rni.f32.f32", "f32", &[("f32", "0f40200000")], 0x4000_0000),
    ("cvt.rpi.f64.f64", "f64", &[("f64", "0d3FF0000000000001")], 0x4000_0000_0000_0000),
    ("cvt.f64.f32", "f64", &[ONE], 0x3ff0_0000_0000_0000),
    ("cvt.rn.f32.f64", "f32", &[("f64", "0d3FF0000010000000")], 0x3f80_0000),
    ("cvt.f32.f16", "f32", &[("b16", "0x0001")], 0x3380_0000),
    ("cvt.f32.f16", "f32", &[("b16", "0xfe00")], CANONICAL),
    ("cvt.rn.f16x2.f32", "b32", &[ONE, TWO], 0x3c00_4000),
    ("cvt.rn.f16x2.f32", "b32", &[NAN, ("f32", "0f47FFE000")], 0x7fff_7c00),
    ("cvt.rn.bf16x2.f32", "b32", &[ONE, ("f32", "0f3F808000")], 0x3f80_3f80),
    ("cvt.rn.satfinite.e4m3x2.f32", "b16", &[ONE, ("f32", "0f44800000")], 0x387e),
    // Moves: 9.7.9
    ("mov.b32", "f32", &[("b32", "0x7f812345")], 0x7f81_2345),
    ("mov.b32", "b32", &[NAN], 0xffc0_1234),
    ("mov.u64", "b64", &[("b64", "-2")], -2i64 as u64),
];

/// Registers of a type, by name.
fn prefix(kind: &str) -> &'static str {
    match kind {
        "pred" => "p",
        "b16" => "rs",
        "b32" => "r",
        "b64" => "rd",
        "f32" => "f",
        "f64" => "fd",
        other => panic!("no registers of type {other}"),
    }
}

/// Each case's result, 8 bytes from 8 times its number.
pub fn program_of_cases() -> String {
    let mut body = String::new();
    for (i, (instruction, kind, operands, _)) in CASES.iter().enumerate() {
        let mut arguments = Vec::new();
        for (j, (kind, value)) in operands.iter().enumerate() {
            let register = format!("%{}{}", prefix(if *kind == "n" { "b32" } else { kind }), 10 + j);
            match *kind {
                "n" => arguments.push(value.to_string()),
                "pred" => _ = writeln!(body, "setp.ne.s32 {register}, {value}, 0;"),
                "f32" | "f64" => _ = writeln!(body, "mov.{kind} {register}, {value};"),
                bits => _ = writeln!(body, "mov.u{} {register}, {value};", &bits[1..]),
            }
            if *kind != "n" {
                arguments.push(register);
            }
        }
        let _ = writeln!(body, "{instruction} %{}1, {};", prefix(kind), arguments.join(", "));
        let at = 8 * i;
        match *kind {
            "pred" => _ = writeln!(body, "selp.u32 %r2, 1, 0, %p1; cvt.u64.u32 %rd2, %r2; st.global.u64 [%rd0+{at}], %rd2;"),
            "b16" => _ = writeln!(body, "cvt.u64.u16 %rd2, %rs1; st.global.u64 [%rd0+{at}], %rd2;"),
            "b32" => _ = writeln!(body, "cvt.u64.u32 %rd2, %r1; st.global.u64 [%rd0+{at}], %rd2;"),
            "f32" => _ = writeln!(body, "mov.b32 %r2, %f1; cvt.u64.u32 %rd2, %r2; st.global.u64 [%rd0+{at}], %rd2;"),
            "f64" => _ = writeln!(body, "st.global.f64 [%rd0+{at}], %fd1;"),
            _ => _ = writeln!(body, "st.global.u64 [%rd0+{at}], %rd1;"),
        }
    }
    entry("cases", &body)
}

#[test]
fn instructions_do_what_the_manual_says() {
    for style in [Style::Calls, Style::Plain] {
        let Some(machine) = Machine::build(&program_of_cases(), style) else { return };
        let out = machine.unwrap().launch("cases", 1, 0, CASES.len()).unwrap();
        for ((instruction, _, operands, expected), got) in CASES.iter().zip(out) {
            assert_eq!(got, *expected, "{instruction} {operands:?}, {style:?}: {got:#x}, not {expected:#x}");
        }
    }
}
