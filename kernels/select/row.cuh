// The cut of one row, found by one CTA: up to three passes of 11, 11 and 10 bits over its keys, a fourth where ties are divided.
// The first reads memory or L2, the others the L1, which holds rows of up to 32K.
#pragma once
#include "select/order.cuh"

namespace kvlar::select {

// The `need`-th, in ascending order, of the free scores whose key is `key`.
__device__ inline int find_tie(Shared& shared, const Free& free, uint32_t key, int need) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, share = share_of_warp(free.count());
  const int first = free.first + warp * share, end = min(free.end, first + share);
  int own = 0;
  for_share(free, first, end, [&](int i, float x) { own += __popc(__ballot_sync(0xffffffffu, i < end && ordered_key(x) == key)); });
  int before = sum_of_warps_before<kThreads>(own, shared.warp_sums);
  if (before < need && need <= before + own) {  // one warp
    for_share(free, first, end, [&](int i, float x) {
      const uint32_t ties = __ballot_sync(0xffffffffu, i < end && ordered_key(x) == key);
      const int rank = before + __popc(ties & ((2u << lane) - 1));
      if ((ties >> lane & 1) && rank == need) shared.number = i;
      before += __popc(ties);
    });
  }
  __syncthreads();
  return shared.number;
}

// The cut that keeps the `need` largest free scores. All threads call it; `shared` may be used again after the next barrier.
// With a histogram of the scores there is a pass less.
__device__ inline uint64_t find_cut(Shared& shared, const KvlarTopk& p, const Free& free, int need) {
  if (need >= free.count()) return kAll;
  if (need <= 0) return kNone;
  uint32_t prefix = 0, left = uint32_t(need);  // bits of the key that are known; how many of those that share them are kept
  constexpr int kShifts[3] = {21, 10, 0}, kBits[3] = {11, 11, 10};
#pragma unroll
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = kShifts[digit], known = shift + kBits[digit];
    if (digit == 0 && p.histogram) {
      load_histogram(shared, p, free);
    } else {
      clear_bins(shared);
      for_scores(free.scores, free.first, free.end, [&](int, float x) {
        const uint32_t key = ordered_key(x);
        if (digit == 0 || key >> known == prefix >> known) atomicAdd(shared.bins + (key >> shift & ((1u << kBits[digit]) - 1)), 1u);
      });
      __syncthreads();
    }
    find_bin(shared, left);
    prefix |= shared.bin << shift;
    left -= shared.above;
    const bool whole = left == shared.inside;
    __syncthreads();
    if (whole) return uint64_t(prefix) << 32;  // all that share the bits that are known
  }
  return ranked(prefix, free.before + uint32_t(find_tie(shared, free, prefix, int(left))));
}

}  // namespace kvlar::select
