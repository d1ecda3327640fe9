//! Which kernel serves a shape, and its tile shapes: the mirror of `kernels/attend/tiles.cuh` and
//! `kernels/attend_quantized/`, to which a test of the ledger holds it.

use super::SegmentShape;
use crate::{Codec, DeviceInfo, Dtype};

/// What rows there are beside those that are stored as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// None.
    Dense,
    /// Keys and values with a scale and zero a row, or fp8.
    TokenWise,
    /// Channel-wise keys, and values with so many scales and zeros a row.
    ChannelWise { value_scales: usize },
}

/// One template instantiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Head dimension of the template: 64, 128 or 256.
    pub dim: usize,
    /// Packed (query row, head) columns a query tile: 8 or 16.
    pub columns: usize,
    /// What it attends over.
    pub rows: Rows,
}

/// Where the parts of a tile lie in a stage of the ring; bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stage {
    pub values: usize,
    pub key_params: usize,
    pub value_params: usize,
    pub positions: usize,
    pub bytes: usize,
}

/// What kernels serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Serves {
    Dense(Dtype),
    TokenWise,
    ChannelWise,
}

/// The attend kernels, by template head dimension and columns; those of quantized rows serve both types of q.
const ENTRIES: [(Serves, usize, usize, &str); 18] = [
    (Serves::Dense(Dtype::Bf16), 64, 8, "kvlar_attend_bf16_d64_n8"),
    (Serves::Dense(Dtype::Bf16), 64, 16, "kvlar_attend_bf16_d64_n16"),
    (Serves::Dense(Dtype::Bf16), 128, 8, "kvlar_attend_bf16_d128_n8"),
    (Serves::Dense(Dtype::Bf16), 128, 16, "kvlar_attend_bf16_d128_n16"),
    (Serves::Dense(Dtype::Bf16), 256, 8, "kvlar_attend_bf16_d256_n8"),
    (Serves::Dense(Dtype::F16), 64, 8, "kvlar_attend_f16_d64_n8"),
    (Serves::Dense(Dtype::F16), 64, 16, "kvlar_attend_f16_d64_n16"),
    (Serves::Dense(Dtype::F16), 128, 8, "kvlar_attend_f16_d128_n8"),
    (Serves::Dense(Dtype::F16), 128, 16, "kvlar_attend_f16_d128_n16"),
    (Serves::Dense(Dtype::F16), 256, 8, "kvlar_attend_f16_d256_n8"),
    (Serves::TokenWise, 64, 8, "kvlar_attend_quantized_d64_n8"),
    (Serves::TokenWise, 64, 16, "kvlar_attend_quantized_d64_n16"),
    (Serves::TokenWise, 128, 8, "kvlar_attend_quantized_d128_n8"),
    (Serves::TokenWise, 128, 16, "kvlar_attend_quantized_d128_n16"),
    (Serves::TokenWise, 256, 8, "kvlar_attend_quantized_d256_n8"),
    (Serves::ChannelWise, 64, 8, "kvlar_attend_quantized_channels_d64_n8"),
    (Serves::ChannelWise, 128, 8, "kvlar_attend_quantized_channels_d128_n8"),
    (Serves::ChannelWise, 256, 8, "kvlar_attend_quantized_channels_d256_n8"),
];

/// The attend_cut kernels, likewise.
const CUT_ENTRIES: [(Dtype, usize, usize, &str); 10] = [
    (Dtype::Bf16, 64, 8, "kvlar_attend_cut_bf16_d64_n8"),
    (Dtype::Bf16, 64, 16, "kvlar_attend_cut_bf16_d64_n16"),
    (Dtype::Bf16, 128, 8, "kvlar_attend_cut_bf16_d128_n8"),
    (Dtype::Bf16, 128, 16, "kvlar_attend_cut_bf16_d128_n16"),
    (Dtype::Bf16, 256, 8, "kvlar_attend_cut_bf16_d256_n8"),
    (Dtype::F16, 64, 8, "kvlar_attend_cut_f16_d64_n8"),
    (Dtype::F16, 64, 16, "kvlar_attend_cut_f16_d64_n16"),
    (Dtype::F16, 128, 8, "kvlar_attend_cut_f16_d128_n8"),
    (Dtype::F16, 128, 16, "kvlar_attend_cut_f16_d128_n16"),
    (Dtype::F16, 256, 8, "kvlar_attend_cut_f16_d256_n8"),
];

