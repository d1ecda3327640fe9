// Online softmax of the columns of a score tile, in base 2: a column's state is (max, sum) with
// sum = Σ 2^(x - max) over the rows seen so far (Milakov and Gimelshein 2018; FlashAttention-2 §3.1).
//
// `max` is any number that keeps 2^(x - max) within range: it is raised only when a score passes it by more
// than kHeadroom, so that the common tile needs one vote instead of shuffles and leaves the output alone.
#pragma once
#include "device/gpu.cuh"

namespace kvlar {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kHeadroom = 8.f;

// Maximum over the 8 lanes that hold the rows of a column.
__device__ inline float column_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 4));
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 8));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 16));
}
__device__ inline float column_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 4);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

// c * tanh(x / c) through one exponential: exact to about 1e-7 * c, unlike tanh.approx (5e-4).
__device__ inline float soft_cap(float x, float cap) {
  const float e = ptx::ex2_approx(x * (2.f * kLog2E / cap));
  return cap - 2.f * cap * ptx::rcp_approx(e + 1.f);
}

}  // namespace kvlar
