// Shared-memory layouts of rows of 32 k values, k not known at compile time: the byte of 16-byte chunk `c` of row `r`,
// such that no access of a warp meets two rows in one bank. Each is a bijection within the row; see layout_check.cu.
#pragma once
#include "device/gpu.cuh"

namespace kvlar::attend_lowrank {

// Rows that lanes read as (row g, 16 bytes at chunk 4 b + c): 16-bit latents and basis rows, 4 k chunks.
struct VectorRows {
  int row_bytes, flip;
  __host__ __device__ constexpr explicit VectorRows(int blocks) : row_bytes(64 * blocks), flip(blocks % 2 ? 0 : 4) {}
  __host__ __device__ constexpr int at(int r, int c) const { return r * row_bytes + ((c ^ (r & 1 ? flip : 0)) << 4); }
};

// Rows that lanes read as (row g, 8 bytes at byte 32 b + 8 c): 8-bit latents and basis rows, 2 k chunks.
struct ByteRows {
  int row_bytes, shift, mask;
  __host__ __device__ constexpr explicit ByteRows(int blocks)
      : row_bytes(32 * blocks), shift(blocks % 4 == 2 ? 1 : 0), mask(blocks % 2 ? 0 : blocks % 4 == 2 ? 1 : 3) {}
  __host__ __device__ constexpr int at(int r, int c) const { return r * row_bytes + ((c ^ (((r >> shift) & mask) << 1)) << 4); }
};

// Rows that ldmatrix reads, one chunk of 8 neighbouring rows: values and exact rows in 16 bits, 4 k chunks.
struct MatrixRows {
  int row_bytes;
  bool odd;
  __host__ __device__ constexpr explicit MatrixRows(int blocks) : row_bytes(64 * blocks), odd(blocks % 2) {}
  __host__ __device__ constexpr int at(int r, int c) const { return r * row_bytes + ((c ^ (odd ? (r >> 1) & 3 : r & 7)) << 4); }
};

// Rows that lanes read as (row 2c + i, 4 bytes at byte 32 b + 4 g): 8-bit value latents, 2 k chunks.
struct ByteColumns {
  int row_bytes, mask;
  __host__ __device__ constexpr explicit ByteColumns(int blocks)
      : row_bytes(32 * blocks), mask(blocks % 4 == 0 ? 3 : blocks % 2 == 0 ? 1 : 0) {}
  // Rows 2c are 64 k bytes apart: 128 bytes hold two of them for odd k, one (twice the stride) otherwise.
  __host__ __device__ constexpr int at(int r, int c) const { return r * row_bytes + ((c ^ (((r >> 1) & mask) << 1)) << 4); }
};

}  // namespace kvlar::attend_lowrank
