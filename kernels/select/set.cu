// The k largest scores of a set of rows together, by many CTAs: rows beyond what an SM's L1 holds, and budgets that layers and
// heads share. Same order, same outputs as topk.cu.
//
//   bins: how many of a set's free scores have each first digit of 11 bits; read off the rows' histograms where a scan made
//   them, and not launched where a set is one row and has a histogram.
//   cut: each CTA reads off the digit of the k-th largest, and hands on the scores of its part that share it; the CTA that
//   arrives last at a set finds the cut among those, by digits of the key's other 21 bits and of the index.
//   apply: what a cut keeps of each row, as counts, lists or masks.
//
// With a floor the best scores of each row are kept first and counted: kvlar_topk has put the cuts that keep those into `cuts`,
// one a row, the others compete for what is left, and a row's cut becomes the lower of the two (a row's scores have the same
// order alone as among all).
//
// Floor of bins and cut: 4 B a score each, the second time from L2; 8 rows of 128K 4.2 MB, 1 us each, and the two launches.
// Beside that, cut reads 8 KB of bins a CTA, and the last one 8 B for each score that shares the digit, up to five times:
// a few thousand of a bell curve's 128K, all of them where all scores are equal.
#include "select/order.cuh"

namespace kvlar::select {

constexpr int kPart = 8192;  // scores a CTA

struct Part {
  int row, set, first, end;
  __device__ explicit Part(const KvlarTopk& p, const Free& free, int row_of) : row(row_of), set(row_of / int(p.members)) {
    first = max(free.first, int(blockIdx.x % p.parts) * kPart);
    end = min(free.end, int(blockIdx.x % p.parts + 1) * kPart);
  }
};

// What keeps the best scores of a row that others do not compete with.
__device__ inline uint64_t floor_cut(const KvlarTopk& p, int row) {
  return p.floor ? __ldcg(reinterpret_cast<const unsigned long long*>(p.cuts + row)) : kNone;
}

// A sum over the rows of a set, to all threads.
template <class Of> __device__ inline int sum_of_set(Shared& shared, const KvlarTopk& p, int set, Of of) {
  int own = 0;
  for (int m = int(threadIdx.x); m < int(p.members); m += kThreads) own += of(Free(p, set * int(p.members) + m));
  const int before = block_exclusive_sum<kThreads>(own, shared.warp_sums);
  if (threadIdx.x == kThreads - 1) shared.number = before + own;
  __syncthreads();
  const int all = shared.number;
  __syncthreads();
  return all;
}

// Hands on the scores of a part whose first digit is `bin`.
__device__ inline void hand_on(const KvlarTopk& p, const Free& free, const Part& part, uint32_t bin) {
  uint64_t* const to = p.candidates + int64_t(part.set) * p.members * p.row_count;
  const uint64_t below = floor_cut(p, part.row);
  const int lane = int(threadIdx.x) % 32;
  for (int i = part.first; i < part.end; i += kThreads) {  // all threads take part in each round
    const int at = i + int(threadIdx.x);
    const uint32_t key = at < part.end ? free.key(at) : 0;
    const uint64_t place = ranked(key, free.before + uint32_t(at));
    const uint32_t all = __ballot_sync(0xffffffffu, at < part.end && key >> 21 == bin && place < below);
    if (!all) continue;
    uint32_t slot = 0;
    if (lane == 0) slot = atomicAdd(p.found + part.set, uint32_t(__popc(all)));
    slot = __shfl_sync(0xffffffffu, slot, 0) + uint32_t(__popc(all & ((1u << lane) - 1)));
    if (all >> lane & 1) __stcg(reinterpret_cast<unsigned long long*>(to + slot), (unsigned long long)place);
  }
}

// The cut that keeps the `left` largest of `count` candidates, all of which begin with `bin`.
__device__ inline uint64_t cut_of(Shared& shared, const unsigned long long* candidates, uint32_t count, uint32_t bin, uint32_t left, bool strict) {
  uint64_t prefix = uint64_t(bin) << 53;
  // Digits end at bits 42, 32, 21, 10 and 0: a byte each, since an array would lie in memory.
  constexpr uint64_t kShifts = 42ull | 32ull << 8 | 21ull << 16 | 10ull << 24;
  int known = 53;
#pragma unroll 1
  for (int digit = 0; digit < 5; ++digit) {
    const int shift = int(kShifts >> (8 * digit) & 255), bits = known - shift;
    if (strict && shift < 32) break;  // the key is known
    clear_bins(shared);
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t x = __ldcg(candidates + i);
      if (x >> known == prefix >> known) atomicAdd(shared.bins + (uint32_t(x >> shift) & ((1u << bits) - 1)), 1u);
    }
    __syncthreads();
    find_bin(shared, left);
    prefix |= uint64_t(shared.bin) << shift;
    known = shift;
    left -= shared.above;
    const bool whole = left == shared.inside;
    __syncthreads();
    if (whole && !strict) break;
  }
  return strict ? ((prefix >> 32) + 1) << 32 : prefix;
}

}  // namespace kvlar::select

