// Encoding and decoding of stored rows (KVLAR_CODEC_*), a row a warp: lane l holds dimensions 8l .. 8l + 7, so that a
// 16-bit row is one 16-byte access a lane. Bit-equal to the reference: see its codec module for the rules.
#pragma once
#include "abi.h"
#include "device/gpu.cuh"

namespace kvlar {

constexpr int kLaneDims = 8, kMaxDim = 32 * kLaneDims;

struct RowPlace {  // where a stored row is
  char* codes;
  char* params;
};

__device__ inline RowPlace place_row(const KvlarPool& pool, int seq, int head, int page, int row_in_page) {
  char* base = static_cast<char*>(pool.data) + seq * pool.seq_stride + head * pool.head_stride + page * pool.page_stride;
  return {base + uint64_t(uint32_t(row_in_page)) * pool.row_stride,
          base + pool.params_offset + uint64_t(uint32_t(row_in_page)) * pool.params_stride};
}

// The page of a row, checked; -1 and a status bit if it is not one.
__device__ inline int checked_page(const KvlarRows& rows, uint32_t page_count, int seq, int head, int row, uint32_t* status) {
  int page = row >> rows.page_rows_log2;
  if (rows.table) page = __ldg(rows.table + seq * rows.table_seq_stride + head * rows.table_head_stride + page);
  if (uint32_t(page) < page_count) return page;
  if (status && threadIdx.x % 32 == 0) atomicOr(status, uint32_t(KVLAR_STATUS_BAD_PAGE));
  return -1;
}

// ---- dense rows of any activation type

__device__ inline void load_dense(float (&x)[kLaneDims], const void* row, uint32_t dtype, int dim, int lane) {
  const int first = kLaneDims * lane;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) x[i] = 0.f;
  if (first >= dim) return;
  if (dtype == KVLAR_DTYPE_F32) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(row) + first);
    const float4 a = __ldg(p), b = __ldg(p + 1);
    x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w; x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
  } else {
    const uint4 w = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + first));
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = dtype == KVLAR_DTYPE_F16 ? ptx::unpack_f16(words[i])
                                                  : make_float2(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u));
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

// ---- int8

struct Affine { float scale, zero; };

__device__ inline float half_of(uint32_t x) { return ptx::unpack_f16(x).x; }
__device__ inline uint32_t pack_affine(Affine a) { return ptx::pack_f16(a.scale, a.zero); }
__device__ inline float quiet_nan() { return __uint_as_float(0x7fc00000u); }

// Scale and zero of values between low and high, as fp16 holds them; NaN if they or the values are not finite.
__device__ inline Affine affine_of(float low, float high, bool finite) {
  Affine a = {half_of(ptx::pack_f16(__fdiv_rn(__fsub_rn(high, low), 255.f), 0.f)), half_of(ptx::pack_f16(low, 0.f))};
  finite = finite && fabsf(a.scale) < INFINITY && fabsf(a.zero) < INFINITY;
  if (!finite) a.scale = a.zero = quiet_nan();
  return a;
}
__device__ inline uint32_t code_of(float x, Affine a) {
  if (!(a.scale > 0.f)) return 0;
  return uint32_t(fminf(fmaxf(rintf(__fdiv_rn(__fsub_rn(x, a.zero), a.scale)), 0.f), 255.f));
}

// The group of each of a lane's values, for a group that lanes share (a power of two of them, or the whole row).
__device__ inline Affine lane_affine(const float (&x)[kLaneDims], int dim, int group, int lane) {
  float low = INFINITY, high = -INFINITY;
  bool finite = true;
  if (kLaneDims * lane < dim) {
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      low = fminf(low, x[i]);
      high = fmaxf(high, x[i]);
      finite = finite && fabsf(x[i]) < INFINITY;
    }
  }
  const int lanes = group == dim ? 32 : group / kLaneDims;
  for (int step = 1; step < lanes; step <<= 1) {
    low = fminf(low, __shfl_xor_sync(0xffffffffu, low, step));
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
    finite = __shfl_xor_sync(0xffffffffu, int(finite), step) && finite;
  }
  return affine_of(low, high, finite);
}

__device__ inline void store_int8(RowPlace to, const float (&x)[kLaneDims], float* scratch, int dim, int group, int lane) {
  const int first = kLaneDims * lane, lanes = group / kLaneDims;
  uint32_t codes[kLaneDims] = {};
  if (group == dim || (group % kLaneDims == 0 && (lanes & (lanes - 1)) == 0)) {
    const Affine a = lane_affine(x, dim, group, lane);
    if (first < dim) {
      if (first % group == 0) reinterpret_cast<uint32_t*>(to.params)[first / group] = pack_affine(a);
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) codes[i] = code_of(x[i], a);
    }
  } else {  // any other divisor: each lane works out the groups it stands in, from the row in shared memory
    if (first < dim)
      for (int i = 0; i < kLaneDims; ++i) scratch[first + i] = x[i];
    __syncwarp();
    if (first < dim)
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) {
        const int start = (first + i) / group * group;
        float low = INFINITY, high = -INFINITY;
        bool finite = true;
        for (int j = start; j < start + group; ++j) {
          low = fminf(low, scratch[j]);
          high = fmaxf(high, scratch[j]);
          finite = finite && fabsf(scratch[j]) < INFINITY;
        }
        const Affine a = affine_of(low, high, finite);
        if (start == first + i) reinterpret_cast<uint32_t*>(to.params)[start / group] = pack_affine(a);
        codes[i] = code_of(x[i], a);
      }
    __syncwarp();
  }
  if (first < (dim + 15) / 16 * 16)  // padding bytes are 0
    *reinterpret_cast<uint2*>(to.codes + first) = make_uint2(codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24,
                                                             codes[4] | codes[5] << 8 | codes[6] << 16 | codes[7] << 24);
}

// ---- rows of any codec

// `scratch` is shared memory of the warp for kMaxDim floats.
__device__ inline void store_row(RowPlace to, uint32_t codec, const float (&x)[kLaneDims], float* scratch, int dim, int group, int lane) {
  if (codec == KVLAR_CODEC_INT8) {
    store_int8(to, x, scratch, dim, group, lane);
  } else if (kLaneDims * lane < dim) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = codec == KVLAR_CODEC_F16 ? ptx::pack_f16(x[2 * i], x[2 * i + 1]) : ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
    *reinterpret_cast<uint4*>(to.codes + 2 * kLaneDims * lane) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

__device__ inline void load_row(float (&x)[kLaneDims], RowPlace from, uint32_t codec, int dim, int group, int lane) {
  if (codec != KVLAR_CODEC_INT8) {
    load_dense(x, from.codes, codec == KVLAR_CODEC_F16 ? KVLAR_DTYPE_F16 : KVLAR_DTYPE_BF16, dim, lane);
    return;
  }
  const int first = kLaneDims * lane;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    x[i] = 0.f;
    if (first < dim) {
      const float2 a = ptx::unpack_f16(__ldg(reinterpret_cast<const uint32_t*>(from.params) + (first + i) / group));
      x[i] = __fmaf_rn(float(__ldg(reinterpret_cast<const uint8_t*>(from.codes) + first + i)), a.x, a.y);
    }
  }
}

}  // namespace kvlar
