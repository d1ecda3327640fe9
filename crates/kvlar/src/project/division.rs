//! How the projection of one group's rows is divided among warps and CTAs.

use crate::abi;

/// Warps that multiply, of a CTA.
const WARPS: usize = 8;
/// Ranks of a warp's tile.
const TILE_RANKS: usize = 32;
/// Tokens up to which the kernels of 16 tokens a warp run: they read the encoder once for 16 tokens, in more CTAs.
const FEW_TOKENS: usize = 256;

/// Parameters of the kernels: see `KvlarProjection`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Division {
    pub rank_warps: usize,
    pub sum_warps: usize,
    pub row_blocks: usize,
    pub parts: usize,
    groups: usize,
    stored: usize,
    few: bool,
}

impl Division {
    /// Whether the kernels of 16 tokens a warp run.
    pub fn few(tokens: usize) -> bool {
        tokens <= FEW_TOKENS
    }

    /// Of `tokens` rows of `groups` groups, each `width` values to `rank`; `whole_rows`: a row is encoded as a whole.
    pub fn new(tokens: usize, groups: usize, width: usize, rank: usize, whole_rows: bool) -> Self {
        let few = Self::few(tokens);
        let tiles = rank.div_ceil(TILE_RANKS);
        let (rank_warps, sum_warps) = if few {
            // A lane has at most four blocks of 32 values at a time in flight: more would wait for each other.
            let sums = width.div_ceil(32 * 4).next_power_of_two().min(WARPS);
            let ranks = tiles.next_power_of_two().min(WARPS / sums);
            (ranks, WARPS / ranks)
        } else {
            (tiles.next_power_of_two().min(4), 1)
        };
        let rows = if few { 16 } else { 64 } * (WARPS / (rank_warps * sum_warps));
        let parts = if whole_rows && !few { 1 } else { tiles.div_ceil(rank_warps) };
        let stored = tiles * TILE_RANKS;
        Self { rank_warps, sum_warps, row_blocks: tokens.div_ceil(rows), parts, groups, stored, few }
    }

    pub fn ctas(&self) -> usize {
        self.groups * self.row_blocks * self.parts
    }

    /// Latents of which CTAs have parts, where a row is encoded as a whole: f32 values, and counters.
    pub fn scratch(&self) -> (usize, usize) {
        if self.parts == 1 || !self.few {
            return (0, 0);
        }
        (self.groups * self.row_blocks * 16 * self.stored, self.groups * self.row_blocks)
    }

    /// The kernels' struct with everything but addresses and strides.
    pub fn bare(&self, [groups, size, dim, rank]: [usize; 4]) -> abi::KvlarProjection {
        abi::KvlarProjection {
            groups: groups as u32,
            size: size as u32,
            dim: dim as u32,
            rank: rank as u32,
            rank_warps: self.rank_warps as u32,
            sum_warps: self.sum_warps as u32,
            row_blocks: self.row_blocks as u32,
            parts: self.parts as u32,
            ..Default::default()
        }
    }
}
