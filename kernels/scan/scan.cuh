// scan: what attention's first half knows of every cached row, without the second.
//
//   logit[h][t] = scale * q_h · decode(k_t),  lse[h] = ln sum_t exp(logit[h][t]),  score[t] = mean or max over the heads h of a
//   kv head (HCAttention, arXiv 2507.19823, §3; Quest and others select by such scores).
//
//   q [seqs][kv_heads * group][d] (rotated), keys as KvlarRows / KvlarPool say -> scores [seqs][kv_heads][row_count].
//
// The work list, its units (seq, kv head, tile of query heads), the rings of a warp and the tiles are attend's. A warp has the
// logits of 32 rows at a time; they become scores in registers, so that 4 B a row are written for the whole group, counted in
// shared memory where a histogram is asked for (2048 bins, a shared atomic a row: at most 8000 a SM for 128K rows of 8 heads,
// under 5 us that hide behind the rows), and added to a running (max, sum) a lane where an lse is.
//
// max_prob needs lse before it knows any score. It takes a second launch (reduce) over logits that the first one wrote: 8 G B
// a row there and back, much of it in L2, where reading the keys again takes 68 B (int4, d = 128): equal at G = 8, and the
// logits need no unpacking. So does a group of more heads than a tile has columns.
//
// scan_select: with `select.cuts` the CTA that writes the last scores of a kv head also finds their cut (cut.cuh), so that a step
// takes a launch less. Not where scores are made of logits, nor for rows beyond 32K.
//
// Floor: bytes of the keys / read bandwidth. Llama-3.1-8B shape (8 kv heads, d = 128, 128K rows, batch 1, 1M rows) at 4.3 TB/s,
// and 1 us for the scores: bf16 62.4 us, 8 bits 31.7, int4 16.6, int2 8.8, pq 64 x 8 15.6 (rows.cuh and centroids.cuh say what
// lookups cost: they bound pq).
#pragma once
#include "attend/columns.cuh"
#include "device/order.cuh"
#include "scan/cut.cuh"
#include "scan/log_sum.cuh"

namespace kvlar::scan {

using attend::TilePlace;

struct SharedScan {  // what all warps of a CTA know
  attend::SharedUnit unit;
  LogSum states[4][16];  // [warp][column]
  float centroid_scale;  // pq: what stored centroids are multiplied by
  SharedCut cut;
};

// Where the results of a unit go.
struct Outputs {
  float* scores;   // of the kv head, or null
  float* logits;   // of the tile's first query head, or null
  uint32_t* bins;  // in shared memory, or null
  int heads;       // of the tile
  bool sums;       // whether an lse is wanted

  __device__ Outputs(const KvlarScan& scan, const attend::Unit& unit, unsigned char* raw, int columns) {
    const KvlarAttend& p = scan.attend;
    const int64_t head = int64_t(unit.seq) * p.kv_heads + unit.head;
    scores = scan.scores ? scan.scores + head * scan.row_count : nullptr;
    logits = scan.logits ? scan.logits + (head * p.group + unit.query_tile * columns) * scan.row_count : nullptr;
    bins = scan.histogram || scan.select.cuts ? reinterpret_cast<uint32_t*>(raw + scan.shared_bins) : nullptr;
    heads = attend::columns_in_use(p, unit.query_tile);
    sums = p.lse != nullptr;
  }

  __device__ void put_score(int row, float x) const {
    scores[row] = x;
    if (bins) atomicAdd(bins + score_bin(x), 1u);
  }
};

template <class Warp> struct Cta {
  static constexpr int kColumns = Warp::kColumns, kWarps = Warp::kWarps, kThreads = Warp::kThreads;

  const KvlarScan& scan;
  const KvlarAttend& p;
  SharedScan& shared;
  unsigned char* const raw;
  const int t;
  const attend::WorkList<attend::Unit> list;

  __device__ Cta(const KvlarScan& params, SharedScan& memory, unsigned char* dynamic)
      : scan(params), p(params.attend), shared(memory), raw(dynamic), t(int(threadIdx.x)), list(params.attend) {}

  __device__ float2* partial(int slot, int column) const { return reinterpret_cast<float2*>(p.partials) + slot * kColumns + column; }

  // This split's part of the rows that there are none of.
  __device__ void fill(const Outputs& out, const attend::Share& share) const {
    if (!scan.fill) return;
    const int length = shared.unit.unit().length[0], rest = max(0, int(scan.row_count) - length);
    const int first = length + int(int64_t(rest) * share.split / share.splits);
    const int last = length + int(int64_t(rest) * (share.split + 1) / share.splits);
    for (int row = first + t; row < last; row += kThreads) {
      if (out.scores) out.scores[row] = -INFINITY;
      if (out.logits)
        for (int h = 0; h < out.heads; ++h) out.logits[int64_t(h) * scan.row_count + row] = -INFINITY;
    }
  }

  __device__ void put_lse(int column, LogSum state) const {
    const attend::Unit& unit = shared.unit.unit();
    p.lse[(int64_t(unit.seq) * p.kv_heads + unit.head) * p.group + unit.query_tile * kColumns + column] = state.value();
  }

  // What the warps found becomes the unit's result, or a part of it.
  __device__ void merge_warps(const Outputs& out, const attend::Share& share) const {
    if (out.sums && t < out.heads) {
      LogSum state = shared.states[0][t];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) state = LogSum::merge(state, shared.states[w][t]);
      if (share.splits == 1) put_lse(t, state);
      else __stcg(partial(list.slot_of_split(share, share.split), t), make_float2(state.top, state.sum));
    }
    if (!out.bins) return;
    const int64_t head = int64_t(shared.unit.unit().seq) * p.kv_heads + shared.unit.unit().head;
    if (share.splits > 1) {
      add_counts(out.bins, scan.counts + head * KVLAR_SCORE_BINS);
    } else if (scan.histogram) {
      for (int i = t; i < KVLAR_SCORE_BINS; i += kThreads) scan.histogram[head * KVLAR_SCORE_BINS + i] = out.bins[i];
    }
  }

