// The emulation of device/ptx.cuh. See there for what each function is.
#pragma once
#include "simt/host.h"

namespace ptx {
#define PTX_FN SIMT_INLINE

struct smem { unsigned char* p; };
PTX_FN smem to_smem(const void* p) { return {static_cast<unsigned char*>(const_cast<void*>(p))}; }
PTX_FN smem operator+(smem s, uint32_t bytes) { return {s.p + bytes}; }

// A copy happens anywhere between issue and wait on a GPU. Here: at issue or at the wait, by a seeded coin (seed 0: at
// the wait), so that both a missing wait and a buffer refilled too early show up as wrong values.
struct PendingCopy { unsigned char* dst; const void* src; short bytes, filled; int group; };
struct CopyQueue {
  static constexpr int kCapacity = 512;
  PendingCopy queue[kCapacity];
  int n = 0, committed = 0;
};
CopyQueue& copy_queue();  // one a CUDA thread

template <class T> PTX_FN void copy_words(unsigned char* dst, const void* src, int bytes) {
  T v{};
  if (bytes) v = *static_cast<const T*>(src);  // instrumented: the sanitizers see it
  *reinterpret_cast<T*>(dst) = v;
}
PTX_FN void do_copy(unsigned char* dst, const void* src, int bytes, int size) {
  if (bytes != 0 && bytes != size) {
    for (int i = 0; i < size; ++i) dst[i] = i < bytes ? static_cast<const unsigned char*>(src)[i] : 0;
  } else if (size == 16) copy_words<uint4>(dst, src, bytes);
  else if (size == 8) copy_words<uint2>(dst, src, bytes);
  else copy_words<uint32_t>(dst, src, bytes);
}
PTX_FN void cp_async(smem dst, const void* src, int bytes, int size) {
  if (bytes < 0 || bytes > size) simt::fail("cp.async of %d bytes: source size %d", size, bytes);
  if (reinterpret_cast<uintptr_t>(dst.p) % size || (bytes && reinterpret_cast<uintptr_t>(src) % size)) simt::fail("cp.async: misaligned address");
  if (simt::coin()) return do_copy(dst.p, src, bytes, size);
  CopyQueue& c = copy_queue();
  if (c.n == CopyQueue::kCapacity) simt::fail("cp.async: more than %d copies in flight in one thread", CopyQueue::kCapacity);
  c.queue[c.n++] = {dst.p, src, short(bytes), short(size), c.committed};
}
PTX_FN void cp_async16(smem dst, const void* src, int src_bytes = 16) { cp_async(dst, src, src_bytes, 16); }
PTX_FN void cp_async16_stream(smem dst, const void* src) { cp_async(dst, src, 16, 16); }
PTX_FN void cp_async8(smem dst, const void* src, int src_bytes = 8) { cp_async(dst, src, src_bytes, 8); }
PTX_FN void cp_async4(smem dst, const void* src, int src_bytes = 4) { cp_async(dst, src, src_bytes, 4); }
PTX_FN void cp_async_commit() { copy_queue().committed++; }
PTX_FN void cp_async_wait_but(int newest) {
  CopyQueue& c = copy_queue();
  int keep = 0;
  for (int i = 0; i < c.n; ++i) {
    const PendingCopy& q = c.queue[i];
    if (q.group < c.committed - newest) do_copy(q.dst, q.src, q.bytes, q.filled);
    else c.queue[keep++] = q;
  }
  c.n = keep;
}
template <int N> PTX_FN void cp_async_wait() { cp_async_wait_but(N); }

// Barriers of asynchronous copies: their state is the runtime's, which is never sanitized.
PTX_FN void mbarrier_init(smem bar, uint32_t arrivals) { simt::mbarrier_init(bar.p, arrivals); }
PTX_FN void mbarrier_arrive_expect(smem bar, uint32_t bytes) { simt::mbarrier_arrive(bar.p, bytes); }
PTX_FN void mbarrier_arrive(smem bar) { simt::mbarrier_arrive(bar.p, 0); }
PTX_FN bool mbarrier_try_wait(smem bar, uint32_t parity) {
  simt::maybe_yield();
  return simt::mbarrier_passed(bar.p, parity);
}
PTX_FN void mbarrier_wait(smem bar, uint32_t parity) { while (!mbarrier_try_wait(bar, parity)) simt::yield(); }
PTX_FN void bulk_copy(smem dst, const void* src, uint32_t bytes, smem bar) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(dst.p) % 16 || reinterpret_cast<uintptr_t>(src) % 16) simt::fail("bulk copy: not a multiple of 16 bytes");
  for (uint32_t i = 0; i < bytes; i += 16) copy_words<uint4>(dst.p + i, static_cast<const unsigned char*>(src) + i, 16);
  simt::mbarrier_landed(bar.p, bytes);
}

