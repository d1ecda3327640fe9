//! The instructions that most code is made of, as expressions. `machine.h` knows them all; but a compiler takes several times as
//! long over its templates.

use crate::emit::Context;
use crate::syntax::Operand;

/// An instruction as a statement, where it is one of these and its registers are of its own types.
pub fn plain(context: &Context, name: &str, types: &[&str], operands: &[Operand]) -> Option<String> {
    let [kind, rest @ ..] = types else { return None };
    let of = |operand: &Operand, kind: &str| value(context, operand, kind);
    match (name, operands) {
        ("mov", [d, a]) => match (stored(context, d)?, stored(context, a)) {
            ("float", Some("uint32_t")) => assign(context, d, "f32", format!("float_of({})", of(a, "b32")?)),
            ("uint32_t", Some("float")) => assign(context, d, "b32", format!("bits_of({})", of(a, "f32")?)),
            _ => assign(context, d, kind, of(a, kind)?),
        },
        ("ld_param", [d, Operand::Address(base, offset)]) => {
            let value = format!("*reinterpret_cast<const {}*>({})", storage(kind)?, context.address(base, *offset).ok()?);
            assign(context, d, kind, value)
        }
        ("ld_shared", [d, Operand::Address(base, offset)]) if bits(kind) == Some(32) || *kind == "f32" => {
            let pointer = format!("shared({}, 4, 4)", context.address(base, *offset).ok()?);
            assign(context, d, kind, format!("*reinterpret_cast<const {}*>({pointer})", storage(kind)?))
        }
        ("lop3", [d, a, b, c, Operand::Integer(table)]) => {
            assign(context, d, kind, format!("of_table({}, {}, {}, {table}u)", of(a, kind)?, of(b, kind)?, of(c, kind)?))
        }
        ("prmt", [d, a, b, c]) => {
            assign(context, d, kind, format!("permuted_bytes({}, {}, {})", of(a, kind)?, of(b, kind)?, of(c, kind)?))
        }
        ("min" | "max", [d, a, b]) if *kind == "f32" => {
            let which = if name == "min" { "least_f32" } else { "greatest_f32" };
            assign(context, d, kind, format!("{which}({}, {})", of(a, kind)?, of(b, kind)?))
        }
        ("min" | "max", [d, a, b]) if bits(kind).is_some() => {
            let (a, b) = (as_type(kind, &of(a, kind)?)?, as_type(kind, &of(b, kind)?)?);
            let sign = if name == "min" { "<" } else { ">" };
            assign(context, d, kind, format!("{a} {sign} {b} ? {a} : {b}"))
        }
        ("abs", [d, a]) if *kind == "f32" => assign(context, d, kind, format!("__builtin_fabsf({})", of(a, kind)?)),
        ("add" | "sub" | "add_rn" | "sub_rn", [d, a, b]) if *kind != "f64" => {
            let sign = if name.starts_with("add") { "+" } else { "-" };
            assign(context, d, kind, rounded(kind, format!("{} {sign} {}", of(a, kind)?, of(b, kind)?)))
        }
        ("mul" | "mul_rn", [d, a, b]) if *kind == "f32" => {
            assign(context, d, kind, rounded(kind, format!("{} * {}", of(a, kind)?, of(b, kind)?)))
        }
        ("mul_lo", [d, a, b]) if bits(kind)? >= 32 => assign(context, d, kind, format!("{} * {}", of(a, kind)?, of(b, kind)?)),
        ("mad_lo", [d, a, b, c]) if bits(kind)? >= 32 => {
            assign(context, d, kind, format!("{} * {} + {}", of(a, kind)?, of(b, kind)?, of(c, kind)?))
        }
        ("fma_rn", [d, a, b, c]) if *kind == "f32" => {
            let product = format!("__builtin_fmaf({}, {}, {})", of(a, kind)?, of(b, kind)?, of(c, kind)?);
            assign(context, d, kind, rounded(kind, product))
        }
        ("neg", [d, a]) if *kind == "f32" => assign(context, d, kind, format!("-{}", of(a, kind)?)),
        ("and" | "or" | "xor", [d, a, b]) => {
            let sign = [("and", "&"), ("or", "|"), ("xor", "^")].into_iter().find(|(n, _)| *n == name)?.1;
            assign(context, d, kind, format!("{} {sign} {}", of(a, kind)?, of(b, kind)?))
        }
        ("not", [d, a]) => assign(context, d, kind, format!("{}{}", if *kind == "pred" { "!" } else { "~" }, of(a, kind)?)),
        ("shl" | "shr", [d, a, Operand::Integer(n)]) if *n >= 0 && *n < i64::from(bits(kind)?) => {
            let shifted = match name {
                "shl" => format!("{} << {n}", of(a, kind)?),
                _ => format!("{} >> {n}", as_type(kind, &of(a, kind)?)?),
            };
            assign(context, d, kind, shifted)
        }
        ("selp", [d, a, b, c]) => assign(context, d, kind, format!("{} ? {} : {}", of(c, "pred")?, of(a, kind)?, of(b, kind)?)),
        ("cvt", [d, a]) if !is_float(kind) && rest.len() == 1 && !is_float(rest[0]) => {
            assign(context, d, kind, as_type(kind, &as_type(rest[0], &of(a, rest[0])?)?)?)
        }
        ("cvta_to_global", [d, a]) => assign(context, d, kind, of(a, kind)?),
        ("mul_wide", [d, a, b]) if bits(kind)? == 32 => {
            let wide = if kind.starts_with('s') { "s64" } else { "u64" };
            let product = format!("{wide}({}) * {wide}({})", as_type(kind, &of(a, kind)?)?, as_type(kind, &of(b, kind)?)?);
            assign(context, d, wide, product)
        }
        (_, [d, a, b]) => {
            let compared = comparison(name.strip_prefix("setp_")?, kind, &of(a, kind)?, &of(b, kind)?)?;
            assign(context, d, "pred", compared)
        }
        _ => None,
    }
}

