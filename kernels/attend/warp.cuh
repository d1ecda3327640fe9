// One warp's part of decode attention: queries in registers, tiles of rows through a private ring of
// cp.async stages, online softmax of the packed columns. See attend.cuh for the whole.
#pragma once
#include "attend/copy.cuh"
#include "attend/int8_tile.cuh"
#include "device/softmax.cuh"

namespace kvlar::attend {

// T: type of q and of dense rows. NT: column tiles of 8. kInt8: segments may hold int8 rows.
template <int D, int NT, class T, bool kInt8> struct WarpAttend {
  using Tiles = Tiling<D, kInt8>;
  static constexpr int kColumns = 8 * NT, kSteps = D / 16, kBlocks = Tiles::kMaxRows / 16;
  static constexpr int kWarps = Tiles::kWarps, kThreads = Tiles::kThreads;
  using Dims = OutputDims<D, kInt8>;
  using Rows = TileRows;
  static_assert(kBlocks <= 4, "TileRows holds four pages");

  struct Shared {  // what all warps know of the unit
    Unit unit;
    const char* keys[KVLAR_MAX_SEGMENTS];
    const char* values[KVLAR_MAX_SEGMENTS];
  };

  // Running state of the columns; a lane has columns 2c and 2c + 1 of each tile, over its own rows.
  struct State {
    float o[kSteps][NT][4];
    float top[NT][2], sum[NT][2];
    float weight[NT][4];  // int8: sums of the fp16 weights over all lanes' rows, in [0] and [1]; an accumulator
    float zero[NT][2];    // int8: sums of weight times zero
  };

  const KvlarAttend& p;
  Shared& shared;
  unsigned char* const ring;
  const ptx::smem ring_s;
  const int lane, warp;
  const Lane at;
  uint32_t q[kSteps][NT][2];             // B fragments, dims in order
  uint32_t q8[kInt8 ? kSteps : 1][NT][2];  // the same in fp16 times a power of two, dims as int8_key_dim
  float q8_sum[NT][2], q8_scale[NT][2];  // of this lane's columns
  int q_position[NT][2];
  State state;

  __device__ WarpAttend(const KvlarAttend& params, Shared& unit, unsigned char* raw)
      : p(params), shared(unit), ring(raw + (threadIdx.x / 32) * params.stages * Tiles::kStageBytes), ring_s(ptx::to_smem(ring)),
        lane(int(threadIdx.x) & 31), warp(int(threadIdx.x) >> 5) {}

  // ---- queries

  __device__ bool column_at(int column, int& head, int& row) const {
    const int i = shared.unit.query_tile * kColumns + column;
    row = i / int(p.group);
    head = shared.unit.head * int(p.group) + i % int(p.group);
    return i < int(p.group * p.query_rows);
  }

  __device__ const T* query(int column) const {
    int head, row;
    if (!column_at(column, head, row)) return nullptr;
    return static_cast<const T*>(p.q) + shared.unit.seq * p.q_seq_stride + head * p.q_head_stride + row * p.q_row_stride;
  }

  __device__ static uint32_t two_dims(const T* row, int dim, int head_dim) {
    return row && dim < head_dim ? __ldg(reinterpret_cast<const uint32_t*>(row + dim)) : 0u;
  }

  __device__ void load_queries() {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const T* row = query(8 * n + at.g);
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) q[k][n][h] = two_dims(row, 16 * k + 8 * h + 2 * at.c, int(p.head_dim));
      if constexpr (kInt8) load_scaled_queries(n, row);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int head, s;
        q_position[n][e] = column_at(8 * n + 2 * at.c + e, head, s) ? query_position(p, shared.unit, s) : kMaskedColumn;
      }
    }
  }

  // fp16 holds the dims of a column times a power of two that brings the largest near 1.
  __device__ void load_scaled_queries(int n, const T* row) {
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 x = Half16<T>::unpack(q[k][n][h]);
        largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
      }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const uint32_t exponent = min(max(__float_as_uint(largest) >> 23, 1u), 253u);
    const float scale = __uint_as_float(exponent << 23), inverse = __uint_as_float((254u - exponent) << 23);
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 x = Half16<T>::unpack(two_dims(row, int8_key_dim(k, 8 * h + 2 * at.c), int(p.head_dim)));
        q8[k][n][h] = Half16<__half>::pack(x.x * inverse, x.y * inverse);
        const float2 rounded = Half16<__half>::unpack(q8[k][n][h]);
        sum += rounded.x + rounded.y;
      }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
