// The second pass of score_*: what each row gets of the attention of all queries that see it, as one score a kv head.
//
//   w[h][s][t] = exp(scale * q_hs k_t - lse[h][s]),  x[h][t] = sum, mean or max over the queries s,
//   y[h][t] = x[h][t], or the mean or max of x[h] over the rows around t,  score[t] = mean, max or sum of y[h][t] over the heads h.
//   (SnapKV, arXiv 2404.14469; DynamicKV, arXiv 2412.14838: windows. H2O, arXiv 2306.14048: all queries. KVzip, arXiv 2505.23416:
//   the max over queries that repeat the context.)
//
//   q [seqs][kv_heads * group][query_rows][d] (rotated), lse likewise, keys as KvlarRows / KvlarPool say
//   -> scores [seqs][kv_heads][score_stride].
//
// A CTA has a share of a kv head's rows, 128 (64 at d = 256) at a time: they stay in registers as A fragments while queries pass
// as B fragments, so that a lane sums its rows' weights over the queries in their order, and nothing of the size queries x rows
// is ever written. Queries of a window are in shared memory all the time, and the next rows on their way (cp.async, private to a
// warp) while these meet them. More queries (score_column: one a row) pass in chunks through two stages; those that see nothing of
// the tile are left out. Sums of a query head lie in a ring in shared memory, from which rows are pooled as soon as those around
// them are there: neighbouring CTAs work out `pool_half` rows twice at most.
//
// Results do not depend on how rows are shared: a row's sum is made by one warp, in the order of queries.
//
// Floor: bytes of the keys / read bandwidth for windows; Llama-3.1-8B shape (8 kv heads, d = 128, 128K rows) 0.27 GB, 62 us at
// 4.3 TB/s. Per 16 rows and 8 queries d / 16 tensor-core instructions and 128 exponentials (none for a max: one a row and head).
// All queries (score_column): half of the multiplications that causal attention does.
#pragma once
#include "device/softmax.cuh"
#include "score/tile.cuh"

