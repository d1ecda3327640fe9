//! Reads what the tools print: disassembly, resource usage, the assembler's remarks.

use std::collections::BTreeMap;

/// One machine instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Byte offset in its function.
    pub address: u64,
    /// Whether a predicate decides if it takes effect. It takes an issue slot either way.
    pub guarded: bool,
    /// With its suffixes: `LDGSTS.E.BYPASS.LTC128B.128`.
    pub opcode: String,
    /// The rest of the line.
    pub operands: String,
}

/// Where execution goes after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// To the next one.
    Next,
    /// To `target`, or (`or_next`) to the next one.
    Jump { target: u64, or_next: bool },
    /// Out of the function, or (`or_next`) to the next one.
    Leave { or_next: bool },
    /// To a place that the text doesn't say.
    Unknown,
}

impl Instruction {
    /// The opcode without suffixes.
    pub fn name(&self) -> &str {
        self.opcode.split('.').next().unwrap_or_default()
    }

    /// Whether the opcode has the suffix `suffix`.
    pub fn has(&self, suffix: &str) -> bool {
        self.opcode.split('.').skip(1).any(|s| s == suffix)
    }

    /// A multiplication on tensor cores.
    pub fn is_mma(&self) -> bool {
        matches!(self.name(), "HMMA" | "IMMA")
    }

    /// Where execution goes from here. `BSYNC` counts as `Next`: `stray_sync` looks for any that isn't.
    pub fn flow(&self) -> Flow {
        match self.name() {
            "BRA" | "JMP" => {
                // `BRA 0x10`, `@P0 BRA 0x10`, `@P0 BRA P1, 0x10`, `BRA.U !UP0, 0x10`, `BRA.DIV UR4, 0x10`
                let condition = self.guarded || self.operands.contains(',');
                let target = self.operands.rsplit(',').next().and_then(address);
                target.map_or(Flow::Unknown, |target| Flow::Jump { target, or_next: condition })
            }
            // Before sm_90 the compiler also leaves loops by guarded calls that never come back.
            "CALL" => address(&self.operands).map_or(Flow::Next, |target| Flow::Jump { target, or_next: true }),
            "EXIT" | "RET" | "KILL" => Flow::Leave { or_next: self.guarded },
            "BRX" | "BRXU" | "JMX" | "JMXU" => Flow::Unknown,
            _ => Flow::Next,
        }
    }
}

fn address(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

/// The functions in the output of `cuobjdump -sass`, by name.
pub fn functions(text: &str) -> BTreeMap<String, Vec<Instruction>> {
    let mut all = BTreeMap::<String, Vec<Instruction>>::new();
    let mut name = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(n) = line.strip_prefix("Function : ") {
            name = n.into();
            all.entry(name.clone()).or_default();
        } else if let (Some(one), Some(body)) = (instruction(line), all.get_mut(&name)) {
            body.push(one);
        }
    }
    all
}

/// `/*0060*/  @P0 EXIT ;  /* 0x000000000000094d */`. Lines with the encoding alone are none.
fn instruction(line: &str) -> Option<Instruction> {
    let (place, rest) = line.strip_prefix("/*")?.split_once("*/")?;
    let address = u64::from_str_radix(place, 16).ok()?;
    let (text, _) = rest.split_once(';')?;
    let text = text.trim();
    let (guarded, text) = match text.strip_prefix('@') {
        Some(guard) => (true, guard.split_once(' ')?.1.trim_start()),
        None => (false, text),
    };
    let (opcode, operands) = text.split_once(' ').unwrap_or((text, ""));
    Some(Instruction { address, guarded, opcode: opcode.into(), operands: operands.trim().into() })
}

/// `text` without the encodings, which are most of it.
pub fn without_encodings(text: &str) -> String {
    let mut s = String::new();
    for line in text.lines() {
        if let Some(header) = line.trim().strip_prefix("Function : ") {
            s += &format!("Function : {header}\n");
        } else if instruction(line.trim()).is_some() {
            s += line.split_once(';').map_or("", |l| l.0).trim();
            s += " ;\n";
        }
    }
    s
}

/// A `BSYNC` that doesn't continue where its `BSSY` says threads meet: paths through it can't be followed.
///
/// The `BSSY` of a `BSYNC` names the `BSYNC` itself or the instruction after it in all code seen so far.
pub fn stray_sync(body: &[Instruction]) -> Option<u64> {
    let barrier = |i: &Instruction| i.operands.split(',').next().unwrap_or_default().trim().to_string();
    let meets: Vec<(String, Option<u64>)> = body
        .iter()
        .filter(|i| i.name() == "BSSY")
        .map(|i| (barrier(i), i.operands.split(',').nth(1).and_then(address)))
        .collect();
    body.iter()
        .enumerate()
        .filter(|(_, i)| i.name() == "BSYNC")
        .find(|&(n, i)| {
            let next = body.get(n + 1).map(|i| i.address);
            !meets.iter().any(|(b, at)| *b == barrier(i) && at.is_some() && (*at == Some(i.address) || *at == next))
        })
        .map(|(_, i)| i.address)
}

