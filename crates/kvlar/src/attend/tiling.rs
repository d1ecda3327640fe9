//! Which kernel serves a shape, and its tile shapes: the mirror of `kernels/attend/tiles.cuh`, to which a test holds it.

use crate::{Codec, DeviceInfo, Dtype};

/// One template instantiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tiling {
    /// Head dimension of the template: 64, 128 or 256.
    pub dim: usize,
    /// Packed (query row, head) columns a query tile: 8 or 16.
    pub columns: usize,
    /// Whether integer rows are among the segments.
    pub int8: bool,
}

/// Every attend kernel: dtype, template head dimension, columns, int8.
const ENTRIES: [(Dtype, usize, usize, bool, &str); 20] = [
    (Dtype::Bf16, 64, 8, false, "kvlar_attend_bf16_d64_n8"),
    (Dtype::Bf16, 64, 16, false, "kvlar_attend_bf16_d64_n16"),
    (Dtype::Bf16, 128, 8, false, "kvlar_attend_bf16_d128_n8"),
    (Dtype::Bf16, 128, 16, false, "kvlar_attend_bf16_d128_n16"),
    (Dtype::Bf16, 256, 8, false, "kvlar_attend_bf16_d256_n8"),
    (Dtype::Bf16, 64, 8, true, "kvlar_attend_bf16_int8_d64_n8"),
    (Dtype::Bf16, 64, 16, true, "kvlar_attend_bf16_int8_d64_n16"),
    (Dtype::Bf16, 128, 8, true, "kvlar_attend_bf16_int8_d128_n8"),
    (Dtype::Bf16, 128, 16, true, "kvlar_attend_bf16_int8_d128_n16"),
    (Dtype::Bf16, 256, 8, true, "kvlar_attend_bf16_int8_d256_n8"),
    (Dtype::F16, 64, 8, false, "kvlar_attend_f16_d64_n8"),
    (Dtype::F16, 64, 16, false, "kvlar_attend_f16_d64_n16"),
    (Dtype::F16, 128, 8, false, "kvlar_attend_f16_d128_n8"),
    (Dtype::F16, 128, 16, false, "kvlar_attend_f16_d128_n16"),
    (Dtype::F16, 256, 8, false, "kvlar_attend_f16_d256_n8"),
    (Dtype::F16, 64, 8, true, "kvlar_attend_f16_int8_d64_n8"),
    (Dtype::F16, 64, 16, true, "kvlar_attend_f16_int8_d64_n16"),
    (Dtype::F16, 128, 8, true, "kvlar_attend_f16_int8_d128_n8"),
    (Dtype::F16, 128, 16, true, "kvlar_attend_f16_int8_d128_n16"),
    (Dtype::F16, 256, 8, true, "kvlar_attend_f16_int8_d256_n8"),
];

impl Tiling {
    /// The narrowest kernel that holds the dimensions; 16 columns only where more than 8 are in use.
    pub fn of(dim: usize, packed_columns: usize, int8: bool) -> Self {
        let dim = [64, 128].into_iter().find(|&d| dim <= d).unwrap_or(256);
        Self { dim, columns: if packed_columns > 8 && dim < 256 { 16 } else { 8 }, int8 }
    }

    pub fn entry(&self, dtype: Dtype) -> Option<&'static str> {
        let same = |e: &&(Dtype, usize, usize, bool, _)| (e.0, e.1, e.2, e.3) == (dtype, self.dim, self.columns, self.int8);
        ENTRIES.iter().find(same).map(|e| e.4)
    }

    /// The activation type of an entry point.
    pub fn dtype_of(entry: &str) -> Option<Dtype> {
        ENTRIES.iter().find(|e| e.4 == entry).map(|e| e.0)
    }

    pub fn warps(&self) -> usize {
        if self.dim == 256 { 2 } else { 4 }
    }

    /// Rows that a warp takes at a time.
    pub fn tile_rows(&self, codec: Codec) -> usize {
        let dense = if self.dim == 64 { 32 } else { 16 };
        if codec == Codec::Int8 { 2 * dense } else { dense }
    }

    /// Dynamic shared memory of a CTA: a ring of tiles for each warp.
    pub fn shared_bytes(&self, info: &DeviceInfo) -> usize {
        let (dense, int8) = (self.tile_rows(Codec::Bf16), self.tile_rows(Codec::Int8));
        let tile = (dense * self.dim * 2).max(if self.int8 { int8 * self.dim } else { 0 });
        let rows = if self.int8 { int8 } else { dense };
        let stage = 2 * tile + if self.int8 { 8 * int8 } else { 0 } + 4 * rows;
        self.warps() * self.stages(info) * stage
    }

    /// Tiles a warp keeps in its ring: fewer where an SM has about 100 KB of shared memory (sm_86, sm_89, sm_120).
    pub fn stages(&self, info: &DeviceInfo) -> usize {
        if info.shared_per_sm < 128 << 10 { 2 } else { 3 }
    }

    /// CTAs that fit an SM: two where their shared memory does (CUDA keeps 1 KB of each).
    pub fn ctas_per_sm(&self, info: &DeviceInfo) -> usize {
        if 2 * (self.shared_bytes(info) + 1024 + 512) <= info.shared_per_sm as usize { 2 } else { 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_of_the_build_is_reachable_and_exists() {
        let built = kvlar_kernels::ENTRIES.iter().filter(|e| e.family == "attend").map(|e| e.name);
        let mut built: Vec<_> = built.filter(|n| *n != "kvlar_attend_schedule").collect();
        let mut known: Vec<_> = ENTRIES.iter().map(|e| e.4).collect();
        built.sort_unstable();
        known.sort_unstable();
        assert_eq!(built, known);
    }

    #[test]
    fn shared_memory_matches_the_headers_figures() {
        let info = crate::Device::reference().info().clone();
        assert_eq!(Tiling { dim: 128, columns: 8, int8: false }.shared_bytes(&info), 4 * 3 * (8192 + 64));
        assert_eq!(Tiling { dim: 256, columns: 8, int8: true }.shared_bytes(&info), 2 * 3 * (16384 + 8 * 32 + 4 * 32));
        let ada = DeviceInfo { compute_capability: Some((8, 9)), shared_per_sm: 100 << 10, shared_per_block: 99 << 10, ..info };
        for dim in [64, 128, 256] {
            let tiling = Tiling { dim, columns: 8, int8: true };
            assert!(tiling.shared_bytes(&ada) <= ada.shared_per_block as usize);
        }
    }
}
