// Scores of quantized keys: codes are the A fragments (rows on M), queries the B fragments, in fp16.
//
// Bytes of a row are in natural order; the order of a contraction is free, so that queries are permuted to match what a
// vector load and the bit tricks of codes.cuh give.
#pragma once
#include "abi.h"
#include "attend_quantized/codes.cuh"
#include "attend_quantized/layout.cuh"
#include "device/mma.cuh"

namespace kvlar::attend_quantized {

// The dimension that step k of the contraction meets at column `column` (0 to 15), for rows of D codes of `bits` bits
// (fp8: 8 bits, pairs of every other byte).
template <int D> __device__ constexpr int key_dim(int bits, bool fp8, int k, int column) {
  const int half = column / 8, lane = column % 8 / 2, e = column % 2;
  if (bits == 8) return 64 * (k / 4) + 16 * lane + 4 * (k % 4) + (fp8 ? half + 2 * e : 2 * half + e);
  if (bits == 4) {
    const int words = D == 64 ? 2 : 4, unit = k / (2 * words), word = k / 2 % words, j = k % 2;
    return 32 * words * unit + 8 * words * lane + 8 * word + 2 * j + half + 4 * e;
  }
  const int words = D / 64, word = k / 4, j = k % 4;
  return 16 * words * lane + 16 * word + 2 * j + half + 8 * e;
}

// log2 of what a code is multiplied by there, in that half of the columns.
__device__ constexpr int key_log_weight(int bits, int k, int half) { return bits == 8 ? 0 : bits == 4 ? 4 * half : 2 * ((2 * k + half) % 4); }

// How queries meet the codes of token-wise keys.
template <int D, int kBits, bool kFp8> struct RowKeys {
  static constexpr float kMagic = kFp8 ? 0.f : 1024.f;  // what a code has too much (codes.cuh)
  __device__ static constexpr int dim(int k, int column) { return key_dim<D>(kBits, kFp8, k, column); }
  __device__ static constexpr int log_weight(int k, int half) { return key_log_weight(kBits, k, half); }
};

// Where a lane's loads are follows from its place alone; with D = 256 there are no registers to hold that.
template <int D> __device__ __forceinline__ Lane lane_of() {
  if constexpr (D == 256) return Lane::anew();
  return Lane();
}

__device__ __forceinline__ uint32_t word_of(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

// s[b] += codes of rows 16b .. of the 32 rows from `row` on, times q.
template <int D, int NT> struct KeyScores {
  static constexpr int kSteps = D / 16;
  using Scores = float (&)[2][NT][4];
  using Queries = const uint32_t (&)[kSteps][NT][2];

  __device__ static void multiply(float (&s)[NT][4], const uint32_t (&a)[4], const uint32_t (&q)[NT][2]) {
#pragma unroll
    for (int n = 0; n < NT; ++n) Half16<__half>::mma(s[n], a, q[n]);
  }

  __device__ static void int8(Scores s, const unsigned char* keys, int row, Queries q) {
    constexpr uint32_t kBytes = 0x64646464u;
    const unsigned char* rows = keys + row * D;
    const Lane at = lane_of<D>();
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int u = 0; u < D / 64; ++u) {
        const uint4 low = words<8, 4>(rows, at, 2 * b, u), high = words<8, 4>(rows, at, 2 * b + 1, u);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t x = word_of(low, w), y = word_of(high, w);
          const uint32_t a[4] = {__byte_perm(x, kBytes, 0x4140), __byte_perm(y, kBytes, 0x4140), __byte_perm(x, kBytes, 0x4342),
                                 __byte_perm(y, kBytes, 0x4342)};
          multiply(s[b], a, q[4 * u + w]);
        }
      }
  }

