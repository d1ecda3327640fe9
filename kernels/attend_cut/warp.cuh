// Decode attention over the rows that a selection keeps, decided inside: attend/attend.cuh, where of one segment a row is seen
// if and only if its score is at or above the cut of its (sequence, kv head) (select/order.cuh), or it is one of the segment's
// first sink_rows or last recent_rows. Other masks hold as there.
//
//   scores [seqs][kv_heads][score_stride] fp32, cuts [seqs][kv_heads] u64: as scan_select leaves them, so that a step with
//   selection is append, scan_select, attend_cut. (HCAttention, arXiv 2507.19823, §3; the cut: scan/cut.cuh.)
//
// A warp reads the scores of 32 of its tiles at a time, all before it waits for any (a segment after the other: within one, rows
// follow from the first by a constant step), and keeps a mask of the selected rows of each. Tiles without one are skipped before
// anything of theirs is read but scores; of the others only selected rows are: those that are not become 0 in shared memory, so
// that nothing in them reaches a result.
//
// Floor: 4 B a row of scores, and the bytes of the selected rows. 2048 rows of 128K, 8 kv heads, d = 128, bf16: 4.2 MB and
// 8.4 MB, 3 us at 4.3 TB/s. A tile costs the same instructions whether one of its rows is selected or all: where selected
// rows are spread evenly, 2048 of 128K meet a fifth of the tiles.
//
// The work list is attend's, of the lengths alone, and so shared with layers that attend to everything: every CTA has as many
// tiles as another, but not as many selected ones. Where these cluster (recent rows, one passage), the launch takes as long as
// the CTA that has most of them: at worst as the same share takes in attend, never longer by more than its scores.
#pragma once
#include "attend/attend.cuh"
#include "attend/warp.cuh"
#include "select/order.cuh"

namespace kvlar::attend_cut {

using attend::SharedUnit, attend::TilePlace, attend::TileRows;

// T: type of q and of rows. NT: column tiles of 8. `params` is the first member of a KvlarAttendCut.
template <int D, int NT, class T> struct WarpCut : attend::WarpAttend<D, NT, T> {
  using Base = attend::WarpAttend<D, NT, T>;
  using typename Base::Tiles;
  using Base::kBlocks, Base::kWarps, Base::lane, Base::p, Base::ring_s, Base::shared, Base::warp;
  static constexpr int kRows = Tiles::kRows;
  static constexpr int kPerLoad = 32 / kRows, kLoads = 32 / kPerLoad;  // tiles whose scores a load of 32 holds; loads of a look
  static constexpr uint32_t kWhole = kRows == 32 ? ~0u : (1u << (kRows & 31)) - 1;
  using Layout = attend::DenseLayout<D>;

  const KvlarAttendCut& selection;
  const float* const scores;  // of the (sequence, kv head)
  const uint64_t cut;

  __device__ WarpCut(const KvlarAttend& params, SharedUnit& unit, unsigned char* raw)
      : Base(params, unit, raw), selection(reinterpret_cast<const KvlarAttendCut&>(params)),
        scores(selection.scores + head_index() * selection.score_stride), cut(__ldg(selection.cuts + head_index())) {}

  __device__ int64_t head_index() const { return int64_t(shared.unit().seq) * p.kv_heads + shared.unit().head; }

  // ---- which rows

  // No branches, so that a look's rows are judged side by side.
  __device__ __forceinline__ bool selected(int row, int length, float score) const {
    const bool ranks = select::ranked(ordered_key(score), uint32_t(row)) >= cut;
    return (row < int(selection.sink_rows)) | (row >= length - int(selection.recent_rows)) | ranks;
  }

  // Lane l gets the selected rows, a bit each, of tile first + l * kWarps; none beyond `end`.
  __device__ __forceinline__ uint32_t look(int first, int end) const {
    constexpr int kTileStep = kWarps * kRows;  // rows from a warp's tile to its next
    uint32_t own = 0;
    // The tiles of a segment at a time: nearly always all of them.
#pragma unroll 1
    for (int seen = 0, tile = first; seen < 32 && tile < end; tile = first + seen * kWarps) {
      TilePlace from{};
      Base::place_tile(tile, from);
      const int length = shared.unit().length[from.segment];
      const bool scored = from.segment == int(selection.segment);
      // Rows of the segment that are there, of this tile and those after it; a lane's first, as if all tiles were the segment's.
      const int rows = min(length - from.row, (end - tile) * kRows);
      const int start = from.row + (lane / kRows - seen) * kTileStep + lane % kRows;
      float score[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = start + i * kPerLoad * kTileStep;
        score[i] = scored && uint32_t(row - from.row) < uint32_t(rows) ? __ldg(scores + row) : 0.f;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int row = start + i * kPerLoad * kTileStep;
        const bool there = uint32_t(row - from.row) < uint32_t(rows);
        const bool shown = there & (!scored | selected(row, length, score[i]));
        const uint32_t bits = __ballot_sync(0xffffffffu, shown);
        if (lane / kPerLoad == i) own |= bits >> (lane % kPerLoad * (kRows & 31)) & kWhole;
      }
      seen += (rows + kTileStep - 1) / kTileStep;
    }
    return own;
  }

  // Where a warp is among its tiles.
  struct Walk {
    int next, end;   // the first tile that is not looked at
    int first;       // of the 32 that were looked at last
    uint32_t tiles;  // those of them, a bit each, that hold selected rows and are still to come
    uint32_t rows;   // a lane's: selected rows of a tile
  };

  struct Picked {
    int tile = -1;  // none
    uint32_t shown = 0;
  };

  __device__ __forceinline__ Picked pick(Walk& walk) const {
    while (walk.tiles == 0 && walk.next < walk.end) {
      walk.first = walk.next;
      walk.rows = look(walk.first, walk.end);
      walk.next += 32 * kWarps;
      walk.tiles = __ballot_sync(0xffffffffu, walk.rows != 0);
    }
    Picked to;
    if (walk.tiles == 0) return to;
    const int i = __ffs(int(walk.tiles)) - 1;
    walk.tiles &= walk.tiles - 1;
    to.tile = walk.first + i * kWarps;
    to.shown = __shfl_sync(0xffffffffu, walk.rows, i);
    return to;
  }

  // ---- tiles

  // As attend::copy_rows, of the rows that are shown.
  __device__ __forceinline__ void copy_shown(ptx::smem to, const char* base, const KvlarPool& pool, const TileRows& rows, uint32_t shown,
                                             int page_mask, uint32_t dim) const {
    constexpr int kLanes = 8, kPassRows = 32 / kLanes;
    const int r = lane / kLanes, c = lane % kLanes, chunks = int(dim) / 8;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const char* source = base + int64_t(rows.page(b)) * pool.page_stride +
                           uint64_t(uint32_t((rows.row + 16 * b) & page_mask) + uint32_t(r)) * pool.row_stride + 16 * c;
#pragma unroll
      for (int i = 0; i < 16; i += kPassRows) {
        const bool there = shown >> (16 * b + i + r) & 1;
#pragma unroll
        for (int j = 0; j < D / 8; j += kLanes)
          ptx::cp_async16(to + uint32_t(Layout::at(16 * b + i + r, c + j)), source + 16 * j, there && c + j < chunks ? 16 : 0);
        source += uint64_t(pool.row_stride) * kPassRows;
      }
    }
  }

