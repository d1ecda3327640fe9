// What the tensor cores can do by mma.sync, for benches to measure other kernels by.
//
//   in: a [4][32], b [2][32] registers of the lanes -> out [CTAs][32]: lane l's first register of the sum of all products, which
//   are `count` for each of 8 warps and 8 accumulators. arg: 0 bf16, 1 f16 (both fp32 sums), 2 s8.
//
// Floor: 2 * 16 * 8 * 16 operations a product (s8: twice as many) / what the data sheet says; mma.sync is said to reach about two
// thirds of that on an H200, whose full rate is wgmma's.
#include "abi.h"
#include "device/gpu.cuh"

namespace {
constexpr int kAccumulators = 8;  // that do not wait for each other

template <class D, class Product> __device__ __forceinline__ D sum_of(uint32_t count, Product product) {
  D d[kAccumulators][4] = {};
#pragma unroll 1
  for (uint32_t i = 0; i < count; ++i)
#pragma unroll
    for (int j = 0; j < kAccumulators; ++j) product(d[j]);
  D sum = d[0][0];
#pragma unroll
  for (int j = 1; j < kAccumulators; ++j) sum += d[j][0];
  return sum;
}
}  // namespace

extern "C" __global__ void __launch_bounds__(256, 2) kvlar_ceiling_products(const __grid_constant__ KvlarConformance p) {
  __shared__ float sums[8][32];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = p.in[32 * i + lane];
  for (int i = 0; i < 2; ++i) b[i] = p.in[128 + 32 * i + lane];
  float sum = 0.f;
  switch (p.arg) {
    case 0: sum = sum_of<float>(p.count, [&](float (&d)[4]) { ptx::mma_m16n8k16_bf16(d, a, b[0], b[1]); }); break;
    case 1: sum = sum_of<float>(p.count, [&](float (&d)[4]) { ptx::mma_m16n8k16_f16(d, a, b[0], b[1]); }); break;
    default: sum = float(sum_of<int>(p.count, [&](int (&d)[4]) { ptx::mma_m16n8k32_s8(d, a, b[0], b[1]); })); break;
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0) return;
  for (int w = 1; w < 8; ++w) sum += sums[w][lane];
  p.out[blockIdx.x * 32 + lane] = __float_as_uint(sum);
}
GPU_EXPORT(kvlar_ceiling_products)
