// Building the work list (work_list.cuh) from the lengths.
//
// One CTA: each thread counts the cells of its units, the counts are scanned, each CTA's first unit is found by bisection, and
// its record copied. Traffic: units x (lengths + a record) + CTAs x a record, tens of KB; the kernel is latency (some ten
// dependent loads, most of them of what it wrote itself) and runs once a step, for all layers.
#pragma once
#include "attend/work_list.cuh"
#include "device/scan.cuh"

namespace kvlar::attend {
constexpr int kScheduleThreads = 1024;

// All cells, divided evenly: CTA c takes cells [first_cell(c), first_cell(c + 1)).
struct Division {
  int cells, ctas;

  __device__ int first_cell(int cta) const { return int(int64_t(cta) * cells / ctas); }
  __device__ int cta_of_cell(int cell) const { return int((int64_t(cell + 1) * ctas - 1) / cells); }

  // A CTA holds at most two partial results: of the unit it starts in the middle of, and of its last.
  __device__ void fill(Splits& unit) const {
    const int first = cta_of_cell(unit.first_cell);
    unit.slot = 2 * first + (first_cell(first) < unit.first_cell ? 1 : 0);
    unit.count = cta_of_cell(unit.end_cell - 1) - first + 1;
  }
};

// `fill(i, unit)` fills in unit i, all of it, and gives the number of its tiles.
template <class Unit, class Fill> __device__ void build_work_list(const KvlarAttend& p, Fill fill) {
  __shared__ int warp_sums[32];
  __shared__ int carry;
  const WorkList<Unit> list(p);
  const int t = int(threadIdx.x), lane = t % 32, units = int(p.units);
  if (t == 0) carry = 0;
  __syncthreads();
  for (int base = 0; base < units; base += kScheduleThreads) {
    const int i = base + t, cells = i < units ? list.cells_of(fill(i, list.unit(i)->unit)) : 0;
    const int start = carry + block_exclusive_sum<kScheduleThreads>(cells, warp_sums);
    if (i < units) {
      list.unit(i)->splits.first_cell = start;
      list.unit(i)->splits.end_cell = start + cells;
    }
    __syncthreads();
    if (t == kScheduleThreads - 1) carry = start + cells;
    __syncthreads();  // of the records, too, for the reads below
  }
  const Division all{carry, min(int(p.ctas), carry)};
  for (int i = t; i < units; i += kScheduleThreads) {
    Splits& splits = list.unit(i)->splits;
    if (p.own_cell_tiles) {
      splits.slot = splits.first_cell;
      splits.count = splits.end_cell - splits.first_cell;
    } else {
      all.fill(splits);
    }
  }
  for (int c = t; c < int(p.ctas); c += kScheduleThreads) {
    CtaRecord<Unit>& record = *list.cta(c);
    const bool busy = c < all.ctas;
    record.cell = busy ? all.first_cell(c) : 0;
    record.cell_end = busy ? all.first_cell(c + 1) : 0;
    record.reserved = 0;
    int low = 0, high = units - 1;  // the last unit that starts at or before the CTA's first cell
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (list.unit(middle)->splits.first_cell <= record.cell) low = middle; else high = middle - 1;
    }
    record.index = low;
  }
  __syncthreads();
  for (int c = t / 32; c < int(p.ctas); c += kScheduleThreads / 32) {  // of one without work, too: it reads before it knows
    CtaRecord<Unit>& record = *list.cta(c);
    const int32_t* from = reinterpret_cast<const int32_t*>(list.unit(record.index));
    int32_t* to = reinterpret_cast<int32_t*>(&record.of);
    for (int i = lane; i < WorkList<Unit>::kUnitWords; i += 32) to[i] = from[i];
  }
}

}  // namespace kvlar::attend
