// Online softmax of packed columns and the sums of values that go with it: what exact and latent tiles share.
#pragma once
#include "attend_lowrank/unit.cuh"
#include "device/mma.cuh"
#include "device/softmax.cuh"

namespace kvlar::attend_lowrank {

// Running state; a lane has columns 2c and 2c + 1 of each n-tile, over its own rows. V: widest value row or slice.
template <int NT, int V> struct ColumnState {
  float o[V / 16][NT][4];
  float top[NT][2], sum[NT][2];
  float weight[NT][4];  // int8 values: sums of the fp16 weights over all lanes' rows, in [0] and [1]; an accumulator
  float zero[NT][2];    // int8 values: sums of weight times zero

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        top[n][e] = attend::kFloor;
        sum[n][e] = zero[n][e] = 0.f;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) weight[n][e] = 0.f;
#pragma unroll
      for (int i = 0; i < V / 16; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[i][n][e] = 0.f;
    }
  }

  __device__ void rescale(const float (&seen)[NT][2], bool int8_values) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float raised = column_max(seen[n][e]), factor = ptx::ex2_approx(top[n][e] - raised);
        top[n][e] = raised;
        sum[n][e] *= factor;
        if (int8_values) {
          weight[n][e] *= factor;
          zero[n][e] *= factor;
        }
#pragma unroll
        for (int i = 0; i < V / 16; ++i) {
          o[i][n][e] *= factor;
          o[i][n][e + 2] *= factor;
        }
      }
  }
};

// One tile's scores of kRows / 16 blocks, to logits in base 2.
template <int kBlocks, int NT> __device__ __forceinline__ void to_logits(float (&s)[kBlocks][NT][4], const KvlarAttend& p) {
  const float scale = p.softcap > 0.f ? p.scale : p.scale * kLog2E;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[b][n][e] *= scale;
        if (p.softcap > 0.f) s[b][n][e] = soft_cap(s[b][n][e], p.softcap) * kLog2E;
      }
}

// Hides rows from columns that must not see them. `only_head`: rows belong to that head of the tile alone (-1: to all).
// `positions`: of the tile's rows, or null where row r of head h is at first_row[h] + row + r.
template <int kBlocks, int NT>
__device__ __forceinline__ void hide(float (&s)[kBlocks][NT][4], const KvlarAttend& p, const Unit& u, int segment, int row,
                                     const int* positions, int only_head, const Lane& at) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = 16 * b + 8 * h + at.g;
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + 2 * at.c + e, head = u.column_head[column], query = u.column_query[column];
          const int position = positions ? positions[r] : u.first_row[segment][head] + row + r;
          const bool hidden = row + r >= u.length[segment][head] || (only_head >= 0 && head != only_head) || position > query ||
                              (p.window > 0 && query != attend::kMaskedColumn && query - position >= p.window);
          if (hidden) s[b][n][2 * h + e] = -INFINITY;
        }
    }
}

}  // namespace kvlar::attend_lowrank
