// What the kernels that read memory share: a sum that shows that all was read, an order of rows.
#pragma once
#include "device/gpu.cuh"

namespace ceiling {
__device__ inline uint32_t words_of(uint4 x) { return x.x + x.y + x.z + x.w; }

// The i-th of `rows` rows, a power of two, in an order that jumps: by an odd number, which leaves none out.
__device__ inline uint32_t scattered(uint32_t i, uint32_t rows) { return i * 2654435761u & (rows - 1); }

// Of a CTA's threads, by the first.
__device__ inline void put_sum(uint32_t* out, uint32_t sum) {
  __shared__ uint32_t sums[32];
  const int warps = int(blockDim.x) / 32;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < warps; ++i) sum += sums[i];
  out[blockIdx.x] = sum;
}
}  // namespace ceiling
