// Sums of values: out^T += V^T P on tensor cores, for dense rows and latents in 16 bits, and int8 latents.
#pragma once
#include "attend_lowrank/columns.cuh"
#include "attend_lowrank/layout.cuh"

namespace kvlar::attend_lowrank {

// Which value dimension accumulator i holds for lane group g: the lower of its pair in registers 0 and 1, the upper in 2
// and 3. int8 rows: 4 neighbours a lane, as a word holds them.
__device__ inline int value_dim_of(int i, int g, int upper, bool int8_values) {
  return int8_values ? 32 * (i / 2) + 4 * g + 2 * (i % 2) + upper : 16 * i + 8 * upper + g;
}

// Weights of a tile as B fragments, in T (or fp16, times the row's scale, for int8 values).
template <int kBlocks, int NT> using Weights = uint32_t[kBlocks][NT][2];

template <class T, int NT, int V, int kBlocks>
__device__ __forceinline__ void add_values(float (&o)[V / 16][NT][4], ptx::smem tile, SwizzledRows layout, int width,
                                           const Weights<kBlocks, NT>& weights) {
  const int lane = int(threadIdx.x) & 31;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int i = 0; i < V / 16; ++i)
      if (16 * i < width) {
        uint32_t a[4];
        ptx::ldmatrix_x4_trans(a, tile + uint32_t(layout.at(16 * b + (lane & 7) + ((lane >> 4) << 3), 2 * i + ((lane >> 3) & 1))));
#pragma unroll
        for (int n = 0; n < NT; ++n) Half16<T>::mma(o[i][n], a, weights[b][n]);
      }
}

template <int NT, int V, int kBlocks>
__device__ __forceinline__ void add_int8_values(float (&o)[V / 16][NT][4], const unsigned char* tile, SwizzledRows layout, int width,
                                                const Weights<kBlocks, NT>& weights) {
  constexpr uint32_t kMagic = 0x64646464u;
  const Lane at;
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int j = 0; j < V / 32; ++j)
      if (32 * j < width) {
        uint32_t rows[4];  // of rows 2c, 2c + 1, 2c + 8, 2c + 9
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int row = 16 * b + 2 * at.c + (r & 1) + (r >> 1) * 8;
          rows[r] = *reinterpret_cast<const uint32_t*>(tile + layout.at(row, 2 * j + (at.g >> 2)) + ((at.g & 3) << 2));
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t x = __byte_perm(rows[0], rows[1], h ? 0x7362 : 0x5140);
          const uint32_t y = __byte_perm(rows[2], rows[3], h ? 0x7362 : 0x5140);
          const uint32_t a[4] = {__byte_perm(x, kMagic, 0x4140), __byte_perm(x, kMagic, 0x4342), __byte_perm(y, kMagic, 0x4140),
                                 __byte_perm(y, kMagic, 0x4342)};
#pragma unroll
          for (int n = 0; n < NT; ++n) Half16<__half>::mma(o[2 * j + h][n], a, weights[b][n]);
        }
      }
}

// Scale, zero and log2 of the scale of a lane's rows' int8 values.
template <int kBlocks> struct ValueAffine {
  float scale[kBlocks][2], zero[kBlocks][2], log[kBlocks][2];

  // A row that decodes to NaN is NaN for the columns that see it alone: a weight of 0 would not undo it for the others.
  template <int NT, int V>
  __device__ __forceinline__ void load(const unsigned char* params, const float (&s)[kBlocks][NT][4], ColumnState<NT, V>& state, const Lane& at) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2 a = ptx::unpack_f16(*reinterpret_cast<const uint32_t*>(params + 4 * (16 * b + 8 * h + at.g)));
        if (!(fabsf(a.x + a.y) < INFINITY)) {
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (s[b][n][2 * h + e] != -INFINITY) state.zero[n][e] += a.x + a.y;
          a = make_float2(0.f, 0.f);
        }
        scale[b][h] = a.x;
        zero[b][h] = a.y;
        log[b][h] = fmaxf(ptx::lg2_approx(a.x), -24.f);
      }
  }
};

// Softmax weights of the tile's logits; raises the state's tops where needed, adds to its sums.
template <class T, int kBlocks, int NT, int V>
__device__ __forceinline__ void weigh(Weights<kBlocks, NT>& weights, ColumnState<NT, V>& state, const float (&s)[kBlocks][NT][4]) {
  float top[NT][2];
  bool raise = false;
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      top[n][e] = state.top[n][e];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) top[n][e] = fmaxf(top[n][e], fmaxf(s[b][n][e], s[b][n][2 + e]));
      raise = raise || top[n][e] > state.top[n][e] + kHeadroom;
    }
  if (__any_sync(0xffffffffu, raise)) state.rescale(top, false);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x = ptx::ex2_approx(s[b][n][2 * h] - state.top[n][0]), y = ptx::ex2_approx(s[b][n][2 * h + 1] - state.top[n][1]);
        state.sum[n][0] += x;
        state.sum[n][1] += y;
        weights[b][n][h] = ptx::movmatrix_trans(Half16<T>::pack(x, y));
      }
}

// Likewise for int8 values: weights times the rows' scales, in fp16, their sums and those with the zeros.
template <int kBlocks, int NT, int V>
__device__ __forceinline__ void weigh_int8(Weights<kBlocks, NT>& weights, ColumnState<NT, V>& state, const float (&s)[kBlocks][NT][4],
                                           const ValueAffine<kBlocks>& values) {
  float top[NT][2];
  bool raise = false;
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      top[n][e] = state.top[n][e];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) top[n][e] = fmaxf(top[n][e], s[b][n][2 * h + e] + values.log[b][h]);  // bounds the product
      raise = raise || top[n][e] > state.top[n][e] + kHeadroom;
    }
  if (__any_sync(0xffffffffu, raise)) state.rescale(top, true);
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float w[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          w[e] = ptx::ex2_approx(s[b][n][2 * h + e] - state.top[n][e]);
          state.sum[n][e] += w[e];
          state.zero[n][e] = fmaf(w[e], values.zero[b][h], state.zero[n][e]);
          w[e] *= values.scale[b][h];
        }
        weights[b][n][h] = ptx::movmatrix_trans(Half16<__half>::pack(w[0], w[1]));
      }
  constexpr uint32_t kOne = 0x3c003c00u, ones[4] = {kOne, kOne, kOne, kOne};  // sums of the weights as rounded
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int n = 0; n < NT; ++n) Half16<__half>::mma(state.weight[n], ones, weights[b][n]);
}

}  // namespace kvlar::attend_lowrank
