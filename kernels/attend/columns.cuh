// What a warp of decode attention knows of its unit: packed queries, positions, and where tiles of rows lie.
#pragma once
#include "attend/copy.cuh"
#include "attend/work_list.cuh"
#include "device/mma.cuh"

namespace kvlar::attend {

// What all warps of a CTA know.
struct SharedUnit {
  CtaRecord<Unit> work;
  const char* keys[KVLAR_MAX_SEGMENTS];
  const char* values[KVLAR_MAX_SEGMENTS];
  const int32_t* tables[KVLAR_MAX_SEGMENTS];  // of pages; null without

  __device__ const Unit& unit() const { return work.of.unit; }
  // Of the CTA's share: into all of the unit's tiles.
  __device__ int first_tile(const Share& share) const { return unit().first_tile + share.tile; }
  __device__ int tile_end(const Share& share) const { return unit().first_tile + min(share.tile_end, unit().tile_count); }

  // The CTA's first unit, as of the next barrier.
  __device__ void begin(const KvlarAttend& p, int t) {
    begin_work(p, work, t);
    find_rows(p, t);
  }
  // The one that follows, if one does.
  __device__ bool next(const KvlarAttend& p, int t) {
    const bool more = next_work(p, work, t);
    if (more) find_rows(p, t);
    return more;
  }

 private:
  // A lane a segment, of the warp that has read the unit.
  __device__ void find_rows(const KvlarAttend& p, int t) {
    static_assert(WorkList<Unit>::kCtaWords <= 32, "a warp reads all of a record");
    if (t >= 32) return;
    __syncwarp();
    if (t >= int(p.segment_count)) return;
    const KvlarSegment& s = p.segments[t];
    keys[t] = static_cast<const char*>(s.keys.data) + unit().seq * s.keys.seq_stride + unit().head * s.keys.head_stride;
    values[t] = static_cast<const char*>(s.values.data) + unit().seq * s.values.seq_stride + unit().head * s.values.head_stride;
    tables[t] = table_of(s.rows, unit().seq, unit().head);
  }
};

// NT: column tiles of 8.
template <int NT> struct Columns {
  static constexpr int kColumns = 8 * NT;

  const KvlarAttend& p;
  SharedUnit& shared;
  const int lane, warp;
  const Lane at;
  int q_position[NT][2];  // of the lane's columns, 2c and 2c + 1 of each tile

  __device__ Columns(const KvlarAttend& params, SharedUnit& unit)
      : p(params), shared(unit), lane(int(threadIdx.x) & 31), warp(int(threadIdx.x) >> 5) {}

  __device__ bool column_at(int column, int& head, int& row) const {
    const int i = shared.unit().query_tile * kColumns + column;
    row = query_row_of(p, i);
    head = (shared.unit().head - row) * int(p.group) + i;
    return i < int(p.group * p.query_rows);
  }

  // A row of q, 16 bits an element; null for a column that pads the tile.
  __device__ const uint16_t* query(int column) const {
    int head, row;
    if (!column_at(column, head, row)) return nullptr;
    return query_row(head, row);
  }
  __device__ const uint16_t* query_row(int head, int row) const {
    return static_cast<const uint16_t*>(p.q) + shared.unit().seq * p.q_seq_stride + head * p.q_head_stride + row * p.q_row_stride;
  }

  __device__ static uint32_t two_dims(const uint16_t* row, int dim, int head_dim) {
    return row && dim < head_dim ? __ldg(reinterpret_cast<const uint32_t*>(row + dim)) : 0u;
  }

  // B fragments, dims in order.
  template <int kSteps> __device__ void load_queries(uint32_t (&q)[kSteps][NT][2]) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const uint16_t* row = query(8 * n + at.g);
#pragma unroll
      for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int h = 0; h < 2; ++h) q[k][n][h] = two_dims(row, 16 * k + 8 * h + 2 * at.c, int(p.head_dim));
    }
  }

  __device__ void load_positions() {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        int head, s;
        q_position[n][e] = column_at(8 * n + 2 * at.c + e, head, s) ? query_position(s) : kMaskedColumn;
      }
  }

  // When decoding, that of all columns: nothing waits for it.
  __device__ int query_position(int row) const {
    return p.query_rows == 1 ? shared.unit().lowest_query : attend::query_position(p, shared.unit(), row);
  }

  // Is row r (of the tile) beyond the end or hidden from column (n, e)?
  __device__ bool hidden(int r, int valid, int position, int n, int e) const {
    const int query = q_position[n][e];
    return r >= valid || position > query || (p.window > 0 && query != kMaskedColumn && query - position >= p.window);
  }

  // Do all queries see `count` rows from row `first` of all rows on, of which the tile has `valid`?
  __device__ bool all_visible(const TilePlace& rows, int first, int count) const {
    const Unit& u = shared.unit();
    return rows.valid >= count && !p.segments[rows.segment].rows.positions && first + count - 1 <= u.lowest_query &&
           (p.window == 0 || u.highest_query - first < p.window);
  }

  // Where a tile lies; its pages are looked up by `find`. `height_of(segment)`: rows of a tile.
  template <class Height> __device__ __forceinline__ void place(int tile, TilePlace& rows, Height height_of) const {
    const Unit& u = shared.unit();
    rows.segment = 0;
    for (int tiles; rows.segment + 1 < int(p.segment_count) && tile >= (tiles = u.tiles[rows.segment]); ++rows.segment) tile -= tiles;
    const int height = height_of(rows.segment);
    rows.row = tile * height;
    rows.valid = min(height, u.length[rows.segment] - rows.row);
  }

  template <int kBlocks> __device__ __forceinline__ void find_pages(TileRows& rows) const {
    static_assert(kBlocks <= 4, "TileRows holds four pages");
    const KvlarSegment& s = p.segments[rows.segment];
    const int32_t* table = shared.tables[rows.segment];
    const auto page = [&](int b) {
      return 16 * b < rows.valid ? page_of(p, s.rows, s.keys.page_count, table, rows.row + 16 * b) : 0;
    };
    rows.page0 = page(0);
    if constexpr (kBlocks > 1) rows.page1 = page(1);
    if constexpr (kBlocks > 2) rows.page2 = page(2);
    if constexpr (kBlocks > 3) rows.page3 = page(3);
  }

  // The page of the block of rows from row `first` of the tile on.
  template <class Rows> __device__ __forceinline__ void find_page(Rows& rows, int first) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const int32_t* table = shared.tables[rows.segment];
    rows.page = first < rows.valid ? page_of(p, s.rows, s.keys.page_count, table, rows.row + first) : 0;
  }

  template <int kRows> __device__ __forceinline__ void copy_positions(const TileRows& rows, ptx::smem to) const {
    const KvlarRows& r = p.segments[rows.segment].rows;
    if (!r.positions) return;
    const Unit& u = shared.unit();
    const int32_t* base = r.positions + u.seq * r.position_seq_stride + u.head * r.position_head_stride;
    copy_words<kRows>(lane, to, reinterpret_cast<const char*>(base), int64_t(4) << r.page_rows_log2, 4, rows, (1 << r.page_rows_log2) - 1);
  }
};

