// Encoding and decoding of stored rows (KVLAR_CODEC_*), a row a warp: lane l holds dimensions 8l .. 8l + 7, so that a
// 16-bit row is one 16-byte access a lane. Bit-equal to the reference: see its codec module for the rules.
#pragma once
#include "abi.h"
#include "device/affine.cuh"
#include "device/fp8.cuh"
#include "device/hadamard.cuh"
#include "device/pq.cuh"

namespace kvlar {

constexpr int kLaneDims = 8, kMaxDim = 32 * kLaneDims;

struct RowPlace {  // where a stored row is
  char* codes;
  char* params;
};

// Do scales and zeros belong to channels of a group of rows?
__device__ inline bool channel_wise(uint32_t codec) { return codec == KVLAR_CODEC_INT4_CHANNEL || codec == KVLAR_CODEC_INT2_CHANNEL; }

// `group`: rows that share scales and zeros.
__device__ inline RowPlace place_row(const KvlarPool& pool, int seq, int head, int page, int row_in_page, uint32_t group = 1) {
  char* base = static_cast<char*>(pool.data) + seq * pool.seq_stride + head * pool.head_stride + page * pool.page_stride;
  const uint32_t row = uint32_t(row_in_page);
  return {base + uint64_t(row) * pool.row_stride, base + pool.params_offset + uint64_t(row / group) * pool.params_stride};
}
__device__ inline RowPlace place_row(const KvlarPool& pool, const KvlarFormat& format, int seq, int head, int page, int row_in_page) {
  return place_row(pool, seq, head, page, row_in_page, channel_wise(format.codec) ? format.group : 1);
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

__device__ inline void unpack_dense(float (&x)[kLaneDims], uint4 w, uint32_t dtype) {
  const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 two = dtype == KVLAR_DTYPE_F16 ? ptx::unpack_f16(words[i])
                                                : make_float2(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u));
    x[2 * i] = two.x;
    x[2 * i + 1] = two.y;
  }
}

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
    unpack_dense(x, __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(row) + first)), dtype);
  }
}

// ---- integer codes

// Bits of an integer code; 0 for other codecs.
__device__ inline int code_bits(uint32_t codec) {
  return codec == KVLAR_CODEC_INT8                                           ? 8
         : codec == KVLAR_CODEC_INT4 || codec == KVLAR_CODEC_INT4_CHANNEL ? 4
         : codec == KVLAR_CODEC_INT2 || codec == KVLAR_CODEC_INT2_CHANNEL ? 2
                                                                              : 0;
}

// The group of each of a lane's values, for a group that lanes share (a power of two of them, or the whole row).
__device__ inline Affine lane_affine(const float (&x)[kLaneDims], int dim, int group, int lane, float levels) {
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
  return affine_of(low, high, finite, levels);
}

// A lane's eight codes, a byte each, as `bits` bytes of the row; padding up to 16 bytes is 0.
__device__ inline void store_codes(char* codes, const uint32_t (&code)[kLaneDims], int bits, int dim, int lane) {
  if (bits * lane >= ((dim * bits + 7) / 8 + 15) / 16 * 16) return;
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    if (bits * i < 32) low |= code[i] << (bits * i); else high |= code[i] << (bits * i - 32);
  }
  if (bits == 8) *reinterpret_cast<uint2*>(codes + 8 * lane) = make_uint2(low, high);
  else if (bits == 4) *reinterpret_cast<uint32_t*>(codes + 4 * lane) = low;
  else *reinterpret_cast<uint16_t*>(codes + 2 * lane) = uint16_t(low);
}

