// append_lowrank: new keys (before RoPE) and values become latents, encoded and written at their slots, with their
// positions, in one launch.
//
//   x [seqs][kv_heads][new_rows][d] -> z = encoder [r][size d] . the group's heads' rows - offset, rows
//   slots[seq][row] of the caches; or latents come ready-made (the encoder folded into W_k), or dense rows as they are.
//   (ReCalKV, arXiv 2505.24357, §3.2; Palu, arXiv 2407.21118, §3.1.)
//
// A CTA takes a group, a block of tokens of all sequences (they share the encoder) and a part of the ranks; a ninth warp
// finds the tokens' places meanwhile. _m16 kernels have 16 tokens a warp and divide the contraction among warps, so that a
// decode step reads its encoders by many CTAs at once: each lane has at most 4 blocks of 32 values in flight. _m64 kernels
// have 64, for prefill. An int8 row needs its range first: where a CTA has all ranks it goes over them twice (registers,
// if they fit), else (_m16) parts meet in scratch and the last CTA encodes.
//
// Floor, Llama-3.1-8B (8 kv heads, d = 128), groups of 2, ranks 64 and 128, one layer, 4.3 TB/s and 790 TFLOP/s: a decode
// step reads 4 x (64 + 128) x 256 x 2 B = 393 KB of encoders, 0.1 us, so it is launch latency and three dependent loads;
// 128K rows read 537 MB and write 201 MB, 172 us, with 51.5 GFLOP, 65 us. Ranks above 128 read the rows again for every
// 128, from the L2 where CTAs run side by side.
#pragma once
#include "project/store.cuh"

namespace kvlar::project {

// In _m16 kernels a ninth warp finds where rows go, while the others multiply.
template <int MT> constexpr int kPlaceWarp = MT == 1 ? kWarps : -1;
template <int MT> constexpr int kAppendWarps = MT == 1 ? kWarps + 1 : kWarps;

template <int MT> struct AppendShared {
  static constexpr int kRows = 16 * MT * kWarps;  // of all warps
  RowPlace places[kRows];
  Range ranges[kRows];  // [row][rank warp]
  Partials<MT> partials;
};

// Where a new row goes; nowhere (null) if it is skipped. Bad slots and pages are reported.
__device__ inline RowPlace place_of(const KvlarAppendLowrank& p, const KvlarLatentSide& side, Token t, int group, bool positions) {
  const RowPlace none = {nullptr, nullptr};
  const int slot = __ldg(p.slots + t.seq * p.slot_seq_stride + t.row);
  if (slot < 0) return none;
  uint32_t problem = 0, pages = 0xffffffffu;
#pragma unroll
  for (int i = 0; i < 2; ++i)  // a row is written on both sides or on none
    if (p.sides[i].mode != KVLAR_SIDE_NONE) pages = min(pages, p.sides[i].pool.page_count);
  int page = slot >> p.rows.page_rows_log2;
  if (slot >= int(p.rows.max_rows)) {
    problem = KVLAR_STATUS_BAD_SLOT;
  } else {
    if (p.rows.table) page = __ldg(p.rows.table + t.seq * p.rows.table_seq_stride + group * p.rows.table_head_stride + page);
    if (uint32_t(page) >= pages) problem = KVLAR_STATUS_BAD_PAGE;
  }
  if (problem) {
    if (p.status) atomicOr(p.status, problem);
    return none;
  }
  const int in_page = slot & ((1 << p.rows.page_rows_log2) - 1);
  if (positions)
    p.rows.positions[t.seq * p.rows.position_seq_stride + group * p.rows.position_head_stride +
                     (int64_t(page) << p.rows.page_rows_log2) + in_page] = __ldg(p.positions + int64_t(t.seq) * p.new_rows + t.row);
  return place_row(side.pool, t.seq, group, page, in_page);
}

// One write a stored row: by the keys, if there are any, and by the first of groups that share pages.
__device__ inline bool writes_positions(const KvlarAppendLowrank& p, int side, int group) {
  const bool own_pages = p.rows.table_head_stride != 0 || p.rows.position_head_stride != 0;
  return p.rows.positions && (side == 0 || p.sides[0].mode == KVLAR_SIDE_NONE) && (group == 0 || own_pages);
}

template <class T, int MT> struct ProjectSide {
  const KvlarAppendLowrank& p;
  const KvlarLatentSide& side;
  const int which;  // 0: keys
  AppendShared<MT>& shared;
  const Division<MT> at;
  const CtaIndex cta;
  const Lane lane;
  const int tokens, first, warp_ranks, passes;  // warp_ranks: those that the warps have at a time
  const bool multiplies;

  __device__ ProjectSide(const KvlarAppendLowrank& params, int w, int index, AppendShared<MT>& memory)
      : p(params), side(params.sides[w]), which(w), shared(memory), at(side.projection), cta(side.projection, index),
        tokens(int(params.seqs * params.new_rows)), first(cta.block * at.rows), warp_ranks(kTileRanks * int(side.projection.rank_warps)),
        passes((int(side.stored) + warp_ranks - 1) / warp_ranks), multiplies(at.warp < kWarps) {}

  __device__ int tile_rank(int pass) const { return pass * warp_ranks + kTileRanks * at.rank_warp; }
  __device__ int lane_rank(int pass) const { return tile_rank(pass) + kLaneRanks * lane.c; }
  __device__ int lane_row(int m, int h) const { return at.row + 16 * m + 8 * h + lane.g; }
  __device__ bool has_tile(int pass) const { return multiplies && tile_rank(pass) < int(side.stored); }
  __device__ bool has_latents(int pass) const { return has_tile(pass) && at.sum_warp == 0; }  // complete ones

  __device__ void find_places() const {
    const bool positions = writes_positions(p, which, cta.group) && cta.part == 0;
    const int start = kPlaceWarp<MT> < 0 ? int(threadIdx.x) : int(threadIdx.x) % 32;
    for (int i = start; i < at.rows; i += kPlaceWarp<MT> < 0 ? 32 * kWarps : 32) {
      RowPlace place = {nullptr, nullptr};
      if (first + i < tokens) place = place_of(p, side, token_of(first + i, p.new_rows), cta.group, positions);
      shared.places[i] = place;
    }
  }

  // Calls `f(row, x)` with the lane's latents of each of its rows.
  template <class F> __device__ void each_piece(const Tile<MT>& z, int pass, const F& f) const {
    if (!has_latents(pass)) return;
    const LaneOffset offset(side.projection, cta.group, lane_rank(pass));
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float x[kLaneRanks];
        lane_latents(x, z[m], offset, h);
        f(lane_row(m, h), x);
      }
  }

