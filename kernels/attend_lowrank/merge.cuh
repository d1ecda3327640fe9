// From the warps' states to the result: warps merge in shared memory to a partial result of their CTA, the CTA that is last at
// a unit merges those, and expands sums of value latents.
//
// Partial results: [slot][column][width], then (top, sum) as [slot][column][phase]; phase 0 is the exact rows. Everything is
// merged in a fixed order: equal bits from run to run.
//
// What the last CTA does is waited for by the whole launch, so that its loads wait together, not one after the other: 33 splits of
// 8 columns and 256 values are 135 KB where a split has rows of one phase, 2100 cycles of an SM's 64 B a cycle from the L2.
#pragma once
#include "attend/split_states.cuh"
#include "attend/work_list.cuh"
#include "attend_lowrank/values.cuh"

namespace kvlar::attend_lowrank {

template <class T, int NT, int V, bool kInt8> struct Merge {
  static constexpr int kColumns = 8 * NT, kScratchRow = V + 4;
  static constexpr int kSplitsAtOnce = 32, kLoadsAtOnce = 8;  // whose factors lie in shared memory; whose values a thread waits for

  const KvlarAttendLowrank& lowrank;
  const KvlarAttend& p;
  const Unit& unit;
  unsigned char* const shared;

  __device__ Merge(const KvlarAttendLowrank& params, const Unit& u, unsigned char* memory)
      : lowrank(params), p(params.attend), unit(u), shared(memory) {}
  __device__ attend::WorkList<Visible> list() const { return attend::WorkList<Visible>(p); }
  __device__ float* rings() const { return reinterpret_cast<float*>(shared + lowrank.shared.warps); }  // while none is used
  // What follows from these (quotients above all) is worked out where it is asked for, instead of held in registers through the
  // loops over rows.
  __device__ static int thread() { return ptx::unknown(int(threadIdx.x)); }
  __device__ int warps() const { return ptx::unknown(int(lowrank.shared.warp_count)); }
  __device__ int threads() const { return 32 * warps(); }

  __device__ int value_dim() const { return ptx::unknown(int(p.value_dim)); }
  __device__ int width() const { return value_dim() + int(lowrank.value_rank ? lowrank.value_rank : p.value_dim); }
  __device__ int phases() const { return ptx::unknown(1 + int(lowrank.slices)); }
  __device__ float* partial(int slot, int column) const { return p.partials + (int64_t(slot) * kColumns + column) * width(); }
  __device__ float2* partial_state(int slot, int column, int phase) const {
    float* states = p.partials + int64_t(p.slots) * kColumns * width();
    return reinterpret_cast<float2*>(states) + (int64_t(slot) * kColumns + column) * phases() + phase;
  }

  __device__ static void add_scaled(float4& sum, float factor, float4 x) {
    sum.x = fmaf(factor, x.x, sum.x); sum.y = fmaf(factor, x.y, sum.y);
    sum.z = fmaf(factor, x.z, sum.z); sum.w = fmaf(factor, x.w, sum.w);
  }

  // ---- of warps

  __device__ float* scratch(int warp, int column) const { return rings() + (warp * kColumns + column) * kScratchRow; }
  // Behind the rows of all `warps`.
  __device__ float2* scratch_state(int warps, int warp, int column) const {
    return reinterpret_cast<float2*>(scratch(warps, 0)) + warp * kColumns + column;
  }

  __device__ void store_warp(const ColumnState<NT, V>& state, const Lane& at, int values, bool int8_values) const {
    const int warp = thread() / 32, all = warps();
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + 2 * at.c + e;
        const float sum = column_sum(state.sum[n][e]);
        float* const row = scratch(warp, column);
        if (kInt8 && int8_values) {
          // Zeros and the 1024 of codes enter here, once. Four neighbours a lane.
          const float shift = column_sum(state.zero[n][e]) - 1024.f * state.weight[n][e];
#pragma unroll
          for (int i = 0; i < V / 16; i += 2)
            if (16 * i < values)
              *reinterpret_cast<float4*>(row + value_dim_of(i, at.g, 0, true)) =
                  make_float4(state.o[i][n][e] + shift, state.o[i][n][e + 2] + shift, state.o[i + 1][n][e] + shift, state.o[i + 1][n][e + 2] + shift);
        } else {
#pragma unroll
          for (int i = 0; i < V / 16; ++i)
            if (16 * i < values) {
              row[value_dim_of(i, at.g, 0, false)] = state.o[i][n][e];
              row[value_dim_of(i, at.g, 1, false)] = state.o[i][n][e + 2];
            }
        }
        if (at.g == 0) *scratch_state(all, warp, column) = make_float2(state.top[n][e], sum);
      }
  }