/// Bits of a stored value.
fn bits(codec: Codec) -> usize {
    codec.reference().bits()
}

impl Tiling {
    /// The narrowest kernel that holds the dimensions; 16 columns only where more than 8 are in use (channel-wise: 8, for
    /// registers).
    pub fn of(dim: usize, packed_columns: usize, rows: Rows) -> Self {
        let dim = [64, 128].into_iter().find(|&d| dim <= d).unwrap_or(256);
        let wide = packed_columns > 8 && dim < 256 && !matches!(rows, Rows::ChannelWise { .. });
        Self { dim, columns: if wide { 16 } else { 8 }, rows }
    }

    pub fn entry(&self, dtype: Dtype) -> Option<&'static str> {
        let serves = match self.rows {
            Rows::Dense => Serves::Dense(dtype),
            Rows::TokenWise => Serves::TokenWise,
            Rows::ChannelWise { .. } => Serves::ChannelWise,
        };
        ENTRIES.iter().find(|e| (e.0, e.1, e.2) == (serves, self.dim, self.columns)).map(|e| e.3)
    }

    /// The activation type of an entry point; `Some(None)` where its parameters say it.
    pub fn dtype_of(entry: &str) -> Option<Option<Dtype>> {
        let dtype = |serves| if let Serves::Dense(dtype) = serves { Some(dtype) } else { None };
        ENTRIES.iter().find(|e| e.3 == entry).map(|e| dtype(e.0))
    }

    /// The kernel over selected rows; rows are those of the type of q.
    pub fn cut_entry(&self, dtype: Dtype) -> Option<&'static str> {
        let serves = (dtype, self.dim, self.columns);
        CUT_ENTRIES.iter().find(|e| self.rows == Rows::Dense && (e.0, e.1, e.2) == serves).map(|e| e.3)
    }

    /// The activation type of such an entry point.
    pub fn cut_dtype_of(entry: &str) -> Option<Dtype> {
        CUT_ENTRIES.iter().find(|e| e.3 == entry).map(|e| e.0)
    }

    /// Neighbouring value dimensions of a lane: they share a scale and zero.
    pub fn value_run(&self) -> usize {
        if self.dim == 64 { 8 } else { 16 }
    }

    pub fn warps(&self) -> usize {
        if self.dim == 256 { 2 } else { 4 }
    }

    /// Rows that a warp takes at a time: about 8 KB of keys and values, and no fewer than 32 of codes.
    pub fn tile_rows(&self, segment: &SegmentShape) -> usize {
        if segment.is_dense() {
            return if self.dim == 64 { 32 } else { 16 };
        }
        let row = self.dim * (bits(segment.keys.codec) + bits(segment.values.codec)) / 8;
        if 64 * row <= 8 << 10 { 64 } else { 32 }
    }

    pub fn stage(&self, segment: &SegmentShape) -> Stage {
        let rows = self.tile_rows(segment);
        let side = |codec: Codec| rows * self.dim * bits(codec) / 8;
        let (keys, values) = (segment.keys.codec, segment.values.codec);
        let params = |codec: Codec, scales: usize| if codec.reference().is_integer() { 4 * rows * scales } else { 0 };
        let (of_keys, of_values) = match self.rows {
            Rows::ChannelWise { value_scales } if !segment.is_dense() => (4 * self.dim * rows / 32, params(values, value_scales)),
            _ => (params(keys, 1), params(values, 1)),
        };
        let key_params = side(keys) + side(values);
        let value_params = key_params + of_keys;
        let positions = value_params + of_values;
        Stage { values: side(keys), key_params, value_params, positions, bytes: positions + 4 * rows }
    }

    /// Bytes of a stage that holds a tile of any of the segments.
    pub fn stage_bytes(&self, segments: impl Iterator<Item = SegmentShape>) -> usize {
        segments.map(|s| self.stage(&s).bytes).max().unwrap_or(0)
    }

    /// Dynamic shared memory of a CTA: a ring of tiles for each warp, and at least what the merge of warps needs.
    pub fn shared_bytes(&self, stage_bytes: usize, info: &DeviceInfo) -> usize {
        (self.warps() * self.stages(info) * stage_bytes).max(self.warps() * self.columns * (self.dim + 6) * 4)
    }

    /// Tiles a warp keeps in its ring: fewer where an SM has about 100 KB of shared memory (sm_86, sm_89, sm_120).
    pub fn stages(&self, info: &DeviceInfo) -> usize {
        if info.shared_per_sm < 128 << 10 { 2 } else { 3 }
    }
}