namespace kvlar::score {

template <int D, class T> struct Scores {
  using S = Shape<D>;
  static constexpr int kThreads = S::kThreads;

  const KvlarScore& p;
  unsigned char* const raw;  // a tile of rows, queries, their lse, sums
  const int t, lane, warp;
  const Lane at;
  const Head& head;
  typename S::Fragments a;

  __device__ Scores(const KvlarScore& params, const Head& shared, unsigned char* memory)
      : p(params), raw(memory), t(int(threadIdx.x)), lane(t & 31), warp(t >> 5), head(shared) {}

  __device__ float* sums(int group_head) const { return reinterpret_cast<float*>(raw + p.shared_sums) + group_head * int(p.ring_rows); }
  __device__ float* shared_lse() const { return reinterpret_cast<float*>(raw + p.shared_lse); }
  __device__ ptx::smem queries() const { return ptx::to_smem(raw) + p.shared_queries; }
  __device__ ptx::smem own_rows() const { return ptx::to_smem(raw) + uint32_t(warp * S::kWarpRows * S::kRowBytes); }

  // This split's part of the columns that no row has.
  __device__ void fill(int split) const {
    if (!p.fill) return;
    const int count = max(0, head.stop - head.first), rest = int(p.row_count) - count, splits = int(p.splits);
    const int from = count + int(int64_t(rest) * split / splits), to = count + int(int64_t(rest) * (split + 1) / splits);
    for (int i = from + t; i < to; i += kThreads) head.scores[i] = -INFINITY;
  }

  // Does the warp have any of the rows [from, to)?
  __device__ bool has(int tile, int from, int to) const {
    const int row = tile * S::kRows + warp * S::kWarpRows;
    return row < to && row + S::kWarpRows > from;
  }
  __device__ __forceinline__ void issue_rows(int tile, int stop) const {
    TileRows rows{};
    head.template find<S::kWarpRows>(p, tile * S::kRows + warp * S::kWarpRows, stop, rows);
    head.template copy<D, S::kWarpRows>(p, rows, own_rows());
  }

  // Queries row .. row + chunk_rows - 1 of a head, and their lse, at place `at_row` of those in shared memory.
  __device__ __forceinline__ void issue_queries(int group_head, int row, int at_row) const {
    const int chunks = int(p.head_dim) / 8;
    const uint16_t* q = head.query(p, group_head, row);
    const float* lse = head.query_lse(p, group_head, row);
    const int rows = int(p.query_rows) - row;
#pragma unroll 1
    for (int i = t; i < int(p.chunk_rows) * (D / 8); i += kThreads) {
      const int r = i / (D / 8), c = i % (D / 8);
      const bool exists = r < rows && c < chunks;
      ptx::cp_async16(queries() + uint32_t(attend::DenseLayout<D>::at(at_row + r, c)), exists ? q + r * p.q_row_stride + 8 * c : q, exists ? 16 : 0);
    }
    for (int i = t; i < int(p.chunk_rows); i += kThreads)
      ptx::cp_async4(ptx::to_smem(shared_lse() + at_row + i), i < rows ? lse + i : lse, i < rows ? 4 : 0);
  }

  // Adds what `count` queries from `row` on give the warp's rows, the first of which is `own_row`. `at_row`: as above.
  __device__ __forceinline__ void add(float (&sum)[S::kBlocks][2], int own_row, int row, int count, int at_row) const {
    const float scale = p.scale * kLog2E;
    const bool largest = p.over_rows == KVLAR_REDUCE_MAX;
    const float none = largest ? __uint_as_float(0x7fc00000u) : -INFINITY;  // adds nothing
    // Queries that see all of these rows.
    const int whole = max(head.live, min(own_row + S::kWarpRows, head.stop) - 1 - head.first_query), whole_end = head.live_end;
#pragma unroll 1
    for (int n = 0; n < count; n += 8) {
      float s[S::kBlocks][4];
      multiply<D, T>(s, a, queries() + uint32_t((at_row + n) * S::kRowBytes));
      const int q = row + n + 2 * at.c;
      const float2 lse = *reinterpret_cast<const float2*>(shared_lse() + at_row + n + 2 * at.c);
      const float shift[2] = {-lse.x * kLog2E, -lse.y * kLog2E};
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[b][e] = fmaf(s[b][e], scale, shift[e & 1]);
      // Seldom: a query that saw nothing (lse -inf: weights of 0), is none, or does not see all rows.
      if (__any_sync(0xffffffffu, lse.x == -INFINITY || lse.y == -INFINITY || q < whole || q + 1 >= whole_end)) {
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int query = q + (e & 1), seen = head.first_query + query - (own_row + 16 * b + 8 * (e >> 1) + at.g);
            if (shift[e & 1] == INFINITY) s[b][e] = -INFINITY;
            if (query < head.live || query >= head.live_end || seen < 0) s[b][e] = none;
          }
      }
      if (largest) {
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[b][e >> 1] = fmaxf(sum[b][e >> 1], s[b][e]);
      } else {
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[b][e >> 1] += ptx::ex2_approx(s[b][e]);
      }
    }
  }

