// Global to shared memory: tiles of codes, by cp.async. Each lane serves one block of 16 rows, so that it looks up one page and
// works out one place for all its copies. Instructions of whole tiles: ledger/pairs.json.
#pragma once
#include "attend/copy.cuh"
#include "attend_quantized/layout.cuh"

namespace kvlar::attend_quantized {

using attend::TilePlace;

// A tile's rows in global memory, as a lane sees them.
struct LaneRows : TilePlace {
  int page;  // of the lane's block; 0 where it has no row
};

// The pages that all lanes see, of a tile of 16 or 32 rows.
__device__ __forceinline__ attend::TileRows all_pages(const LaneRows& rows) {
  attend::TileRows all{};
  static_cast<TilePlace&>(all) = rows;
  all.page0 = __shfl_sync(0xffffffffu, rows.page, 0);
  all.page1 = __shfl_sync(0xffffffffu, rows.page, 16);
  return all;
}

// A lane among the kLanes that serve each block of 16 rows: 8, 16 or 32 for tiles of 64, 32 or 16 rows.
template <int kLanes> struct BlockLane {
  const int first;  // row of the tile that the block begins with
  const int place;  // among the block's lanes
  __device__ __forceinline__ explicit BlockLane(int lane) : first(lane / kLanes * 16), place(lane % kLanes) {}
};

// The page of the lane's block in a pool.
struct BlockPage {
  const char* data;
  uint32_t row;  // that the block begins with

  __device__ __forceinline__ BlockPage(const char* head, int64_t page_stride, const LaneRows& rows, int first, int page_rows_log2)
      : data(head + int64_t(rows.page) * page_stride), row(uint32_t(rows.row + first) & ((1u << page_rows_log2) - 1)) {}

  // The block's first row of what lies `offset` into the page, rows `stride` apart.
  __device__ __forceinline__ const char* at(uint32_t stride, int64_t offset = 0) const { return data + offset + uint64_t(row) * stride; }
};

// Calls `each` with the lane's place in a tile of that many rows.
template <class Each> __device__ __forceinline__ void with_lane(int lane, uint32_t tile_rows, Each each) {
  if (tile_rows == 64) each(BlockLane<8>(lane));
  else if (tile_rows == 32) each(BlockLane<16>(lane));
  else each(BlockLane<32>(lane));
}

// The lane's share of a block of whole rows of 1 << kLog chunks; `block` is where the first row lies. Lanes of a row are
// neighbours: 8 of them fetch a 128-byte line.
template <int kLog, int kLanes>
__device__ __forceinline__ void copy_whole(BlockLane<kLanes> at, ptx::smem tile, const char* block, uint32_t row_stride) {
  constexpr int kChunks = 1 << kLog, kAtOnce = kLanes < kChunks ? kLanes : kChunks, kStep = kLanes / kAtOnce;
  const int r = at.place / kAtOnce, c = at.place % kAtOnce;
  const char* source = block + uint64_t(row_stride) * uint32_t(r) + 16 * c;
  const uint32_t to = chunk_at(kLog, at.first + r, c);
#pragma unroll
  for (int i = 0; i < 16; i += kStep)
#pragma unroll
    for (int j = 0; j < kChunks; j += kAtOnce) {
      const uint32_t on = chunk_at(kLog, i, j);  // layout_check.cu: chunk_at(r + i, c + j) is chunk_at(r, c) ^ chunk_at(i, j)
      ptx::cp_async16_stream(tile + ((to ^ (on & 127)) + (on & ~127u)), source + uint64_t(row_stride) * uint32_t(i) + 16 * j);
    }
}
// Likewise where rows end early, are narrower than the template's or as wide as only the parameters say: chunks that do not
// exist become 0 without being read.
template <int kLanes>
__device__ __forceinline__ void copy_part(BlockLane<kLanes> at, ptx::smem tile, const char* block, uint32_t row_stride, int valid, int log, int chunks) {
#pragma unroll 1
  for (int i = at.place; i < 16 << log; i += kLanes) {
    const int r = i >> log, c = i & ((1 << log) - 1);
    ptx::cp_async16(tile + uint32_t(chunk_at(log, at.first + r, c)), block + uint64_t(row_stride) * uint32_t(r) + 16 * c,
                    at.first + r < valid && c < chunks ? 16 : 0);
  }
}

// `words` times four bytes a row, one row after the other: (scale, zero) pairs, or positions.
template <int kLanes>
__device__ __forceinline__ void copy_words(BlockLane<kLanes> at, ptx::smem to, const char* block, uint32_t stride, int valid, int words = 1) {
#pragma unroll
  for (int i = 0; i < 16; i += kLanes) {
    const int r = i + at.place, row = at.first + r;
    if (kLanes > 16 && r >= 16) continue;
    for (int w = 0; w < words; ++w)
      ptx::cp_async4(to + uint32_t(4 * (row * words + w)), block + uint64_t(stride) * uint32_t(r) + 4 * w, row < valid ? 4 : 0);
  }
}

}  // namespace kvlar::attend_quantized
