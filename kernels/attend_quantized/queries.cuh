// Queries of quantized keys: rotated like the keys, in fp16 times a power of two, dimensions in the order of the keys' codes.
//
// A warp prepares a column, once a CTA and unit, in the words in which all warps then read fragments: 16 bytes a lane, without
// bank conflicts.
#pragma once
#include "attend/columns.cuh"
#include "attend/tiles.cuh"
#include "attend_quantized/keys.cuh"
#include "device/hadamard.cuh"

namespace kvlar::attend_quantized {

template <int D, int NT> struct Queries {
  static constexpr int kSteps = D / 16, kColumns = 8 * NT;

  uint32_t b[kSteps][NT][2];              // B fragments
  float sum[NT][2];                       // of what multiplies codes, of the lane's columns
  float magic[NT][2];                     // what the 1024 of codes.cuh add to a score
  float scale[NT][2];                     // makes a score that of the query as it was

  // Scratch: fragments [n][two steps][lane][4 words]; sum, magic and scale [column] each; a row of fp32 for each warp.
  static constexpr int kQuads = D / 32, kStates = kColumns * D / 2, kRows = kStates + 3 * kColumns;
  static constexpr int kScratchFloats = kRows + attend::warps_of(D) * D;

  // Prepares all columns in `scratch`; all warps of the CTA call it, and a barrier must follow. fp16 holds a column times the
  // power of two that brings its largest dim below 1, divided by the weights of the codes. `keys` says where dims meet codes.
  template <class Keys> __device__ static void prepare(float* scratch, const attend::Columns<NT>& columns, const Keys& keys) {
    float* const row = scratch + kRows + columns.warp * D;
    const int lane = columns.lane;
    for (int column = columns.warp; column < kColumns; column += attend::warps_of(D)) {
      float x[8];
      const float multiplier = load_column(x, columns, column);
      float largest = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
      largest = warp_max(largest);
      const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 1u), 252u) + 1;
      const float up = __uint_as_float(exponent << 23), down = __uint_as_float((254u - exponent) << 23);
      if (8 * lane < D) {
        float4* to = reinterpret_cast<float4*>(row + 8 * lane);
        to[0] = make_float4(x[0] * down, x[1] * down, x[2] * down, x[3] * down);
        to[1] = make_float4(x[4] * down, x[5] * down, x[6] * down, x[7] * down);
      }
      __syncwarp();
      float coded = 0.f, all = 0.f;
#pragma unroll
      for (int i = lane; i < D / 2; i += 32) {  // words of the column's fragments: two dims each
        const int k = i / 8, h = i / 4 % 2, c = i % 4, log = keys.log_weight(k, h);
        const float weight = __uint_as_float(uint32_t(127 + log) << 23), inverse = __uint_as_float(uint32_t(127 - log) << 23);
        const uint32_t word = Half16<__half>::pack(row[keys.dim(k, 8 * h + 2 * c)] * inverse, row[keys.dim(k, 8 * h + 2 * c + 1)] * inverse);
        reinterpret_cast<uint32_t*>(scratch)[((column / 8 * kQuads + k / 2) * 32 + 4 * (column % 8) + c) * 4 + 2 * (k % 2) + h] = word;
        const float2 rounded = Half16<__half>::unpack(word);
        all += rounded.x + rounded.y;
        coded = fmaf(weight, rounded.x + rounded.y, coded);
      }
      coded = warp_sum(coded);
      all = warp_sum(all);
      if (lane == 0) {
        float* const state = scratch + kStates + column;
        state[0] = coded;
        state[kColumns] = Keys::kMagic * all;
        state[2 * kColumns] = multiplier * up;
      }
      __syncwarp();  // the row may be written again
    }
  }

  // Of keys in codes of `codec`, one scale a row.
  __device__ static void prepare_for(uint32_t codec, float* scratch, const attend::Columns<NT>& columns) {
    if (codec == KVLAR_CODEC_INT4) prepare(scratch, columns, RowKeys<D, 4, false>{});
    else if (codec == KVLAR_CODEC_INT2) prepare(scratch, columns, RowKeys<D, 2, false>{});
    else if (codec == KVLAR_CODEC_FP8) prepare(scratch, columns, RowKeys<D, 8, true>{});
    else prepare(scratch, columns, RowKeys<D, 8, false>{});
  }

  __device__ void load_fragments(const float* scratch) {
    const int lane = int(threadIdx.x) & 31;
    const Lane at;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const uint4 words = reinterpret_cast<const uint4*>(scratch)[(n * kQuads + q) * 32 + lane];
        b[2 * q][n][0] = words.x;
        b[2 * q][n][1] = words.y;
        b[2 * q + 1][n][0] = words.z;
        b[2 * q + 1][n][1] = words.w;
      }
      const float* const state = scratch + kStates + 8 * n + 2 * at.c;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum[n][e] = state[e];
        magic[n][e] = state[kColumns + e];
        scale[n][e] = state[2 * kColumns + e];
      }
    }
  }

 private:
  __device__ static float warp_max(float x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
  }
  __device__ static float warp_sum(float x) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  }

  // Eight dims a lane of a column's query (as codes where it is int8); gives what multiplies them.
  __device__ static float load_column(float (&x)[8], const attend::Columns<NT>& columns, int column) {
    const KvlarAttend& p = columns.p;
    int head = 0, row = 0;
    const bool exists = columns.column_at(column, head, row);
    load(x, columns, exists ? columns.query_row(head, row) : nullptr);
    if (!p.int8_queries || !exists) return 1.f;
    float largest = 0.f;  // one scale for all rows of the head
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
    largest = warp_max(largest);
    const float multiplier = __all_sync(0xffffffffu, finite) ? __fdiv_rn(largest, 127.f) : __uint_as_float(0x7fc00000u);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = multiplier > 0.f ? rintf(__fdiv_rn(x[i], multiplier)) : 0.f;
    return multiplier;
  }

  // Eight dims a lane of a row of q, rotated; zeros where there is none.
  __device__ static void load(float (&x)[8], const attend::Columns<NT>& columns, const uint16_t* row) {
    const KvlarAttend& p = columns.p;
    uint32_t words[4] = {};
    if (row && 8 * columns.lane < int(p.head_dim))  // one condition: the loads wait together
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = __ldg(reinterpret_cast<const uint32_t*>(row + 8 * columns.lane) + i);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = p.q_dtype == KVLAR_DTYPE_F16 ? ptx::unpack_f16(words[i])
                                                      : make_float2(__uint_as_float(words[i] << 16), __uint_as_float(words[i] & 0xffff0000u));
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
    if (p.rotated_keys) hadamard(x, int(p.head_dim), columns.lane);
  }
};

}  // namespace kvlar::attend_quantized
