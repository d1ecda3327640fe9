// The shared-memory layout of all rows here: 16-byte chunk `c` of row `r`, for a number of chunks a row that is not known
// at compile time, such that 8 neighbouring rows have a chunk each in all banks (what ldmatrix reads). A bijection within
// the row; layout_check.cu proves both claims for every width in use.
#pragma once
#include "device/gpu.cuh"

namespace kvlar::attend_lowrank {

struct SwizzledRows {
  int row_bytes, shift, mask;
  // Rows are n chunks apart: of 8 rows, gcd(n, 8) meet in one bank group, and the exclusive or parts those.
  __host__ __device__ constexpr explicit SwizzledRows(int chunks)
      : row_bytes(16 * chunks), shift(chunks % 8 == 0 ? 0 : chunks % 4 == 0 ? 1 : 2),
        mask(chunks % 8 == 0 ? 7 : chunks % 4 == 0 ? 3 : chunks % 2 == 0 ? 1 : 0) {}
  __host__ __device__ constexpr int at(int r, int c) const { return r * row_bytes + ((c ^ ((r >> shift) & mask)) << 4); }
};

// Chunks of a row of `values` values, whole blocks of 32 of them.
__host__ __device__ constexpr int wide_chunks(int values) { return (values + 31) / 32 * 4; }   // 16 bits each
__host__ __device__ constexpr int narrow_chunks(int values) { return (values + 31) / 32 * 2; }  // 8 bits each

}  // namespace kvlar::attend_lowrank
