//! Instructions, one at a time, against what "PTX ISA" says of them: by calls and spelled out.

use kvlar_ptx_emulation::{INCLUDE, Style, translate};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// An instruction, the type of its destination, its operands as they stand in PTX with their types, and the bits that come of it.
type Case = (&'static str, &'static str, &'static [(&'static str, &'static str)], u64);

const ONE: (&str, &str) = ("f32", "0f3F800000");
const TWO: (&str, &str) = ("f32", "0f40000000");
const NAN: (&str, &str) = ("f32", "0fFFC01234");
const CANONICAL: u64 = 0x7fff_ffff;

const CASES: &[Case] = &[
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

const HEADER: &str = ".version 9.0\n.target sm_90a\n.address_size 64\n";
const REGISTERS: &str = ".reg .pred %p<1000>; .reg .b16 %rs<1000>; .reg .b32 %r<1000>; .reg .b64 %rd<1000>; .reg .f32 %f<1000>; \
                         .reg .f64 %fd<1000>;\n";

/// An entry `name` with the address that it is given in `%rd0`.
fn entry(name: &str, body: &str) -> String {
    format!(
        ".visible .entry {name}(\n.param .u64 {name}_param_0\n)\n.maxntid 32, 1, 1\n{{\n{REGISTERS}ld.param.u64 %rd0, [{name}_param_0];\n\
         {body}ret;\n}}\n"
    )
}

/// Each case's result, 8 bytes from 8 times its number.
fn program_of_cases() -> String {
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

fn compiler() -> Command {
    Command::new(std::env::var_os("CXX").unwrap_or("c++".into()))
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| e.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// The emulation of a file of PTX.
struct Machine(libloading::Library, #[expect(dead_code, reason = "the library's folder")] tempfile::TempDir);

impl Machine {
    /// `Err` with what the translation or the compiler says; `None` where there is no compiler or no emulation.
    fn build(ptx: &str, style: Style) -> Option<Result<Self, String>> {
        if !cfg!(target_arch = "x86_64") || compiler().arg("--version").output().is_err() {
            eprintln!("skipped: no C++ compiler, or not an x86-64 CPU");
            return None;
        }
        Some(Self::try_build(ptx, style))
    }

    fn try_build(ptx: &str, style: Style) -> Result<Self, String> {
        let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
        let (source, library) = (folder.path().join("machine.cpp"), folder.path().join("libmachine.so"));
        std::fs::write(&source, translate(&format!("{HEADER}{ptx}"), style)?).map_err(|e| e.to_string())?;
        let kernels = Path::new(INCLUDE).join("../../kernels");
        let mut command = compiler();
        command.args([
            "-std=c++17",
            "-w",
            "-fPIC",
            "-shared",
            "-pthread",
            "-ffp-contract=off",
            "-fno-strict-aliasing",
            "-DKVLAR_SIMT",
        ]);
        command
            .args((style == Style::Accesses).then_some("-DKVLAR_ACCESSES"))
            .args((style == Style::Stalls).then_some("-DKVLAR_STALLS"))
            .arg("-Wl,-Bsymbolic")
            .arg("-I")
            .arg(&kernels)
            .arg("-I")
            .arg(INCLUDE)
            .arg("-o")
            .arg(&library)
            .arg(&source);
        run(command.args(Self::runtime()?))?;
        // SAFETY: it has no initializers of note.
        Ok(Self(unsafe { libloading::Library::new(library) }.map_err(|e| e.to_string())?, folder))
    }

    /// The emulation's runtime, compiled once for all tests.
    fn runtime() -> Result<&'static [PathBuf], String> {
        static COMPILED: OnceLock<Result<Vec<PathBuf>, String>> = OnceLock::new();
        let compile = |name: &str| {
            let (folder, kernels) = (Path::new(env!("CARGO_TARGET_TMPDIR")), Path::new(INCLUDE).join("../../kernels"));
            // Another process may be linking the object of that name.
            let (object, part) = (folder.join(format!("{name}.o")), folder.join(format!("{name}.{}.part", std::process::id())));
            let mut command = compiler();
            command
                .args(["-std=c++17", "-w", "-fPIC", "-pthread", "-ffp-contract=off", "-DKVLAR_SIMT", "-c", "-I"])
                .arg(&kernels);
            run(command.arg(kernels.join(format!("simt/{name}.cpp"))).arg("-o").arg(&part))?;
            std::fs::rename(part, &object).map_err(|e| e.to_string())?;
            Ok(object)
        };
        let all = || ["runtime", "collectives", "mbarrier"].into_iter().map(compile).collect();
        COMPILED.get_or_init(all).as_deref().map_err(String::clone)
    }

    /// Runs one block of an entry, in lane order; what it wrote to the words that it was given.
    fn launch(&self, name: &str, threads: u32, shared_bytes: u32, words: usize) -> Result<Vec<u64>, String> {
        self.launch_blocks(name, 1, threads, shared_bytes, words)
    }

    /// Likewise several, one after another.
    fn launch_blocks(&self, name: &str, blocks: u32, threads: u32, shared_bytes: u32, words: usize) -> Result<Vec<u64>, String> {
        type Launch = unsafe extern "C" fn(*const c_void, *const u32, *const u32, u32, *const c_void, u32, u64, u32) -> c_int;
        let mut out = vec![0xabab_abab_abab_ababu64; words];
        let parameters = out.as_mut_ptr() as u64;
        // SAFETY: of these types; the entry writes to `out` alone.
        unsafe {
            let kernel =
                self.0.get::<*const c_void>(format!("kvlar_simt_kernel_{name}\0").as_bytes()).map_err(|e| e.to_string())?;
            let launch = self.0.get::<Launch>(b"kvlar_simt_launch\0").map_err(|e| e.to_string())?;
            let error =
                self.0.get::<unsafe extern "C" fn() -> *const c_char>(b"kvlar_simt_last_error\0").map_err(|e| e.to_string())?;
            let kernel = kernel.try_as_raw_ptr().expect("an address");
            let (grid, block) = ([blocks, 1, 1], [threads, 1, 1]);
            let given = (&raw const parameters).cast();
            if launch(kernel, grid.as_ptr(), block.as_ptr(), shared_bytes, given, 8, 0, 1) != 0 {
                return Err(CStr::from_ptr(error()).to_string_lossy().into_owned());
            }
        }
        Ok(out)
    }
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
    run(child.args(["--exact", "accesses_of_a_child"]).env("KVLAR_ACCESSES", &path)).unwrap();
    let counts = std::fs::read_to_string(path).unwrap();
    for (i, (load, step, [needed, least])) in PATTERNS.iter().enumerate() {
        let (name, space) = (load.split(' ').next().unwrap(), if load.contains("shared") { "shared" } else { "global" });
        // One request in each of the two blocks.
        let expected = format!("{space}\tpatterns\tmade/up.cu:{}\t{name}\t2\t{}\t{}\n", 100 + i, 2 * needed, 2 * least);
        assert!(counts.contains(&expected), "{load}, {step} bytes apart: no {expected:?} in\n{counts}");
    }
}

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
    run(child.args(["--exact", "stalls_of_a_child"]).env("KVLAR_STALLS", &path).env("KVLAR_STALLS_GLOBAL", "1000")).unwrap();
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
