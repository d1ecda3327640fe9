// score_gate: importance of tokens from their hidden states alone, by the gate of Fast KVzip (arXiv 2601.17668; its released
// inference code). Of a token x, a kv head and its G query vectors:
//
//   q_g = Wq_g x + bias_g,  k = Wk x                       rounded to the type of x (fp32 sums)
//   n(y) = y / sqrt(mean(y^2) + 1e-6)                      over 16 dims, rounded to that type again
//   l_g = <n(q_g) wq, n(k) wk> / 4 + b_g,  c_gs = <n(q_g) wq, sink_s> / 4
//   score = mean_g 1 / (1 + sum_s exp(c_gs - l_g))
//
//   hidden [seqs][rows][D] -> scores [seq][head][first column + row], fp32. A row that is not finite, or has a projection of
//   a head whose squares' sum is not, scores 0 (there): what is not finite stays so through every product.
//
// A CTA takes a tile of rows (of all sequences, numbered one after the other) and one or two heads; the projections are tensor-
// core products of 16 (G + 1) columns a head, four queries and the key at a time, and stay in registers: a lane quad holds a
// row's 16 dims of each. Rounded to 16 bits the normalised query is an A fragment as it lies, and the sinks its B: they are
// three 16-bit numbers each, which together have fp32's digits. 1 / 4, norms and log2(e) are folded into sinks, diagonal and b.
//
//   _many: 128 rows, two heads, 8 warps of 32 rows of one head each. Each 64 dims are 36 KB into shared memory for 2.6 MFLOP
//          (G = 4), most from the L2: heads of a tile are neighbours in the grid.
//   _few:  32 rows, one head, whose dims warps and CTAs share: gate_few.cuh.
//
// Floors: 2 D 16 Hk (G + 1) FLOP a token (5.2 M at D = 4096, 8 heads of 4: 129 us for 16000 tokens at 650 TF/s), or the
// weights once (5.2 MB: 1.3 us at 4.2 TB/s) for a few rows. Main loop of a warp and 16 dims: 7 ldmatrix, 20 mma.
#pragma once
#include "abi.h"
#include "device/mma.cuh"

namespace kvlar::gate {

constexpr int kDim = 16;                         // of a query vector or key
constexpr int kQueries = 4;                      // of a head that meet its key in one pass over the rows
constexpr int kBlocks = kQueries + 1;            // of 16 columns: the key, then queries
constexpr int kStageDims = 64, kRowBytes = 128;  // of a row in a stage
constexpr float kEpsilon = 1e-6f;

template <int RowWarps, int HeadWarps, int SumWarps, int Stages> struct Tiling {
  static constexpr int kRowWarps = RowWarps, kHeadWarps = HeadWarps, kSumWarps = SumWarps, kStages = Stages;
  static constexpr int kWarps = kRowWarps * kHeadWarps * kSumWarps, kThreads = 32 * kWarps;
  static constexpr int kRows = 32 * kRowWarps, kColumns = kDim * kBlocks * kHeadWarps;
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes, kSharedBytes = kStages * kStageBytes;
};
using Many = Tiling<4, 2, 1, 2>;

using Block = float[2][4];                // 16 rows of 16 columns
using Projections = Block[kBlocks];
using Tile = Projections[2];              // 32 rows

template <class Tl> struct Shared {
  const uint16_t* sources[Tl::kRows + Tl::kColumns];  // rows of hidden, then of weights; null = zeros
  int64_t targets[Tl::kRows];                         // of scores of kv head 0; negative = none
  float sums[Tl::kHeadWarps][Tl::kRows];              // of the weights of a head's queries
};

// Which rows there are. False if none: then no CTA of the tile has anything to do.
template <class Tl> __device__ inline bool find_rows(Shared<Tl>& shared, const KvlarScoreGate& p, int tile) {
  bool any = false;
  for (int i = int(threadIdx.x); i < Tl::kRows; i += Tl::kThreads) {
    const uint32_t index = uint32_t(tile) * Tl::kRows + i;
    const int seq = int(index / p.rows), row = int(index % p.rows);
    shared.sources[i] = nullptr;
    shared.targets[i] = -1;
#pragma unroll
    for (int h = 0; h < Tl::kHeadWarps; ++h) shared.sums[h][i] = 0.f;
    if (seq >= int(p.seqs) || row >= (p.counts ? __ldg(p.counts + seq) : int(p.rows))) continue;
    const int64_t column = int64_t(p.first_columns ? __ldg(p.first_columns + seq) : 0) + row;
    if (column < 0 || column >= int64_t(p.columns)) {
      if (p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_SLOT));
      continue;
    }
    shared.sources[i] = static_cast<const uint16_t*>(p.hidden) + seq * p.hidden_seq_stride + row * p.hidden_row_stride;
    shared.targets[i] = seq * p.score_seq_stride + column;
    any = true;
  }
  return __syncthreads_or(any);
}

