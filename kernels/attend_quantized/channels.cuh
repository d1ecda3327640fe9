// One warp's part of decode attention over keys that are quantized channel-wise, groups of 32 rows or multiples of that, and
// values with a scale and zero for every few dimensions of a row (KIVI, arXiv 2402.02750, §3); rows that are stored as they
// are (KIVI's residual: sinks, recent rows, the unfinished group) beside them. See warp.cuh for the rest.
//
// Floor: bytes of the rows / read bandwidth. Llama-3.1-8B shape (8 kv heads, d = 128, one layer, batch 1) at 4.3 TB/s,
// groups of 32 rows and of 32 values, 16 B of scales and zeros a row on either side:
//   keys, values  bytes a token  32K rows  128K rows
//   int4, int4           1280        9.8 us   39.0 us
//   int2, int2            768        5.9 us   23.4 us
// Instructions: ledger/pairs.json. Tensor-core work beside token-wise keys: one more product a step for the zeros of each
// 32 rows.
#pragma once
#include "attend_quantized/channel_keys.cuh"
#include "attend_quantized/grouped_values.cuh"
#include "attend_quantized/queries.cuh"
#include "attend_quantized/rows.cuh"
#include "device/affine.cuh"

namespace kvlar::attend_quantized {

// kKeys, kValues: as WarpQuantized's.
template <int D, int kKeys = -1, int kValues = -1> struct WarpChannels : WarpRows<D, 1> {
  using Base = WarpRows<D, 1>;
  using Base::at, Base::lane, Base::p, Base::ring, Base::shared, Base::state;
  using Values = GroupedValues<D>;
  static constexpr int kWarps = Base::kWarps, kChunks = D / 4;  // 16-byte chunks of a group's scales and zeros

  Queries<D, 1> coded;

  __device__ WarpChannels(const KvlarAttend& params, attend::SharedUnit& unit, unsigned char* raw) : Base(params, unit, raw) {}

  __device__ __forceinline__ uint32_t key_codec() const { return kKeys < 0 ? p.key_codec : uint32_t(kKeys); }
  __device__ __forceinline__ uint32_t value_codec() const { return kValues < 0 ? p.value_codec : uint32_t(kValues); }

  __device__ void prepare(float* scratch) const { coded.prepare(scratch, *this, kWarps); }

  __device__ void start(const float* scratch) {
    Base::load_positions();
    if (key_codec() == KVLAR_CODEC_INT4_CHANNEL) coded.template permute<ChannelKeys<D, 4>>(scratch);
    else coded.template permute<ChannelKeys<D, 2>>(scratch);
    state.clear();
  }

  // ---- rows

  __device__ __forceinline__ void issue(const TileRows& rows, int stage) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem to = ptx::to_smem(ring + stage * p.stage_bytes);
#pragma unroll 1
    for (int side = 0; side < 2; ++side) Base::copy_side(rows, s, side == 1, side ? to + s.stage_values : to);
    if (Base::holds_codes(s)) {
      copy_key_params(rows, s, to + s.stage_key_params);
      copy_value_params(rows, s, to + s.stage_value_params);
    }
    Base::copy_tile_positions(rows, s, to);
  }

  // Of each 32 rows their group's, whatever other rows share them.
  __device__ __forceinline__ void copy_key_params(const TileRows& rows, const KvlarSegment& s, ptx::smem to) const {
    const KvlarPool& pool = s.keys;
    const char* base = shared.keys[rows.segment] + pool.params_offset;
    const int mask = (1 << s.rows.page_rows_log2) - 1;
#pragma unroll 1
    for (int i = lane; i < int(s.tile_rows) / 32 * kChunks; i += 32) {
      const int part = i / kChunks, c = i % kChunks;
      const uint32_t group = uint32_t((rows.row + 32 * part) & mask) / s.key_format.group;
      const char* source = base + int64_t(rows.page(2 * part)) * pool.page_stride + uint64_t(group) * pool.params_stride + 16 * c;
      const bool exists = 32 * part < rows.valid && 4 * c < int(p.head_dim);
      ptx::cp_async16(to + uint32_t(16 * kChunks * part + channel_chunk_at(c)), source, exists ? 16 : 0);
    }
  }

  // Rows' scales and zeros, one after the other.
  __device__ __forceinline__ void copy_value_params(const TileRows& rows, const KvlarSegment& s, ptx::smem to) const {
    const KvlarPool& pool = s.values;
    const char* base = shared.values[rows.segment] + pool.params_offset;
    const int mask = (1 << s.rows.page_rows_log2) - 1, count = scales_a_row(s);
#pragma unroll 1
    for (int r = lane; r < int(s.tile_rows); r += 32) {
      const char* source = base + int64_t(rows.page(r / 16)) * pool.page_stride + uint64_t(uint32_t((rows.row + r) & mask)) * pool.params_stride;
      for (int i = 0; i < count; ++i) ptx::cp_async4(to + uint32_t(4 * (r * count + i)), source + 4 * i, r < rows.valid ? 4 : 0);
    }
  }

