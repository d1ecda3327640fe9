// ln sum exp(x) as it grows: (top, sum) with sum = Σ exp(x - top), top being the largest x so far. Unlike attention's columns it
// raises the top at once: nothing else hangs on it, and the sum is then as exact as fp32 has it.
#pragma once
#include "device/softmax.cuh"

namespace kvlar::scan {

struct LogSum {
  float top, sum;

  __device__ static LogSum empty() { return {-INFINITY, 0.f}; }
  // exp(x - top); nothing of -inf, also where there is nothing else.
  __device__ static float weight(float x, float top) { return ptx::ex2_approx((x - (top == -INFINITY ? 0.f : top)) * kLog2E); }

  // -inf adds nothing; NaN makes the sum NaN.
  template <int N> __device__ void add(const float (&x)[N]) {
    float raised = top;
#pragma unroll
    for (int i = 0; i < N; ++i) raised = fmaxf(raised, x[i]);
    sum *= weight(top, raised);
    top = raised;
#pragma unroll
    for (int i = 0; i < N; ++i) sum += weight(x[i], top);
  }

  __device__ static LogSum merge(LogSum a, LogSum b) {
    const float top = fmaxf(a.top, b.top);
    return {top, a.sum * weight(a.top, top) + b.sum * weight(b.top, top)};
  }

  __device__ LogSum of_lane(int distance) const {
    return {__shfl_xor_sync(0xffffffffu, top, distance), __shfl_xor_sync(0xffffffffu, sum, distance)};
  }

  __device__ float value() const { return sum == 0.f ? -INFINITY : top + __log2f(sum) * kLn2; }
};

}  // namespace kvlar::scan
