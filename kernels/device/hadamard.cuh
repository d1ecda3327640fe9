// The normalized Walsh-Hadamard transform of a row that a warp holds, eight neighbouring values a lane.
//
// Butterflies (a + b, a - b) at strides 1, 2, 4, ... dim / 2, then one product with fp32(1 / sqrt(dim)): the order of the
// reference, bit for bit. Its own inverse.
#pragma once
#include "device/gpu.cuh"

namespace kvlar {

// 1 / sqrt(dim), dim a power of two, as the nearest fp32.
__device__ inline float hadamard_scale(int dim) {
  const int log = 31 - __clz(dim);
  return __uint_as_float(uint32_t(127 - (log + 1) / 2) << 23) * (log % 2 ? 1.41421356f : 1.f);
}

// All lanes of the warp call it; those past `dim` (a power of two from 8 to 256) hold zeros.
__device__ inline void hadamard(float (&x)[8], int dim, int lane) {
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2)
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (!(i & stride)) {
        const float a = x[i], b = x[i + stride];
        x[i] = __fadd_rn(a, b);
        x[i + stride] = __fsub_rn(a, b);
      }
  for (int step = 1; 8 * step < dim; step *= 2)
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, x[i], step);
      x[i] = lane & step ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
    }
  const float scale = hadamard_scale(dim);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = __fmul_rn(x[i], scale);
}

}  // namespace kvlar