  // The four lanes of a row hold parts of its sum (or max): the whole goes to the ring.
  __device__ __forceinline__ void store(const float (&sum)[S::kBlocks][2], int own_row, int group_head) const {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x = sum[b][h];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const float other = __shfl_xor_sync(0xffffffffu, x, step);
          x = p.over_rows == KVLAR_REDUCE_MAX ? fmaxf(x, other) : x + other;
        }
        if (p.over_rows == KVLAR_REDUCE_MAX) x = ptx::ex2_approx(x);
        if (at.c == 0) sums(group_head)[(own_row + 16 * b + 8 * h + at.g) & (int(p.ring_rows) - 1)] = x;
      }
  }

  // A row's score from the sums around it, which are all in the ring.
  __device__ __forceinline__ float pooled(int row) const {
    const int half = int(p.pool_half), mask = int(p.ring_rows) - 1, from = max(head.first, row - half), to = min(head.stop, row + half + 1);
    const float factor = p.over_rows == KVLAR_REDUCE_MEAN ? 1.f / float(max(1, head.live_end - head.live)) : 1.f;
    const float nan = __uint_as_float(0x7fc00000u);  // the least of a maximum
    const bool widest = p.pool == KVLAR_POOL_MAX, highest = p.over_heads == KVLAR_REDUCE_MAX;
    float score = highest ? nan : 0.f;
    for (int g = 0; g < int(p.group); ++g) {
      const float* sum = sums(g);
      float x = widest ? nan : 0.f;
      for (int i = from; i < to; ++i) x = widest ? fmaxf(x, sum[i & mask]) : x + sum[i & mask];
      x *= factor;
      if (p.pool == KVLAR_POOL_AVG) x *= 1.f / float(2 * half + 1);
      score = highest ? fmaxf(score, x) : score + x;
    }
    return p.over_heads == KVLAR_REDUCE_MEAN ? score * (1.f / float(p.group)) : score;
  }

  __device__ __forceinline__ void emit(int from, int to) const {
    int known = head.own;
    if (p.accumulate && p.previous) known = __ldg(p.previous + head.seq * p.previous_seq_stride + head.head * p.previous_head_stride);
    for (int row = from + t; row < to; row += kThreads) {
      const float x = pooled(row);
      float* const score = head.scores + (row - head.first);
      *score = p.accumulate && row < known ? fmaf(p.decay, *score, x) : x;
    }
  }

  __device__ void run() {
    const int split = int(blockIdx.x % p.splits), splits = int(p.splits), half = int(p.pool_half);
    const int first = head.first, end = head.stop;
    fill(split);
    if (first >= end) return;  // the whole CTA, before any barrier; as below
    const int first_tile = first / S::kRows, tiles = (end - 1) / S::kRows + 1 - first_tile;
    int out = max(first, (first_tile + int(int64_t(tiles) * split / splits)) * S::kRows);
    const int out_end = min(end, (first_tile + int(int64_t(tiles) * (split + 1) / splits)) * S::kRows);
    if (out >= out_end) return;
    const int from = max(first, out - half), to = min(end, out_end + half);  // rows whose sums are needed
    int tile = from / S::kRows;
    if (has(tile, from, to)) issue_rows(tile, to);
    if (p.resident)
      for (int g = 0; g < int(p.group); ++g) issue_queries(g, 0, g * int(p.chunk_rows));
    ptx::cp_async_commit();
    for (; tile * S::kRows < to; ++tile) {
      const int own_row = tile * S::kRows + warp * S::kWarpRows, chunk = int(p.chunk_rows);
      // Chunks of queries that see any row of the tile.
      const int q_first = p.resident ? 0 : max(head.live, tile * S::kRows - head.first_query) & ~7, q_end = head.live_end;
      int parity = 0;
      const bool needed = has(tile, from, to);
      ptx::cp_async_wait<0>();
      __syncthreads();  // the rows are there, and resident queries; all have read the sums of the tile before, and its queries
      if (needed) load_rows<D>(a, own_rows());
      __syncwarp();
      if (has(tile + 1, from, to)) issue_rows(tile + 1, to);
      ptx::cp_async_commit();
      if (!p.resident) {
        if (q_first < q_end) issue_queries(0, q_first, 0);
        ptx::cp_async_commit();
      }
#pragma unroll 1
      for (int g = 0; g < int(p.group); ++g) {
        float sum[S::kBlocks][2];
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) sum[b][0] = sum[b][1] = p.over_rows == KVLAR_REDUCE_MAX ? __uint_as_float(0x7fc00000u) : 0.f;
#pragma unroll 1
        for (int row = q_first; row < q_end; row += chunk) {
          int place = g * chunk;
          if (!p.resident) {
            ptx::cp_async_wait<0>();
            __syncthreads();  // this chunk is there, and all are done with the one before
            place = parity * chunk;
            parity ^= 1;
            const bool same = row + chunk < q_end;
            if (same || g + 1 < int(p.group)) issue_queries(same ? g : g + 1, same ? row + chunk : q_first, parity * chunk);
            ptx::cp_async_commit();
          }
          if (needed) add(sum, own_row, row, min(chunk, q_end - row), place);
        }
        if (needed) store(sum, own_row, g);
      }
      __syncthreads();  // sums of the tile are there
      const int whole = tile * S::kRows + S::kRows, stop = whole >= to ? out_end : min(out_end, whole - half);
      emit(out, stop);
      out = max(out, stop);
    }
    ptx::cp_async_wait<0>();
  }
};

}  // namespace kvlar::score

// An entry point; GPU_EXPORT(name) follows it.
#define KVLAR_SCORE_ROWS_ENTRY(name, D, T)                                                         \
  extern "C" __global__ void __launch_bounds__(128, 4) name(const __grid_constant__ KvlarScore p) { \
    GPU_DYN_SMEM(raw);                                                                             \
    __shared__ kvlar::score::Head head;                                                            \
    if (threadIdx.x == 0) head.load(p, int(blockIdx.x / p.splits));                                \
    __syncthreads();                                                                               \
    kvlar::score::Scores<D, T>(p, head, raw).run();                                                \
  }
