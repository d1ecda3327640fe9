// The first pass of score_*: lse = ln sum exp(scale * q k) of each query over the rows that it sees.
//
//   q [seqs][kv_heads * group][query_rows][d] (rotated), keys as KvlarRows / KvlarPool say -> lse [seqs][kv_heads * group][query_rows].
//   (FlashAttention-2, Dao 2023, §3, without values; split rows as in Flash-Decoding.)
//
// A CTA has up to 128 (64 at d = 256) queries of a kv head's group, packed (row, query head), in registers as A fragments, and a
// share of the rows, 128 (64) at a time, two stages of cp.async; warps that are not needed for queries share the rows instead.
// A lane keeps (max, sum) of its own rows; these are merged over lanes, warps, and in split order over CTAs, so that results are
// equal bit for bit from run to run. Which rows a query cannot see at all are not read.
//
// Floor: bytes of the keys / read bandwidth, once a query tile. Llama-3.1-8B shape (8 kv heads, d = 128, 128K rows), a window of
// up to 32 queries: 0.27 GB, 62 us at 4.3 TB/s.
#pragma once
#include "device/softmax.cuh"
#include "score/tile.cuh"

namespace kvlar::score {

constexpr float kFloor = -1e30f;  // running maximum before any row: finite, so that max - max is 0

struct LogSum {  // base 2: the sum of 2^(x - top)
  float top, sum;

  __device__ static LogSum merge(LogSum a, LogSum b) {
    const float top = fmaxf(a.top, b.top);
    return {top, a.sum * ptx::ex2_approx(a.top - top) + b.sum * ptx::ex2_approx(b.top - top)};
  }
  __device__ LogSum of_lane(int distance) const {
    return {__shfl_xor_sync(0xffffffffu, top, distance), __shfl_xor_sync(0xffffffffu, sum, distance)};
  }
  __device__ float value() const { return sum == 0.f ? -INFINITY : (top + __log2f(sum)) * kLn2; }
};

// The tiles that a CTA's queries see anything of: up to three runs.
struct Runs {
  int first[3], count[3];

  __device__ Runs(const Head& h, int seen_end, int rows) {
    const int from[3] = {0, h.start, h.own}, to[3] = {min(h.sink, seen_end), min(h.end, seen_end), seen_end};
    int done = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      first[i] = max(done, from[i] / rows);
      count[i] = from[i] < to[i] ? max(0, (to[i] + rows - 1) / rows - first[i]) : 0;
      if (count[i] > 0) done = first[i] + count[i];
    }
  }
  __device__ int tiles() const { return count[0] + count[1] + count[2]; }
  __device__ int tile(int i) const {
    if (i < count[0]) return first[0] + i;
    i -= count[0];
    return i < count[1] ? first[1] + i : first[2] + i - count[1];
  }
};

