//! C++ for the runtime of the emulation: an entry is a function, a register a variable, an instruction a call of `machine.h`.

use crate::Style;
use crate::plain::{plain, storage};
use crate::stalls::{self, Predicated};
use crate::syntax::{Entry, Instruction, Module, Operand, Statement};
use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;

/// Types, as they stand in the names of instructions.
const TYPES: [&str; 20] = [
    "pred", "b8", "b16", "b32", "b64", "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "f16", "bf16", "f32", "f64",
    "f16x2", "bf16x2", "e4m3x2",
];
/// Dynamic shared memory begins at such a multiple: `kSharedAlignment` of `simt/host.h`.
const DYNAMIC_ALIGNMENT: u32 = 128;

/// The C++ source of a file's entries.
///
/// # Errors
/// What of the file has no counterpart.
pub fn emit(module: &Module, style: Style) -> Result<String, String> {
    let mut out = String::new();
    let mut sites = Vec::new();
    for entry in &module.entries {
        emit_entry(&mut out, module, entry, style, &mut sites).map_err(|e| format!("{}: {e}", entry.name))?;
    }
    let mut head = String::from("#include \"machine.h\"\n");
    if matches!(style, Style::Accesses | Style::Stalls) {
        // One more, for there to be any.
        let _ = writeln!(head, "namespace machine {{\nstatic const Site sites_here[] = {{\n{}{{}}}};", sites.concat());
        let _ = writeln!(head, "static const int first_site = add_sites(sites_here);\n}}  // namespace machine");
    }
    Ok(head + &out)
}

/// What an entry's instructions refer to.
#[derive(Default)]
pub struct Context<'a> {
    /// The C++ types of registers.
    registers: HashMap<String, &'static str>,
    /// Variables' and parameters' addresses.
    symbols: HashMap<&'a str, String>,
    /// The source's line that instructions come from.
    location: Option<String>,
}

impl Context<'_> {
    pub fn register(&self, name: &str) -> Option<&'static str> {
        self.registers.get(name).copied()
    }

    pub fn is_symbol(&self, name: &str) -> bool {
        self.symbols.contains_key(name)
    }

    pub fn symbol(&self, name: &str) -> Option<String> {
        self.symbols.get(name).cloned()
    }

    /// Of 64 bits, whatever the register has: those of 32 bits do not carry.
    pub fn address(&self, base: &Operand, offset: i64) -> Result<String, String> {
        let Operand::Name(name) = base else { return Err(format!("{base:?} is no address")) };
        match (self.symbol(name), self.register(name)) {
            (Some(symbol), _) => Ok(format!("{symbol} + {}ull", offset as u64)),
            (_, Some("uint64_t")) => Ok(format!("r_{name} + {}ull", offset as u64)),
            (_, Some("uint32_t")) => Ok(format!("r_{name} + {}u", offset as u32)),
            _ => Err(format!("{name} holds no address")),
        }
    }
}

