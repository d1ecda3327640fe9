// Building the work list (work_list.cuh) from the lengths.
//
// One CTA: each thread counts the cells of its units, the counts are scanned, and each CTA's first unit
// is found by bisection. Traffic: units x (lengths + 4 B), a few KB; the kernel is latency (about three
// dependent loads) and runs once a step, for all layers.
#pragma once
#include "attend/work_list.cuh"
#include "device/scan.cuh"

namespace kvlar::attend {
constexpr int kScheduleThreads = 1024;

// `tiles_of_unit(i)` is how many tiles unit i has.
template <class F> __device__ void build_work_list(const KvlarAttend& p, F tiles_of_unit) {
  __shared__ int warp_sums[32];
  __shared__ int carry;
  const int t = int(threadIdx.x), units = int(p.units);
  int32_t* const starts = cell_starts(p);
  if (t == 0) carry = 0;
  __syncthreads();
  for (int base = 0; base < units; base += kScheduleThreads) {
    const int cells = base + t < units ? cells_of(p, tiles_of_unit(base + t)) : 0;
    const int before = block_exclusive_sum<kScheduleThreads>(cells, warp_sums);
    const int start = carry + before;
    if (base + t < units) starts[base + t] = start;
    __syncthreads();
    if (t == kScheduleThreads - 1) carry = start + cells;
    __syncthreads();
  }
  const int cells = carry, ctas = min(int(p.ctas), cells);
  if (t == 0) {
    starts[units] = cells;
    p.work[0] = cells;
    p.work[1] = ctas;
  }
  if (t >= 2 && t < kHeader) p.work[t] = 0;
  __syncthreads();  // orders the writes to `starts` before the reads below, within this CTA
  int32_t* const records = cta_records(p);
  for (int c = t; c < int(p.ctas); c += kScheduleThreads) {
    const int from = c < ctas ? first_cell(cells, ctas, c) : 0, to = c < ctas ? first_cell(cells, ctas, c + 1) : 0;
    int low = 0, high = units - 1;  // the last unit that starts at or before `from`
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (starts[middle] <= from) low = middle; else high = middle - 1;
    }
    records[4 * c] = from;
    records[4 * c + 1] = to;
    records[4 * c + 2] = low;
    records[4 * c + 3] = 0;
  }
}

}  // namespace kvlar::attend
