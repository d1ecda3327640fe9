//! What low-rank attention plans are made from.

use super::RANK_MULTIPLE;
use super::layout::{self, EXACT_ROWS, LATENT_ROWS};
use super::plan::LowrankPlan;
use super::tiling::Tiling;
use crate::device::Launch;
use crate::error::{invalid, unsupported};
use crate::{AttendShape, Backend, Codec, Device, MAX_SEGMENTS, Result, Schedule, SegmentShape};

/// How key latents are stored, and in what arithmetic keys are rebuilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Latents {
    /// In the type of q, as is the basis.
    Dtype,
    /// int8 with a scale and zero a row; the basis is f16. Saves bytes; the tensor work is the same.
    Int8,
    /// int4, likewise; the reference backend alone has it so far.
    Int4,
    /// int8 latents and an int8 basis ([`kvlar_reference::Int8Basis`]): half the tensor work, for groups that are bound by
    /// it. The basis loses precision: about 0.4 % of a key.
    Int8Basis,
}

impl Latents {
    /// The codec of such latents, beside queries whose own is `native`.
    pub fn codec(self, native: Codec) -> Codec {
        match self {
            Self::Dtype => native,
            Self::Int8 | Self::Int8Basis => Codec::Int8,
            Self::Int4 => Codec::Int4,
        }
    }
}

/// Query rows that kernels take; the reference backend takes any number.
pub const MAX_QUERY_ROWS: usize = 8;

/// What values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LowrankValues {
    /// Rows of each kv head, in the type of q.
    Dense,
    /// Latents: v = value_basis · z. `codec` is the type of q, or int8 (with int8 key latents) with a scale and zero a row.
    Latent {
        /// rv; a multiple of 32.
        rank: usize,
        /// How they are stored.
        codec: Codec,
    },
}

/// Sizes of [`super::HeadSets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SetsShape {
    /// Sets: pairs of a key group and a value group that some head reads.
    pub count: usize,
    /// Heads of the largest.
    pub largest: usize,
    /// Hk.
    pub kv_heads: usize,
    /// Nk.
    pub key_groups: usize,
    /// Nv; 0 for dense values.
    pub value_groups: usize,
    /// Of the sets' sizes in order: layers share a work list only where these agree.
    pub sizes_hash: u64,
}

/// What [`LowrankPlan`] is made from. Start from [`LowrankShape::new`] and change fields.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LowrankShape {
    /// Queries, output, scale, masks and segments. A segment's codec is that of its exact rows, or of its key latents.
    pub attend: AttendShape,
    /// Which segments hold latents; the others hold exact rows (sinks, recent rows) in the type of q.
    pub latent_segments: [bool; MAX_SEGMENTS],
    /// rk: values of a key latent; a multiple of 32 ([`super::padded_rank`]).
    pub key_rank: usize,
    /// How key latents are stored.
    pub latents: Latents,
    /// Whether keys have a mean (k = basis · z + mean).
    pub key_mean: bool,
    /// What values are.
    pub values: LowrankValues,
    /// Whether latent rows have stored positions (after eviction, say); costs 4 KB of shared memory a warp.
    pub stored_positions: bool,
    /// Which heads read which latents.
    pub sets: SetsShape,
}

impl LowrankShape {
    /// One segment of latents of up to `max_rows` rows; `attend`'s segments are replaced.
    pub fn new(
        attend: AttendShape,
        max_rows: usize,
        key_rank: usize,
        latents: Latents,
        values: LowrankValues,
        sets: SetsShape,
    ) -> Self {
        let codec = latents.codec(attend.segments[0].map_or(Codec::Bf16, |s| s.keys.codec));
        Self {
            attend: AttendShape { segments: [Some(SegmentShape::new(codec, max_rows)), None, None, None], ..attend },
            latent_segments: [true, false, false, false],
            key_rank,
            latents,
            key_mean: false,
            values,
            stored_positions: false,
            sets,
        }
    }

    pub(super) fn value_rank(&self) -> usize {
        match self.values {
            LowrankValues::Dense => 0,
            LowrankValues::Latent { rank, .. } => rank,
        }
    }