  // A row with a NaN among its codes scores NaN.
  __device__ static void fp8(Scores s, const unsigned char* keys, int row, Queries q) {
    const unsigned char* rows = keys + row * D;
    const Lane at = lane_of<D>();
    uint32_t nan[2][2] = {};
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int u = 0; u < D / 64; ++u) {
        const uint4 low = words<8, 4>(rows, at, 2 * b, u), high = words<8, 4>(rows, at, 2 * b + 1, u);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t x = word_of(low, w), y = word_of(high, w);
          nan[b][0] |= nan_bits(x);
          nan[b][1] |= nan_bits(y);
          const uint32_t a[4] = {pair_of_fp8(x << 8), pair_of_fp8(y << 8), pair_of_fp8(x), pair_of_fp8(y)};
          multiply(s[b], a, q[4 * u + w]);
        }
      }
    if (!__any_sync(0xffffffffu, ((nan[0][0] | nan[0][1] | nan[1][0] | nan[1][1]) & 0x80808080u) != 0)) return;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t row_nan = nan[b][h];  // of the four lanes that share the row
        row_nan |= __shfl_xor_sync(0xffffffffu, row_nan, 1);
        row_nan |= __shfl_xor_sync(0xffffffffu, row_nan, 2);
        if (row_nan & 0x80808080u)
#pragma unroll
          for (int n = 0; n < NT; ++n) s[b][n][2 * h] = s[b][n][2 * h + 1] = __uint_as_float(0x7fc00000u);
      }
  }

  __device__ static void int4(Scores s, const unsigned char* keys, int row, Queries q) {
    constexpr int kWords = D == 64 ? 2 : 4;
    const unsigned char* rows = keys + row * (D / 2);
    const Lane at = lane_of<D>();
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int u = 0; u < D / (32 * kWords); ++u) {
        const uint4 low = words<4, kWords>(rows, at, 2 * b, u), high = words<4, kWords>(rows, at, 2 * b + 1, u);
#pragma unroll
        for (int w = 0; w < kWords; ++w)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const uint32_t x = word_of(low, w) >> (8 * j), y = word_of(high, w) >> (8 * j);
            const uint32_t a[4] = {pair_of<0x000f000fu>(x), pair_of<0x000f000fu>(y), pair_of<0x00f000f0u>(x), pair_of<0x00f000f0u>(y)};
            multiply(s[b], a, q[2 * (kWords * u + w) + j]);
          }
      }
  }

  __device__ static void int2(Scores s, const unsigned char* keys, int row, Queries q) {
    constexpr int kWords = D / 64;
    const unsigned char* rows = keys + row * (D / 4);
    const Lane at = lane_of<D>();
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const uint4 low = words<2, kWords>(rows, at, 2 * b, 0), high = words<2, kWords>(rows, at, 2 * b + 1, 0);
#pragma unroll
      for (int w = 0; w < kWords; ++w)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t x = word_of(low, w) >> (8 * j), y = word_of(high, w) >> (8 * j);
          const uint32_t a[4] = {pair_of<0x00030003u>(x), pair_of<0x00030003u>(y), pair_of<0x000c000cu>(x), pair_of<0x000c000cu>(y)};
          multiply(s[b], a, q[4 * w + 2 * j]);
          const uint32_t c[4] = {pair_of<0x00300030u>(x), pair_of<0x00300030u>(y), pair_of<0x00c000c0u>(x), pair_of<0x00c000c0u>(y)};
          multiply(s[b], c, q[4 * w + 2 * j + 1]);
        }
    }
  }

  // The words of lane (g, c) in row g of the `eighth`-th 8 rows: neighbours in the row, from byte 4 kWords (4 unit + c) on. What
  // depends on the lane is the same in every tile; the rest is an immediate.
  template <int kBits, int kWords> __device__ static uint4 words(const unsigned char* rows, Lane at, int eighth, int unit) {
    constexpr int kLog = log_chunks<D>(kBits);
    const int byte = 4 * kWords * (4 * unit + at.c);
    const unsigned char* from = rows + chunk_at(kLog, at.g, byte / 16) + byte % 16 + eighth * kRepeat * (16 << kLog);
    if constexpr (kWords == 4) return *reinterpret_cast<const uint4*>(from);
    if constexpr (kWords == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      return make_uint4(two.x, two.y, 0, 0);
    }
    return make_uint4(*reinterpret_cast<const uint32_t*>(from), 0, 0, 0);
  }
};

}  // namespace kvlar::attend_quantized