  // `values` values of a phase, from value `first` of the partial result on.
  __device__ void merge_warps(int slot, int phase, int first, int values) const {
    const int quads = values / 4, count = warps();
#pragma unroll 1
    for (int i = thread(); i < unit.columns * quads; i += 32 * count) {
      const int column = i / quads, dim = i % quads * 4;
      float2 state[kMaxWarps];
      float top = attend::kFloor, sum = 0.f;
#pragma unroll
      for (int w = 0; w < kMaxWarps; ++w) {
        state[w] = w < count ? *scratch_state(count, w, column) : make_float2(attend::kFloor, 0.f);
        top = fmaxf(top, state[w].x);
      }
      float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kMaxWarps; ++w) {
        const float factor = ptx::ex2_approx(state[w].x - top);
        sum = fmaf(factor, state[w].y, sum);
        if (w < count) add_scaled(x, factor, *reinterpret_cast<const float4*>(scratch(w, column) + dim));
      }
      __stcg(reinterpret_cast<float4*>(partial(slot, column) + first + dim), x);
      if (dim == 0) __stcg(partial_state(slot, column, phase), make_float2(top, sum));
    }
  }

  // Of a phase that has no rows in this share: there is no partial result.
  __device__ void skip(int slot, int phase) const {
#pragma unroll 1
    for (int c = thread(); c < unit.columns; c += threads()) __stcg(partial_state(slot, c, phase), make_float2(attend::kFloor, 0.f));
  }

  // ---- of splits, by the CTA that is last at a unit

  __device__ float* merged(int column) const { return rings() + column * width(); }
  __device__ float2* merged_state(int column) const { return reinterpret_cast<float2*>(merged(kColumns)) + column; }  // (top, factor)
  // [phase][split of those at hand][column]: what multiplies a partial result; below 0 where there is none.
  __device__ float* factors() const { return reinterpret_cast<float*>(merged_state(kColumns)); }

  // The factor that turns an unnormalized sum into the result; writes the column's lse.
  __device__ float normalize(int column, float top, float sum) const {
    const int query_head = unit.column_query_head[column], row = unit.column_row[column];
    float scale = 1.f;
    if (p.sink_logits) {  // one more logit in the denominator
      const float sink = __ldg(p.sink_logits + query_head) * kLog2E, raised = fmaxf(top, sink);
      scale = ptx::ex2_approx(top - raised);
      sum = sum * scale + ptx::ex2_approx(sink - raised);
      top = raised;
    }
    if (p.lse)
      p.lse[(int64_t(unit.seq) * p.kv_heads * p.group + query_head) * p.query_rows + row] =
          sum == 0.f ? -INFINITY : (top + __log2f(sum)) * kLn2;
    return sum == 0.f ? 0.f : scale / sum;
  }

  // A warp a column.
  __device__ void merge_columns(const attend::Share& share) const {
    const int t = thread(), each = phases();
#pragma unroll 1
    for (int column = t / 32; column < unit.columns; column += warps()) {
      const float2 merged = attend::merge_states(share.splits * each, [&](int i) {
        float2 state = __ldcg(partial_state(list().slot_of_split(share, i / each), column, i % each));
        if (i % each > 1) state.y = 0.f;  // further slices see the same rows again
        return state;
      });
      if (t % 32 == 0) *merged_state(column) = make_float2(merged.x, normalize(column, merged.x, merged.y));
    }
  }

  __device__ void load_factors(const attend::Share& share, int first) const {
#pragma unroll 2
    for (int i = thread(); i < phases() * kSplitsAtOnce * kColumns; i += threads()) {
      const int column = i % kColumns, split = first + i / kColumns % kSplitsAtOnce, phase = i / (kColumns * kSplitsAtOnce);
      if (column >= unit.columns || split >= share.splits) continue;
      const float top = __ldcg(partial_state(list().slot_of_split(share, split), column, phase)).x;
      factors()[i] = top > attend::kFloor ? ptx::ex2_approx(top - merged_state(column)->x) : -1.f;
    }
  }

  // All partial results of the unit into shared memory, unnormalized.
  __device__ void merge_splits(const attend::Share& share) const {
    merge_columns(share);
    const int dv = value_dim(), quads = width() / 4, slice_width = ptx::unknown(int(lowrank.slice_width));
#pragma unroll 1
    for (int first = 0; first < share.splits; first += kSplitsAtOnce) {
      __syncthreads();  // states, or: the factors before these are not needed any more
      load_factors(share, first);
      __syncthreads();
      const int count = min(kSplitsAtOnce, share.splits - first);
#pragma unroll 1
      for (int i = thread(); i < unit.columns * quads; i += threads()) {
        const int column = i / quads, dim = i % quads * 4;
        const int phase = dim < dv ? 0 : 1 + (lowrank.value_rank ? (dim - dv) / slice_width : 0);
        const float* const factor = factors() + phase * kSplitsAtOnce * kColumns + column;
        float4& sum = *reinterpret_cast<float4*>(merged(column) + dim);
        float4 x = first == 0 ? make_float4(0.f, 0.f, 0.f, 0.f) : sum;
#pragma unroll 1
        for (int s = 0; s < count; s += kLoadsAtOnce) {
          float f[kLoadsAtOnce];
          float4 part[kLoadsAtOnce];
#pragma unroll
          for (int j = 0; j < kLoadsAtOnce; ++j) {
            f[j] = s + j < count ? factor[(s + j) * kColumns] : -1.f;
            part[j] = make_float4(0.f, 0.f, 0.f, 0.f);  // else its registers were taken from the loops over rows on
            if (f[j] >= 0.f) part[j] = __ldcg(reinterpret_cast<const float4*>(partial(list().slot_of_split(share, first + s + j), column) + dim));
          }
#pragma unroll
          for (int j = 0; j < kLoadsAtOnce; ++j)
            if (f[j] >= 0.f) add_scaled(x, f[j], part[j]);
        }
        sum = x;
      }
    }
  }

  // out = plain + U_v latent, normalized. A warp takes eight neighbouring dims of a head and four of its columns at a time: four
  // dims a half of its lanes, which divide the rank among them, 16 bytes of a basis row each.
  __device__ void expand() const {
    const int dv = value_dim(), rank = int(lowrank.value_rank), a_head = unit.heads > 1 ? columns_a_head(p) : unit.columns;
    const int t = thread(), lane = t & 31, part = lane % 16;
#pragma unroll 1
    for (int first = t / 32 * 8; first < unit.heads * dv; first += 8 * warps()) {
      const int head = first / dv, dim = first % dv + lane / 16 * 4, end = (head + 1) * a_head;
      const uint16_t* basis = static_cast<const uint16_t*>(lowrank.value_basis) + unit.seq * lowrank.value_basis_seq_stride +
                              (int64_t(unit.head[head]) * dv + dim) * rank;
#pragma unroll 1
      for (int column = head * a_head; column < end; column += 4) {
        float x[16] = {};  // [dim][column]
#pragma unroll 1
        for (int r = 8 * part; r < rank; r += 8 * 16) add_products(x, basis + r, rank, column, end, dv + r);
        share_sums(x, part);
        const int own = column + part % 4, to = dim + part / 4;
        if (own >= end) continue;
        const float plain = merged(own)[to] + (rank ? 0.f : merged(own)[dv + to]);
        write(own, to, (x[0] + plain) * merged_state(own)->y);
      }
    }
  }

  // Eight of the rank: four dims, four columns. Beyond the last column the last one again, for nobody.
  __device__ void add_products(float (&x)[16], const uint16_t* basis, int rank, int column, int end, int latent) const {
    uint4 b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = __ldg(reinterpret_cast<const uint4*>(basis + i * rank));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float4* z = reinterpret_cast<const float4*>(merged(min(column + c, end - 1)) + latent);
      const float4 low = z[0], high = z[1];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = x[4 * i + c];
        sum = add_two(sum, b[i].x, low.x, low.y);
        sum = add_two(sum, b[i].y, low.z, low.w);
        sum = add_two(sum, b[i].z, high.x, high.y);
        sum = add_two(sum, b[i].w, high.z, high.w);
      }
    }
  }
  __device__ static float add_two(float sum, uint32_t two, float low, float high) {
    const float2 u = Half16<T>::unpack(two);
    return fmaf(u.y, high, fmaf(u.x, low, sum));
  }

  // Sums over 16 lanes: lane i of them has that of x[i] in x[0].
  __device__ static void share_sums(float (&x)[16], int part) {
    share_halves<8>(x, part);
    share_halves<4>(x, part);
    share_halves<2>(x, part);
    share_halves<1>(x, part);
  }
  template <int kHalf> __device__ __forceinline__ static void share_halves(float (&x)[16], int part) {
    const bool upper = part & kHalf;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      const float other = __shfl_xor_sync(0xffffffffu, upper ? x[k] : x[k + kHalf], kHalf);
      x[k] = (upper ? x[k + kHalf] : x[k]) + other;
    }
  }

  __device__ void write(int column, int dim, float x) const {
    const int64_t to = unit.seq * p.out_seq_stride + unit.column_query_head[column] * p.out_head_stride + unit.column_row[column] * p.out_row_stride + dim;
    if (p.out_dtype == KVLAR_DTYPE_F32) static_cast<float*>(p.out)[to] = x;
    else static_cast<uint16_t*>(p.out)[to] = uint16_t(Half16<T>::pack(x, 0.f));
  }
};

}  // namespace kvlar::attend_lowrank
