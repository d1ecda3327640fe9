// Tensor-core tiles of 16-bit floats: m16n8k16 with fp32 accumulation, and packing.
//
// Lane l = 4g + c. A (16x16): registers hold (row g, cols 2c..), (row g + 8, cols 2c..), (row g, cols 2c + 8..),
// (row g + 8, cols 2c + 8..). B (16x8): (rows 2c.., col g), (rows 2c + 8.., col g). D (16x8): (row g, cols 2c, 2c + 1),
// (row g + 8, cols 2c, 2c + 1).
#pragma once
#include "device/gpu.cuh"

namespace kvlar {

struct Lane {  // a lane's place in those tiles
  int g, c;
  __device__ Lane() : Lane(int(threadIdx.x)) {}
  // What follows from it is worked out where it is asked for, instead of held in registers through the loop around.
  __device__ static Lane anew() { return Lane(ptx::unknown(int(threadIdx.x))); }

 private:
  __device__ explicit Lane(int thread) : g((thread & 31) >> 2), c(thread & 3) {}
};

template <class T> struct Half16;  // a 16-bit float type: arithmetic is done in fp32

template <> struct Half16<__nv_bfloat16> {
  __device__ static uint32_t pack(float low, float high) { return ptx::pack_bf16(low, high); }
  __device__ static float2 unpack(uint32_t x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)); }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_m16n8k16_bf16(d, a, b[0], b[1]); }
};

template <> struct Half16<__half> {
  __device__ static uint32_t pack(float low, float high) { return ptx::pack_f16(low, high); }
  __device__ static float2 unpack(uint32_t x) { return ptx::unpack_f16(x); }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { ptx::mma_m16n8k16_f16(d, a, b[0], b[1]); }
};

}  // namespace kvlar
