// protect: scores with sinks and recent rows, judged by position, out of a threshold's reach, before layers and heads choose
// together (Fast KVzip, arXiv 2601.17668, in decode: the last 128 tokens are taken to score 1).
//
//   protected[s][o][i] = position < sink_positions || position >= recent[s] ? value : scores[s][o][i], for i < length;
//   -inf behind it, or left as it is. scores [seqs][owners][stride] fp32 by row index.
//   Rows at positions staged_from[s] and on take the score that waits for them, staged[s][o][position - staged_from[s]], which
//   becomes their scores' too: gates score tokens before it is known which row each head keeps them in.
//
// A CTA takes 1024 rows of an owner, 4 a thread. Floor: 12 B a row with its position; 288 owners of 4224 rows 14.6 MB, 3.4 us at
// 4.3 TB/s.
#include "device/row_codec.cuh"

namespace kvlar {
constexpr int kProtectThreads = 256, kProtectRows = 4;

constexpr int64_t kNoPosition = INT64_MIN;

// Where a row is in the sequence; kNoPosition where its page is none.
__device__ inline int64_t position_of(const KvlarProtect& p, int seq, int owner, int row) {
  if (!p.rows.positions) return row;
  const uint32_t log2 = p.rows.page_rows_log2;
  int page = row >> log2;
  if (p.rows.table) page = __ldg(p.rows.table + seq * p.rows.table_seq_stride + owner * p.rows.table_head_stride + page);
  if (uint32_t(page) >= p.page_count) {
    if (p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_PAGE));
    return kNoPosition;
  }
  return __ldg(p.rows.positions + seq * p.rows.position_seq_stride + owner * p.rows.position_head_stride + (int64_t(page) << log2) +
               (row & ((1 << log2) - 1)));
}

// A row's score: the one that waits for it, or its own. A row without a position is neither sink nor recent, nor is it staged.
__device__ inline float protected_score(const KvlarProtect& p, int of, int row, int64_t position, int recent, int staged_from) {
  float* const own = p.scores + of * p.stride + row;
  float x = *own;
  if (position == kNoPosition) return x;
  const int64_t column = position - staged_from;
  if (p.staged && column >= 0 && column < p.staged_count) {
    x = __ldg(p.staged + of * p.staged_stride + column);
    *own = x;
  }
  return position < p.sink_positions || (p.recent && position >= recent) ? p.value : x;
}

}  // namespace kvlar

extern "C" __global__ void __launch_bounds__(256) kvlar_protect(const __grid_constant__ KvlarProtect p) {
  using namespace kvlar;
  const int of = int(blockIdx.x / p.blocks), block = int(blockIdx.x % p.blocks);
  const int seq = of / int(p.owners), owner = of % int(p.owners);
  const int held = __ldg(p.rows.lengths + seq * p.rows.length_seq_stride + owner * p.rows.length_head_stride);
  const int length = max(0, min(held, int(p.row_count)));
  if (held != length && block == 0 && threadIdx.x == 0 && p.status) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_LENGTH));
  const int recent = p.recent ? __ldg(p.recent + seq) : 0, staged_from = p.staged ? __ldg(p.staged_from + seq) : 0;
#pragma unroll
  for (int i = 0; i < kProtectRows; ++i) {
    const int row = (block * kProtectRows + i) * kProtectThreads + int(threadIdx.x);
    float x = -INFINITY;
    if (row < length) x = protected_score(p, of, row, position_of(p, seq, owner, row), recent, staged_from);
    if (row < (p.fill ? int(p.row_count) : length)) p.protected_scores[of * p.protected_stride + row] = x;
  }
}
GPU_EXPORT(kvlar_protect)
