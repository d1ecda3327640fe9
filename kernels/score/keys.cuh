// score_keys: scores of cached rows from keys and values alone. Of a (sequence, kv head)'s rows k, v:
//
//   l2norm            -|k|                                                      (Devoto et al., arXiv 2406.11430)
//   value_key_ratio   |v| / |k|; 0 / 0 is 0                                     (PagedEviction, arXiv 2509.04377)
//   keydiff           -cos(k, sum of k / |k| over all rows); 0 without either   (KeyDiff, arXiv 2504.15364)
//   lagkv             the rank of a row in its lag: see lags.cuh                (LagKV, arXiv 2504.04704)
//
//   rows of KvlarRows (dense, bf16 or f16) -> scores [seq][head][row], fp32.
//
// A row is read by as many lanes as it has 8 values, up to a power of two; a warp has four batches of rows in flight. A CTA takes
// 256 rows of a head. keydiff takes two launches: _sums adds directions up, 1024 rows a CTA, and the last CTA of a head to arrive
// adds the CTAs' sums in their order; the launch of the scores then reads keys again.
//
// Floors: the keys once (l2norm), keys and values once, or keys twice, at 4.2 TB/s: 128K rows of 8 heads of 128 are 64, 128 and
// 128 us; scores are 1/64 of that.
#pragma once
#include "device/mma.cuh"
#include "device/norm.cuh"

namespace kvlar::keys {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kScoreRows = 256, kSumRows = 1024;  // of a CTA
constexpr int kBatches = 4;                       // of rows that a warp loads before it computes

// The rows of a (sequence, kv head), which CTA `index` has the part `block` of.
struct HeadRows {
  const KvlarScoreKeys& p;
  int seq, head, block, length;

  __device__ HeadRows(const KvlarScoreKeys& params, int index, int blocks) : p(params) {
    block = index % blocks;
    seq = index / blocks / int(p.kv_heads);
    head = index / blocks % int(p.kv_heads);
    const int max_rows = int(p.rows.max_rows);
    const int held = p.rows.lengths ? __ldg(p.rows.lengths + seq * p.rows.length_seq_stride + head * p.rows.length_head_stride) : max_rows;
    length = min(max(held, 0), max_rows);
    if (length != held && p.status && threadIdx.x == 0) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_LENGTH));
  }

  __device__ int64_t number() const { return int64_t(seq) * p.kv_heads + head; }
  __device__ float* scores() const { return p.scores + seq * p.score_seq_stride + head * p.score_head_stride; }

  // A row in a pool; a page that is none of the pool's is reported, and page 0 is read.
  __device__ const char* row(const KvlarPool& pool, int index) const {
    int page = index >> p.rows.page_rows_log2;
    if (p.rows.table) page = __ldg(p.rows.table + seq * p.rows.table_seq_stride + head * p.rows.table_head_stride + page);
    if (uint32_t(page) >= pool.page_count) {
      if (p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_PAGE));
      page = 0;
    }
    const uint32_t in_page = uint32_t(index) & ((1u << p.rows.page_rows_log2) - 1);
    return static_cast<const char*>(pool.data) + seq * pool.seq_stride + head * pool.head_stride + page * pool.page_stride +
           uint64_t(in_page) * pool.row_stride;
  }
};

// How a warp's lanes share rows.
struct RowLanes {
  int lanes, rows;  // of a row; of a warp's batch
  int lane, row;    // the lane's place in its row, and that in the batch
  __device__ explicit RowLanes(int dim) {
    lanes = 1;
    while (lanes * kLaneDims < dim) lanes <<= 1;
    rows = 32 / lanes;
    lane = int(threadIdx.x) % 32 & (lanes - 1);
    row = int(threadIdx.x) % 32 / lanes;
  }
};

