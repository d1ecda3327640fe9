// Scores of channel-wise keys: a scale and zero a channel of a group of rows, so that
//
//   q . k = sum_d (q_d scale_d) code_d + sum_d q_d zero_d,
//
// the first product on tensor cores with queries that are scaled anew for each group, the second one number a group and
// column, on tensor cores too. Codes enter as subnormal halves: their bits alone, w 2^-24 each, w being 1, 4, 16 or 64 by
// where they stood in their byte. Codes of equal weight are summed apart, so that queries are divided by nothing: with
// scales below 1 that would cost them bits.
//
// Subnormal operands are exact on tensor cores (Fasi, Higham, Mikaitis, Pranesh 2021, Numerical behavior of NVIDIA tensor
// cores, PeerJ CS 7:e330, §4); the conformance suite asks the GPU at hand.
#pragma once
#include "attend_quantized/keys.cuh"

namespace kvlar::attend_quantized {

// The byte of 16-byte chunk `c` (channels 4c ..) of a group's scales and zeros: lane c reads chunks from a quarter or eighth
// of the row on, all lanes at once.
__host__ __device__ constexpr int channel_chunk_at(int c) { return (c ^ ((c >> 3) & 7)) << 4; }

// How queries meet the codes: step k of the contraction takes codes of one weight.
template <int D, int kBits> struct ChannelKeys {
  static constexpr float kMagic = 0.f;
  static constexpr int kCodes = 32 / kBits, kSteps = kCodes / 4;  // of a word
  static constexpr int kWords = kBits == 4 ? (D == 64 ? 2 : 4) : D / 64;  // of a lane in a unit
  static constexpr int kUnits = D / (4 * kWords * kCodes);
  __device__ static constexpr int first(int unit, int word, int lane) { return kCodes * (kWords * (4 * unit + lane) + word); }
  __device__ static constexpr int code(int j, int column) { return j + kCodes / 4 * (column / 8) + kCodes / 2 * (column % 2); }
  __device__ static constexpr int dim(int k, int column) {
    const int unit = k / (kSteps * kWords), word = k / kSteps % kWords;
    return first(unit, word, column % 8 / 2) + code(k % kSteps, column);
  }
  __device__ static constexpr int log_weight(int, int) { return 0; }
};

template <int D, int kBits> struct ChannelScores {
  using Keys = ChannelKeys<D, kBits>;
  static constexpr int kClasses = Keys::kSteps, kCodes = Keys::kCodes;

  // s = scores of the 32 rows from `row` on; `params`: the scales and zeros of their group.
  __device__ static void score(float (&s)[2][1][4], const unsigned char* keys, const unsigned char* params, int row,
                               const uint32_t (&q)[D / 16][1][2]) {
    const Lane at = lane_of<D>();
    float sum[kClasses][2][4] = {}, zeros[4] = {};
#pragma unroll
    for (int u = 0; u < Keys::kUnits; ++u) {
      uint4 x[2][2];  // rows g and g + 8 of each 16
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          x[b][h] = KeyScores<D, 1>::template words<kBits, Keys::kWords>(keys + row * (D * kBits / 8), at, 2 * b + h, u);
#pragma unroll
      for (int w = 0; w < Keys::kWords; ++w) {
        uint32_t channel[kCodes];  // (scale, zero) pairs of the word's codes
#pragma unroll
        for (int i = 0; i < kCodes / 4; ++i) {
          const uint4 four = *reinterpret_cast<const uint4*>(params + channel_chunk_at(Keys::first(u, w, at.c) / 4 + i));
#pragma unroll
          for (int e = 0; e < 4; ++e) channel[4 * i + e] = word_of(four, e);
        }
#pragma unroll
        for (int j = 0; j < Keys::kSteps; ++j) {
          const uint32_t(&query)[2] = q[(u * Keys::kWords + w) * Keys::kSteps + j][0];
          uint32_t scaled[2], zero[4];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t low = channel[Keys::code(j, 8 * h)], high = channel[Keys::code(j, 8 * h + 1)];
            scaled[h] = ptx::mul_f16x2(query[h], __byte_perm(low, high, 0x5410));
            zero[2 * h] = zero[2 * h + 1] = __byte_perm(low, high, 0x7632);  // the same for all rows
          }
          Half16<__half>::mma(zeros, zero, query);
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const uint32_t low = word_of(x[b][0], w), high = word_of(x[b][1], w);
            constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x10001u;
            const uint32_t mask = kMask << (kBits * j);
            const uint32_t a[4] = {low & mask, high & mask, (low >> 8) & mask, (high >> 8) & mask};
            Half16<__half>::mma(sum[j][b], a, scaled);
          }
        }
        if constexpr (D == 256) __syncwarp();  // keeps the next loads behind: registers are scarce
      }
    }
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float total = 0.f;
#pragma unroll
        for (int j = kClasses - 1; j >= 0; --j) total = fmaf(total, 1.f / (1 << kBits), sum[j][b][e]);
        s[b][0][e] = fmaf(total, 0x1p24f, zeros[e]);
      }
  }
};

}  // namespace kvlar::attend_quantized
