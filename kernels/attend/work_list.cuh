// The work list: which CTA takes which tiles, and what it has to know of them. Built on the device from the lengths, once a
// step, and shared by all layers whose lengths (and positions) agree.
//
// Tiles are grouped into cells that are never split: one tile each (`balanced`: every CTA gets the same
// number of tiles, and may span several units), or a fixed number of tiles counted from the unit's start
// (`own`: how a unit is cut depends on its own rows alone, so its result does not depend on its batch).
// A unit without tiles keeps one empty cell, so that its output is written.
//
// Memory: a CtaRecord a CTA, then a UnitRecord a unit. A CTA's holds a copy of its first unit's: before its rows it waits for
// one load, instead of a chain of them (cell, unit, lengths, pages, positions).
#pragma once
#include "attend/unit.cuh"

namespace kvlar::attend {

// How a unit is divided.
struct Splits {
  int first_cell, end_cell;
  int slot;   // where its first partial result is stored
  int count;  // partial results
};

template <class Unit> struct UnitRecord {
  Splits splits;
  Unit unit;
};

// Where a CTA is: in the list at its first unit, in shared memory from then on.
template <class Unit> struct CtaRecord {
  int cell, cell_end;  // its next cell, and where its share ends: not beyond it, if it has none
  int index;           // of the unit that has the cell
  int reserved;
  UnitRecord<Unit> of;
};

// The CTA's share of the unit at hand.
struct Share {
  int tile, tile_end;  // counted from the unit's first tile; the end may lie beyond its last
  int split, splits;   // which of the unit's partial results this is
  int slot;            // of the first of them
};

template <class Unit> struct WorkList {
  static constexpr int kCtaWords = sizeof(CtaRecord<Unit>) / 4, kUnitWords = sizeof(UnitRecord<Unit>) / 4;  // read by the word

  const KvlarAttend& p;

  __device__ explicit WorkList(const KvlarAttend& params) : p(params) {}
  __device__ CtaRecord<Unit>* cta(int i) const { return reinterpret_cast<CtaRecord<Unit>*>(p.work) + i; }
  __device__ UnitRecord<Unit>* unit(int i) const { return reinterpret_cast<UnitRecord<Unit>*>(cta(int(p.ctas))) + i; }

  __device__ int cells_of(int tiles) const {
    const int height = p.own_cell_tiles ? int(p.own_cell_tiles) : 1;
    return max(1, (tiles + height - 1) / height);
  }

  __device__ Share share(const CtaRecord<Unit>& at) const {
    const Splits& unit = at.of.splits;
    const int cell = at.cell - unit.first_cell, height = int(p.own_cell_tiles);
    Share s;
    s.splits = unit.count;
    s.slot = unit.slot;
    s.split = height ? cell : int(blockIdx.x) - (unit.slot >> 1);
    s.tile = height ? cell * height : cell;
    s.tile_end = height ? s.tile + height : next_cell(at) - unit.first_cell;
    return s;
  }
  __device__ int slot_of_split(const Share& s, int split) const {
    if (p.own_cell_tiles) return s.slot + split;
    return split == 0 ? s.slot : (s.slot & ~1) + 2 * split;
  }

  __device__ int next_cell(const CtaRecord<Unit>& at) const { return p.own_cell_tiles ? at.cell + 1 : min(at.cell_end, at.of.splits.end_cell); }
};

// What a CTA begins with, into shared memory, as of the next barrier. All threads do it.
template <class Unit> __device__ inline void begin_work(const KvlarAttend& p, CtaRecord<Unit>& at, int t) {
  const int32_t* const from = reinterpret_cast<const int32_t*>(WorkList<Unit>(p).cta(int(blockIdx.x)));
  for (int i = t; i < WorkList<Unit>::kCtaWords; i += int(blockDim.x)) reinterpret_cast<int32_t*>(&at)[i] = __ldg(from + i);
}

// What follows, likewise, with a barrier first: the unit at hand is done with. False if nothing follows.
template <class Unit> __device__ inline bool next_work(const KvlarAttend& p, CtaRecord<Unit>& at, int t) {
  const WorkList<Unit> list(p);
  const int cell = list.next_cell(at), index = at.index + (cell >= at.of.splits.end_cell);
  const bool more = cell < at.cell_end;
  __syncthreads();
  if (!more) return false;
  if (t == 0) {
    at.cell = cell;
    at.index = index;
  }
  const int32_t* const from = reinterpret_cast<const int32_t*>(list.unit(index));
  for (int i = t; i < WorkList<Unit>::kUnitWords; i += int(blockDim.x)) reinterpret_cast<int32_t*>(&at.of)[i] = __ldg(from + i);
  return true;
}

}  // namespace kvlar::attend
