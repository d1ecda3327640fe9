//! Instructions of attention over quantized rows, for each pair of formats: `kernels/ledger/pairs.json`.
//!
//! One kernel serves all pairs and branches a tile, so that no path through it is one pair's alone. Here a template says the
//! pair instead of the parameters, and the path of a whole tile is looked for (`path.rs`): its copies, page lookups and
//! products, no mask, no cap, no new maximum. What it costs beside the bytes of the rows can be known without a GPU.
//!
//! Measuring compiles for half a minute; checking compares a digest of the sources.

use crate::compile::{BuildFlags, Toolchain, digest};
use crate::model::{ISSUE_RATE, MODELLED, READ_RATE};
use crate::path::{Graph, Work};
use crate::sass::{self, Instruction};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::process::Command;

/// `kernels/ledger/pairs.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pairs {
    /// `nvcc 13.0.88`.
    pub compiler: String,
    /// Of the sources.
    pub digest: String,
    /// For 128 dimensions, up to 8 packed columns, on the architecture of the model.
    pub pairs: Vec<PairFacts>,
}

/// What a pair costs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairFacts {
    /// `int4-int2`: keys, values.
    pub formats: String,
    pub registers: u32,
    /// Warp instructions of the fast path of a tile.
    pub tile: u32,
    /// Rows of a tile.
    pub rows: u32,
    /// Thread instructions for each number of a key and of a value.
    pub per_element: f64,
    /// Of the rows' bytes over 128K rows of 8 kv heads, microseconds.
    pub floor: f64,
    /// To issue the instructions, likewise.
    pub issue: f64,
    /// Of the floor.
    pub issue_percent: f64,
}

const DIM: u32 = 128;

/// A format of keys or values.
#[derive(Clone, Copy)]
struct Side {
    name: &'static str,
    codec: &'static str,
    bits: u32,
    /// Bytes of scales and zeros a row.
    params: u32,
}

const fn side(name: &'static str, codec: &'static str, bits: u32, params: u32) -> Side {
    Side { name, codec, bits, params }
}

const FP8: Side = side("fp8", "FP8", 8, 0);
const INT8: Side = side("int8", "INT8", 8, 4);
const INT4: Side = side("int4", "INT4", 4, 4);
const INT2: Side = side("int2", "INT2", 2, 4);
// Groups of 32 rows, or of 32 values.
const INT4_CHANNEL: Side = side("int4-channel-g32", "INT4_CHANNEL", 4, 16);
const INT2_CHANNEL: Side = side("int2-channel-g32", "INT2_CHANNEL", 2, 16);
const INT4_GROUPS: Side = side("int4-g32", "INT4", 4, 16);
const INT2_GROUPS: Side = side("int2-g32", "INT2", 2, 16);

const PAIRS: [(Side, Side); 8] = [
    (FP8, FP8),
    (INT8, INT8),
    (INT8, INT4),
    (INT4, INT4),
    (INT4, INT2),
    (INT2, INT2),
    (INT4_CHANNEL, INT4_GROUPS),
    (INT2_CHANNEL, INT2_GROUPS),
];

/// Sources that decide what the pairs' code is.
const SOURCES: [&str; 3] = ["attend/attend.cuh", "attend_quantized/warp.cuh", "attend_quantized/channels.cuh"];

fn is_channel_wise(keys: Side) -> bool {
    keys.codec.ends_with("CHANNEL")
}

/// Rows of a tile: as crates/kvlar/src/attend/tiling.rs chooses.
fn tile_rows(keys: Side, values: Side) -> u32 {
    if 64 * DIM * (keys.bits + values.bits) / 8 <= 8 << 10 { 64 } else { 32 }
}

/// What the fast path of a tile executes.
fn work(keys: Side, values: Side) -> Work {
    let rows = tile_rows(keys, values);
    let steps = DIM / 16;
    // For 32 rows: scores and values of each 16; beside, a sum of weights (codes of values begin at 1024), or zeros of channels.
    let beside = if is_channel_wise(keys) { steps } else { 2 * u32::from(values.params > 0) };
    let copies = |side: Side| rows * DIM * side.bits / 8 / 16 / 32;
    // Scales and zeros, 4 bytes at a time; those of channels are copied in 16.
    let words = |side: Side| rows * side.params / 4 / 32;
    Work {
        mma: rows / 32 * (4 * steps + beside),
        row_copies: copies(keys) + copies(values),
        word_copies: words(values) + if is_channel_wise(keys) { 0 } else { words(keys) },
        lookups: 1,
    }
}

fn entry(keys: Side, values: Side) -> String {
    format!("pair_{}_{}", keys.codec, values.codec)
}

