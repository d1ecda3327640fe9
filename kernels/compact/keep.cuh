// Which rows are kept, and lists of those that are, or are not.
#pragma once
#include "device/row_codec.cuh"
#include "device/scan.cuh"
#include "select/order.cuh"

namespace kvlar::compact {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 4096, kRowsOfWarp = kTile / kWarps;  // rows that are judged at a time
constexpr int kAtOnce = 8;                                 // of a lane, whose loads do not wait for each other
constexpr int kVectors = 8, kWords = 4;                    // of a thread, on their way
constexpr int kPages = kTile / 16 + 1;                     // that a tile's worth of rows can touch
static_assert(kRowsOfWarp / 32 <= 32 && kTile <= 65536, "a bit a row of a lane, 16 bits a row of a tile");

// A (sequence, owner). In shared memory, as what follows: it would take registers from rows on their way.
struct Owner {
  int seq, index, length;
  // Of [seqs][owners].
  __device__ int64_t row() const { return blockIdx.x; }

  __device__ void set(const KvlarCompact& p) {
    seq = int(blockIdx.x / p.owners);
    index = int(blockIdx.x % p.owners);
    const int held = *length_of(p);
    length = max(0, min(held, int(p.rows.max_rows)));
    if (held != length && threadIdx.x == 0 && p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_LENGTH));
  }
  __device__ int32_t* length_of(const KvlarCompact& p) const {
    return p.lengths + seq * p.rows.length_seq_stride + index * p.rows.length_head_stride;
  }
  __device__ int32_t* positions(const KvlarRows& rows) const {
    return rows.positions + seq * rows.position_seq_stride + index * rows.position_head_stride;
  }
};

// What tells which of an owner's rows are kept.
struct Judge {
  const uint8_t* mask;
  const float* scores;
  uint64_t cut;
  uint32_t before;              // columns of its set's members before it
  uint32_t first, columns;      // position of column 0, and how many there are
  uint32_t sinks, recent_from;  // columns that are kept whatever the cut

  __device__ void set(const KvlarCompact& p, const Owner& o) {
    const KvlarKeep& k = p.keep;
    mask = nullptr;
    first = 0;
    columns = k.first ? k.columns : uint32_t(o.length);
    if (k.first) {
      first = uint32_t(__ldg(k.first + o.seq));
      if (k.counts) columns = uint32_t(max(0, min(__ldg(k.counts + o.seq), int(k.columns))));
    }
    if (k.mask) {
      mask = k.mask + o.row() * k.stride;
    } else {
      scores = k.scores + o.row() * k.stride;
      cut = __ldg(reinterpret_cast<const unsigned long long*>(k.cuts + o.row() / k.members));
      before = uint32_t(o.row() % k.members) * k.columns;
    }
    sinks = k.sink_rows;
    recent_from = columns - min(columns, k.recent_rows);
  }

  // Bit i: row `row` + 32 i is kept, of those below `end`; the others' bits are 0.
  __device__ uint32_t eight(const KvlarCompact& p, const Owner& o, int row, int end) const {
    uint32_t column[kAtOnce], in = 0, kept = 0;  // in: rows below end
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      column[i] = uint32_t(row + 32 * i);
      if (row + 32 * i < end) in |= 1u << i;
    }
    if (p.keep.first) {
      if (p.rows.positions) locate(column, p, o, in);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        column[i] -= first;
        if (column[i] >= columns && (in >> i & 1)) kept |= 1u << i;
      }
    }
    const uint32_t open = in & ~kept;
    if (mask) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if ((open >> i & 1) && __ldg(mask + column[i])) kept |= 1u << i;
    } else {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if ((open >> i & 1) && at_cut(column[i])) kept |= 1u << i;
    }
    return kept;
  }

 private:
  // Scores may be those that move with the rows: no read-only loads.
  __device__ bool at_cut(uint32_t column) const {
    return select::ranked(ordered_key(scores[column]), before + column) >= cut || column < sinks || column >= recent_from;
  }

  // Rows to positions; those of a page that is none get one outside of all columns.
  __device__ void locate(uint32_t (&row)[kAtOnce], const KvlarCompact& p, const Owner& o, uint32_t in) const {
    const int32_t* positions = o.positions(p.rows);
    const uint32_t log2 = p.rows.page_rows_log2, pages = page_count(p);
    int page[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) page[i] = in >> i & 1 ? page_id(p.rows, o, int(row[i] >> log2)) : 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!(in >> i & 1)) continue;
      if (uint32_t(page[i]) < pages) {
        row[i] = uint32_t(positions[(int64_t(page[i]) << log2) + (row[i] & ((1u << log2) - 1))]);
      } else {
        row[i] = first + columns;
        if (p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_PAGE));
      }
    }
  }

 public:
  __device__ static int page_id(const KvlarRows& rows, const Owner& o, int page) {
    return rows.table ? __ldg(rows.table + o.seq * rows.table_seq_stride + o.index * rows.table_head_stride + page) : page;
  }
  __device__ static uint32_t page_count(const KvlarCompact& p) {
    return p.value_bytes ? min(p.keys.page_count, p.values.page_count) : p.keys.page_count;
  }
};

