//! How a CTA's shared memory is divided: decided here, told to the kernel.

use super::shape::{Latents, LowrankShape, LowrankValues};
use super::tiling::Tiling;
use crate::{Codec, DeviceInfo, abi};

/// Rows of a latent tile and of an exact one: those of `kernels/attend_lowrank/unit.cuh`.
pub(super) const LATENT_ROWS: usize = 32;
pub(super) const EXACT_ROWS: usize = 16;
const MAX_WARPS: usize = 8;
/// Splits whose factors lie in shared memory while they are merged: `Merge::kSplitsAtOnce` in `kernels/attend_lowrank/merge.cuh`.
const SPLITS_AT_ONCE: usize = 32;
/// With fewer warps than this, it is better to serve fewer heads at a time, or to leave the bases in global memory.
const ENOUGH_WARPS: usize = 4;
/// The kernel's static shared memory (its unit), and what CUDA keeps of a block's.
const RESERVED: usize = 2048;

/// A division that fits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Layout {
    pub shared: abi::KvlarLowrankShared,
    pub bytes: usize,
    pub heads_per_tile: usize,
}

/// Bytes of one 16-bit row of `dim` values in shared memory.
fn wide_row(dim: usize) -> usize {
    64 * dim.div_ceil(32)
}

/// The most heads a tile and then the most warps that fit; `None` if nothing does.
pub(super) fn choose(
    shape: &LowrankShape,
    tiling: &Tiling,
    slice_width: usize,
    most_heads: usize,
    info: &DeviceInfo,
) -> Option<Layout> {
    let room = (info.shared_per_block as usize).saturating_sub(RESERVED);
    let fits = |resident: bool, heads: usize, fewest: usize| {
        (fewest..=MAX_WARPS)
            .rev()
            .map(|warps| divide(shape, tiling, slice_width, heads, warps, resident))
            .find(|l| l.bytes <= room)
    };
    let fewer = std::iter::successors(Some(most_heads), |&h| (h > 1).then(|| h.div_ceil(2)));
    fewer
        .clone()
        .find_map(|heads| fits(true, heads, ENOUGH_WARPS))
        .or_else(|| fewer.clone().find_map(|heads| fits(false, heads, ENOUGH_WARPS)))
        .or_else(|| fewer.clone().find_map(|heads| fits(false, heads, 1)))
}

fn divide(s: &LowrankShape, tiling: &Tiling, slice_width: usize, heads: usize, warps: usize, resident: bool) -> Layout {
    let (d, dv) = (s.attend.head_dim, s.attend.value_dim);
    let int8 = s.latents != Latents::Dtype;
    let padded_dim = d.next_multiple_of(32);
    let basis_row = s.key_rank * if s.latents == Latents::Int8Basis { 1 } else { 2 };
    let mut at = 0;
    let mut take = |bytes: usize| {
        let start = at;
        at += bytes.next_multiple_of(16);
        start as u32
    };
    let basis = take(if resident { heads * padded_dim * basis_row } else { 0 });
    let basis_sums = take(if int8 { 4 * heads * padded_dim } else { 0 });
    let means = take(if s.key_mean { 4 * heads * padded_dim } else { 0 });
    let turns = take(padded_dim / 32 * 8 * 32 * 16);
    let tile_queries = padded_dim / 32 * (tiling.columns / 8) * 32 * 16;
    let queries = take(tile_queries);
    let fixed = at;

    let keys = (LATENT_ROWS * s.key_rank * if int8 { 1 } else { 2 }).max(EXACT_ROWS * wide_row(d));
    let latent_values = match s.values {
        LowrankValues::Dense => heads * LATENT_ROWS * wide_row(dv),
        LowrankValues::Latent { codec, .. } => LATENT_ROWS * slice_width * if codec == Codec::Int8 { 1 } else { 2 },
    };
    let values = latent_values.max(EXACT_ROWS * wide_row(dv));
    let params = if int8 { 4 * LATENT_ROWS } else { 0 };
    let stage = keys + values + 2 * params + 4 * LATENT_ROWS + 16; // positions, and where the rows are
    // In front of a warp's queries: angles of a tile's first row; turns of 32 rows and 16 pairs where positions are stored.
    let warp_queries = (padded_dim / 2 * 8).max(if s.stored_positions { 8 * 32 * 16 } else { 0 });
    let warp_ring = warp_queries + tile_queries;
    // The rings' memory is also what warps and splits are merged in.
    let latent_width = match s.values {
        LowrankValues::Dense => dv,
        LowrankValues::Latent { rank, .. } => rank,
    };
    let merge_warps = 4 * warps * tiling.columns * (tiling.width + 4 + 2);
    let phases = 1 + s.value_rank().div_ceil(tiling.width).max(1);
    let merge_splits = 4 * tiling.columns * (dv + latent_width + 2 + SPLITS_AT_ONCE * phases);
    let warp_bytes = (warp_ring + 2 * stage).max(merge_warps.max(merge_splits).div_ceil(warps)).next_multiple_of(128);
    let shared = abi::KvlarLowrankShared {
        basis,
        basis_sums,
        means,
        turns,
        queries,
        warps: fixed as u32,
        warp_bytes: warp_bytes as u32,
        warp_queries: warp_queries as u32,
        warp_ring: warp_ring as u32,
        stage_bytes: stage as u32,
        stage_values: keys as u32,
        stage_key_params: (keys + values) as u32,
        stage_value_params: (keys + values + params) as u32,
        stage_positions: (keys + values + 2 * params) as u32,
        warp_count: warps as u32,
        resident: u32::from(resident),
    };
    Layout { shared, bytes: fixed + warps * warp_bytes, heads_per_tile: heads }
}