#pragma unroll
    for (int e = 0; e < 2; ++e) {  // from the lanes of column 2c + e as a B column to those as a D column
      q8_sum[n][e] = __shfl_sync(0xffffffffu, sum, 4 * (2 * at.c + e));
      q8_scale[n][e] = __shfl_sync(0xffffffffu, scale, 4 * (2 * at.c + e));
    }
  }

  // ---- rows

  __device__ __forceinline__ bool holds_int8(int segment) const { return kInt8 && p.segments[segment].codec == KVLAR_CODEC_INT8; }
  __device__ __forceinline__ int height_of(int segment) const { return holds_int8(segment) ? Tiles::kInt8Rows : Tiles::kDenseRows; }

  // Where a tile lies; its pages are looked up by `find_pages`.
  __device__ __forceinline__ void place(int tile, Rows& rows) const {
    const Unit& u = shared.unit;
    rows.segment = 0;
    for (int tiles; rows.segment + 1 < int(p.segment_count) && tile >= (tiles = u.tiles[rows.segment]); ++rows.segment) tile -= tiles;
    const int height = height_of(rows.segment);
    rows.row = tile * height;
    rows.valid = min(height, u.length[rows.segment] - rows.row);
  }

  __device__ __forceinline__ void find(int tile, Rows& rows) const {
    place(tile, rows);
    const KvlarSegment& s = p.segments[rows.segment];
    const int32_t* table = table_of(s.rows, shared.unit.seq, shared.unit.head);
    const auto page = [&](int b) {
      return 16 * b < rows.valid ? page_of(p, s.rows, s.keys.page_count, table, rows.row + 16 * b) : 0;
    };
    rows.page0 = page(0);
    if constexpr (kBlocks > 1) rows.page1 = page(1);
    if constexpr (kBlocks > 2) rows.page2 = page(2);
    if constexpr (kBlocks > 3) rows.page3 = page(3);
  }

  template <bool kGuarded> __device__ __forceinline__ void copy_tile(const Rows& rows, ptx::smem stage, const KvlarSegment& s) const {
    const char *keys = shared.keys[rows.segment], *values = shared.values[rows.segment];
    const int mask = (1 << s.rows.page_rows_log2) - 1;
    if (holds_int8(rows.segment)) {
      constexpr int kRows = Tiles::kInt8Rows;
      copy_rows<D / 16, kRows, Int8KeyLayout<D>, kGuarded>(lane, stage, keys, s.keys, rows, mask, int(p.head_dim + 15) / 16);
      copy_words<kRows>(lane, stage + Tiles::kKeyParams, keys + s.keys.params_offset, s.keys.page_stride, s.keys.params_stride, rows, mask);
      copy_rows<D / 16, kRows, Int8ValueLayout<D>, kGuarded>(lane, stage + Tiles::kValues, values, s.values, rows, mask, int(p.value_dim + 15) / 16);
      copy_words<kRows>(lane, stage + Tiles::kValueParams, values + s.values.params_offset, s.values.page_stride, s.values.params_stride, rows, mask);
    } else {
      constexpr int kRows = Tiles::kDenseRows;
      copy_rows<D / 8, kRows, DenseLayout<D>, kGuarded>(lane, stage, keys, s.keys, rows, mask, int(p.head_dim) / 8);
      copy_rows<D / 8, kRows, DenseLayout<D>, kGuarded>(lane, stage + Tiles::kValues, values, s.values, rows, mask, int(p.value_dim) / 8);
    }
  }

  __device__ __forceinline__ void issue(const Rows& rows, int stage) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem to = ring_s + uint32_t(stage * Tiles::kStageBytes);
    const bool whole = rows.valid == height_of(rows.segment) && int(p.head_dim) == D && int(p.value_dim) == D;
    if (whole) copy_tile<false>(rows, to, s); else copy_tile<true>(rows, to, s);
    if (s.rows.positions) {
      const Unit& u = shared.unit;
      const int32_t* base = s.rows.positions + u.seq * s.rows.position_seq_stride + u.head * s.rows.position_head_stride;
      copy_words<Tiles::kMaxRows>(lane, to + Tiles::kPositions, reinterpret_cast<const char*>(base), int64_t(4) << s.rows.page_rows_log2, 4,
                                  rows, (1 << s.rows.page_rows_log2) - 1);
    }
  }

  // ---- one tile

  // Is row r (of the tile) beyond the end or hidden from column (n, e)?
  __device__ bool hidden(int r, int valid, int position, int n, int e) const {
    const int query = q_position[n][e];
    return r >= valid || position > query || (p.window > 0 && query != kMaskedColumn && query - position >= p.window);
  }

  template <bool kInt8Tile> __device__ __forceinline__ void consume(const unsigned char* tile, ptx::smem tile_s, const Rows& rows) {
    constexpr int kTileBlocks = (kInt8Tile ? Tiles::kInt8Rows : Tiles::kDenseRows) / 16;
    float s[kTileBlocks][NT][4] = {};
    float value_scale[kTileBlocks][2], value_zero[kTileBlocks][2], value_log[kTileBlocks][2];
    const float scale = p.softcap > 0.f ? p.scale : p.scale * kLog2E;
    if constexpr (kInt8Tile) {
      Int8Tile<D, NT>::scores(s, tile, q8);
#pragma unroll
      for (int b = 0; b < kTileBlocks; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = 16 * b + 8 * h + at.g;
          const float2 k = ptx::unpack_f16(*reinterpret_cast<const uint32_t*>(tile + Tiles::kKeyParams + 4 * r));
          const float2 v = ptx::unpack_f16(*reinterpret_cast<const uint32_t*>(tile + Tiles::kValueParams + 4 * r));
          value_scale[b][h] = v.x;
          value_zero[b][h] = v.y;
          value_log[b][h] = fmaxf(ptx::lg2_approx(v.x), -24.f);
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& x = s[b][n][2 * h + e];
              x = fmaf(-1024.f, q8_sum[n][e], x);
              x = fmaf(k.x, x, k.y * q8_sum[n][e]) * (q8_scale[n][e] * scale);
            }
        }
    } else {
      DenseTile<D, NT, T>::scores(s, tile_s, q);
#pragma unroll
      for (int b = 0; b < kTileBlocks; ++b)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[b][n][e] *= scale;
    }
    if (p.softcap > 0.f) {
#pragma unroll
      for (int b = 0; b < kTileBlocks; ++b)
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) s[b][n][e] = soft_cap(s[b][n][e], p.softcap) * kLog2E;
    }
    mask<kInt8Tile, kTileBlocks>(s, value_scale, value_zero, tile, rows);
    weigh<kInt8Tile, kTileBlocks>(s, value_scale, value_zero, value_log, tile, tile_s);
  }

  template <bool kInt8Tile, int kTileBlocks>
  __device__ __forceinline__ void mask(float (&s)[kTileBlocks][NT][4], float (&value_scale)[kTileBlocks][2], float (&value_zero)[kTileBlocks][2],
                                       const unsigned char* tile, const Rows& rows) {
    const Unit& u = shared.unit;
    const bool stored = p.segments[rows.segment].rows.positions != nullptr;
    const int first = u.first_row[rows.segment] + rows.row;
    const bool all_visible = rows.valid == 16 * kTileBlocks && !stored && first + 16 * kTileBlocks - 1 <= u.lowest_query &&
                             (p.window == 0 || u.highest_query - first < p.window);
    if (all_visible) return;
#pragma unroll
    for (int b = 0; b < kTileBlocks; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = 16 * b + 8 * h + at.g;
        const int position = stored ? *reinterpret_cast<const int32_t*>(tile + Tiles::kPositions + 4 * r) : first + r;
        // A row that decodes to NaN is NaN for those who see it alone: a weight of 0 would not undo it for the others.
        const bool broken = kInt8Tile && !(fabsf(value_scale[b][h] + value_zero[b][h]) < INFINITY);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (hidden(r, rows.valid, position, n, e)) s[b][n][2 * h + e] = -INFINITY;
            else if (broken) state.zero[n][e] += value_scale[b][h] + value_zero[b][h];
          }
        if (broken) value_scale[b][h] = value_zero[b][h] = 0.f;
      }
  }

  // Softmax weights of the tile's logits (base 2), and the values they add.
  template <bool kInt8Tile, int kTileBlocks>
  __device__ __forceinline__ void weigh(float (&s)[kTileBlocks][NT][4], const float (&value_scale)[kTileBlocks][2], const float (&value_zero)[kTileBlocks][2],
                        const float (&value_log)[kTileBlocks][2], const unsigned char* tile, ptx::smem tile_s) {
    float top[NT][2];
    bool raise = false;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        top[n][e] = state.top[n][e];
#pragma unroll
        for (int b = 0; b < kTileBlocks; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h)  // int8: weights are 2^(x - top) * scale in fp16, so that product is bounded
            top[n][e] = fmaxf(top[n][e], kInt8Tile ? s[b][n][2 * h + e] + value_log[b][h] : s[b][n][2 * h + e]);
        raise = raise || top[n][e] > state.top[n][e] + kHeadroom;
      }
    if (__any_sync(0xffffffffu, raise)) rescale(top);
    uint32_t weights[kTileBlocks][NT][2];
