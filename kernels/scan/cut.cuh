// The cut of a (sequence, kv head), found by the CTA that is the last to write its scores: what select/topk.cu finds in a launch of
// its own, from the same histogram, with the few threads that a scan has.
//
// The bin of the k-th largest score is read off the histogram. One pass over the scores, from L2, lists those of the bin in the
// memory of the rings, and digits of theirs decide (as in select/set.cu); where they don't fit (more than 4K equal scores or so),
// further passes over the scores do.
// Floor: 4 B a score, by an SM alone: 16K scores 0.6 us at 110 GB/s, but of few threads; longer rows than 32K take kvlar_topk_cut.
#pragma once
#include "device/order.cuh"
#include "device/scan.cuh"

namespace kvlar::scan {

struct SharedCut {
  int warp_sums[4];  // of as many warps as a CTA has, at most
  uint32_t bin, above, inside, listed;
};

// Of row `row`, whose scores are all counted in `bins` (which it uses up); `list` has room for `room` scores.
template <int kThreads> struct CutFinder {
  static constexpr int kBins = KVLAR_SCORE_BINS, kEach = kBins / kThreads;
  static_assert(kBins % kThreads == 0 && kThreads <= 128, "as many bins a thread");

  const float* scores;
  int length, first, end;  // scores [first, end) compete
  SharedCut& shared;
  uint32_t* bins;
  uint64_t* list;
  int room;

  __device__ CutFinder(const KvlarTopk& p, const float* row, int rows, SharedCut& memory, uint32_t* counts, unsigned char* ring, int ring_bytes)
      : scores(row), length(rows), first(min(int(p.sink_rows), rows)), end(max(first, rows - int(p.recent_rows))), shared(memory),
        bins(counts), list(reinterpret_cast<uint64_t*>(ring)), room(ring_bytes / 8) {}

  __device__ uint32_t key(int i) const { return ordered_key(__ldcg(scores + i)); }
  __device__ static uint64_t ranked(uint32_t key, int i) { return uint64_t(key) << 32 | uint32_t(~uint32_t(i)); }

  // The bin of the `need`-th largest, from 1 on.
  __device__ void find_bin(uint32_t need) const {
    const int top = kBins - 1 - kEach * int(threadIdx.x);
    const uint4* const four = reinterpret_cast<const uint4*>(bins + top + 1 - kEach);
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kEach / 4; ++i) own += four[i].x + four[i].y + four[i].z + four[i].w;
    uint32_t before = uint32_t(block_exclusive_sum<kThreads>(int(own), shared.warp_sums));
    if (before < need && need <= before + own) {
      int at = top;
      for (; before + bins[at] < need; --at) before += bins[at];
      shared.bin = uint32_t(at);
      shared.above = before;
      shared.inside = bins[at];
    }
    __syncthreads();
  }

  // Lists the free scores of the bin, while there is room; counts them all.
  __device__ void list_bin() const {
    const uint32_t bin = shared.bin;
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    constexpr int kAtOnce = 16;  // few threads: each waits for many scores together
    for (int from = first + int(threadIdx.x); from < end; from += kAtOnce * kThreads) {
      float x[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) x[j] = __ldcg(scores + min(from + j * kThreads, end - 1));
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int i = from + j * kThreads;
        const uint32_t own = ordered_key(x[j]);
        if (i >= end || own >> 21 != bin) continue;
        const uint32_t slot = atomicAdd(&shared.listed, 1u);
        if (int(slot) < room) list[slot] = ranked(own, i);
      }
    }
    __syncthreads();
  }

  // All threads call it, after a barrier behind the last score and count.
  __device__ uint64_t find(int k) const {
    const int forced = length - (end - first), need = k - forced;
    if (need >= end - first) return 0;
    if (need <= 0) return ~uint64_t(0);
    for (int i = int(threadIdx.x); i < forced; i += kThreads) atomicSub(bins + (key(i < first ? i : i + end - first) >> 21), 1u);
    __syncthreads();
    find_bin(uint32_t(need));
    list_bin();
    const bool listed = int(shared.listed) <= room;
    const int from = listed ? 0 : first, to = listed ? int(shared.listed) : end;
    uint64_t prefix = uint64_t(shared.bin) << 53;
    uint32_t left = uint32_t(need) - shared.above;
    bool whole = left == shared.inside;
    // Digits end at bits 42, 32, 21, 10 and 0: a byte each, since an array would lie in memory.
    constexpr uint64_t kShifts = 42ull | 32ull << 8 | 21ull << 16 | 10ull << 24;
    int known = 53;
#pragma unroll 1
    for (int digit = 0; digit < 5 && !whole; ++digit) {
      const int shift = int(kShifts >> (8 * digit) & 255), bits = known - shift;
      __syncthreads();  // the digit before is read
      for (int i = int(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
      __syncthreads();
      for (int i = from + int(threadIdx.x); i < to; i += kThreads) {
        const uint64_t x = listed ? list[i] : ranked(key(i), i);
        if (x >> known == prefix >> known) atomicAdd(bins + (uint32_t(x >> shift) & ((1u << bits) - 1)), 1u);
      }
      __syncthreads();
      find_bin(left);
      prefix |= uint64_t(shared.bin) << shift;
      known = shift;
      left -= shared.above;
      whole = left == shared.inside;
    }
    return prefix;
  }
};

}  // namespace kvlar::scan
