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
#include "attend/work_list.cuh"
#include "attend_lowrank/warp.cuh"

namespace kvlar::attend_lowrank {

// Where a CTA is in its share; in shared memory, since registers are scarce.
struct Progress {
  int cell, cell_end;  // next of the work list
  int index, unit;     // of the next cell, and at hand
  attend::Share share;
};

template <class T, int NT, int V, int kLatent> struct Cta {
  using Worker = Warp<T, NT, V, kLatent>;
  using Scoring = typename Worker::Scoring;
  static constexpr int kColumns = 8 * NT, kScratchRow = V + 4;
  static constexpr bool kInt8 = kLatent != KVLAR_LATENT_DTYPE, kByteBasis = kLatent == KVLAR_LATENT_INT8_BASIS;

  const KvlarAttendLowrank& lowrank;
  const KvlarAttend& p;
  Unit& unit;
  Progress& progress;
  unsigned char* const memory;
  const int t;

  __device__ Cta(const KvlarAttendLowrank& params, Unit& u, Progress& state, unsigned char* shared)
      : lowrank(params), p(params.attend), unit(u), progress(state), memory(shared), t(int(threadIdx.x)) {}
  __device__ int warps() const { return int(lowrank.shared.warp_count); }
  __device__ int threads() const { return 32 * warps(); }

  // ---- what a unit keeps in shared memory

  // Element of a basis row, as a number.
  __device__ float basis_value(int64_t row, int i) const {
    if constexpr (kByteBasis) return float(static_cast<const int8_t*>(lowrank.key_basis)[row + i]);
    else if constexpr (kInt8) return Half16<__half>::unpack(static_cast<const uint16_t*>(lowrank.key_basis)[row + i]).x;
    else return Half16<T>::unpack(static_cast<const uint16_t*>(lowrank.key_basis)[row + i]).x;
  }

  // Basis rows, their sums and the means of the tile's heads, in the order of the rebuild.
  __device__ void load_bases() const {
    const int groups = int(lowrank.padded_dim) / 32, rows = unit.heads * groups * 32, rank = int(lowrank.key_rank);
#pragma unroll 1
    for (int i = t; i < rows; i += threads()) {
      const int head = i / (32 * groups), pair = i / 32 % groups * kGroupPairs + i % 16, dim = dim_of_pair(lowrank.rope, pair, i / 16 % 2);
      const bool exists = dim < int(p.head_dim);
      const int64_t row = unit.seq * lowrank.key_basis_seq_stride + (int64_t(unit.head[head]) * p.head_dim + dim) * rank;
      if (lowrank.shared.resident) {
        const SwizzledRows layout(Scoring::Latents::basis_chunks(rank));
        const uint32_t* from = reinterpret_cast<const uint32_t*>(static_cast<const char*>(lowrank.key_basis) + (row << Scoring::kBasisShift));
#pragma unroll 1
        for (int w = 0; w < layout.row_bytes / 4; w += 8) {  // 32 bytes in the order of the fragments
          uint32_t x[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) x[j] = exists ? __ldg(from + w + Scoring::Latents::basis_word(j)) : 0u;
          *reinterpret_cast<uint4*>(memory + lowrank.shared.basis + layout.at(i, w / 4)) = make_uint4(x[0], x[1], x[2], x[3]);
          *reinterpret_cast<uint4*>(memory + lowrank.shared.basis + layout.at(i, w / 4 + 1)) = make_uint4(x[4], x[5], x[6], x[7]);
        }
      }
      if constexpr (kInt8) {
        float sum = 0.f;
#pragma unroll 1
        for (int r = 0; exists && r < rank; ++r) sum += basis_value(row, r);
        reinterpret_cast<float*>(memory + lowrank.shared.basis_sums)[i] = sum;
      }
      if (lowrank.key_mean) {
        float mean = exists ? __ldg(lowrank.key_mean + int64_t(unit.head[head]) * p.head_dim + dim) : 0.f;
        if constexpr (kByteBasis) {
          const float scale = __ldg(lowrank.key_scales + unit.seq * lowrank.key_scales_seq_stride +
                                    int64_t(unit.head[head]) * (lowrank.padded_dim / 2) + pair);
          mean = scale > 0.f ? mean / (128.f * scale) : 0.f;
        }
        reinterpret_cast<float*>(memory + lowrank.shared.means)[i] = mean;
      }
    }
  }

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

  // ---- partial results: [slot][column][width], then (top, sum) as [slot][column][phase]; phase 0 is the exact rows

  __device__ int latent_width() const { return lowrank.value_rank ? int(lowrank.value_rank) : int(p.value_dim); }
  __device__ int width() const { return int(p.value_dim) + latent_width(); }
  __device__ int phases() const { return 1 + int(lowrank.slices); }
  __device__ float* partial(int slot, int column) const { return p.partials + (int64_t(slot) * kColumns + column) * width(); }
  __device__ float2* partial_state(int slot, int column, int phase) const {
    float* states = p.partials + int64_t(p.slots) * kColumns * width();
    return reinterpret_cast<float2*>(states) + (int64_t(slot) * kColumns + column) * phases() + phase;
  }

  // ---- merging of warps

  __device__ float* scratch(int warp, int column) const {
    return reinterpret_cast<float*>(memory + lowrank.shared.warps) + (warp * kColumns + column) * kScratchRow;
  }
  __device__ float* scratch_state(int warp, int column) const { return scratch(warps(), 0) + (warp * kColumns + column) * 2; }

  __device__ void store_warp(const ColumnState<NT, V>& state, const Lane& at, int values, bool int8_values) const {
    const int warp = t / 32;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + 2 * at.c + e;
        const float sum = column_sum(state.sum[n][e]);
        float shift = 0.f;  // the zeros of int8 values and the 1024 of their codes enter here, once
        if (kInt8 && int8_values) shift = column_sum(state.zero[n][e]) - 1024.f * state.weight[n][e];
#pragma unroll
        for (int i = 0; i < V / 16; ++i)
          if (16 * i < values) {
            scratch(warp, column)[value_dim_of(i, at.g, 0, int8_values)] = state.o[i][n][e] + shift;
            scratch(warp, column)[value_dim_of(i, at.g, 1, int8_values)] = state.o[i][n][e + 2] + shift;
          }
        if (at.g == 0) {
          scratch_state(warp, column)[0] = state.top[n][e];
          scratch_state(warp, column)[1] = sum;
        }
      }
  }

