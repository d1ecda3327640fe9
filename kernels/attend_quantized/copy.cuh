// Global to shared memory: tiles of codes, by cp.async.
#pragma once
#include "attend/copy.cuh"
#include "attend_quantized/layout.cuh"

namespace kvlar::attend_quantized {

using attend::TileRows;

// Blocks of 16 whole rows of 1 << kLog chunks. Lanes of a row are neighbours: 8 of them fetch a 128-byte line.
template <int kLog>
__device__ __forceinline__ void copy_whole(int lane, ptx::smem tile, const char* base, const KvlarPool& pool, const TileRows& rows,
                                           int page_mask, int blocks) {
  constexpr int kChunks = 1 << kLog, kLanes = kChunks < 8 ? kChunks : 8, kPassRows = 32 / kLanes;
  const int r = lane / kLanes, c = lane % kLanes;
  if constexpr (kPassRows == 32) {  // two blocks at a time
#pragma unroll 1
    for (int b = 0; b < blocks; b += 2) {
      const int page = lane < 16 ? rows.page(b) : rows.page(b + 1);
      const char* source = base + int64_t(page) * pool.page_stride + uint64_t(uint32_t((rows.row + 16 * b + r) & page_mask)) * pool.row_stride;
      ptx::cp_async16_stream(tile + uint32_t(chunk_at(kLog, 16 * b + r, 0)), source);
    }
  } else {
    const uint64_t pass_stride = uint64_t(pool.row_stride) * kPassRows;
#pragma unroll 1
    for (int b = 0; b < blocks; ++b) {
      const char* source = base + int64_t(rows.page(b)) * pool.page_stride +
                           uint64_t(uint32_t((rows.row + 16 * b) & page_mask) + uint32_t(r)) * pool.row_stride + 16 * c;
#pragma unroll
      for (int i = 0; i < 16; i += kPassRows) {
#pragma unroll
        for (int j = 0; j < kChunks; j += kLanes)
          ptx::cp_async16_stream(tile + uint32_t(chunk_at(kLog, 16 * b + i + r, c + j)), source + 16 * j);
        source += pass_stride;
      }
    }
  }
}

// Likewise where rows end early or are narrower than the template's: chunks that do not exist become 0 without being read.
__device__ __forceinline__ void copy_part(int lane, ptx::smem tile, const char* base, const KvlarPool& pool, const TileRows& rows,
                                          int page_mask, int blocks, int log, int chunks) {
#pragma unroll 1
  for (int i = lane; i < (16 * blocks) << log; i += 32) {
    const int r = i >> log, c = i & ((1 << log) - 1);
    const char* source = base + int64_t(rows.page(r / 16)) * pool.page_stride + uint64_t(uint32_t((rows.row + r) & page_mask)) * pool.row_stride + 16 * c;
    ptx::cp_async16(tile + uint32_t(chunk_at(log, r, c)), source, r < rows.valid && c < chunks ? 16 : 0);
  }
}

}  // namespace kvlar::attend_quantized
