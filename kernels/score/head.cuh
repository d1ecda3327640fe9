// What a CTA of score_* knows of its (sequence, kv head): which rows there are, which of them each query sees, and which get a
// score.
#pragma once
#include "attend/copy.cuh"
#include "attend/tiles.cuh"
#include "device/mma.cuh"

namespace kvlar::score {

using attend::TileRows;

// Query s is that of row first_query + s, and sees the rows up to it: all of them, or those below `sink`, those of
// [start, end) and those from `own` on. In shared memory: as registers these would be too many.
struct Head {
  int seq, head;
  int length;
  int first_query;         // may be negative: queries of rows that there are none of
  int live, live_end;      // queries whose rows there are
  int sink, start, end, own;
  int first, stop;         // rows that get a score
  const char* keys;
  const int32_t* table;
  const uint16_t* q;       // of the first query head, as are the two below
  float* lse;
  float* scores;           // of row `first`

  // One thread does it.
  __device__ void load(const KvlarScore& p, int unit) {
    seq = unit / int(p.kv_heads);
    head = unit % int(p.kv_heads);
    const KvlarRows& r = p.rows;
    uint32_t status = 0;
    length = __ldg(r.lengths + seq * r.length_seq_stride + head * r.length_head_stride);
    if (length < 0 || length > int(r.max_rows)) {
      status = KVLAR_STATUS_BAD_LENGTH;
      length = length < 0 ? 0 : int(r.max_rows);
    }
    first_query = p.from_start ? 0 : length - int(p.query_rows);
    live = max(0, -first_query);
    live_end = min(int(p.query_rows), length - first_query);
    own = max(0, first_query);
    sink = INT32_MAX;
    start = end = 0;
    if (p.columns == KVLAR_COLUMNS_CHUNK) {
      const int32_t* span = p.spans + 3 * seq;
      const int sinks = __ldg(span), from = __ldg(span + 1), rows = __ldg(span + 2);
      sink = max(0, min(sinks, own));
      start = max(0, min(from, own));
      end = start + max(0, min(rows, min(own - start, int(p.row_count))));
      if (sink != sinks || start != from || end - start != rows) status = KVLAR_STATUS_BAD_LENGTH;
    }
    first = start;
    stop = p.columns == KVLAR_COLUMNS_CHUNK ? end : min(int(p.row_count), p.columns == KVLAR_COLUMNS_ALL ? length : own);
    keys = static_cast<const char*>(p.keys.data) + seq * p.keys.seq_stride + head * p.keys.head_stride;
    table = r.table ? r.table + seq * r.table_seq_stride + head * r.table_head_stride : nullptr;
    q = static_cast<const uint16_t*>(p.q) + seq * p.q_seq_stride + head * int(p.group) * p.q_head_stride;
    lse = p.lse + int64_t(unit) * p.group * p.query_rows;
    scores = p.scores + int64_t(unit) * p.score_stride;
    if (status && p.status) atomicOr(p.status, status);
  }

  // Rows of a tile's part of kRows from row `row` on, as far as there are any below `end_row`.
  template <int kRows> __device__ __forceinline__ void find(const KvlarScore& p, int row, int end_row, TileRows& rows) const {
    static_assert(kRows == 16 || kRows == 32, "two pages at most");
    rows.segment = 0;
    rows.row = row;
    rows.valid = min(kRows, end_row - row);
    rows.page0 = page_of(p, rows, 0);
    if constexpr (kRows > 16) rows.page1 = page_of(p, rows, 16);
  }
  __device__ __forceinline__ int page_of(const KvlarScore& p, const TileRows& rows, int r) const {
    if (r >= rows.valid) return 0;
    int page = (rows.row + r) >> p.rows.page_rows_log2;
    if (table) page = __ldg(table + page);
    if (uint32_t(page) >= p.keys.page_count) {
      if (p.status) atomicOr(p.status, KVLAR_STATUS_BAD_PAGE);
      page = 0;
    }
    return page;
  }

  // Copies them to `to`; what there is none of becomes 0.
  template <int D, int kRows> __device__ __forceinline__ void copy(const KvlarScore& p, const TileRows& rows, ptx::smem to) const {
    const int mask = (1 << p.rows.page_rows_log2) - 1, chunks = int(p.head_dim) / 8, lane = int(threadIdx.x) & 31;
    using Layout = attend::DenseLayout<D>;
    if (rows.valid == kRows && chunks == D / 8)
      attend::copy_rows<D / 8, kRows, Layout, false>(lane, to, keys, p.keys, rows, mask, chunks);
    else
      attend::copy_rows<D / 8, kRows, Layout, true>(lane, to, keys, p.keys, rows, mask, chunks);
  }

  // A query's row of q, and of lse.
  __device__ const uint16_t* query(const KvlarScore& p, int group_head, int row) const {
    return q + group_head * p.q_head_stride + row * p.q_row_stride;
  }
  __device__ float* query_lse(const KvlarScore& p, int group_head, int row) const {
    return lse + (int64_t(group_head) * p.query_rows + row);
  }
};

}  // namespace kvlar::score
