// compact: the rows that are kept of every (sequence, owner), moved together in place, all layers and heads in one launch.
//
//   lengths [seqs][owners], which rows are kept (KvlarKeep) -> keys, values, their scales and zeros, positions and scores of
//   the kept rows in the first rows, new lengths, and on request the row that each came from.
//   kvlar_compact: in their order. kvlar_compact_any: each hole among the first n takes the last kept row behind it
//   (Fast KVzip, arXiv 2601.17668, keeps order; attention does not need it).
//
// A CTA takes an owner, 4096 rows at a time: judges them, lists those that are kept, and moves as many as fill 8 16-byte
// vectors of each thread. In order, a row never moves up: what a batch overwrites are its own rows and those before, so that
// one barrier between its reads and its writes is enough. In any order what is read lies behind all that is written.
//
// Traffic: a byte (or a position and a byte, or 4 bytes of score) a row, twice in any order; each row that moves read and
// written once; rows before the first hole are not touched. Floor, half of 128K rows of 32 x 8 heads, d = 128 bf16: 17.2 GB
// read and written, 4.0 ms at 4.3 TB/s; to 2048 of them 0.54 GB, 0.12 ms, and 34 MB of marks.
#include "compact/move.cuh"

namespace kvlar::compact {

// Rows n that are left.
__device__ inline int keep_order(const KvlarCompact& p, const Owner& o, Shared& shared) {
  const Mover mover{p, shared};
  int left = 0;
  for (int first = 0; first < o.length; first += kTile) {
    const int end = min(first + kTile, o.length);
    const int count = list_rows(shared.sources, shared, p, o, first, end, true);
    const bool holes = left < first || count < end - first;
    if (holes && count) {
      mover.load_pages(shared.source_pages, o, first, end - 1);
      mover.load_pages(shared.target_pages, o, left, left + count - 1);
    }
    __syncthreads();
    if (p.source)
      for (int i = int(threadIdx.x); i < count; i += kThreads) shared.bases.source[left + i] = first + shared.sources[i];
    if (holes)
      for (int i = 0; i < count; i += shared.bases.batch) mover.move(Moves<false>{shared, first, 0, left, 0}, i, min(shared.bases.batch, count - i));
    left += count;
  }
  return left;
}

// How many rows are kept, to all threads.
__device__ inline int count_kept(const KvlarCompact& p, const Owner& o, Shared& shared) {
  int own = 0;
  for (int first = 0; first < o.length; first += kTile)
    own += __popc(judge_tile(p, o, shared, first, min(first + kTile, o.length), true));
  return block_sum<kThreads>(own, shared.warp_sums);
}

__device__ inline int any_order(const KvlarCompact& p, const Owner& o, Shared& shared) {
  const Mover mover{p, shared};
  const int left = count_kept(p, o, shared);
  if (p.source) {
    for (int i = int(threadIdx.x); i < left; i += kThreads) shared.bases.source[i] = i;
    __syncthreads();
  }
  // Holes ascend, what fills them descends; of each there is a tile's list, and where in it the next one is. Behind the rows
  // left are as many that are kept as there are holes among them: no others are reached.
  int hole_first = -kTile, hole = 0, holes = 0;
  int filler_first = (o.length + kTile - 1) / kTile * kTile, filler = 0, fillers = 0;
  while (true) {
    while (hole == holes && (hole_first += kTile) < left) {
      const int end = min(hole_first + kTile, left);
      holes = list_rows(shared.targets, shared, p, o, hole_first, end, false);
      hole = 0;
      mover.load_pages(shared.target_pages, o, hole_first, end - 1);
      __syncthreads();
    }
    if (hole == holes) break;
    while (filler == fillers && filler_first > left) {
      filler_first -= kTile;
      const int end = min(filler_first + kTile, o.length);
      fillers = list_rows(shared.sources, shared, p, o, filler_first, end, true);
      filler = 0;
      mover.load_pages(shared.source_pages, o, filler_first, end - 1);
      __syncthreads();
    }
    const int count = min(holes - hole, fillers - filler);
    if (count == 0) break;  // as many as there are holes, unless marks changed meanwhile
    const Moves<true> moves{shared, filler_first, fillers - 1 - filler, hole_first, hole};
    if (p.source)
      for (int i = int(threadIdx.x); i < count; i += kThreads) shared.bases.source[moves.target(i)] = moves.source(i);
    for (int i = 0; i < count; i += shared.bases.batch) mover.move(moves, i, min(shared.bases.batch, count - i));
    hole += count;
    filler += count;
  }
  return left;
}

template <bool kAny> __device__ inline void compact(const KvlarCompact& p) {
  __shared__ Shared shared;
  if (threadIdx.x % 32 == 0 && threadIdx.x < 64) {
    Owner owner;
    owner.set(p);
    if (threadIdx.x == 0) {
      shared.owner = owner;
      shared.judge.set(p, owner);
    } else {
      shared.bases.set(p, owner);
    }
  }
  __syncthreads();
  const int left = kAny ? any_order(p, shared.owner, shared) : keep_order(p, shared.owner, shared);
  if (threadIdx.x == 0) *shared.owner.length_of(p) = left;
}

}  // namespace kvlar::compact

extern "C" __global__ void __launch_bounds__(256, 3) kvlar_compact(const __grid_constant__ KvlarCompact p) {
  kvlar::compact::compact<false>(p);
}
GPU_EXPORT(kvlar_compact)

extern "C" __global__ void __launch_bounds__(256, 3) kvlar_compact_any(const __grid_constant__ KvlarCompact p) {
  kvlar::compact::compact<true>(p);
}
GPU_EXPORT(kvlar_compact_any)
