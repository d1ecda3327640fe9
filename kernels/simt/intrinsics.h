// Atomics, bit and math intrinsics of CUDA for a host compiler. Included by host.h.
#pragma once

// ---- atomics: relaxed, as in CUDA
namespace simt {
template <class T, class F> SIMT_INLINE T rmw(T* p, F f) {  // any 32- or 64-bit T
  maybe_yield();
  typedef typename std::conditional<sizeof(T) == 8, uint64_t, uint32_t>::type B;
  B* q = reinterpret_cast<B*>(p);
  B old = __atomic_load_n(q, __ATOMIC_RELAXED), next;
  T t;
  do {
    std::memcpy(&t, &old, sizeof t);
    const T r = f(t);
    std::memcpy(&next, &r, sizeof r);
  } while (!__atomic_compare_exchange_n(q, &old, next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return t;
}
}  // namespace simt
template <class T, class U> SIMT_INLINE T atomicAdd(T* p, U v) { return simt::rmw(p, [&](T x) { return T(x + T(v)); }); }
template <class T, class U> SIMT_INLINE T atomicSub(T* p, U v) { return simt::rmw(p, [&](T x) { return T(x - T(v)); }); }
template <class T, class U> SIMT_INLINE T atomicAnd(T* p, U v) { return simt::rmw(p, [&](T x) { return T(x & T(v)); }); }
template <class T, class U> SIMT_INLINE T atomicOr(T* p, U v) { return simt::rmw(p, [&](T x) { return T(x | T(v)); }); }
template <class T, class U> SIMT_INLINE T atomicXor(T* p, U v) { return simt::rmw(p, [&](T x) { return T(x ^ T(v)); }); }
template <class T, class U> SIMT_INLINE T atomicExch(T* p, U v) { return simt::rmw(p, [&](T) { return T(v); }); }
template <class T, class U> SIMT_INLINE T atomicMax(T* p, U v) { return simt::rmw(p, [&](T x) { return x > T(v) ? x : T(v); }); }
template <class T, class U> SIMT_INLINE T atomicMin(T* p, U v) { return simt::rmw(p, [&](T x) { return x < T(v) ? x : T(v); }); }
template <class T> SIMT_INLINE T atomicCAS(T* p, T expect, T v) { return simt::rmw(p, [&](T x) { return x == expect ? v : x; }); }

// ---- bits
SIMT_INLINE unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
SIMT_INLINE int __float_as_int(float x) { return simt::bits<int>(x); }
SIMT_INLINE float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
SIMT_INLINE float __int_as_float(int x) { return simt::bits<float>(x); }
SIMT_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
SIMT_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
SIMT_INLINE int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
SIMT_INLINE int __ffs(int x) { return __builtin_ffs(x); }
SIMT_INLINE unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
SIMT_INLINE unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) { s &= 31; return s ? hi << s | lo >> (32 - s) : hi; }
SIMT_INLINE unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { s &= 31; return s ? hi << (32 - s) | lo >> s : lo; }
SIMT_INLINE unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t ab = uint64_t(b) << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 15;
    unsigned v = unsigned(ab >> (8 * (s & 7))) & 255;
    if (s & 8) v = v & 128 ? 255 : 0;
    r |= v << (8 * i);
  }
  return r;
}
SIMT_INLINE int __dp4a(int a, int b, int c) {
  unsigned r = unsigned(c);
  for (int i = 0; i < 4; ++i) r += unsigned(int(int8_t(a >> (8 * i))) * int(int8_t(b >> (8 * i))));
  return int(r);
}
SIMT_INLINE unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 255) * (b >> (8 * i) & 255);
  return c;
}

// ---- math; kernels are compiled without contraction, so each is one rounding
SIMT_INLINE float __fadd_rn(float a, float b) { return a + b; }
SIMT_INLINE float __fsub_rn(float a, float b) { return a - b; }
SIMT_INLINE float __fmul_rn(float a, float b) { return a * b; }
SIMT_INLINE float __fdiv_rn(float a, float b) { return a / b; }
SIMT_INLINE double __dadd_rn(double a, double b) { return a + b; }
SIMT_INLINE double __dsub_rn(double a, double b) { return a - b; }
SIMT_INLINE double __dmul_rn(double a, double b) { return a * b; }
SIMT_INLINE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
SIMT_INLINE float __frcp_rn(float a) { return 1.f / a; }
SIMT_INLINE float __fsqrt_rn(float a) { return sqrtf(a); }
SIMT_INLINE float __fdividef(float a, float b) { return a / b; }
SIMT_INLINE float __expf(float x) { return expf(x); }
SIMT_INLINE float __logf(float x) { return logf(x); }
SIMT_INLINE float __log2f(float x) { return log2f(x); }
SIMT_INLINE float rsqrtf(float x) { return 1.f / sqrtf(x); }
SIMT_INLINE int __float2int_rn(float x) { return int(lrintf(x)); }
SIMT_INLINE float __int2float_rn(int x) { return float(x); }
template <class T> SIMT_INLINE T __ldg(const T* p) { return *p; }
template <class T> SIMT_INLINE T __ldcg(const T* p) { return *p; }
template <class T> SIMT_INLINE T __ldcs(const T* p) { return *p; }
template <class T> SIMT_INLINE void __stcg(T* p, T v) { *p = v; }
template <class T> SIMT_INLINE void __stcs(T* p, T v) { *p = v; }
template <class A, class B> SIMT_INLINE typename std::common_type<A, B>::type min(A a, B b) { return b < a ? b : a; }
template <class A, class B> SIMT_INLINE typename std::common_type<A, B>::type max(A a, B b) { return a < b ? b : a; }
