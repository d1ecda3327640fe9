// Tensor-core products and the transposition of fragments; see memory.cu.
#include "abi.h"
#include "device/gpu.cuh"

// in: a [4][32], b [2][32], c [4][32] registers of the lanes; out: d [4][32]. arg names the shape and type.
extern "C" __global__ void __launch_bounds__(32) kvlar_conformance_mma(const __grid_constant__ KvlarConformance p) {
  const int lane = int(threadIdx.x);
  uint32_t a[4], b[2];
  float d[4];
  int e[4];
  for (int i = 0; i < 4; ++i) a[i] = p.in[32 * i + lane];
  for (int i = 0; i < 2; ++i) b[i] = p.in[128 + 32 * i + lane];
  for (int i = 0; i < 4; ++i) {
    e[i] = int(p.in[192 + 32 * i + lane]);
    d[i] = __uint_as_float(p.in[192 + 32 * i + lane]);
  }
  const uint32_t small[2] = {a[0], a[1]};
  switch (p.arg) {
    case 0: ptx::mma_m16n8k16_bf16(d, a, b[0], b[1]); break;
    case 1: ptx::mma_m16n8k16_f16(d, a, b[0], b[1]); break;
    case 2: ptx::mma_m16n8k8_bf16(d, small, b[0]); break;
    case 3: ptx::mma_m16n8k8_f16(d, small, b[0]); break;
    case 4: ptx::mma_m16n8k32_s8(e, a, b[0], b[1]); break;
    case 5: ptx::mma_m16n8k32_u8s8(e, a, b[0], b[1]); break;
    default: ptx::mma_m16n8k16_s8(e, small, b[0]); break;
  }
  for (int i = 0; i < 4; ++i) p.out[32 * i + lane] = p.arg < 4 ? __float_as_uint(d[i]) : uint32_t(e[i]);
}
GPU_EXPORT(kvlar_conformance_mma)

extern "C" __global__ void __launch_bounds__(32) kvlar_conformance_movmatrix(const __grid_constant__ KvlarConformance p) {
  p.out[threadIdx.x] = ptx::movmatrix_trans(p.in[threadIdx.x]);
}
GPU_EXPORT(kvlar_conformance_movmatrix)
