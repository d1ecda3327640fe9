// Product quantization of rows, a row a warp: a byte a sub-vector, the number of its nearest centroid (Jegou et al. 2011;
// HCAttention, arXiv 2507.19823, §3). Bit-equal to the reference: see its codec::pq module for the rules.
//
// Codebooks are fp32 [head][sub-vector][centroid][width] and are read from L2: c * d * 4 B a row (128 KB at c = 256, d = 128),
// about as long as the 3 * c * d operations take a warp. Appends of a decode step can live with that; encode/pq.cu is for many
// rows.
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

// `scratch` is shared memory of the warp for a row. All lanes of the warp call it; lane l holds dimensions 8l .. 8l + 7.
__device__ inline void store_pq(char* to, const KvlarFormat& format, int head, const float (&x)[8], float* scratch, int dim, int lane) {
  const int width = int(format.group), subvectors = dim / width;
  if (8 * lane < dim)
#pragma unroll
    for (int i = 0; i < 8; ++i) scratch[8 * lane + i] = x[i];
  __syncwarp();
  uint32_t low = 0, high = 0;  // the codes of sub-vectors 8 lane .. 8 lane + 7
  const float* centroids = codebooks_of(format, head, dim);
#pragma unroll 1
  for (int s = 0; s < subvectors; ++s, centroids += format.centroids * width) {
    Nearest best = nobody();
#pragma unroll 1
    for (int code = lane; code < int(format.centroids); code += 32) {
      float sum = 0.f;
      for (int i = 0; i < width; ++i) sum = add_square(sum, scratch[s * width + i], __ldg(centroids + code * width + i));
      if (sum < best.distance) best = {sum, code};
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
      best = nearer(best, {__shfl_xor_sync(0xffffffffu, best.distance, step), __shfl_xor_sync(0xffffffffu, best.code, step)});
    if (lane == s / 8) {
      if (s % 8 < 4) low |= uint32_t(best.code) << (8 * (s % 4)); else high |= uint32_t(best.code) << (8 * (s % 4));
    }
  }
  __syncwarp();
  if (8 * lane < pq_row_bytes(subvectors)) *reinterpret_cast<uint2*>(to + 8 * lane) = make_uint2(low, high);
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
