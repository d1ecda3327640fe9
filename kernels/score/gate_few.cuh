// score_gate for few rows, as in decoding: a CTA takes 32 rows and one head; 4 warps share the dims, and further CTAs where tiles
// and heads are fewer than the GPU's SMs. Partial projections, of the rows that there are, meet in the last CTA of a tile and head
// to arrive, in the order of the splits: all threads add, each has 32 splits' on their way together. Then a warp has a query.
#pragma once
#include "score/gate.cuh"

namespace kvlar::gate {

using Few = Tiling<1, 1, 4, 4>;
constexpr int kPairs = kDim * kBlocks / 2;  // of columns of a row
constexpr int kRowPairs = kPairs + 4;       // of a row in shared memory: fragments of four rows lie in all banks
static_assert(Few::kSharedBytes >= Few::kWarps * Few::kRows * kRowPairs * 8, "warps' sums fit in the ring");

// Which rows of a tile there are: nothing of the others is kept, added or read.
__device__ inline uint32_t rows_of(const Shared<Few>& shared) { return __ballot_sync(0xffffffffu, shared.targets[threadIdx.x % 32] >= 0); }

// A warp's projections in shared memory, a row's columns next to each other.
struct Kept {
  float2* const pairs;
  __device__ Kept(unsigned char* ring, int warp) : pairs(reinterpret_cast<float2*>(ring) + warp * Few::kRows * kRowPairs) {}
  __device__ float2& at(int row, int pair) const { return pairs[row * kRowPairs + pair]; }
  __device__ void put(const Tile& z, uint32_t rows) const {
    const Lane lane;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * m + 8 * h + lane.g;
        if (rows >> row & 1)
#pragma unroll
          for (int j = 0; j < kBlocks; ++j)
#pragma unroll
            for (int n = 0; n < 2; ++n) at(row, 8 * j + 4 * n + lane.c) = make_float2(z[m][j][n][2 * h], z[m][j][n][2 * h + 1]);
      }
  }
  __device__ void get(Block& z, int m, int block, uint32_t rows) const {
    const Lane lane;
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = 16 * m + 8 * h + lane.g;
        const float2 x = rows >> row & 1 ? at(row, 8 * block + 4 * n + lane.c) : make_float2(0.f, 0.f);
        z[n][2 * h] = x.x;
        z[n][2 * h + 1] = x.y;
      }
  }
};

// Calls use(row, pair of columns) for the rows that there are, shared among all threads.
template <class Use> __device__ inline void each_pair(uint32_t rows, Use use) {
  const int end = (32 - __clz(int(rows))) * kPairs;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < end; i += Few::kThreads)
    if (rows >> i / kPairs & 1) use(i / kPairs, i % kPairs);
}

// The sum of what CTAs left, in the order of the splits. All wait for it: its loads wait together.
__device__ inline float2 add_splits(const float2* partial, int splits) {
  constexpr int kAtOnce = 32;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll 1
  for (int first = 0; first < splits; first += kAtOnce) {
    float2 part[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      part[j] = first + j < splits ? __ldcg(partial + int64_t(first + j) * (Few::kRows * kPairs)) : make_float2(0.f, 0.f);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) add(sum, part[j]);
  }
  return sum;
}

// Adds the weights of a pass's queries, a warp each, to the sums of the rows that Kept(ring, 0) holds. All threads call it.
template <class T>
__device__ inline void weigh_rows(Shared<Few>& shared, const KvlarScoreGate& p, unsigned char* ring, uint32_t rows, int head, Pass pass) {
  static_assert(kQueries == Few::kWarps, "a query has a warp");
  const int warp = int(threadIdx.x) / 32, row = int(threadIdx.x) % 32;
  float* const weights = reinterpret_cast<float*>(Kept(ring, 1).pairs);  // [query][row]
  __syncthreads();  // the projections are there, and all are done with those of warps
  if (warp + 1 < pass.blocks) {
    Key key(p);
#pragma unroll 1
    for (int m = 0; m < 2; ++m) {
      if ((rows >> 16 * m & 0xffffu) == 0) continue;
      Block z;
      Kept(ring, 0).get(z, m, 0, rows);
      key.take<T>(z);
      Kept(ring, 0).get(z, m, warp + 1, rows);
      const float2 x = key.weights<T>(p, z, head, head * int(p.group) + pass.first_query + warp);
      float* const own = weights + Few::kRows * warp + 16 * m + key.lane.g;
      if (key.lane.c == 0) own[0] = x.x, own[8] = x.y;
    }
  }
  __syncthreads();
  if (warp != 0 || !(rows >> row & 1)) return;
  float sum = 0.f;
  for (int j = 1; j < pass.blocks; ++j) sum += weights[Few::kRows * (j - 1) + row];
  shared.sums[0][row] += sum;
}

template <class T> __device__ inline void score_few(const KvlarScoreGate& p) {
  GPU_DYN_SMEM(ring);
  __shared__ Shared<Few> shared;
  const int splits = int(p.splits), split = int(blockIdx.x) % splits, unit = int(blockIdx.x) / splits;
  const int head = unit % int(p.kv_heads), passes = (int(p.group) + kQueries - 1) / kQueries;
  if (!find_rows(shared, p, unit / int(p.kv_heads))) return;
  const Place<Few> at;
  const int stages = (int(p.hidden_dim) + kStageDims - 1) / kStageDims, each = (stages + splits - 1) / splits;
  const int first = split * each, last = min(stages, first + each);
  const auto partial = [&](int of_split, int pass, int row, int pair) {
    return reinterpret_cast<float2*>(p.partials) + (((int64_t(unit) * passes + pass) * splits + of_split) * Few::kRows + row) * kPairs + pair;
  };
  for (int i = 0; i < passes; ++i) {
    const Pass pass = pass_of(p, i);
    find_weights(shared, p, head, pass.first_query, pass.blocks);
    __syncthreads();
    {
      Tile z;
      project<T, Few>(z, p, shared, ptx::to_smem(ring), at, first, last, pass.blocks, true);
      Kept(ring, at.sum).put(z, rows_of(shared));
    }
    __syncthreads();
    const uint32_t rows = rows_of(shared);
    each_pair(rows, [&](int row, int pair) {
      float2 sum = make_float2(0.f, 0.f);
#pragma unroll
      for (int w = 0; w < Few::kSumWarps; ++w) add(sum, Kept(ring, w).at(row, pair));
      if (splits > 1) *partial(split, i, row, pair) = sum;
      else Kept(ring, 0).at(row, pair) = sum;
    });
    if (splits == 1) weigh_rows<T>(shared, p, ring, rows, head, pass);
  }
  if (splits > 1) {
    if (!ptx::arrive_last(p.counters + unit, uint32_t(splits))) return;
    const uint32_t rows = rows_of(shared);
    for (int i = 0; i < passes; ++i) {
      each_pair(rows, [&](int row, int pair) { Kept(ring, 0).at(row, pair) = add_splits(partial(0, i, row, pair), splits); });
      weigh_rows<T>(shared, p, ring, rows, head, pass_of(p, i));
    }
  }
  store_scores(p, shared, head);
}

}  // namespace kvlar::gate
