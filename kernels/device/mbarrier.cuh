// Bulk copies and the barriers that they complete on (sm_90 and later). A header of its own: a unit that asks for
// __CUDA_ARCH__ is compiled for each architecture, all others once, to PTX that every architecture's code is made from.
#pragma once
#include "device/ptx.cuh"

#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
namespace ptx {
#define PTX_FN __device__ __forceinline__

PTX_FN void mbarrier_init(smem bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar.a), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
PTX_FN void mbarrier_arrive_expect(smem bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar.a), "r"(bytes) : "memory");
}
PTX_FN void mbarrier_arrive(smem bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar.a) : "memory"); }
PTX_FN bool mbarrier_try_wait(smem bar, uint32_t parity) {
  uint32_t done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(bar.a), "r"(parity) : "memory");
  return done != 0;
}
PTX_FN void mbarrier_wait(smem bar, uint32_t parity) { while (!mbarrier_try_wait(bar, parity)) {} }
// `bytes` and both addresses are multiples of 16; completes on `bar`.
PTX_FN void bulk_copy(smem dst, const void* src, uint32_t bytes, smem bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(dst.a), "l"(src), "r"(bytes), "r"(bar.a) : "memory");
}

#undef PTX_FN
}  // namespace ptx
#endif
