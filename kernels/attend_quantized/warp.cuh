// One warp's part of decode attention over quantized rows, and rows that are stored as they are beside them: queries in
// registers, tiles of rows through a private ring of cp.async stages, online softmax of the packed columns.
//
//   x = zero + scale * code, one (scale, zero) a row (KIVI, arXiv 2402.02750, §3, token-wise; fp8: x = scale * e4m3), so
//   q . k = scale_k (q . codes) + zero_k sum(q)  and  sum p v = sum (p scale_v) codes + sum p zero_v:
//
// codes meet tensor cores as they are (codes.cuh), scales and zeros enter once a score or weight, and each row is read and
// unpacked once for all query heads of its kv head.
//
// A launch knows one format of quantized keys and one of quantized values; which it is decides a branch a tile, so that
// one kernel serves all pairs. Tiles have 32 or 64 rows (the launcher chooses), computed 32 at a time.
//
// Floor: bytes of the rows / read bandwidth. Llama-3.1-8B shape (8 kv heads, d = 128, one layer, batch 1) at 4.3 TB/s, with
// 4 B of scale and zero a row, beside 31.2 us and 124.9 us for bf16:
//   keys, values  bytes a token  32K rows  128K rows
//   fp8, fp8           2048       15.6 us   62.4 us
//   int8, int8         2112       16.1 us   64.4 us
//   int8, int4         1600       12.2 us   48.8 us
//   int4, int4         1088        8.3 us   33.2 us
//   int4, int2          832        6.3 us   25.4 us
//   int2, int2          576        4.4 us   17.6 us
// In flight: all stages but one of 4 to 8 KB a warp, 8 warps an SM on Hopper: 64 to 128 KB. Registers: ledger/static.json;
// instructions of each pair, and what issuing them takes beside these floors: ledger/pairs.json.
#pragma once
#include "attend_quantized/queries.cuh"
#include "attend_quantized/rows.cuh"
#include "attend_quantized/values.cuh"