__device__ inline void store_integers(RowPlace to, const float (&x)[kLaneDims], float* scratch, int bits, int dim, int group, int lane) {
  const int first = kLaneDims * lane, lanes = group / kLaneDims;
  const float levels = float((1 << bits) - 1);
  uint32_t codes[kLaneDims] = {};
  if (group == dim || (group % kLaneDims == 0 && (lanes & (lanes - 1)) == 0)) {
    const Affine a = lane_affine(x, dim, group, lane, levels);
    if (first < dim) {
      if (first % group == 0) reinterpret_cast<uint32_t*>(to.params)[first / group] = pack_affine(a);
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) codes[i] = code_of(x[i], a, levels);
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
        const Affine a = affine_of(low, high, finite, levels);
        if (start == first + i) reinterpret_cast<uint32_t*>(to.params)[start / group] = pack_affine(a);
        codes[i] = code_of(x[i], a, levels);
      }
    __syncwarp();
  }
  store_codes(to.codes, codes, bits, dim, lane);
}

// ---- rows of any codec

__device__ inline float fp8_scale(const KvlarFormat& format, int head) { return format.tables ? __ldg(format.tables + head) : 1.f; }

// Not channel-wise: channel_codec.cuh. `scratch` is shared memory of the warp for kMaxDim floats; `x` is rotated where the
// format says so. Of the warps that share a row the first stores what is not worth sharing.
__device__ inline void store_row(RowPlace to, const KvlarFormat& format, int head, float (&x)[kLaneDims], float* scratch, int dim, int lane,
                                 RowShare share = {0, 1}) {
  if (format.codec != KVLAR_CODEC_PQ && share.part != 0) return;
  if (format.hadamard) hadamard(x, dim, lane);
  const int bits = code_bits(format.codec);
  if (format.codec == KVLAR_CODEC_PQ) {
    store_pq(to.codes, format, head, x, scratch, dim, lane, share);
  } else if (bits) {
    store_integers(to, x, scratch, bits, dim, int(format.group), lane);
  } else if (format.codec == KVLAR_CODEC_FP8) {
    const float scale = fp8_scale(format, head);
    uint32_t codes[kLaneDims];
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) codes[i] = kLaneDims * lane < dim ? to_e4m3(__fdiv_rn(x[i], scale)) : 0u;
    store_codes(to.codes, codes, 8, dim, lane);
  } else if (kLaneDims * lane < dim) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      w[i] = format.codec == KVLAR_CODEC_F16 ? ptx::pack_f16(x[2 * i], x[2 * i + 1]) : ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
    *reinterpret_cast<uint4*>(to.codes + 2 * kLaneDims * lane) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// All lanes of the warp call it.
__device__ inline void load_row(float (&x)[kLaneDims], RowPlace from, const KvlarFormat& format, int head, int dim, int lane) {
  const int bits = code_bits(format.codec), first = kLaneDims * lane;
  if (format.codec == KVLAR_CODEC_PQ) {
    load_pq(x, from.codes, format, head, dim, lane);
  } else if (!bits && format.codec != KVLAR_CODEC_FP8) {
    load_dense(x, from.codes, format.codec == KVLAR_CODEC_F16 ? KVLAR_DTYPE_F16 : KVLAR_DTYPE_BF16, dim, lane);
  } else {
    const float scale = bits ? 0.f : fp8_scale(format, head);
    const int width = bits ? bits : 8, group = channel_wise(format.codec) ? 1 : int(format.group);
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      x[i] = 0.f;
      if (first >= dim) continue;
      const uint32_t byte = __ldg(reinterpret_cast<const uint8_t*>(from.codes) + (first + i) * width / 8);
      const uint32_t code = byte >> ((first + i) * width % 8) & ((1u << width) - 1);
      if (bits) {
        const float2 a = ptx::unpack_f16(__ldg(reinterpret_cast<const uint32_t*>(from.params) + (first + i) / group));
        x[i] = __fmaf_rn(float(code), a.x, a.y);
      } else {
        x[i] = __fmul_rn(scale, from_e4m3(code));
      }
    }
  }
  if (format.hadamard) hadamard(x, dim, lane);
}

}  // namespace kvlar
