// The order of scores: NaN < -inf < finite < +inf, -0 = +0 (the reference's `reduce`), as that of unsigned integers.
#pragma once
#include "abi.h"
#include "device/gpu.cuh"

namespace kvlar {

// NaN is 0, -inf 0x007fffff, 0 is 0x80000000.
__device__ inline uint32_t ordered_key(float x) {
  if (x != x) return 0;
  const uint32_t bits = x == 0.f ? 0u : __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The first digit of a radix select: -inf has a bin of its own (3), as has NaN (0).
__device__ inline uint32_t score_bin(float x) { return ordered_key(x) >> 21; }
static_assert(KVLAR_SCORE_BINS == 1u << 11, "bins are the top 11 bits");

// Calls `each(bin, count)` for a (sequence, kv head)'s counts, made by some CTAs in `counts`, which is left at zero. All threads of
// the last CTA to arrive call it. Eight loads of a thread are on their way together.
template <class Each> __device__ inline void take_counts(uint32_t* counts, Each each) {
  constexpr int kAtOnce = 8;
  const int threads = int(blockDim.x);
  for (int first = int(threadIdx.x); first < KVLAR_SCORE_BINS; first += kAtOnce * threads) {
    uint32_t count[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) count[j] = __ldcg(counts + min(first + j * threads, KVLAR_SCORE_BINS - 1));
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * threads;
      if (i >= KVLAR_SCORE_BINS) continue;
      each(i, count[j]);
      counts[i] = 0;
    }
  }
}

// They become its histogram.
__device__ inline void hand_over_counts(uint32_t* counts, uint32_t* histogram) {
  take_counts(counts, [=](int i, uint32_t count) { histogram[i] = count; });
}

// Adds a CTA's bins to counts that others add to as well.
__device__ inline void add_counts(const uint32_t* bins, uint32_t* counts) {
  for (int i = int(threadIdx.x); i < KVLAR_SCORE_BINS; i += int(blockDim.x))
    if (bins[i]) atomicAdd(counts + i, bins[i]);
}

}  // namespace kvlar
