// What one CTA computes as a whole: the packed queries of one (sequence, set of kv heads, query tile) over all rows.
//
// A set's kv heads read the same key latents and the same value latents. A query tile takes whole heads where their
// packed columns fit (column = head in tile * group * query_rows + query row * group + query head), else a part of one
// head's. Its work is counted in tiles, in this order:
//   exact rows: 16 rows of one head a tile;
//   latent rows: 32 rows for all heads of the tile, once for each slice of the value rank.
#pragma once
#include "attend/work_list.cuh"

namespace kvlar::attend_lowrank {

using attend::page_of;
using attend::tiles_of;

constexpr int kMaxHeads = 16, kMaxColumns = 16, kMaxWarps = 8;
constexpr int kLatentRows = 32, kExactRows = 16;

struct Unit {
  int seq, key_group, value_group;
  int heads, columns;    // kv heads and packed columns of this tile
  int head[kMaxHeads];
  int length[KVLAR_MAX_SEGMENTS][kMaxHeads];
  int first_row[KVLAR_MAX_SEGMENTS][kMaxHeads];  // rows of earlier segments
  int shortest[KVLAR_MAX_SEGMENTS], longest[KVLAR_MAX_SEGMENTS];  // length, over the heads
  int first_tile[KVLAR_MAX_SEGMENTS], tiles[KVLAR_MAX_SEGMENTS];  // tiles that some query can see (exact: of each head)
  int exact_tiles, latent_tiles, tile_count;
  int lowest_query, highest_query;
  // Of a packed column: its kv head in the tile, the position, row and head of its query. One that pads the tile has position
  // kMaskedColumn, and sees all rows.
  int column_head[kMaxColumns], column_query[kMaxColumns], column_row[kMaxColumns], column_query_head[kMaxColumns];
};

__device__ inline bool is_latent(const KvlarAttend& p, int segment) { return p.segments[segment].latent != KVLAR_LATENT_NONE; }
__device__ inline int columns_a_head(const KvlarAttend& p) { return int(p.group * p.query_rows); }

// Tables and positions of latent rows are the key group's, of exact rows the kv head's.
__device__ inline int row_owner(const KvlarAttend& p, const Unit& u, int segment, int head) {
  return is_latent(p, segment) ? u.key_group : u.head[head];
}
__device__ inline uint32_t pages_of(const KvlarSegment& s) { return min(s.keys.page_count, s.values.page_count); }

// Rows that a kv head holds in each segment, and in the segments before it. Indexed by constants only: registers.
struct HeadRows {
  int length[KVLAR_MAX_SEGMENTS], first[KVLAR_MAX_SEGMENTS], total;

  __device__ HeadRows(const KvlarAttend& p, int seq, int head) : total(0) {
#pragma unroll
    for (int s = 0; s < KVLAR_MAX_SEGMENTS; ++s) {  // all are set: what is not would live in registers forever
      first[s] = total;
      length[s] = s < int(p.segment_count) ? attend::held_rows(p, s, seq, head) : 0;
      total += length[s];
    }
  }

  // Those of another lane.
  __device__ HeadRows of_lane(int lane) const {
    HeadRows rows = *this;
#pragma unroll
    for (int s = 0; s < KVLAR_MAX_SEGMENTS; ++s) {
      rows.length[s] = __shfl_sync(0xffffffffu, length[s], lane);
      rows.first[s] = __shfl_sync(0xffffffffu, first[s], lane);
    }
    rows.total = __shfl_sync(0xffffffffu, total, lane);
    return rows;
  }
};

// Position that is stored with row `row` of the owner of a segment's tables.
__device__ inline int stored_position(const KvlarAttend& p, int segment, int seq, int owner, int row) {
  const KvlarRows& r = p.segments[segment].rows;
  const int page = page_of(p, r, pages_of(p.segments[segment]), attend::table_of(r, seq, owner), row);
  return __ldg(r.positions + seq * r.position_seq_stride + owner * r.position_head_stride + (int64_t(page) << r.page_rows_log2) +
               (row & ((1 << r.page_rows_log2) - 1)));
}

// Position of query row s of a head: given, or that of the s-th of its last query_rows rows.
__device__ inline int query_position(const KvlarAttend& p, const HeadRows& rows, int seq, int head, int key_group, int s) {
  if (p.q_positions) return __ldg(p.q_positions + int64_t(seq) * p.query_rows + s);
  const int row = rows.total - int(p.query_rows) + s;
  int position = 0;
  FOR_EACH_SEGMENT(p, i) {
    const int r = min(row - rows.first[i], rows.length[i] - 1);
    if (i != 0 && row < rows.first[i]) continue;
    position = rows.first[i] + r;
    if (p.segments[i].rows.positions && r >= 0) position = stored_position(p, i, seq, is_latent(p, i) ? key_group : head, r);
  }
  return position;
}

// Which heads and columns a unit is of.
struct Place {
  int seq, set, key_group, value_group;
  int heads, columns, first_column;
  const int32_t* head;  // the kv heads