// A lane's 8 values, as they are stored.
struct Words {
  uint4 of;
  __device__ static Words load(const char* row, int dim, int lane) {
    if (kLaneDims * lane >= dim) return {make_uint4(0u, 0u, 0u, 0u)};
    return {__ldg(reinterpret_cast<const uint4*>(row) + lane)};
  }
  template <class T> __device__ void values(float (&x)[kLaneDims]) const {
    const uint32_t words[4] = {of.x, of.y, of.z, of.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = Half16<T>::unpack(words[i]);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
};

// Calls use(row, values, whether there is such a row) for rows first .. last of a pool that are the warp's, all lanes together.
template <class T, class Use>
__device__ __forceinline__ void each_row(const HeadRows& rows, const KvlarPool& pool, int dim, const RowLanes& at, int first, int last, Use use) {
  const int warp = int(threadIdx.x) / 32, step = kWarps * at.rows;
  for (int start = first + warp * at.rows; start < last; start += kBatches * step) {
    Words words[kBatches];
#pragma unroll
    for (int i = 0; i < kBatches; ++i) {
      const int row = start + i * step + at.row;
      words[i] = {make_uint4(0u, 0u, 0u, 0u)};
      if (row < last) words[i] = Words::load(rows.row(pool, row), dim, at.lane);
    }
#pragma unroll
    for (int i = 0; i < kBatches; ++i) {
      if (start + i * step >= last) break;
      float x[kLaneDims];
      words[i].values<T>(x);
      use(start + i * step + at.row, x, start + i * step + at.row < last);
    }
  }
}

__device__ inline void fill_beyond(const HeadRows& rows, int first, int last) {
  if (!rows.p.fill) return;
  for (int row = max(first, rows.length) + int(threadIdx.x); row < last; row += kThreads) rows.scores()[row] = -INFINITY;
}

// l2norm, value_key_ratio, and the second launch of keydiff.
template <class T> __device__ inline void score_rows(const KvlarScoreKeys& p) {
  const HeadRows rows(p, int(blockIdx.x), int(p.blocks));
  const int first = rows.block * kScoreRows, dim = int(p.head_dim), last = min(rows.length, first + kScoreRows);
  float* scores = rows.scores();
  fill_beyond(rows, first, min(int(p.rows.max_rows), first + kScoreRows));
  if (p.method == KVLAR_KEYS_VALUE_KEY_RATIO) {
    const int value_dim = int(p.value_dim);
    const RowLanes at(max(dim, value_dim));
    each_row<T>(rows, p.keys, dim, at, first, last, [&](int row, const float(&k)[kLaneDims], bool there) {
      float v[kLaneDims];
      Words words = {make_uint4(0u, 0u, 0u, 0u)};
      if (there) words = Words::load(rows.row(p.values, row), value_dim, at.lane);
      words.values<T>(v);
      const float of_key = norm_of(k, at.lanes).value(), of_value = norm_of(v, at.lanes).value();
      if (there && at.lane == 0) scores[row] = of_key == 0.f && of_value == 0.f ? 0.f : __fdiv_rn(of_value, of_key);
    });
    return;
  }
  const RowLanes at(dim);
  if (p.method == KVLAR_KEYS_L2NORM) {
    each_row<T>(rows, p.keys, dim, at, first, last, [&](int row, const float(&k)[kLaneDims], bool there) {
      const float length = norm_of(k, at.lanes).value();
      if (there && at.lane == 0) scores[row] = -length;
    });
    return;
  }
  if (first >= last) return;
  float sum[kLaneDims];
  load_dense(sum, p.sums + rows.number() * dim, KVLAR_DTYPE_F32, dim, at.lane);
  const Norm anchor = norm_of(sum, at.lanes);
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) sum[i] = __fmul_rn(sum[i], anchor.scale);
  each_row<T>(rows, p.keys, dim, at, first, last, [&](int row, const float(&k)[kLaneDims], bool there) {
    const Norm length = norm_of(k, at.lanes);
    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) dot = __fmaf_rn(__fmul_rn(k[i], length.scale), sum[i], dot);
    dot = lanes_sum(dot, at.lanes);
    const float both = __fmul_rn(length.root, anchor.root), cosine = both == 0.f ? 0.f : __fdiv_rn(dot, both);
    if (there && at.lane == 0) scores[row] = length.finite() ? -cosine : NAN;
  });
}

// The first launch of keydiff: sums of directions. A head without rows has the sum 0.
template <class T> __device__ inline void sum_directions(const KvlarScoreKeys& p) {
  __shared__ float of_warp[kWarps][kMaxDim];
  const HeadRows rows(p, int(blockIdx.x), int(p.sum_blocks));
  const int first = rows.block * kSumRows, dim = int(p.head_dim), last = min(rows.length, first + kSumRows);
  const int used = max(1, (rows.length + kSumRows - 1) / kSumRows);  // CTAs that have rows
  if (rows.block >= used) return;
  const RowLanes at(dim);
  float sum[kLaneDims] = {};
  each_row<T>(rows, p.keys, dim, at, first, last, [&](int, const float(&k)[kLaneDims], bool there) {
    const Norm length = norm_of(k, at.lanes);
    const float factor = there ? length.direction() : 0.f;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i)
      if (factor != 0.f) sum[i] = __fmaf_rn(__fmul_rn(k[i], length.scale), factor, sum[i]);
  });
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    for (int step = at.lanes; step < 32; step <<= 1) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], step);
    if (at.row == 0) of_warp[threadIdx.x / 32][kLaneDims * at.lane + i] = sum[i];
  }
  __syncthreads();
  const int i = int(threadIdx.x);
  float total = 0.f;
  if (i < dim)
    for (int w = 0; w < kWarps; ++w) total += of_warp[w][i];
  float* out = p.sums + rows.number() * dim;
  if (used == 1) {
    if (i < dim) out[i] = total;
    return;
  }
  float* partials = p.partials + rows.number() * p.sum_blocks * dim;
  if (i < dim) partials[int64_t(rows.block) * dim + i] = total;
  if (!ptx::arrive_last(p.counters + rows.number(), uint32_t(used)) || i >= dim) return;
  total = 0.f;
#pragma unroll 8
  for (int block = 0; block < used; ++block) total += __ldcg(partials + int64_t(block) * dim + i);
  out[i] = total;
}

}  // namespace kvlar::keys
