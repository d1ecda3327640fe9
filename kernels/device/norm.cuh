// Euclidean norms of rows of any magnitude, 8 values a lane, the row's lanes being neighbours.
#pragma once
#include "device/row_codec.cuh"

namespace kvlar {

// |x| = root / scale, scale being a power of two: a square of a bf16 value may be beyond fp32, or vanish in it.
struct Norm {
  float root, scale;

  __device__ float value() const { return __fdiv_rn(root, scale); }
  __device__ bool finite() const { return root < INFINITY; }
  // What makes a row's values times `scale` a direction; 0 where there is none.
  __device__ float direction() const { return finite() && root > 0.f ? __frcp_rn(root) : 0.f; }
};

// Over neighbouring lanes, a power of two of them. Lanes beyond a row add zeros, so that the sum of a row has the same bits
// whatever their number.
__device__ inline float lanes_sum(float x, int lanes) {
  for (int step = 1; step < lanes; step <<= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

__device__ inline float lanes_squares(const float (&x)[kLaneDims], float scale, int lanes) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    const float y = __fmul_rn(x[i], scale);
    sum = __fmaf_rn(y, y, sum);
  }
  return lanes_sum(sum, lanes);
}

// All lanes of the warp call it.
__device__ inline Norm norm_of(const float (&x)[kLaneDims], int lanes) {
  float sum = lanes_squares(x, 1.f, lanes), scale = 1.f;
  const bool far = !(sum >= 0x1p-96f && sum <= 0x1p96f);
  if (__any_sync(0xffffffffu, far)) {
    if (far) scale = sum < 1.f ? 0x1p96f : 0x1p-96f;
    sum = lanes_squares(x, scale, lanes);
  }
  return {__fsqrt_rn(sum), scale};
}

}  // namespace kvlar
