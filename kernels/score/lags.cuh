// score_keys, lagkv: after 4 sinks, rows are divided into lags of 128. Of a lag's row x, in the ranges of the next lag:
//
//   spread = std over channels of (x_c - min_c) / (max_c - min_c)     unbiased; 0 for a channel that is constant there
//   w      = softmax over the lag of spread                            of keys and of values
//   score  = place of (w_k + w_v) / 2 in the lag / 128                 from the least; of equals the lower row stands higher
//
// Sinks, the last whole lag and what is left after it score 1. A row that is not finite stands below the others, and is left out
// of ranges and softmax. (LagKV, arXiv 2504.04704.)
//
// A CTA takes a lag of a head and reads it and the next one: rows are read twice, the second time mostly from the L2.
#pragma once
#include "device/softmax.cuh"
#include "score/keys.cuh"

namespace kvlar::keys {

constexpr int kSinks = 4, kLag = 128;
constexpr float kHalf = 0.5f;      // of values, so that no difference of two is beyond fp32
constexpr float kFarthest = 1e18f;  // of a value from a range, in its widths: 256 squares are within fp32

struct Lag {
  union {
    struct { float low[kWarps][kMaxDim], high[kWarps][kMaxDim]; } of_warp;
    float both[kLag];
  };
  float low[kMaxDim], width[kMaxDim];
  float spreads[2][kLag];
};

// Whether the 8 values of each lane of a row are finite.
__device__ inline bool finite_row(const float (&x)[kLaneDims], const RowLanes& at) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) finite = finite && fabsf(x[i]) < INFINITY;
  const uint32_t bad = __ballot_sync(0xffffffffu, !finite);
  return (bad >> (threadIdx.x % 32 - uint32_t(at.lane)) & (0xffffffffu >> (32 - at.lanes))) == 0;
}

// Spreads of the lag from `start` on; NaN of rows that are not finite.
template <class T> __device__ inline void find_spreads(Lag& lag, float* spreads, const HeadRows& rows, const KvlarPool& pool, int dim, int start) {
  const RowLanes at(dim);
  float low[kLaneDims], high[kLaneDims];
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    low[i] = INFINITY;
    high[i] = -INFINITY;
  }
  each_row<T>(rows, pool, dim, at, start + kLag, start + 2 * kLag, [&](int, const float(&x)[kLaneDims], bool there) {
    if (!finite_row(x, at) || !there) return;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      low[i] = fminf(low[i], kHalf * x[i]);
      high[i] = fmaxf(high[i], kHalf * x[i]);
    }
  });
  const int warp = int(threadIdx.x) / 32;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    for (int step = at.lanes; step < 32; step <<= 1) {
      low[i] = fminf(low[i], __shfl_xor_sync(0xffffffffu, low[i], step));
      high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffffu, high[i], step));
    }
    if (at.row == 0) {
      lag.of_warp.low[warp][kLaneDims * at.lane + i] = low[i];
      lag.of_warp.high[warp][kLaneDims * at.lane + i] = high[i];
    }
  }
  __syncthreads();
  const int c = int(threadIdx.x);
  if (c < dim) {
    float least = INFINITY, most = -INFINITY;
    for (int w = 0; w < kWarps; ++w) {
      least = fminf(least, lag.of_warp.low[w][c]);
      most = fmaxf(most, lag.of_warp.high[w][c]);
    }
    lag.low[c] = least;
    lag.width[c] = most > least ? __fsub_rn(most, least) : 0.f;
  }
  __syncthreads();
  each_row<T>(rows, pool, dim, at, start, start + kLag, [&](int row, float(&x)[kLaneDims], bool there) {
    const bool finite = finite_row(x, at);
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const int channel = kLaneDims * at.lane + i;
      const float width = channel < dim ? lag.width[channel] : 0.f;
      x[i] = width > 0.f ? fminf(fmaxf(__fdiv_rn(__fsub_rn(kHalf * x[i], lag.low[channel]), width), -kFarthest), kFarthest) : 0.f;
      sum = __fadd_rn(sum, x[i]);
    }
    const float mean = __fdiv_rn(lanes_sum(sum, at.lanes), float(dim));
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const float off = kLaneDims * at.lane < dim ? __fsub_rn(x[i], mean) : 0.f;
      squares = __fmaf_rn(off, off, squares);
    }
    squares = lanes_sum(squares, at.lanes);
    if (there && at.lane == 0) spreads[row - start] = finite ? __fsqrt_rn(__fdiv_rn(squares, float(dim - 1))) : NAN;
  });
  __syncthreads();
}

// exp(spread - their log-sum-exp), of the thread's row; each warp finds the sum by itself.
__device__ inline float softmax_of(const float* spreads, int row) {
  const int lane = int(threadIdx.x) % 32;
  float top = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < kLag; i += 32) top = fmaxf(top, spreads[i + lane]);
  for (int step = 1; step < 32; step <<= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  const auto weight = [&](float x) { return ptx::ex2_approx(__fmul_rn(__fsub_rn(x, top), kLog2E)); };
#pragma unroll
  for (int i = 0; i < kLag; i += 32) {
    const float x = spreads[i + lane];
    sum += x == x ? weight(x) : 0.f;
  }
  return __fdiv_rn(weight(spreads[row]), lanes_sum(sum, 32));
}

template <class T> __device__ inline void score_lag(const KvlarScoreKeys& p) {
  __shared__ Lag lag;
  const HeadRows rows(p, int(blockIdx.x), int(p.blocks));
  const int start = kSinks + rows.block * kLag, capacity = int(p.rows.max_rows), i = int(threadIdx.x);
  float* scores = rows.scores();
  fill_beyond(rows, rows.block ? start : 0, min(capacity, start + kLag));
  if (rows.block == 0 && i < min(kSinks, rows.length)) scores[i] = 1.f;
  if (start + 2 * kLag > rows.length) {
    for (int row = start + i; row < min(rows.length, start + kLag); row += kThreads) scores[row] = 1.f;
    return;
  }
  find_spreads<T>(lag, lag.spreads[0], rows, p.keys, int(p.head_dim), start);
  find_spreads<T>(lag, lag.spreads[1], rows, p.values, int(p.value_dim), start);
  const int row = i % kLag;
  const float own = __fmul_rn(__fadd_rn(softmax_of(lag.spreads[0], row), softmax_of(lag.spreads[1], row)), 0.5f);
  if (i < kLag) lag.both[row] = own;
  __syncthreads();
  if (i >= kLag) return;
  int below = 0;
  for (int other = 0; other < kLag; ++other) {
    const float x = lag.both[other];
    const bool nan = x != x, own_nan = own != own;
    below += x < own || (nan && !own_nan) || ((x == own || (nan && own_nan)) && other > row);
  }
  scores[start + row] = float(below) / kLag;
}

}  // namespace kvlar::keys
