// A unit is what is computed as a whole: the packed queries of one (sequence, kv head, query tile) over
// all rows of that head. Its rows are its segments' rows one after the other, cut into tiles.
#pragma once
#include "abi.h"
#include "device/gpu.cuh"

// Unrolled, so that per-segment values of a thread live in registers.
#define FOR_EACH_SEGMENT(p, s) \
  _Pragma("unroll") for (int s = 0; s < KVLAR_MAX_SEGMENTS; ++s) if (s < int((p).segment_count))

namespace kvlar::attend {

constexpr int kMaskedColumn = INT32_MAX;  // query position of a column that pads the tile: sees all rows
constexpr float kFloor = -1e30f;          // running maximum before any row: finite, so that max - max is 0

struct Unit {
  int seq, head, query_tile;
  int first_tile, tile_count;             // tiles that some query of the unit can see
  int lowest_query, highest_query;        // positions, over the columns in use
  int length[KVLAR_MAX_SEGMENTS];
  int first_row[KVLAR_MAX_SEGMENTS];      // rows of earlier segments
  int tiles[KVLAR_MAX_SEGMENTS];
};

__device__ inline void report(const KvlarAttend& p, uint32_t what) { if (p.status) atomicOr(p.status, what); }

__device__ inline int columns_in_use(const KvlarAttend& p, int query_tile) {
  return min(int(p.columns), int(p.group * p.query_rows) - query_tile * int(p.columns));
}

// The query row of packed column i; its head is i less that many groups. When decoding, nothing waits for a division.
__device__ inline int query_row_of(const KvlarAttend& p, int i) { return p.query_rows == 1 ? 0 : i / int(p.group); }

// Rows that a (sequence, head) holds in a segment.
__device__ inline int held_rows(const KvlarAttend& p, int segment, int seq, int head) {
  const KvlarRows& r = p.segments[segment].rows;
  int n = __ldg(r.lengths + seq * r.length_seq_stride + head * r.length_head_stride);
  if (n < 0 || n > int(r.max_rows)) { report(p, KVLAR_STATUS_BAD_LENGTH); n = n < 0 ? 0 : int(r.max_rows); }
  return n;
}

// The page that holds `row`; `table` is the (sequence, head)'s, or null.
__device__ inline int page_of(const KvlarAttend& p, const KvlarRows& r, uint32_t page_count, const int32_t* table, int row) {
  int page = row >> r.page_rows_log2;
  if (table) page = __ldg(table + page);
  if (uint32_t(page) >= page_count) { report(p, KVLAR_STATUS_BAD_PAGE); page = 0; }
  return page;
}

__device__ inline const int32_t* table_of(const KvlarRows& r, int seq, int head) {
  return r.table ? r.table + seq * r.table_seq_stride + head * r.table_head_stride : nullptr;
}

// Position of row `row` of a segment; without stored positions, its index among all rows.
__device__ inline int position_of(const KvlarAttend& p, const Unit& u, int segment, int row) {
  const KvlarRows& r = p.segments[segment].rows;
  if (!r.positions || row < 0) return u.first_row[segment] + row;
  int page = page_of(p, r, p.segments[segment].keys.page_count, table_of(r, u.seq, u.head), row);
  return __ldg(r.positions + u.seq * r.position_seq_stride + u.head * r.position_head_stride +
               (int64_t(page) << r.page_rows_log2) + (row & ((1 << r.page_rows_log2) - 1)));
}

// Position of query row s: given, or that of the s-th of the last query_rows rows.
__device__ inline int query_position(const KvlarAttend& p, const Unit& u, int s) {
  if (p.q_positions) return __ldg(p.q_positions + int64_t(u.seq) * p.query_rows + s);
  int total = 0;
  FOR_EACH_SEGMENT(p, i) total += u.length[i];
  const int row = total - int(p.query_rows) + s;
  int position = 0;
  FOR_EACH_SEGMENT(p, i) {
    const int r = row - u.first_row[i];
    if (i == 0 || r >= 0) position = position_of(p, u, i, min(r, u.length[i] - 1));
  }
  return position;
}

// Tiles' heights are powers of two.
__device__ inline int tile_of(int row, int tile_rows) { return row >> (31 - __clz(tile_rows)); }
__device__ inline int tiles_of(int rows, int tile_rows) { return tile_of(rows + tile_rows - 1, tile_rows); }

// The tile that holds row `row` of all rows; past the end: the number of tiles.
__device__ inline int tile_of_row(const KvlarAttend& p, const Unit& u, int row) {
  int tiles = 0;
  FOR_EACH_SEGMENT(p, s) {
    const int height = int(p.segments[s].tile_rows), r = max(0, min(row - u.first_row[s], u.length[s]));
    tiles += row - u.first_row[s] < u.length[s] ? tile_of(r, height) : u.tiles[s];
  }
  return tiles;
}

// Fills in everything of unit `index`. One thread does it; all loads of a kind are independent.
__device__ inline void load_unit(const KvlarAttend& p, int index, Unit& u) {
  const int head = p.query_tiles == 1 ? index : index / int(p.query_tiles);  // counted over all sequences
  u.query_tile = index - head * int(p.query_tiles);
  u.seq = head / int(p.kv_heads);
  u.head = head - u.seq * int(p.kv_heads);
  int total = 0;
  bool by_index = true;  // is a row's position its index?
  FOR_EACH_SEGMENT(p, s) {
    u.length[s] = held_rows(p, s, u.seq, u.head);
    u.first_row[s] = total;
    u.tiles[s] = tiles_of(u.length[s], int(p.segments[s].tile_rows));
    total += u.length[s];
    by_index = by_index && !p.segments[s].rows.positions;
  }
  int first = u.query_tile * int(p.columns), last = first + columns_in_use(p, u.query_tile) - 1;
  u.lowest_query = INT32_MAX;
  u.highest_query = INT32_MIN;
  for (int s = query_row_of(p, first), end = query_row_of(p, last); s <= end; ++s) {
    int position = query_position(p, u, s);
    u.lowest_query = min(u.lowest_query, position);
    u.highest_query = max(u.highest_query, position);
  }
  int from = 0, to = total;
  if (by_index) {
    to = max(0, min(total, u.highest_query == INT32_MAX ? total : u.highest_query + 1));
    if (p.window > 0) from = max(0, min(to, u.lowest_query - p.window + 1));
  }
  u.first_tile = to > from ? tile_of_row(p, u, from) : 0;
  u.tile_count = to > from ? tile_of_row(p, u, to - 1) + 1 - u.first_tile : 0;
}

}  // namespace kvlar::attend