  __device__ Place(const KvlarAttendLowrank& lowrank, int index) {
    const KvlarAttend& p = lowrank.attend;
    const int all = p.query_tiles == 1 ? index : index / int(p.query_tiles), tile = index - all * int(p.query_tiles);
    seq = all / int(lowrank.set_count);
    set = all - seq * int(lowrank.set_count);
    const int32_t* entry = lowrank.sets + 4 * set;
    key_group = __ldg(entry);
    value_group = __ldg(entry + 1);
    const int in_set = __ldg(entry + 2), a_head = columns_a_head(p);
    int from = 0;  // first head of the tile within the set
    first_column = 0;
    if (a_head <= int(p.columns)) {
      from = tile * int(lowrank.heads_per_tile);
      heads = max(0, min(int(lowrank.heads_per_tile), in_set - from));
      columns = heads * a_head;
    } else {
      const int parts = (a_head + int(p.columns) - 1) / int(p.columns);
      from = tile / parts;
      heads = from < in_set ? 1 : 0;
      first_column = tile % parts * int(p.columns);
      columns = heads ? min(int(p.columns), a_head - first_column) : 0;
    }
    head = lowrank.sets + 4 * lowrank.set_count + __ldg(entry + 3) + from;
  }
};

// Tiles that some query of a unit can see: what the work list says of it. Not which heads it has, as layers that share a list
// may differ in that.
struct Visible {
  int lowest_query, highest_query;
  int exact, latent;  // tiles in all: of one head, of the set
  int first[KVLAR_MAX_SEGMENTS], tiles[KVLAR_MAX_SEGMENTS];

  Visible() = default;  // in shared memory
  __device__ Visible(const KvlarAttend& p, const Place& at)
      : lowest_query(INT32_MAX), highest_query(INT32_MIN), exact(0), latent(0) {
#pragma unroll
    for (int s = 0; s < KVLAR_MAX_SEGMENTS; ++s) first[s] = tiles[s] = 0;
    if (at.columns == 0) return;
    bool by_index = true;  // is a row's position its index?
    FOR_EACH_SEGMENT(p, s) by_index = by_index && !p.segments[s].rows.positions;
    const int first_row = attend::query_row_of(p, at.first_column);
    const int last_row = at.heads > 1 ? int(p.query_rows) - 1 : attend::query_row_of(p, at.first_column + at.columns - 1);
#pragma unroll 1
    for (int h = 0; h < at.heads; ++h) {
      const HeadRows rows(p, at.seq, __ldg(at.head + h));
#pragma unroll 1
      for (int s = first_row; s <= last_row; ++s) {
        const int position = query_position(p, rows, at.seq, __ldg(at.head + h), at.key_group, s);
        lowest_query = min(lowest_query, position);
        highest_query = max(highest_query, position);
      }
    }
    int from[KVLAR_MAX_SEGMENTS], to[KVLAR_MAX_SEGMENTS];
#pragma unroll
    for (int s = 0; s < KVLAR_MAX_SEGMENTS; ++s) {
      from[s] = INT32_MAX;
      to[s] = 0;
    }
#pragma unroll 1
    for (int h = 0; h < at.heads; ++h) {
      const HeadRows rows(p, at.seq, __ldg(at.head + h));
      FOR_EACH_SEGMENT(p, s) {
        int low = 0, high = rows.length[s];
        if (by_index) {
          if (p.window > 0) low = max(0, min(high, lowest_query - p.window + 1 - rows.first[s]));
          if (highest_query != INT32_MAX) high = max(0, min(high, highest_query + 1 - rows.first[s]));
        }
        if (high > low) {
          from[s] = min(from[s], low);
          to[s] = max(to[s], high);
        }
      }
    }
    FOR_EACH_SEGMENT(p, s) {
      const int height = is_latent(p, s) ? kLatentRows : kExactRows;
      first[s] = to[s] > 0 ? from[s] / height : 0;
      tiles[s] = to[s] > 0 ? tiles_of(to[s], height) - first[s] : 0;
      if (is_latent(p, s)) latent += tiles[s]; else exact += tiles[s];
    }
  }

