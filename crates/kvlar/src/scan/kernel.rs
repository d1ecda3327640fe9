//! Which kernel serves a scan, and how it divides shared memory: the mirror of `kernels/scan`.

use super::ScanShape;
use crate::error::unsupported;
use crate::{Codec, DeviceInfo, Result};

/// How the keys are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Rows, codes or centroids meet tensor cores; the template's head dimension.
    Tiles(usize),
    /// Tables of scores in shared memory, with entries of so many heads.
    Tables(usize),
    /// Rows are decoded one by one.
    Decoded,
}

/// A kernel and its tile shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kernel {
    pub entry: &'static str,
    pub way: Way,
    /// Query heads of a tile.
    pub columns: usize,
    pub warps: usize,
    pub tile_rows: usize,
    pub stages: usize,
    pub stage_bytes: usize,
    /// Bytes into a stage of the ring.
    pub stage_params: usize,
    /// log2 of the 16-byte chunks of a row of codebook codes in shared memory.
    pub code_log: usize,
    pub shared: Shared,
}

/// Bytes into dynamic shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shared {
    pub bins: usize,
    pub tables: usize,
    pub queries: usize,
    pub bytes: usize,
}

/// Largest head dimension, as queries lie in shared memory.
const MAX_DIM: usize = crate::append::MAX_DIM;
/// Of a kernel, beside what it asks for; rounded up.
const STATIC_BYTES: usize = 1024;
/// CUDA's own share of each CTA.
const RESERVED_BYTES: usize = 1024;

impl Kernel {
    /// The cheapest that can serve a shape.
    pub fn of(s: &ScanShape, info: &DeviceInfo) -> Result<Self> {
        let fits = |k: &Self| k.shared.bytes + STATIC_BYTES <= info.shared_per_block as usize;
        // A ring of three tiles where there is room: fewer where an SM has about 100 KB of shared memory.
        let most = if info.shared_per_sm < 128 << 10 { 2 } else { 3 };
        for way in ways(s) {
            for stages in [most, 2] {
                let kernel = Self::new(s, way, stages);
                if fits(&kernel) {
                    return Ok(kernel);
                }
            }
        }
        unsupported("scan", format!("{:?} keys of {} values on {}", s.keys.codec, s.head_dim, info.name))
    }

    fn new(s: &ScanShape, way: Way, stages: usize) -> Self {
        let codec = s.keys.codec;
        let (columns, warps, entry) = match (way, s.group() > 8) {
            (Way::Tiles(64), false) => (8, 4, "kvlar_scan_d64_n8"),
            (Way::Tiles(64), true) => (16, 4, "kvlar_scan_d64_n16"),
            (Way::Tiles(128), false) => (8, 4, "kvlar_scan_d128_n8"),
            (Way::Tiles(128), true) => (16, 4, "kvlar_scan_d128_n16"),
            (Way::Tiles(_), _) => (8, 2, "kvlar_scan_d256_n8"),
            (Way::Tables(_), _) => (8, 4, "kvlar_scan_tables"),
            (Way::Decoded, _) => (8, 4, "kvlar_scan_decoded"),
        };
        let code_log =
            if codec == Codec::Pq { (s.keys.row_bytes(s.head_dim) / 16).next_power_of_two().ilog2() as usize } else { 0 };
        let row_bytes = match way {
            Way::Tiles(_) | Way::Tables(_) if codec == Codec::Pq => 16 << code_log,
            Way::Tiles(dim) => dim * codec.reference().bits() / 8,
            _ => 0,
        };
        // About 4 KB of a warp's tile, and no fewer than 32 rows.
        let wide = matches!(way, Way::Tiles(_)) && codec.dense().is_none() && 64 * row_bytes <= 4 << 10;
        let tile_rows = if wide { 64 } else { 32 };
        let stage_params = tile_rows * row_bytes;
        let params = if matches!(way, Way::Tiles(_)) && codec.reference().is_integer() { 4 * tile_rows } else { 0 };
        let stage_bytes = stage_params + params;
        let dim = if let Way::Tiles(dim) = way { dim } else { 0 };
        // Queries are prepared where the last stages will be (`Queries::kScratchFloats` in kernels/attend_quantized/queries.cuh).
        let prepared = 4 * (columns * dim / 2 + 3 * columns + warps * dim);
        let rings = (warps * (stages - 1) * stage_bytes + (warps * stage_bytes).max(prepared)).next_multiple_of(16);
        let tables = rings + if s.histogram { 4 * super::SCORE_BINS } else { 0 };
        let width = s.keys.group_of(s.head_dim);
        let table_bytes = match way {
            Way::Tables(heads) => 4 * heads * s.keys.centroids * (s.head_dim / width),
            Way::Tiles(_) if codec == Codec::Pq => 2 * width * (s.keys.centroids + 1) * (s.head_dim / width),
            _ => 0,
        };
        let queries = (tables + table_bytes).next_multiple_of(16);
        let bytes = queries + if matches!(way, Way::Tiles(_)) { 0 } else { 4 * columns * MAX_DIM };
        let shared = Shared { bins: rings, tables, queries, bytes };
        Self { entry, way, columns, warps, tile_rows, stages, stage_bytes, stage_params, code_log, shared }
    }

    /// CTAs that fit an SM: as many as the kernel was compiled for, and as its shared memory allows.
    pub fn ctas_per_sm(&self, info: &DeviceInfo) -> usize {
        let compiled = if matches!(self.way, Way::Tiles(64 | 256)) && self.columns == 8 { 3 } else { 2 };
        (info.shared_per_sm as usize / (self.shared.bytes + STATIC_BYTES + RESERVED_BYTES)).clamp(1, compiled)
    }
}

/// Ways to read a shape's keys, the cheapest first.
fn ways(s: &ScanShape) -> Vec<Way> {
    let (keys, d) = (s.keys, s.head_dim);
    let width = keys.group_of(d);
    let tiles = Way::Tiles([64, 128].into_iter().find(|&n| d <= n).unwrap_or(256));
    match keys.codec {
        Codec::Bf16 | Codec::F16 if keys.codec.dense() == Some(s.dtype) && !keys.hadamard => vec![tiles],
        Codec::Fp8 => vec![tiles],
        Codec::Int8 | Codec::Int4 | Codec::Int2 if width == d => vec![tiles],
        Codec::Pq => {
            // What a lookup reads decides: see kernels/scan/centroids.cuh.
            let heads = s.group().clamp(1, 8).next_power_of_two();
            let centroids = matches!(width, 2 | 4 | 8 | 16) && (d / width).is_multiple_of(4) && d.is_multiple_of(16);
            let (tables, tiles) = (Way::Tables(heads), centroids.then_some(tiles));
            let order = if 4 * heads < 2 * width { [Some(tables), tiles] } else { [tiles, Some(tables)] };
            order.into_iter().flatten().chain([Way::Decoded]).collect()
        }
        _ => vec![Way::Decoded],
    }
}