template <int K> PTX_FN void ldmatrix_any(uint32_t (&r)[K], smem row, bool trans) {
  if (simt::lane() < 8 * K && reinterpret_cast<uintptr_t>(row.p) & 15) simt::fail("ldmatrix: row address not 16-byte aligned");
  simt::put(row.p);
  simt::warp_collective(0xffffffffu, trans ? "ldmatrix.trans" : "ldmatrix", simt::c_gather_rows, trans);
  for (int m = 0; m < K; ++m) {
    if (!trans) {
      r[m] = *reinterpret_cast<const uint32_t*>(simt::get<unsigned char*>(8 * m) + 4 * (simt::lane() & 3));
    } else {  // elements 2 (lane % 4) and + 1 of column lane / 4
      const uint32_t low = *reinterpret_cast<const uint16_t*>(simt::get<unsigned char*>(16 * m) + 2 * (simt::lane() >> 2));
      const uint32_t high = *reinterpret_cast<const uint16_t*>(simt::get<unsigned char*>(16 * m + 8) + 2 * (simt::lane() >> 2));
      r[m] = low | high << 16;
    }
  }
}
PTX_FN void ldmatrix_x1(uint32_t& r, smem row) { uint32_t x[1]; ldmatrix_any(x, row, false); r = x[0]; }
PTX_FN void ldmatrix_x2(uint32_t (&r)[2], smem row) { ldmatrix_any(r, row, false); }
PTX_FN void ldmatrix_x2_trans(uint32_t (&r)[2], smem row) { ldmatrix_any(r, row, true); }
PTX_FN void ldmatrix_x4(uint32_t (&r)[4], smem row) { ldmatrix_any(r, row, false); }
PTX_FN void ldmatrix_x4_trans(uint32_t (&r)[4], smem row) { ldmatrix_any(r, row, true); }
PTX_FN uint32_t movmatrix_trans(uint32_t x) {
  simt::put(x);
  simt::warp_collective(0xffffffffu, "movmatrix", simt::c_movmatrix, 0);
  return simt::get<uint32_t>();
}

template <class D> PTX_FN void mma_any(D (&d)[4], const uint32_t* a, int a_words, const uint32_t* b, int b_words, const char* op,
                                       simt::Completion fn, int arg) {
  std::memcpy(simt::cur->in, a, 4 * a_words);
  std::memcpy(simt::cur->in + 16, b, 4 * b_words);
  std::memcpy(simt::cur->in + 32, d, 16);
  simt::warp_collective(0xffffffffu, op, fn, arg);
  std::memcpy(d, simt::cur->out, 16);
}
#define PTX_MMA(name, D, fn, arg)                                                                   \
  PTX_FN void name(D (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                   \
    const uint32_t b[2] = {b0, b1};                                                                 \
    mma_any(d, a, 4, b, 2, #name, simt::fn, arg);                                                   \
  }
#define PTX_MMA_SMALL(name, D, fn, arg)                                                             \
  PTX_FN void name(D (&d)[4], const uint32_t (&a)[2], uint32_t b) { mma_any(d, a, 2, &b, 1, #name, simt::fn, arg); }
PTX_MMA(mma_m16n8k16_bf16, float, c_mma_16816, 1)
PTX_MMA(mma_m16n8k16_f16, float, c_mma_16816, 0)
PTX_MMA(mma_m16n8k32_s8, int, c_mma_16832_int8, 0)
PTX_MMA(mma_m16n8k32_u8s8, int, c_mma_16832_int8, 1)
PTX_MMA_SMALL(mma_m16n8k8_bf16, float, c_mma_1688, 1)
PTX_MMA_SMALL(mma_m16n8k8_f16, float, c_mma_1688, 0)
PTX_MMA_SMALL(mma_m16n8k16_s8, int, c_mma_16816_int8, 0)
#undef PTX_MMA
#undef PTX_MMA_SMALL

PTX_FN float flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.f, x) : x; }
PTX_FN float ex2_approx(float x) { return flush(exp2f(flush(x))); }
PTX_FN float lg2_approx(float x) { return log2f(flush(x)); }
PTX_FN float rcp_approx(float x) { return flush(1.f / flush(x)); }
PTX_FN float tanh_approx(float x) { return tanhf(x); }
PTX_FN uint32_t pack_bf16(float low, float high) { return simt::float_to_bf16(low) | uint32_t(simt::float_to_bf16(high)) << 16; }
PTX_FN uint32_t pack_f16(float low, float high) { return simt::float_to_half(low) | uint32_t(simt::float_to_half(high)) << 16; }
PTX_FN float2 unpack_f16(uint32_t x) { return {simt::half_to_float(uint16_t(x)), simt::half_to_float(uint16_t(x >> 16))}; }
PTX_FN uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  const float2 x = unpack_f16(a), y = unpack_f16(b);
  return pack_f16(x.x * y.x, x.y * y.y);  // exact before it is rounded
}
// a b + c is exact in double wherever that decides how a half is rounded; to odd on the way to float, so that it is once.
PTX_FN uint16_t fma_f16(float a, float b, float c) {
  const double exact = double(a) * b + c;
  float rounded = float(exact);
  if (double(rounded) != exact && rounded == rounded) {
    if (std::fabs(double(rounded)) > std::fabs(exact)) rounded = std::nextafterf(rounded, 0.f);
    rounded = __uint_as_float(__float_as_uint(rounded) | 1);
  }
  return simt::float_to_half(rounded);
}
PTX_FN uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  const float2 x = unpack_f16(a), y = unpack_f16(b), z = unpack_f16(c);
  return fma_f16(x.x, y.x, z.x) | uint32_t(fma_f16(x.y, y.y, z.y)) << 16;
}
PTX_FN int unknown(int x) { return x; }
template <int LUT> PTX_FN uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r = 0;
  for (int i = 0; i < 8; ++i)
    if (LUT >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

PTX_FN uint32_t add_acq_rel(uint32_t* p, uint32_t v) { simt::maybe_yield(); return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
PTX_FN void bar_sync(int id, int threads) { simt::block_barrier(id, threads); }
PTX_FN void bar_arrive(int id, int threads) { simt::block_barrier(id, threads, false); }

#undef PTX_FN
}  // namespace ptx
