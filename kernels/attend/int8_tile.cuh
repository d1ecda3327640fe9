// Tiles of int8 rows: x = zero + scale * code, with one (scale, zero) a row. Codes become fp16 by one byte
// permutation a pair: 0x6400 | code is 1024 + code exactly. Scales, zeros and the 1024 never touch an element:
//   q . x = scale * (q . (1024 + code) - 1024 * sum q) + zero * sum q
//   sum p x = sum (p scale)(1024 + code) - 1024 * sum (p scale) + sum p zero
// Bytes of a row are in natural order; q's dimensions are permuted to match instead (the order of a
// contraction is free), and the value accumulators come out strided (OutputDims).
#pragma once
#include "attend/dense_tile.cuh"

namespace kvlar::attend {

// The dimension that step k of the contraction meets at column `column` (0 to 15).
__host__ __device__ constexpr int int8_key_dim(int k, int column) {
  return 64 * (k / 4) + 16 * (column % 8 / 2) + 4 * (k % 4) + 2 * (column / 8) + column % 2;
}

template <int D, int NT> struct Int8Tile {
  static constexpr int kRows = Tiling<D, true>::kInt8Rows, kBlocks = kRows / 16, kSteps = D / 16;
  static constexpr uint32_t kMagic = 0x64646464u;

  __device__ static void scores(float (&s)[kBlocks][NT][4], const unsigned char* keys, const uint32_t (&q)[kSteps][NT][2]) {
    const Lane at;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int h = 0; h < D / 64; ++h) {
        const uint4 low = *reinterpret_cast<const uint4*>(keys + Int8KeyLayout<D>::at(16 * b + at.g, 4 * h + at.c));
        const uint4 high = *reinterpret_cast<const uint4*>(keys + Int8KeyLayout<D>::at(16 * b + at.g + 8, 4 * h + at.c));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const uint32_t x = DenseTile<D, NT, __half>::word(low, w), y = DenseTile<D, NT, __half>::word(high, w);
          const uint32_t a[4] = {__byte_perm(x, kMagic, 0x4140), __byte_perm(y, kMagic, 0x4140), __byte_perm(x, kMagic, 0x4342),
                                 __byte_perm(y, kMagic, 0x4342)};
#pragma unroll
          for (int n = 0; n < NT; ++n) Half16<__half>::mma(s[b][n], a, q[4 * h + w][n]);
        }
      }
  }

  // Bytes of kWide neighbouring dims of row `r`, as words.
  __device__ static void load_values(uint32_t (&words)[4], const unsigned char* values, int r, int j, int g) {
    if constexpr (D == 64) {
      const uint2 x = *reinterpret_cast<const uint2*>(values + Int8ValueLayout<D>::at(r, g >> 1) + ((g & 1) << 3));
      words[0] = x.x;
      words[1] = x.y;
    } else {
      const uint4 x = *reinterpret_cast<const uint4*>(values + Int8ValueLayout<D>::at(r, 8 * j + g));
      words[0] = x.x;
      words[1] = x.y;
      words[2] = x.z;
      words[3] = x.w;
    }
  }

  __device__ static void add_values(float (&o)[kSteps][NT][4], const unsigned char* values, const uint32_t (&weights)[kBlocks][NT][2]) {
    constexpr int kWide = OutputDims<D, true>::kWide;
    const Lane at;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int j = 0; j < D / (8 * kWide); ++j) {
        uint32_t rows[4][4];  // of rows 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
        for (int r = 0; r < 4; ++r) load_values(rows[r], values, 16 * b + 2 * at.c + (r & 1) + (r >> 1) * 8, j, at.g);
#pragma unroll
        for (int w = 0; w < kWide / 4; ++w)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t x = __byte_perm(rows[0][w], rows[1][w], h ? 0x7362 : 0x5140);
            const uint32_t y = __byte_perm(rows[2][w], rows[3][w], h ? 0x7362 : 0x5140);
            const uint32_t a[4] = {__byte_perm(x, kMagic, 0x4140), __byte_perm(x, kMagic, 0x4342), __byte_perm(y, kMagic, 0x4140),
                                   __byte_perm(y, kMagic, 0x4342)};
#pragma unroll
            for (int n = 0; n < NT; ++n) Half16<__half>::mma(o[j * (kWide / 2) + 2 * w + h][n], a, weights[b][n]);
          }
      }
  }
};

}  // namespace kvlar::attend