/// CTAs that fit an SM: two where their shared memory does (CUDA keeps 1 KB of each).
pub(crate) fn ctas_per_sm(shared_bytes: usize, info: &DeviceInfo) -> usize {
    if 2 * (shared_bytes + 1024 + 512) <= info.shared_per_sm as usize { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_the_build_is_reachable_and_exists() {
        let families = ["attend", "attend_quantized", "attend_cut"];
        let built = kvlar_kernels::ENTRIES.iter().filter(|e| families.contains(&e.family)).map(|e| e.name);
        let mut built: Vec<_> = built.filter(|n| *n != "kvlar_attend_schedule").collect();
        let mut known: Vec<_> = ENTRIES.iter().map(|e| e.3).chain(CUT_ENTRIES.iter().map(|e| e.3)).collect();
        built.sort_unstable();
        known.sort_unstable();
        assert_eq!(built, known);
    }

    /// Where queries are prepared: `kLeastStage` of `kernels/attend_quantized/rows.cuh`.
    #[test]
    fn no_stage_of_codes_is_smaller_than_the_kernels_take_for_granted() {
        for dim in [64, 128, 256] {
            for codec in Codec::ALL.into_iter().filter(|c| c.dense().is_none() && *c != Codec::Pq) {
                for rows in [Rows::TokenWise, Rows::ChannelWise { value_scales: dim / 32 }] {
                    let tiling = Tiling { dim, columns: 8, rows };
                    let segment = SegmentShape { keys: codec.into(), values: codec.into(), max_rows: 1 };
                    assert!(tiling.stage(&segment).bytes >= 32 * dim, "{dim} {codec:?} {rows:?}");
                }
            }
        }
    }

    #[test]
    fn shared_memory_matches_the_headers_figures() {
        let info = crate::Device::reference().info().clone();
        let shared = |dim, columns, keys: Codec, values: Codec, info: &DeviceInfo| {
            let rows = match keys {
                Codec::Int4Channel | Codec::Int2Channel => Rows::ChannelWise { value_scales: dim / 32 },
                _ if keys.dense().is_some() => Rows::Dense,
                _ => Rows::TokenWise,
            };
            let tiling = Tiling { dim, columns, rows };
            let segment = SegmentShape { keys: keys.into(), values: values.into(), max_rows: 1 };
            tiling.shared_bytes(tiling.stage(&segment).bytes, info)
        };
        assert_eq!(shared(128, 8, Codec::Bf16, Codec::Bf16, &info), 4 * 3 * (8192 + 64));
        assert_eq!(shared(256, 8, Codec::Int8, Codec::Int8, &info), 2 * 3 * (16384 + 8 * 32 + 4 * 32));
        assert_eq!(shared(128, 8, Codec::Int4, Codec::Int4, &info), 4 * 3 * (8192 + 12 * 64));
        assert_eq!(shared(128, 8, Codec::Int8, Codec::Int4, &info), 4 * 3 * (6144 + 12 * 32));
        assert_eq!(shared(128, 8, Codec::Fp8, Codec::Fp8, &info), 4 * 3 * (8192 + 4 * 32));
        let kivi = shared(128, 8, Codec::Int2Channel, Codec::Int2, &info);
        assert_eq!(kivi, 4 * 3 * (4096 + 2 * 512 + 64 * (4 * 4 + 4)));
        let ada = DeviceInfo { compute_capability: Some((8, 9)), shared_per_sm: 100 << 10, shared_per_block: 99 << 10, ..info };
        for (dim, columns) in [(64, 8), (64, 16), (128, 8), (128, 16), (256, 8)] {
            for codec in Codec::ALL {
                assert!(shared(dim, columns, codec, codec, &ada) <= ada.shared_per_block as usize, "{dim} {codec:?}");
            }
        }
    }
}
