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
  using Base::at, Base::lane, Base::p, Base::shared, Base::stage_at, Base::state;
  using Values = GroupedValues<D>;
  static constexpr int kWarps = Base::kWarps, kChunks = D / 4;  // 16-byte chunks of a group's scales and zeros

  Queries<D, 1> coded;

  __device__ WarpChannels(const KvlarAttend& params, attend::SharedUnit& unit, unsigned char* raw) : Base(params, unit, raw) {}

  __device__ __forceinline__ uint32_t key_codec() const { return kKeys < 0 ? p.key_codec : uint32_t(kKeys); }
  __device__ __forceinline__ uint32_t value_codec() const { return kValues < 0 ? p.value_codec : uint32_t(kValues); }

  __device__ void prepare() {
    Base::prepare_queries(coded, [&](float* scratch) {
      if (key_codec() == KVLAR_CODEC_INT4_CHANNEL) coded.prepare(scratch, *this, ChannelKeys<D, 4>{});
      else coded.prepare(scratch, *this, ChannelKeys<D, 2>{});
    });
  }

  __device__ void start() {
    Base::load_positions();
    state.clear();
  }

  // ---- rows

  // Groups of codes lie in one page: a lane whose block has no row may still fetch what scales the block before.
  __device__ __forceinline__ void find(int tile, LaneRows& rows) const {
    Base::place_tile(tile, rows);
    const KvlarSegment& s = p.segments[rows.segment];
    Base::find_page(rows, lane * int(s.tile_rows) / 32 & (Base::holds_codes(s) ? ~31 : ~15));
  }
  __device__ __forceinline__ void issue(const LaneRows& rows, int stage) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem to = ptx::to_smem(stage_at(stage));
    with_lane(lane, s.tile_rows, [&](auto mine) {
      const BlockPage keys = Base::page_at(mine, rows, s, false), values = Base::page_at(mine, rows, s, true);
      Base::copy_side(mine, rows, s, false, key_codec(), keys, to);
      Base::copy_side(mine, rows, s, true, value_codec(), values, to + s.stage_values);
      if (Base::holds_codes(s)) {
        copy_key_params(mine, rows, s, keys, to + s.stage_key_params);
        // Rows' scales and zeros, one after the other.
        copy_words(mine, to + s.stage_value_params, values.at(s.values.params_stride, s.values.params_offset), s.values.params_stride, rows.valid,
                   scales_a_row(s));
      }
      Base::copy_positions(mine, rows, s, to);
    });
  }

  // Of each 32 rows their group's, whatever other rows share them. Pages hold whole groups: both blocks have one page.
  template <int kLanes>
  __device__ __forceinline__ void copy_key_params(BlockLane<kLanes> mine, const LaneRows& rows, const KvlarSegment& s, const BlockPage& page,
                                                  ptx::smem to) const {
    const KvlarPool& pool = s.keys;
    const int part = mine.first / 32, half = mine.first / 16 % 2;
    const uint32_t group = (page.row - 16 * half) / s.key_format.group;
    const char* source = page.data + pool.params_offset + uint64_t(group) * pool.params_stride;
#pragma unroll
    for (int i = 0; i < kChunks; i += 2 * kLanes) {
      const int c = i + kLanes * half + mine.place;
      const bool exists = 32 * part < rows.valid && 4 * c < int(p.head_dim);
      if (c < kChunks) ptx::cp_async16(to + uint32_t(16 * kChunks * part + channel_chunk_at(c)), source + 16 * c, exists ? 16 : 0);
    }
  }

  __device__ __forceinline__ int scales_a_row(const KvlarSegment& s) const { return int(p.value_dim / s.value_format.group); }

  // ---- one tile

  __device__ __forceinline__ void consume(const TilePlace& rows, int stage) {
    const KvlarSegment& segment = p.segments[rows.segment];
    const unsigned char* tile = stage_at(stage);
    if (kKeys < 0 && !Base::holds_codes(segment)) {
      Base::consume_dense(tile, segment, rows);
      return;
    }
#pragma unroll 1
    for (int row = 0; row < rows.valid; row += 32) consume_codes(tile, segment, rows, row);
  }

  // 32 rows from `row` of the tile on.
  __device__ __forceinline__ void consume_codes(const unsigned char* tile, const KvlarSegment& segment, const TilePlace& rows, int row) {
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
    const int first = shared.unit().first_row[rows.segment] + rows.row;
    TilePlace part = rows;
    part.valid = rows.valid - row;
    const bool whole = Base::all_visible(part, first + row, 32);
    if (!whole) Base::hide(s, tile + segment.stage_positions, segment, rows, row, first);
    uint32_t weights[2][1][2];
    attend::weigh<__half>(weights, state, s);
    const typename Values::Params scales = {const_cast<unsigned char*>(tile) + segment.stage_value_params, scales_a_row(segment), int(segment.value_format.group)};
    if (!whole) isolate_broken_rows(s, scales, row);
    add_values(tile + segment.stage_values, row, weights, scales);
  }

  __device__ __forceinline__ void add_values(const unsigned char* values, int row, const uint32_t (&weights)[2][1][2],
                                             const typename Values::Params& params) {
    const auto scales = [&](int r, int j) { return Values::scales(params, r, j); };
    if (value_codec() == KVLAR_CODEC_INT4) Values::template add<4>(state.o, values, row, weights, scales);
    else if (value_codec() == KVLAR_CODEC_INT2) Values::template add<2>(state.o, values, row, weights, scales);
    else Values::template add<8>(state.o, values, row, weights, scales);
  }

  // ---- rows that decode to NaN: a weight of 0 would not undo it for the columns that do not see them

  __device__ static __forceinline__ bool is_nan(uint32_t param) { return (param & 0x7fffu) > 0x7c00u; }

  // Columns that see such a row have NaN in the dimensions it has it in; for all, its scales and zeros become 0, in the warp's
  // own copy.
  __device__ __forceinline__ void isolate_broken_rows(const float (&s)[2][1][4], const typename Values::Params& scales, int row) {
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
    __syncwarp();  // all have read them
    for (int i = lane; i < 32 * scales.count; i += 32)
      if (is_nan(scales.at(row, i))) scales.clear(row, i);
    __syncwarp();
  }

  __device__ void take(int first, int end) { attend::take_tiles(*this, kWarps, first, end); }
  __device__ void finish() {}
};

}  // namespace kvlar::attend_quantized
