// Runs CUDA C++ kernels on the CPU: one fiber per CUDA thread.
//
// A block runs on one OS thread. Its CUDA threads are fibers that give way only inside the primitives below
// (barriers, warp collectives, atomics, ...): in lane order for seed 0, else in a pseudo-random order that the
// seed reproduces. Execution is sequentially consistent, so a missing fence cannot be seen here.
//
// Kernels and runtime are compiled with the same macro:
//   KVLAR_SIMT_ASAN with -fsanitize=address,undefined on the kernels: bounds, alignment, undefined behaviour
//   KVLAR_SIMT_TSAN with -fsanitize=thread on the kernels: data races between CUDA threads
#pragma once
#include <cstdio>
#include <type_traits>
#include "simt/types.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#if defined(KVLAR_SIMT_ASAN)  // ASan gives red zones to statics, not to TLS: the runtime then runs one block at a time
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

#ifdef KVLAR_SIMT_TSAN
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#endif

namespace simt {

// ---- what the runtime offers
struct Lane {  // the part of a fiber that kernels can see
  uint3 tid;
  unsigned lane, warp;
  alignas(16) unsigned char in[64];   // operands of a warp collective
  alignas(16) unsigned char out[64];  // its result for this lane
};
struct Block {
  uint3 bid, bdim, gdim;
  unsigned char* dyn;  // dynamic shared memory
  // All of it, for entries that were compiled elsewhere: that of fixed size, then the dynamic.
  unsigned char* shared;
  unsigned shared_bytes;
  unsigned launch;  // this one's number, from 1
};
constexpr unsigned kSharedAlignment = 128;  // of dynamic shared memory
// Read at every turn. In a library that is an otherwise hidden call, which the sanitizers hook: half of their time. (Others may be
// loaded late, when there is no room for the shared memory of theirs.)
#if defined(KVLAR_SIMT_ASAN) || defined(KVLAR_SIMT_TSAN)
#define SIMT_TLS __attribute__((tls_model("initial-exec")))
#else
#define SIMT_TLS
#endif
extern __thread Lane* cur SIMT_TLS;
extern __thread Block blk SIMT_TLS;

typedef void (*Completion)(Lane* const lanes[32], unsigned mask, int arg);
// Blocks until every lane of `mask` has called with the same operation; the last one runs `fn` for all.
void warp_collective(unsigned mask, const char* op, Completion fn, int arg);
void warp_barrier(unsigned mask);                             // __syncwarp: also orders memory
void block_barrier(int id, int nthreads, bool wait = true);   // bar.sync / bar.arrive; nthreads < 0: the whole block
int block_barrier_reduce(int kind, int pred);                 // 0 count, 1 and, 2 or
void yield();                                                 // in spin loops
void maybe_yield();                                           // a preemption point
bool coin();                                                  // a reproducible random bit
// An mbarrier of 8 bytes: arrivals, and bytes that bulk copies still have to bring.
void mbarrier_init(unsigned char* bar, unsigned arrivals);
void mbarrier_arrive(unsigned char* bar, unsigned expected_bytes);
void mbarrier_landed(unsigned char* bar, unsigned bytes);
bool mbarrier_passed(unsigned char* bar, unsigned parity);
[[noreturn]] void fail(const char* format, ...);              // ends the launch with an error

// Collectives, in collectives.cpp
void c_nop(Lane* const*, unsigned, int);
void c_shfl(Lane* const*, unsigned, int);
void c_ballot(Lane* const*, unsigned, int);
void c_reduce(Lane* const*, unsigned, int);
void c_match_any(Lane* const*, unsigned, int);
void c_match_all(Lane* const*, unsigned, int);
void c_gather_rows(Lane* const*, unsigned, int);  // the address exchange of ldmatrix
void c_movmatrix(Lane* const*, unsigned, int);
void c_mma_16816(Lane* const*, unsigned, int bf16);
void c_mma_1688(Lane* const*, unsigned, int bf16);
void c_mma_16832_int8(Lane* const*, unsigned, int unsigned_a);
void c_mma_16816_int8(Lane* const*, unsigned, int unsigned_a);

SIMT_INLINE unsigned char* dyn_smem() { return blk.dyn; }
template <class T> SIMT_INLINE void put(const T& v, unsigned at = 0) { std::memcpy(cur->in + at, &v, sizeof v); }
template <class T> SIMT_INLINE T get(unsigned at = 0) {
  T v;
  std::memcpy(&v, cur->out + at, sizeof v);
  return v;
}
SIMT_INLINE int lane() { return int(cur->lane); }

// ---- launching
struct KernelDesc {  // one per GPU_EXPORT, as the symbol kvlar_simt_kernel_<entry>
  const char* name;
  void (*entry)(const void* params);  // runs the kernel body for the current fiber
  unsigned params_bytes;
  unsigned fixed_shared_bytes;           // 0 where the entry's own `__shared__` variables are the host compiler's
};
template <class P> struct EntryOf {
  template <void (*K)(const P)> static void run(const void* params) { K(*static_cast<const P*>(params)); }
  static constexpr unsigned bytes = sizeof(P);
};
template <class P> EntryOf<P> entry_of(void (*)(const P));
}  // namespace simt

#define GPU_EXPORT(kernel)                                                                     \
  extern "C" const simt::KernelDesc kvlar_simt_kernel_##kernel;                                \
  const simt::KernelDesc kvlar_simt_kernel_##kernel = {                                        \
      #kernel, &decltype(simt::entry_of(kernel))::template run<&kernel>, decltype(simt::entry_of(kernel))::bytes, 0};

