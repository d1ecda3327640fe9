// Sums of quantized values: codes (transposed: dimensions on M, rows on K) are the A fragments, softmax weights times the
// rows' scales the B fragments, in fp16. A fragment pairs two rows of a dimension: byte permutations bring them together.
//
// Accumulators hold 1024 * sum p + w * sum p n (see codes.cuh), w by their place: `weight_of`.
#pragma once
#include "abi.h"
#include "attend/dense_tile.cuh"
#include "attend_quantized/codes.cuh"
#include "attend_quantized/keys.cuh"

namespace kvlar::attend_quantized {

// What accumulator i's lower and upper values are multiplied by.
__device__ __forceinline__ float value_weight(uint32_t codec, int i, int upper) {
  return codec == KVLAR_CODEC_FP8    ? 0x1p-8f
         : codec == KVLAR_CODEC_INT4 ? (upper ? 16.f : 1.f)
         : codec == KVLAR_CODEC_INT2 ? (i % 2 ? (upper ? 64.f : 16.f) : (upper ? 4.f : 1.f))
                                     : 1.f;
}

// o += values of 32 rows from `row` on, weighted.
template <int D, int NT> struct ValueSums {
  static constexpr int kSteps = D / 16, kWide = attend::OutputDims<D, true>::kWide, kBlocksOfDims = D / (8 * kWide);
  using Sums = float (&)[kSteps][NT][4];
  using Weights = const uint32_t (&)[2][NT][2];

  __device__ static void multiply(float (&o)[NT][4], const uint32_t (&a)[4], const uint32_t (&weights)[NT][2]) {
#pragma unroll
    for (int n = 0; n < NT; ++n) Half16<__half>::mma(o[n], a, weights[n]);
  }

  // The words of kWide codes of lane (g, c) in row 2c + odd of the `eighth`-th 8 rows, from dimension 8 kWide j + kWide g on.
  // What depends on the lane is the same in every tile; the rest is an immediate.
  template <int kBits> __device__ static void load(uint32_t (&words)[kWide * kBits / 32 ? kWide * kBits / 32 : 1], const unsigned char* rows,
                                                   Lane at, int eighth, int odd, int j) {
    constexpr int kBytes = kWide * kBits / 8, kLog = log_chunks<D>(kBits);
    const int byte = kBytes * (8 * j + at.g);
    const unsigned char* from = rows + chunk_at(kLog, 2 * at.c + odd, byte / 16) + byte % 16 + eighth * kRepeat * (16 << kLog);
    if constexpr (kBytes == 16) {
      const uint4 x = *reinterpret_cast<const uint4*>(from);
      words[0] = x.x; words[1] = x.y; words[2] = x.z; words[3] = x.w;
    } else if constexpr (kBytes == 8) {
      const uint2 x = *reinterpret_cast<const uint2*>(from);
      words[0] = x.x; words[1] = x.y;
    } else if constexpr (kBytes == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      words[0] = *reinterpret_cast<const uint16_t*>(from);
    }
  }

  // Calls `each(j, b, x)` with the words of rows 2c, 2c + 1, 2c + 8, 2c + 9 of each block of 16 rows.
  template <int kBits, class Each> __device__ static void rows(const unsigned char* values, int row, Each each) {
    constexpr int kWords = kWide * kBits / 32 ? kWide * kBits / 32 : 1;
    const unsigned char* from = values + row * (D * kBits / 8);
    const Lane at = lane_of<D>();
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int j = 0; j < kBlocksOfDims; ++j) {
        uint32_t x[4][kWords];
#pragma unroll
        for (int r = 0; r < 4; ++r) load<kBits>(x[r], from, at, 2 * b + r / 2, r % 2, j);
        each(j, b, x);
        if constexpr (D == 256) __syncwarp();  // keeps the next loads behind: registers are scarce
      }
  }