  __device__ void store_values(const Tile<MT>& z) const {
    each_piece(z, cta.part, [&](int row, const float(&x)[kLaneRanks]) {
      if (char* to = shared.places[row].codes) *reinterpret_cast<uint4*>(to + 2 * lane_rank(cta.part)) = packed<T>(x);
    });
  }

  // Adds a pass to the ranges of the warp's rows, over its own ranks.
  __device__ void widen_ranges(const Tile<MT>& z, int pass) const {
    each_piece(z, pass, [&](int row, const float(&x)[kLaneRanks]) {
      Range range = Range::none();
#pragma unroll
      for (int i = 0; i < kLaneRanks; ++i)
        if (lane_rank(pass) + i < int(side.projection.rank)) range.widen(x[i]);
      range.widen_by_lane(1);
      range.widen_by_lane(2);
      Range& of_row = shared.ranges[row * int(side.projection.rank_warps) + at.rank_warp];
      if (pass > 0) range.widen(of_row);
      __syncwarp();
      if (lane.c == 0) of_row = range;
    });
  }

  __device__ void store_coded(const Tile<MT>& z, int pass) const {
    const int rank_warps = int(side.projection.rank_warps), with_ranks = min(rank_warps, int(side.stored) / kTileRanks);
    each_piece(z, pass, [&](int row, const float(&x)[kLaneRanks]) {
      const RowPlace to = shared.places[row];
      if (!to.codes) return;
      Range range = Range::none();
      for (int i = 0; i < with_ranks; ++i) range.widen(shared.ranges[row * rank_warps + i]);
      const Affine a = range.affine();
      store_codes(to.codes, x, a, lane_rank(pass), int(side.projection.rank));
      if (lane_rank(pass) == 0) *reinterpret_cast<uint32_t*>(to.params) = pack_affine(a);
    });
  }