// 0 = ok, else the text of simt::last_error. Seed 0 = lane order. workers 0 = all cores.
extern "C" int kvlar_simt_launch(const simt::KernelDesc*, const unsigned grid[3], const unsigned block[3], unsigned shared_bytes,
                                 const void* params, unsigned params_bytes, uint64_t seed, unsigned workers);
extern "C" const char* kvlar_simt_last_error();

// ---- built-in variables
#define threadIdx (simt::cur->tid)
#define blockIdx (simt::blk.bid)
#define blockDim (simt::blk.bdim)
#define gridDim (simt::blk.gdim)
static constexpr int warpSize = 32;

// ---- block and warp synchronization
SIMT_INLINE void __syncthreads() { simt::block_barrier(0, -1); }
SIMT_INLINE int __syncthreads_count(int p) { return simt::block_barrier_reduce(0, p); }
SIMT_INLINE int __syncthreads_and(int p) { return simt::block_barrier_reduce(1, p); }
SIMT_INLINE int __syncthreads_or(int p) { return simt::block_barrier_reduce(2, p); }
SIMT_INLINE void __syncwarp(unsigned mask = 0xffffffffu) { simt::warp_barrier(mask); }
SIMT_INLINE void __nanosleep(unsigned) { simt::yield(); }
#ifdef KVLAR_SIMT_TSAN  // TSan does not model fences: a fence both publishes and observes
namespace simt { extern char fence_obj; }
SIMT_INLINE void __threadfence() { __tsan_release(&simt::fence_obj); __tsan_acquire(&simt::fence_obj); }
#else
SIMT_INLINE void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#endif
SIMT_INLINE void __threadfence_block() { __threadfence(); }

namespace simt {
template <class T> SIMT_INLINE T shfl(unsigned mask, T v, int src, const char* op) {
  static_assert(sizeof(T) <= 8, "shuffle of more than 64 bits");
  uint64_t raw = 0;
  std::memcpy(&raw, &v, sizeof v);
  put(raw);
  put(src, 8);
  warp_collective(mask, op, c_shfl, 0);
  return get<T>();
}
SIMT_INLINE unsigned reduce(unsigned mask, unsigned v, int kind) {
  put(v);
  warp_collective(mask, "__reduce_sync", c_reduce, kind);
  return get<unsigned>();
}
}  // namespace simt
template <class T> SIMT_INLINE T __shfl_sync(unsigned m, T v, int src, int w = 32) {
  const int l = simt::lane();
  return simt::shfl(m, v, (l & ~(w - 1)) | (src & (w - 1)), "__shfl_sync");
}
template <class T> SIMT_INLINE T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) {
  const int l = simt::lane(), s = l ^ x;
  return simt::shfl(m, v, s >= (l & ~(w - 1)) + w ? l : s, "__shfl_xor_sync");
}
template <class T> SIMT_INLINE T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) {
  const int l = simt::lane(), s = l + int(d);
  return simt::shfl(m, v, s >= (l & ~(w - 1)) + w ? l : s, "__shfl_down_sync");
}
template <class T> SIMT_INLINE T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) {
  const int l = simt::lane(), s = l - int(d);
  return simt::shfl(m, v, s < (l & ~(w - 1)) ? l : s, "__shfl_up_sync");
}
SIMT_INLINE unsigned __ballot_sync(unsigned m, int p) {
  simt::put(p);
  simt::warp_collective(m, "__ballot_sync", simt::c_ballot, 0);
  return simt::get<unsigned>();
}
SIMT_INLINE int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
SIMT_INLINE int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }
SIMT_INLINE unsigned __match_any_sync(unsigned m, unsigned v) {
  simt::put(v);
  simt::warp_collective(m, "__match_any_sync", simt::c_match_any, 0);
  return simt::get<unsigned>();
}
SIMT_INLINE unsigned __match_all_sync(unsigned m, unsigned v, int* pred) {
  simt::put(v);
  simt::warp_collective(m, "__match_all_sync", simt::c_match_all, 0);
  *pred = simt::get<unsigned>() != 0;
  return simt::get<unsigned>();
}
SIMT_INLINE unsigned __reduce_add_sync(unsigned m, unsigned v) { return simt::reduce(m, v, 0); }
SIMT_INLINE unsigned __reduce_min_sync(unsigned m, unsigned v) { return simt::reduce(m, v, 1); }
SIMT_INLINE unsigned __reduce_max_sync(unsigned m, unsigned v) { return simt::reduce(m, v, 2); }
SIMT_INLINE unsigned __reduce_and_sync(unsigned m, unsigned v) { return simt::reduce(m, v, 3); }
SIMT_INLINE unsigned __reduce_or_sync(unsigned m, unsigned v) { return simt::reduce(m, v, 4); }
SIMT_INLINE unsigned __reduce_xor_sync(unsigned m, unsigned v) { return simt::reduce(m, v, 5); }
SIMT_INLINE int __reduce_add_sync(unsigned m, int v) { return int(simt::reduce(m, unsigned(v), 0)); }
SIMT_INLINE int __reduce_min_sync(unsigned m, int v) { return int(simt::reduce(m, unsigned(v) ^ 0x80000000u, 1) ^ 0x80000000u); }
SIMT_INLINE int __reduce_max_sync(unsigned m, int v) { return int(simt::reduce(m, unsigned(v) ^ 0x80000000u, 2) ^ 0x80000000u); }

#include "simt/intrinsics.h"