fn assign(context: &Context, to: &Operand, kind: &str, value: String) -> Option<String> {
    let Operand::Name(name) = to else { return None };
    (context.register(name)? == storage(kind)?).then(|| format!("r_{name} = {value}"))
}

fn is_float(kind: &str) -> bool {
    matches!(kind, "f16" | "bf16" | "f32" | "f64" | "f16x2" | "bf16x2" | "e4m3x2")
}

fn bits(kind: &str) -> Option<u32> {
    if kind == "pred" || is_float(kind) { None } else { kind[1..].parse().ok() }
}

/// The C++ type of the registers that hold a type.
pub fn storage(kind: &str) -> Option<&'static str> {
    Some(match kind {
        "pred" => "bool",
        "b16" | "u16" | "s16" => "uint16_t",
        "b32" | "u32" | "s32" => "uint32_t",
        "b64" | "u64" | "s64" => "uint64_t",
        "f32" => "float",
        "f64" => "double",
        _ => return None,
    })
}

/// An operand of the type's own storage.
fn value(context: &Context, operand: &Operand, kind: &str) -> Option<String> {
    match operand {
        Operand::Name(name) if context.is_symbol(name) => (bits(kind)? >= 32)
            .then(|| context.symbol(name))
            .flatten()
            .map(|v| format!("{}({v})", storage(kind).unwrap_or_default())),
        Operand::Name(name) => (context.register(name)? == storage(kind)?).then(|| format!("r_{name}")),
        Operand::Special(name) if bits(kind) == Some(32) => Some(format!("{name}()")),
        Operand::Integer(n) if kind == "pred" => Some((*n != 0).to_string()),
        Operand::Integer(n) => match bits(kind)? {
            32 => Some(format!("{}u", *n as u32)),
            64 => Some(format!("{}ull", *n as u64)),
            _ => None,
        },
        Operand::Float(bits, 32) if kind == "f32" => Some(format!("float_of({bits:#x}u)")),
        Operand::Float(bits, 64) if kind == "f64" => Some(format!("double_of({bits:#x}ull)")),
        _ => None,
    }
}

/// The type of the register that an operand is.
fn stored(context: &Context, operand: &Operand) -> Option<&'static str> {
    if let Operand::Name(name) = operand { context.register(name) } else { None }
}

/// What registers hold, as a value of a type of integers.
fn as_type(kind: &str, value: &str) -> Option<String> {
    bits(kind).map(|_| format!("{kind}({value})"))
}

fn rounded(kind: &str, value: String) -> String {
    if is_float(kind) { format!("rounded({value})") } else { value }
}

fn comparison(how: &str, kind: &str, a: &str, b: &str) -> Option<String> {
    if is_float(kind) {
        return Some(match how {
            "eq" => format!("{a} == {b}"),
            "lt" => format!("{a} < {b}"),
            "le" => format!("{a} <= {b}"),
            "gt" => format!("{a} > {b}"),
            "ge" => format!("{a} >= {b}"),
            "neu" => format!("!({a} == {b})"),
            "ltu" => format!("!({a} >= {b})"),
            "leu" => format!("!({a} > {b})"),
            "gtu" => format!("!({a} <= {b})"),
            "geu" => format!("!({a} < {b})"),
            _ => return None,
        });
    }
    let sign =
        [("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")].into_iter().find(|s| s.0 == how)?.1;
    if kind == "pred" {
        return None;
    }
    Some(format!("{} {sign} {}", as_type(kind, a)?, as_type(kind, b)?))
}
