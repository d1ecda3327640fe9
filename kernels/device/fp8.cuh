// fp8 e4m3 (sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinities, 0x7f and 0xff are NaN; largest 448), by
// integer arithmetic: sm_80 has no instruction for it. (FP8 Formats for Deep Learning, arXiv 2209.05433, §3.1.)
#pragma once
#include "device/gpu.cuh"

namespace kvlar {

// To nearest even, saturating at 448; NaN stays NaN.
__device__ inline uint32_t to_e4m3(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80u;
  if (x != x) return sign | 0x7fu;
  const float size = fminf(fabsf(x), 448.f);
  if (size < 0.015625f) return sign | uint32_t(rintf(__fmul_rn(size, 512.f)));  // below 2^-6: multiples of 2^-9
  const uint32_t normal = __float_as_uint(size), rounded = normal + 0x7ffffu + (normal >> 20 & 1u);
  return sign | ((rounded >> 20) - (120u << 3));  // the exponent's bias goes from 127 to 7
}

__device__ inline float from_e4m3(uint32_t code) {
  if ((code & 0x7fu) == 0x7fu) return __uint_as_float(0x7fc00000u | (code & 0x80u) << 24);
  const float size = __fmul_rn(__uint_as_float((code & 0x7fu) << 20), 0x1p120f);
  return code & 0x80u ? -size : size;
}

}  // namespace kvlar
