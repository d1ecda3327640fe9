// project: z = encoder [r][size d] . the rows of a group's kv heads, one after the other, - offset, to dense latents.
//
//   x [seqs][kv_heads][rows][d] -> out [seqs][groups][rows][r], fp32 or the type of x. (ReCalKV, arXiv 2505.24357, §3.2.)
//
// A CTA takes a group, a block of tokens of all sequences and a part of the ranks, as in append.cuh; see there for the floor.
#pragma once
#include "project/tile.cuh"

namespace kvlar::project {

// Eight values from rank `first` on. Rows of any rank may start anywhere, hence `vectors`.
template <class T> __device__ inline void store_out(char* row, uint32_t dtype, const float (&x)[kLaneRanks], int first, int rank, bool vectors) {
  const bool whole = vectors && first + kLaneRanks <= rank;
  if (dtype == KVLAR_DTYPE_F32) {
    float* to = reinterpret_cast<float*>(row) + first;
    if (whole) {
      reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kLaneRanks; ++i)
      if (first + i < rank) to[i] = x[i];
  } else {
    uint16_t* to = reinterpret_cast<uint16_t*>(row) + first;
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = Half16<T>::pack(x[2 * i], x[2 * i + 1]);
    if (whole) {
      *reinterpret_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
      return;
    }
#pragma unroll
    for (int i = 0; i < kLaneRanks; ++i)
      if (first + i < rank) to[i] = uint16_t(w[i / 2] >> (16 * (i % 2)));
  }
}

template <class T, int MT> __device__ inline void project(const KvlarProject& p) {
  __shared__ Partials<MT> partials;
  const KvlarProjection& side = p.projection;
  const Division<MT> at(side);
  const CtaIndex cta(side, int(blockIdx.x));
  const Lane lane;
  const int tokens = int(p.seqs * p.rows), first = cta.block * at.rows + at.row;
  const int rank = kTileRanks * (cta.part * int(side.rank_warps) + at.rank_warp);
  const bool has_tile = rank < int(side.rank);
  Tile<MT> z;
  if (has_tile) {
    multiply<T, MT>(z, side, LaneRows<MT>(side, first, tokens, p.rows), cta.group, rank, at.sum_warp);
    if (at.sum_warp > 0) partials.put(z, at.warp);
  }
  if (side.sum_warps > 1) __syncthreads();
  if (!has_tile || at.sum_warp > 0) return;
  for (int i = 1; i < int(side.sum_warps); ++i) partials.add(z, at.warp + i);
  const int bytes = p.out_dtype == KVLAR_DTYPE_F32 ? 4 : 2;
  const bool vectors = ((reinterpret_cast<uintptr_t>(p.out) | uint64_t(p.out_seq_stride | p.out_group_stride | p.out_row_stride) * bytes) & 15) == 0;
  const LaneOffset offset(side, cta.group, rank + kLaneRanks * lane.c);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int index = first + 16 * m + 8 * h + lane.g;
      if (index >= tokens) continue;
      const Token t = token_of(index, p.rows);
      float x[kLaneRanks];
      lane_latents(x, z[m], offset, h);
      char* row = static_cast<char*>(p.out) + (t.seq * p.out_seq_stride + cta.group * p.out_group_stride + t.row * p.out_row_stride) * bytes;
      store_out<T>(row, p.out_dtype, x, rank + kLaneRanks * lane.c, int(side.rank), vectors);
    }
}

}  // namespace kvlar::project

#define KVLAR_PROJECT_ENTRY(name, T, MT)                                                                                 \
  extern "C" __global__ void __launch_bounds__(32 * kvlar::project::kWarps, 1) name(const __grid_constant__ KvlarProject p) { \
    kvlar::project::project<T, MT>(p);                                                                                   \
  }
