// The (top, sum) of a column from those of its parts, by a warp.
#pragma once
#include "attend/unit.cuh"
#include "device/softmax.cuh"

namespace kvlar::attend {

// `load(i)` gives the state of part i of `count`: a lane loads one of each 32, all at once. Sums are added in the order of the
// parts, as warps' are: a part a warp or a part a CTA, the result has the same bits.
template <class Load> __device__ inline float2 merge_states(int count, Load load) {
  const int lane = int(threadIdx.x) & 31;
  const auto state_of = [&](int i) { return i < count ? load(i) : make_float2(kFloor, 0.f); };
  float2 own = state_of(lane);
  float top = fmaxf(kFloor, own.x), sum = 0.f;
#pragma unroll 2
  for (int i = lane + 32; i < count; i += 32) top = fmaxf(top, load(i).x);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    if (first > 0) own = state_of(first + lane);
    const float factor = ptx::ex2_approx(own.x - top);
#pragma unroll 1
    for (int eight = 0; eight < min(32, count - first); eight += 8)
#pragma unroll
      for (int i = eight; i < eight + 8; ++i)  // beyond the last: nothing is added
        sum = fmaf(__shfl_sync(0xffffffffu, factor, i), __shfl_sync(0xffffffffu, own.y, i), sum);
  }
  return make_float2(top, sum);
}

}  // namespace kvlar::attend