    fn check(&self) -> Result<()> {
        let a = &self.attend;
        a.check()?;
        let native = Option::<Codec>::from(a.dtype);
        for (name, rank) in [
            ("key_rank", Some(self.key_rank)),
            ("value rank", Some(self.value_rank()).filter(|_| self.values != LowrankValues::Dense)),
        ] {
            if let Some(rank) = rank
                && (rank == 0 || !rank.is_multiple_of(RANK_MULTIPLE) || rank > 4096)
            {
                return invalid("rank", format!("{name} {rank} is not a multiple of {RANK_MULTIPLE} up to 4096"));
            }
        }
        if self.sets.kv_heads != a.kv_heads || self.sets.count == 0 {
            return invalid("sets", format!("they are of {} kv heads, q and the shape have {}", self.sets.kv_heads, a.kv_heads));
        }
        if let LowrankValues::Latent { codec, .. } = self.values {
            if self.sets.value_groups == 0 {
                return invalid("sets", "they name no value groups, but values are latents");
            }
            let integer = codec.reference().is_integer();
            if integer && Some(codec) != Some(self.latents.codec(codec)).filter(|_| self.latents != Latents::Dtype) {
                return unsupported("attend_lowrank", format!("{codec:?} value latents beside {:?} key latents", self.latents));
            }
            if !integer && Some(codec) != native {
                return unsupported(
                    "attend_lowrank",
                    format!("{codec:?} value latents for {} q: int8 or the type of q are", a.dtype),
                );
            }
        }
        let key_codec = native.map(|n| self.latents.codec(n));
        for (s, latent) in a.segments().zip(self.latent_segments) {
            let expected = if latent { key_codec } else { native };
            if Some(s.keys.codec) != expected {
                return unsupported(
                    "attend_lowrank",
                    format!("{:?} rows in a segment of {}", s.keys.codec, if latent { "latents" } else { "exact rows" }),
                );
            }
        }
        Ok(())
    }

    /// Validates, and picks the kernel, its grid, how shared memory is divided and how much scratch it needs.
    ///
    /// # Errors
    /// [`crate::Error::Unsupported`] for a combination without a kernel; [`crate::Error::Invalid`] for a contradiction.
    pub fn plan(&self, device: &Device) -> Result<LowrankPlan> {
        self.check()?;
        let (a, info) = (&self.attend, device.info());
        if device.backend() != Backend::Reference {
            self.latents.codec(Codec::Bf16).check_latent("attend_lowrank", device)?;
            if a.query_rows > MAX_QUERY_ROWS {
                return unsupported("attend_lowrank", format!("{} query rows: up to {MAX_QUERY_ROWS} are", a.query_rows));
            }
        }
        let columns_a_head = a.group() * a.query_rows;
        let rank = self.value_rank();
        let divide = |tiling: Tiling| {
            let slices = rank.div_ceil(tiling.width).max(1);
            let slice_width = if rank == 0 { a.value_dim } else { rank.div_ceil(slices).next_multiple_of(RANK_MULTIPLE) };
            let most_heads = (tiling.columns / columns_a_head.min(tiling.columns)).min(self.sets.largest);
            let layout = layout::choose(self, &tiling, slice_width, most_heads, info)?;
            Some((tiling, slices, slice_width, layout))
        };
        let first = Tiling::of(self.latents, columns_a_head, self.sets.largest, a.value_dim, rank);
        let mut chosen = divide(first);
        // Where shared memory has room for few heads, fewer columns leave room for more: latents are read less often.
        if let (Some((_, _, _, wide)), Some(narrow)) = (&chosen, first.narrower().and_then(divide))
            && wide.heads_per_tile * columns_a_head <= narrow.0.columns
            && narrow.3.heads_per_tile >= wide.heads_per_tile
        {
            chosen = Some(narrow);
        }
        let Some((tiling, slices, slice_width, layout)) = chosen else {
            return unsupported(
                "attend_lowrank",
                format!(
                    "ranks {} and {rank} within the {} bytes of shared memory of {}",
                    self.key_rank, info.shared_per_block, info.name
                ),
            );
        };
        let Some(entry) = tiling.entry(a.dtype) else {
            return unsupported("attend_lowrank", format!("type {} of q", a.dtype));
        };
        let query_tiles = if columns_a_head <= tiling.columns {
            self.sets.largest.div_ceil(layout.heads_per_tile)
        } else {
            self.sets.largest * columns_a_head.div_ceil(tiling.columns)
        };
        let units = a.seqs * self.sets.count * query_tiles;
        let max_tiles: usize = a
            .segments()
            .zip(self.latent_segments)
            .map(|(s, latent)| {
                if latent {
                    slices * s.max_rows.div_ceil(LATENT_ROWS)
                } else {
                    layout.heads_per_tile * s.max_rows.div_ceil(EXACT_ROWS)
                }
            })
            .sum();
        if units.saturating_mul(max_tiles.max(1)) > i32::MAX as usize {
            return invalid("segments", format!("{units} units of {max_tiles} tiles are more than 2^31"));
        }
        // A split is at least 16 tiles, and a unit has at most 64: functions of the capacity, never of the batch.
        let own_cell_tiles = match a.schedule {
            Schedule::Balanced => 0,
            Schedule::Own => max_tiles.div_ceil(64).max(16),
        };
        let ctas = info.sm_count as usize;
        let slots = match a.schedule {
            Schedule::Balanced => 2 * ctas,
            Schedule::Own => units * max_tiles.div_ceil(own_cell_tiles).max(1),
        };
        let grid = if units == 0 { 0 } else { ctas as u32 };
        let block = 32 * layout.shared.warp_count;
        Ok(LowrankPlan {
            shape: *self,
            tiling,
            launch: Launch { entry, grid, block, shared_bytes: layout.bytes as u32 },
            layout,
            slices,
            slice_width,
            query_tiles,
            units,
            slots,
            own_cell_tiles,
        })
    }
}