extern "C" __global__ void __launch_bounds__(1024, 1) kvlar_topk_bins(const __grid_constant__ KvlarTopk p) {
  using namespace kvlar;
  using namespace kvlar::select;
  __shared__ Shared shared;
  const int row = int(blockIdx.x / p.parts);
  const Free free(p, row);
  const Part part(p, free, row);
  if (p.histogram) {  // then the launcher has a CTA for each row
    load_histogram(shared, p, free);
  } else {
    const uint64_t below = floor_cut(p, row);
    clear_bins(shared);
    for (int i = part.first + int(threadIdx.x); i < part.end; i += kThreads) {
      const uint32_t key = free.key(i);
      if (ranked(key, free.before + uint32_t(i)) < below) atomicAdd(shared.bins + (key >> 21), 1u);
    }
    __syncthreads();
  }
  add_counts(shared.bins, p.bins + int64_t(part.set) * kBins);
}
GPU_EXPORT(kvlar_topk_bins)

extern "C" __global__ void __launch_bounds__(1024, 1) kvlar_topk_cut(const __grid_constant__ KvlarTopk p) {
  using namespace kvlar::select;
  __shared__ Shared shared;
  const int row = int(blockIdx.x / p.parts);
  const Free free(p, row);
  const Part part(p, free, row);
  const int floor = int(p.floor);
  const int all = sum_of_set(shared, p, part.set, [=](const Free& f) { return max(0, f.count() - floor); });
  const int need = wanted(p, part.set) - (sum_of_set(shared, p, part.set, [](const Free& f) { return f.length; }) - all);
  const bool some = need > 0 && all > 0 && (need < all || p.strict);  // else all are kept, or none
  uint32_t* const bins = p.bins + int64_t(part.set) * kBins;
  if (some) {
    if (p.histogram && p.members == 1) {
      load_histogram(shared, p, free);
    } else {
      for (int i = int(threadIdx.x); i < kBins; i += kThreads) shared.bins[i] = __ldcg(bins + i);
      __syncthreads();
    }
    find_bin(shared, uint32_t(min(need, all)));
    hand_on(p, free, part, shared.bin);
  }
  if (!ptx::arrive_last(p.counters + part.set, p.parts * p.members)) return;
  // The last CTA of the set.
  uint64_t cut = need > 0 ? kAll : kNone;
  if (some) {
    const unsigned long long* candidates =
        reinterpret_cast<const unsigned long long*>(p.candidates + int64_t(part.set) * p.members * p.row_count);
    const uint32_t bin = shared.bin, left = uint32_t(min(need, all)) - shared.above, count = __ldcg(p.found + part.set);
    __syncthreads();
    cut = cut_of(shared, candidates, count, bin, left, p.strict != 0);
  }
  if (threadIdx.x == 0) p.found[part.set] = 0;
  const int cuts = p.floor ? int(p.members) : 1;
  for (int m = int(threadIdx.x); m < cuts; m += kThreads)
    p.cuts[part.set * cuts + m] = min(uint64_t(cut), p.floor ? floor_cut(p, part.set * cuts + m) : kNone);
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) bins[i] = 0;
}
GPU_EXPORT(kvlar_topk_cut)

extern "C" __global__ void __launch_bounds__(1024, 1) kvlar_topk_apply(const __grid_constant__ KvlarTopk p) {
  using namespace kvlar::select;
  __shared__ Shared shared;
  const int row = int(blockIdx.x);
  put_selected(shared, p, Free(p, row), row, __ldg(reinterpret_cast<const unsigned long long*>(p.cuts + (p.floor ? row : row / int(p.members)))));
}
GPU_EXPORT(kvlar_topk_apply)
