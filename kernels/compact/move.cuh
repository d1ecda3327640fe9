// Moving rows: all that belongs to a row, some rows at a time.
#pragma once
#include "compact/keep.cuh"

namespace kvlar::compact {

// Moves `move` = 0, 1, ... of a list: from row source(move) to row target(move).
template <bool kAny> struct Moves {
  const Shared& shared;
  int source_first, source_at;  // a tile's first row; where in its list the first move is (Any: from there on backwards)
  int target_first, target_at;  // likewise; Keep: rows from target_first on

  __device__ int source(int move) const { return source_first + shared.sources[kAny ? source_at - move : move]; }
  __device__ int target(int move) const { return kAny ? target_first + shared.targets[target_at + move] : target_first + move; }
};

struct Place {
  int page;
  uint32_t row;  // in the page
};

// Moves an owner's rows.
struct Mover {
  const KvlarCompact& p;
  Shared& shared;

  __device__ bool has_words() const { return p.key_params + p.value_params || p.rows.positions || p.scores; }

  __device__ void load_pages(int (&to)[kPages], const Owner& o, int first_row, int last_row) const {
    const int log2 = int(p.rows.page_rows_log2), first = first_row >> log2, count = (last_row >> log2) - first + 1;
    for (int i = int(threadIdx.x); i < count; i += kThreads) to[i] = Judge::page_id(p.rows, o, first + i);
  }

  __device__ Place place(const int (&table)[kPages], int first_row, int row) const {
    const uint32_t log2 = p.rows.page_rows_log2;
    return {table[(row >> log2) - (first_row >> log2)], uint32_t(row) & ((1u << log2) - 1)};
  }
  template <bool kAny> __device__ Place source(const Moves<kAny>& moves, int move) const {
    return place(shared.source_pages, moves.source_first, moves.source(move));
  }
  template <bool kAny> __device__ Place target(const Moves<kAny>& moves, int move) const {
    return place(shared.target_pages, moves.target_first, moves.target(move));
  }

  // Vector `part` of a row's keys, then values.
  __device__ uint4* vector(Place at, int part) const {
    const int of_keys = int(p.key_bytes / 16);
    const bool key = part < of_keys;
    const KvlarPool& pool = key ? p.keys : p.values;
    char* row = (key ? shared.bases.keys : shared.bases.values) + at.page * pool.page_stride + uint64_t(at.row) * pool.row_stride;
    return reinterpret_cast<uint4*>(row) + (key ? part : part - of_keys);
  }

  // Word `part` of its scales and zeros, then its position, then its score.
  __device__ uint32_t* word(Place at, int row, int part) const {
    const int of_keys = int(p.key_params / 4), of_values = int(p.value_params / 4);
    if (part < of_keys + of_values) {
      const bool key = part < of_keys;
      const KvlarPool& pool = key ? p.keys : p.values;
      char* page = (key ? shared.bases.keys : shared.bases.values) + at.page * pool.page_stride;
      char* params = page + pool.params_offset + uint64_t(at.row) * pool.params_stride;
      return reinterpret_cast<uint32_t*>(params) + (key ? part : part - of_keys);
    }
    if (part == of_keys + of_values && p.rows.positions)
      return reinterpret_cast<uint32_t*>(shared.bases.positions) + (int64_t(at.page) << p.rows.page_rows_log2) + at.row;
    return reinterpret_cast<uint32_t*>(shared.bases.scores) + row;
  }

  __device__ bool is_page(Place at) const { return uint32_t(at.page) < shared.bases.pages; }
  template <bool kAny> __device__ bool stays(const Moves<kAny>& moves, int move) const {
    return !kAny && moves.source(move) == moves.target(move);
  }

  // Rows `first` to `first + count` of the list, at most a batch: all are read before the first is written, so that a
  // target may be another's source.
  template <bool kAny> __device__ void move(const Moves<kAny>& moves, int first, int count) const {
    uint4 x[kVectors];
    uint32_t y[kWords];
    const int all_vectors = count * int(shared.bases.vectors.divisor), all_words = has_words() ? count * int(shared.bases.words.divisor) : 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int u = int(threadIdx.x) + i * kThreads;
      if (u >= all_vectors) continue;
      const int move = shared.bases.vectors.quotient(u);
      const Place from = source(moves, first + move);
      if (is_page(from) && !stays(moves, first + move)) x[i] = __ldcs(vector(from, shared.bases.vectors.rest(u, move)));
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int u = int(threadIdx.x) + i * kThreads;
      if (kAny || u >= all_words) continue;
      const int move = shared.bases.words.quotient(u);
      const Place from = source(moves, first + move);
      if (is_page(from) && !stays(moves, first + move)) y[i] = *word(from, moves.source(first + move), shared.bases.words.rest(u, move));
    }
    if (!kAny) __syncthreads();  // there, targets are no sources
    // Where the rows go is worked out again: what was known of it need not be kept.
    const int thread = ptx::unknown(int(threadIdx.x));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int u = thread + i * kThreads;
      if (u >= all_vectors) continue;
      const int move = shared.bases.vectors.quotient(u);
      if (stays(moves, first + move)) continue;
      const Place from = source(moves, first + move), to = target(moves, first + move);
      if (is_page(from) && is_page(to)) *vector(to, shared.bases.vectors.rest(u, move)) = x[i];
      else if (p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_PAGE));
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int u = thread + i * kThreads;
      if (u >= all_words) continue;
      const int move = shared.bases.words.quotient(u);
      if (stays(moves, first + move)) continue;
      const Place from = source(moves, first + move), to = target(moves, first + move);
      const int part = shared.bases.words.rest(u, move);
      if (is_page(from) && is_page(to))
        *word(to, moves.target(first + move), part) = kAny ? *word(from, moves.source(first + move), part) : y[i];
    }
  }
};

}  // namespace kvlar::compact