// Tiles first + warp, first + warp + warps, ... below end, through a private ring of p.stages stages: all but one are
// on their way while one is computed on. `Taker` finds, issues and consumes tiles. One that prepares its queries does so while
// the first tiles are on their way, with barriers, in what will be the last stages.
template <class Taker> __device__ __forceinline__ void take_tiles(Taker& taker, int warps, int first, int end) {
  const int stages = int(taker.p.stages), own = first + taker.warp;
  int issued = own, to = 0, stage = 0;
  typename Taker::Rows next{};
  if (issued < end) taker.find(issued, next);
  const auto issue = [&] {
    if (issued < end) {
      taker.issue(next, to);
      issued += warps;
      if (issued < end) taker.find(issued, next);  // its page ids arrive while this tile is computed
    }
    ptx::cp_async_commit();
    to = to + 1 == stages ? 0 : to + 1;
  };
#pragma unroll 1
  for (int i = 1; i < stages; ++i) issue();
  if constexpr (Taker::kPrepares) taker.prepare();
#pragma unroll 1
  for (int tile = own; tile < end; tile += warps) {
    if (stages == 3) ptx::cp_async_wait<1>(); else ptx::cp_async_wait<0>();
    __syncwarp();  // every lane's copies of this stage have landed, and every lane is done with the one before
    issue();
    TilePlace rows{};
    taker.place_tile(tile, rows);
    taker.consume(rows, stage);
    stage = stage + 1 == stages ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
}

}  // namespace kvlar::attend
