// The work list: which CTA takes which tiles. Built on the device from the lengths, once a step, and
// shared by all layers whose lengths agree.
//
// Tiles are grouped into cells that are never split: one tile each (`balanced`: every CTA gets the same
// number of tiles, and may span several units), or a fixed number of tiles counted from the unit's start
// (`own`: how a unit is cut depends on its own rows alone, so its result does not depend on its batch).
// A unit without tiles keeps one empty cell, so that its output is written.
//
// Memory, in int32: [0] cells, [1] CTAs with work, [2..8) zero, then cell_start[units + 1], then four a
// CTA: first cell, one past its last cell, unit of the first cell, 0.
#pragma once
#include "attend/unit.cuh"

namespace kvlar::attend {

constexpr int kHeader = 8;

__device__ inline int32_t* cell_starts(const KvlarAttend& p) { return p.work + kHeader; }
__device__ inline int32_t* cta_records(const KvlarAttend& p) { return p.work + kHeader + p.units + 1; }

__device__ inline int cells_of(const KvlarAttend& p, int tiles) {
  int height = p.own_cell_tiles ? int(p.own_cell_tiles) : 1;
  return max(1, (tiles + height - 1) / height);
}

// CTA c takes cells [first_cell(c), first_cell(c + 1)).
__device__ inline int first_cell(int cells, int ctas, int c) { return int(int64_t(c) * cells / ctas); }
// The CTA that takes `cell`.
__device__ inline int cta_of_cell(int cells, int ctas, int cell) { return int((int64_t(cell + 1) * ctas - 1) / cells); }

// One CTA's share of one unit.
struct Share {
  int tile, tile_end;   // counted from the unit's first tile; the end may lie beyond its last
  int split, splits;    // which of the unit's partial results this is
  int slot, next_slot;  // where split 0 and split 1 are stored; later ones follow at `slot_step`
  int slot_step;
};

// Where a CTA is in its cells. In shared memory, since registers are scarce in loops over rows.
struct Progress {
  int unit;                            // at hand
  Share share;                         // of it
  int next_unit, next_cell, cell_end;  // what follows, unless the next cell is the end
};

// Of the unit that has `cell`, the CTA's next. One thread does it.
__device__ inline Progress progress_at(const KvlarAttend& p, int cell, int unit) {
  const int cta = int(blockIdx.x), cells = __ldg(p.work), ctas = __ldg(p.work + 1);
  const int unit_start = __ldg(cell_starts(p) + unit), unit_end = __ldg(cell_starts(p) + unit + 1);
  Progress at;
  at.unit = unit;
  at.cell_end = __ldg(cta_records(p) + 4 * cta + 1);
  at.next_cell = p.own_cell_tiles ? cell + 1 : min(at.cell_end, unit_end);
  at.next_unit = unit + (at.next_cell >= unit_end);
  Share& s = at.share;
  if (p.own_cell_tiles) {
    s.split = cell - unit_start;
    s.splits = unit_end - unit_start;
    s.tile = s.split * int(p.own_cell_tiles);
    s.tile_end = s.tile + int(p.own_cell_tiles);
    s.slot = unit_start;
    s.next_slot = unit_start + 1;
    s.slot_step = 1;
  } else {
    const int first = cta_of_cell(cells, ctas, unit_start);
    s.split = cta - first;
    s.splits = cta_of_cell(cells, ctas, unit_end - 1) - first + 1;
    s.tile = cell - unit_start;
    s.tile_end = at.next_cell - unit_start;
    // A CTA holds at most two partial results: of the unit it starts in the middle of, and of its last.
    s.slot = 2 * first + (first_cell(cells, ctas, first) < unit_start ? 1 : 0);
    s.next_slot = 2 * (first + 1);
    s.slot_step = 2;
  }
  return at;
}
__device__ inline int slot_of_split(const Share& s, int split) {
  return split == 0 ? s.slot : s.next_slot + (split - 1) * s.slot_step;
}

}  // namespace kvlar::attend
