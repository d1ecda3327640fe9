// Decode attention over low-rank keys: out = softmax(scale * q RoPE(U z + mean)^T, masked) v.
//
//   q [seqs][kv_heads * group][query_rows][d] (rotated); latents z [rows][r_k] of a group of kv heads, before RoPE; values
//   dense [rows][dv] of each head, or latents [rows][r_v] with v = U_v z_v. Exact rows (sinks, recent) are further
//   segments. (ReCalKV, arXiv 2505.24357, §3; Palu, arXiv 2407.21118, §3.3.)
//
// One CTA serves all heads of a set (unit.cuh), so latents are read once a group: their bases lie in shared memory, and
// keys are rebuilt by tensor cores into registers, turned (turns.cuh), multiplied by the queries and forgotten. Values are
// summed as latents; the CTA that is last at a unit expands the sum once. Exact and latent rows, and each slice of the
// value rank, have softmax states of their own, merged in a fixed order: equal bits from run to run.
//
// Floor: max(bytes / bandwidth, flops / tensor rate), with bytes = 2 (r_k + r_v) a row and group, flops = 2 r_k g d for the
// rebuild (+ 2 G g (d + r_v)). Llama-3.1-8B (8 kv heads, d = 128, G = 4), one layer, batch 1, at 4.3 TB/s and 790 TFLOP/s:
//   preset             bytes a token   32K rows: memory, tensor   128K rows
//   speed    g=2 (64, 128)     1536       11.7 us,  6.1 us        46.8 us, 24.4 us
//   quality  g=2 (128, 192) int8 1312     10.0 us, 11.8 us        40.0 us, 47.1 us
//   capacity g=4 (128, 256) int8, int8 basis 784  6.0 us, 6.5 us  23.9 us, 25.8 us
//   full bf16 cache            4096       31.2 us                124.9 us
// Tensor-bound settings save memory, not time. The third roof is issue: see ledger/static.json.
#pragma once
#include "attend_lowrank/bases.cuh"
#include "attend_lowrank/merge.cuh"
#include "attend_lowrank/warp.cuh"

