// Integer codes: x = zero + scale * code, with scale and zero as fp16 holds them. Bit-equal to the reference: see its
// codec module for the rules.
#pragma once
#include "device/gpu.cuh"

namespace kvlar {

struct Affine { float scale, zero; };

__device__ inline float half_of(uint32_t x) { return ptx::unpack_f16(x).x; }
__device__ inline uint32_t pack_affine(Affine a) { return ptx::pack_f16(a.scale, a.zero); }
__device__ inline float quiet_nan() { return __uint_as_float(0x7fc00000u); }

// Scale and zero of values between low and high in codes 0 .. levels; NaN if they or the values are not finite.
__device__ inline Affine affine_of(float low, float high, bool finite, float levels = 255.f) {
  Affine a = {half_of(ptx::pack_f16(__fdiv_rn(__fsub_rn(high, low), levels), 0.f)), half_of(ptx::pack_f16(low, 0.f))};
  finite = finite && fabsf(a.scale) < INFINITY && fabsf(a.zero) < INFINITY;
  if (!finite) a.scale = a.zero = quiet_nan();
  return a;
}
__device__ inline uint32_t code_of(float x, Affine a, float levels = 255.f) {
  if (!(a.scale > 0.f)) return 0;
  return uint32_t(fminf(fmaxf(rintf(__fdiv_rn(__fsub_rn(x, a.zero), a.scale)), 0.f), levels));
}

}  // namespace kvlar
