// Tiles of score_*: 16 or 32 rows of one operand stay in a warp's registers as A fragments, rows of the other are read from
// shared memory 8 at a time as B fragments. lse.cuh keeps queries and reads keys, rows.cuh keeps keys and reads queries.
#pragma once
#include "score/head.cuh"

namespace kvlar::score {

template <int D> struct Shape {
  static_assert(D == 64 || D == 128 || D == 256, "template head dimensions");
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kBlocks = D == 256 ? 1 : 2;    // of 16 rows a warp: 64 registers of fragments at most
  static constexpr int kWarpRows = 16 * kBlocks, kRows = kWarps * kWarpRows, kSteps = D / 16, kRowBytes = 2 * D;
  using Fragments = uint32_t[kBlocks][kSteps][4];
};

// Fragments of a warp's rows in shared memory.
template <int D> __device__ __forceinline__ void load_rows(typename Shape<D>::Fragments& a, ptx::smem rows) {
  const int lane = int(threadIdx.x) & 31;
#pragma unroll
  for (int b = 0; b < Shape<D>::kBlocks; ++b)
#pragma unroll
    for (int k = 0; k < Shape<D>::kSteps; ++k)
      ptx::ldmatrix_x4(a[b][k], rows + uint32_t(attend::DenseLayout<D>::at(16 * b + (lane & 15), 2 * k + (lane >> 4))));
}

// s[b] = rows of block b times the 8 rows at `columns` of shared memory.
template <int D, class T>
__device__ __forceinline__ void multiply(float (&s)[Shape<D>::kBlocks][4], const typename Shape<D>::Fragments& a, ptx::smem columns) {
  const int lane = int(threadIdx.x) & 31;
#pragma unroll
  for (int b = 0; b < Shape<D>::kBlocks; ++b)
#pragma unroll
    for (int e = 0; e < 4; ++e) s[b][e] = 0.f;
#pragma unroll
  for (int k = 0; k < Shape<D>::kSteps; k += 2) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, columns + uint32_t(attend::DenseLayout<D>::at(lane & 7, 2 * k + (lane >> 3))));
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < Shape<D>::kBlocks; ++i) {
      Half16<T>::mma(s[i], a[i][k], first);
      Half16<T>::mma(s[i], a[i][k + 1], second);
    }
  }
}

}  // namespace kvlar::score
