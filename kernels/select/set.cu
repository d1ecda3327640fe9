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

constexpr int kPart = kScores * kThreads;  // scores a CTA
static_assert(kPart == 8192, "as the launcher has it");

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

// Sums over the rows of a set: of the scores that compete, and of those held.
struct SetSums {
  int open, held;

  // To all threads, which call it.
  __device__ SetSums(Shared& shared, const KvlarTopk& p, int set) : open(0), held(0) {
    for (int m = int(threadIdx.x); m < int(p.members); m += kThreads) {
      const Free free(p, set * int(p.members) + m);
      open += max(0, free.count() - int(p.floor));
      held += free.length;
    }
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    open = __reduce_add_sync(0xffffffffu, open);
    held = __reduce_add_sync(0xffffffffu, held);
    if (lane == 0) shared.bins[warp] = uint32_t(open), shared.bins[kWarps + warp] = uint32_t(held);
    __syncthreads();
    open = __reduce_add_sync(0xffffffffu, int(shared.bins[lane]));
    held = __reduce_add_sync(0xffffffffu, int(shared.bins[kWarps + lane]));
    __syncthreads();
  }
};
static_assert(kWarps == 32, "a warp's sum a lane");

// A thread's scores of a part, asked for before what else it waits for.
struct PartScores {
  float x[kScores];
  int first, count;  // score j is number first + j * kThreads, if j * kThreads < count
  uint64_t below;    // those above are kept anyway

  __device__ PartScores(const KvlarTopk& p, const Free& free, const Part& part)
      : first(part.first + int(threadIdx.x)), count(part.end - first), below(floor_cut(p, part.row)) {
    const float* from = free.scores + first;
#pragma unroll
    for (int j = 0; j < kScores; ++j) x[j] = j * kThreads < count ? __ldg(from + j * kThreads) : 0.f;
  }
  __device__ uint64_t place(const Free& free, int j) const { return ranked(ordered_key(x[j]), free.before + uint32_t(first + j * kThreads)); }
};

// Hands on the scores of a part whose first digit is `bin`, in any order, to places of the set that the CTA takes all at once.
__device__ inline void hand_on(Shared& shared, const KvlarTopk& p, const Free& free, const Part& part, const PartScores& scores, uint32_t bin) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t mine = 0;  // bit j: score j
  int own = 0;        // the warp's
#pragma unroll
  for (int j = 0; j < kScores; ++j) {
    const bool in = j * kThreads < scores.count && score_bin(scores.x[j]) == bin && scores.place(free, j) < scores.below;
    mine |= uint32_t(in) << j;
    own += __popc(__ballot_sync(0xffffffffu, in));
  }
  const int before = sum_of_warps_before<kThreads>(own, shared.warp_sums);
  if (threadIdx.x == kThreads - 32 && before + own > 0) shared.number = int(atomicAdd(p.found + part.set, uint32_t(before + own)));
  __syncthreads();
  if (own == 0) return;
  uint64_t* to = p.candidates + int64_t(part.set) * p.members * p.row_count + (uint32_t(shared.number) + uint32_t(before));
#pragma unroll
  for (int j = 0; j < kScores; ++j) {
    const uint32_t all = __ballot_sync(0xffffffffu, mine >> j & 1);
    if (mine >> j & 1)
      __stcg(reinterpret_cast<unsigned long long*>(to + __popc(all & ((1u << lane) - 1))), (unsigned long long)scores.place(free, j));
    to += __popc(all);
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
    for (uint32_t i = threadIdx.x; i < count; i += 4 * kThreads) {
      uint64_t x[4];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) x[j] = i + j * kThreads < count ? __ldcg(candidates + i + j * kThreads) : ~prefix;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (x[j] >> known == prefix >> known) atomicAdd(shared.bins + (uint32_t(x[j] >> shift) & ((1u << bits) - 1)), 1u);
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
    for_scores(free.scores, part.first, part.end, [&](int i, float x) {
      const uint32_t key = ordered_key(x);
      if (ranked(key, free.before + uint32_t(i)) < below) atomicAdd(shared.bins + (key >> 21), 1u);
    });
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
  const SetSums sums(shared, p, part.set);
  const int all = sums.open, need = wanted(p, part.set) - (sums.held - all);
  const bool some = need > 0 && all > 0 && (need < all || p.strict);  // else all are kept, or none
  uint32_t* const bins = p.bins + int64_t(part.set) * kBins;
  if (some) {
    const PartScores scores(p, free, part);
    if (p.histogram && p.members == 1) {
      load_histogram(shared, p, free);
    } else {
      for (int i = int(threadIdx.x); i < kBins; i += kThreads) shared.bins[i] = __ldcg(bins + i);
      __syncthreads();
    }
    find_bin(shared, uint32_t(min(need, all)));
    hand_on(shared, p, free, part, scores, shared.bin);
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
