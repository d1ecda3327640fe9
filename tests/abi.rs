//! The committed parameter structs are those of the header.

use kvlar::abi::*;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

const HEADER: &str = include_str!("../kernels/abi.h");
const GENERATED: &str = include_str!("../kernels/params.rs");

/// Names and sizes on the Rust side.
macro_rules! sizes {
    ($($name:ident),+ $(,)?) => { BTreeMap::from([$((stringify!($name), size_of::<$name>())),+]) };
}

fn sizes() -> BTreeMap<&'static str, usize> {
    sizes![
        KvlarAppend,
        KvlarAppendGroups,
        KvlarAppendLowrank,
        KvlarAttend,
        KvlarAttendCut,
        KvlarAttendLowrank,
        KvlarCompact,
        KvlarBudget,
        KvlarConformance,
        KvlarLatentSide,
        KvlarLowrankShared,
        KvlarFormat,
        KvlarKeep,
        KvlarMerge,
        KvlarPool,
        KvlarProject,
        KvlarProjection,
        KvlarProtect,
        KvlarReduce,
        KvlarRope,
        KvlarRows,
        KvlarScan,
        KvlarScore,
        KvlarScoreGate,
        KvlarScoreKeys,
        KvlarSegment,
        KvlarTopk,
        KvlarTopp,
        KvlarTranscode,
    ]
}

/// A struct of the header: its size, and its fields' offsets in order, laid out without any padding.
struct Packed {
    bytes: usize,
    fields: Vec<(&'static str, usize)>,
}

fn bytes_of(type_name: &str, known: &BTreeMap<&str, Packed>) -> usize {
    match type_name {
        "int32_t" | "uint32_t" | "float" => 4,
        "int64_t" | "uint64_t" | "double" => 8,
        pointer if pointer.starts_with("KVLAR_ADDR(") => 8,
        other => known.get(other).unwrap_or_else(|| panic!("{other} is no type that the structs may have")).bytes,
    }
}

/// Every struct of the header, by reading it.
fn packed() -> BTreeMap<&'static str, Packed> {
    let mut structs = BTreeMap::new();
    for text in HEADER.split("typedef struct {").skip(1) {
        let (body, rest) = text.split_once("\n} ").expect("an end");
        let name = rest.split_once(';').expect("a name").0;
        let mut found = Packed { bytes: 0, fields: Vec::new() };
        for line in body.lines() {
            let Some((field, _)) = line.split("//").next().and_then(|code| code.rsplit_once(';')) else { continue };
            let (type_name, field) = field.trim().rsplit_once(' ').expect("a type and a name");
            let (field, count) = match field.split_once('[') {
                None => (field, 1),
                Some((field, "KVLAR_MAX_SEGMENTS]")) => (field, KVLAR_MAX_SEGMENTS as usize),
                Some((field, n)) => (field, n.trim_end_matches(']').parse().expect("a number of elements")),
            };
            found.fields.push((field, found.bytes));
            found.bytes += count * bytes_of(type_name, &structs);
        }
        structs.insert(name, found);
    }
    structs
}

#[test]
fn the_parameter_structs_have_not_drifted_from_the_header() {
    let hash: String = Sha256::digest(HEADER).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(ABI_HASH, hash, "kernels/abi.h changed: run `cargo run -p kvlar-abi`");
}

#[test]
fn sizes_are_those_that_the_kernels_check() {
    let checks = HEADER.lines().filter_map(|l| l.strip_prefix("KVLAR_CHECK_SIZE(")?.strip_suffix(");")?.split_once(", "));
    let checked: BTreeMap<&str, usize> = checks.map(|(name, bytes)| (name, bytes.parse().expect("a size"))).collect();
    assert_eq!(sizes(), checked);
    let all: Vec<_> = packed().into_iter().map(|(name, p)| (name, p.bytes)).collect();
    assert_eq!(all, checked.into_iter().collect::<Vec<_>>(), "a struct that no kernel checks, or that has padding");
}

/// The generated code asserts offsets when it is compiled.
#[test]
fn offsets_are_those_of_the_fields_one_after_the_other() {
    let mut asserted: BTreeMap<&str, Vec<(&str, usize)>> = BTreeMap::new();
    for text in GENERATED.split("offset_of!(").skip(1) {
        let (path, rest) = text.split_once(") - ").expect("an assertion");
        let (name, field) = path.split_once(", ").expect("a field");
        let bytes = rest.split_once("usize]").expect("an offset").0;
        // A field named like a keyword of Rust has an underscore there.
        asserted.entry(name).or_default().push((field.trim_end_matches('_'), bytes.parse().expect("an offset")));
    }
    for (name, expected) in packed() {
        assert_eq!(asserted.remove(name), Some(expected.fields), "{name}");
    }
    assert!(asserted.is_empty(), "the header has no {asserted:?}");
}
