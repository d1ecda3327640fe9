//! The syntax of PTX, as far as nvcc writes it for our kernels ("PTX ISA" 9.0, section 4).

use std::collections::{BTreeMap, HashMap};

/// A file: variables of shared memory, and entries; and the sources by the numbers that locations have, where it speaks of them.
#[derive(Debug, Default)]
pub struct Module {
    pub files: HashMap<u32, String>,
    pub shared: Vec<Variable>,
    pub entries: Vec<Entry>,
}

/// A variable of shared memory. `bytes` is `None` where the launch says how much there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    pub name: String,
    pub alignment: u32,
    pub bytes: Option<u32>,
}

#[derive(Debug, Default)]
pub struct Entry {
    pub name: String,
    /// The parameters' names, and where they lie.
    pub parameters: BTreeMap<String, u32>,
    pub parameter_bytes: u32,
    pub shared: Vec<Variable>,
    pub body: Vec<Statement>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Statement {
    /// Types and names without `%`; `count` of `name<count>`.
    Registers {
        kind: String,
        name: String,
        count: Option<u32>,
    },
    Label(String),
    /// What follows is of this file and line, or where that was inlined, of these.
    Location(Vec<(u32, u32)>),
    Open,
    Close,
    Instruction(Instruction),
}

#[derive(Debug, PartialEq, Eq)]
pub struct Instruction {
    /// The predicate, and whether it must be false.
    pub guard: Option<(String, bool)>,
    /// The parts of the name between points.
    pub name: Vec<String>,
    pub operands: Vec<Operand>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operand {
    /// A register, without `%`; a label, a variable.
    Name(String),
    Special(String),
    Integer(i64),
    /// Bits of a float, and how many.
    Float(u64, u32),
    Vector(Vec<Operand>),
    /// `a|b`.
    Both(Box<Operand>, Box<Operand>),
    /// `[base+offset]`.
    Address(Box<Operand>, i64),
    /// `_`.
    Sink,
}

type Outcome<T> = Result<T, String>;

/// Reads a file.
///
/// # Errors
/// What stands where something else should.
pub fn parse(text: &str) -> Outcome<Module> {
    let text = without_comments(text);
    let mut source = Source { text: &text, line: 1 };
    source.module().map_err(|what| format!("line {}: {what}", source.line))
}

fn without_comments(text: &str) -> String {
    text.lines().map(|l| l.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

struct Source<'a> {
    text: &'a str,
    line: usize,
}

impl<'a> Source<'a> {
    fn advance(&mut self, bytes: usize) -> &'a str {
        let (taken, rest) = self.text.split_at(bytes);
        self.line += taken.matches('\n').count();
        self.text = rest;
        taken
    }

    fn skip_space(&mut self) {
        self.advance(self.text.len() - self.text.trim_start().len());
    }

    /// Whether this comes next, which is then taken.
    fn next_is(&mut self, what: &str) -> bool {
        self.skip_space();
        let is = self.text.starts_with(what);
        if is {
            self.advance(what.len());
        }
        is
    }

    /// All up to this, which is taken too.
    fn until(&mut self, what: char) -> Outcome<&'a str> {
        let end = self.text.find(what).ok_or(format!("no {what:?} any more"))?;
        let taken = self.advance(end);
        self.advance(what.len_utf8());
        Ok(taken.trim())
    }

    fn rest_of_line(&mut self) -> &'a str {
        let end = self.text.find('\n').unwrap_or(self.text.len());
        self.advance(end)
    }

