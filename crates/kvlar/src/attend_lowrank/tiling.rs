//! Which kernel serves a shape.

use super::Latents;
use crate::Dtype;

/// One template instantiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Values that accumulators hold: 128 or 256.
    pub width: usize,
    /// Packed columns a query tile: 8 or 16.
    pub columns: usize,
    pub latents: Latents,
}

const fn tiling(width: usize, columns: usize, latents: Latents) -> Tiling {
    Tiling { width, columns, latents }
}

/// Every attend_lowrank kernel.
const ENTRIES: [(Dtype, Tiling, &str); 10] = [
    (Dtype::Bf16, tiling(128, 8, Latents::Dtype), "kvlar_attend_lowrank_bf16_v128_n8"),
    (Dtype::Bf16, tiling(256, 8, Latents::Dtype), "kvlar_attend_lowrank_bf16_v256_n8"),
    (Dtype::Bf16, tiling(128, 16, Latents::Dtype), "kvlar_attend_lowrank_bf16_v128_n16"),
    (Dtype::Bf16, tiling(256, 8, Latents::Int8), "kvlar_attend_lowrank_bf16_int8_v256_n8"),
    (Dtype::Bf16, tiling(256, 8, Latents::Int8Basis), "kvlar_attend_lowrank_bf16_int8_basis_v256_n8"),
    (Dtype::F16, tiling(128, 8, Latents::Dtype), "kvlar_attend_lowrank_f16_v128_n8"),
    (Dtype::F16, tiling(256, 8, Latents::Dtype), "kvlar_attend_lowrank_f16_v256_n8"),
    (Dtype::F16, tiling(128, 16, Latents::Dtype), "kvlar_attend_lowrank_f16_v128_n16"),
    (Dtype::F16, tiling(256, 8, Latents::Int8), "kvlar_attend_lowrank_f16_int8_v256_n8"),
    (Dtype::F16, tiling(256, 8, Latents::Int8Basis), "kvlar_attend_lowrank_f16_int8_basis_v256_n8"),
];

impl Tiling {
    /// `columns_a_head` packed columns for each of up to `heads` kv heads; dense values of `value_dim`, or latents of
    /// `value_rank` as well.
    pub fn of(latents: Latents, columns_a_head: usize, heads: usize, value_dim: usize, value_rank: usize) -> Self {
        let latents = if latents == Latents::Int4 { Latents::Int8 } else { latents }; // the reference reads the codec
        let all = columns_a_head * heads;
        // 16 columns hold up to 128 values: beyond, tiles of fewer heads cost reads from the L2, slices a rebuild each.
        let wide = value_dim > 128 || (value_rank > 128 && (all <= 8 || columns_a_head <= 8));
        if latents != Latents::Dtype || wide {
            return tiling(256, 8, latents);
        }
        tiling(128, if all > 8 { 16 } else { 8 }, latents)
    }

    /// The same with 8 columns, if this has more.
    pub fn narrower(&self) -> Option<Self> {
        (self.columns > 8).then_some(Self { columns: 8, ..*self })
    }

    pub fn entry(&self, dtype: Dtype) -> Option<&'static str> {
        ENTRIES.iter().find(|e| e.0 == dtype && e.1 == *self).map(|e| e.2)
    }

    pub fn dtype_of(entry: &str) -> Option<Dtype> {
        ENTRIES.iter().find(|e| e.2 == entry).map(|e| e.0)
    }

    #[cfg(test)]
    pub fn names() -> Vec<&'static str> {
        ENTRIES.iter().map(|e| e.2).collect()
    }
}