// The weights of a pass; to be followed by a barrier.
template <class Tl> __device__ inline void find_weights(Shared<Tl>& shared, const KvlarScoreGate& p, int first_head, int first_query, int blocks) {
  // Worked out in each pass, instead of held in registers through it.
#pragma unroll 1
  for (int i = ptx::unknown(int(threadIdx.x)); i < Tl::kColumns; i += Tl::kThreads) {
    const int head = first_head + i / (kDim * kBlocks), block = i / kDim % kBlocks;
    const int vector = block == 0 ? int(p.group) : first_query + block - 1;
    const int64_t row = (int64_t(head) * (p.group + 1) + vector) * kDim + i % kDim;
    const bool there = head < int(p.kv_heads) && block < blocks;
    shared.sources[Tl::kRows + i] = there ? static_cast<const uint16_t*>(p.weights) + row * p.hidden_dim : nullptr;
  }
}

// 16-byte chunks of a row are permuted, so that ldmatrix finds a column of chunks in all banks.
__device__ inline uint32_t chunk_at(int row, int chunk) { return uint32_t(row * kRowBytes + ((chunk ^ (row & 7)) << 4)); }

template <class Tl> __device__ inline void copy_stage(ptx::smem stage, const Shared<Tl>& shared, int first_dim, int hidden_dim) {
  constexpr int kPassRows = Tl::kThreads / 8;
  const int chunk = int(threadIdx.x) % 8, dim = first_dim + 8 * chunk;
#pragma unroll 3
  for (int i = 0; i < (Tl::kRows + Tl::kColumns) / kPassRows; ++i) {
    const int row = int(threadIdx.x) / 8 + i * kPassRows;
    const uint16_t* source = shared.sources[row];
    ptx::cp_async16(stage + chunk_at(row, chunk), source + dim, source && dim < hidden_dim ? 16 : 0);
  }
}

// 16 dims of a stage: the rows from `row` on times the weights from `column` on.
template <class T>
__device__ __forceinline__ void multiply(Tile& z, ptx::smem stage, int row, int column, int step, int blocks) {
  const int lane = int(threadIdx.x) % 32;
  uint32_t a[2][4];
#pragma unroll
  for (int m = 0; m < 2; ++m) ptx::ldmatrix_x4(a[m], stage + chunk_at(row + 16 * m + lane % 16, 2 * step + lane / 16));
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (j >= blocks) break;
    uint32_t b[4];
    ptx::ldmatrix_x4(b, stage + chunk_at(column + kDim * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      Half16<T>::mma(z[m][j][0], a[m], low);
      Half16<T>::mma(z[m][j][1], a[m], high);
    }
  }
}

// A warp's place in a CTA.
template <class Tl> struct Place {
  int sum, row, head;  // which of the warps that share dims; first row of the tile; head of the CTA's
  __device__ Place() {
    const int warp = int(threadIdx.x) / 32;
    sum = warp % Tl::kSumWarps;
    head = warp / Tl::kSumWarps % Tl::kHeadWarps;
    row = 32 * (warp / (Tl::kSumWarps * Tl::kHeadWarps));
  }
};