template <int D, class T> struct Lse {
  using S = Shape<D>;
  static constexpr int kThreads = S::kThreads;

  const KvlarScore& p;
  unsigned char* const raw;  // two stages of rows
  float2* const states;      // [row warp][packed query of the tile]
  const int lane, warp, query_warps, query_warp, row_warp;
  const Lane at;
  const Head& head;
  int first;                 // packed query of the warp
  int seen_end;              // rows that the CTA's queries see end here
  int query[S::kBlocks][2];  // rows of the lane's queries: g and g + 8 of each block; -1 = none
  int lowest;                // of the warp's
  typename S::Fragments a;
  LogSum state[S::kBlocks][2];

  __device__ Lse(const KvlarScore& params, const Head& shared, unsigned char* memory, float2* shared_states)
      : p(params), raw(memory), states(shared_states), lane(int(threadIdx.x) & 31), warp(int(threadIdx.x) >> 5),
        query_warps(int(p.query_warps)), query_warp(warp % query_warps), row_warp(warp / query_warps),
        head(shared) {
    const int tile = int(blockIdx.x / p.key_splits % p.query_tiles) * query_warps * S::kWarpRows, group = int(p.group);
    first = tile + query_warp * S::kWarpRows;
    const int last = min(tile + query_warps * S::kWarpRows, group * int(p.query_rows)) - 1;
    seen_end = max(0, min(head.first_query + min(last / group, head.live_end - 1) + 1, head.length));
    if (head.live_end <= head.live) seen_end = 0;
    lowest = max(head.first_query + first / group, 0);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = first + 16 * b + 8 * h + at.g, row = i / group;
        const bool live = row >= head.live && row < head.live_end;
        query[b][h] = live ? head.first_query + row : -1;
        state[b][h] = {kFloor, 0.f};
        const uint16_t* q = live ? head.query(p, i % group, row) : nullptr;
#pragma unroll
        for (int k = 0; k < S::kSteps; ++k)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int dim = 16 * k + 8 * e + 2 * at.c;
            a[b][k][2 * e + h] = q && dim < int(p.head_dim) ? __ldg(reinterpret_cast<const uint32_t*>(q + dim)) : 0u;
          }
      }
  }

  __device__ __forceinline__ void issue(int tile, int stage) const {
    TileRows rows{};
    head.template find<S::kWarpRows>(p, tile * S::kRows + warp * S::kWarpRows, seen_end, rows);
    head.template copy<D, S::kWarpRows>(p, rows, ptx::to_smem(raw) + uint32_t((stage * S::kRows + warp * S::kWarpRows) * S::kRowBytes));
  }

  // Do all of the warp's queries see rows t .. t + 15?
  __device__ __forceinline__ bool all_visible(int t) const {
    return t + 15 <= lowest && (t + 15 < head.sink || (t >= head.start && t + 15 < head.end) || t >= head.own);
  }
  // Is row t one that later queries see?
  __device__ __forceinline__ bool is_seen(int t) const {
    return (t < head.sink) | ((t >= head.start) & (t < head.end)) | (t >= head.own);  // no branches
  }

  __device__ __forceinline__ void add(const float (&s)[2][S::kBlocks][4]) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        LogSum& to = state[b][h];
        const float top = fmaxf(fmaxf(s[0][b][2 * h], s[0][b][2 * h + 1]), fmaxf(s[1][b][2 * h], s[1][b][2 * h + 1]));
        if (top > to.top + kHeadroom) {
          to.sum *= ptx::ex2_approx(to.top - top);
          to.top = top;
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) to.sum += ptx::ex2_approx(s[n][b][2 * h + e] - to.top);
      }
  }

  __device__ __forceinline__ void consume(int tile, int stage) {
    const float scale = p.scale * kLog2E;
    const ptx::smem rows = ptx::to_smem(raw) + uint32_t(stage * S::kRows * S::kRowBytes);
#pragma unroll 1
    for (int n = 16 * row_warp; n < S::kRows; n += 16 * (S::kWarps / query_warps)) {
      const int t = tile * S::kRows + n;
      if (t >= seen_end) break;
      float s[2][S::kBlocks][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) multiply<D, T>(s[i], a, rows + uint32_t((n + 8 * i) * S::kRowBytes));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[i][b][e] *= scale;
      if (!all_visible(t)) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = t + 8 * i + 2 * at.c + e;
            const bool seen = is_seen(row);
#pragma unroll
            for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
              for (int h = 0; h < 2; ++h)
                if (!seen || row > query[b][h]) s[i][b][2 * h + e] = -INFINITY;
          }
      }
      add(s);
    }
  }

  // The state of packed query `i` of the CTA, in whose tile it has place `t`.
  __device__ void put(int i, LogSum x) const {
    const int row = i / int(p.group);
    if (i < int(p.group * p.query_rows)) *head.query_lse(p, i % int(p.group), row) = row < head.live || row >= head.live_end ? -INFINITY : x.value();
  }

  __device__ void run() {
    const int unit = int(blockIdx.x / p.key_splits), split = int(blockIdx.x % p.key_splits), splits = int(p.key_splits);
    const Runs runs(head, seen_end, S::kRows);
    const int tiles = runs.tiles(), from = int(int64_t(tiles) * split / splits), to = int(int64_t(tiles) * (split + 1) / splits);
    const bool idle = first >= int(p.group * p.query_rows);
    if (from < to) issue(runs.tile(from), 0);
    ptx::cp_async_commit();
    for (int i = from; i < to; ++i) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // the tile is there, and all warps are done with the one before
      if (i + 1 < to) issue(runs.tile(i + 1), (i + 1 - from) & 1);
      ptx::cp_async_commit();
      if (!idle) consume(runs.tile(i), (i - from) & 1);
    }
    ptx::cp_async_wait<0>();
    const int width = query_warps * S::kWarpRows, base = unit % int(p.query_tiles) * width, t = int(threadIdx.x);
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        LogSum x = LogSum::merge(state[b][h], state[b][h].of_lane(1));
        x = LogSum::merge(x, x.of_lane(2));
        if (at.c == 0) states[row_warp * width + query_warp * S::kWarpRows + 16 * b + 8 * h + at.g] = make_float2(x.top, x.sum);
      }
    __syncthreads();
    LogSum x{kFloor, 0.f};
    if (t < width)
      for (int w = 0; w < S::kWarps / query_warps; ++w) x = LogSum::merge(x, {states[w * width + t].x, states[w * width + t].y});
    if (splits == 1) {
      if (t < width) put(base + t, x);
      return;
    }
    float2* const parts = reinterpret_cast<float2*>(p.partials) + int64_t(unit) * splits * width;
    if (t < width) __stcg(parts + split * width + t, make_float2(x.top, x.sum));
    if (!ptx::arrive_last(p.counters + unit, uint32_t(splits)) || t >= width) return;
    x = {kFloor, 0.f};
#pragma unroll 8
    for (int s = 0; s < splits; ++s) {
      const float2 part = __ldcg(parts + s * width + t);
      x = LogSum::merge(x, {part.x, part.y});
    }
    put(base + t, x);
  }
};

}  // namespace kvlar::score

// An entry point; GPU_EXPORT(name) follows it.
#define KVLAR_SCORE_LSE_ENTRY(name, D, T)                                                          \
  extern "C" __global__ void __launch_bounds__(128, 4) name(const __grid_constant__ KvlarScore p) { \
    GPU_DYN_SMEM(raw);                                                                             \
    __shared__ float2 states[kvlar::score::Shape<D>::kRows];                                       \
    __shared__ kvlar::score::Head head;                                                            \
    if (threadIdx.x == 0) head.load(p, int(blockIdx.x / (p.key_splits * p.query_tiles)));          \
    __syncthreads();                                                                               \
    kvlar::score::Lse<D, T>(p, head, raw, states).run();                                           \
  }