/// Registers and memory of one entry point.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub registers: u32,
    pub shared: u32,
    pub stack: u32,
    pub local: u32,
}

/// The output of `cuobjdump -res-usage`, by function.
pub fn usages(text: &str) -> BTreeMap<String, Usage> {
    let mut all = BTreeMap::new();
    let mut name = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(n) = line.strip_prefix("Function ").and_then(|l| l.strip_suffix(':')) {
            name = n.into();
        } else if line.starts_with("REG:") {
            let field = |key: &str| {
                let value = line.split_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix(':'));
                value.and_then(|v| v.parse().ok()).unwrap_or(0)
            };
            let usage = Usage { registers: field("REG"), shared: field("SHARED"), stack: field("STACK"), local: field("LOCAL") };
            all.insert(name.clone(), usage);
        }
    }
    all
}

/// Bytes of (spill stores, spill loads) in the output of `ptxas -v`, by entry point.
///
/// Functions that an entry point calls are listed after it and count with it.
pub fn spills(text: &str) -> BTreeMap<String, (u32, u32)> {
    let mut all = BTreeMap::<String, (u32, u32)>::new();
    let mut name = String::new();
    for line in text.lines() {
        if let Some(rest) = line.split_once("Compiling entry function '").map(|l| l.1) {
            name = rest.split('\'').next().unwrap_or_default().into();
            all.entry(name.clone()).or_default();
        } else if line.contains("bytes spill stores") {
            let bytes = |what: &str| {
                let part = line.split(',').find_map(|p| p.trim().strip_suffix(what));
                part.and_then(|n| n.trim().parse().ok()).unwrap_or(0)
            };
            let total = all.entry(name.clone()).or_default();
            total.0 += bytes("bytes spill stores");
            total.1 += bytes("bytes spill loads");
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "
\tcode for sm_90a
\t\tFunction : kvlar_one
\t.headerflags\t@\"EF_CUDA_SM90\"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000ff00000000800 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R7], desc[UR8][R2.64] ; /* 0x0 */
        /*0020*/               @P0 EXIT ;                                    /* 0x0 */
        /*0030*/                   BRA.U !UP0, 0x10 ;                        /* 0x0 */
        /*0040*/               @P0 BRA P1, 0x50 ;
        /*0050*/                   BRA 0x50;
        /*0060*/               @P1 CALL.REL.NOINC 0x50 ;
\t\tFunction : kvlar_two
        /*0000*/                   BRX R2 -0x10 ;
";

    #[test]
    fn disassembly_is_read() {
        let all = functions(TEXT);
        assert_eq!(all.keys().collect::<Vec<_>>(), ["kvlar_one", "kvlar_two"]);
        let one = &all["kvlar_one"];
        assert_eq!(one.len(), 7);
        let copy = &one[1];
        assert_eq!((copy.address, copy.guarded, copy.name()), (0x10, true, "LDGSTS"));
        assert!(copy.has("LTC128B") && copy.has("128") && !copy.has("64"));
        assert_eq!(copy.operands, "[R7], desc[UR8][R2.64]");
        assert_eq!(functions(&without_encodings(TEXT)), all);
    }

    #[test]
    fn branches_say_where_they_go() {
        let all = functions(TEXT);
        let flow = |i: usize| all["kvlar_one"][i].flow();
        assert_eq!(flow(0), Flow::Next);
        assert_eq!(flow(2), Flow::Leave { or_next: true });
        assert_eq!(flow(3), Flow::Jump { target: 0x10, or_next: true });
        assert_eq!(flow(4), Flow::Jump { target: 0x50, or_next: true });
        assert_eq!(flow(5), Flow::Jump { target: 0x50, or_next: false });
        assert_eq!(flow(6), Flow::Jump { target: 0x50, or_next: true });
        assert_eq!(all["kvlar_two"][0].flow(), Flow::Unknown);
    }

    #[test]
    fn a_sync_elsewhere_is_noticed() {
        let body = |meet: &str| {
            functions(&format!("Function : f\n/*00*/ BSSY B0, {meet} ;\n/*10*/ NOP ;\n/*20*/ BSYNC B0 ;\n/*30*/ EXIT ;\n"))
        };
        assert_eq!(stray_sync(&body("0x20")["f"]), None);
        assert_eq!(stray_sync(&body("0x30")["f"]), None);
        assert_eq!(stray_sync(&body("0x10")["f"]), Some(0x20));
    }

    #[test]
    fn resources_and_spills_are_read() {
        let text = "Resource usage:\n Common:\n  GLOBAL:0\n Function kvlar_one:\n  REG:123 STACK:8 SHARED:1280 LOCAL:4 CONSTANT[0]:1480\n";
        assert_eq!(usages(text)["kvlar_one"], Usage { registers: 123, shared: 1280, stack: 8, local: 4 });
        let text = "ptxas info    : Compiling entry function 'kvlar_one' for 'sm_90a'
ptxas info    : Function properties for kvlar_one
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Function properties for callee
    0 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas info    : Compiling entry function 'kvlar_two' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n";
        let all = spills(text);
        assert_eq!((all["kvlar_one"], all["kvlar_two"]), ((13, 18), (0, 0)));
    }
}