// Projections over stages `first` .. `last` of the hidden dimension. The ring is free again at the end.
template <class T, class Tl>
__device__ __forceinline__ void project(Tile& z, const KvlarScoreGate& p, const Shared<Tl>& shared, ptx::smem ring, Place<Tl> at, int first,
                                        int last, int blocks, bool active) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[m][j][n][e] = 0.f;
  const auto fetch = [&](int stage, int slot) {
    if (stage < last) copy_stage(ring + uint32_t(slot * Tl::kStageBytes), shared, stage * kStageDims, int(p.hidden_dim));
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < Tl::kStages - 1; ++i) fetch(first + i, i);
  int slot = 0, free = Tl::kStages - 1;
  for (int stage = first; stage < last; ++stage) {
    ptx::cp_async_wait<Tl::kStages - 2>();
    __syncthreads();
    fetch(stage + Tl::kStages - 1, free);
    const ptx::smem here = ring + uint32_t(slot * Tl::kStageBytes);
    constexpr int kSteps = kStageDims / kDim;
    static_assert(kSteps % Tl::kSumWarps == 0, "each warp that shares dims has as many");
    if (active)
#pragma unroll
      for (int i = 0; i < kSteps / Tl::kSumWarps; ++i)
        multiply<T>(z, here, at.row, Tl::kRows + kDim * kBlocks * at.head, at.sum + i * Tl::kSumWarps, blocks);
    free = slot;
    slot = slot + 1 == Tl::kStages ? 0 : slot + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// 16 projections of each of 16 rows, rounded, normalised and rounded again, as an A fragment; NaN where they are not finite.
template <class T> __device__ inline void normalise(uint32_t (&a)[4], const Block& z, float2 bias0, float2 bias1) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 x = Half16<T>::unpack(Half16<T>::pack(z[0][2 * h] + bias0.x, z[0][2 * h + 1] + bias0.y));
    const float2 y = Half16<T>::unpack(Half16<T>::pack(z[1][2 * h] + bias1.x, z[1][2 * h + 1] + bias1.y));
    const float squares = quad_sum(x.x * x.x + x.y * x.y + y.x * y.x + y.y * y.y);
    const float inverse = squares < INFINITY ? __frcp_rn(__fsqrt_rn(squares / kDim + kEpsilon)) : NAN;
    a[h] = Half16<T>::pack(x.x * inverse, x.y * inverse);
    a[h + 2] = Half16<T>::pack(y.x * inverse, y.y * inverse);
  }
}

