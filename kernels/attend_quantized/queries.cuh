// Queries of quantized keys: rotated like the keys, in fp16 times a power of two, dimensions in the order of the keys' codes.
#pragma once
#include "attend/columns.cuh"
#include "attend_quantized/keys.cuh"
#include "device/hadamard.cuh"

namespace kvlar::attend_quantized {

template <int D, int NT> struct Queries {
  static constexpr int kSteps = D / 16, kColumns = 8 * NT;

  uint32_t b[kSteps][NT][2];              // B fragments
  float sum[NT][2];                       // of what multiplies codes, of the lane's columns
  float magic[NT][2];                     // what the 1024 of codes.cuh add to a score
  float scale[NT][2];                     // makes a score that of the query as it was

  static constexpr int kScratchFloats = kColumns * (D + 1);

  // Writes each column's query to `scratch`, in fp32 (as codes where the query is int8), then what multiplies it; a warp a
  // column.
  __device__ static void prepare(float* scratch, const attend::Columns<NT>& columns, int warps) {
    const KvlarAttend& p = columns.p;
    for (int column = columns.warp; column < kColumns; column += warps) {
      int head = 0, row = 0;
      const bool exists = columns.column_at(column, head, row);
      float x[8], multiplier = 1.f;
      load(x, columns, exists ? columns.query_row(head, row) : nullptr);
      if (p.int8_queries && exists) {  // one scale for all rows of the head
        float largest = 0.f;
        bool finite = true;
        for (int s = 0; s < int(p.query_rows); ++s) {
          float y[8];
          load(y, columns, columns.query_row(head, s));
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            largest = fmaxf(largest, fabsf(y[i]));
            finite = finite && fabsf(y[i]) < INFINITY;
          }
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        multiplier = __all_sync(0xffffffffu, finite) ? __fdiv_rn(largest, 127.f) : __uint_as_float(0x7fc00000u);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[i] = multiplier > 0.f ? rintf(__fdiv_rn(x[i], multiplier)) : 0.f;
      }
      if (8 * columns.lane < D) {
        float4* to = reinterpret_cast<float4*>(scratch + column * D + 8 * columns.lane);
        to[0] = make_float4(x[0], x[1], x[2], x[3]);
        to[1] = make_float4(x[4], x[5], x[6], x[7]);
      }
      if (columns.lane == 0) scratch[kColumns * D + column] = multiplier;
    }
  }

  __device__ void load_fragments(const float* scratch, uint32_t codec) {
    if (codec == KVLAR_CODEC_INT4) permute<RowKeys<D, 4, false>>(scratch);
    else if (codec == KVLAR_CODEC_INT2) permute<RowKeys<D, 2, false>>(scratch);
    else if (codec == KVLAR_CODEC_FP8) permute<RowKeys<D, 8, true>>(scratch);
    else permute<RowKeys<D, 8, false>>(scratch);
  }

  // Eight dims a lane of a row of q, rotated; zeros where there is none.
  __device__ static void load(float (&x)[8], const attend::Columns<NT>& columns, const uint16_t* row) {
    const KvlarAttend& p = columns.p;
    const int first = 8 * columns.lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t w = columns.two_dims(row, first + 2 * i, int(p.head_dim));
      const float2 two = p.q_dtype == KVLAR_DTYPE_F16 ? ptx::unpack_f16(w) : make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
    if (p.rotated_keys) hadamard(x, int(p.head_dim), columns.lane);
  }

  // fp16 holds a column times the power of two that brings its largest dim below 1, divided by the weights of the codes.
  // `Keys` says where dims meet codes.
  template <class Keys> __device__ void permute(const float* scratch) {
    const Lane at;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const float* row = scratch + (8 * n + at.g) * D;
      float largest = 0.f;
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(row[16 * k + 4 * at.c + i]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 1u), 252u) + 1;
      const float up = __uint_as_float(exponent << 23), down = __uint_as_float((254u - exponent) << 23);
      float coded = 0.f, all = 0.f;
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float weight = float(Keys::weight(k, 8 * h));
          const float x = row[Keys::dim(k, 8 * h + 2 * at.c)] * down, y = row[Keys::dim(k, 8 * h + 2 * at.c + 1)] * down;
          b[k][n][h] = Half16<__half>::pack(x / weight, y / weight);
          const float2 rounded = Half16<__half>::unpack(b[k][n][h]);
          all += rounded.x + rounded.y;
          coded = fmaf(weight, rounded.x + rounded.y, coded);
        }
      coded += __shfl_xor_sync(0xffffffffu, coded, 1);
      coded += __shfl_xor_sync(0xffffffffu, coded, 2);
      all += __shfl_xor_sync(0xffffffffu, all, 1);
      all += __shfl_xor_sync(0xffffffffu, all, 2);
      const float multiplier = scratch[kColumns * D + 8 * n + at.g] * up;
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // from the lanes of column 2c + e as a B column to those as a D column
        const int lane = 4 * (2 * at.c + e);
        sum[n][e] = __shfl_sync(0xffffffffu, coded, lane);
        magic[n][e] = Keys::kMagic * __shfl_sync(0xffffffffu, all, lane);
        scale[n][e] = __shfl_sync(0xffffffffu, multiplier, lane);
      }
    }
  }
};

}  // namespace kvlar::attend_quantized
