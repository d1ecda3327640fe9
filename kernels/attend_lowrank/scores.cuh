// Scores of a latent tile: rebuild, turn, multiply by the queries, 16 pairs of one head at a time. Nothing of a key is
// ever written to memory.
#pragma once
#include "attend_lowrank/rebuild.cuh"
#include "attend_lowrank/unit.cuh"

namespace kvlar::attend_lowrank {

// What a warp needs to score tiles of one unit.
template <class T, int NT, int kLatent> struct Scores {
  using Latents = typename LatentsOf<T, kLatent>::type;
  static constexpr bool kAffine = kLatent != KVLAR_LATENT_DTYPE, kByteBasis = kLatent == KVLAR_LATENT_INT8_BASIS;
  static constexpr int kBasisShift = kByteBasis ? 0 : 1;  // log2 of the bytes of a basis element

  const KvlarAttendLowrank& p;
  const Unit& unit;
  const unsigned char* const shared;  // the CTA's dynamic shared memory
  const ptx::smem basis;
  const Lane at;
  const int lane, groups, blocks;
  const SwizzledRows latent_rows, basis_rows;
  __device__ Scores(const KvlarAttendLowrank& params, const Unit& u, const unsigned char* memory)
      : p(params), unit(u), shared(memory), basis(ptx::to_smem(memory) + params.shared.basis), lane(int(threadIdx.x) & 31),
        groups(int(params.padded_dim) / 32), blocks(int(params.key_rank) / 32),
        latent_rows(Latents::chunks(int(params.key_rank))), basis_rows(Latents::basis_chunks(int(params.key_rank))) {}

  // The head of this lane's column as a B column; of columns that are not in use, any: their queries are 0.
  __device__ __forceinline__ int head_of(int n) const { return unit.column_head[8 * n + at.g]; }

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
        if constexpr (kByteBasis) queries[i] = turn_back_scaled(raw_queries()[i], low, high, group, head_of(n));
        else queries[i] = turn_back<T>(raw_queries()[i], low, high);
      }
    }
    __syncwarp();  // the angles may be written again
  }

  // Likewise, with the scales of an int8 basis, which are a rotary pair's and so pass through the rotation: times 2^7, to
  // stay near 1.
  __device__ uint4 turn_back_scaled(uint4 q, float4 low, float4 high, int group, int head) const {
    const float* scales = p.key_scales + unit.seq * p.key_scales_seq_stride +
                          int64_t(unit.head[head]) * (p.padded_dim / 2) + kGroupPairs * group + 2 * at.c;
    const float2 a = __ldg(reinterpret_cast<const float2*>(scales)), b = __ldg(reinterpret_cast<const float2*>(scales + 8));
    const auto times = [](float4 t, float2 s) { return make_float4(t.x * s.x, t.y * s.x, t.z * s.y, t.w * s.y); };
    return turn_back<T>(q, times(low, make_float2(128.f * a.x, 128.f * a.y)), times(high, make_float2(128.f * b.x, 128.f * b.y)));
  }

  // ---- scores

  using Block = uint32_t[2][Latents::kSteps][4];  // A fragments of 32 latents, rows 0 .. 15 and 16 .. 31

  __device__ __forceinline__ void load_block(Block& a, ptx::smem tile, int block) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) Latents::load(a[r], tile, latent_rows, 16 * r, block);
  }

  // acc += basis z over one block of 32 latents.
  __device__ __forceinline__ void multiply(Rebuilt& acc, const Block& a, int first_row, int block) const {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t b[2][Latents::kSteps][2];
      Latents::load_basis(b, basis, basis_rows, first_row + 16 * part, block);
#pragma unroll
      for (int k = 0; k < Latents::kSteps; ++k)
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int r = 0; r < 2; ++r) Latents::multiply(acc[r][u][part], a[r][k], b[u][k]);
    }
  }

  // Where bases do not fit shared memory, fragments come from global memory: slow, but any rank runs.
  __device__ __forceinline__ void multiply_from_global(Rebuilt& acc, const Block& a, int head, int group, int block) const {
#pragma unroll 1
    for (int tile = 0; tile < 4; ++tile) {
      const int part = tile >> 1, u = tile & 1, dim = dim_of_pair(p.rope, kGroupPairs * group + 8 * u + at.g, part);
      const bool exists = dim < int(p.attend.head_dim);
      const int64_t row = unit.seq * p.key_basis_seq_stride + (int64_t(unit.head[head]) * p.attend.head_dim + (exists ? dim : 0)) * p.key_rank;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(static_cast<const char*>(p.key_basis) + (row << kBasisShift));
#pragma unroll
      for (int k = 0; k < Latents::kSteps; ++k) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) b[i] = exists ? __ldg(words + 8 * (Latents::kSteps * block + k) + Latents::basis_word(4 * i + at.c)) : 0u;
#pragma unroll
        for (int j = 0; j < 4; ++j)  // accumulators are registers: their indices are constants
#pragma unroll
          for (int r = 0; r < 2; ++r)
            if (tile == j) Latents::multiply(acc[r][j & 1][j >> 1], a[r][k], b);
      }
    }
  }

  // acc += basis z for 16 pairs of one head.
  template <bool kHeld>
  __device__ __forceinline__ void rebuild(Rebuilt& acc, const Block (&held)[Latents::kHeld], ptx::smem tile, int head, int group) const {
    const int first_row = (head * groups + group) * 32;
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < Latents::kHeld; ++i) multiply(acc, held[i], first_row, i < blocks ? i : 0);  // beyond: latents are 0
    } else {
#pragma unroll 1
      for (int i = 0; i < blocks; ++i) {
        Block a;
        load_block(a, tile, i);
        if (p.shared.resident) multiply(acc, a, first_row, i); else multiply_from_global(acc, a, head, group, i);
      }
    }
  }

  // A lane's two dims (2c, 2c + 1 of n-tile u, part) of a vector in the rebuild's order.
  __device__ float2 two_dims(uint32_t from, int head, int group, int part, int u) const {
    const float* x = reinterpret_cast<const float*>(shared + from);
    return *reinterpret_cast<const float2*>(x + ((head * groups + group) * 2 + part) * 16 + 8 * u + 2 * at.c);
  }

  // kHeld: s32 sums of at most 128 products fit a float's integers, so that a bias makes them floats.
  template <bool kHeld> __device__ __forceinline__ void start(Rebuilt& acc, int head, int group) const {
    float begin = 0.f;
    if constexpr (kByteBasis && kHeld) begin = ByteBasis::kBiasValue;
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
  template <bool kHeld> __device__ __forceinline__ void finish(Rebuilt& acc, const unsigned char* key_params, int head, int group) const {
    if constexpr (kAffine) {
      float scale[4], zero[4];  // of rows g, g + 8, g + 16, g + 24: read again for each head, since registers are scarce
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = ptx::unpack_f16(*reinterpret_cast<const uint32_t*>(key_params + 4 * (8 * i + at.g)));
        scale[i] = kByteBasis ? a.x * 0.0078125f : a.x;  // the queries hold 2^7
        zero[i] = kByteBasis ? a.y * 0.0078125f : fmaf(-1024.f, a.x, a.y);
      }
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
              float rest = fmaf(zero[i], e & 1 ? sum.y : sum.x, e & 1 ? mean.y : mean.x);
              if constexpr (kByteBasis && kHeld) rest = fmaf(-ByteBasis::kBiasValue, scale[i], rest);
              if constexpr (kByteBasis && !kHeld) x = float(__float_as_int(x));
              x = fmaf(scale[i], x, rest);
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

  // A lane's turns of a group, every 32nd of them: the CTA's table, or (positions not in a row) worked out into the warp's
  // own memory.
  __device__ __forceinline__ const float4* turns_of(int group, unsigned char* warp_memory, const int* positions) const {
    if (!positions) return reinterpret_cast<const float4*>(shared + p.shared.turns) + group * kTurnsALane * 32 + lane;
    float4* own = reinterpret_cast<float4*>(warp_memory) + lane;
#pragma unroll 1
    for (int i = 0; i < kTurnsALane; ++i) own[32 * i] = key_turns(p.rope, group, i, at, positions[row_of_turn(i, at)]);
    return own;
  }
  __device__ __forceinline__ static void read_turns(float4 (&turns)[kTurnsALane], const float4* from) {
#pragma unroll
    for (int i = 0; i < kTurnsALane; ++i) turns[i] = from[32 * i];
  }

  // s += K q^T over all dims of all heads of the unit. Row r of the tile is at the position that the queries were turned
  // back by, plus r; or at positions[r], with the queries as they are. kFew registers: the turns are read for each head.
  template <bool kFew>
  __device__ __forceinline__ void add(float (&s)[2][NT][4], ptx::smem tile, unsigned char* warp_memory, const unsigned char* key_params,
                                      const int* positions) const {
    if (p.shared.resident && blocks <= Latents::kHeld) add_tile<kFew, true>(s, tile, warp_memory, key_params, positions);
    else add_tile<kFew, false>(s, tile, warp_memory, key_params, positions);
  }

  // kHeld: the rows' latents stay in registers for all heads and dims.
  template <bool kFew, bool kHeld>
  __device__ __forceinline__ void add_tile(float (&s)[2][NT][4], ptx::smem tile, unsigned char* warp_memory,
                                           const unsigned char* key_params, const int* positions) const {
    Block held[Latents::kHeld] = {};
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < Latents::kHeld; ++i)
        if (i < blocks) load_block(held[i], tile, i);
    }
    const int a_head = columns_a_head(p.attend);
#pragma unroll 1
    for (int group = 0; group < groups; ++group) {
      float4 turns[kTurnsALane];
      const float4* table = turns_of(group, warp_memory, positions);
      if (!kFew) read_turns(turns, table);
      const uint4* queries = reinterpret_cast<const uint4*>(warp_memory + p.shared.warp_queries) + group * NT * 32 + lane;
#pragma unroll 1
      for (int head = 0; head < unit.heads; ++head) {
        Rebuilt acc;
        start<kHeld>(acc, head, group);
        rebuild<kHeld>(acc, held, tile, head, group);
        finish<kHeld>(acc, key_params, head, group);
        if (kFew) read_turns(turns, table);
        uint32_t k[2][2][4];
        turn_keys(k, acc, turns);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          if (NT > 1 && unit.heads > 1 && (head * a_head >= 8 * (n + 1) || (head + 1) * a_head <= 8 * n)) continue;  // no column here
          uint4 q = queries[32 * n];
          if (head_of(n) != head) q = make_uint4(0u, 0u, 0u, 0u);
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
