// Encoding of latent rows, of any length, with one scale and zero a row: codes and rounding are those of
// device/row_codec.cuh.
#pragma once
#include "device/mma.cuh"
#include "device/row_codec.cuh"
#include "project/tile.cuh"

namespace kvlar::project {

// The range of a row's values; a value that is not finite makes `low` so.
struct Range {
  float low, high;
  __device__ static Range none() { return {INFINITY, -INFINITY}; }
  __device__ void widen(float x) {
    low = fabsf(x) < INFINITY ? fminf(low, x) : -INFINITY;
    high = fmaxf(high, x);
  }
  __device__ void widen(Range other) {
    low = fminf(low, other.low);
    high = fmaxf(high, other.high);
  }
  __device__ void widen_by_lane(int mask) {
    widen({__shfl_xor_sync(0xffffffffu, low, mask), __shfl_xor_sync(0xffffffffu, high, mask)});
  }
  __device__ Affine affine() const { return affine_of(low, high, fabsf(low) < INFINITY && fabsf(high) < INFINITY); }
};

// Eight codes from value `first` on; those of padding, from `count` on, are 0.
__device__ inline void store_codes(char* codes, const float (&x)[kLaneRanks], Affine a, int first, int count) {
  uint32_t code[kLaneRanks];
#pragma unroll
  for (int i = 0; i < kLaneRanks; ++i) code[i] = first + i < count ? code_of(x[i], a) : 0u;
  *reinterpret_cast<uint2*>(codes + first) = make_uint2(code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24,
                                                        code[4] | code[5] << 8 | code[6] << 16 | code[7] << 24);
}

template <class T> __device__ inline uint4 packed(const float (&x)[kLaneRanks]) {
  return make_uint4(Half16<T>::pack(x[0], x[1]), Half16<T>::pack(x[2], x[3]), Half16<T>::pack(x[4], x[5]), Half16<T>::pack(x[6], x[7]));
}

// A whole row by a warp: `load(x, first)` gives eight values from `first` on, zeros beyond `count`. int8 rows are loaded
// twice, the second time from the L1 or L2.
template <class T, class Load>
__device__ inline void store_row_of(RowPlace to, uint32_t codec, const Load& load, int count, int stored) {
  const int lane = int(threadIdx.x) % 32;
  float x[kLaneRanks];
  if (codec != KVLAR_CODEC_INT8) {
    for (int first = kLaneRanks * lane; first < stored; first += 32 * kLaneRanks) {
      load(x, first);
      *reinterpret_cast<uint4*>(to.codes + 2 * first) = packed<T>(x);
    }
    return;
  }
  Range range = Range::none();
  for (int first = kLaneRanks * lane; first < count; first += 32 * kLaneRanks) {
    load(x, first);
#pragma unroll
    for (int i = 0; i < kLaneRanks; ++i)
      if (first + i < count) range.widen(x[i]);
  }
#pragma unroll
  for (int mask = 1; mask < 32; mask <<= 1) range.widen_by_lane(mask);
  const Affine a = range.affine();
  for (int first = kLaneRanks * lane; first < (stored + 15) / 16 * 16; first += 32 * kLaneRanks) {
    load(x, first);
    store_codes(to.codes, x, a, first, count);
  }
  if (lane == 0) *reinterpret_cast<uint32_t*>(to.params) = pack_affine(a);
}

// Values of a 16-bit row at any address.
template <class T> struct RowLoad {
  const uint16_t* row;
  int count;
  bool vectors;
  __device__ RowLoad(const uint16_t* r, int n) : row(r), count(n), vectors(reinterpret_cast<uintptr_t>(r) % 16 == 0) {}
  __device__ void operator()(float (&x)[kLaneRanks], int first) const {
    uint32_t word[4] = {};
    if (vectors && first + kLaneRanks <= count) {
      const uint4 w = __ldg(reinterpret_cast<const uint4*>(row + first));
      word[0] = w.x; word[1] = w.y; word[2] = w.z; word[3] = w.w;
    } else {
#pragma unroll
      for (int i = 0; i < kLaneRanks; ++i)
        if (first + i < count) word[i / 2] |= uint32_t(__ldg(row + first + i)) << (16 * (i % 2));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = Half16<T>::unpack(word[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
};

// Values that other CTAs wrote; padding is there too, as zeros.
struct ScratchLoad {
  const float* row;
  __device__ void operator()(float (&x)[kLaneRanks], int first) const {
    const float4* p = reinterpret_cast<const float4*>(row + first);
    const float4 a = __ldcg(p), b = __ldcg(p + 1);
    x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w; x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
  }
};

}  // namespace kvlar::project