namespace kvlar::attend_quantized {

// kKeys, kValues: codecs that the template says instead of the parameters, for the ledger, which counts a pair's instructions;
// then there are no other rows.
template <int D, int NT, int kKeys = -1, int kValues = -1> struct WarpQuantized : WarpRows<D, NT> {
  using Base = WarpRows<D, NT>;
  using Base::at, Base::lane, Base::p, Base::shared, Base::stage_at, Base::state;
  static constexpr int kWarps = Base::kWarps, kSteps = Base::kSteps;

  Queries<D, NT> coded;
  float weight[NT][4];  // sums of 1024 times the fp16 weights over all lanes' rows, in [0] and [1]; an accumulator
  float zero[NT][2];    // sums of weight times zero over the lane's rows
  bool in_codes;        // what `state.o` holds: sums of codes (values.cuh), or of values

  __device__ WarpQuantized(const KvlarAttend& params, attend::SharedUnit& unit, unsigned char* raw) : Base(params, unit, raw) {}

  __device__ __forceinline__ uint32_t key_codec() const { return kKeys < 0 ? p.key_codec : uint32_t(kKeys); }
  __device__ __forceinline__ uint32_t value_codec() const { return kValues < 0 ? p.value_codec : uint32_t(kValues); }

  __device__ void prepare() {
    Base::prepare_queries(coded, [&](float* scratch) { coded.prepare_for(key_codec(), scratch, *this); });
  }

  __device__ void start() {
    Base::load_positions();
    state.clear();
    in_codes = false;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      zero[n][0] = zero[n][1] = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) weight[n][e] = 0.f;
    }
  }

  __device__ __forceinline__ void issue(const LaneRows& rows, int stage) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem to = ptx::to_smem(stage_at(stage));
    with_lane(lane, s.tile_rows, [&](auto mine) {
      copy_side(mine, rows, s, false, to, to + s.stage_key_params);
      copy_side(mine, rows, s, true, to + s.stage_values, to + s.stage_value_params);
      Base::copy_positions(mine, rows, s, to);
    });
  }

  template <int kLanes>
  __device__ __forceinline__ void copy_side(BlockLane<kLanes> mine, const LaneRows& rows, const KvlarSegment& s, bool values, ptx::smem codes,
                                            ptx::smem params) const {
    const BlockPage page = Base::page_at(mine, rows, s, values);
    const uint32_t codec = values ? value_codec() : key_codec();
    Base::copy_side(mine, rows, s, values, codec, page, codes);
    if (codec == KVLAR_CODEC_FP8 || (kKeys < 0 && !Base::holds_codes(s))) return;
    const KvlarPool& pool = values ? s.values : s.keys;
    copy_words(mine, params, page.at(pool.params_stride, pool.params_offset), pool.params_stride, rows.valid);
  }

  // ---- one tile

  __device__ __forceinline__ void consume(const TilePlace& rows, int stage) {
    const KvlarSegment& segment = p.segments[rows.segment];
    const unsigned char* tile = stage_at(stage);
    if (kKeys < 0 && !Base::holds_codes(segment)) {
      settle();
      Base::consume_dense(tile, segment, rows);
      return;
    }
    enter_codes();
#pragma unroll 1
    for (int row = 0; row < rows.valid; row += 32) consume_codes(tile, segment, rows, row);
  }

  // 32 rows from `row` of the tile on.
  __device__ __forceinline__ void consume_codes(const unsigned char* tile, const KvlarSegment& segment, const TilePlace& rows, int row) {
    float s[2][NT][4];
    score(s, tile, segment, row);
    attend::soft_cap_logits(s, p);
    const int first = shared.unit().first_row[rows.segment] + rows.row;
    TilePlace part = rows;
    part.valid = rows.valid - row;
    const bool whole = Base::all_visible(part, first + row, 32);
    if (!whole) Base::hide(s, tile + segment.stage_positions, segment, rows, row, first);
    // A row's values are weighted by its scale: in the softmax weights, before they are rounded.
    float scale[2][2], offset[2][2];
    load_value_params(scale, offset, tile, segment, row);
    if (!whole) isolate_broken_rows(s, scale, offset);
    uint32_t weights[2][NT][2];
    weigh_codes(weights, s, scale, offset);
    add_values(tile + segment.stage_values, row, weights);
  }

  __device__ __forceinline__ void score(float (&s)[2][NT][4], const unsigned char* tile, const KvlarSegment& segment, int row) const {
    const float scale = p.softcap > 0.f ? p.scale : p.scale * kLog2E;
    clear(s);
    if (key_codec() == KVLAR_CODEC_FP8) {
      KeyScores<D, NT>::fp8(s, tile, row, coded.b);
      const float head_scale = 256.f * scale * (segment.key_format.tables ? __ldg(segment.key_format.tables + shared.unit().head) : 1.f);
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[b][n][e] *= coded.scale[n][e % 2] * head_scale;
      return;
    }
    if (key_codec() == KVLAR_CODEC_INT4) KeyScores<D, NT>::int4(s, tile, row, coded.b);
    else if (key_codec() == KVLAR_CODEC_INT8) KeyScores<D, NT>::int8(s, tile, row, coded.b);
    else KeyScores<D, NT>::int2(s, tile, row, coded.b);
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 k = ptx::unpack_f16(*reinterpret_cast<const uint32_t*>(tile + segment.stage_key_params + 4 * (row + 16 * b + 8 * h + at.g)));
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[b][n][2 * h + e];
            x = fmaf(k.x, x, k.y * coded.sum[n][e]) * (coded.scale[n][e] * scale);
          }
      }
  }

  // Accumulators begin below zero by what the codes' 1024 adds.
  __device__ __forceinline__ void clear(float (&s)[2][NT][4]) const {
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[b][n][e] = -coded.magic[n][e % 2];
  }

  __device__ __forceinline__ void load_value_params(float (&scale)[2][2], float (&offset)[2][2], const unsigned char* tile,
                                                    const KvlarSegment& segment, int row) const {
    const bool fp8 = value_codec() == KVLAR_CODEC_FP8;
    const float head_scale = fp8 && segment.value_format.tables ? __ldg(segment.value_format.tables + shared.unit().head) : 1.f;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        scale[b][h] = head_scale;
        offset[b][h] = 0.f;
        if (!fp8) {
          const float2 v = ptx::unpack_f16(*reinterpret_cast<const uint32_t*>(tile + segment.stage_value_params + 4 * (row + 16 * b + 8 * h + at.g)));
          scale[b][h] = v.x;
          offset[b][h] = v.y;
        }
      }
  }

  // A row that decodes to NaN is NaN for those who see it alone: a weight of 0 would not undo it for the others.
  __device__ __forceinline__ void isolate_broken_rows(const float (&s)[2][NT][4], float (&scale)[2][2], float (&offset)[2][2]) {
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (fabsf(scale[b][h] + offset[b][h]) < INFINITY) continue;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (s[b][n][2 * h + e] != -INFINITY) zero[n][e] += scale[b][h] + offset[b][h];
        scale[b][h] = offset[b][h] = 0.f;
      }
  }

  // Softmax weights times the rows' scales, in fp16, and their sums.
  __device__ __forceinline__ void weigh_codes(uint32_t (&weights)[2][NT][2], const float (&s)[2][NT][4], const float (&scale)[2][2],
                                              const float (&offset)[2][2]) {
    float top[NT][2], log[2][2];
    bool raise = false;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) log[b][h] = fmaxf(ptx::lg2_approx(scale[b][h]), -24.f);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        top[n][e] = state.top[n][e];
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h) top[n][e] = fmaxf(top[n][e], s[b][n][2 * h + e] + log[b][h]);  // bounds the product
        raise = raise || top[n][e] > state.top[n][e] + kHeadroom;
      }
    if (__any_sync(0xffffffffu, raise)) {
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float factor = state.raise(top[n][e], n, e);
          weight[n][e] *= factor;
          zero[n][e] *= factor;
        }
    }
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float w[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            w[e] = ptx::ex2_approx(s[b][n][2 * h + e] - state.top[n][e]);
            state.sum[n][e] += w[e];
            zero[n][e] = fmaf(w[e], offset[b][h], zero[n][e]);
            w[e] *= scale[b][h];
          }
          weights[b][n][h] = ptx::movmatrix_trans(ptx::pack_f16(w[0], w[1]));
        }
    if (value_codec() != KVLAR_CODEC_FP8) {
      // 1024 times the weights as rounded: a product, so that tensor cores round it as they round the codes' own 1024.
      constexpr uint32_t all[4] = {kMagic, kMagic, kMagic, kMagic};
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int n = 0; n < NT; ++n) Half16<__half>::mma(weight[n], all, weights[b][n]);
    }
  }

  __device__ __forceinline__ void add_values(const unsigned char* values, int row, const uint32_t (&weights)[2][NT][2]) {
    using Sums = ValueSums<D, NT>;
    if (value_codec() == KVLAR_CODEC_INT4) Sums::int4(state.o, values, row, weights);
    else if (value_codec() == KVLAR_CODEC_INT8) Sums::int8(state.o, values, row, weights);
    else if (value_codec() == KVLAR_CODEC_INT2) Sums::int2(state.o, values, row, weights);
    else Sums::fp8(state.o, values, row, weights);
  }

  // ---- what the sums hold

  __device__ __forceinline__ void enter_codes() {
    if (in_codes) return;
    in_codes = true;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) state.o[i][n][e] *= value_weight(value_codec(), i, e / 2);
  }

  // Sums of codes become sums of values.
  __device__ void settle() {
    if (!in_codes) return;
    in_codes = false;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float shift = column_sum(zero[n][e]);
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            float& o = state.o[i][n][2 * u + e];
            o = fmaf(o - weight[n][e], 1.f / value_weight(value_codec(), i, u), shift);
          }
        zero[n][e] = weight[n][e] = weight[n][e + 2] = 0.f;
      }
  }

  __device__ void take(int first, int end) { attend::take_tiles(*this, kWarps, first, end); }
  __device__ void finish() { settle(); }
};

}  // namespace kvlar::attend_quantized
