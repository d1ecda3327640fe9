//! What `Style::Stalls` adds to an instruction: calls of `stalls.h` that say when it issues, and when what it makes is there. Of a
//! register `r_x`, that is `t_x`.

use crate::emit::{Context, value};
use crate::syntax::{Instruction, Operand, Statement};
use std::collections::{HashMap, HashSet};

/// A branch over no more instructions than that becomes their predicate (a guess at what ptxas does).
const PREDICATED: usize = 12;

/// Branches that are none: what they jump over is short and nothing but arithmetic, for which ptxas writes predicates. A block goes
/// on across them.
#[derive(Debug, Default)]
pub struct Predicated<'a> {
    /// The predicates of such branches, and of what they jump over, by places in the body.
    pub by: HashMap<usize, &'a String>,
    /// Labels that nothing else leads to.
    pub labels: HashSet<&'a String>,
}

/// Those of an entry's body.
pub fn predicated(body: &[Statement]) -> Predicated<'_> {
    let target = |statement: &Statement| match statement {
        Statement::Instruction(Instruction { name, operands, .. }) if name[0] == "bra" => match &operands[..] {
            [Operand::Name(label)] => Some(label.clone()),
            _ => None,
        },
        _ => None,
    };
    let mut branches: HashMap<String, usize> = HashMap::new();
    body.iter().filter_map(target).for_each(|label| *branches.entry(label).or_default() += 1);
    let mut all = Predicated::default();
    for (at, statement) in body.iter().enumerate() {
        let (Statement::Instruction(Instruction { guard: Some((register, _)), .. }), Some(label)) =
            (statement, target(statement))
        else {
            continue;
        };
        let arithmetic = |s: &Statement| match s {
            Statement::Location(_) => true,
            Statement::Instruction(i) => i.guard.is_none() && is_arithmetic(&i.name[0]),
            _ => false,
        };
        let end = at + 1 + body[at + 1..].iter().take_while(|s| arithmetic(s)).count();
        let over = body[at + 1..end].iter().filter(|s| matches!(s, Statement::Instruction(_))).count();
        if let Some(Statement::Label(reached)) = body.get(end)
            && *reached == label
            && branches[&label] == 1
            && over <= PREDICATED
        {
            all.by.extend((at..end).map(|i| (i, register)));
            all.labels.insert(reached);
        }
    }
    all
}

fn is_arithmetic(name: &str) -> bool {
    let others = [
        "ld",
        "st",
        "atom",
        "red",
        "bra",
        "ret",
        "exit",
        "bar",
        "membar",
        "fence",
        "shfl",
        "vote",
        "match",
        "redux",
        "cp",
        "mma",
        "ldmatrix",
        "movmatrix",
        "mbarrier",
        "prefetch",
    ];
    !others.contains(&name)
}

/// An instruction's statement with its calls; `site` is its number among the sites of the file, `predicate` that of a branch over it
/// that is none.
pub fn timed(
    context: &Context,
    instruction: &Instruction,
    predicate: Option<&String>,
    site: usize,
    statement: &str,
) -> Result<String, String> {
    let parts: Vec<_> = instruction.name.iter().map(String::as_str).collect();
    let (made, used) = registers(context, &parts, &instruction.operands);
    let guard = instruction.guard.as_ref().map(|(register, negated)| (register, if *negated { "!" } else { "" }));
    let ready: Vec<_> = guard.iter().map(|(r, _)| *r).chain(used).chain(predicate).map(|r| format!("t_{r}")).collect();
    let with = |what: &[String]| -> String { what.iter().map(|t| format!(", {t}")).collect() };
    let call = |name: &str, what: String| format!("stalls::{name}(clock, {site}{what})");
    let to: String = made.iter().map(|r| format!("t_{r} = ")).collect();
    let last = || value(context, instruction.operands.last().ok_or("no operands")?);

    if let ["bra" | "ret" | "exit", ..] = parts[..] {
        let on = guard.map_or(String::new(), |(r, not)| format!("if ({not}r_{r}) "));
        if predicate.is_some() {
            return Ok(format!("{on}{statement};"));
        }
        return Ok(format!("{}; {on}{statement};", call("branch", with(&ready))));
    }
    let whole = match parts[..] {
        ["bar", "warp", ..] => format!("{}; {statement};", call("meet_lanes", format!(", as<u32>({})", last()?))),
        ["bar", how, ..] => {
            let at = if how == "red" { 1 } else { 0 };
            let id = value(context, instruction.operands.get(at).ok_or("no barrier")?)?;
            let arrive = call("arrive", format!(", as<u32>({id}){}", with(&ready)));
            let leave = call("leave", format!(", as<u32>({id}), turn"));
            match how {
                "arrive" => format!("{arrive}; {statement};"),
                _ => format!("{{ const unsigned turn = {arrive}; {statement}; {to}{leave}; }}"),
            }
        }
        ["shfl" | "vote" | "match" | "redux", ..] => {
            format!("{to}{}; {statement};", call("exchange", format!(", as<u32>({}){}", last()?, with(&ready))))
        }
        ["cp", "async", "commit_group"] => format!("{}; {statement};", call("commit", String::new())),
        ["cp", "async", "wait_group"] => {
            format!("{}; {statement};", call("wait_groups", format!(", as<u32>({})", last()?)))
        }
        ["cp", "async", "cg" | "ca", ..] => format!("{}; {statement};", call("copy", with(&ready))),
        ["membar" | "fence", level, ..] => {
            let latency = if level == "cta" { "kBlockFence" } else { "kFence" };
            format!("{}; {statement};", call("hold", format!(", stalls::{latency}")))
        }
        _ => {
            let ordered = parts.iter().any(|p| ["acquire", "release", "acq_rel"].contains(p));
            // What was written before is there first; or what is read later, afterwards.
            let before = if ordered && parts[0] != "ld" { call("hold", ", stalls::kFence".into()) + "; " } else { String::new() };
            let made = match latency(&parts, &instruction.operands) {
                None if to.is_empty() => String::new(),
                None => format!("{to}stalls::latest({})", ready.join(", ")),
                Some(cycles) => {
                    let how = if ordered && parts[0] == "ld" { "hold" } else { "issue" };
                    format!("{to}{}", call(how, format!(", stalls::{cycles}{}", with(&ready))))
                }
            };
            format!("{before}{made}; {statement};")
        }
    };
    Ok(match guard {
        Some((register, not)) => {
            let skipped = call("skip", format!(", t_{register}"));
            format!("if ({not}r_{register}) {{ {whole} }} else {skipped};")
        }
        None => whole,
    })
}

