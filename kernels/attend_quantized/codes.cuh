// Codes to fp16 pairs without conversions: bits are moved into the mantissa of a constant, so that a code n becomes
// 1024 + w n exactly, w being 1, 4, 16 or 64 by where it stood in its byte. The 1024, w, scale and zero never touch an
// element: w is divided out of the queries (keys) or of the sums (values), the rest enters once a score or sum.
// fp8 codes become their value / 256: sign, exponent and mantissa move into place, the bias is left to the caller.
#pragma once
#include "device/gpu.cuh"

namespace kvlar::attend_quantized {

constexpr uint32_t kMagic = 0x64006400u;  // fp16 1024, twice

// (mask of a | magic): two codes.
template <uint32_t kMask> __device__ __forceinline__ uint32_t pair_of(uint32_t a) { return ptx::lop3<0xea>(a, kMask, kMagic); }

// Two e4m3 codes in the high bytes of halves; the low bytes may hold anything.
__device__ __forceinline__ uint32_t pair_of_fp8(uint32_t high_bytes) {
  return ptx::lop3<0xea>(high_bytes >> 1, 0x3f803f80u, high_bytes & 0x80008000u);
}

// Which of a word's four e4m3 codes are NaN, in the high bits of its bytes; the other bits hold anything. (Above, NaN
// becomes 480 / 256: who must know asks here.)
__device__ __forceinline__ uint32_t nan_bits(uint32_t word) { return (word & 0x7f7f7f7fu) + 0x01010101u; }
// Two of those bits, at the top of halves: fp16 NaN where they are set, else 0.
__device__ __forceinline__ uint32_t nan_pair(uint32_t high_bytes) {
  const uint32_t x = high_bytes & 0x80008000u;
  return x - (x >> 15);
}

}  // namespace kvlar::attend_quantized