  __device__ void merge_warps(int slot, int phase, int first, int values) const {
#pragma unroll 1
    for (int i = t; i < unit.columns * values; i += threads()) {
      const int column = i / values, dim = i % values;
      float top = attend::kFloor, sum = 0.f, x = 0.f;
#pragma unroll 1
      for (int w = 0; w < warps(); ++w) top = fmaxf(top, scratch_state(w, column)[0]);
#pragma unroll 1
      for (int w = 0; w < warps(); ++w) {
        const float factor = ptx::ex2_approx(scratch_state(w, column)[0] - top);
        sum = fmaf(factor, scratch_state(w, column)[1], sum);
        x = fmaf(factor, scratch(w, column)[dim], x);
      }
      __stcg(partial(slot, column) + first + dim, x);
      if (dim == 0) __stcg(partial_state(slot, column, phase), make_float2(top, sum));
    }
  }

  // Tiles [from, end) of one phase, to the partial result.
  __device__ void run_phase(int slot, int phase, int from, int end) const {
    const int slice = phase - 1;
    if (from >= end) {  // nothing of it in this share
#pragma unroll 1
      for (int c = t; c < unit.columns; c += threads()) __stcg(partial_state(slot, c, phase), make_float2(attend::kFloor, 0.f));
      return;
    }
    bool int8_values = false;
    int values = int(p.value_dim), first = 0;
    {
      Worker worker(lowrank, unit, memory);
      worker.state.clear();
      if (phase == 0) {
        worker.take_exact(from, end);
      } else {
        worker.take_latent(slice, from, end);
        values = worker.slice_values(slice);
        first = int(p.value_dim) + worker.slice_first(slice);
        int8_values = lowrank.value_rank && int8_latent_values();
      }
      __syncthreads();  // all rings are drained: their memory becomes scratch
      store_warp(worker.state, worker.at, values, int8_values);
    }
    __syncthreads();
    merge_warps(slot, phase, first, values);
    __syncthreads();  // scratch is free again
  }

