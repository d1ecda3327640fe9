// Rebuilding keys in registers: accumulators of 32 rows x 32 dims (16 rotary pairs), k = basis z (+ mean).
//
// The order of a contraction is free: lane c takes latents 8c .. 8c + 7 of each block of 32, so that one vector load gives
// two k-steps of a fragment, of latents (A, rows) and basis (B, dims) alike. int8 latents become 1024 + code in fp16 by
// byte permutation; scale and zero act on the accumulators: k = s acc + (zero - 1024 s) sum_r basis. With an int8 basis
// the products are exact in s32, biased to read as floats (|acc| < 2^22, for up to 128 latents at a time).
#pragma once
#include "attend_lowrank/layout.cuh"
#include "attend_lowrank/turns.cuh"

namespace kvlar::attend_lowrank {

// acc[16-row block][u][lower or upper][row g: dims 2c, 2c + 1; row g + 8: likewise]
using Rebuilt = float[2][2][2][4];

template <class T> struct DenseLatents {
  static constexpr int kWords = 8;  // of a block of 32 latents and 16 rows
  static constexpr int kHeld = 2;   // blocks that a lane holds at a time: 32 registers
  using Layout = VectorRows;
  using Fragments = uint32_t[kHeld][2][kWords];
  using Basis = uint4;

  __device__ static void load(uint32_t (&a)[kWords], const unsigned char* tile, Layout layout, int row, int block, const Lane& at) {
    const uint4 low = *reinterpret_cast<const uint4*>(tile + layout.at(row + at.g, 4 * block + at.c));
    const uint4 high = *reinterpret_cast<const uint4*>(tile + layout.at(row + at.g + 8, 4 * block + at.c));
    a[0] = low.x; a[1] = high.x; a[2] = low.y; a[3] = high.y;
    a[4] = low.z; a[5] = high.z; a[6] = low.w; a[7] = high.w;
  }
  __device__ static Basis basis(const unsigned char* rows, Layout layout, int row, int block, const Lane& at) {
    return *reinterpret_cast<const uint4*>(rows + layout.at(row, 4 * block + at.c));
  }
  __device__ static Basis basis_global(const unsigned char* row, int block, const Lane& at) {
    return __ldg(reinterpret_cast<const uint4*>(row + 64 * block + 16 * at.c));
  }
  __device__ static Basis none() { return make_uint4(0u, 0u, 0u, 0u); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[kWords], const Basis& b) {
    const uint32_t a0[4] = {a[0], a[1], a[2], a[3]}, a1[4] = {a[4], a[5], a[6], a[7]};
    const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
    Half16<T>::mma(d, a0, b0);
    Half16<T>::mma(d, a1, b1);
  }
};

struct ByteLatents : DenseLatents<__half> {  // the basis is fp16
  using Layout = ByteRows;
  static constexpr uint32_t kMagic = 0x64646464u;

  __device__ static void load(uint32_t (&a)[kWords], const unsigned char* tile, Layout layout, int row, int block, const Lane& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + at.g + 8 * h;
      const uint2 x = *reinterpret_cast<const uint2*>(tile + layout.at(r, 2 * block + (at.c >> 1)) + ((at.c & 1) << 3));
      a[h] = __byte_perm(x.x, kMagic, 0x4140);
      a[2 + h] = __byte_perm(x.x, kMagic, 0x4342);
      a[4 + h] = __byte_perm(x.y, kMagic, 0x4140);
      a[6 + h] = __byte_perm(x.y, kMagic, 0x4342);
    }
  }
};

struct ByteBasis {  // int8 latents, int8 basis
  static constexpr int kWords = 4, kHeld = 4;
  using Layout = ByteRows;
  using Fragments = uint32_t[kHeld][2][kWords];
  using Basis = uint2;
  static constexpr int kBias = 0x4b400000;  // as a float: 1.5 * 2^23
  static constexpr float kBiasValue = 12582912.f;

  __device__ static void load(uint32_t (&a)[kWords], const unsigned char* tile, Layout layout, int row, int block, const Lane& at) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + at.g + 8 * h;
      const uint2 x = *reinterpret_cast<const uint2*>(tile + layout.at(r, 2 * block + (at.c >> 1)) + ((at.c & 1) << 3));
      a[h] = x.x;
      a[2 + h] = x.y;
    }
  }
  __device__ static Basis basis(const unsigned char* rows, Layout layout, int row, int block, const Lane& at) {
    return *reinterpret_cast<const uint2*>(rows + layout.at(row, 2 * block + (at.c >> 1)) + ((at.c & 1) << 3));
  }
  __device__ static Basis basis_global(const unsigned char* row, int block, const Lane& at) {
    return __ldg(reinterpret_cast<const uint2*>(row + 32 * block + 8 * at.c));
  }
  __device__ static Basis none() { return make_uint2(0u, 0u); }
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[kWords], const Basis& b) {
    int i[4] = {__float_as_int(d[0]), __float_as_int(d[1]), __float_as_int(d[2]), __float_as_int(d[3])};
    ptx::mma_m16n8k32_u8s8(i, a, b.x, b.y);
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] = __int_as_float(i[e]);
  }
};

// How the latents of KVLAR_LATENT_* are multiplied.
template <class T, int kLatent> struct LatentsOf { using type = DenseLatents<T>; };
template <class T> struct LatentsOf<T, KVLAR_LATENT_INT8> { using type = ByteLatents; };
template <class T> struct LatentsOf<T, KVLAR_LATENT_INT8_BASIS> { using type = ByteBasis; };

}  // namespace kvlar::attend_lowrank
