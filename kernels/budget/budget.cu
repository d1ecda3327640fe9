// budget: how many rows each layer, or each head of a layer, may keep, decided where the scores are.
//
//   layers, dynamic (DynamicKV, arXiv 2412.14838, §3): counts [sets][seen][heads], how many of the best base * heads * seen scores
//     of the layers seen so far are each one's (select/set.cu) -> budgets [sets][layers]: base * layers shared out in proportion to
//     them by largest remainder, and never more than a layer still holds.
//   layers, pyramid (PyramidKV, arXiv 2406.02069): a line from 2 base - base / beta rows to base / beta, made whole likewise; from
//     P to 2 base - P where there are fewer rows. Uniform: base.
//   heads (AdaKV, arXiv 2407.11550): counts [sets][heads], of the best base * heads scores of a layer ->
//     (1 - alpha) count + floor(alpha * base), halves to even.
//
// On request `ks` [sets][layers][heads]: the same for each row of scores and `forced` more, as topk reads them.
//
// Shares are exact: products have up to 60 bits, since layers * heads * rows of a set are at most 2^30. A CTA takes a set, a thread
// a layer. Floor: none in bytes, 1 KB of counts for 32 layers of 8 heads: all of it is latency, that of the loads and of 8 B a pair
// of layers through shared memory; the scores themselves cost what select/set.cu says, 4 B each three times a round.
#include "abi.h"
#include "device/scan.cuh"

namespace kvlar::budget {

constexpr int kThreads = 1024;

struct Shared {
  uint64_t rests[kThreads];
  int warp_sums[kThreads / 32];
};

// Rows that a set's scores are of.
__device__ inline int rows_of(const KvlarBudget& p, int set) {
  const int rows = int(p.row_count);
  return p.lengths ? max(0, min(rows, int(__ldg(p.lengths + set / int(p.length_sets))))) : rows;
}

// The fractions above / below of the first `count` threads, which sum to `total`, made whole: rounded down, then one more each for
// the largest rests, ties to the lower thread. `below` is the same for all, and not 0.
__device__ inline int round_to_sum(Shared& shared, uint64_t above, uint64_t below, int count, int total) {
  const int own = int(threadIdx.x);
  const bool active = own < count;
  const int whole = active ? int(above / below) : 0;
  const uint64_t rest = above % below;
  shared.rests[own] = rest;
  const int left = total - block_sum<kThreads>(whole, shared.warp_sums);  // a barrier, too
  int rank = 0;
  for (int other = 0; other < count; ++other) {
    const uint64_t x = shared.rests[other];
    rank += x > rest || (x == rest && other < own);
  }
  return whole + (active && rank < left);
}

// After the layers seen so far.
__device__ inline int dynamic(Shared& shared, const KvlarBudget& p, int set, int rows) {
  const int layer = int(threadIdx.x), seen = int(p.seen), most = min(int(p.most), rows);
  int count = 0;
  if (layer < seen)
    for (int h = 0; h < int(p.heads); ++h) count += __ldg(p.counts + (int64_t(set) * seen + layer) * p.heads + h);
  const int sum = block_sum<kThreads>(count, shared.warp_sums), total = min(int(p.base), rows) * int(p.layers);  // more than all rows is all of them
  const int share = sum > 0 ? round_to_sum(shared, uint64_t(count) * uint64_t(total), uint64_t(sum), seen, total) : 0;
  if (layer >= seen) return most;
  return min(share, layer < int(p.known) ? p.budgets[int64_t(set) * p.layers + layer] : most);
}

// Of the points of a line that averages `base`, times beta * (layers - 1) to be whole numbers.
__device__ inline int pyramid(Shared& shared, const KvlarBudget& p, int rows) {
  const uint64_t base = p.base, steps = p.layers - 1, layer = min(uint64_t(threadIdx.x), steps);
  const uint64_t max_beta = min((2 * p.beta - 1) * base, uint64_t(rows) * p.beta), min_beta = 2 * base * p.beta - max_beta;
  return round_to_sum(shared, max_beta * (steps - layer) + min_beta * layer, p.beta * steps, int(p.layers), int(base * p.layers));
}

}  // namespace kvlar::budget

extern "C" __global__ void __launch_bounds__(1024, 1) kvlar_budget_layers(const __grid_constant__ KvlarBudget p) {
  using namespace kvlar::budget;
  __shared__ Shared shared;
  const int set = int(blockIdx.x), layer = int(threadIdx.x), rows = rows_of(p, set);
  int budget = min(int(p.base), rows);
  if (p.method == KVLAR_BUDGET_DYNAMIC) budget = dynamic(shared, p, set, rows);
  else if (p.method == KVLAR_BUDGET_PYRAMID && int(p.base) < rows && p.layers > 1) budget = pyramid(shared, p, rows);
  if (layer >= int(p.layers)) return;  // no barrier follows
  const int64_t at = int64_t(set) * p.layers + layer;
  p.budgets[at] = budget;
  if (p.ks)
    for (int h = 0; h < int(p.heads); ++h) p.ks[at * p.heads + h] = budget + int(p.forced);
}
GPU_EXPORT(kvlar_budget_layers)

// A thread a head.
extern "C" __global__ void __launch_bounds__(256) kvlar_budget_heads(const __grid_constant__ KvlarBudget p) {
  const int head = int(blockIdx.x * 256 + threadIdx.x);
  if (head >= int(p.sets * p.heads)) return;
  const double count = double(__ldg(p.counts + head)), floor = double(p.head_floor);
  // Rounded after each step, as the reference is: halves would not be found otherwise.
  const double budget = rint(__dadd_rn(__dmul_rn(count, p.head_share), floor));
  const int rows = kvlar::budget::rows_of(p, head / int(p.heads)), kept = int(budget < double(rows) ? budget : double(rows));
  p.budgets[head] = kept;
  if (p.ks) p.ks[head] = kept + int(p.forced);
}
GPU_EXPORT(kvlar_budget_heads)