  __device__ bool int8_latent_values() const {
    bool yes = false;
    FOR_EACH_SEGMENT(p, s) yes = yes || (is_latent(p, s) && p.segments[s].value_format.codec == KVLAR_CODEC_INT8);
    return kInt8 && yes;
  }

  // ---- the result, by the CTA that is last at a unit

  __device__ float* merged(int column) const { return reinterpret_cast<float*>(memory + lowrank.shared.warps) + column * width(); }
  __device__ float* merged_state(int column) const { return merged(kColumns) + 2 * column; }

  // All partial results of the unit into shared memory, unnormalized; the states' (top, sum) with the sink.
  __device__ void merge_splits(const attend::Share& share) const {
    const int all = width(), dv = int(p.value_dim);
#pragma unroll 1
    for (int i = t; i < unit.columns * all; i += threads()) {
      const int column = i / all, dim = i % all;
      const int phase = dim < dv ? 0 : 1 + (lowrank.value_rank ? (dim - dv) / int(lowrank.slice_width) : 0);
      float top = attend::kFloor;
#pragma unroll 1
      for (int s = 0; s < share.splits; ++s)
#pragma unroll 1
        for (int f = 0; f < phases(); ++f) top = fmaxf(top, __ldcg(partial_state(attend::slot_of_split(share, s), column, f)).x);
      float x = 0.f, sum = 0.f;
#pragma unroll 1
      for (int s = 0; s < share.splits; ++s) {
        const int slot = attend::slot_of_split(share, s);
#pragma unroll 1
        for (int f = 0; f < min(phases(), 2); ++f) {  // further slices see the same rows again
          const float2 state = __ldcg(partial_state(slot, column, f));
          sum = fmaf(ptx::ex2_approx(state.x - top), state.y, sum);
        }
        const float own = __ldcg(partial_state(slot, column, phase)).x;
        if (own > attend::kFloor) x = fmaf(ptx::ex2_approx(own - top), __ldcg(partial(slot, column) + dim), x);
      }
      merged(column)[dim] = x;
      if (dim == 0) {
        merged_state(column)[0] = top;
        merged_state(column)[1] = sum;
      }
    }
  }

  // The factor that turns an unnormalized sum into the result; one thread writes the column's lse.
  __device__ float normalize(int column, bool first_thread) const {
    const int query_head = unit.column_query_head[column], row = unit.column_row[column];
    float top = merged_state(column)[0], sum = merged_state(column)[1], scale = 1.f;
    if (p.sink_logits) {  // one more logit in the denominator
      const float sink = __ldg(p.sink_logits + query_head) * kLog2E, raised = fmaxf(top, sink);
      scale = ptx::ex2_approx(top - raised);
      sum = sum * scale + ptx::ex2_approx(sink - raised);
      top = raised;
    }
    if (first_thread && p.lse)
      p.lse[(int64_t(unit.seq) * p.kv_heads * p.group + query_head) * p.query_rows + row] =
          sum == 0.f ? -INFINITY : (top + __log2f(sum)) * kLn2;
    return sum == 0.f ? 0.f : scale / sum;
  }