#pragma unroll
    for (int b = 0; b < kTileBlocks; ++b)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float w[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            w[e] = ptx::ex2_approx(s[b][n][2 * h + e] - state.top[n][e]);
            state.sum[n][e] += w[e];
            if constexpr (kInt8Tile) {
              state.zero[n][e] = fmaf(w[e], value_zero[b][h], state.zero[n][e]);
              w[e] *= value_scale[b][h];
            }
          }
          using Weight = typename WeightType<kInt8Tile>::type;
          weights[b][n][h] = ptx::movmatrix_trans(Half16<Weight>::pack(w[0], w[1]));
        }
    if constexpr (kInt8Tile) {  // sums of the weights as rounded: a product with ones
      constexpr uint32_t kOne = 0x3c003c00u, ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
      for (int b = 0; b < kTileBlocks; ++b)
#pragma unroll
        for (int n = 0; n < NT; ++n) Half16<__half>::mma(state.weight[n], ones, weights[b][n]);
    }
    if constexpr (kInt8Tile) Int8Tile<D, NT>::add_values(state.o, tile + Tiles::kValues, weights);
    else DenseTile<D, NT, T>::template add_values<kInt8>(state.o, tile + Tiles::kValues, tile_s + Tiles::kValues, weights);
  }
  template <bool kInt8Tile, class = void> struct WeightType { using type = T; };
  template <class Any> struct WeightType<true, Any> { using type = __half; };

  __device__ void rescale(const float (&seen)[NT][2]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float top = column_max(seen[n][e]), factor = ptx::ex2_approx(state.top[n][e] - top);
        state.top[n][e] = top;
        state.sum[n][e] *= factor;
        if constexpr (kInt8) {
          state.weight[n][e] *= factor;
          state.zero[n][e] *= factor;
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
          state.o[i][n][e] *= factor;
          state.o[i][n][e + 2] *= factor;
        }
      }
  }

  // ---- one warp's tiles of a share

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        state.top[n][e] = kFloor;
        state.sum[n][e] = state.zero[n][e] = 0.f;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) state.weight[n][e] = 0.f;
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) state.o[i][n][e] = 0.f;
    }
  }

  // Tiles first + warp, first + warp + kWarps, ... below end.
  __device__ void take_tiles(int first, int end) {
    const int stages = int(p.stages);
    int issued = first + warp, stage = 0;
    Rows next{};
    if (issued < end) find(issued, next);
#pragma unroll 1
    for (int i = 0; i < stages - 1; ++i) {
      if (issued < end) {
        issue(next, i);
        issued += kWarps;
        if (issued < end) find(issued, next);
      }
      ptx::cp_async_commit();
    }
    for (int tile = first + warp; tile < end; tile += kWarps) {
      if (stages == 3) ptx::cp_async_wait<1>(); else ptx::cp_async_wait<0>();
      __syncwarp();  // every lane's copies of this stage have landed, and every lane is done with the one before
      Rows rows{};
      place(tile, rows);
      if (issued < end) {
        issue(next, stage == 0 ? stages - 1 : stage - 1);
        issued += kWarps;
        if (issued < end) find(issued, next);  // its page ids arrive while this tile is computed
      }
      ptx::cp_async_commit();
      const unsigned char* data = ring + stage * Tiles::kStageBytes;
      const ptx::smem data_s = ring_s + uint32_t(stage * Tiles::kStageBytes);
      if (holds_int8(rows.segment)) consume<kInt8>(data, data_s, rows);
      else consume<false>(data, data_s, rows);
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
  }
};

}  // namespace kvlar::attend
