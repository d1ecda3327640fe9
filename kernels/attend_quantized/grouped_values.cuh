// Sums of quantized values whose rows have a scale and zero for every few dimensions (KIVI, arXiv 2402.02750, §3.1: 32).
//
// Such a scale fits neither the softmax weights (they serve all dimensions) nor the sums (they hold all rows): codes become
// values in fp16, zero + scale * code with one rounding, two instructions a pair of rows. Scales and zeros of a pair of rows
// are those of a lane's neighbouring dimensions, so that they are fetched once for all of them.
#pragma once
#include "attend_quantized/values.cuh"

namespace kvlar::attend_quantized {

// (low, high) of two (scale, zero) pairs.
__device__ __forceinline__ uint32_t scales_of(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x5410); }
__device__ __forceinline__ uint32_t zeros_of(uint32_t x, uint32_t y) { return __byte_perm(x, y, 0x7632); }

struct PairScales {  // of rows 2c, 2c + 1 and 2c + 8, 2c + 9
  uint32_t scale[2], zero[2];
};

// 1024 + weight * code to a value.
template <int kWeight> __device__ __forceinline__ uint32_t value_of(uint32_t coded, const PairScales& by, int h) {
  constexpr uint32_t kExponent = 15 - (kWeight == 64 ? 6 : kWeight == 16 ? 4 : kWeight == 4 ? 2 : 0);
  constexpr uint32_t kShrink = (kExponent << 10) * 0x10001u, kShift = 0x80008000u | ((kExponent + 10) << 10) * 0x10001u;
  return ptx::fma_f16x2(ptx::fma_f16x2(coded, kShrink, kShift), by.scale[h], by.zero[h]);
}

template <int D> struct GroupedValues {
  using Rows = ValueSums<D, 1>;
  static constexpr int kSteps = D / 16, kWide = Rows::kWide;
  using Sums = float (&)[kSteps][1][4];
  using Weights = const uint32_t (&)[2][1][2];

  // Where a row's scales and zeros are: `count` of them, one for `group` dimensions.
  struct Params {
    unsigned char* data;
    int count, group;
    // Of lane group g's dimensions of block j.
    __device__ int index(int j, int g) const { return min((8 * j + g) * kWide / group, count - 1); }
    __device__ uint32_t at(int row, int index) const { return reinterpret_cast<const uint32_t*>(data)[row * count + index]; }
    __device__ void clear(int row, int index) const { reinterpret_cast<uint32_t*>(data)[row * count + index] = 0; }
  };

  __device__ static PairScales scales(const Params& params, int row, int j) {
    const Lane at;
    const int index = params.index(j, at.g);
    PairScales by;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t x = params.at(row + 2 * at.c + 8 * h, index), y = params.at(row + 2 * at.c + 8 * h + 1, index);
      by.scale[h] = scales_of(x, y);
      by.zero[h] = zeros_of(x, y);
    }
    return by;
  }

  // o += values of 32 rows from `row` on, weighted. `scales_at(row, j)`: of block j of dimensions.
  template <int kBits, class Scales> __device__ static void add(Sums o, const unsigned char* values, int row, Weights weights, const Scales& scales_at) {
    Rows::template rows<kBits>(values, row, [&](int j, int b, const auto& x) {
      const PairScales by = scales_at(row + 16 * b, j);
      if constexpr (kBits == 8) {
        constexpr uint32_t kBytes = 0x64646464u;
#pragma unroll
        for (int w = 0; w < kWide / 4; ++w)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t u = __byte_perm(x[0][w], x[1][w], h ? 0x7362 : 0x5140), v = __byte_perm(x[2][w], x[3][w], h ? 0x7362 : 0x5140);
            const uint32_t a[4] = {value_of<1>(__byte_perm(u, kBytes, 0x4140), by, 0), value_of<1>(__byte_perm(u, kBytes, 0x4342), by, 0),
                                   value_of<1>(__byte_perm(v, kBytes, 0x4140), by, 1), value_of<1>(__byte_perm(v, kBytes, 0x4342), by, 1)};
            Rows::multiply(o[j * (kWide / 2) + 2 * w + h], a, weights[b]);
          }
      } else {
        constexpr int kPairs = 4;  // of neighbouring dimensions in half a word of 2 bits, or a word of 4
#pragma unroll
        for (int w = 0; w < kWide / 8; ++w)
#pragma unroll
          for (int m = 0; m < kPairs; ++m) {
            constexpr int kHalves = 8 / kBits / 2;  // pairs of dimensions in a byte
            const int word = kBits == 4 ? w : 0, byte = kBits == 4 ? m : 2 * w + m / 2;
            const uint32_t u = __byte_perm(x[0][word], x[1][word], byte < 2 ? 0x5410 : 0x7632) >> (8 * (byte % 2));
            const uint32_t v = __byte_perm(x[2][word], x[3][word], byte < 2 ? 0x5410 : 0x7632) >> (8 * (byte % 2));
            if constexpr (kHalves == 1) {
              const uint32_t a[4] = {value_of<1>(pair_of<0x000f000fu>(u), by, 0), value_of<16>(pair_of<0x00f000f0u>(u), by, 0),
                                     value_of<1>(pair_of<0x000f000fu>(v), by, 1), value_of<16>(pair_of<0x00f000f0u>(v), by, 1)};
              Rows::multiply(o[j * (kWide / 2) + 4 * w + m], a, weights[b]);
            } else if (m % 2 == 0) {
              const uint32_t a[4] = {value_of<1>(pair_of<0x00030003u>(u), by, 0), value_of<4>(pair_of<0x000c000cu>(u), by, 0),
                                     value_of<1>(pair_of<0x00030003u>(v), by, 1), value_of<4>(pair_of<0x000c000cu>(v), by, 1)};
              Rows::multiply(o[j * (kWide / 2) + 4 * w + m], a, weights[b]);
            } else {
              const uint32_t a[4] = {value_of<16>(pair_of<0x00300030u>(u), by, 0), value_of<64>(pair_of<0x00c000c0u>(u), by, 0),
                                     value_of<16>(pair_of<0x00300030u>(v), by, 1), value_of<64>(pair_of<0x00c000c0u>(v), by, 1)};
              Rows::multiply(o[j * (kWide / 2) + 4 * w + m], a, weights[b]);
            }
          }
      }
    });
  }
};

}  // namespace kvlar::attend_quantized