  // The last CTA of a unit merges what all have found, in a fixed order. All wait for it: its loads wait together.
  __device__ void merge_splits(const Outputs& out, const attend::Share& share) const {
    const int lane = t & 31;
    for (int column = t / 32; out.sums && column < out.heads; column += kWarps) {  // a warp a column, a lane a split
      LogSum state = LogSum::empty();
#pragma unroll 2
      for (int s = lane; s < share.splits; s += 32) {
        const float2 part = __ldcg(partial(list.slot_of_split(share, s), column));
        state = LogSum::merge(state, {part.x, part.y});
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2) state = LogSum::merge(state, state.of_lane(step));
      if (lane == 0) put_lse(column, state);
    }
    if (!out.bins) return;
    const int64_t head = int64_t(shared.unit.unit().seq) * p.kv_heads + shared.unit.unit().head;
    uint32_t* const histogram = scan.histogram ? scan.histogram + head * KVLAR_SCORE_BINS : nullptr;
    take_counts(scan.counts + head * KVLAR_SCORE_BINS, [&](int i, uint32_t count) {
      if (histogram) histogram[i] = count;
      out.bins[i] = count;
    });
  }

  // The cut of a kv head whose scores are all written and counted.
  __device__ void select(const Outputs& out) const {
    const KvlarTopk& s = scan.select;
    const attend::Unit& unit = shared.unit.unit();
    const int64_t head = int64_t(unit.seq) * p.kv_heads + unit.head;
    const int k = s.ks ? min(int(__ldg(s.ks + head * s.k_stride)), int(s.k)) : int(s.k);
    // Lists take the place of the rings.
    const CutFinder<kThreads> cut(s, out.scores, unit.length[0], shared.cut, out.bins, raw, int(scan.shared_bins));
    const uint64_t found = cut.find(k);
    if (t == 0) s.cuts[head] = found;
  }

  __device__ void run() const {
    int staged_head = -1;
    shared.unit.begin(p, t);
    __syncthreads();
    bool more = shared.unit.work.cell < shared.unit.work.cell_end;
    while (more) {
      const Outputs out(scan, shared.unit.unit(), raw, kColumns);
      if (out.bins)
        for (int i = t; i < KVLAR_SCORE_BINS; i += kThreads) out.bins[i] = 0;
      {
        Warp warp(scan, shared, raw, out, staged_head);
        const attend::Share share = list.share(shared.unit.work);
        take_tiles(warp, kWarps, shared.unit.first_tile(share), shared.unit.tile_end(share));
        if (out.sums) warp.store_sums();
      }
      const attend::Share share = list.share(shared.unit.work);
      fill(out, share);
      __syncthreads();
      merge_warps(out, share);
      bool last = share.splits == 1;
      if (!last && (out.sums || out.bins) && ptx::arrive_last(p.counters + shared.unit.work.index, uint32_t(share.splits))) {
        merge_splits(out, share);
        last = true;
      }
      if (last && scan.select.cuts) {
        __syncthreads();  // merged counts
        select(out);
      }
      more = shared.unit.next(p, t);
      __syncthreads();  // states and bins are free, and the unit known
    }
  }
};

}  // namespace kvlar::scan

// One entry point of the warp that follows its name, `ctas` of which an SM must hold; GPU_EXPORT(name) follows it.
#define KVLAR_SCAN_ENTRY(name, ctas, ...)                                                                             \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, ctas) name(const __grid_constant__ KvlarScan p) { \
    GPU_DYN_SMEM(raw);                                                                                                \
    __shared__ kvlar::scan::SharedScan shared;                                                                        \
    kvlar::scan::Cta<__VA_ARGS__>(p, shared, raw).run();                                                              \
  }
