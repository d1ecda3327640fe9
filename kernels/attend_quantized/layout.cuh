// How rows of codes lie in shared memory.
//
// The byte of 16-byte chunk `c` of row `r`, for rows of 1 << log_chunks chunks (2 bits: d/64, 4 bits: d/32, 8 bits: d/16),
// chosen so that no access pattern of a warp meets two rows in one bank: as keys, lane (g, c) reads chunk c (of four) of
// row g, or a half or quarter of it; as values, lane (g, c) reads a part g of rows 2c, 2c + 1, 2c + 8, 2c + 9. A bijection;
// layout_check.cu enumerates both claims.
#pragma once
#include "device/gpu.cuh"

namespace kvlar::attend_quantized {

// Rows after which the pattern repeats.
constexpr int kRepeat = 8;

__host__ __device__ constexpr int chunk_at(int log_chunks, int r, int c) {
  return log_chunks == 0   ? r * 16
         : log_chunks == 1 ? (r >> 2) * 128 + (((((r & 3) << 1) | c) ^ (((r >> 2) & 1) << 1)) << 4)
         : log_chunks == 2 ? (r >> 1) * 128 + (((((r & 1) << 2) | c) ^ (((r >> 1) & 3) << 1)) << 4)
                           : r * (16 << log_chunks) + ((c ^ ((((r >> 1) & 3) << 1) ^ ((r & 1) << 2))) << 4);
}

// log2 of the 16-byte chunks of a row of D codes.
template <int D> __host__ __device__ constexpr int log_chunks(int bits) {
  constexpr int kLog8 = D == 64 ? 2 : D == 128 ? 3 : 4;  // of 8-bit codes
  return bits == 8 ? kLog8 : bits == 4 ? kLog8 - 1 : kLog8 - 2;
}

}  // namespace kvlar::attend_quantized
