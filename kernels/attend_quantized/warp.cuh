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
// In flight: all stages but one of 4 to 8 KB a warp, 8 warps an SM on Hopper: 64 to 128 KB. Registers: ledger/static.json.
#pragma once
#include "attend/columns.cuh"
#include "attend/state.cuh"
#include "attend_quantized/copy.cuh"
#include "attend_quantized/queries.cuh"
#include "attend_quantized/values.cuh"

namespace kvlar::attend_quantized {

using attend::TileRows;

template <int D, int NT> struct WarpQuantized : attend::Columns<NT> {
  using Base = attend::Columns<NT>;
  using Base::at, Base::lane, Base::p, Base::shared, Base::warp;
  using Dims = attend::OutputDims<D, true>;
  static constexpr int kDim = D, kTiles = NT, kWarps = attend::warps_of(D), kThreads = 32 * kWarps, kSteps = D / 16;
  static constexpr int kDenseRows = attend::Tiling<D>::kRows, kDenseBlocks = kDenseRows / 16;
  static constexpr int kLeastShared = kWarps * 8 * NT * (D + 6) * 4;  // the merge needs it, the launcher allocates it
  static constexpr bool kPrepares = true;

  unsigned char* const ring;
  Queries<D, NT> coded;
  attend::ColumnState<D, NT> state;
  float weight[NT][4];  // sums of 1024 times the fp16 weights over all lanes' rows, in [0] and [1]; an accumulator
  float zero[NT][2];    // sums of weight times zero over the lane's rows
  bool in_codes;        // what `state.o` holds: sums of codes (values.cuh), or of values

  __device__ WarpQuantized(const KvlarAttend& params, attend::SharedUnit& unit, unsigned char* raw)
      : Base(params, unit), ring(raw + (threadIdx.x / 32) * params.stages * params.stage_bytes) {}

  __device__ void prepare(float* scratch) const { coded.prepare(scratch, *this, kWarps); }

  __device__ void start(const float* scratch) {
    Base::load_positions();
    coded.load_fragments(scratch, p.key_codec);
    state.clear();
    in_codes = false;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      zero[n][0] = zero[n][1] = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) weight[n][e] = 0.f;
    }
  }

  // ---- rows

  __device__ __forceinline__ bool holds_codes(const KvlarSegment& s) const { return s.key_format.codec > KVLAR_CODEC_F16; }

  __device__ __forceinline__ void place_tile(int tile, TileRows& rows) const {
    Base::place(tile, rows, [this](int segment) { return int(p.segments[segment].tile_rows); });
  }
  __device__ __forceinline__ void find(int tile, TileRows& rows) const {
    place_tile(tile, rows);
    Base::template find_pages<4>(rows);
  }

  __device__ static __forceinline__ int bits_of(uint32_t codec) {
    return codec == KVLAR_CODEC_INT4 ? 4 : codec == KVLAR_CODEC_INT2 ? 2 : codec > KVLAR_CODEC_F16 ? 8 : 16;
  }

  // Keys or values of a tile, and what scales them.
  __device__ __forceinline__ void copy_side(const TileRows& rows, const KvlarSegment& s, bool values, ptx::smem to, ptx::smem params) const {
    const KvlarPool& pool = values ? s.values : s.keys;
    const char* base = values ? shared.values[rows.segment] : shared.keys[rows.segment];
    const int dim = values ? int(p.value_dim) : int(p.head_dim), bits = bits_of(values ? s.value_format.codec : s.key_format.codec);
    const int mask = (1 << s.rows.page_rows_log2) - 1, blocks = int(s.tile_rows) / 16;
    if (bits == 16) {
      if (rows.valid == kDenseRows && dim == D)
        attend::copy_rows<D / 8, kDenseRows, attend::DenseLayout<D>, false>(lane, to, base, pool, rows, mask, dim / 8);
      else
        attend::copy_rows<D / 8, kDenseRows, attend::DenseLayout<D>, true>(lane, to, base, pool, rows, mask, dim / 8);
      return;
    }
    if (rows.valid < 16 * blocks || dim != D) {
      copy_part(lane, to, base, pool, rows, mask, blocks, log_chunks<D>(bits), (dim * bits / 8 + 15) / 16);
    } else if (bits == 4) {
      copy_whole<log_chunks<D>(4)>(lane, to, base, pool, rows, mask, blocks);
    } else if (bits == 8) {
      copy_whole<log_chunks<D>(8)>(lane, to, base, pool, rows, mask, blocks);
    } else {
      copy_whole<log_chunks<D>(2)>(lane, to, base, pool, rows, mask, blocks);
    }
    if (pool.params_stride) {
      if (blocks == 4) attend::copy_words<64>(lane, params, base + pool.params_offset, pool.page_stride, pool.params_stride, rows, mask);
      else attend::copy_words<32>(lane, params, base + pool.params_offset, pool.page_stride, pool.params_stride, rows, mask);
    }
  }

  __device__ __forceinline__ void issue(const TileRows& rows, int stage) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem to = ptx::to_smem(ring + stage * p.stage_bytes);
