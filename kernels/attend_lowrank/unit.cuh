// What one CTA computes as a whole: the packed queries of one (sequence, set of kv heads, query tile) over all rows.
//
// A set's kv heads read the same key latents and the same value latents. A query tile takes whole heads where their
// packed columns fit (column = head in tile * group * query_rows + query row * group + query head), else a part of one
// head's. Its work is counted in tiles, in this order:
//   exact rows: 16 rows of one head a tile;
//   latent rows: 32 rows for all heads of the tile, once for each slice of the value rank.
#pragma once
#include "attend/tiles.cuh"
#include "attend/unit.cuh"

namespace kvlar::attend_lowrank {

using attend::page_of;
using attend::tiles_of;

constexpr int kMaxHeads = 16, kMaxColumns = 16;
constexpr int kLatentRows = 32, kExactRows = 16;

struct Unit {
  int seq, set, key_group, value_group;
  int heads, columns;    // kv heads and packed columns of this tile
  int first_column;      // of a head whose columns do not fit one tile
  int head[kMaxHeads];
  int length[KVLAR_MAX_SEGMENTS][kMaxHeads];
  int first_row[KVLAR_MAX_SEGMENTS][kMaxHeads];  // rows of earlier segments
  int shortest[KVLAR_MAX_SEGMENTS], longest[KVLAR_MAX_SEGMENTS];  // length, over the heads
  int first_tile[KVLAR_MAX_SEGMENTS], tiles[KVLAR_MAX_SEGMENTS];  // tiles that some query can see (exact: of each head)
  int exact_tiles, latent_tiles, tile_count;
  int lowest_query, highest_query;
  int column_head[kMaxColumns], column_query[kMaxColumns];  // kMaskedColumn: the column pads the tile
};

__device__ inline bool is_latent(const KvlarAttend& p, int segment) { return p.segments[segment].latent != KVLAR_LATENT_NONE; }
__device__ inline int columns_a_head(const KvlarAttend& p) { return int(p.group * p.query_rows); }

// Tables and positions of latent rows are the key group's, of exact rows the kv head's.
__device__ inline int row_owner(const KvlarAttend& p, const Unit& u, int segment, int head) {
  return is_latent(p, segment) ? u.key_group : u.head[head];
}
__device__ inline uint32_t pages_of(const KvlarSegment& s) { return min(s.keys.page_count, s.values.page_count); }

__device__ inline int position_of(const KvlarAttend& p, const Unit& u, int head, int segment, int row) {
  const KvlarRows& r = p.segments[segment].rows;
  if (!r.positions || row < 0) return u.first_row[segment][head] + row;
  const int owner = row_owner(p, u, segment, head);
  const int page = page_of(p, r, pages_of(p.segments[segment]), attend::table_of(r, u.seq, owner), row);
  return __ldg(r.positions + u.seq * r.position_seq_stride + owner * r.position_head_stride +
               (int64_t(page) << r.page_rows_log2) + (row & ((1 << r.page_rows_log2) - 1)));
}

// Position of query row s of a head: given, or that of the s-th of its last query_rows rows.
__device__ inline int query_position(const KvlarAttend& p, const Unit& u, int head, int s) {
  if (p.q_positions) return __ldg(p.q_positions + int64_t(u.seq) * p.query_rows + s);
  int total = 0;
  FOR_EACH_SEGMENT(p, i) total += u.length[i][head];
  const int row = total - int(p.query_rows) + s;
  int position = 0;
  FOR_EACH_SEGMENT(p, i) {
    const int r = row - u.first_row[i][head];
    if (i == 0 || r >= 0) position = position_of(p, u, head, i, min(r, u.length[i][head] - 1));
  }
  return position;
}

// Which kv head of the tile, query row and query head a packed column is.
struct Column { int head, row, query_head; bool used; };
__device__ inline Column column_at(const KvlarAttend& p, const Unit& u, int column) {
  const int a_head = columns_a_head(p), i = u.first_column + column;
  const int head = u.heads > 1 ? i / a_head : 0, packed = u.heads > 1 ? i % a_head : i;
  const bool used = column < u.columns;
  return {used ? head : 0, packed / int(p.group), used ? u.head[head] * int(p.group) + packed % int(p.group) : 0, used};
}

// Rows of each segment that some query of the tile can see, as tiles.
__device__ inline void find_visible_tiles(const KvlarAttendLowrank& lowrank, Unit& u, bool by_index) {
  const KvlarAttend& p = lowrank.attend;
  int exact = 0, latent = 0;
  FOR_EACH_SEGMENT(p, s) {
    const int height = is_latent(p, s) ? kLatentRows : kExactRows;
    int from = INT32_MAX, to = 0;
    u.shortest[s] = INT32_MAX;
    u.longest[s] = 0;
    for (int h = 0; h < u.heads; ++h) {
      const int length = u.length[s][h];
      u.shortest[s] = min(u.shortest[s], length);
      u.longest[s] = max(u.longest[s], length);
      int low = 0, high = length;
      if (by_index) {
        if (p.window > 0) low = max(0, min(length, u.lowest_query - p.window + 1 - u.first_row[s][h]));
        if (u.highest_query != INT32_MAX) high = max(0, min(length, u.highest_query + 1 - u.first_row[s][h]));
      }
      if (high > low) {
        from = min(from, low);
        to = max(to, high);
      }
    }
    u.first_tile[s] = to > 0 ? from / height : 0;
    u.tiles[s] = to > 0 ? tiles_of(to, height) - u.first_tile[s] : 0;
    if (is_latent(p, s)) latent += u.tiles[s]; else exact += u.tiles[s];
  }
  u.exact_tiles = exact * u.heads;
  u.latent_tiles = latent;
  u.tile_count = u.exact_tiles + latent * int(lowrank.slices);
}

// Fills in everything of unit `index`. One thread does it.
__device__ inline void load_unit(const KvlarAttendLowrank& lowrank, int index, Unit& u) {
  const KvlarAttend& p = lowrank.attend;
  const int tile = index % int(p.query_tiles);
  u.set = index / int(p.query_tiles) % int(lowrank.set_count);
  u.seq = index / int(p.query_tiles * lowrank.set_count);
  const int32_t* set = lowrank.sets + 4 * u.set;
  u.key_group = __ldg(set);
  u.value_group = __ldg(set + 1);
  const int in_set = __ldg(set + 2), first = __ldg(set + 3), a_head = columns_a_head(p);
  int from = 0;  // first head of the tile within the set
  if (a_head <= int(p.columns)) {
    from = tile * int(lowrank.heads_per_tile);
    u.heads = max(0, min(int(lowrank.heads_per_tile), in_set - from));
    u.first_column = 0;
    u.columns = u.heads * a_head;
  } else {
    const int parts = (a_head + int(p.columns) - 1) / int(p.columns);
    from = tile / parts;
    u.heads = from < in_set ? 1 : 0;
    u.first_column = tile % parts * int(p.columns);
    u.columns = u.heads ? min(int(p.columns), a_head - u.first_column) : 0;
  }
  for (int h = 0; h < u.heads; ++h) u.head[h] = __ldg(lowrank.sets + 4 * lowrank.set_count + first + from + h);
  bool by_index = true;  // is a row's position its index?
  FOR_EACH_SEGMENT(p, s) {
    by_index = by_index && !p.segments[s].rows.positions;
    for (int h = 0; h < u.heads; ++h) {
      u.length[s][h] = attend::held_rows(p, s, u.seq, u.head[h]);
      u.first_row[s][h] = s == 0 ? 0 : u.first_row[s - 1][h] + u.length[s - 1][h];
    }
  }
  u.lowest_query = INT32_MAX;
  u.highest_query = INT32_MIN;
  for (int c = 0; c < kMaxColumns; ++c) {
    const Column column = column_at(p, u, c);
    u.column_head[c] = column.head;
    u.column_query[c] = attend::kMaskedColumn;
    if (!column.used) continue;
    const bool as_before = c > 0 && column.query_head % int(p.group) != 0;  // the same query row
    const int position = as_before ? u.column_query[c - 1] : query_position(p, u, column.head, column.row);
    u.column_query[c] = position;
    u.lowest_query = min(u.lowest_query, position);
    u.highest_query = max(u.highest_query, position);
  }
  find_visible_tiles(lowrank, u, by_index);
}

}  // namespace kvlar::attend_lowrank
