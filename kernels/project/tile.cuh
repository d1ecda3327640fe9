// A warp's tile of z = encoder x: 16 MT rows of 32 ranks, by tensor cores, rows on M and ranks on N.
//
// Two orders are free and chosen so that memory is accessed by vectors without shuffles. Of the contraction: lane c takes
// values 8c .. 8c + 7 of each block of 32, one 16-byte load for two k-steps of a fragment, of rows (A) and encoder (B)
// alike. Of the ranks: column n of tile j is rank 8 (n / 2) + 2 j + n % 2, so that a lane's accumulators of a row are
// ranks 8c .. 8c + 7, one 16-byte store.
//
// Encoder and rows come through the L1: warps of a CTA share the encoder's lines, or the rows'. 12 loads of 16 bytes a
// lane feed 32 mma at MT = 4.
#pragma once
#include "abi.h"
#include "device/mma.cuh"

namespace kvlar::project {

constexpr int kWarps = 8;        // that multiply
constexpr int kTileRanks = 32;
constexpr int kLaneRanks = 8;    // consecutive ranks of a row that a lane has

template <int MT> using Tile = float[MT][4][4];

// A warp's place in a CTA.
template <int MT> struct Division {
  int warp, row, rank_warp, sum_warp;  // row: the first of the warp's, in the CTA
  int rows;                            // of a CTA
  __device__ explicit Division(const KvlarProjection& p) {
    const int ranks = int(p.rank_warps), sums = int(p.sum_warps);
    warp = int(threadIdx.x) / 32;
    sum_warp = warp % sums;
    rank_warp = warp / sums % ranks;
    row = 16 * MT * (warp / (sums * ranks));
    rows = 16 * MT * (kWarps / (sums * ranks));
  }
};

// Which part of the result a CTA has.
struct CtaIndex {
  int group, block, part;
  __device__ CtaIndex(const KvlarProjection& p, int index)
      : group(index / int(p.parts) / int(p.row_blocks)), block(index / int(p.parts) % int(p.row_blocks)), part(index % int(p.parts)) {}
};

// The new rows of all sequences are numbered one after the other.
struct Token { int seq, row; };
__device__ inline Token token_of(int index, uint32_t rows) {
  const int seq = int(uint32_t(index) / rows);
  return {seq, index - seq * int(rows)};
}

__device__ inline uint4 load_or_zero(const uint16_t* base, int64_t offset, bool there) {
  return there ? __ldg(reinterpret_cast<const uint4*>(base + offset)) : make_uint4(0u, 0u, 0u, 0u);
}

// Where a lane's rows of x start, for kv head 0; null past the last token.
template <int MT> struct LaneRows {
  const uint16_t* at[MT][2];
  __device__ LaneRows(const KvlarProjection& p, int first, int tokens, uint32_t rows) {
    const Lane lane;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int index = first + 16 * m + 8 * h + lane.g;
        const Token t = token_of(index, rows);
        at[m][h] = index < tokens ? static_cast<const uint16_t*>(p.x) + t.seq * p.x_seq_stride + t.row * p.x_row_stride : nullptr;
      }
  }
};

template <class T, int MT>
__device__ __forceinline__ void multiply(Tile<MT>& z, const KvlarProjection& p, const LaneRows<MT>& rows, int group, int first_rank,
                                         int sum_warp) {
  const Lane lane;
  const int dim = int(p.dim), width = int(p.size) * dim, blocks = (width + 31) / 32, ranks = int(p.rank);
  const int64_t head_stride = p.x_head_stride;
  const int each = (blocks + int(p.sum_warps) - 1) / int(p.sum_warps), last = min(blocks, (sum_warp + 1) * each);
  const uint32_t inverse = 0xffffffffu / uint32_t(dim) + 1;  // x / dim = x * inverse >> 32, exact below 2^24
  const int rank = first_rank + 8 * (lane.g >> 1) + (lane.g & 1);  // of tile 0
  const int32_t* members = p.members + int64_t(group) * p.size;
  const uint16_t* encoder = static_cast<const uint16_t*>(p.encoder) + (int64_t(group) * p.rank + rank) * width;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) z[m][j][e] = 0.f;
#pragma unroll(MT == 1 ? 4 : 2)
  for (int block = sum_warp * each; block < last; ++block) {
    const int k = 32 * block + 8 * lane.c;
    const bool inside = k < width;
    const int member = inside ? int(uint64_t(uint32_t(k)) * inverse >> 32) : 0;
    const int64_t from = __ldg(members + member) * head_stride + (k - member * dim);
    uint4 b[4], a[MT][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = load_or_zero(encoder, 2 * j * int64_t(width) + k, inside && rank + 2 * j < ranks);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) a[m][h] = load_or_zero(rows.at[m][h], from, inside && rows.at[m][h] != nullptr);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const uint32_t first[4] = {a[m][0].x, a[m][1].x, a[m][0].y, a[m][1].y}, second[4] = {a[m][0].z, a[m][1].z, a[m][0].w, a[m][1].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t b0[2] = {b[j].x, b[j].y}, b1[2] = {b[j].z, b[j].w};
        Half16<T>::mma(z[m][j], first, b0);
        Half16<T>::mma(z[m][j], second, b1);
      }
    }
  }
}

// Where warps share a contraction (_m16 kernels): their sums, added up in a fixed order by the first of them.
template <int MT> struct Partials {
  __device__ void put(const Tile<MT>&, int) {}
  __device__ void add(Tile<MT>&, int) const {}
};
template <> struct Partials<1> {
  float4 of[kWarps][4][32];

  __device__ void put(const Tile<1>& z, int warp) {
#pragma unroll
    for (int j = 0; j < 4; ++j) of[warp][j][threadIdx.x % 32] = make_float4(z[0][j][0], z[0][j][1], z[0][j][2], z[0][j][3]);
  }
  __device__ void add(Tile<1>& z, int warp) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 x = of[warp][j][threadIdx.x % 32];
      z[0][j][0] += x.x;
      z[0][j][1] += x.y;
      z[0][j][2] += x.z;
      z[0][j][3] += x.w;
    }
  }
};

// The mean's share of a lane's ranks. By linearity: encoder (x - mean) = encoder x - encoder mean. So the products stay
// those of the 16-bit values as they came, exact in fp32, where x - mean would be rounded to 16 bits.
struct LaneOffset {
  float of[kLaneRanks];
  int count;  // ranks that there are; the rest is padding
  __device__ LaneOffset(const KvlarProjection& p, int group, int first) : count(int(p.rank) - first) {
#pragma unroll
    for (int i = 0; i < kLaneRanks; ++i)
      of[i] = p.offset && i < count ? __ldg(p.offset + int64_t(group) * p.rank + first + i) : 0.f;
  }
};

// A lane's latents of row g + 8 h of a 16-row tile. Padding is 0 even in rows that are not finite.
__device__ inline void lane_latents(float (&x)[kLaneRanks], const float (&z)[4][4], const LaneOffset& offset, int h) {
#pragma unroll
  for (int i = 0; i < kLaneRanks; ++i) x[i] = i < offset.count ? z[i / 2][2 * h + i % 2] - offset.of[i] : 0.f;
}

}  // namespace kvlar::project
