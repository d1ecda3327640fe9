// Rotations, tile-relative. With tile rows at positions t0 + j: q . R(t0 + j) k = (R(-t0) q) . (R(j) k), so the queries
// turn back by t0 once a tile, and keys turn by cos and sin of j * inv_freq, the same for every tile (float, small angles).
//
// Dimensions are taken pair by pair, in a canonical order that is the same for both RoPE layouts: pair i is (i, i + rot/2)
// or (2i, 2i + 1) for i < rot/2, then neighbours of the dimensions that are not rotated (angle 0), then padding. A group
// of 16 pairs is four n-tiles of 8: lower dims of pairs 0..7 and 8..15, then the upper ones: so both ends of a pair
// fall into one lane's accumulators.
#pragma once
#include "abi.h"
#include "device/mma.cuh"
#include "device/rope.cuh"

namespace kvlar::attend_lowrank {

constexpr int kGroupPairs = 16;  // pairs that are rebuilt at a time: 32 dims

// The dimension that is the lower (upper) end of a pair; head_dim or more: padding.
__device__ inline int dim_of_pair(const KvlarRope& rope, int pair, int upper) {
  const int rotated = int(rope.rotary_dim) / 2;
  if (pair >= rotated) return 2 * pair + upper;
  return rope.layout == KVLAR_ROPE_HALF ? pair + upper * rotated : 2 * pair + upper;
}

// cos and sin of a pair's angle at `position`; (1, 0) for dims that are not rotated.
__device__ inline float2 turn_of(const KvlarRope& rope, int pair, int position) {
  if (pair >= int(rope.rotary_dim) / 2) return make_float2(1.f, 0.f);
  float sin, cos;
  sin_cos_of(position, __ldg(rope.inv_freq + pair), sin, cos);
  return make_float2(cos, sin);
}

// Turns of a lane's rows g, g + 8, g + 16, g + 24 and pairs 8 u + 2 c, + 1 of a group, as (cos, sin, cos, sin):
// index = 4 * (row / 16) + 2 * (row / 8 % 2) + u.
constexpr int kTurnsALane = 8;

__device__ inline float4 key_turns(const KvlarRope& rope, int group, int index, const Lane& at, int position) {
  const int pair = kGroupPairs * group + 8 * (index & 1) + 2 * at.c;
  float2 a = turn_of(rope, pair, position), b = turn_of(rope, pair + 1, position);
  const float fa = pair < int(rope.rotary_dim) / 2 ? rope.attention_factor : 1.f;
  const float fb = pair + 1 < int(rope.rotary_dim) / 2 ? rope.attention_factor : 1.f;
  return make_float4(a.x * fa, a.y * fa, b.x * fb, b.y * fb);
}
__device__ inline int row_of_turn(int index, const Lane& at) { return 16 * (index >> 2) + 8 * ((index >> 1) & 1) + at.g; }

// The constant table of a CTA: [group][index][lane].
__device__ inline void fill_turns(const KvlarRope& rope, float4* table, int groups, int thread, int threads) {
  for (int i = thread; i < groups * kTurnsALane * 32; i += threads) {
    Lane at;
    at.g = (i & 31) >> 2;
    at.c = i & 3;
    const int index = (i >> 5) & (kTurnsALane - 1);
    table[i] = key_turns(rope, i / (32 * kTurnsALane), index, at, row_of_turn(index, at));
  }
}

// A lane's words of a query column, dims as a B fragment of each k-step: lower ends of pairs 2c (u = 0), 8 + 2c (u = 1),
// upper ends likewise; each word two neighbouring pairs.
template <class T> __device__ inline uint4 turn_back(uint4 q, float4 low, float4 high) {
  const auto turn = [](uint32_t& lower, uint32_t& upper, float4 t) {
    const float2 a = Half16<T>::unpack(lower), b = Half16<T>::unpack(upper);
    lower = Half16<T>::pack(fmaf(a.x, t.x, b.x * t.y), fmaf(a.y, t.z, b.y * t.w));
    upper = Half16<T>::pack(fmaf(b.x, t.x, -a.x * t.y), fmaf(b.y, t.z, -a.y * t.w));
  };
  turn(q.x, q.z, low);
  turn(q.y, q.w, high);
  return q;
}

}  // namespace kvlar::attend_lowrank
