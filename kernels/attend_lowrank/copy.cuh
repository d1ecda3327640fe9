// Global to shared memory: rows of a tile, by cp.async, for row widths not known at compile time.
#pragma once
#include "attend/copy.cuh"
#include "attend_lowrank/layout.cuh"

namespace kvlar::attend_lowrank {

using attend::TileRows;

// Copies kRows rows of `chunks` 16-byte chunks; rows past `valid` and chunks up to `padded` become 0 without being read.
// `kLanes` neighbours fetch a row's next 16 kLanes bytes.
template <int kRows, int kLanes>
__device__ __forceinline__ void copy_rows(int lane, ptx::smem tile, const char* base, const KvlarPool& pool,
                                          const TileRows& rows, int page_mask, int chunks, int padded) {
  constexpr int kPassRows = 32 / kLanes < 16 ? 32 / kLanes : 16;
  const int r = lane / kLanes, c = lane % kLanes;
  const SwizzledRows layout(padded);
#pragma unroll
  for (int b = 0; b < kRows / 16; ++b) {
    const char* source = base + int64_t(rows.page(b)) * pool.page_stride +
                         uint64_t(uint32_t((rows.row + 16 * b) & page_mask) + uint32_t(r)) * pool.row_stride + 16 * c;
#pragma unroll
    for (int i = 0; i < 16; i += kPassRows) {
      const int row = 16 * b + i + r;
      const int have = row < rows.valid ? chunks : 0;
#pragma unroll 2
      for (int j = c; j < padded; j += kLanes)
        ptx::cp_async16(tile + uint32_t(layout.at(row, j)), source + 16 * (j - c), j < have ? 16 : 0);
      source += uint64_t(kPassRows) * pool.row_stride;
    }
  }
}

}  // namespace kvlar::attend_lowrank
