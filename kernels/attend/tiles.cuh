// Tile shapes of decode attention over rows that are stored as they are, for a template head dimension D.
//
// A warp takes `kRows` cached rows at a time through a private ring of p.stages tiles (3; 2 where an SM has 100 KB of
// shared memory: the launcher chooses), so that all but one of a warp are always in flight, 8 KB each: 128 KB an SM on
// Hopper (two CTAs), 64 KB on sm_80 (one), 32 KB where an SM has 100 KB in all. Little's law asks for about 25 KB at
// 4.3 TB/s and 0.75 us; research systems settle at 48 to 96 KB.
#pragma once
#include "device/gpu.cuh"

namespace kvlar::attend {

constexpr __host__ __device__ int warps_of(int dim) { return dim == 256 ? 2 : 4; }

template <int D> struct Tiling {
  static_assert(D == 64 || D == 128 || D == 256, "template head dimensions");
  static constexpr int kWarps = warps_of(D), kThreads = 32 * kWarps;
  static constexpr int kRows = D == 64 ? 32 : 16;
  // A stage: keys, values, positions.
  static constexpr int kValues = kRows * D * 2;
  static constexpr int kPositions = 2 * kValues;
  static constexpr int kStageBytes = kPositions + 4 * kRows;
  static constexpr int kLeastShared = kWarps * 2 * kStageBytes;
  static_assert(kStageBytes % 16 == 0, "cp.async needs 16-byte alignment");
};

// The byte of 16-byte chunk `c` of row `r` in shared memory, chosen so that no access pattern of a warp meets two rows in
// one bank: ldmatrix reads one chunk of 8 consecutive rows. A bijection; layout_check.cu enumerates both claims.
template <int D> struct DenseLayout {
  static constexpr int kRowBytes = 2 * D;
  static constexpr __host__ __device__ int at(int r, int c) { return r * kRowBytes + ((c ^ (r & 7)) << 4); }
};

}  // namespace kvlar::attend
