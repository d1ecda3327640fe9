// reduce: logits of query heads to one score a row and kv head, and the histogram of the scores.
//
//   score[t] = mean of logit[h][t], max of it, or max of logit[h][t] - lse[h], over the heads h of a kv head.
//   logits [seqs][kv_heads * group][row_count], lse [seqs][kv_heads * group] -> scores [seqs][kv_heads][row_count].
//
// NaN is the least of a maximum; a row that no head sees (-inf) scores -inf, also where lse is -inf. A CTA takes 1024 rows of
// a kv head, 4 a thread, whose G loads are independent. Floor: 4 (G + 1) B a row; 1M rows at G = 4 21 MB, 4.9 us at 4.3 TB/s,
// less from L2 behind a scan.
#include "device/order.cuh"

namespace kvlar {
constexpr int kReduceThreads = 256, kReduceRows = 4;

__device__ inline float reduce_row(const KvlarReduce& p, const float* logits, const float* lse, int row) {
  const bool mean = p.method == KVLAR_SCORE_MEAN_LOGIT, prob = p.method == KVLAR_SCORE_MAX_PROB;
  const float weight = 1.f / float(p.group);  // before the sum: that of large logits may not be finite
  float x = mean ? 0.f : __uint_as_float(0x7fc00000u);
  for (int h = 0; h < int(p.group); ++h) {
    float y = __ldg(logits + int64_t(h) * p.row_count + row);
    if (prob && y != -INFINITY) y -= lse[h];
    x = mean ? fmaf(y, weight, x) : fmaxf(x, y);
  }
  return x;
}

}  // namespace kvlar

extern "C" __global__ void __launch_bounds__(256, 6) kvlar_reduce(const __grid_constant__ KvlarReduce p) {
  using namespace kvlar;
  __shared__ uint32_t bins[KVLAR_SCORE_BINS];
  const int head = int(blockIdx.x / p.blocks), block = int(blockIdx.x % p.blocks), t = int(threadIdx.x);
  const int seq = head / int(p.kv_heads), kv_head = head % int(p.kv_heads);
  int length = int(p.row_count);
  if (p.lengths) length = max(0, min(length, int(__ldg(p.lengths + seq * p.length_seq_stride + kv_head * p.length_head_stride))));
  if (p.histogram) {
    for (int i = t; i < KVLAR_SCORE_BINS; i += kReduceThreads) bins[i] = 0;
    __syncthreads();
  }
  const float* logits = p.logits + int64_t(head) * p.group * p.row_count;
  const float* lse = p.lse + int64_t(head) * p.group;
  float score[kReduceRows];
  const int first = block * kReduceThreads * kReduceRows + t;
#pragma unroll
  for (int i = 0; i < kReduceRows; ++i) {
    const int row = first + i * kReduceThreads;
    score[i] = row < length ? reduce_row(p, logits, lse, row) : -INFINITY;
  }
#pragma unroll
  for (int i = 0; i < kReduceRows; ++i) {
    const int row = first + i * kReduceThreads;
    if (p.scores && row < (p.fill ? int(p.row_count) : length)) p.scores[int64_t(head) * p.row_count + row] = score[i];
    if (p.histogram && row < length) atomicAdd(bins + score_bin(score[i]), 1u);
  }
  if (!p.histogram) return;
  __syncthreads();
  uint32_t* const counts = p.counts + int64_t(head) * KVLAR_SCORE_BINS;
  add_counts(bins, counts);
  if (ptx::arrive_last(p.counters + head, p.blocks)) hand_over_counts(counts, p.histogram + int64_t(head) * KVLAR_SCORE_BINS);
}
GPU_EXPORT(kvlar_reduce)
