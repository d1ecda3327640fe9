// Tile shapes of decode attention, for a template head dimension D and a storage format.
//
// A warp takes `rows` cached rows at a time through a private ring of p.stages tiles (3; 2 where an SM has 100 KB of
// shared memory: the launcher chooses), so that all but one of a warp are always in flight, 8 KB each: 128 KB an SM on
// Hopper (two CTAs), 64 KB on sm_80 (one), 32 KB where an SM has 100 KB in all. Little's law asks for about 25 KB at
// 4.3 TB/s and 0.75 us; research systems settle at 48 to 96 KB.
#pragma once
#include "device/gpu.cuh"

namespace kvlar::attend {

template <int D, bool kInt8> struct Tiling {
  static_assert(D == 64 || D == 128 || D == 256, "template head dimensions");
  static constexpr int kWarps = D == 256 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kDenseRows = D == 64 ? 32 : 16;
  static constexpr int kInt8Rows = D == 64 ? 64 : 32;
  static constexpr int kMaxRows = kInt8 ? kInt8Rows : kDenseRows;
  static constexpr int kDenseTile = kDenseRows * D * 2;
  static constexpr int kInt8Tile = kInt8Rows * D;
  static constexpr int kTileBytes = kInt8 && kInt8Tile > kDenseTile ? kInt8Tile : kDenseTile;
  // A stage: keys, values, (scale, zero) of each key row and of each value row, positions.
  static constexpr int kValues = kTileBytes;
  static constexpr int kKeyParams = 2 * kTileBytes;
  static constexpr int kValueParams = kKeyParams + (kInt8 ? 4 * kInt8Rows : 0);
  static constexpr int kPositions = kValueParams + (kInt8 ? 4 * kInt8Rows : 0);
  static constexpr int kStageBytes = kPositions + 4 * kMaxRows;
  static constexpr int kLeastShared = kWarps * 2 * kStageBytes;
  static_assert(kStageBytes % 16 == 0, "cp.async needs 16-byte alignment");
};

// ---- shared-memory layouts: the byte of 16-byte chunk `c` of row `r`, chosen so that no access pattern
// of a warp meets two rows in one bank. Each is a bijection; the conformance tests enumerate both claims.

// Dense rows: ldmatrix reads one chunk of 8 consecutive rows.
template <int D> struct DenseLayout {
  static constexpr int kRowBytes = 2 * D;
  static constexpr __host__ __device__ int at(int r, int c) { return r * kRowBytes + ((c ^ (r & 7)) << 4); }
};

// int8 keys: lane (g, c) reads 16 or 8 bytes of chunk 4h + c of row g (16 lanes or 8 lanes a phase).
template <int D> struct Int8KeyLayout {
  static constexpr int kRowBytes = D;
  static constexpr __host__ __device__ int at(int r, int c) {
    return D == 64 ? r * 64 + (c << 4) : r * D + ((c ^ ((r & 1) << 2)) << 4);
  }
};

// int8 values: lane (g, c) reads chunk g (half a chunk for D = 64) of rows 2c, 2c + 1, 2c + 8, 2c + 9.
template <int D> struct Int8ValueLayout {
  static constexpr int kRowBytes = D;
  static constexpr __host__ __device__ int at(int r, int c) {
    if (D == 64) return (r ^ ((r >> 2) & 1)) * 64 + ((c ^ (r & 2)) << 4);
    return r * D + ((c ^ (((r >> 1) & 3) << 1)) << 4);
  }
};

}  // namespace kvlar::attend