  __device__ __forceinline__ void issue(const TileRows& rows, uint32_t shown, int stage) const {
    const KvlarSegment& s = p.segments[rows.segment];
    const ptx::smem to = ring_s + uint32_t(stage * Tiles::kStageBytes);
    if (shown == kWhole && int(p.head_dim) == D && int(p.value_dim) == D) {
      Base::template copy_tile<false>(rows, to, s);
    } else {
      const int mask = (1 << s.rows.page_rows_log2) - 1;
      copy_shown(to, shared.keys[rows.segment], s.keys, rows, shown, mask, p.head_dim);
      copy_shown(to + Tiles::kValues, shared.values[rows.segment], s.values, rows, shown, mask, p.value_dim);
    }
    Base::template copy_positions<kRows>(rows, to + Tiles::kPositions);
  }

  // As attend::take_tiles, over the tiles that hold selected rows: all stages but one are on their way.
  __device__ void take(int first, int end) {
    const int stages = int(p.stages);
    Walk walk{first + warp, end, 0, 0, 0};
    Picked older, old, next;  // issued the round before last, in the last, and to be issued
    TileRows rows{};
    int to = 0, stage = 0;
#pragma unroll 1
    while (true) {
      if (stages == 3) ptx::cp_async_wait<1>(); else ptx::cp_async_wait<0>();
      __syncwarp();  // every lane's copies of this stage have landed, and every lane is done with the one before
      if (next.tile >= 0) {
        issue(rows, next.shown, to);
        to = to + 1 == stages ? 0 : to + 1;
      }
      ptx::cp_async_commit();
      const Picked now = stages == 3 ? older : old;
      older = old;
      old = next;
      next = pick(walk);
      if (next.tile >= 0) Base::find(next.tile, rows);  // its page ids arrive while a tile is computed
      if (now.tile >= 0) {
        TilePlace place{};
        Base::place_tile(now.tile, place);
        Base::template consume_rows<true>(place, stage, now.shown);
        stage = stage + 1 == stages ? 0 : stage + 1;
      }
      if (next.tile < 0 && old.tile < 0 && (stages < 3 || older.tile < 0)) break;
    }
    ptx::cp_async_wait<0>();
  }
};

}  // namespace kvlar::attend_cut

// One entry point of the warp that follows its name; GPU_EXPORT(name) follows it.
#define KVLAR_ATTEND_CUT_ENTRY(name, ...)                                                                             \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 2) name(const __grid_constant__ KvlarAttendCut p) { \
    GPU_DYN_SMEM(raw);                                                                                                \
    __shared__ kvlar::attend::SharedUnit shared;                                                                      \
    kvlar::attend::Cta<__VA_ARGS__>(p.attend, shared, raw).run();                                                     \
  }
