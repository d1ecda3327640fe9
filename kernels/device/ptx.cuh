// Every instruction that CUDA C++ cannot spell. Each has two bodies: inline PTX here, an emulation in
// simt/ptx_host.h; kernels/conformance compares the two on a GPU. No other file but device/mbarrier.cuh (what sm_80 lacks)
// has inline assembly in it.
//
// Shared memory is addressed by the opaque ptx::smem (32 bits on the device, a pointer on the host): make it with
// to_smem(p), move it with `+ bytes`. Fragment layouts are those of the PTX ISA, "Matrix fragments for mma".
#pragma once
#ifndef __CUDACC__
#include "simt/ptx_host.h"
#else

namespace ptx {
#define PTX_FN __device__ __forceinline__

struct smem { uint32_t a; };
PTX_FN smem to_smem(const void* p) { return {uint32_t(__cvta_generic_to_shared(p))}; }
PTX_FN smem operator+(smem s, uint32_t bytes) { return {s.a + bytes}; }

// ---- asynchronous copies, global to shared memory. Bytes beyond src_bytes are zero-filled and not read.
PTX_FN void cp_async16(smem dst, const void* src, int src_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst.a), "l"(src), "r"(src_bytes) : "memory");
}
// For data read once: asks the L2 for the whole 128-byte line.
PTX_FN void cp_async16_stream(smem dst, const void* src) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(dst.a), "l"(src) : "memory");
}
PTX_FN void cp_async8(smem dst, const void* src, int src_bytes = 8) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst.a), "l"(src), "r"(src_bytes) : "memory");
}
PTX_FN void cp_async4(smem dst, const void* src, int src_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst.a), "l"(src), "r"(src_bytes) : "memory");
}
PTX_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> PTX_FN void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- matrix fragments
PTX_FN void ldmatrix_x1(uint32_t& r, smem row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(row.a) : "memory");
}
PTX_FN void ldmatrix_x2(uint32_t (&r)[2], smem row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row.a) : "memory");
}
PTX_FN void ldmatrix_x2_trans(uint32_t (&r)[2], smem row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(row.a) : "memory");
}
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], smem row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row.a) : "memory");
}
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], smem row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row.a) : "memory");
}
// Transposes an 8x8 matrix of 16-bit elements held by the warp, two neighbours of a row a lane.
PTX_FN uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---- d += a b on tensor cores: a row-major, b column-major
#define PTX_MMA(name, shape, types, D, letter)                                                                    \
  PTX_FN void name(D (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                                 \
    asm volatile("mma.sync.aligned." shape ".row.col." types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+" letter(d[0]), "+" letter(d[1]), "+" letter(d[2]), "+" letter(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                 \
  }
#define PTX_MMA_SMALL(name, shape, types, D, letter)                                                              \
  PTX_FN void name(D (&d)[4], const uint32_t (&a)[2], uint32_t b) {                                               \
    asm volatile("mma.sync.aligned." shape ".row.col." types " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"      \
                 : "+" letter(d[0]), "+" letter(d[1]), "+" letter(d[2]), "+" letter(d[3])                         \
                 : "r"(a[0]), "r"(a[1]), "r"(b));                                                                 \
  }
PTX_MMA(mma_m16n8k16_bf16, "m16n8k16", "f32.bf16.bf16.f32", float, "f")
PTX_MMA(mma_m16n8k16_f16, "m16n8k16", "f32.f16.f16.f32", float, "f")
PTX_MMA(mma_m16n8k32_s8, "m16n8k32", "s32.s8.s8.s32", int, "r")
PTX_MMA(mma_m16n8k32_u8s8, "m16n8k32", "s32.u8.s8.s32", int, "r")
PTX_MMA_SMALL(mma_m16n8k8_bf16, "m16n8k8", "f32.bf16.bf16.f32", float, "f")
PTX_MMA_SMALL(mma_m16n8k8_f16, "m16n8k8", "f32.f16.f16.f32", float, "f")
PTX_MMA_SMALL(mma_m16n8k16_s8, "m16n8k16", "s32.s8.s8.s32", int, "r")
#undef PTX_MMA
#undef PTX_MMA_SMALL

// ---- arithmetic
#define PTX_UNARY(name, instruction)                             \
  PTX_FN float name(float x) {                                   \
    float y;                                                     \
    asm(instruction " %0, %1;" : "=f"(y) : "f"(x));              \
    return y;                                                    \
  }
PTX_UNARY(ex2_approx, "ex2.approx.ftz.f32")
PTX_UNARY(lg2_approx, "lg2.approx.ftz.f32")
PTX_UNARY(rcp_approx, "rcp.approx.ftz.f32")
PTX_UNARY(tanh_approx, "tanh.approx.f32")
#undef PTX_UNARY
PTX_FN uint32_t pack_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
PTX_FN uint32_t pack_f16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
PTX_FN float2 unpack_f16(uint32_t x) { return __half22float2(*reinterpret_cast<__half2*>(&x)); }
// Two halves at a time, each rounded once; subnormals are numbers like others.
PTX_FN uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
PTX_FN uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// x, of which the compiler knows nothing: what follows from it is not moved out of a loop.
PTX_FN int unknown(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
template <int LUT> PTX_FN uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(LUT));
  return d;
}

// ---- synchronization
PTX_FN uint32_t add_acq_rel(uint32_t* p, uint32_t v) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
PTX_FN void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
PTX_FN void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

#undef PTX_FN
}  // namespace ptx
#endif

namespace ptx {

// The one way for CTAs to wait for each other, without waiting: true in the CTA that is the last of `expected` to
// arrive at `counter`. Everything that the others wrote to global memory before arriving is visible to it (read
// it with __ldcg). All threads of the CTA call it; the last one leaves the counter at 0, for the next launch.
//
// One thread releases what all have written before the barrier, and acquires for all that wait at the next one: causality goes
// through barriers (PTX ISA, memory consistency model). Fences of all threads would cost their time twice more.
__device__ inline bool arrive_last(uint32_t* counter, uint32_t expected) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    last = add_acq_rel(counter, 1) == expected - 1;
    if (last) __stcg(counter, 0u);
  }
  __syncthreads();
  return last;
}

}  // namespace ptx
