// One warp's part: tiles of rows through a private ring of two stages, scores, online softmax, sums of values.
//
// Two stages suffice: a latent tile is computed for longer (about 1.5 us, two warps a scheduler) than memory takes to answer.
#pragma once
#include "attend_lowrank/copy.cuh"
#include "attend_lowrank/scores.cuh"
#include "attend_lowrank/values.cuh"

namespace kvlar::attend_lowrank {

struct Tiles {
  int first, end;
};

template <class T, int NT, int V, int kLatent> struct Warp {
  static constexpr bool kInt8 = kLatent != KVLAR_LATENT_DTYPE;
  using Scoring = Scores<T, NT, kLatent>;
  using State = ColumnState<NT, V>;

  const KvlarAttendLowrank& lowrank;
  const KvlarAttend& p;
  const Unit& unit;
  unsigned char* const shared;  // the CTA's dynamic shared memory
  const int lane;
  const Lane at;
  const Scoring scoring;
  State state;

  __device__ Warp(const KvlarAttendLowrank& params, const Unit& u, unsigned char* dynamic)
      : lowrank(params), p(params.attend), unit(u),
        shared(dynamic), lane(int(threadIdx.x) & 31), scoring(params, u, dynamic) {}

  // The warp's part of it; worked out anew, since registers are scarce.
  __device__ __forceinline__ unsigned char* memory() const {
    return shared + lowrank.shared.warps + (ptx::unknown(int(threadIdx.x)) / 32) * lowrank.shared.warp_bytes;
  }

  __device__ __forceinline__ unsigned char* stage_memory(int stage) const {
    return memory() + lowrank.shared.warp_ring + stage * lowrank.shared.stage_bytes;
  }

  // ---- rows

  // Where tile `tile` of the latent (or of one head's exact) rows lies, and its pages.
  template <int kRows> __device__ __forceinline__ TileRows find(int tile, bool latent, int head) const {
    TileRows rows{};
    FOR_EACH_SEGMENT(p, s) {
      if (is_latent(p, s) != latent || tile < 0) continue;
      if (tile < unit.tiles[s]) {
        rows.segment = s;
        rows.row = (unit.first_tile[s] + tile) * kRows;
        rows.valid = min(kRows, (latent ? unit.longest[s] : unit.length[s][head]) - rows.row);  // below 1: no row of this head
      }
      tile -= unit.tiles[s];
    }
    const KvlarSegment& s = p.segments[rows.segment];
    const int32_t* table = attend::table_of(s.rows, unit.seq, row_owner(p, unit, rows.segment, head));
    const auto page = [&](int b) { return 16 * b < rows.valid ? page_of(p, s.rows, pages_of(s), table, rows.row + 16 * b) : 0; };
    rows.page0 = page(0);
    if (kRows > 16) rows.page1 = page(1);
    return rows;
  }

  template <int kRows> __device__ __forceinline__ void issue_positions(const TileRows& rows, ptx::smem stage, int owner) const {
    const KvlarRows& r = p.segments[rows.segment].rows;
    if (!r.positions) return;
    const int32_t* base = r.positions + unit.seq * r.position_seq_stride + owner * r.position_head_stride;
    attend::copy_words<kRows>(lane, stage + lowrank.shared.stage_positions, reinterpret_cast<const char*>(base),
                              int64_t(4) << r.page_rows_log2, 4, rows, (1 << r.page_rows_log2) - 1);
  }

  __device__ static const char* head_rows(const KvlarPool& pool, int seq, int head) {
    return static_cast<const char*>(pool.data) + seq * pool.seq_stride + head * pool.head_stride;
  }

  // 16-bit rows of `width` values.
  template <int kRows>
  __device__ __forceinline__ void issue_wide(const TileRows& rows, ptx::smem to, const KvlarPool& pool, int head, int first, int width) const {
    const int page_mask = (1 << p.segments[rows.segment].rows.page_rows_log2) - 1, chunks = wide_chunks(width);
    copy_rows<kRows, 4>(lane, to, head_rows(pool, unit.seq, head) + 2 * first, pool, rows, page_mask, width / 8, chunks);
  }

  __device__ __forceinline__ int slice_first(int slice) const { return slice * int(lowrank.slice_width); }
  // Values that a pass sums: of a slice of the latents, or dense ones.
  __device__ __forceinline__ int slice_values(int slice) const {
    return lowrank.value_rank ? min(int(lowrank.slice_width), int(lowrank.value_rank) - slice_first(slice)) : int(p.value_dim);
  }

  __device__ __forceinline__ void issue_latent(const TileRows& rows, int stage_index, int slice) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem stage = ptx::to_smem(stage_memory(stage_index));
    const int page_mask = (1 << s.rows.page_rows_log2) - 1, chunks = Scoring::Latents::chunks(int(lowrank.key_rank));
    const char* keys = head_rows(s.keys, unit.seq, unit.key_group);
    if constexpr (kInt8) {
      copy_rows<kLatentRows, 2>(lane, stage, keys, s.keys, rows, page_mask, chunks, chunks);
      attend::copy_words<kLatentRows>(lane, stage + lowrank.shared.stage_key_params, keys + s.keys.params_offset, s.keys.page_stride,
                                      s.keys.params_stride, rows, page_mask);
    } else {
      copy_rows<kLatentRows, 4>(lane, stage, keys, s.keys, rows, page_mask, chunks, chunks);
    }
    const ptx::smem to = stage + lowrank.shared.stage_values;
    const int width = slice_values(slice);
    if (!lowrank.value_rank) {
      const uint32_t bytes = uint32_t(kLatentRows * 16 * wide_chunks(width));
      for (int h = 0; h < unit.heads; ++h) issue_wide<kLatentRows>(rows, to + h * bytes, s.values, unit.head[h], 0, width);
    } else if (kInt8 && s.value_format.codec == KVLAR_CODEC_INT8) {
      const char* values = head_rows(s.values, unit.seq, unit.value_group);
      copy_rows<kLatentRows, 2>(lane, to, values + slice_first(slice), s.values, rows, page_mask, width / 16, width / 16);
      attend::copy_words<kLatentRows>(lane, stage + lowrank.shared.stage_value_params, values + s.values.params_offset,
                                      s.values.page_stride, s.values.params_stride, rows, page_mask);
    } else {
      issue_wide<kLatentRows>(rows, to, s.values, unit.value_group, slice_first(slice), width);
    }
    issue_positions<kLatentRows>(rows, stage, unit.key_group);
  }