// u / d and the rest, for u below 2^16 and d up to 2^12.
struct Division {
  uint32_t divisor, factor;
  __device__ void set(uint32_t d) {
    divisor = max(d, 1u);
    factor = (0x80000000u + divisor - 1) / divisor;
  }
  __device__ int quotient(int u) const { return int(uint64_t(uint32_t(u)) * factor >> 31); }
  __device__ int rest(int u, int quotient) const { return u - quotient * int(divisor); }
};

// Rows of one pool that belong to the owner.
__device__ inline char* base_of(const KvlarPool& pool, const uint64_t* layers, const KvlarCompact& p, const Owner& o) {
  const int layer = o.index / int(p.owners_a_layer), head = o.index % int(p.owners_a_layer);
  char* const data = layers ? reinterpret_cast<char*>(__ldg(reinterpret_cast<const unsigned long long*>(layers + layer)))
                            : static_cast<char*>(pool.data);
  return data + o.seq * pool.seq_stride + head * pool.head_stride;
}

// Where all that belongs to an owner's rows is, and how many go at a time.
struct Bases {
  char *keys, *values;
  int32_t* positions;  // null = none
  float* scores;
  int32_t* source;
  Division vectors, words;  // of a row
  uint32_t pages;
  int batch;                // rows that are moved at a time

  __device__ void set(const KvlarCompact& p, const Owner& o) {
    keys = base_of(p.keys, p.key_layers, p, o);
    values = p.value_bytes ? base_of(p.values, p.value_layers, p, o) : nullptr;
    positions = p.rows.positions ? o.positions(p.rows) : nullptr;
    scores = p.scores ? p.scores + o.row() * p.score_stride : nullptr;
    source = p.source ? p.source + o.row() * p.source_stride : nullptr;
    vectors.set((p.key_bytes + p.value_bytes) / 16);
    words.set((p.key_params + p.value_params) / 4 + (positions ? 1 : 0) + (scores ? 1 : 0));
    pages = Judge::page_count(p);
    batch = int(min(kThreads * kVectors / vectors.divisor, kThreads * kWords / words.divisor));
  }
};

struct Shared {
  Owner owner;
  Judge judge;
  Bases bases;
  uint16_t sources[kTile], targets[kTile];  // from the first row of their tiles; Keep's targets are neighbours
  int source_pages[kPages], target_pages[kPages];
  int warp_sums[kWarps];
};

// The lane's bits of the warp's rows of a tile: bit i for row start + 32 i + lane, of those below end.
__device__ inline uint32_t judge_tile(const KvlarCompact& p, const Owner& o, const Shared& shared, int first, int end, bool kept) {
  const int lane = int(threadIdx.x) % 32, start = first + int(threadIdx.x) / 32 * kRowsOfWarp;
  uint32_t bits = 0;
#pragma unroll 1
  for (int i = 0; i < kRowsOfWarp / 32; i += kAtOnce) {
    const int row = start + 32 * i + lane;
    if (start + 32 * i >= end) break;  // the whole warp
    uint32_t found = shared.judge.eight(p, o, row, end);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const bool in = row + 32 * j < end && ((found >> j & 1) != 0) == kept;
      found = in ? found | 1u << j : found & ~(1u << j);
    }
    bits |= found << i;
  }
  return bits;
}

// Lists, ascending, which rows of a tile below `end` are kept, or are not, as offsets from its first row; gives their number to
// all threads. Between its one barrier and the next one the list may be read by none but its writers.
__device__ inline int list_rows(uint16_t* list, Shared& shared, const KvlarCompact& p, const Owner& o, int first, int end, bool kept) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const uint32_t bits = judge_tile(p, o, shared, first, end, kept);
  const int words = max(0, min((end - first - warp * kRowsOfWarp + 31) / 32, kRowsOfWarp / 32));
  int own = 0;
  for (int i = 0; i < words; ++i) own += __popc(__ballot_sync(0xffffffffu, bits >> i & 1));
  if (lane == 0) shared.warp_sums[warp] = own;
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? shared.warp_sums[w] : 0;
    all += shared.warp_sums[w];
  }
  for (int i = 0; i < words; ++i) {
    const uint32_t word = __ballot_sync(0xffffffffu, bits >> i & 1);
    if (word >> lane & 1) list[before + __popc(word & ((1u << lane) - 1))] = uint16_t(warp * kRowsOfWarp + 32 * i + lane);
    before += __popc(word);
  }
  return all;
}

}  // namespace kvlar::compact