    fn module(&mut self) -> Outcome<Module> {
        let mut module = Module::default();
        loop {
            self.skip_space();
            if self.text.is_empty() {
                return Ok(module);
            }
            if self.next_is(".file") {
                let (number, path) = self.rest_of_line().trim().split_once(char::is_whitespace).ok_or("a file without a name")?;
                module.files.insert(number.parse().map_err(|_| "a file without a number")?, path.trim_matches('"').into());
            } else if self.next_is(".section") {
                self.until('}')?; // for debuggers
            } else if [".version", ".target", ".address_size"].iter().any(|d| self.next_is(d)) {
                self.rest_of_line();
            } else if self.next_is(".visible") {
                if !self.next_is(".entry") {
                    return Err("a function that is no entry".into());
                }
                module.entries.push(self.entry()?);
            } else {
                module.shared.push(variable(self.until(';')?)?);
            }
        }
    }

    fn entry(&mut self) -> Outcome<Entry> {
        let mut entry = Entry { name: self.until('(')?.into(), ..Entry::default() };
        for parameter in self.until(')')?.split(',').filter(|p| !p.trim().is_empty()) {
            let (name, alignment, bytes) =
                declaration(parameter.trim().strip_prefix(".param").ok_or("a parameter of another space")?)?;
            let at = entry.parameter_bytes.next_multiple_of(alignment);
            entry.parameters.insert(name, at);
            entry.parameter_bytes = at + bytes;
        }
        self.until('{')?; // what an SM is to hold of it
        let mut depth = 0;
        loop {
            self.skip_space();
            if self.next_is(".loc") {
                let line = self.rest_of_line();
                let of = |text: &str| {
                    let mut numbers = text.split_whitespace().map_while(|n| n.parse().ok());
                    numbers.next().zip(numbers.next())
                };
                let places = line.split("inlined_at").map(|place| of(place).ok_or_else(|| format!("no place: {line}")));
                entry.body.push(Statement::Location(places.collect::<Outcome<_>>()?));
            } else if self.next_is("{") {
                depth += 1;
                entry.body.push(Statement::Open);
            } else if self.next_is("}") {
                if depth == 0 {
                    return Ok(entry);
                }
                depth -= 1;
                entry.body.push(Statement::Close);
            } else if let Some(label) = label(self.text) {
                self.advance(label.len() + 1);
                entry.body.push(Statement::Label(label.trim_start_matches('$').into()));
            } else {
                let statement = self.until(';')?;
                if let Some(registers) = statement.strip_prefix(".reg") {
                    entry.body.extend(declared_registers(registers)?);
                } else if statement.starts_with(".shared") {
                    entry.shared.push(variable(statement)?);
                } else if !statement.starts_with(".pragma") && !statement.is_empty() {
                    entry.body.push(Statement::Instruction(instruction(statement).map_err(|e| format!("{statement}: {e}"))?));
                }
            }
        }
    }
}

/// The label that a text begins with.
fn label(text: &str) -> Option<&str> {
    let end = text.find(|c: char| !(c.is_alphanumeric() || "$_".contains(c)))?;
    (end > 0 && text[end..].starts_with(':') && !text[end..].starts_with("::")).then_some(&text[..end])
}

fn size(kind: &str) -> Outcome<u32> {
    let bits = kind.trim_start_matches(|c: char| c == '.' || c.is_alphabetic());
    bits.parse::<u32>().map(|b| b / 8).map_err(|_| format!("{kind:?} is no type"))
}

/// `.align 4 .b8 name[16]` or `.u32 name`: name, alignment, bytes (0 for `[]`).
fn declaration(text: &str) -> Outcome<(String, u32, u32)> {
    let mut words: Vec<_> = text.split_whitespace().collect();
    let name = words.pop().ok_or("no name")?;
    let kind = size(words.pop().ok_or("no type")?)?;
    let alignment = match words[..] {
        [] => kind,
        [".align", n] => n.parse().map_err(|_| format!("{n:?} is no alignment"))?,
        _ => return Err(format!("{text:?} is no declaration")),
    };
    let Some((name, count)) = name.split_once('[') else { return Ok((name.into(), alignment, kind)) };
    let count = count.trim_end_matches(']');
    let count: u32 = if count.is_empty() { 0 } else { count.parse().map_err(|_| format!("{count:?} is no number"))? };
    Ok((name.into(), alignment, kind * count))
}