/// The source of all pairs.
fn source() -> String {
    let mut text: String = SOURCES.iter().map(|s| format!("#include \"{s}\"\n")).collect();
    for (keys, values) in PAIRS {
        let warp = if is_channel_wise(keys) { "WarpChannels<128, " } else { "WarpQuantized<128, 1, " };
        let (k, v) = (keys.codec, values.codec);
        text += &format!(
            "KVLAR_ATTEND_ENTRY({}, kvlar::attend_quantized::{warp}KVLAR_CODEC_{k}, KVLAR_CODEC_{v}>)\n",
            entry(keys, values)
        );
    }
    text
}

/// Of the sources, flags and what is measured.
fn digest_of(kernels: &Path, build: &BuildFlags) -> String {
    digest(kernels, &SOURCES, &format!("{}{:?}", source(), build.flags))
}

/// Compiles the pairs and counts; shows `each` pair's formats and the instructions counted.
///
/// # Errors
/// What does not compile, spills, or has no path that does a tile's work.
pub fn measure(
    tools: &Toolchain,
    build: &BuildFlags,
    kernels: &Path,
    cache: &Path,
    each: impl Fn(&str, &[&Instruction]),
) -> Result<Pairs, String> {
    fs::create_dir_all(cache).map_err(|e| format!("{}: {e}", cache.display()))?;
    let (text, cubin) = (cache.join("pairs.cu"), cache.join("pairs.cubin"));
    fs::write(&text, source()).map_err(|e| format!("{}: {e}", text.display()))?;
    let mut nvcc: Command = tools.nvcc(build, kernels, &build.ptx, &format!("sm_{MODELLED}"));
    let report = crate::compile::run(nvcc.args(["-Xptxas", "-v", "-cubin"]).arg(&text).arg("-o").arg(&cubin))?;
    let usages = sass::usages(&tools.cuobjdump("-res-usage", &cubin)?);
    let spills = sass::spills(&(report.0 + &report.1));
    let mut bodies = sass::functions(&sass::without_encodings(&tools.cuobjdump("-sass", &cubin)?));
    let mut pairs = Vec::new();
    for (keys, values) in PAIRS {
        let name = entry(keys, values);
        let formats = format!("{}, {}", keys.name, values.name);
        let missing = || format!("{formats}: not in what was compiled");
        let body = bodies.remove(&name).ok_or_else(missing)?;
        let registers = usages.get(&name).ok_or_else(missing)?.registers;
        if spills.get(&name).ok_or_else(missing)? != &(0, 0) {
            return Err(format!("{formats}: spills"));
        }
        let graph = Graph::new(body).map_err(|e| format!("{formats}: {e}"))?;
        let need = work(keys, values);
        let loops = graph.tile_loops();
        let path = loops.iter().filter_map(|l| graph.fast_path(l, need)).min_by_key(Vec::len);
        let path = path.ok_or_else(|| format!("{formats}: no loop has a path that does {need:?}"))?;
        each(&formats, &path);
        let tile = path.len() as u32;
        let (rows, all) = (tile_rows(keys, values), f64::from(128 * 1024 * 8));
        let row_bytes = DIM * (keys.bits + values.bits) / 8 + keys.params + values.params;
        let round = |x: f64, digits: i32| (x * 10f64.powi(digits)).round() / 10f64.powi(digits);
        let (floor, issue) =
            (1e6 * all * f64::from(row_bytes) / READ_RATE, 1e6 * all / f64::from(rows) * f64::from(tile) / ISSUE_RATE);
        pairs.push(PairFacts {
            formats,
            registers,
            tile,
            rows,
            per_element: round(f64::from(32 * tile) / f64::from(rows * 2 * DIM), 2),
            floor: round(floor, 1),
            issue: round(issue, 1),
            issue_percent: round(100.0 * issue / floor, 1),
        });
    }
    Ok(Pairs { compiler: tools.compiler.clone(), digest: digest_of(kernels, build), pairs })
}

/// Whether the committed figures are those of the sources as they are; else, why not.
pub fn check(tools: &Toolchain, build: &BuildFlags, kernels: &Path) -> Result<Pairs, String> {
    let stale = |what: &str| format!("kernels/ledger/pairs.json {what}: write it with --pairs");
    let text = fs::read_to_string(kernels.join("ledger/pairs.json")).map_err(|_| stale("is missing"))?;
    let pairs: Pairs = serde_json::from_str(&text).map_err(|e| stale(&e.to_string()))?;
    if pairs.compiler != tools.compiler {
        return Err(stale(&format!("is of {}", pairs.compiler)));
    }
    if pairs.digest != digest_of(kernels, build) {
        return Err(stale("is of other sources"));
    }
    Ok(pairs)
}
