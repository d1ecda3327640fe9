// Global to shared memory: the rows of a tile, by cp.async.
#pragma once
#include "attend/unit.cuh"

namespace kvlar::attend {

// Where a tile lies.
struct TilePlace {
  int segment, row;  // first row, within the segment
  int valid;         // rows of the tile that exist
};

// A tile's rows in global memory. Pages hold at least 16 rows and tiles start at multiples of 16, so each
// block of 16 rows lies in one page.
struct TileRows : TilePlace {
  int page0, page1, page2, page3;  // no array: indexed ones do not stay in registers across unrolled loops

  __device__ __forceinline__ int page(int block) const { return block == 0 ? page0 : block == 1 ? page1 : block == 2 ? page2 : page3; }
};

// Copies rows of `chunks` 16-byte chunks. With kGuarded, rows past `valid` and chunks past `chunks` (up to
// kChunks, the template's) become 0 without being read; without, the tile is whole and needs no arithmetic
// for it. Lanes of a row are neighbours: 8 of them fetch a 128-byte line.
template <int kChunks, int kRows, class Layout, bool kGuarded>
__device__ __forceinline__ void copy_rows(int lane, ptx::smem tile, const char* base, const KvlarPool& pool, const TileRows& rows,
                                          int page_mask, int chunks) {
  constexpr int kLanes = kChunks < 8 ? kChunks : 8, kPassRows = 32 / kLanes;
  const int r = lane / kLanes, c = lane % kLanes;
  const uint64_t pass_stride = uint64_t(pool.row_stride) * kPassRows;
#pragma unroll
  for (int b = 0; b < kRows / 16; ++b) {
    const char* source = base + int64_t(rows.page(b)) * pool.page_stride +
                         uint64_t(uint32_t((rows.row + 16 * b) & page_mask) + uint32_t(r)) * pool.row_stride + 16 * c;
#pragma unroll
    for (int i = 0; i < 16; i += kPassRows) {
#pragma unroll
      for (int j = 0; j < kChunks; j += kLanes) {
        const ptx::smem to = tile + uint32_t(Layout::at(16 * b + i + r, c + j));
        if (kGuarded) ptx::cp_async16(to, source + 16 * j, 16 * b + i + r < rows.valid && c + j < chunks ? 16 : 0);
        else ptx::cp_async16_stream(to, source + 16 * j);
      }
      source += pass_stride;
    }
  }
}

// Four bytes a row: (scale, zero) pairs, or positions. Lane l fetches rows l, l + 32, ...
template <int kRows>
__device__ __forceinline__ void copy_words(int lane, ptx::smem to, const char* base, int64_t page_stride, uint32_t stride,
                                           const TileRows& rows, int page_mask) {
#pragma unroll
  for (int i = 0; i < kRows; i += 32) {
    const int r = i + lane;
    if (kRows >= 32 || r < kRows) {
      int page = rows.page0;
#pragma unroll
      for (int b = 1; b < kRows / 16; ++b) page = r / 16 == b ? rows.page(b) : page;
      const char* source = base + int64_t(page) * page_stride + uint64_t(uint32_t((rows.row + r) & page_mask)) * stride;
      ptx::cp_async4(to + uint32_t(4 * r), source, r < rows.valid ? 4 : 0);
    }
  }
}

}  // namespace kvlar::attend
