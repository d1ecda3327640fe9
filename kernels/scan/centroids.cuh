// Scores of product-quantized keys on tensor cores: a head's codebooks lie in shared memory in fp16, and the centroids that a
// row's codes name are its A fragments, read as they are. (HCAttention, arXiv 2507.19823, §3: K = centroids of codes.)
//
// A lookup reads 2 w B for w = d / m dimensions, whatever the group G is; a score table (rows.cuh) reads 4 G B and multiplies
// nothing. Shared memory bounds both: about 10, 5.5 and 3.1 random lookups a clock and SM of 4, 8 and 16 B, since lanes meet in
// banks. So centroids are looked up where 2 w <= 4 G, tables elsewhere. 1M rows (128K of 8 heads) on an H200: m = 64, w = 2
// 29 us, m = 32, w = 4 26 us, m = 16, w = 8 23 us, where the codes' bytes take 15.6, 7.8 and 3.9 us.
//
// Staging reads c * d * 4 B of fp32 centroids from L2 (128 KB at c = 256, d = 128) once a CTA and head: 3 us for 132 CTAs, and a
// warp reads the 2 KB of eight pairs a lane at a time.
//
// Order of the contraction: lane c of the four that share a row takes sub-vectors c, c + 4, c + 8, .., four dimensions a step.
#pragma once
#include "abi.h"
#include "attend_quantized/keys.cuh"
#include "attend_quantized/layout.cuh"
#include "device/pq.cuh"

namespace kvlar::scan {

// The i-th dimension that lane c meets, in sub-vectors of `width`.
__host__ __device__ constexpr int centroid_dim(int width, int c, int i) { return (4 * (i / width) + c) * width + i % width; }

// Bytes of a sub-vector's centroids: one more than there are, so that equal codes of neighbouring sub-vectors do not meet in a
// bank.
__host__ __device__ constexpr int centroids_stride(int centroids, int width) { return (centroids + 1) * 2 * width; }

// Stages a head's codebooks at `to`, multiplied by a power of two where fp16 could not hold them; gives its inverse. All
// threads of the CTA call it; a barrier must follow.
__device__ inline float stage_centroids(unsigned char* to, const KvlarFormat& format, int head, int dim, int threads) {
  __shared__ uint32_t largest_bits;
  constexpr int kAtOnce = 8;
  const int width = int(format.group), count = int(format.centroids), stride = centroids_stride(count, width);
  const int lane = int(threadIdx.x) & 31, pairs = count * width / 2;  // of a sub-vector
  const float2* const from = reinterpret_cast<const float2*>(codebooks_of(format, head, dim));
  float down = 1.f, up = 1.f;
  if (threadIdx.x == 0) largest_bits = 0;
  __syncthreads();
  for (int pass = 0; pass < 2; ++pass) {
    float largest = 0.f;
#pragma unroll 1
    for (int s = int(threadIdx.x) / 32; s < dim / width; s += threads / 32) {  // a warp a sub-vector
#pragma unroll 1
      for (int first = lane; first < pairs; first += 32 * kAtOnce) {
        float2 two[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) two[j] = __ldg(from + s * pairs + min(first + 32 * j, pairs - 1));
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = first + 32 * j;
          if (i >= pairs) continue;
          largest = fmaxf(largest, fmaxf(fabsf(two[j].x), fabsf(two[j].y)));
          *reinterpret_cast<uint32_t*>(to + s * stride + (i << 2)) = ptx::pack_f16(two[j].x * down, two[j].y * down);
        }
      }
    }
    // Seldom is there a second pass: only centroids far from 1 in size lose anything in fp16.
    if (pass == 1 || !__syncthreads_or(largest >= 32768.f || (largest > 0.f && largest < 0x1p-3f))) break;
    atomicMax(&largest_bits, __float_as_uint(largest));
    __syncthreads();
    const uint32_t exponent = min(max(largest_bits >> 23, 1u), 252u) + 1;
    up = __uint_as_float(exponent << 23);
    down = __uint_as_float((254u - exponent) << 23);
  }
  return up;
}

// How queries meet centroids: widths are even, so that the two dims of a word are neighbours.
struct CentroidKeys {
  static constexpr float kMagic = 0.f;
  int width;
  __device__ int dim(int k, int column) const { return centroid_dim(width, column % 8 / 2, 4 * k + 2 * (column / 8) + column % 2); }
  __device__ static constexpr int log_weight(int, int) { return 0; }
};

struct CentroidLookup {
  const unsigned char* tables;
  int code_log, centroids, steps;

  // s[b] += centroids of rows 16b .. of the 32 rows from `row` on, times q.
  template <int D, int NT, int kWidth>
  __device__ __forceinline__ void scores(float (&s)[2][NT][4], const unsigned char* tile, int row, const uint32_t (&q)[D / 16][NT][2]) const {
    constexpr int kSteps = D / 16;
    const Lane at;
    const int stride = centroids_stride(centroids, kWidth);
    const unsigned char* own = tables + at.c * stride;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      uint4 codes[2];  // 16 sub-vectors of rows g and g + 8
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (k >= steps) continue;
        // Word `first` of the row has the codes of this step, and (two dimensions a code) so has the next.
        constexpr int kStepsAWord = kWidth / 4 ? kWidth / 4 : 1, kWords = kWidth == 2 ? 2 : 1;
        const int first = kWords * (k / kStepsAWord);
        if (first % 4 == 0 && k % kStepsAWord == 0)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            codes[r] = *reinterpret_cast<const uint4*>(tile + attend_quantized::chunk_at(code_log, row + 16 * b + 8 * r + at.g, first / 4));
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if constexpr (kWidth == 2) {
            a[r] = *reinterpret_cast<const uint32_t*>(centroid<kWidth>(own, stride, codes[r], first, at.c));
            a[r + 2] = *reinterpret_cast<const uint32_t*>(centroid<kWidth>(own, stride, codes[r], first + 1, at.c));
          } else {
            const uint2 two = *reinterpret_cast<const uint2*>(centroid<kWidth>(own, stride, codes[r], first, at.c) + 8 * (k % kStepsAWord));
            a[r] = two.x;
            a[r + 2] = two.y;
          }
#pragma unroll
        for (int n = 0; n < NT; ++n) Half16<__half>::mma(s[b][n], a, q[k][n]);
      }
    }
  }

  // The centroid that byte c of the row's word `word` names; a code beyond them, the last.
  template <int kWidth>
  __device__ __forceinline__ const unsigned char* centroid(const unsigned char* own, int stride, const uint4& codes, int word, int c) const {
    const uint32_t code = __byte_perm(attend_quantized::word_of(codes, word % 4), 0, 0x4440u + c);
    return own + word * 4 * stride + int(min(code, uint32_t(centroids - 1))) * 2 * kWidth;
  }
};

}  // namespace kvlar::scan
