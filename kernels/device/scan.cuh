// Sums over a CTA. T is int or unsigned long long; `warp_sums` is shared memory for a T a warp, which may be reused when the
// function returns. Sums of warps are added by a lane each: threads that each read all of them would keep the shared memory busy
// for warps^2 loads, a thousand cycles in a CTA of 1024.
#pragma once
#include "device/gpu.cuh"

namespace kvlar {

__device__ inline int sum_of_lanes(int x) { return __reduce_add_sync(0xffffffffu, x); }
__device__ inline unsigned long long sum_of_lanes(unsigned long long x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Sum over the warps before this one, of which each has a `value`: that of its last lane.
template <int kThreads, class T> __device__ inline T sum_of_warps_before(T value, T* warp_sums) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  if (lane == 31) warp_sums[warp] = value;
  __syncthreads();
  const T before = sum_of_lanes(lane < warp ? warp_sums[lane] : T(0));
  __syncthreads();
  return before;
}

// Sum of `value` over the threads before this one.
template <int kThreads, class T> __device__ inline T block_exclusive_sum(T value, T* warp_sums) {
  const int lane = int(threadIdx.x) % 32;
  T sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  return sum_of_warps_before<kThreads>(sum, warp_sums) + sum - value;
}

// Sum of `value` over all threads, to all.
template <int kThreads, class T> __device__ inline T block_sum(T value, T* warp_sums) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "whole warps");
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  value = sum_of_lanes(value);
  if (lane == 0) warp_sums[warp] = value;
  __syncthreads();
  const T sum = sum_of_lanes(lane < kThreads / 32 ? warp_sums[lane] : T(0));
  __syncthreads();
  return sum;
}

}  // namespace kvlar