#pragma unroll 1
    for (int side = 0; side < 2; ++side)
      copy_side(rows, s, side == 1, side ? to + s.stage_values : to, to + (side ? s.stage_value_params : s.stage_key_params));
    if (s.rows.positions) {
      if (s.tile_rows == 64) Base::template copy_positions<64>(rows, to + s.stage_positions);
      else if (s.tile_rows == 32) Base::template copy_positions<32>(rows, to + s.stage_positions);
      else Base::template copy_positions<16>(rows, to + s.stage_positions);
    }
  }

  // ---- one tile

  __device__ __forceinline__ void consume(const TileRows& rows, int stage) {
    const KvlarSegment& segment = p.segments[rows.segment];
    const unsigned char* tile = ring + stage * p.stage_bytes;
    if (!holds_codes(segment)) {
      settle();
      if (p.q_dtype == KVLAR_DTYPE_F16) consume_dense<__half>(tile, segment, rows); else consume_dense<__nv_bfloat16>(tile, segment, rows);
      return;
    }
    enter_codes();
#pragma unroll 1
    for (int row = 0; row < rows.valid; row += 32) consume_codes(tile, segment, rows, row);
  }

  template <class T> __device__ __forceinline__ void consume_dense(const unsigned char* tile, const KvlarSegment& segment, const TileRows& rows) {
    const ptx::smem tile_s = ptx::to_smem(tile);
    float s[kDenseBlocks][NT][4] = {};
    const uint16_t* query[NT];  // loaded anew each time: few tiles are stored as they are, and registers are scarce
#pragma unroll
    for (int n = 0; n < NT; ++n) query[n] = Base::query(8 * n + at.g);
#pragma unroll 1
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int b = 0; b < kDenseBlocks; ++b) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, tile_s + uint32_t(attend::DenseLayout<D>::at(16 * b + (lane & 15), 2 * k + (lane >> 4))));
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int dim = 16 * k + 2 * at.c;
          const uint32_t q[2] = {Base::two_dims(query[n], dim, int(p.head_dim)), Base::two_dims(query[n], dim + 8, int(p.head_dim))};
          Half16<T>::mma(s[b][n], a, q);
        }
      }
    attend::to_logits(s, p);
    const int first = shared.unit.first_row[rows.segment] + rows.row;
    if (!Base::all_visible(rows, first, kDenseRows)) hide(s, tile + segment.stage_positions, segment, rows, 0, first);
    uint32_t weights[kDenseBlocks][NT][2];
    attend::weigh<T>(weights, state, s);
    attend::DenseTile<D, NT, T>::template add_values<true>(state.o, tile + segment.stage_values, tile_s + segment.stage_values, weights);
  }

  // Hides rows from the columns that must not see them, of the blocks from row `row` of the tile on.
  template <int kBlocks>
  __device__ __forceinline__ void hide(float (&s)[kBlocks][NT][4], const unsigned char* positions, const KvlarSegment& segment, const TileRows& rows,
                                       int row, int first) const {
    const bool stored = segment.rows.positions != nullptr;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = row + 16 * b + 8 * h + at.g;
        const int position = stored ? reinterpret_cast<const int32_t*>(positions)[r] : first + r;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (Base::hidden(r, rows.valid, position, n, e)) s[b][n][2 * h + e] = -INFINITY;
      }
  }

  // 32 rows from `row` of the tile on.
  __device__ __forceinline__ void consume_codes(const unsigned char* tile, const KvlarSegment& segment, const TileRows& rows, int row) {
    float s[2][NT][4];
    score(s, tile, segment, row);
    attend::soft_cap_logits(s, p);
    const int first = shared.unit.first_row[rows.segment] + rows.row;
    TileRows part = rows;
    part.valid = rows.valid - row;
    const bool whole = Base::all_visible(part, first + row, 32);
    if (!whole) hide(s, tile + segment.stage_positions, segment, rows, row, first);
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
    if (p.key_codec == KVLAR_CODEC_FP8) {
      KeyScores<D, NT>::fp8(s, tile, row, coded.b);
      const float head_scale = 256.f * scale * (segment.key_format.tables ? __ldg(segment.key_format.tables + shared.unit.head) : 1.f);
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[b][n][e] *= coded.scale[n][e % 2] * head_scale;
      return;
    }
    if (p.key_codec == KVLAR_CODEC_INT4) KeyScores<D, NT>::int4(s, tile, row, coded.b);
    else if (p.key_codec == KVLAR_CODEC_INT8) KeyScores<D, NT>::int8(s, tile, row, coded.b);
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
    const bool fp8 = p.value_codec == KVLAR_CODEC_FP8;
    const float head_scale = fp8 && segment.value_format.tables ? __ldg(segment.value_format.tables + shared.unit.head) : 1.f;
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
    if (p.value_codec != KVLAR_CODEC_FP8) {
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
    if (p.value_codec == KVLAR_CODEC_INT4) Sums::int4(state.o, values, row, weights);
    else if (p.value_codec == KVLAR_CODEC_INT8) Sums::int8(state.o, values, row, weights);
    else if (p.value_codec == KVLAR_CODEC_INT2) Sums::int2(state.o, values, row, weights);
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
        for (int e = 0; e < 4; ++e) state.o[i][n][e] *= value_weight(p.value_codec, i, e / 2);
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
            o = fmaf(o - weight[n][e], 1.f / value_weight(p.value_codec, i, u), shift);
          }
        zero[n][e] = weight[n][e] = weight[n][e + 2] = 0.f;
      }
  }

  __device__ void take(int first, int end) { attend::take_tiles(*this, kWarps, first, end); }
  __device__ void finish() { settle(); }
};

}  // namespace kvlar::attend_quantized