  // Parts of the ranks in several CTAs: the last of them encodes.
  __device__ void gather_parts(const Tile<MT>& z) const {
    const int stored = int(side.stored), unit = cta.group * int(side.projection.row_blocks) + cta.block;
    float* const scratch = side.scratch + int64_t(unit) * at.rows * stored;
    each_piece(z, cta.part, [&](int row, const float(&x)[kLaneRanks]) {
      float4* to = reinterpret_cast<float4*>(scratch + row * stored + lane_rank(cta.part));
      to[0] = make_float4(x[0], x[1], x[2], x[3]);
      to[1] = make_float4(x[4], x[5], x[6], x[7]);
    });
    if (!ptx::arrive_last(side.counters + unit, side.projection.parts)) return;
    for (int row = at.warp; row < at.rows; row += kAppendWarps<MT>)
      if (shared.places[row].codes)
        store_row_of<T>(shared.places[row], side.codec, ScratchLoad{scratch + row * stored}, int(side.projection.rank), stored);
  }

  // The latents of a pass; the first time also places.
  __device__ void latents(Tile<MT>& z, int pass, bool begin) const {
    if (begin && (kPlaceWarp<MT> < 0 || at.warp == kPlaceWarp<MT>)) find_places();
    if (has_tile(pass)) {
      const LaneRows<MT> rows(side.projection, first + at.row, tokens, p.new_rows);
      multiply<T, MT>(z, side.projection, rows, cta.group, tile_rank(pass), at.sum_warp);
      if (at.sum_warp > 0) shared.partials.put(z, at.warp);
    }
    if (begin) __syncthreads();
    if (has_latents(pass))
      for (int i = 1; i < int(side.projection.sum_warps); ++i) shared.partials.add(z, at.warp + i);
  }

  __device__ void run() const {
    Tile<MT> z;
    const bool whole_rows = side.codec == KVLAR_CODEC_INT8 && side.projection.parts == 1;
    const int rounds = MT > 1 && whole_rows && passes > 1 ? 2 * passes : 1;  // ranges first, then codes
    for (int round = 0; round < rounds; ++round) {
      const int pass = whole_rows ? round % passes : cta.part;
      latents(z, pass, round == 0);
      if (side.codec != KVLAR_CODEC_INT8) {
        store_values(z);
      } else if (!whole_rows) {
        gather_parts(z);
      } else {
        if (round < passes) widen_ranges(z, pass);
        if (round == passes - 1) __syncthreads();  // all warps' ranges are there
        if (rounds == 1 || round >= passes) store_coded(z, pass);
      }
    }
  }
};

// A warp takes one row.
template <class T, int MT> __device__ inline void store_side(const KvlarAppendLowrank& p, int which, int index) {
  const KvlarLatentSide& side = p.sides[which];
  const KvlarProjection& from = side.projection;
  const int tokens = int(p.seqs * p.new_rows), blocks = (tokens + kAppendWarps<MT> - 1) / kAppendWarps<MT>;
  const int group = index / blocks, i = index % blocks * kAppendWarps<MT> + int(threadIdx.x) / 32;
  if (i >= tokens) return;  // a whole warp; there are no barriers of the CTA
  const Token t = token_of(i, p.new_rows);
  const RowPlace to = place_of(p, side, t, group, writes_positions(p, which, group) && threadIdx.x % 32 == 0);
  if (!to.codes) return;
  const uint16_t* row = static_cast<const uint16_t*>(from.x) + t.seq * from.x_seq_stride + group * from.x_head_stride + t.row * from.x_row_stride;
  store_row_of<T>(to, side.codec, RowLoad<T>(row, int(from.rank)), int(from.rank), int(side.stored));
}

template <class T, int MT> __device__ inline void append_lowrank(const KvlarAppendLowrank& p) {
  __shared__ AppendShared<MT> shared;
  const int key_ctas = int(p.sides[0].ctas), which = int(blockIdx.x) < key_ctas ? 0 : 1;
  const int index = int(blockIdx.x) - which * key_ctas;
  if (p.sides[which].mode == KVLAR_SIDE_STORE)
    store_side<T, MT>(p, which, index);
  else
    ProjectSide<T, MT>(p, which, index, shared).run();
}

}  // namespace kvlar::project

#define KVLAR_APPEND_LOWRANK_ENTRY(name, T, MT)                                                                                  \
  extern "C" __global__ void __launch_bounds__(32 * kvlar::project::kAppendWarps<MT>, 1) name(const __grid_constant__ KvlarAppendLowrank p) { \
    kvlar::project::append_lowrank<T, MT>(p);                                                                                    \
  }
