// Scores of a latent tile: rebuild, turn, multiply by the queries, 16 pairs of one head at a time. Nothing of a key is
// ever written to memory.
#pragma once
#include "attend_lowrank/rebuild.cuh"
#include "attend_lowrank/unit.cuh"

namespace kvlar::attend_lowrank {

// Scales and zeros of a lane's rows g, g + 8, g + 16, g + 24; 1 and 0 for latents without.
struct RowAffine { float scale[4], zero[4]; };

// What a warp needs to score tiles of one unit.
template <class T, int NT, int kLatent> struct Scores {
  using Latents = typename LatentsOf<T, kLatent>::type;
  using Layout = typename Latents::Layout;
  static constexpr bool kAffine = kLatent != KVLAR_LATENT_DTYPE, kByteBasis = kLatent == KVLAR_LATENT_INT8_BASIS;
  static constexpr int kBasisShift = kByteBasis ? 0 : 1;  // log2 of the bytes of a basis element

  const KvlarAttendLowrank& p;
  const Unit& unit;
  const unsigned char* const shared;  // the CTA's dynamic shared memory
  const Lane at;
  const int lane, groups, blocks;
  const Layout latents;
  const typename LatentsOf<T, kByteBasis ? KVLAR_LATENT_INT8 : KVLAR_LATENT_DTYPE>::type::Layout basis_rows;
  int my_head[NT];  // of this lane's column as a B column: 8 n + g; -1: not in use

  __device__ Scores(const KvlarAttendLowrank& params, const Unit& u, const unsigned char* memory)
      : p(params), unit(u), shared(memory), lane(int(threadIdx.x) & 31), groups(int(params.padded_dim) / 32),
        blocks(int(params.key_rank) / 32), latents(blocks), basis_rows(blocks) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const Column column = column_at(p.attend, unit, 8 * n + at.g);
      my_head[n] = column.used ? column.head : -1;
    }
  }

  // ---- queries: [group][n][lane], four words each

  __device__ uint4* raw_queries() const { return reinterpret_cast<uint4*>(const_cast<unsigned char*>(shared) + p.shared.queries); }

  // One column's words of a group, as given.
  __device__ static uint4 read_query(const KvlarAttendLowrank& p, const T* row, int group, const Lane& at) {
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = kGroupPairs * group + 8 * (i & 1) + 2 * at.c, upper = i >> 1;
      const int a = dim_of_pair(p.rope, pair, upper), b = dim_of_pair(p.rope, pair + 1, upper);
      const uint16_t* x = reinterpret_cast<const uint16_t*>(row);
      const uint32_t low = row && a < int(p.attend.head_dim) ? __ldg(x + a) : 0, high = row && b < int(p.attend.head_dim) ? __ldg(x + b) : 0;
      words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // Queries turned back by `position`, for this warp's tile. A lane reads what it wrote: no other lane is waited for but
  // for the angles.
  __device__ void turn_queries(unsigned char* warp_memory, int position) const {
    float2* angles = reinterpret_cast<float2*>(warp_memory);
    for (int i = lane; i < 16 * groups; i += 32) angles[i] = turn_of(p.rope, i, position);
    __syncwarp();
    const float4* turns = reinterpret_cast<const float4*>(angles);
    uint4* queries = reinterpret_cast<uint4*>(warp_memory + p.shared.warp_queries);
    for (int group = 0; group < groups; ++group) {
      const float4 low = turns[8 * group + at.c], high = turns[8 * group + 4 + at.c];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int i = (group * NT + n) * 32 + lane;
        if constexpr (kByteBasis) queries[i] = turn_back_scaled(raw_queries()[i], low, high, group, my_head[n]);
        else queries[i] = turn_back<T>(raw_queries()[i], low, high);
      }
    }
    __syncwarp();  // the angles may be written again
  }

  // Likewise, with the scales of an int8 basis, which are a rotary pair's and so pass through the rotation: times 2^7, to
  // stay near 1.
  __device__ uint4 turn_back_scaled(uint4 q, float4 low, float4 high, int group, int head) const {
    const float* scales = p.key_scales + unit.seq * p.key_scales_seq_stride +
                          int64_t(unit.head[max(head, 0)]) * (p.padded_dim / 2) + kGroupPairs * group + 2 * at.c;
    const float2 a = __ldg(reinterpret_cast<const float2*>(scales)), b = __ldg(reinterpret_cast<const float2*>(scales + 8));
    const auto times = [](float4 t, float2 s) { return make_float4(t.x * s.x, t.y * s.x, t.z * s.y, t.w * s.y); };
    return turn_back<T>(q, times(low, make_float2(128.f * a.x, 128.f * a.y)), times(high, make_float2(128.f * b.x, 128.f * b.y)));
  }

  // ---- scores

  __device__ __forceinline__ void load_latents(typename Latents::Fragments& a, const unsigned char* tile, int first) const {
#pragma unroll
    for (int i = 0; i < Latents::kHeld; ++i)
      if (first + i < blocks)
#pragma unroll
        for (int b = 0; b < 2; ++b) Latents::load(a[i][b], tile, latents, 16 * b, first + i, at);
  }

  // One block of 32 latents: basis fragments from shared memory, or from global memory where it does not fit there.
  __device__ __forceinline__ void multiply(Rebuilt& acc, const uint32_t (&a)[2][Latents::kWords], int head, int group, int block) const {
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        typename Latents::Basis b;
        if (p.shared.resident) {
          const int row = ((head * groups + group) * 2 + part) * 16 + 8 * u + at.g;
          b = Latents::basis(shared + p.shared.basis, basis_rows, row, block, at);
        } else {
          const int dim = dim_of_pair(p.rope, kGroupPairs * group + 8 * u + at.g, part);
          const int64_t row = unit.seq * p.key_basis_seq_stride + (int64_t(unit.head[head]) * p.attend.head_dim + dim) * p.key_rank;
          b = dim < int(p.attend.head_dim)
                  ? Latents::basis_global(static_cast<const unsigned char*>(p.key_basis) + (row << kBasisShift), block, at)
                  : Latents::none();
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) Latents::multiply(acc[r][u][part], a[r], b);
      }
  }

  // A lane's two dims (2c, 2c + 1 of n-tile u, part) of a vector in the rebuild's order.
  __device__ float2 two_dims(uint32_t from, int head, int group, int part, int u) const {
    const float* x = reinterpret_cast<const float*>(shared + from);
    return *reinterpret_cast<const float2*>(x + ((head * groups + group) * 2 + part) * 16 + 8 * u + 2 * at.c);
  }

  __device__ __forceinline__ void start(Rebuilt& acc, int head, int group) const {
    float begin = 0.f;
    if constexpr (kByteBasis) begin = blocks <= Latents::kHeld ? ByteBasis::kBiasValue : 0.f;
#pragma unroll
    for (int part = 0; part < 2; ++part)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        float2 x = make_float2(begin, begin);
        if (!kAffine && p.key_mean) x = two_dims(p.shared.means, head, group, part, u);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[r][u][part][e] = e & 1 ? x.y : x.x;
      }
  }

  // Scales and zeros of integer latents, and the mean.
  __device__ __forceinline__ void finish(Rebuilt& acc, const RowAffine& affine, int head, int group) const {
    if constexpr (kAffine) {
      const bool biased = kByteBasis && blocks <= Latents::kHeld;
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const float2 sum = two_dims(p.shared.basis_sums, head, group, part, u);
          float2 mean = make_float2(0.f, 0.f);
          if (p.key_mean) mean = two_dims(p.shared.means, head, group, part, u);
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float& x = acc[r][u][part][e];
              const int i = 2 * r + (e >> 1);
              float rest = fmaf(affine.zero[i], e & 1 ? sum.y : sum.x, e & 1 ? mean.y : mean.x);
              if (kByteBasis && biased) rest = fmaf(-ByteBasis::kBiasValue, affine.scale[i], rest);
              if (kByteBasis && !biased) x = float(__float_as_int(x));
              x = fmaf(affine.scale[i], x, rest);
            }
        }
    }
  }

  // Turns the rebuilt keys and packs them as A fragments of the two k-steps (lower ends, upper ends).
  __device__ __forceinline__ static void turn_keys(uint32_t (&k)[2][2][4], Rebuilt& acc, const float4 (&turns)[kTurnsALane]) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int h = 0; h < 2; ++h) {  // rows g, g + 8
          const float4 t = turns[4 * r + 2 * h + u];
          const float a0 = acc[r][u][0][2 * h], a1 = acc[r][u][0][2 * h + 1], b0 = acc[r][u][1][2 * h], b1 = acc[r][u][1][2 * h + 1];
          k[r][0][2 * u + h] = Half16<T>::pack(fmaf(a0, t.x, -b0 * t.y), fmaf(a1, t.z, -b1 * t.w));
          k[r][1][2 * u + h] = Half16<T>::pack(fmaf(b0, t.x, a0 * t.y), fmaf(b1, t.z, a1 * t.w));
        }
  }

  // Turns of the lane's rows and pairs: from the table, or (positions not in a row) worked out.
  __device__ __forceinline__ void load_turns(float4 (&turns)[kTurnsALane], int group, const int* positions) const {
    const float4* table = reinterpret_cast<const float4*>(shared + p.shared.turns) + group * kTurnsALane * 32 + lane;
#pragma unroll
    for (int i = 0; i < kTurnsALane; ++i)
      turns[i] = positions ? key_turns(p.rope, group, i, at, positions[row_of_turn(i, at)]) : table[32 * i];
  }

  // s += K q^T over all dims of all heads of the unit. Row r of the tile is at the position that the queries were turned
  // back by, plus r; or at positions[r], with the queries as they are. kFew registers: the turns are read for each head.
  template <bool kFew>
  __device__ __forceinline__ void add(float (&s)[2][NT][4], const unsigned char* tile, const unsigned char* warp_memory,
                                      const RowAffine& affine, const int* positions) const {
    typename Latents::Fragments a;
    if (blocks <= Latents::kHeld) load_latents(a, tile, 0);
    const int a_head = columns_a_head(p.attend);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      float4 turns[kTurnsALane];
      if (!kFew) load_turns(turns, group, positions);
      const uint4* queries = reinterpret_cast<const uint4*>(warp_memory + p.shared.warp_queries) + group * NT * 32 + lane;
#pragma unroll 1
      for (int head = 0; head < unit.heads; ++head) {
        Rebuilt acc;
        start(acc, head, group);
#pragma unroll 1
        for (int first = 0; first < blocks; first += Latents::kHeld) {
          if (blocks > Latents::kHeld) load_latents(a, tile, first);
#pragma unroll
          for (int i = 0; i < Latents::kHeld; ++i)
            if (first + i < blocks) multiply(acc, a[i], head, group, first + i);
        }
        finish(acc, affine, head, group);
        if (kFew) load_turns(turns, group, positions);
        uint32_t k[2][2][4];
        turn_keys(k, acc, turns);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          if (NT > 1 && unit.heads > 1 && (head * a_head >= 8 * (n + 1) || (head + 1) * a_head <= 8 * n)) continue;  // no column here
          uint4 q = queries[32 * n];
          if (my_head[n] != head) q = make_uint4(0u, 0u, 0u, 0u);
          const uint32_t low[2] = {q.x, q.y}, high[2] = {q.z, q.w};
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            Half16<T>::mma(s[r][n], k[r][0], low);
            Half16<T>::mma(s[r][n], k[r][1], high);
          }
        }
      }
    }
  }
};

}  // namespace kvlar::attend_lowrank