  __device__ __forceinline__ void issue_exact(const TileRows& rows, int stage_index, int head) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem stage = ptx::to_smem(stage_memory(stage_index));
    issue_wide<kExactRows>(rows, stage, s.keys, unit.head[head], 0, int(p.head_dim));
    issue_wide<kExactRows>(rows, stage + lowrank.shared.stage_values, s.values, unit.head[head], 0, int(p.value_dim));
    issue_positions<kExactRows>(rows, stage, unit.head[head]);
  }

  // ---- latent tiles

  __device__ __forceinline__ void consume_latent(const TileRows& rows, int stage_index, int slice) {
    const unsigned char* tile = stage_memory(stage_index);
    const ptx::smem tile_s = ptx::to_smem(stage_memory(stage_index));
    const KvlarSegment& segment = p.segments[rows.segment];
    const int* positions = segment.rows.positions ? reinterpret_cast<const int*>(tile + lowrank.shared.stage_positions) : nullptr;
    // Rows in a row (as they mostly are) share the table of turns, wherever they are.
    const int first = positions ? positions[0] : unit.first_row[rows.segment][0] + rows.row;
    const bool in_a_row = !positions || __all_sync(0xffffffffu, lane >= rows.valid || positions[lane] == first + lane);
    scoring.turn_queries(memory(), in_a_row ? first : 0);
    float s[2][NT][4] = {};
    scoring.template add<(NT * V > 128 || kLatent == KVLAR_LATENT_INT8_BASIS)>(s, tile_s, memory(), tile + lowrank.shared.stage_key_params, in_a_row ? nullptr : positions);
    to_logits(s, p);
    const bool all_visible = !positions && rows.row + kLatentRows <= unit.shortest[rows.segment] && first + kLatentRows - 1 <= unit.lowest_query &&
                             (p.window == 0 || unit.highest_query - first < p.window);
    if (!all_visible) hide(s, p, unit, rows.segment, rows.row, positions, -1, at);
    const int width = slice_values(slice);
    const unsigned char* values = tile + lowrank.shared.stage_values;
    const ptx::smem values_s = tile_s + lowrank.shared.stage_values;
    Weights<2, NT> weights;
    if constexpr (kInt8) {
      if (lowrank.value_rank && segment.value_format.codec == KVLAR_CODEC_INT8) {
        ValueAffine<2> value_affine;
        value_affine.load(tile + lowrank.shared.stage_value_params, s, state, at);
        weigh_int8(weights, state, s, value_affine);
        add_int8_values<NT, V, 2>(state.o, values, SwizzledRows(narrow_chunks(width)), width, weights);
        return;
      }
    }
    weigh<T>(weights, state, s);
    if (lowrank.value_rank) {
      add_values<T, NT, V, 2>(state.o, values_s, SwizzledRows(wide_chunks(width)), width, weights);
    } else {
      const SwizzledRows layout(wide_chunks(width));
      for (int h = 0; h < unit.heads; ++h) {  // each head has values of its own: the weights of the others are 0
        Weights<2, NT> own;
#pragma unroll
        for (int b = 0; b < 2; ++b)
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) own[b][n][i] = scoring.head_of(n) == h ? weights[b][n][i] : 0u;
        add_values<T, NT, V, 2>(state.o, values_s + uint32_t(h * kLatentRows * layout.row_bytes), layout, width, own);
      }
    }
  }

  // ---- exact tiles: 16 rows of one head

  __device__ __forceinline__ void consume_exact(const TileRows& rows, int stage_index, int head) {
    const unsigned char* tile = stage_memory(stage_index);
    const ptx::smem tile_s = ptx::to_smem(stage_memory(stage_index));
    const SwizzledRows layout(wide_chunks(int(p.head_dim)));
    float s[1][NT][4] = {};
    const T* query[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) query[n] = scoring.head_of(n) == head ? query_row(8 * n + at.g) : nullptr;
    for (int k = 0; k < (int(p.head_dim) + 15) / 16; ++k) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, tile_s + uint32_t(layout.at(lane & 15, 2 * k + (lane >> 4))));
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        uint32_t b[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int dim = 16 * k + 8 * h + 2 * at.c;
          b[h] = query[n] && dim < int(p.head_dim) ? __ldg(reinterpret_cast<const uint32_t*>(query[n] + dim)) : 0u;
        }
        Half16<T>::mma(s[0][n], a, b);
      }
    }
    to_logits(s, p);
    const int* positions = p.segments[rows.segment].rows.positions ? reinterpret_cast<const int*>(tile + lowrank.shared.stage_positions) : nullptr;
    hide(s, p, unit, rows.segment, rows.row, positions, head, at);
    Weights<1, NT> weights;
    weigh<T>(weights, state, s);
    const int width = int(p.value_dim);
    add_values<T, NT, V, 1>(state.o, tile_s + lowrank.shared.stage_values, SwizzledRows(wide_chunks(width)), width, weights);
  }

  // None for a column that pads the tile.
  __device__ const T* query_row(int column) const {
    if (column >= unit.columns) return nullptr;
    return static_cast<const T*>(p.q) + unit.seq * p.q_seq_stride + unit.column_query_head[column] * p.q_head_stride +
           unit.column_row[column] * p.q_row_stride;
  }

  // ---- tiles first + warp, first + warp + warps, ... below end, one stage ahead

  // Where the rows of a stage are, behind its positions: in shared memory, since registers are scarce.
  __device__ __forceinline__ int* stage_record(int stage) const {
    return reinterpret_cast<int*>(stage_memory(stage) + lowrank.shared.stage_positions) + kLatentRows;
  }

  template <class Find, class Issue, class Consume>
  __device__ __forceinline__ void take(const Tiles& tiles, Find find_tile, Issue issue, Consume consume) {
    const int warps = int(lowrank.shared.warp_count);
    // The tile at hand and, in bit 0, its stage: one register.
    int at_hand = 2 * (tiles.first + int(threadIdx.x) / 32 - warps) + 1;
    TileRows coming{};  // pages are looked up a tile before the copies need them
    if ((at_hand >> 1) + warps < tiles.end) coming = find_tile((at_hand >> 1) + warps);
    // The round before the first starts its copies and has nothing to consume: copies are a lot of code, once.
#pragma unroll 1
    for (; at_hand >> 1 < tiles.end; at_hand = (at_hand + 2 * warps) ^ 1) {
      ptx::cp_async_wait<0>();
      __syncwarp();  // every lane's copies of this stage have landed, and every lane is done with the one before
      const int tile = at_hand >> 1, next = tile + warps, stage = at_hand & 1;
      if (next < tiles.end) {
        issue(coming, stage ^ 1, next);
        if (lane == 0) {
          int* record = stage_record(stage ^ 1);
          record[0] = coming.segment;
          record[1] = coming.row;
          record[2] = coming.valid;
        }
        if (next + warps < tiles.end) coming = find_tile(next + warps);
      }
      ptx::cp_async_commit();
      if (tile >= tiles.first) {
        const int* record = stage_record(stage);
        TileRows here{};
        here.segment = record[0];
        here.row = record[1];
        here.valid = record[2];
        consume(here, stage, tile);
      }
    }
    ptx::cp_async_wait<0>();
  }

  __device__ void take_exact(const Tiles& tiles) {
    const int heads = unit.heads;
    take(tiles, [&](int i) { return find<kExactRows>(i / heads, false, i % heads); },
         [&](const TileRows& r, int stage, int i) { issue_exact(r, stage, i % heads); },
         [&](const TileRows& r, int stage, int i) { consume_exact(r, stage, i % heads); });
  }

  __device__ void take_latent(int slice, const Tiles& tiles) {
    take(tiles, [&](int i) { return find<kLatentRows>(i, true, 0); },
         [&](const TileRows& r, int stage, int) { issue_latent(r, stage, slice); },
         [&](const TileRows& r, int stage, int) { consume_latent(r, stage, slice); });
  }
};

}  // namespace kvlar::attend_lowrank