  __device__ int count(const KvlarAttendLowrank& lowrank, const Place& at) const {
    return exact * at.heads + latent * int(lowrank.slices);
  }
};
using Work = attend::CtaRecord<Visible>;

// Fills in everything of the unit at hand. A warp does it, a lane a head, then a column: the whole CTA waits, for one load after
// the other where it must be, for each kind of them once.
__device__ inline void load_unit(const KvlarAttendLowrank& lowrank, const Work& work, Unit& u, int lane) {
  static_assert(kMaxHeads <= 32 && kMaxColumns <= 32, "a lane each");
  const KvlarAttend& p = lowrank.attend;
  const Visible& visible = work.of.unit;
  const Place at(lowrank, work.index);
  const int own_head = at.heads > 0 ? __ldg(at.head + min(lane, at.heads - 1)) : 0;  // further lanes repeat the last head
  const HeadRows rows(p, at.seq, own_head);
#pragma unroll
  for (int s = 0; s < KVLAR_MAX_SEGMENTS; ++s) {
    const int shortest = __reduce_min_sync(0xffffffffu, rows.length[s]), longest = __reduce_max_sync(0xffffffffu, rows.length[s]);
    // The heads of a set turn a tile together.
    const bool together = rows.first[s] == __shfl_sync(0xffffffffu, rows.first[s], 0);
    if (s < int(p.segment_count) && is_latent(p, s) && !p.segments[s].rows.positions && !together) attend::report(p, KVLAR_STATUS_BAD_LENGTH);
    if (lane < at.heads) {
      u.length[s][lane] = rows.length[s];
      u.first_row[s][lane] = rows.first[s];
    }
    if (lane == 0) {
      u.first_tile[s] = visible.first[s];
      u.tiles[s] = visible.tiles[s];
      u.shortest[s] = shortest;
      u.longest[s] = longest;
    }
  }
  if (lane < at.heads) u.head[lane] = own_head;
  if (lane == 0) {
    u.seq = at.seq;
    u.key_group = at.key_group;
    u.value_group = at.value_group;
    u.heads = at.heads;
    u.columns = at.columns;
    u.lowest_query = visible.lowest_query;
    u.highest_query = visible.highest_query;
    u.exact_tiles = visible.exact * at.heads;
    u.latent_tiles = visible.latent;
    u.tile_count = visible.count(lowrank, at);
  }
  const int a_head = at.heads > 1 ? columns_a_head(p) : at.columns, h = lane < at.columns ? lane / a_head : 0;
  const HeadRows of_column = rows.of_lane(h);
  const int head = __shfl_sync(0xffffffffu, own_head, h);
  if (lane < kMaxColumns) {
    const bool in_use = lane < at.columns;
    const int packed = at.first_column + lane - h * a_head, row = attend::query_row_of(p, packed);
    u.column_head[lane] = h;
    u.column_row[lane] = in_use ? row : 0;
    u.column_query_head[lane] = in_use ? head * int(p.group) + packed - row * int(p.group) : 0;
    u.column_query[lane] = in_use ? query_position(p, of_column, at.seq, head, at.key_group, row) : attend::kMaskedColumn;
  }
}

}  // namespace kvlar::attend_lowrank
