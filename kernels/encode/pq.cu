// encode of product-quantized rows (device/pq.cuh has the rules, and decodes).
//
//   x [seqs][heads][row_count][dim] -> rows 0 .. row_count of each (sequence, head): argmin_a |x_s - C_s[a]|^2 a sub-vector s.
//
// A CTA takes 32 rows of one head, lanes being rows and warps quarters of the centroids; a sub-vector's centroids are staged
// in shared memory 8 KB at a time, and all lanes read the same one.
//
// Floor: 3 c d operations a row, none of which may be fused: at c = 256, d = 128 and 29.6 T a second (H200) 3.3 ns, where its
// bytes (2 d + m) take 0.07 ns: bound by arithmetic. 128K rows of 8 heads: 3.5 ms. The codebooks (c d 4 B) come from L2 once
// for 32 rows, 4.3 GB for all of those; once a row (as a warp a row would) it would be 32 times that, 25 ms at 5.5 TB/s.
#include "device/pq.cuh"
#include "device/row_codec.cuh"

namespace kvlar {

constexpr int kPqRows = 32, kPqWarps = 4, kPqStage = 2048;

// The nearest of codes first .. last, whose centroids lie at `centroids`, to the `width` values at `x`. kWidth: 0, or `width`.
template <int kWidth>
__device__ __forceinline__ Nearest nearest_of(Nearest best, const float* x, const float* centroids, int width, int first, int last) {
  float own[kWidth ? kWidth : 1];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) own[i] = x[i];
  for (int code = first; code < last; ++code, centroids += width) {
    float sum = 0.f;
    if constexpr (kWidth == 0) {
      for (int i = 0; i < width; ++i) sum = add_square(sum, x[i], centroids[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) {
        const float2 two = *reinterpret_cast<const float2*>(centroids + i);
        sum = add_square(add_square(sum, own[i], two.x), own[i + 1], two.y);
      }
    }
    if (sum < best.distance) best = {sum, code};
  }
  return best;
}

__device__ inline Nearest nearest_of(Nearest best, const float* x, const float* centroids, int width, int first, int last) {
  switch (width) {
    case 2: return nearest_of<2>(best, x, centroids, width, first, last);
    case 4: return nearest_of<4>(best, x, centroids, width, first, last);
    case 8: return nearest_of<8>(best, x, centroids, width, first, last);
    default: return nearest_of<0>(best, x, centroids, width, first, last);
  }
}

// Dynamic shared memory: the staged centroids, what each warp found, then 32 rows of dim + 1 floats.
struct PqCta {
  const KvlarTranscode& p;
  float* const staged;
  Nearest* const found;  // [warp][row]
  float* const rows;
  const int warp, lane, stride;

  __device__ PqCta(const KvlarTranscode& params, unsigned char* raw)
      : p(params), staged(reinterpret_cast<float*>(raw)), found(reinterpret_cast<Nearest*>(staged + kPqStage)),
        rows(reinterpret_cast<float*>(found + kPqWarps * kPqRows)), warp(int(threadIdx.x) / 32), lane(int(threadIdx.x) % 32),
        stride(int(params.dim) + 1) {}

  __device__ void load_rows(int seq, int head, int first) const {
    for (int r = warp; r < kPqRows; r += kPqWarps) {
      float x[kLaneDims] = {};
      if (first + r < int(p.row_count)) {
        const int64_t at = seq * p.x_seq_stride + head * p.x_head_stride + (first + r) * p.x_row_stride;
        load_dense(x, static_cast<const char*>(p.x) + at * (p.dtype == KVLAR_DTYPE_F32 ? 4 : 2), p.dtype, int(p.dim), lane);
        if (p.format.hadamard) hadamard(x, int(p.dim), lane);
      }
      if (kLaneDims * lane < int(p.dim))
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) rows[r * stride + kLaneDims * lane + i] = x[i];
    }
  }

  // The code of sub-vector s replaces the row's first value of it, which nobody needs any more.
  __device__ void encode(int s, const float* centroids) const {
    const int width = int(p.format.group), count = int(p.format.centroids), height = kPqStage / width;
    const float* x = rows + lane * stride + s * width;
    Nearest best = nobody();
    for (int base = 0; base < count; base += height) {
      const int codes = min(height, count - base), quarter = (codes + kPqWarps - 1) / kPqWarps;
      __syncthreads();
      for (int i = int(threadIdx.x); i < codes * width; i += 32 * kPqWarps) staged[i] = __ldg(centroids + base * width + i);
      __syncthreads();
      const int first = min(codes, warp * quarter), last = min(codes, first + quarter);
      best = nearest_of(best, x, staged + first * width, width, base + first, base + last);
    }
    found[warp * kPqRows + lane] = best;
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int w = 1; w < kPqWarps; ++w) best = nearer(best, found[w * kPqRows + lane]);
      rows[lane * stride + s * width] = __uint_as_float(uint32_t(best.code));
    }
  }

  __device__ void store_rows(int seq, int head, int first) const {
    const int width = int(p.format.group), subvectors = int(p.dim) / width, words = pq_row_bytes(subvectors) / 4;
    for (int r = warp; r < kPqRows && first + r < int(p.row_count); r += kPqWarps) {
      const int row = first + r, page = checked_page(p.rows, p.pool.page_count, seq, head, row, p.status);
      if (page < 0) continue;
      const RowPlace to = place_row(p.pool, seq, head, page, row & ((1 << p.rows.page_rows_log2) - 1));
      for (int word = lane; word < words; word += 32) {
        uint32_t codes = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int s = 4 * word + i;
          if (s < subvectors) codes |= __float_as_uint(rows[r * stride + s * width]) << (8 * i);
        }
        reinterpret_cast<uint32_t*>(to.codes)[word] = codes;
      }
    }
  }
};

}  // namespace kvlar

extern "C" __global__ void __launch_bounds__(128) kvlar_encode_pq(const __grid_constant__ KvlarTranscode p) {
  using namespace kvlar;
  GPU_DYN_SMEM(raw);
  const PqCta cta(p, raw);
  const int blocks = (int(p.row_count) + kPqRows - 1) / kPqRows, index = int(blockIdx.x);
  const int first = index % blocks * kPqRows, head = index / blocks % int(p.heads), seq = index / blocks / int(p.heads);
  cta.load_rows(seq, head, first);
  __syncthreads();
  const int width = int(p.format.group), subvectors = int(p.dim) / width;
  const float* centroids = codebooks_of(p.format, head, int(p.dim));
#pragma unroll 1
  for (int s = 0; s < subvectors; ++s, centroids += p.format.centroids * width) cta.encode(s, centroids);
  __syncthreads();
  cta.store_rows(seq, head, first);
}
GPU_EXPORT(kvlar_encode_pq)
