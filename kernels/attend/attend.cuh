// Decode attention over paged rows: out = softmax(scale * q k^T, masked) v, and lse = ln sum exp(logit).
//
//   q [seqs][kv_heads * group][query_rows][d] (rotated), rows as KvlarRows / KvlarPool say, out [..][dv].
//   (FlashAttention-2, Dao 2023, §3; split rows as in Flash-Decoding; balanced cuts as in stream-K.)
//
// One CTA takes a contiguous share of the work list (work_list.cuh), unit by unit. Its warps take tiles
// in turn, each through a private ring of cp.async stages: no barrier in the loop. Rows are M and the
// packed (query row, head) columns N of the tensor-core tiles, so a kv head's rows are read once for its
// whole group. At the end of a unit the warps' states merge in shared memory; a unit cut into splits is
// merged by the CTA that arrives last, in split order, so that results are equal bit for bit from run to run.
//
// Floor: bytes of the rows / read bandwidth. Llama-3.1-8B shape (8 kv heads, d = 128, 128K rows, batch 1):
// bf16 0.54 GB, 125 us at 4.3 TB/s. In flight on Hopper: 2 stages x 8 KB x 4 warps x 2 CTAs =
// 128 KB an SM. Main-loop instructions per 16 rows and the issue time they imply: ledger/static.json.
#pragma once
#include "attend/columns.cuh"
#include "attend/split_states.cuh"
#include "attend/state.cuh"

