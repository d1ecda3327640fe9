// The running result of a warp's packed columns: unnormalized output, maxima and sums.
#pragma once
#include "attend/unit.cuh"
#include "device/mma.cuh"
#include "device/softmax.cuh"

namespace kvlar::attend {

// A lane has columns 2c and 2c + 1 of each tile, over its own rows; `o` is over all rows of the warp.
template <int D, int NT> struct ColumnState {
  float o[D / 16][NT][4];
  float top[NT][2], sum[NT][2];

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        top[n][e] = kFloor;
        sum[n][e] = 0.f;
      }
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[i][n][e] = 0.f;
    }
  }

  // Raises a column's maximum to the largest that the lanes of its rows have seen; returns what that multiplies.
  __device__ float raise(float seen, int n, int e) {
    const float raised = column_max(seen), factor = ptx::ex2_approx(top[n][e] - raised);
    top[n][e] = raised;
    sum[n][e] *= factor;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      o[i][n][e] *= factor;
      o[i][n][e + 2] *= factor;
    }
    return factor;
  }
};

template <int kBlocks, int NT> __device__ __forceinline__ void soft_cap_logits(float (&s)[kBlocks][NT][4], const KvlarAttend& p) {
  if (p.softcap > 0.f) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[b][n][e] = soft_cap(s[b][n][e], p.softcap) * kLog2E;
  }
}

// Scores become logits in base 2.
template <int kBlocks, int NT> __device__ __forceinline__ void to_logits(float (&s)[kBlocks][NT][4], const KvlarAttend& p) {
  const float scale = p.softcap > 0.f ? p.scale : p.scale * kLog2E;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[b][n][e] *= scale;
  soft_cap_logits(s, p);
}

// Softmax weights of a tile's logits as B fragments in T; raises the maxima where needed, adds to the sums.
template <class T, int kBlocks, int D, int NT>
__device__ __forceinline__ void weigh(uint32_t (&weights)[kBlocks][NT][2], ColumnState<D, NT>& state, const float (&s)[kBlocks][NT][4]) {
  float top[NT][2];
  bool raise = false;
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      top[n][e] = state.top[n][e];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) top[n][e] = fmaxf(top[n][e], fmaxf(s[b][n][e], s[b][n][2 + e]));
      raise = raise || top[n][e] > state.top[n][e] + kHeadroom;
    }
  if (__any_sync(0xffffffffu, raise)) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) state.raise(top[n][e], n, e);
  }
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float w[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          w[e] = ptx::ex2_approx(s[b][n][2 * h + e] - state.top[n][e]);
          state.sum[n][e] += w[e];
        }
        weights[b][n][h] = ptx::movmatrix_trans(Half16<T>::pack(w[0], w[1]));
      }
}

}  // namespace kvlar::attend