// Sum over the sinks of a head of 2^(c - l), of rows g and g + 8.
template <class T> __device__ inline float2 sink_weights(const KvlarScoreGate& p, const uint32_t (&q)[4], int head, float2 l) {
  const Lane lane;
  const int count = int(p.sink_count), padded = (count + 7) / 8 * 8;
  float2 sum = make_float2(0.f, 0.f);
  for (int sink = 0; sink < count; sink += 8) {
    float c[4] = {};
#pragma unroll
    for (int part = 2; part >= 0; --part) {  // the least first
      const uint32_t* word = static_cast<const uint32_t*>(p.sinks) + (int64_t(3 * head + part) * padded + sink + lane.g) * (kDim / 2) + lane.c;
      const uint32_t b[2] = {__ldg(word), __ldg(word + 4)};
      Half16<T>::mma(c, q, b);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (sink + 2 * lane.c + i < count) {
        sum.x += ptx::ex2_approx(c[i] - l.x);
        sum.y += ptx::ex2_approx(c[2 + i] - l.y);
      }
  }
  return make_float2(quad_sum(sum.x), quad_sum(sum.y));
}

__device__ inline float2 load_two(const float* p) { return __ldg(reinterpret_cast<const float2*>(p)); }

// A normalised key of 16 rows, and what products with it are weighted by.
struct Key {
  Lane lane = Lane::anew();
  float2 w0, w1;
  uint32_t k[4];
  __device__ explicit Key(const KvlarScoreGate& p) : w0(load_two(p.diagonal + 2 * lane.c)), w1(load_two(p.diagonal + 8 + 2 * lane.c)) {}
  template <class T> __device__ void take(const Block& z) { normalise<T>(k, z, make_float2(0.f, 0.f), make_float2(0.f, 0.f)); }

  // The weights of a query of a head, of rows g and g + 8.
  template <class T> __device__ float2 weights(const KvlarScoreGate& p, const Block& z, int head, int query) const {
    const float* bias = p.bias + int64_t(query) * kDim + 2 * lane.c;
    uint32_t q[4];
    normalise<T>(q, z, load_two(bias), load_two(bias + 8));
    float l[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 q0 = Half16<T>::unpack(q[h]), q1 = Half16<T>::unpack(q[h + 2]), k0 = Half16<T>::unpack(k[h]), k1 = Half16<T>::unpack(k[h + 2]);
      l[h] = quad_sum(q0.x * k0.x * w0.x + q0.y * k0.y * w0.y + q1.x * k1.x * w1.x + q1.y * k1.y * w1.y) + __ldg(p.offsets + query);
    }
    const float2 sinks = sink_weights<T>(p, q, head, make_float2(l[0], l[1]));
    return make_float2(__frcp_rn(1.f + sinks.x), __frcp_rn(1.f + sinks.y));
  }
};

__device__ inline void add(float2& sum, float2 x) {
  sum.x += x.x;
  sum.y += x.y;
}

// Adds the weights of a pass's queries to the sums of 16 rows.
template <class T>
__device__ inline void add_weights(float* sums, const KvlarScoreGate& p, const Projections& z, int head, int first_query, int blocks) {
  Key key(p);
  float2 sum = make_float2(0.f, 0.f);
  key.take<T>(z[0]);
#pragma unroll
  for (int j = 1; j < kBlocks; ++j) {
    if (j >= blocks) break;
    // Known from here on alone, so that what belongs to a query is not read ahead into registers that projections need.
    add(sum, key.weights<T>(p, z[j], head, ptx::unknown(head * int(p.group) + first_query + j - 1)));
  }
  if (key.lane.c != 0) return;
  sums[key.lane.g] += sum.x;
  sums[key.lane.g + 8] += sum.y;
}

// The means of all rows, a head after the other. All threads call it.
template <class Tl> __device__ inline void store_scores(const KvlarScoreGate& p, const Shared<Tl>& shared, int first_head) {
  __syncthreads();
  for (int i = int(threadIdx.x); i < Tl::kHeadWarps * Tl::kRows; i += Tl::kThreads) {
    const int head = first_head + i / Tl::kRows, row = i % Tl::kRows;
    const float mean = __fdiv_rn(shared.sums[i / Tl::kRows][row], float(p.group));
    if (head < int(p.kv_heads) && shared.targets[row] >= 0)
      p.scores[shared.targets[row] + head * p.score_head_stride] = mean == mean ? mean : 0.f;
  }
}

struct Pass { int first_query, blocks; };
__device__ inline Pass pass_of(const KvlarScoreGate& p, int pass) {
  return {pass * kQueries, 1 + min(kQueries, int(p.group) - pass * kQueries)};
}

template <class T> __device__ inline void score_many(const KvlarScoreGate& p) {
  GPU_DYN_SMEM(ring);
  __shared__ Shared<Many> shared;
  const int heads = (int(p.kv_heads) + 1) / 2, tile = int(blockIdx.x) / heads, first_head = int(blockIdx.x) % heads * 2;
  if (!find_rows(shared, p, tile)) return;
  const Place<Many> at;
  const int head = first_head + at.head, stages = (int(p.hidden_dim) + kStageDims - 1) / kStageDims;
  const bool active = head < int(p.kv_heads);
  for (int i = 0; i * kQueries < int(p.group); ++i) {
    const Pass pass = pass_of(p, i);
    find_weights(shared, p, first_head, pass.first_query, pass.blocks);
    __syncthreads();
    Tile z;
    project<T, Many>(z, p, shared, ptx::to_smem(ring), at, 0, stages, pass.blocks, active);
    if (active)
#pragma unroll
      for (int m = 0; m < 2; ++m) add_weights<T>(shared.sums[at.head] + at.row + 16 * m, p, z[m], head, pass.first_query, pass.blocks);
  }
  store_scores(p, shared, first_head);
}

}  // namespace kvlar::gate
