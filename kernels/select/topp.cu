// topp: the fewest rows that hold a share of the softmax mass of their logits, beside the first and last ones, which are always in.
//
//   logits [rows][row_count] fp32 -> a cut a row (order.cuh); on request counts [rows], the mass of what is kept [rows], the rows
//   kept in ascending order, and a mask [rows][row_count].
//   The least n such that sum of exp(logit) over forced rows and the n largest others >= top_p * that of all; then at least k_min
//   rows, then at most k_max. NaN and -inf have no mass, and are not kept unless forced; logits of +inf share all of it.
//
// Masses are summed as integers: exp(logit - largest) in multiples of 2^-weight_log2, 2^40 at least. So a sum does not depend on
// its order, there can be atomics, and it is more exact than one in fp32: within 2^-18 of the whole for 4M rows. top_p is met on
// those sums exactly.
//
// A CTA takes a row: a pass for the largest logit, one a digit of 11, 11 and 10 bits for the bin of mass that crosses top_p (a
// radix select of masses; with `in_bins` one pass over steps of 1/16 of a logit serves), one to count, and those of find_cut where
// k_min or k_max say more. The first reads memory or L2, the others the L1, which holds rows of up to 32K, the rest L2.
// A histogram of logits (scan) says nothing of masses; it saves find_cut a pass.
// Floor: 4 B a logit; 32 rows of 32K from L2 4 MB, 1.2 us at the 110 GB/s of an SM; each further pass half of that.
#include "select/row.cuh"

namespace kvlar::select {

constexpr uint64_t kFinite = uint64_t(0x00800000u) << 32;  // keeps all but -inf and NaN

struct SharedMass {
  Shared select;
  uint32_t low[kBins], high[kBins];  // words of masses
  unsigned long long warp_masses[kWarps];
  unsigned long long sum, above, inside;
  float warp_tops[kWarps];
  uint32_t bin;
};

// The largest logit; NaN counts as none.
__device__ inline float largest(SharedMass& shared, const Free& free) {
  float top = -INFINITY;
  constexpr int kAtOnce = 2 * kScores;  // this pass reads memory or L2
  const float* from = free.scores + int(threadIdx.x);
#pragma unroll 1
  for (int left = free.length - int(threadIdx.x); left > 0; left -= kAtOnce * kThreads, from += kAtOnce * kThreads) {
    float x[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) x[j] = j * kThreads < left ? __ldg(from + j * kThreads) : -INFINITY;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) top = fmaxf(top, x[j]);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  if (threadIdx.x % 32 == 0) shared.warp_tops[threadIdx.x / 32] = top;
  __syncthreads();
  top = shared.warp_tops[threadIdx.x % kWarps];
#pragma unroll
  for (int step = 1; step < kWarps; step *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
  return top;
}

// A logit's share of the mass, and where it is counted.
struct Mass {
  float top, one;

  __device__ uint64_t of(float x) const {
    if (!(x > -INFINITY)) return 0;
    return uint64_t(one * (x == top ? 1.f : ptx::ex2_approx((x - top) * 1.4426950408889634f)));
  }
  // How many steps of 1/16 it lies below the largest; in double precision, as the reference has it.
  __device__ double steps(float x) const { return x == top ? 0. : ceil(__dmul_rn(__dsub_rn(double(top), double(x)), 16.)); }
  // Steps as a bin, the fewest in the last one. Logits 127 below the largest have no mass.
  __device__ uint32_t step_bin(float x) const {
    const double n = steps(x);
    return uint32_t(kBins - 1 - (n < kBins - 1 ? int(n) : kBins - 1));
  }
};

__device__ inline float score_of(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// The least key of a logit that is at most so many steps below the largest.
__device__ inline uint32_t least_key(const Mass& mass, int steps) {
  uint32_t outside = 0x007fffffu, inside = ordered_key(mass.top);  // -inf is out, the largest is in
  while (inside - outside > 1) {
    const uint32_t middle = outside + (inside - outside) / 2;
    if (mass.steps(score_of(middle)) <= double(steps)) inside = middle;
    else outside = middle;
  }
  return inside;
}

__device__ inline void clear_masses(SharedMass& shared) {
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) shared.low[i] = shared.high[i] = 0;
  __syncthreads();
}

// In two words: an atomic of 64 bits in shared memory is a loop, of which each round serves one lane of those at a bin. An addition
// that wraps around carries, so the sum is that of 64 bits, in any order.
// A warp's lanes of one bin are not added up first: to find and fold them takes some 20 instructions a bin, the two atomics two.
__device__ inline void add_mass(SharedMass& shared, uint32_t bin, uint64_t own) {
  const uint32_t low = uint32_t(own), before = atomicAdd(shared.low + bin, low);
  const uint32_t high = uint32_t(own >> 32) + (before + low < low);
  if (high) atomicAdd(shared.high + bin, high);
}

__device__ inline uint64_t mass_of_bin(const SharedMass& shared, int bin) { return uint64_t(shared.high[bin]) << 32 | shared.low[bin]; }

// Finds the bin, from the last one down, in which the mass reaches `need`: that in the bins before it, and in it.
__device__ inline void find_mass_bin(SharedMass& shared, uint64_t need) {
  const int top = kBins - 1 - 2 * int(threadIdx.x);
  const uint64_t high = mass_of_bin(shared, top), low = mass_of_bin(shared, top - 1);
  const uint64_t before = block_exclusive_sum<kThreads>((unsigned long long)(high + low), shared.warp_masses);
  if (before < need && need <= before + high + low) {
    const bool in_high = need <= before + high;
    shared.bin = uint32_t(in_high ? top : top - 1);
    shared.above = in_high ? before : before + high;
    shared.inside = in_high ? high : low;
  }
  __syncthreads();
}

// The cut of the fewest free rows whose mass is at least `left`, from the masses of first digits.
__device__ inline uint64_t cut_of_mass(SharedMass& shared, const Free& free, const Mass& mass, uint64_t left) {
  uint32_t prefix = 0;
  constexpr int kShifts[3] = {21, 10, 0}, kBits[3] = {11, 11, 10};
#pragma unroll
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = kShifts[digit], known = shift + kBits[digit];
    if (digit > 0) {
      clear_masses(shared);
      for_scores(free.scores, free.first, free.end, [&](int, float x) {
        const uint32_t key = ordered_key(x);
        if (key >> known == prefix >> known) add_mass(shared, key >> shift & ((1u << kBits[digit]) - 1), mass.of(score_of(key)));
      });
      __syncthreads();
    }
    find_mass_bin(shared, left);
    prefix |= shared.bin << shift;
    left -= shared.above;
    const bool whole = left == shared.inside;
    __syncthreads();
    if (whole) return uint64_t(prefix) << 32;
  }
  // Rows of one logit, as many as it takes.
  const uint64_t each = mass.of(score_of(prefix));
  return ranked(prefix, uint32_t(find_tie(shared.select, free, prefix, int((left + each - 1) / each))));
}

// How many free rows a cut keeps, to all threads.
__device__ inline int count_of(Shared& shared, const Free& free, uint64_t cut) {
  int own = 0;
  for_scores(free.scores, free.first, free.end, [&](int i, float x) { own += ranked(ordered_key(x), uint32_t(i)) >= cut; });
  return block_sum<kThreads>(own, shared.warp_sums);
}

// What of `whole` has to be kept.
__device__ inline uint64_t share_of(double top_p, uint64_t whole) {
  return top_p < 1. ? min(whole, uint64_t(ceil(__dmul_rn(top_p, double(whole))))) : whole;
}

// The cut that `top_p` asks for; `masses` are those of first digits, or of steps.
__device__ inline uint64_t find_mass_cut(SharedMass& shared, const KvlarTopp& p, const Free& free, const Mass& mass, uint64_t forced, uint64_t whole) {
  const uint64_t target = share_of(p.top_p, whole);
  if (whole == 0) return kNone;
  if (!p.in_bins) return forced < target ? cut_of_mass(shared, free, mass, target - forced) : kNone;
  int steps = 0;  // the least there are: those that equal the largest
  if (forced < target) {
    find_mass_bin(shared, target - forced);
    steps = kBins - 1 - int(shared.bin);
  }
  if (threadIdx.x == 0) shared.sum = least_key(mass, steps);
  __syncthreads();
  const uint64_t key = shared.sum;
  __syncthreads();
  return key << 32;
}

}  // namespace kvlar::select