namespace kvlar::attend_lowrank {

// Where a CTA is in its share; in shared memory, since registers are scarce.
struct Progress {
  Work work;
  int phase;
  Tiles tiles;  // of that phase
};

template <class T, int NT, int V, int kLatent> struct Cta {
  using Worker = Warp<T, NT, V, kLatent>;
  using Scoring = typename Worker::Scoring;
  static constexpr bool kInt8 = kLatent != KVLAR_LATENT_DTYPE;

  const KvlarAttendLowrank& lowrank;
  const KvlarAttend& p;
  Unit& unit;
  Progress& progress;
  unsigned char* const memory;
  const int t;
  const KeyBases<T, NT, kLatent> bases;
  const Merge<T, NT, V, kInt8> merge;

  __device__ Cta(const KvlarAttendLowrank& params, Unit& u, Progress& state, unsigned char* shared)
      : lowrank(params), p(params.attend), unit(u), progress(state), memory(shared), t(int(threadIdx.x)), bases{params, u, shared},
        merge(params, u, shared) {}
  __device__ int warps() const { return int(lowrank.shared.warp_count); }
  __device__ int threads() const { return 32 * warps(); }

  __device__ void load_queries() const {
    const int groups = int(lowrank.padded_dim) / 32;
    uint4* queries = reinterpret_cast<uint4*>(memory + lowrank.shared.queries);
#pragma unroll 1
    for (int i = t; i < groups * NT * 32; i += threads()) {
      Lane at;
      at.g = (i & 31) >> 2;
      at.c = i & 3;
      const Worker worker(lowrank, unit, memory);
      queries[i] = Scoring::read_query(lowrank, worker.query_row(8 * (i / 32 % NT) + at.g), i / (32 * NT), at);
    }
  }

  __device__ attend::WorkList<Visible> list() const { return attend::WorkList<Visible>(p); }
  __device__ int slot() const {
    const attend::Share share = list().share(progress.work);
    return list().slot_of_split(share, share.split);
  }

  // One phase's tiles, to the partial result.
  __device__ void run_phase() const {
    if (progress.tiles.first >= progress.tiles.end) return merge.skip(slot(), progress.phase);
    bool int8_values = false;
    int values = int(p.value_dim), first = 0;
    {
      Worker worker(lowrank, unit, memory);
      worker.state.clear();
      if (progress.phase == 0) {
        worker.take_exact(progress.tiles);
      } else {
        worker.take_latent(progress.phase - 1, progress.tiles);
        values = worker.slice_values(progress.phase - 1);
        first = int(p.value_dim) + worker.slice_first(progress.phase - 1);
        int8_values = lowrank.value_rank && int8_latent_values();
      }
      __syncthreads();  // all rings are drained: their memory becomes scratch
      merge.store_warp(worker.state, worker.at, values, int8_values);
    }
    __syncthreads();
    merge.merge_warps(slot(), progress.phase, first, values);
  }

  __device__ bool int8_latent_values() const {
    bool yes = false;
    FOR_EACH_SEGMENT(p, s) yes = yes || (is_latent(p, s) && p.segments[s].value_format.codec == KVLAR_CODEC_INT8);
    return kInt8 && yes;
  }

  // ---- one CTA's share of the work list

  // The unit of the record that has just been read, by the warp that did.
  __device__ void load_shared() const {
    static_assert(attend::WorkList<Visible>::kCtaWords <= 32, "a warp reads all of a record");
    if (t >= 32) return;
    __syncwarp();
    load_unit(lowrank, progress.work, unit, t);
  }

  __device__ void begin_phase(int phase) const {  // one thread
    const int first = phase == 0 ? 0 : unit.exact_tiles + (phase - 1) * unit.latent_tiles;
    const int count = phase == 0 ? unit.exact_tiles : unit.latent_tiles;
    progress.phase = phase;
    const attend::Share share = list().share(progress.work);
    progress.tiles = {max(0, min(share.tile - first, count)), max(0, min(share.tile_end - first, count))};
  }

  __device__ void run_unit() const {
    bases.load(warps());
    load_queries();
    if (t == 0) begin_phase(0);
    __syncthreads();
    while (progress.phase < merge.phases()) {
      run_phase();
      __syncthreads();  // scratch is free again, and the phase known to all
      if (t == 0) begin_phase(progress.phase + 1);
      __syncthreads();
    }
    const attend::Share share = list().share(progress.work);
    if (ptx::arrive_last(p.counters + progress.work.index, uint32_t(share.splits))) {
      merge.merge_splits(share);
      __syncthreads();
      merge.expand();
    }
  }

  __device__ void run() const {
    attend::begin_work(p, progress.work, t);
    load_shared();
    // A warp is waiting for the unit: the others, if there are any, work out the turns.
    const int idle = warps() > 1 ? 32 : 0;
    if (t >= idle)
      fill_turns(lowrank.rope, reinterpret_cast<float4*>(memory + lowrank.shared.turns), int(lowrank.padded_dim) / 32, t - idle, threads() - idle);
    __syncthreads();
    bool more = progress.work.cell < progress.work.cell_end;
    while (more) {
      if (unit.columns > 0) run_unit();  // else: the query tile lies beyond its set's heads
      more = attend::next_work(p, progress.work, t);
      if (more) load_shared();
      __syncthreads();  // shared memory is free, and the unit known
    }
  }
};

}  // namespace kvlar::attend_lowrank

// One entry point; GPU_EXPORT(name) follows it.
#define KVLAR_ATTEND_LOWRANK_ENTRY(name, T, NT, V, kLatent)                                                             \
  extern "C" __global__ void __launch_bounds__(256, 1) name(const __grid_constant__ KvlarAttendLowrank p) {             \
    GPU_DYN_SMEM(raw);                                                                                                  \
    __shared__ kvlar::attend_lowrank::Unit unit;                                                                        \
    __shared__ kvlar::attend_lowrank::Progress progress;                                                                \
    kvlar::attend_lowrank::Cta<T, NT, V, kLatent>(p, unit, progress, raw).run();                                        \
  }
