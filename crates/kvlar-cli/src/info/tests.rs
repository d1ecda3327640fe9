//! The listing of ops against the catalog of entry points, and against what launchers say they refuse.

use super::ops::{Op, ops};
use kvlar::{Device, SimtOptions};
use kvlar_kernels::ENTRIES;

fn of<'a>(ops: &'a [Op], name: &str) -> &'a Op {
    ops.iter().find(|o| o.name == name).unwrap_or_else(|| panic!("{name}"))
}

/// An entry point's op: behind its name comes nothing, a type, what quantized rows share, the schedule, how a scan reads
/// keys, or a part of a selection or of scores. So `kvlar_attend_lowrank_…` is none of `attend`.
fn op_of(entry: &str, ops: &[Op]) -> Option<&'static str> {
    let rest = entry.strip_prefix("kvlar_")?;
    let behind = [
        "_bf16",
        "_f16",
        "_quantized",
        "_channels",
        "_schedule",
        "_d",
        "_tables",
        "_pq",
        "_bins",
        "_cut",
        "_apply",
        "_lse",
        "_rows",
        "_any",
        "_layers",
        "_heads",
        "_scored",
    ];
    let variant = |r: &str| r.is_empty() || behind.iter().any(|v| r.starts_with(v));
    ops.iter().filter(|o| rest.strip_prefix(o.name).is_some_and(variant)).map(|o| o.name).max_by_key(|name| name.len())
}

#[test]
fn every_entry_point_is_of_an_op_that_is_listed() {
    let ops = ops(&Device::reference());
    let no_ops = ["ceiling", "conformance"];
    let of_ops = ENTRIES.iter().filter(|e| !no_ops.contains(&e.family) && e.name != "kvlar_decode");
    let found: Vec<_> = of_ops.map(|e| op_of(e.name, &ops).unwrap_or_else(|| panic!("{} is of no op", e.name))).collect();
    for op in &ops {
        // A scan that selects is a scan's entry point with more to do.
        let entry = if op.name == "scan_select" { "scan" } else { op.name };
        assert!(ENTRIES.is_empty() || found.contains(&entry), "{} has no entry point", op.name);
        assert!(!op.types.is_empty(), "{} has no type", op.name);
    }
}

#[test]
fn types_codecs_and_limits_are_those_of_the_launchers() {
    let all = ops(&Device::reference());
    for name in ["append", "append_lowrank", "attend", "attend_lowrank", "project", "scan", "score", "score_keys"] {
        assert_eq!(of(&all, name).types, "bf16, f16", "{name}");
        assert!(of(&all, name).limits.contains("head dimension to 256"), "{}", of(&all, name).limits);
    }
    assert_eq!(of(&all, "append").stored, "bf16, f16, fp8, int8, int4, int2, pq");
    let channels = "bf16, f16, fp8, int8, int4, int2, int4-channel, int2-channel";
    // Codebooks only where no kernel is needed.
    for name in ["append_groups", "attend", "encode", "scan"] {
        assert_eq!(of(&all, name).stored, format!("{channels}, pq"), "{name}");
    }
    assert_eq!(of(&all, "compact").stored, "bf16, f16, fp8, int8, int4, int2, pq");
    assert!(of(&all, "compact").limits.contains("rows to 32768 bytes"), "{}", of(&all, "compact").limits);
    assert_eq!(of(&all, "append_lowrank").stored, "bf16, f16, int8, int4");
    assert_eq!(of(&all, "encode").types, "bf16, f16, f32");
    assert_eq!(of(&all, "score_gate").types, "bf16, f16");
    assert_eq!(of(&all, "attend_lowrank").stored, "latents dtype, int8, int8basis, int4");
    assert!(of(&all, "attend_lowrank").limits.contains("any query rows"));
    for name in ["append_lowrank", "project"] {
        assert!(of(&all, name).limits.contains("rank to 4096"), "{}", of(&all, name).limits);
    }
    assert!(of(&all, "project").limits.contains("bf16 rows to bf16, f32"), "{}", of(&all, "project").limits);
}

#[test]
fn kernels_have_no_int4_latents_and_a_bound_of_query_rows() {
    let device = match Device::simt(SimtOptions::default()) {
        Ok(device) => device,
        Err(e) => return eprintln!("skipped: {e}"),
    };
    let all = ops(&device);
    assert_eq!(of(&all, "attend").stored, "bf16, f16, fp8, int8, int4, int2, int4-channel, int2-channel");
    assert_eq!(of(&all, "append_lowrank").stored, "bf16, f16, int8");
    assert_eq!(of(&all, "attend_lowrank").stored, "latents dtype, int8, int8basis");
    assert!(of(&all, "attend_lowrank").limits.contains("query rows to 8"), "{}", of(&all, "attend_lowrank").limits);
}
