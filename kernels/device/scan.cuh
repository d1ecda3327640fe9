// Prefix sums over a CTA.
#pragma once
#include "device/gpu.cuh"

namespace kvlar {

// Sum of `value` over the threads before this one. `warp_sums` is shared memory for kThreads / 32 integers;
// it may be reused after the next barrier.
template <int kThreads> __device__ inline int block_exclusive_sum(int value, int* warp_sums) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int sum = value;
  for (int step = 1; step < 32; step <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  for (int w = 0; w < kThreads / 32; ++w) before += w < warp ? warp_sums[w] : 0;
  __syncthreads();
  return before + sum - value;
}

}  // namespace kvlar