fn emit_entry(out: &mut String, module: &Module, entry: &Entry, style: Style, sites: &mut Vec<String>) -> Result<(), String> {
    let mut context = Context::default();
    let used = names_in(&entry.body);
    let shared: Vec<_> = module.shared.iter().chain(&entry.shared).filter(|v| used.contains(v.name.as_str())).collect();
    let (mut fixed, mut dynamic) = (0u32, None);
    for variable in shared.iter() {
        let Some(bytes) = variable.bytes else {
            if !DYNAMIC_ALIGNMENT.is_multiple_of(variable.alignment) {
                return Err(format!("{} is aligned to {} bytes", variable.name, variable.alignment));
            }
            dynamic = Some(variable.name.as_str());
            continue;
        };
        let at = fixed.next_multiple_of(variable.alignment);
        context.symbols.insert(&variable.name, format!("kSharedStart + {at}"));
        fixed = at + bytes;
    }
    context.symbols.extend(dynamic.map(|name| (name, format!("kSharedStart + {}", fixed.next_multiple_of(DYNAMIC_ALIGNMENT)))));
    context.symbols.extend(entry.parameters.iter().map(|(name, at)| (name.as_str(), format!("parameters + {at}"))));

    let name = &entry.name;
    let _ = writeln!(out, "\nnamespace machine {{\nstatic void {name}(const void* given) {{");
    let _ = writeln!(out, "[[maybe_unused]] const uint64_t parameters = reinterpret_cast<uint64_t>(given);");
    if style == Style::Stalls {
        let _ = writeln!(out, "stalls::Clock clock(\"{name}\", first_site);");
    }
    let predicated = if style == Style::Stalls { stalls::predicated(&entry.body) } else { Predicated::default() };
    for (at, statement) in entry.body.iter().enumerate() {
        let instruction = match statement {
            Statement::Instruction(instruction) => instruction,
            Statement::Label(label) if predicated.labels.contains(label) => {
                let _ = writeln!(out, "{label}:;");
                continue;
            }
            _ => {
                emit_statement(out, &mut context, &module.files, statement, style)?;
                continue;
            }
        };
        let number = sites.len();
        match style {
            Style::Accesses if accesses_memory(instruction) => {
                let call = guarded(instruction, call(&context, instruction, style)?);
                let _ = writeln!(out, "{{ here = first_site + {number}; {call} here = -1; }}");
            }
            Style::Stalls => {
                let call = call(&context, instruction, style)?;
                let _ =
                    writeln!(out, "{}", stalls::timed(&context, instruction, predicated.by.get(&at).copied(), number, &call)?);
            }
            _ => {
                let _ = writeln!(out, "{}", guarded(instruction, call(&context, instruction, style)?));
                continue;
            }
        }
        sites.push(site(entry, &context, instruction));
    }
    let bytes = entry.parameter_bytes;
    let _ = writeln!(out, "}}\n}}  // namespace machine\nextern \"C\" const simt::KernelDesc kvlar_simt_kernel_{name};");
    let _ =
        writeln!(out, "const simt::KernelDesc kvlar_simt_kernel_{name} = {{\"{name}\", &machine::{name}, {bytes}, {fixed}}};");
    Ok(())
}

fn accesses_memory(instruction: &Instruction) -> bool {
    let name = instruction.name[0].as_str();
    (["ld", "st", "atom", "ldmatrix"].contains(&name) && !instruction.name.iter().any(|p| p == "param"))
        || (name == "cp" && instruction.operands.iter().any(|o| matches!(o, Operand::Address(..))))
}

/// An element of a table of `Site` in `sites.h`.
fn site(entry: &Entry, context: &Context, instruction: &Instruction) -> String {
    let place = context.location.as_deref().unwrap_or_default();
    format!("{{\"{}\", \"{}\", {place:?}}},\n", entry.name, instruction.name.join("."))
}

/// All names that instructions mention.
fn names_in(body: &[Statement]) -> BTreeSet<&str> {
    fn collect<'a>(operand: &'a Operand, into: &mut BTreeSet<&'a str>) {
        match operand {
            Operand::Name(name) => _ = into.insert(name),
            Operand::Vector(all) => all.iter().for_each(|o| collect(o, into)),
            Operand::Both(a, b) => [a, b].into_iter().for_each(|o| collect(o, into)),
            Operand::Address(base, _) => collect(base, into),
            _ => {}
        }
    }
    let mut names = BTreeSet::new();
    for statement in body {
        if let Statement::Instruction(i) = statement {
            i.operands.iter().for_each(|o| collect(o, &mut names));
        }
    }
    names
}

fn emit_statement(
    out: &mut String,
    context: &mut Context,
    files: &HashMap<u32, String>,
    statement: &Statement,
    style: Style,
) -> Result<(), String> {
    match statement {
        Statement::Registers { kind, name, count } => {
            // (Assembly within the source has registers of halves.)
            let kind = storage(if kind.ends_with("f16") { "b16" } else { kind }).ok_or(format!("registers of type {kind}"))?;
            let names = count.map_or(vec![name.clone()], |n| (0..n).map(|i| format!("{name}{i}")).collect());
            for names in names.chunks(16) {
                let _ = writeln!(out, "[[maybe_unused]] {kind} r_{};", names.join(", r_"));
                if style == Style::Stalls {
                    let _ = writeln!(out, "[[maybe_unused]] uint64_t t_{} = 0;", names.join(" = 0, t_"));
                }
            }
            context.registers.extend(names.into_iter().map(|n| (n, kind)));
        }
        // (What a toolkit's header has, or one function for an instruction, is where it was inlined.)
        Statement::Location(places) => {
            let of_a_kernel =
                |file| files.get(file)?.rsplit_once("/kernels/").map(|path| path.1).filter(|f| *f != "device/ptx.cuh");
            let known = places.iter().find_map(|(file, line)| Some((of_a_kernel(file)?, line)));
            context.location = known.map(|(file, line)| format!("{file}:{line}")).or(context.location.take());
        }
        Statement::Label(label) if style == Style::Stalls => _ = writeln!(out, "{label}: stalls::label(clock);"),
        Statement::Label(label) => _ = writeln!(out, "{label}:;"),
        Statement::Open => out.push_str("{\n"),
        Statement::Close => out.push_str("}\n"),
        Statement::Instruction(instruction) => {
            let _ = writeln!(out, "{}", guarded(instruction, call(context, instruction, style)?));
        }
    }
    Ok(())
}