namespace kvlar::attend {

template <class Warp> struct Cta {
  static constexpr int D = Warp::kDim, NT = Warp::kTiles, kColumns = 8 * NT, kWarps = Warp::kWarps, kThreads = Warp::kThreads;
  static constexpr int kScratchRow = D + 4;  // floats a column in the merge of warps: conflict-free stores
  static_assert(kWarps * kColumns * (kScratchRow + 2) * 4 <= Warp::kLeastShared, "the merge reuses the ring");

  const KvlarAttend& p;
  SharedUnit& shared;
  unsigned char* const raw;
  const int t;
  const WorkList<Unit> list;

  __device__ Cta(const KvlarAttend& params, SharedUnit& unit, unsigned char* memory)
      : p(params), shared(unit), raw(memory), t(int(threadIdx.x)), list(params) {}

  __device__ float* scratch(int warp, int column) const {
    return reinterpret_cast<float*>(raw) + (warp * kColumns + column) * kScratchRow;
  }
  __device__ float* scratch_state(int warp, int column) const {  // (top, sum)
    return reinterpret_cast<float*>(raw) + kWarps * kColumns * kScratchRow + (warp * kColumns + column) * 2;
  }
  __device__ float* partial(int slot, int column) const {
    return p.partials + (int64_t(slot) * kColumns + column) * p.value_dim;
  }
  __device__ float* partial_state(int slot, int column) const {
    return p.partials + int64_t(p.slots) * kColumns * p.value_dim + (int64_t(slot) * kColumns + column) * 2;
  }

  // Sums of the lane's rows become sums of the warp's.
  __device__ void store_warp(const ColumnState<D, NT>& state, const Lane& at) const {
    const int warp = t / 32;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + 2 * at.c + e;
        const float sum = column_sum(state.sum[n][e]);
        float* row = scratch(warp, column);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
          if constexpr (Warp::Dims::kNeighbours) {  // four of a lane at once: apart, lanes would meet in banks
            if (i % 2 == 0)
              *reinterpret_cast<float4*>(row + Warp::Dims::at(i, at.g, 0)) =
                  make_float4(state.o[i][n][e], state.o[i][n][e + 2], state.o[i + 1][n][e], state.o[i + 1][n][e + 2]);
          } else {
            row[Warp::Dims::at(i, at.g, 0)] = state.o[i][n][e];
            row[Warp::Dims::at(i, at.g, 1)] = state.o[i][n][e + 2];
          }
        }
        if (at.g == 0) {
          scratch_state(warp, column)[0] = state.top[n][e];
          scratch_state(warp, column)[1] = sum;
        }
      }
  }

  // ---- results

  // The factor that turns a merged, unnormalized output into the result, and the column's lse.
  __device__ float normalize(int column, float top, float sum, bool first_thread) const {
    const int i = shared.unit().query_tile * kColumns + column;
    const int row = query_row_of(p, i), head = (shared.unit().head - row) * int(p.group) + i;
    float scale = 1.f;
    if (p.sink_logits) {  // one more logit in the denominator
      const float sink = __ldg(p.sink_logits + head) * kLog2E, raised = fmaxf(top, sink);
      scale = ptx::ex2_approx(top - raised);
      sum = sum * scale + ptx::ex2_approx(sink - raised);
      top = raised;
    }
    if (first_thread && p.lse)
      p.lse[(int64_t(shared.unit().seq) * p.kv_heads * p.group + head) * p.query_rows + row] =
          sum == 0.f ? -INFINITY : (top + __log2f(sum)) * kLn2;
    return sum == 0.f ? 0.f : scale / sum;
  }

  __device__ void write_out(int column, int dim, float4 x, float factor) const {
    const int i = shared.unit().query_tile * kColumns + column;
    const int row = query_row_of(p, i), head = (shared.unit().head - row) * int(p.group) + i;
    const int64_t at = shared.unit().seq * p.out_seq_stride + head * p.out_head_stride + row * p.out_row_stride + dim;
    x.x *= factor; x.y *= factor; x.z *= factor; x.w *= factor;
    if (p.out_dtype == KVLAR_DTYPE_F32) *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = x;
    else if (p.out_dtype == KVLAR_DTYPE_F16) *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + at) = make_uint2(ptx::pack_f16(x.x, x.y), ptx::pack_f16(x.z, x.w));
    else *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + at) = make_uint2(ptx::pack_bf16(x.x, x.y), ptx::pack_bf16(x.z, x.w));
  }

  __device__ static void add_scaled(float4& sum, float factor, float4 x) {
    sum.x = fmaf(factor, x.x, sum.x); sum.y = fmaf(factor, x.y, sum.y);
    sum.z = fmaf(factor, x.z, sum.z); sum.w = fmaf(factor, x.w, sum.w);
  }

  // Merges the warps' states; the whole unit becomes the result, a part of it a partial result.
  __device__ void merge_warps(const Share& share) const {
    const int quads = int(p.value_dim) / 4, columns = columns_in_use(p, shared.unit().query_tile);
    for (int i = t; i < columns * quads; i += kThreads) {
      const int column = i / quads, dim = i % quads * 4;
      float top = kFloor, sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) top = fmaxf(top, scratch_state(w, column)[0]);
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float factor = ptx::ex2_approx(scratch_state(w, column)[0] - top);
        sum = fmaf(factor, scratch_state(w, column)[1], sum);
        add_scaled(x, factor, *reinterpret_cast<const float4*>(scratch(w, column) + dim));
      }
      if (share.splits == 1) {
        write_out(column, dim, x, normalize(column, top, sum, dim == 0));
      } else {
        const int slot = list.slot_of_split(share, share.split);
        __stcg(reinterpret_cast<float4*>(partial(slot, column) + dim), x);
        if (dim == 0) __stcg(reinterpret_cast<float2*>(partial_state(slot, column)), make_float2(top, sum));
      }
    }
  }

  // The last CTA of a unit merges its partial results, in a fixed order. All wait for it: its loads wait together.
  __device__ void merge_splits(const Share& share) const {
    constexpr int kAtOnce = 8;
    const int quads = int(p.value_dim) / 4, columns = columns_in_use(p, shared.unit().query_tile);
    float2* const merged = reinterpret_cast<float2*>(raw);  // a column's top, and the factor of its result
    merge_columns(merged, share, columns);
    __syncthreads();
    for (int i = t; i < columns * quads; i += kThreads) {
      const int column = i / quads, dim = i % quads * 4;
      const float top = merged[column].x;
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
      for (int first = 0; first < share.splits; first += kAtOnce) {
        float from[kAtOnce];
        float4 part[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int slot = list.slot_of_split(share, min(first + j, share.splits - 1));
          from[j] = __ldcg(partial_state(slot, column));
          part[j] = __ldcg(reinterpret_cast<const float4*>(partial(slot, column) + dim));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (first + j < share.splits) add_scaled(x, ptx::ex2_approx(from[j] - top), part[j]);
      }
      write_out(column, dim, x, merged[column].y);
    }
  }

  // A warp a column.
  __device__ void merge_columns(float2* merged, const Share& share, int columns) const {
    for (int column = t / 32; column < columns; column += kWarps) {
      const float2 state = merge_states(share.splits, [&](int s) {
        return __ldcg(reinterpret_cast<const float2*>(partial_state(list.slot_of_split(share, s), column)));
      });
      if (t % 32 == 0) merged[column] = make_float2(state.x, normalize(column, state.x, state.y, true));
    }
  }

  __device__ void run() const {
    shared.begin(p, t);
    __syncthreads();
    bool more = shared.work.cell < shared.work.cell_end;
    while (more) {
      {
        Warp warp(p, shared, raw);
        warp.start();
        const Share share = list.share(shared.work);
        warp.take(shared.first_tile(share), shared.tile_end(share));
        warp.finish();
        __syncthreads();  // all rings are drained: their memory becomes scratch
        store_warp(warp.state, warp.at);
      }
      __syncthreads();
      const Share share = list.share(shared.work);
      merge_warps(share);
      if (share.splits > 1 && ptx::arrive_last(p.counters + shared.work.index, uint32_t(share.splits))) merge_splits(share);
      more = shared.next(p, t);
      __syncthreads();  // scratch is free, and the unit known
    }
  }
};

}  // namespace kvlar::attend

// One entry point of the warp that follows its name; GPU_EXPORT(name) follows it.
#define KVLAR_ATTEND_ENTRY(name, ...)                                                                              \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, 2) name(const __grid_constant__ KvlarAttend p) { \
    GPU_DYN_SMEM(raw);                                                                                             \
    __shared__ kvlar::attend::SharedUnit shared;                                                                   \
    kvlar::attend::Cta<__VA_ARGS__>(p, shared, raw).run();                                                         \
  }
