// CUDA's vector and small float types for a host compiler, with the conversions kernels use. No CUDA header
// is needed. Conversions round to nearest even; NaN stays NaN; fp8 e4m3 saturates at 448.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define SIMT_INLINE inline __attribute__((always_inline))

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint3 { unsigned x, y, z; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
SIMT_INLINE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
SIMT_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
SIMT_INLINE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
SIMT_INLINE int2 make_int2(int x, int y) { return {x, y}; }
SIMT_INLINE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
SIMT_INLINE float2 make_float2(float x, float y) { return {x, y}; }
SIMT_INLINE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {
template <class To, class From> SIMT_INLINE To bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

#ifdef __F16C__  // by the compilers' builtins: the header that names them takes longer to read than most kernels
typedef short Halves __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
#endif

SIMT_INLINE float half_to_float(uint16_t h) {
#ifdef __F16C__
  return __builtin_ia32_vcvtph2ps(Halves{short(h)})[0];
#else
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 31) return bits<float>(sign | 0x7f800000u | mantissa << 13);
  if (exponent) return bits<float>(sign | (exponent + 112) << 23 | mantissa << 13);
  const float tiny = float(mantissa) * 0x1p-24f;
  return sign ? -tiny : tiny;
#endif
}

SIMT_INLINE uint16_t float_to_half(float f) {
#ifdef __F16C__
  return uint16_t(__builtin_ia32_vcvtps2ph(Floats{f}, 0)[0]);  // 0: to nearest even
#else
  const uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                  // subnormal: units of 2^-24
    const float units = bits<float>(magnitude) * 0x1p24f;
    return uint16_t(sign | uint32_t(std::nearbyintf(units)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return uint16_t(sign | ((rounded >> 13) - (112u << 10)));
#endif
}

SIMT_INLINE float bf16_to_float(uint16_t h) { return bits<float>(uint32_t(h) << 16); }
SIMT_INLINE uint16_t float_to_bf16(float f) {
  const uint32_t u = bits<uint32_t>(f);
  if ((u & 0x7fffffff) > 0x7f800000u) return 0x7fff;  // the canonical NaN of the hardware conversion
  return uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

// e4m3 without infinity: 0x7f is NaN, the largest is 448.
SIMT_INLINE float e4m3_to_float(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  float f = exponent == 15 && mantissa == 7 ? NAN
            : exponent                      ? std::ldexp(float(8 + mantissa), exponent - 10)
                                            : std::ldexp(float(mantissa), -9);
  return x & 0x80 ? -f : f;
}
SIMT_INLINE uint8_t float_to_e4m3(float f) {
  const uint8_t sign = std::signbit(f) ? 0x80 : 0;
  if (f != f) return uint8_t(sign | 0x7f);
  const float a = std::fabs(f);
  if (a >= 448.f) return uint8_t(sign | 0x7e);
  int exponent = a > 0 ? std::ilogb(a) : -20;
  if (exponent < -6) exponent = -6;
  const int units = int(std::nearbyintf(std::ldexp(a, 3 - exponent)));  // of 2^(exponent - 3)
  if (units >= 16) return uint8_t(sign | (exponent + 8) << 3);
  return uint8_t(sign | (units < 8 ? units : (exponent + 7) << 3 | (units - 8)));
}
}  // namespace simt

struct __half { uint16_t x; };
struct __nv_bfloat16 { uint16_t x; };
struct alignas(4) __half2 { __half x, y; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __nv_fp8_e4m3 {
  uint8_t __x;
  __nv_fp8_e4m3() = default;
  explicit __nv_fp8_e4m3(float f) : __x(simt::float_to_e4m3(f)) {}
  explicit operator float() const { return simt::e4m3_to_float(__x); }
};
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

SIMT_INLINE __half __float2half_rn(float f) { return {simt::float_to_half(f)}; }
SIMT_INLINE __half __float2half(float f) { return __float2half_rn(f); }
SIMT_INLINE float __half2float(__half h) { return simt::half_to_float(h.x); }
SIMT_INLINE __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
SIMT_INLINE float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
SIMT_INLINE float __low2float(__half2 h) { return __half2float(h.x); }
SIMT_INLINE float __high2float(__half2 h) { return __half2float(h.y); }
SIMT_INLINE __half2 __halves2half2(__half a, __half b) { return {a, b}; }
SIMT_INLINE unsigned short __half_as_ushort(__half h) { return h.x; }
SIMT_INLINE __half __ushort_as_half(unsigned short x) { return {x}; }
SIMT_INLINE __nv_bfloat16 __float2bfloat16_rn(float f) { return {simt::float_to_bf16(f)}; }
SIMT_INLINE __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
SIMT_INLINE float __bfloat162float(__nv_bfloat16 h) { return simt::bf16_to_float(h.x); }
SIMT_INLINE __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
SIMT_INLINE float2 __bfloat1622float2(__nv_bfloat162 h) { return {__bfloat162float(h.x), __bfloat162float(h.y)}; }
SIMT_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.x; }
SIMT_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }

// Half arithmetic: one rounding each (the double product of two halves is exact).
SIMT_INLINE __half __hadd(__half a, __half b) { return __float2half_rn(__half2float(a) + __half2float(b)); }
SIMT_INLINE __half __hsub(__half a, __half b) { return __float2half_rn(__half2float(a) - __half2float(b)); }
SIMT_INLINE __half __hmul(__half a, __half b) { return __float2half_rn(__half2float(a) * __half2float(b)); }
SIMT_INLINE __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
SIMT_INLINE __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
SIMT_INLINE __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