  __device__ static void int8(Sums o, const unsigned char* values, int row, Weights weights) {
    constexpr uint32_t kBytes = 0x64646464u;
    rows<8>(values, row, [&](int j, int b, const auto& x) {
#pragma unroll
      for (int w = 0; w < kWide / 4; ++w)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t u = __byte_perm(x[0][w], x[1][w], h ? 0x7362 : 0x5140), v = __byte_perm(x[2][w], x[3][w], h ? 0x7362 : 0x5140);
          const uint32_t a[4] = {__byte_perm(u, kBytes, 0x4140), __byte_perm(u, kBytes, 0x4342), __byte_perm(v, kBytes, 0x4140),
                                 __byte_perm(v, kBytes, 0x4342)};
          multiply(o[j * (kWide / 2) + 2 * w + h], a, weights[b]);
        }
    });
  }

  __device__ static void fp8(Sums o, const unsigned char* values, int row, Weights weights) {
    uint32_t nan = 0;
    rows<8>(values, row, [&](int j, int b, const auto& x) {
#pragma unroll
      for (int w = 0; w < kWide / 4; ++w) {
        nan |= nan_bits(x[0][w]) | nan_bits(x[1][w]) | nan_bits(x[2][w]) | nan_bits(x[3][w]);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t a[4] = {pair_of_fp8(high_bytes<0>(x[0][w], x[1][w], h)), pair_of_fp8(high_bytes<1>(x[0][w], x[1][w], h)),
                                 pair_of_fp8(high_bytes<0>(x[2][w], x[3][w], h)), pair_of_fp8(high_bytes<1>(x[2][w], x[3][w], h))};
          multiply(o[j * (kWide / 2) + 2 * w + h], a, weights[b]);
        }
      }
    });
    if (!__any_sync(0xffffffffu, (nan & 0x80808080u) != 0)) return;
    rows<8>(values, row, [&](int j, int b, const auto& x) {  // adds NaN where there is one, and 0
#pragma unroll
      for (int w = 0; w < kWide / 4; ++w) {
        const uint32_t y[4] = {nan_bits(x[0][w]), nan_bits(x[1][w]), nan_bits(x[2][w]), nan_bits(x[3][w])};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t a[4] = {nan_pair(high_bytes<0>(y[0], y[1], h)), nan_pair(high_bytes<1>(y[0], y[1], h)),
                                 nan_pair(high_bytes<0>(y[2], y[3], h)), nan_pair(high_bytes<1>(y[2], y[3], h))};
          multiply(o[j * (kWide / 2) + 2 * w + h], a, weights[b]);
        }
      }
    });
  }

  // Byte 2h + kUpper of both words, in the high bytes of halves.
  template <int kUpper> __device__ static uint32_t high_bytes(uint32_t x, uint32_t y, int h) {
    return __byte_perm(x, y, kUpper ? (h ? 0x7434 : 0x5414) : (h ? 0x6424 : 0x4404));
  }

  __device__ static void int4(Sums o, const unsigned char* values, int row, Weights weights) {
    rows<4>(values, row, [&](int j, int b, const auto& x) {
#pragma unroll
      for (int w = 0; w < kWide / 8; ++w)
#pragma unroll
        for (int m = 0; m < 4; ++m) {  // codes 2m and 2m + 1 of the word
          const uint32_t u = __byte_perm(x[0][w], x[1][w], m < 2 ? 0x5410 : 0x7632) >> (8 * (m % 2));
          const uint32_t v = __byte_perm(x[2][w], x[3][w], m < 2 ? 0x5410 : 0x7632) >> (8 * (m % 2));
          const uint32_t a[4] = {pair_of<0x000f000fu>(u), pair_of<0x00f000f0u>(u), pair_of<0x000f000fu>(v), pair_of<0x00f000f0u>(v)};
          multiply(o[j * (kWide / 2) + 4 * w + m], a, weights[b]);
        }
    });
  }

  __device__ static void int2(Sums o, const unsigned char* values, int row, Weights weights) {
    rows<2>(values, row, [&](int j, int b, const auto& x) {
#pragma unroll
      for (int w = 0; w < kWide / 8; ++w)  // eight codes: half a word
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const uint32_t u = __byte_perm(x[0][0], x[1][0], w == 0 ? 0x5410 : 0x7632) >> (8 * (m / 2));
          const uint32_t v = __byte_perm(x[2][0], x[3][0], w == 0 ? 0x5410 : 0x7632) >> (8 * (m / 2));
          if (m % 2 == 0) {
            const uint32_t a[4] = {pair_of<0x00030003u>(u), pair_of<0x000c000cu>(u), pair_of<0x00030003u>(v), pair_of<0x000c000cu>(v)};
            multiply(o[j * (kWide / 2) + 4 * w + m], a, weights[b]);
          } else {
            const uint32_t a[4] = {pair_of<0x00300030u>(u), pair_of<0x00c000c0u>(u), pair_of<0x00300030u>(v), pair_of<0x00c000c0u>(v)};
            multiply(o[j * (kWide / 2) + 4 * w + m], a, weights[b]);
          }
        }
    });
  }
};

}  // namespace kvlar::attend_quantized