extern "C" __global__ void __launch_bounds__(1024, 1) kvlar_topp(const __grid_constant__ KvlarTopp p) {
  using namespace kvlar;
  using namespace kvlar::select;
  __shared__ SharedMass shared;
  const int row = int(blockIdx.x);
  const Free free(p.rows, row);
  const Mass mass{largest(shared, free), __uint_as_float((127 + p.weight_log2) << 23)};
  clear_masses(shared);
  unsigned long long forced = 0, others = 0;
  for_scores(free.scores, 0, free.length, [&](int i, float x) {
    const uint64_t own = mass.of(x);
    if (i < free.first || i >= free.end) {
      forced += own;
    } else if (own > 0) {
      others += own;
      add_mass(shared, p.in_bins ? mass.step_bin(x) : score_bin(x), own);
    }
  });
  forced = block_sum<kThreads>(forced, shared.warp_masses);
  const uint64_t whole = forced + block_sum<kThreads>(others, shared.warp_masses);
  uint64_t cut = find_mass_cut(shared, p, free, mass, forced, whole);
  // Not fewer than k_min, not more than k_max; no row without mass.
  const int count = count_of(shared.select, free, cut), always = free.length - free.count();
  const int k_min = p.limits ? __ldg(p.limits) : int(p.k_min), k_max = p.limits ? __ldg(p.limits + 1) : int(p.k_max);
  const int need = min(max(count, k_min - always), max(k_max - always, 0));
  if (need != count) cut = max(kFinite, find_cut(shared.select, p.rows, free, need));
  __syncthreads();
  if (threadIdx.x == 0 && p.rows.cuts) p.rows.cuts[row] = cut;
  put_selected(shared.select, p.rows, free, row, cut);
  if (!p.mass) return;
  unsigned long long kept = 0;
  for_scores(free.scores, 0, free.length, [&](int i, float x) {
    if (free.selected(i, x, cut)) kept += mass.of(x);
  });
  kept = block_sum<kThreads>(kept, shared.warp_masses);
  if (threadIdx.x == 0) p.mass[row] = whole > 0 ? float(double(kept) / double(whole)) : 0.f;
}
GPU_EXPORT(kvlar_topp)
