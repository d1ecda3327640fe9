// One warp's part of decode attention over rows that are stored as they are: queries in registers, tiles of rows through
// a private ring of cp.async stages, online softmax of the packed columns. See attend.cuh for the whole.
#pragma once
#include "attend/columns.cuh"
#include "attend/dense_tile.cuh"
#include "attend/state.cuh"

namespace kvlar::attend {

// T: type of q and of rows. NT: column tiles of 8.
template <int D, int NT, class T> struct WarpAttend : Columns<NT> {
  using Base = Columns<NT>;
  using Base::at, Base::lane, Base::p, Base::shared, Base::warp;
  using Tiles = Tiling<D>;
  using Rows = TileRows;
  using Dims = OutputDims<D, false>;
  static constexpr int kDim = D, kTiles = NT, kWarps = Tiles::kWarps, kThreads = Tiles::kThreads, kLeastShared = Tiles::kLeastShared;
  static constexpr int kSteps = D / 16, kBlocks = Tiles::kRows / 16;
  static constexpr bool kPrepares = false;

  unsigned char* const ring;
  const ptx::smem ring_s;
  uint32_t q[kSteps][NT][2];  // B fragments, dims in order
  ColumnState<D, NT> state;

  __device__ WarpAttend(const KvlarAttend& params, SharedUnit& unit, unsigned char* raw)
      : Base(params, unit), ring(raw + (threadIdx.x / 32) * params.stages * Tiles::kStageBytes), ring_s(ptx::to_smem(ring)) {}

  __device__ void start() {
    Base::load_queries(q);
    Base::load_positions();
    state.clear();
  }
  __device__ void finish() {}

  // ---- rows

  __device__ __forceinline__ void place_tile(int tile, TilePlace& rows) const {
    Base::place(tile, rows, [](int) { return Tiles::kRows; });
  }
  __device__ __forceinline__ void find(int tile, Rows& rows) const {
    place_tile(tile, rows);
    Base::template find_pages<kBlocks>(rows);
  }

  template <bool kGuarded> __device__ __forceinline__ void copy_tile(const TileRows& rows, ptx::smem stage, const KvlarSegment& s) const {
    const int mask = (1 << s.rows.page_rows_log2) - 1;
    copy_rows<D / 8, Tiles::kRows, DenseLayout<D>, kGuarded>(lane, stage, shared.keys[rows.segment], s.keys, rows, mask, int(p.head_dim) / 8);
    copy_rows<D / 8, Tiles::kRows, DenseLayout<D>, kGuarded>(lane, stage + Tiles::kValues, shared.values[rows.segment], s.values, rows, mask,
                                                             int(p.value_dim) / 8);
  }

  __device__ __forceinline__ void issue(const TileRows& rows, int stage) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem to = ring_s + uint32_t(stage * Tiles::kStageBytes);
    const bool whole = rows.valid == Tiles::kRows && int(p.head_dim) == D && int(p.value_dim) == D;
    if (whole) copy_tile<false>(rows, to, s); else copy_tile<true>(rows, to, s);
    Base::template copy_positions<Tiles::kRows>(rows, to + Tiles::kPositions);
  }

  // ---- one tile

  __device__ __forceinline__ void consume(const TilePlace& rows, int stage) { consume_rows<false>(rows, stage, 0); }

  // With kSome, only rows whose bit of `shown` is set are seen.
  template <bool kSome> __device__ __forceinline__ void consume_rows(const TilePlace& rows, int stage, uint32_t shown) {
    const unsigned char* tile = ring + stage * Tiles::kStageBytes;
    const ptx::smem tile_s = ring_s + uint32_t(stage * Tiles::kStageBytes);
    float s[kBlocks][NT][4] = {};
    DenseTile<D, NT, T>::scores(s, tile_s, q);
    to_logits(s, p);
    const int first = shared.unit().first_row[rows.segment] + rows.row;
    if (!Base::all_visible(rows, first, 16 * kBlocks) || (kSome && ~shown << (32 - Tiles::kRows) != 0)) {
      const bool stored = p.segments[rows.segment].rows.positions != nullptr;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = 16 * b + 8 * h + at.g;
          const bool seen = !kSome || (shown >> r & 1);
          const int position = stored ? *reinterpret_cast<const int32_t*>(tile + Tiles::kPositions + 4 * r) : first + r;
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
              if (!seen || Base::hidden(r, rows.valid, position, n, e)) s[b][n][2 * h + e] = -INFINITY;
        }
    }
    uint32_t weights[kBlocks][NT][2];
    weigh<T>(weights, state, s);
    DenseTile<D, NT, T>::template add_values<false>(state.o, tile + Tiles::kValues, tile_s + Tiles::kValues, weights);
  }

  __device__ void take(int first, int end) { take_tiles(*this, kWarps, first, end); }
};

}  // namespace kvlar::attend
