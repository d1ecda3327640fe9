// Rotary position embedding of one row (KvlarRope). Angles keep full precision up to position 2^24, and every
// operation is rounded on its own, so that the device and the emulation agree bit for bit.
#pragma once
#include "abi.h"
#include "device/gpu.cuh"

namespace kvlar {

// sin and cos of position * inv_freq, to about 1e-7 absolute. The product is kept as high + low; reduction modulo
// pi/2 takes three constants (Cody and Waite), polynomials the rest. sincosf would spill its slow path to memory.
__device__ inline void sin_cos_of(int position, float inv_freq, float& sin, float& cos) {
  const float p = float(position), high = __fmul_rn(p, inv_freq), low = __fmaf_rn(p, inv_freq, -high);
  const float turns = rintf(__fmul_rn(high, 0.636619772f));
  float r = __fmaf_rn(-turns, 1.57079637f, high);  // pi/2 = 1.57079637 - 4.37113883e-8 - 1.71512489e-15
  r = __fmaf_rn(turns, 4.37113883e-8f, r);
  r = __fmaf_rn(turns, 1.71512489e-15f, r);
  r = __fadd_rn(r, low);
  const float s = __fmul_rn(r, r);
  float odd = __fmaf_rn(s, 2.75573192e-6f, -1.98412698e-4f);
  odd = __fmaf_rn(s, odd, 8.33333333e-3f);
  odd = __fmaf_rn(s, odd, -0.166666667f);
  odd = __fmaf_rn(__fmul_rn(s, r), odd, r);
  float even = __fmaf_rn(s, 2.48015873e-5f, -1.38888889e-3f);
  even = __fmaf_rn(s, even, 4.16666667e-2f);
  even = __fmaf_rn(s, even, -0.5f);
  even = __fmaf_rn(s, even, 1.f);
  const int quadrant = int(turns) & 3;
  sin = quadrant & 1 ? even : odd;
  cos = quadrant & 1 ? odd : even;
  if (quadrant & 2) sin = -sin;
  if (quadrant == 1 || quadrant == 2) cos = -cos;
}

// Dimensions first .. first + N - 1 of the rotated row become x; `row` is the unrotated one, readable in full, N dividing its
// length. Nothing branches, so that the frequencies of all are on their way together, and no sine waits for another.
template <int N> __device__ inline void rotate_dims(float (&x)[N], const KvlarRope& rope, const float* row, int first, int position) {
  const int rotary = int(rope.rotary_dim), half = rotary / 2;
  const bool split = rope.layout == KVLAR_ROPE_HALF;
  float frequency[N], partner[N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int i = first + j, other = split ? (i >= half ? i - half : i + half) : i ^ 1, pair = split ? min(i, other) : i / 2;
    frequency[j] = i < rotary ? __ldg(rope.inv_freq + pair) : 0.f;
    partner[j] = row[i < rotary ? other : i];
    x[j] = row[i];
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int i = first + j;
    const bool second = split ? i >= half : i & 1;
    float sin, cos;
    sin_cos_of(position, frequency[j], sin, cos);
    sin = __fmul_rn(sin, rope.attention_factor);
    cos = __fmul_rn(cos, rope.attention_factor);
    const float turned = __fmaf_rn(x[j], cos, second ? __fmul_rn(partner[j], sin) : -__fmul_rn(partner[j], sin));
    x[j] = i < rotary ? turned : x[j];
  }
}

}  // namespace kvlar