/// The registers that an instruction writes, and those that it reads.
fn registers<'a>(context: &Context, parts: &[&str], operands: &'a [Operand]) -> (Vec<&'a String>, Vec<&'a String>) {
    fn collect<'a>(context: &Context, operand: &'a Operand, into: &mut Vec<&'a String>) {
        match operand {
            Operand::Name(name) if context.register(name).is_some() => into.push(name),
            Operand::Vector(all) => all.iter().for_each(|o| collect(context, o, into)),
            Operand::Both(a, b) => [a, b].into_iter().for_each(|o| collect(context, o, into)),
            Operand::Address(base, _) => collect(context, base, into),
            _ => {}
        }
    }
    let makes = match parts {
        ["mbarrier", how, ..] => *how == "try_wait",
        ["bar", how, ..] => *how == "red",
        [name, ..] => !["st", "cp", "membar", "fence", "bra", "ret", "exit"].contains(name),
        [] => false,
    };
    let (mut made, mut used) = (Vec::new(), Vec::new());
    for (i, operand) in operands.iter().enumerate() {
        collect(context, operand, if i == 0 && makes { &mut made } else { &mut used });
    }
    (made, used)
}

/// The constant of `stalls.h` that says how long an instruction takes; `None` of what is no instruction of the machine's: moves
/// between registers, and what else ptxas does by naming them.
fn latency(parts: &[&str], operands: &[Operand]) -> Option<&'static str> {
    let has = |part: &str| parts.contains(&part);
    let kind = *parts.last()?;
    Some(match parts[0] {
        "mov" if operands.iter().any(|o| matches!(o, Operand::Vector(_))) => {
            if kind == "b64" {
                return None;
            }
            "kAlu"
        }
        "mov" => match operands.last()? {
            Operand::Special(name) if name.starts_with("ntid") || name.starts_with("nctaid") => "kConstant",
            Operand::Special(_) => "kSpecial",
            _ => return None,
        },
        "cvta" => return None,
        "cvt" => {
            let from = kind;
            let to = parts[parts.len() - 2];
            let float = |kind: &str| kind.starts_with(['f', 'b', 'e']);
            match (to, from) {
                ("u64" | "s64", "u32") | ("u32" | "s32", "u64" | "s64") => return None,
                ("f64", _) | (_, "f64") => "kDouble",
                _ if float(to) != float(from) || has("rni") || has("rzi") || has("rmi") || has("rpi") => "kSpecial",
                _ => "kAlu",
            }
        }
        "ld" if has("param") => "kConstant",
        "ld" if has("shared") => "kShared",
        "ld" => "kGlobal",
        "atom" if has("shared") => "kSharedAtomic",
        "atom" => "kAtomic",
        "ldmatrix" => "kMatrices",
        "movmatrix" => "kMovMatrix",
        "mma" if has("m16n8k32") || (has("m16n8k16") && !has("s8")) => "kProduct",
        "mma" => "kSmallProduct",
        "st" | "cp" | "mbarrier" | "prefetch" | "red" => "kNothing",
        "div" | "rem" if !kind.starts_with('f') => "kDivision",
        "div" | "sqrt" => "kSequence",
        "rcp" if has("rn") => "kSequence",
        "ex2" | "lg2" | "rcp" | "rsqrt" | "tanh" | "sin" | "cos" | "popc" | "clz" | "brev" | "bfind" => "kSpecial",
        _ if kind == "f64" => "kDouble",
        _ => "kAlu",
    })
}
