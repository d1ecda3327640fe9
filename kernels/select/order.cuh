// What the k largest scores are found with: radix digits of order-preserving keys (device/order.cuh), ties to the lower index.
//
// The result is a cut: one u64 such that a free score is selected if and only if its `ranked` value is at or above it. Whoever
// has the scores can apply it; row lists, masks and counts are derived from it.
#pragma once
#include "device/order.cuh"
#include "device/scan.cuh"

namespace kvlar::select {

constexpr int kThreads = 1024, kWarps = kThreads / 32, kBins = KVLAR_SCORE_BINS;
static_assert(kBins == 2 * kThreads, "two bins a thread");
constexpr uint64_t kAll = 0, kNone = ~uint64_t(0);  // cuts

// Score, then the lower index first. None has the value kNone: no key has all bits set.
__device__ inline uint64_t ranked(uint32_t key, uint32_t index) { return uint64_t(key) << 32 | uint32_t(~index); }

// Scores [first, end) of a row may be selected; [0, first) and [end, length) always are. `before`: scores of the set in the rows
// before.
struct Free {
  const float* scores;
  int first, end, length;
  uint32_t at;  // which row of all, those between sets counted
  uint32_t before;

  __device__ Free(const KvlarTopk& p, int row) : length(int(p.row_count)) {
    const uint32_t member = uint32_t(row) % p.members;
    at = uint32_t(row) / p.members * p.set_rows + member;
    scores = p.scores + at * p.score_stride;
    if (p.lengths) length = max(0, min(length, int(__ldg(p.lengths + at / p.length_rows))));
    first = min(int(p.sink_rows), length);
    end = max(first, length - int(p.recent_rows));
    before = member * p.row_count;
  }
  __device__ int count() const { return end - first; }
  __device__ uint32_t key(int i) const { return ordered_key(__ldg(scores + i)); }
  // `x` is score i, or anything where that is not free.
  __device__ bool selected(int i, float x, uint64_t cut) const {
    return i < first || i >= end ? i < length : ranked(ordered_key(x), before + uint32_t(i)) >= cut;
  }
};

// Scores of a thread that are on their way together: atomics and ballots in between would have each wait for the one before.
constexpr int kScores = 8, kShareScores = 4;

// Calls `each(i, score)` for the scores [first, end), a CTA's.
template <class Each> __device__ inline void for_scores(const float* scores, int first, int end, Each each) {
  const float* from = scores + first + int(threadIdx.x);
  for (int i = first + int(threadIdx.x); i < end; i += kScores * kThreads, from += kScores * kThreads) {
    float x[kScores];
#pragma unroll
    for (int j = 0; j < kScores; ++j) x[j] = j * kThreads < end - i ? __ldg(from + j * kThreads) : 0.f;
#pragma unroll
    for (int j = 0; j < kScores; ++j)
      if (j * kThreads < end - i) each(i + j * kThreads, x[j]);
  }
}

// Calls `each(i, score)` for the scores [first, end) and some beyond them, a warp's, by all lanes; of those not free the score is 0.
template <class Each> __device__ inline void for_share(const Free& free, int first, int end, Each each) {
  const int lane = int(threadIdx.x) % 32;
  for (; first < end; first += 32 * kShareScores) {
    float x[kShareScores];
#pragma unroll
    for (int j = 0; j < kShareScores; ++j) {
      const int i = first + 32 * j + lane;
      x[j] = i >= free.first && i < free.end ? __ldg(free.scores + i) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < kShareScores; ++j) each(first + 32 * j + lane, x[j]);
  }
}

struct Shared {
  uint32_t bins[kBins];
  int warp_sums[kWarps];
  uint32_t bin, above, inside;
  int number;
};

// Finds the bin that holds the `need`-th largest (from 1 on) of what was counted: `bin`, how many are in it, and in those above.
__device__ inline void find_bin(Shared& shared, uint32_t need) {
  const int top = kBins - 1 - 2 * int(threadIdx.x);
  const uint32_t high = shared.bins[top], low = shared.bins[top - 1];
  const uint32_t before = uint32_t(block_exclusive_sum<kThreads>(int(high + low), shared.warp_sums));
  if (before < need && need <= before + high + low) {
    const bool in_high = need <= before + high;
    shared.bin = uint32_t(in_high ? top : top - 1);
    shared.above = in_high ? before : before + high;
    shared.inside = in_high ? high : low;
  }
  __syncthreads();
}

__device__ inline void clear_bins(Shared& shared) {
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) shared.bins[i] = 0;
  __syncthreads();
}

// How many of a row, or of a set, are kept.
__device__ inline int wanted(const KvlarTopk& p, int set) { return p.ks ? min(int(__ldg(p.ks + set * p.k_stride)), int(p.k)) : int(p.k); }

// How many free scores of each bin there are, from those of all scores.
__device__ inline void load_histogram(Shared& shared, const KvlarTopk& p, const Free& free) {
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) shared.bins[i] = __ldg(p.histogram + int64_t(free.at) * kBins + i);
  __syncthreads();
  for (int i = int(threadIdx.x); i < free.length - free.count(); i += kThreads)
    atomicSub(shared.bins + (free.key(i < free.first ? i : i + free.count()) >> 21), 1u);
  __syncthreads();
}

// A warp's share of `count` scores: neighbours, whole groups of 32.
__device__ inline int share_of_warp(int count) { return (count + 32 * kWarps - 1) / (32 * kWarps) * 32; }

// Writes the mask of row `row` and its scores that are kept, in ascending order; gives their number to all threads.
__device__ inline int write_selected(Shared& shared, const KvlarTopk& p, const Free& free, int row, uint64_t cut) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, share = share_of_warp(int(p.row_count));
  const int first = warp * share, end = min(int(p.row_count), first + share);
  uint8_t* mask = p.mask ? p.mask + int64_t(row) * p.row_count : nullptr;
  int own = 0;
  for_share(free, first, end, [&](int i, float x) {
    const bool in = i < end && free.selected(i, x, cut);
    if (mask && i < end) mask[i] = in;
    own += __popc(__ballot_sync(0xffffffffu, in));
  });
  int before = sum_of_warps_before<kThreads>(own, shared.warp_sums);
  if (threadIdx.x == kThreads - 32) shared.number = before + own;
  if (p.selected) {
    int32_t* out = p.selected + int64_t(row) * p.k;
    for_share(free, first, end, [&](int i, float x) {
      const bool in = i < end && free.selected(i, x, cut);
      const uint32_t all = __ballot_sync(0xffffffffu, in);
      if (in) out[before + __popc(all & ((1u << lane) - 1))] = i;
      before += __popc(all);
    });
  }
  __syncthreads();
  const int count = shared.number;
  if (p.selected)
    for (int i = count + int(threadIdx.x); i < int(p.k); i += kThreads) p.selected[int64_t(row) * p.k + i] = -1;
  return count;
}

// What is asked for of a row beside its cut.
__device__ inline void put_selected(Shared& shared, const KvlarTopk& p, const Free& free, int row, uint64_t cut) {
  if (!p.counts && !p.selected && !p.mask) return;
  const int count = write_selected(shared, p, free, row, cut);
  if (threadIdx.x == 0 && p.counts) p.counts[row] = count;
}

}  // namespace kvlar::select