  // out = plain + U_v latent, normalized; a thread takes one dim of one head, and four columns at a time.
  __device__ void expand() const {
    const int dv = int(p.value_dim), rank = int(lowrank.value_rank), a_head = unit.heads > 1 ? columns_a_head(p) : unit.columns;
#pragma unroll 1
    for (int i = t; i < unit.heads * dv; i += threads()) {
      const int head = i / dv, dim = i % dv;
      const uint16_t* basis = static_cast<const uint16_t*>(lowrank.value_basis) + unit.seq * lowrank.value_basis_seq_stride +
                              (int64_t(unit.head[head]) * dv + dim) * rank;
#pragma unroll 1
      for (int first = head * a_head; first < (head + 1) * a_head; first += 4) {
        float x[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] = first + c < (head + 1) * a_head ? merged(first + c)[dim] : 0.f;
        if (!rank) {
#pragma unroll
          for (int c = 0; c < 4; ++c) x[c] += first + c < (head + 1) * a_head ? merged(first + c)[dv + dim] : 0.f;
        }
        for (int r = 0; r < rank; r += 8) {
          const uint4 b = __ldg(reinterpret_cast<const uint4*>(basis + r));
          const float2 u[4] = {Half16<T>::unpack(b.x), Half16<T>::unpack(b.y), Half16<T>::unpack(b.z), Half16<T>::unpack(b.w)};
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (first + c >= (head + 1) * a_head) continue;
            const float* z = merged(first + c) + dv + r;
#pragma unroll
            for (int j = 0; j < 4; ++j) x[c] = fmaf(u[j].y, z[2 * j + 1], fmaf(u[j].x, z[2 * j], x[c]));
          }
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (first + c >= (head + 1) * a_head) continue;
          const float y = x[c] * normalize(first + c, dim == 0);
          const int64_t to = unit.seq * p.out_seq_stride + unit.column_query_head[first + c] * p.out_head_stride +
                             unit.column_row[first + c] * p.out_row_stride + dim;
          if (p.out_dtype == KVLAR_DTYPE_F32) static_cast<float*>(p.out)[to] = y;
          else static_cast<uint16_t*>(p.out)[to] = uint16_t(Half16<T>::pack(y, 0.f));
        }
      }
    }
  }

  // ---- one CTA's share of the work list

  __device__ void begin() const {  // one thread
    const int32_t* record = attend::cta_records(p) + 4 * int(blockIdx.x);
    progress.cell = __ldg(record);
    progress.cell_end = __ldg(record + 1);
    progress.index = __ldg(record + 2);
  }

  __device__ void load_next() const {  // one thread
    const int start = __ldg(attend::cell_starts(p) + progress.index), end = __ldg(attend::cell_starts(p) + progress.index + 1);
    load_unit(lowrank, progress.index, unit);
    progress.share = attend::share_of(p, __ldg(p.work), __ldg(p.work + 1), int(blockIdx.x), progress.cell, progress.cell_end, start, end,
                                      unit.tile_count);
    progress.unit = progress.index;
    progress.cell += progress.share.cells;
    if (progress.cell >= end) ++progress.index;
  }

  __device__ void run_unit() const {
    load_bases();
    load_queries();
    __syncthreads();
    const int slot = attend::slot_of_split(progress.share, progress.share.split);
#pragma unroll 1
    for (int phase = 0; phase < phases(); ++phase) {
      const int first = phase == 0 ? 0 : unit.exact_tiles + (phase - 1) * unit.latent_tiles;
      const int count = phase == 0 ? unit.exact_tiles : unit.latent_tiles;
      run_phase(slot, phase, max(0, min(progress.share.tile - first, count)), max(0, min(progress.share.tile_end - first, count)));
    }
    if (ptx::arrive_last(p.counters + progress.unit, uint32_t(progress.share.splits))) {
      merge_splits(progress.share);
      __syncthreads();
      expand();
    }
  }

  __device__ void run() const {
    if (int(blockIdx.x) >= __ldg(p.work + 1)) return;  // the whole CTA, before any barrier
    fill_turns(lowrank.rope, reinterpret_cast<float4*>(memory + lowrank.shared.turns), int(lowrank.padded_dim) / 32, t, threads());
    if (t == 0) begin();
    __syncthreads();
    while (progress.cell < progress.cell_end) {
      __syncthreads();  // all have seen that there is more
      if (t == 0) load_next();
      __syncthreads();
      if (unit.columns > 0) run_unit();  // else: the query tile lies beyond its set's heads
      __syncthreads();  // shared memory is free again
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