fn guarded(instruction: &Instruction, call: String) -> String {
    match &instruction.guard {
        Some((register, negated)) => format!("if ({}r_{register}) {call};", if *negated { "!" } else { "" }),
        None => format!("{call};"),
    }
}

fn call(context: &Context, instruction: &Instruction, style: Style) -> Result<String, String> {
    let whole = instruction.name.join(".");
    match (whole.as_str(), &instruction.operands[..]) {
        ("bra" | "bra.uni", [Operand::Name(label)]) => return Ok(format!("goto {label}")),
        ("ret" | "exit", []) => return Ok("return".into()),
        _ => {}
    }
    let (types, mut parts): (Vec<&str>, Vec<&str>) = instruction.name.iter().map(String::as_str).partition(|p| TYPES.contains(p));
    parts.retain(|p| !["v2", "v4"].contains(p));
    let mut name = parts.join("_");
    if let Some(statement) = plain(context, &name, &types, &instruction.operands).filter(|_| style != Style::Calls) {
        return Ok(statement);
    }
    if let ("mov", [a, b]) = (name.as_str(), &instruction.operands[..]) {
        let halves = (matches!(a, Operand::Vector(_)), matches!(b, Operand::Vector(_)));
        name = match halves {
            (true, false) => "unpack".into(),
            (false, true) => "pack".into(),
            _ => name,
        };
    } else if ["and", "or", "xor", "not"].contains(&name.as_str()) {
        name.push('_'); // words of C++
    }
    let types =
        if types.is_empty() || name == "pack" || name == "unpack" { String::new() } else { format!("<{}>", types.join(", ")) };
    // Addresses first: there may be any number of the others.
    let (mut addresses, mut others) = (Vec::new(), Vec::new());
    for operand in &instruction.operands {
        if let Operand::Address(base, offset) = operand {
            addresses.push(context.address(base, *offset)?);
        } else {
            spread(context, operand, &mut others)?;
        }
    }
    addresses.extend(others);
    Ok(format!("{name}{types}({})", addresses.join(", ")))
}

fn spread(context: &Context, operand: &Operand, into: &mut Vec<String>) -> Result<(), String> {
    match operand {
        Operand::Vector(all) => all.iter().try_for_each(|o| spread(context, o, into)),
        Operand::Both(a, b) => [a, b].into_iter().try_for_each(|o| spread(context, o, into)),
        one => {
            into.push(value(context, one)?);
            Ok(())
        }
    }
}

pub fn value(context: &Context, operand: &Operand) -> Result<String, String> {
    Ok(match operand {
        Operand::Name(name) if context.is_symbol(name) => {
            format!("Number{{int64_t({})}}", context.symbol(name).unwrap_or_default())
        }
        Operand::Name(name) if context.register(name).is_none() => {
            return Err(format!("{name} is neither register nor variable"));
        }
        Operand::Name(name) => format!("r_{name}"),
        Operand::Special(name) => format!("{name}()"),
        Operand::Integer(n) => format!("Number{{int64_t({}ull)}}", *n as u64),
        Operand::Float(bits, 32) => format!("float_of({bits:#x}u)"),
        Operand::Float(bits, _) => format!("double_of({bits:#x}ull)"),
        Operand::Sink => "Sink{}".into(),
        Operand::Vector(_) | Operand::Both(..) | Operand::Address(..) => {
            return Err(format!("{operand:?} within another operand"));
        }
    })
}
