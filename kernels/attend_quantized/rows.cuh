// What warps of decode attention over quantized rows share: their ring of tiles, and the rows that are stored as they are
// beside them.
#pragma once
#include "attend/columns.cuh"
#include "attend/dense_tile.cuh"
#include "attend/state.cuh"
#include "attend_quantized/copy.cuh"
#include "attend_quantized/queries.cuh"

namespace kvlar::attend_quantized {

template <int D, int NT> struct WarpRows : attend::Columns<NT> {
  using Base = attend::Columns<NT>;
  using Rows = LaneRows;
  using Base::at, Base::find_page, Base::lane, Base::p, Base::shared;
  using Dims = attend::OutputDims<D, true>;
  static constexpr int kDim = D, kTiles = NT, kWarps = attend::warps_of(D), kThreads = 32 * kWarps, kSteps = D / 16;
  static constexpr int kDenseRows = attend::Tiling<D>::kRows, kDenseBlocks = kDenseRows / 16;
  static constexpr int kLeastShared = kWarps * 8 * NT * (D + 6) * 4;  // the merge needs it, the launcher allocates it
  static constexpr bool kPrepares = true;
  static constexpr int kLeastStage = 32 * D;  // bytes: 64 rows of 2 bits
  static_assert(Queries<D, NT>::kScratchFloats * 4 <= kWarps * kLeastStage, "queries are prepared in the last stages");

  unsigned char* const memory;  // the CTA's: [stage][warp]
  attend::ColumnState<D, NT> state;

  __device__ WarpRows(const KvlarAttend& params, attend::SharedUnit& unit, unsigned char* raw)
      : Base(params, unit), memory(raw) {}

  __device__ __forceinline__ unsigned char* stage_at(int stage) const { return memory + (stage * kWarps + Base::warp) * p.stage_bytes; }

  // Queries, for fragments: `prepare(scratch)` by all warps, which is what the last stages are until then.
  template <class Prepare> __device__ __forceinline__ void prepare_queries(Queries<D, NT>& coded, Prepare prepare) const {
    float* const scratch = reinterpret_cast<float*>(memory + (p.stages - 1) * kWarps * p.stage_bytes);
    prepare(scratch);
    __syncthreads();
    coded.load_fragments(scratch);
    __syncthreads();
  }

  // ---- rows

  __device__ __forceinline__ bool holds_codes(const KvlarSegment& s) const { return s.key_format.codec > KVLAR_CODEC_F16; }

  __device__ __forceinline__ void place_tile(int tile, TilePlace& rows) const {
    Base::place(tile, rows, [this](int segment) { return int(p.segments[segment].tile_rows); });
  }
  __device__ __forceinline__ void find(int tile, Rows& rows) const {
    place_tile(tile, rows);
    find_page(rows, lane * int(p.segments[rows.segment].tile_rows) / 32 & ~15);
  }

  __device__ static __forceinline__ int bits_of(uint32_t codec) {  // of a code
    return codec == KVLAR_CODEC_INT4 || codec == KVLAR_CODEC_INT4_CHANNEL ? 4 : codec == KVLAR_CODEC_INT2 || codec == KVLAR_CODEC_INT2_CHANNEL ? 2 : 8;
  }

  // The page of the lane's block of keys or values.
  template <int kLanes>
  __device__ __forceinline__ BlockPage page_at(BlockLane<kLanes> mine, const Rows& rows, const KvlarSegment& s, bool values) const {
    return {values ? shared.values[rows.segment] : shared.keys[rows.segment], values ? s.values.page_stride : s.keys.page_stride, rows, mine.first,
            int(s.rows.page_rows_log2)};
  }

  // Keys or values of a tile, without what scales them; `codec`: of those that are codes.
  template <int kLanes>
  __device__ __forceinline__ void copy_side(BlockLane<kLanes> mine, const Rows& rows, const KvlarSegment& s, bool values, uint32_t codec,
                                            const BlockPage& page, ptx::smem to) const {
    constexpr int kRows = 16 * (32 / kLanes);
    const KvlarPool& pool = values ? s.values : s.keys;
    const int dim = values ? int(p.value_dim) : int(p.head_dim);
    if constexpr (kRows == kDenseRows)
      if (!holds_codes(s)) return copy_dense(rows, to, values ? shared.values[rows.segment] : shared.keys[rows.segment], pool, s, dim);
    if constexpr (kRows >= 32) {
      const char* block = page.at(pool.row_stride);
      const int bits = bits_of(codec);
      if (rows.valid < kRows || dim != D)
        copy_part(mine, to, block, pool.row_stride, rows.valid, log_chunks<D>(bits), (dim * bits / 8 + 15) / 16);
      else if (bits == 4) copy_whole<log_chunks<D>(4)>(mine, to, block, pool.row_stride);
      else if (bits == 8) copy_whole<log_chunks<D>(8)>(mine, to, block, pool.row_stride);
      else copy_whole<log_chunks<D>(2)>(mine, to, block, pool.row_stride);
    }
  }

  __device__ __forceinline__ void copy_dense(const Rows& rows, ptx::smem to, const char* base, const KvlarPool& pool, const KvlarSegment& s, int dim) const {
    const int mask = (1 << s.rows.page_rows_log2) - 1;
    const attend::TileRows all = all_pages(rows);
    if (rows.valid == kDenseRows && dim == D)
      attend::copy_rows<D / 8, kDenseRows, attend::DenseLayout<D>, false>(lane, to, base, pool, all, mask, dim / 8);
    else
      attend::copy_rows<D / 8, kDenseRows, attend::DenseLayout<D>, true>(lane, to, base, pool, all, mask, dim / 8);
  }

  template <int kLanes>
  __device__ __forceinline__ void copy_positions(BlockLane<kLanes> mine, const Rows& rows, const KvlarSegment& s, ptx::smem to) const {
    const KvlarRows& r = s.rows;
    if (!r.positions) return;
    const attend::Unit& u = shared.unit();
    const int32_t* base = r.positions + u.seq * r.position_seq_stride + u.head * r.position_head_stride;
    const BlockPage page(reinterpret_cast<const char*>(base), int64_t(4) << r.page_rows_log2, rows, mine.first, int(r.page_rows_log2));
    copy_words(mine, to + s.stage_positions, page.at(4), 4, rows.valid);
  }

  // ---- rows that are stored as they are

  __device__ __forceinline__ void consume_dense(const unsigned char* tile, const KvlarSegment& segment, const TilePlace& rows) {
    if (p.q_dtype == KVLAR_DTYPE_F16) consume_dense_as<__half>(tile, segment, rows); else consume_dense_as<__nv_bfloat16>(tile, segment, rows);
  }

  template <class T> __device__ __forceinline__ void consume_dense_as(const unsigned char* tile, const KvlarSegment& segment, const TilePlace& rows) {
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
    const int first = shared.unit().first_row[rows.segment] + rows.row;
    if (!Base::all_visible(rows, first, kDenseRows)) hide(s, tile + segment.stage_positions, segment, rows, 0, first);
    uint32_t weights[kDenseBlocks][NT][2];
    attend::weigh<T>(weights, state, s);
    attend::DenseTile<D, NT, T>::template add_values<true>(state.o, tile + segment.stage_values, tile_s + segment.stage_values, weights);
  }

  // Hides rows from the columns that must not see them, of the blocks from row `row` of the tile on.
  template <int kBlocks>
  __device__ __forceinline__ void hide(float (&s)[kBlocks][NT][4], const unsigned char* positions, const KvlarSegment& segment, const TilePlace& rows,
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
};

}  // namespace kvlar::attend_quantized