  __device__ __forceinline__ int scales_a_row(const KvlarSegment& s) const { return int(p.value_dim / s.value_format.group); }

  // ---- one tile

  __device__ __forceinline__ void consume(const TileRows& rows, int stage) {
    const KvlarSegment& segment = p.segments[rows.segment];
    const unsigned char* tile = ring + stage * p.stage_bytes;
    if (kKeys < 0 && !Base::holds_codes(segment)) {
      Base::consume_dense(tile, segment, rows);
      return;
    }
#pragma unroll 1
    for (int row = 0; row < rows.valid; row += 32) consume_codes(tile, segment, rows, row);
  }

  // 32 rows from `row` of the tile on.
  __device__ __forceinline__ void consume_codes(const unsigned char* tile, const KvlarSegment& segment, const TileRows& rows, int row) {
    float s[2][1][4];
    const unsigned char* params = tile + segment.stage_key_params + row / 32 * (16 * kChunks);
    if (key_codec() == KVLAR_CODEC_INT4_CHANNEL) ChannelScores<D, 4>::score(s, tile, params, row, coded.b);
    else ChannelScores<D, 2>::score(s, tile, params, row, coded.b);
    const float scale = p.softcap > 0.f ? p.scale : p.scale * kLog2E;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[b][0][e] *= coded.scale[0][e % 2] * scale;
    attend::soft_cap_logits(s, p);
    const int first = shared.unit.first_row[rows.segment] + rows.row;
    TileRows part = rows;
    part.valid = rows.valid - row;
    const bool whole = Base::all_visible(part, first + row, 32);
    if (!whole) Base::hide(s, tile + segment.stage_positions, segment, rows, row, first);
    uint32_t weights[2][1][2];
    attend::weigh<__half>(weights, state, s);
    const typename Values::Params scales = {tile + segment.stage_value_params, scales_a_row(segment), int(segment.value_format.group)};
    if (whole) {
      add_values(tile + segment.stage_values, row, weights, [&](int r, int j) { return Values::scales(scales, r, j); });
    } else {
      spread_broken_rows(s, scales, row);
      add_values(tile + segment.stage_values, row, weights, [&](int r, int j) { return without_nan(Values::scales(scales, r, j)); });
    }
  }

  template <class Scales>
  __device__ __forceinline__ void add_values(const unsigned char* values, int row, const uint32_t (&weights)[2][1][2], const Scales& scales) {
    if (value_codec() == KVLAR_CODEC_INT4) Values::template add<4>(state.o, values, row, weights, scales);
    else if (value_codec() == KVLAR_CODEC_INT2) Values::template add<2>(state.o, values, row, weights, scales);
    else Values::template add<8>(state.o, values, row, weights, scales);
  }

  // ---- rows that decode to NaN: a weight of 0 would not undo it for the columns that do not see them

  __device__ static __forceinline__ bool is_nan(uint32_t param) { return (param & 0x7fffu) > 0x7c00u; }
  __device__ static __forceinline__ uint32_t clean(uint32_t scales, uint32_t x) {
    const uint32_t keep = ((scales & 0x7fffu) > 0x7c00u ? 0u : 0xffffu) | ((scales >> 16 & 0x7fffu) > 0x7c00u ? 0u : 0xffff0000u);
    return x & keep;
  }
  __device__ static __forceinline__ PairScales without_nan(PairScales by) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      by.zero[h] = clean(by.scale[h], by.zero[h]);
      by.scale[h] = clean(by.scale[h], by.scale[h]);
    }
    return by;
  }

  // Columns that see such a row have NaN in the dimensions it has it in.
  __device__ __forceinline__ void spread_broken_rows(const float (&s)[2][1][4], const typename Values::Params& scales, int row) {
    bool broken = false;  // among the lane's share of the rows
    for (int i = lane; i < 32 * scales.count; i += 32) broken = broken || is_nan(scales.at(row, i));
    if (!__any_sync(0xffffffffu, broken)) return;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll 1
        for (int g = 0; g < 8; ++g)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const bool seen = __shfl_sync(0xffffffffu, s[b][0][2 * h + e], 4 * g + at.c) != -INFINITY;
#pragma unroll
            for (int i = 0; i < D / 16; ++i)
              if (seen && is_nan(scales.at(row + 16 * b + 8 * h + g, scales.index(i / (Values::kWide / 2), at.g))))
                state.o[i][0][e] = state.o[i][0][e + 2] = quiet_nan();
          }
  }

  __device__ void take(int first, int end) { attend::take_tiles(*this, kWarps, first, end); }
  __device__ void finish() {}
};

}  // namespace kvlar::attend_quantized
