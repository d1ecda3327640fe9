// Rebuilding keys in registers: accumulators of 32 rows x 32 dims (16 rotary pairs), k = basis z (+ mean).
//
// int8 latents become 1024 + code in fp16 by byte permutation; scale and zero act on the accumulators:
// k = s acc + (zero - 1024 s) sum_r basis. With an int8 basis the products are exact in s32, biased to read as floats
// (|acc| < 2^22 for up to 128 latents). The order of a contraction is free: a lane's four neighbouring codes are one
// k-step's four elements, and fp16 bases of int8 latents lie in shared memory in that order (see basis_word).
#pragma once
#include "attend_lowrank/layout.cuh"
#include "attend_lowrank/turns.cuh"

namespace kvlar::attend_lowrank {

// acc[16-row block][u][lower or upper][row g: dims 2c, 2c + 1; row g + 8: likewise]
using Rebuilt = float[2][2][2][4];

// Latents in 16 bits. A block is 32 latents; `a` is a block's A fragments for 16 rows, a k-step after the other; `b` a
// block's B fragments for the n-tiles u = 0, 1, a k-step after the other.
template <class T> struct DenseLatents {
  static constexpr int kSteps = 2, kHeld = 2;  // k-steps a block; blocks whose A fragments a lane keeps: 32 registers
  __host__ __device__ static constexpr int chunks(int rank) { return wide_chunks(rank); }
  __host__ __device__ static constexpr int basis_chunks(int rank) { return wide_chunks(rank); }

  __device__ __forceinline__ static void load(uint32_t (&a)[kSteps][4], ptx::smem tile, const SwizzledRows& rows, int row, int block) {
    const int lane = int(threadIdx.x) & 31;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) ptx::ldmatrix_x4(a[k], tile + uint32_t(rows.at(row + (lane & 15), 4 * block + 2 * k + (lane >> 4))));
  }
  __device__ __forceinline__ static void load_basis(uint32_t (&b)[2][kSteps][2], ptx::smem basis, const SwizzledRows& rows, int row, int block) {
    const int lane = int(threadIdx.x) & 31;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      uint32_t w[4];
      ptx::ldmatrix_x4(w, basis + uint32_t(rows.at(row + 8 * u + (lane & 7), 4 * block + (lane >> 3))));
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        b[u][k][0] = w[2 * k];
        b[u][k][1] = w[2 * k + 1];
      }
    }
  }
  // Which word of a row's 16 values (8 words) is stored as word i.
  __device__ static int basis_word(int i) { return i; }
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { Half16<T>::mma(d, a, b); }
};

struct ByteLatents : DenseLatents<__half> {  // the basis is fp16
  static constexpr uint32_t kMagic = 0x64646464u;
  __host__ __device__ static constexpr int chunks(int rank) { return narrow_chunks(rank); }

  __device__ __forceinline__ static void load(uint32_t (&a)[kSteps][4], ptx::smem tile, const SwizzledRows& rows, int row, int block) {
    const int lane = int(threadIdx.x) & 31;
    uint32_t w[4];  // four codes each: rows g and g + 8 of the first 16 latents, then of the others
    ptx::ldmatrix_x4(w, tile + uint32_t(rows.at(row + (lane & 15), 2 * block + (lane >> 4))));
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] = __byte_perm(w[2 * k + (i & 1)], kMagic, i < 2 ? 0x4140 : 0x4342);
  }
  // b0 of lane c is then the basis at latents 4c, 4c + 1, b1 at 4c + 2, 4c + 3.
  __device__ static int basis_word(int i) { return i < 4 ? 2 * i : 2 * (i - 4) + 1; }
};

struct ByteBasis {  // int8 latents, int8 basis
  static constexpr int kSteps = 1, kHeld = 4;
  static constexpr int kBias = 0x4b400000;  // as a float: 1.5 * 2^23
  static constexpr float kBiasValue = 12582912.f;
  __host__ __device__ static constexpr int chunks(int rank) { return narrow_chunks(rank); }
  __host__ __device__ static constexpr int basis_chunks(int rank) { return narrow_chunks(rank); }

  __device__ __forceinline__ static void load(uint32_t (&a)[kSteps][4], ptx::smem tile, const SwizzledRows& rows, int row, int block) {
    const int lane = int(threadIdx.x) & 31;
    ptx::ldmatrix_x4(a[0], tile + uint32_t(rows.at(row + (lane & 15), 2 * block + (lane >> 4))));
  }
  __device__ __forceinline__ static void load_basis(uint32_t (&b)[2][kSteps][2], ptx::smem basis, const SwizzledRows& rows, int row, int block) {
    const int lane = int(threadIdx.x) & 31;
    uint32_t w[4];
    ptx::ldmatrix_x4(w, basis + uint32_t(rows.at(row + ((lane >> 4) << 3) + (lane & 7), 2 * block + ((lane >> 3) & 1))));
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      b[u][0][0] = w[2 * u];
      b[u][0][1] = w[2 * u + 1];
    }
  }
  __device__ static int basis_word(int i) { return i; }
  __device__ __forceinline__ static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    int i[4] = {__float_as_int(d[0]), __float_as_int(d[1]), __float_as_int(d[2]), __float_as_int(d[3])};
    ptx::mma_m16n8k32_u8s8(i, a, b[0], b[1]);
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] = __int_as_float(i[e]);
  }
};

// How the latents of KVLAR_LATENT_* are multiplied.
template <class T, int kLatent> struct LatentsOf { using type = DenseLatents<T>; };
template <class T> struct LatentsOf<T, KVLAR_LATENT_INT8> { using type = ByteLatents; };
template <class T> struct LatentsOf<T, KVLAR_LATENT_INT8_BASIS> { using type = ByteBasis; };

}  // namespace kvlar::attend_lowrank
