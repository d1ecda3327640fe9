// Product quantization of rows, a row a warp: a byte a sub-vector, the number of its nearest centroid (Jegou et al. 2011;
// HCAttention, arXiv 2507.19823, §3). Bit-equal to the reference: see its codec::pq module for the rules.
//
// Codebooks are fp32 [head][sub-vector][centroid][width] and are read from L2, or from memory where many layers have theirs: c * d
// * 4 B a row (128 KB at c = 256, d = 128). A warp has 2 KB of them on their way: some 30K cycles a row, a fourth of that where four
// warps share it. Appends of a decode step can live with that; encode/pq.cu is for many rows.
#pragma once
#include "abi.h"
#include "device/gpu.cuh"

namespace kvlar {

struct Nearest {
  float distance;
  int code;
};

__device__ inline Nearest nobody() { return {INFINITY, 0}; }
// Of equally near ones the first; distances that are not finite are never the nearest.
__device__ inline Nearest nearer(Nearest a, Nearest b) {
  return b.distance < a.distance || (b.distance == a.distance && b.code < a.code) ? b : a;
}
// What one dimension adds to a squared distance; none of it is fused.
__device__ inline float add_square(float sum, float x, float centroid) {
  const float difference = __fsub_rn(x, centroid);
  return __fadd_rn(sum, __fmul_rn(difference, difference));
}

__device__ inline const float* codebooks_of(const KvlarFormat& format, int head, int dim) {
  return format.tables + int64_t(head) * format.centroids * dim;
}

// Bytes of a row of codes, padded to 16.
__device__ inline int pq_row_bytes(int subvectors) { return (subvectors + 15) / 16 * 16; }

// The nearest of a lane's centroids: codes lane, lane + 32, ... kCodes of them are on their way at a time.
template <int kWidth, int kCodes>
__device__ __forceinline__ Nearest nearest_of_lane(const float* x, const float* centroids, int count, int lane) {
  Nearest best = nobody();
  float own[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) own[i] = x[i];
#pragma unroll 1
  for (int first = lane; first < count; first += 32 * kCodes) {
    float2 c[kCodes][kWidth / 2];
#pragma unroll
    for (int j = 0; j < kCodes; ++j)
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i)
        c[j][i] = __ldg(reinterpret_cast<const float2*>(centroids + min(first + 32 * j, count - 1) * kWidth) + i);
#pragma unroll
    for (int j = 0; j < kCodes; ++j) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kWidth / 2; ++i) sum = add_square(add_square(sum, own[2 * i], c[j][i].x), own[2 * i + 1], c[j][i].y);
      if (first + 32 * j < count && sum < best.distance) best = {sum, first + 32 * j};
    }
  }
  return best;
}

// Any width.
__device__ inline Nearest nearest_of_lane(const float* x, const float* centroids, int count, int lane, int width) {
  Nearest best = nobody();
#pragma unroll 1
  for (int code = lane; code < count; code += 32) {
    float sum = 0.f;
    for (int i = 0; i < width; ++i) sum = add_square(sum, x[i], __ldg(centroids + code * width + i));
    if (sum < best.distance) best = {sum, code};
  }
  return best;
}

// Who of the warps that share a row this one is: each takes some of its sub-vectors.
struct RowShare {
  int part, parts;
};

// `scratch` is shared memory of the warp for a row. All lanes of the warp call it; lane l holds dimensions 8l .. 8l + 7.
__device__ inline void store_pq(char* to, const KvlarFormat& format, int head, const float (&x)[8], float* scratch, int dim, int lane,
                                RowShare share) {
  const int width = int(format.group), subvectors = dim / width, count = int(format.centroids);
  const int each = subvectors > 4 * 32 ? 8 : 4, lanes = pq_row_bytes(subvectors) / each;  // codes a lane; who has some, or zeros behind
  if (8 * lane < dim)
#pragma unroll
    for (int i = 0; i < 8; ++i) scratch[8 * lane + i] = x[i];
  __syncwarp();
  uint32_t low = 0, high = 0;  // the codes of sub-vectors each * lane ..
  const float* codebooks = codebooks_of(format, head, dim);
#pragma unroll 1
  for (int s = each * share.part; s < subvectors; s += s % each < each - 1 ? 1 : each * (share.parts - 1) + 1) {
    const float *own = scratch + s * width, *centroids = codebooks + int64_t(s) * count * width;
    Nearest best;
    switch (width) {
      case 2: best = nearest_of_lane<2, 8>(own, centroids, count, lane); break;
      case 4: best = nearest_of_lane<4, 4>(own, centroids, count, lane); break;
      case 8: best = nearest_of_lane<8, 2>(own, centroids, count, lane); break;
      case 16: best = nearest_of_lane<16, 1>(own, centroids, count, lane); break;
      default: best = nearest_of_lane(own, centroids, count, lane, width);
    }
    // Distances are no less than 0: in their order as integers. Of equally near centroids the first.
    const uint32_t distance = __float_as_uint(best.distance), least = __reduce_min_sync(0xffffffffu, distance);
    const uint32_t code = __reduce_min_sync(0xffffffffu, distance == least ? uint32_t(best.code) : 0xffffffffu);
    if (lane == s / each) {
      if (s % each < 4) low |= code << (8 * (s % 4)); else high |= code << (8 * (s % 4));
    }
  }
  __syncwarp();
  if (lane >= lanes || lane % share.parts != share.part) return;
  if (each == 4) reinterpret_cast<uint32_t*>(to)[lane] = low;
  else reinterpret_cast<uint2*>(to)[lane] = make_uint2(low, high);
}

// A code beyond the centroids, which no encoder writes, reads the last one.
__device__ inline void load_pq(float (&x)[8], const char* from, const KvlarFormat& format, int head, int dim, int lane) {
  const int width = int(format.group), centroids = int(format.centroids);
  const float* codebooks = codebooks_of(format, head, dim);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int at = 8 * lane + i;
    x[i] = 0.f;
    if (at >= dim) continue;
    const int code = min(int(__ldg(reinterpret_cast<const uint8_t*>(from) + at / width)), centroids - 1);
    x[i] = __ldg(codebooks + (at / width * centroids + code) * width + at % width);
  }
}

}  // namespace kvlar