fn variable(text: &str) -> Outcome<Variable> {
    let external = text.strip_prefix(".extern").map(str::trim_start);
    let shared = external.unwrap_or(text).strip_prefix(".shared").ok_or(format!("{text:?} is not understood"))?;
    let (name, alignment, bytes) = declaration(shared)?;
    Ok(Variable { name, alignment, bytes: external.is_none().then_some(bytes) })
}

fn declared_registers(text: &str) -> Outcome<Vec<Statement>> {
    let (kind, names) = text.trim().split_once(char::is_whitespace).ok_or("no registers")?;
    let register = |name: &str| {
        let name = name.trim().trim_start_matches('%');
        let (name, count) = name.split_once('<').map_or((name, None), |(n, c)| (n, Some(c.trim_end_matches('>'))));
        let count = count.map(|c| c.parse().map_err(|_| format!("{c:?} is no number"))).transpose()?;
        Ok(Statement::Registers { kind: kind.trim_start_matches('.').into(), name: name.into(), count })
    };
    names.split(',').map(register).collect()
}

fn instruction(text: &str) -> Outcome<Instruction> {
    let (guard, text) = match text.strip_prefix('@') {
        None => (None, text),
        Some(text) => {
            let (register, rest) = text.split_once(char::is_whitespace).ok_or("no instruction")?;
            let negated = register.starts_with('!');
            (Some((register.trim_start_matches(['!', '%']).to_string(), negated)), rest.trim_start())
        }
    };
    let (name, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let name = name.replace("::", "_").split('.').map(String::from).collect();
    let operands = split_operands(operands).into_iter().map(operand).collect::<Outcome<_>>()?;
    Ok(Instruction { guard, name, operands })
}

/// At commas outside of braces.
fn split_operands(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(text[start..at].trim());
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    parts.retain(|p| !p.is_empty());
    parts
}

fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |d| (true, d));
    let value = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()? as i64,
        None => digits.parse::<u64>().ok()? as i64,
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

fn operand(text: &str) -> Outcome<Operand> {
    let bracketed = |open, close| text.strip_prefix(open).and_then(|t: &str| t.strip_suffix(close));
    if let Some(inner) = bracketed('{', '}') {
        return Ok(Operand::Vector(split_operands(inner).into_iter().map(operand).collect::<Outcome<_>>()?));
    }
    if let Some(inner) = bracketed('[', ']') {
        let (base, offset) = inner.split_once('+').unwrap_or((inner, "0"));
        let offset = integer(offset.trim()).ok_or(format!("{offset:?} is no offset"))?;
        return Ok(Operand::Address(Box::new(operand(base.trim())?), offset));
    }
    if let Some((a, b)) = text.split_once('|') {
        return Ok(Operand::Both(Box::new(operand(a)?), Box::new(operand(b)?)));
    }
    for (prefix, bits) in [("0f", 32), ("0d", 64)] {
        if let Some(hex) = text.strip_prefix(prefix) {
            return Ok(Operand::Float(u64::from_str_radix(hex, 16).map_err(|_| format!("{text:?} is no float"))?, bits));
        }
    }
    if let Some(n) = integer(text) {
        return Ok(Operand::Integer(n));
    }
    let special =
        ["%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid", "%warpid", "%lanemask", "%clock", "%smid", "%globaltimer"];
    if special.iter().any(|s| text.starts_with(s)) {
        return Ok(Operand::Special(text.trim_start_matches('%').replace('.', "_")));
    }
    let name = text.trim_start_matches(['%', '$']);
    match name.find(|c: char| !(c.is_alphanumeric() || "_$".contains(c))) {
        _ if text == "_" => Ok(Operand::Sink),
        None if !name.is_empty() => Ok(Operand::Name(name.into())),
        _ => Err(format!("{text:?} is no operand")),
    }
}
