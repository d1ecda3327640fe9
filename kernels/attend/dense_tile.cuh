// Tiles of bf16 or f16 rows: scores and value sums on tensor cores.
#pragma once
#include "attend/tiles.cuh"
#include "device/mma.cuh"

namespace kvlar::attend {

// Which value dimension an output accumulator holds. `o[i]` has 16 of them: lane group g holds the lower of
// its pair in registers 0, 1 and the upper in 2, 3.
// Natural: what ldmatrix gives. Strided: kWide neighbours a lane, what a vector load of integer rows gives.
template <int D, bool kStrided> struct OutputDims {
  static constexpr int kWide = D / 8 < 16 ? D / 8 : 16;
  static constexpr bool kNeighbours = kStrided;  // dims of accumulators 2j and 2j + 1 are four neighbours
  static constexpr __host__ __device__ int at(int i, int g, int upper) {
    return kStrided ? i / (kWide / 2) * (8 * kWide) + kWide * g + 2 * (i % (kWide / 2)) + upper : 16 * i + 8 * upper + g;
  }
};

template <int D, int NT, class T> struct DenseTile {
  static constexpr int kRows = Tiling<D>::kRows, kBlocks = kRows / 16, kSteps = D / 16;
  using Layout = DenseLayout<D>;

  // s[b] += K[rows 16b..] q^T
  __device__ static void scores(float (&s)[kBlocks][NT][4], ptx::smem keys, const uint32_t (&q)[kSteps][NT][2]) {
    const int lane = int(threadIdx.x) & 31;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, keys + uint32_t(Layout::at(16 * b + (lane & 15), 2 * k + (lane >> 4))));
#pragma unroll
        for (int n = 0; n < NT; ++n) Half16<T>::mma(s[b][n], a, q[k][n]);
      }
  }

  // o += V^T P, with P of each 16 rows as a B fragment
  template <bool kStrided>
  __device__ static void add_values(float (&o)[kSteps][NT][4], const unsigned char* values, ptx::smem values_s,
                                    const uint32_t (&weights)[kBlocks][NT][2]) {
    const int lane = int(threadIdx.x) & 31;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
      if constexpr (!kStrided) {
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          uint32_t a[4];
          ptx::ldmatrix_x4_trans(a, values_s + uint32_t(Layout::at(16 * b + (lane & 7) + ((lane >> 4) << 3), 2 * i + ((lane >> 3) & 1))));
#pragma unroll
          for (int n = 0; n < NT; ++n) Half16<T>::mma(o[i][n], a, weights[b][n]);
        }
      } else {  // beside integer rows, whose accumulators are strided
        constexpr int kWide = OutputDims<D, true>::kWide, kChunks = kWide / 8;
        const Lane at;
#pragma unroll
        for (int j = 0; j < D / (8 * kWide); ++j)
#pragma unroll
          for (int h = 0; h < kChunks; ++h) {
            uint4 rows[4];  // 8 dims of rows 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
            for (int r = 0; r < 4; ++r)
              rows[r] = *reinterpret_cast<const uint4*>(values + Layout::at(16 * b + 2 * at.c + (r & 1) + (r >> 1) * 8, kWide * j + kChunks * at.g + h));
#pragma unroll
            for (int w = 0; w < 4; ++w) {
              const uint32_t r0 = word(rows[0], w), r1 = word(rows[1], w), r2 = word(rows[2], w), r3 = word(rows[3], w);
              const uint32_t a[4] = {__byte_perm(r0, r1, 0x5410), __byte_perm(r0, r1, 0x7632), __byte_perm(r2, r3, 0x5410),
                                     __byte_perm(r2, r3, 0x7632)};
#pragma unroll
              for (int n = 0; n < NT; ++n) Half16<T>::mma(o[j * (kWide / 2) + 4 * h + w][n], a, weights[b][n]);
            }
          }
      }
  }

  __device__ static uint32_t word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
};

}  // namespace kvlar::attend
