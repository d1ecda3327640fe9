// append: new keys are rotated to their positions and encoded, new values encoded, and both written at their slots,
// with their positions, in one launch.
//
//   k [seqs][kv_heads][new_rows][d] before RoPE, v [..][dv] -> rows slots[seq][head?][row] of the caches.
//
// A warp takes one row of one head, keys and values. Floor: the rows read in 16 bits and written in their format, such
// as 8 heads x (128 + 128) x (2 + 2) B = 8 KB a token for bf16: a decode step is launch latency (about 2 us), a
// prefill of 128K tokens 1 GB, 250 us at 4.3 TB/s. Two sines a rotated pair and head keep the ALU below that.
#include "device/rope.cuh"
#include "device/row_codec.cuh"

extern "C" __global__ void __launch_bounds__(128, 8) kvlar_append(const __grid_constant__ KvlarAppend p) {
  using namespace kvlar;
  __shared__ float scratch[4][kMaxDim];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t index = int64_t(blockIdx.x) * 4 + warp;
  if (index >= int64_t(p.seqs) * p.kv_heads * p.new_rows) return;  // a whole warp; there are no barriers of the CTA
  const int row = int(index % p.new_rows), head = int(index / p.new_rows % p.kv_heads), seq = int(index / p.new_rows / p.kv_heads);
  const int slot = __ldg(p.slots + seq * p.slot_seq_stride + head * p.slot_head_stride + row);
  if (slot < 0) return;
  if (slot >= int(p.rows.max_rows)) {
    if (p.status && lane == 0) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_SLOT));
    return;
  }
  const int page = checked_page(p.rows, min(p.key_pool.page_count, p.value_pool.page_count), seq, head, slot, p.status);
  if (page < 0) return;
  const int in_page = slot & ((1 << p.rows.page_rows_log2) - 1), position = __ldg(p.positions + int64_t(seq) * p.new_rows + row);

  float x[kLaneDims];
  const uint16_t* k = static_cast<const uint16_t*>(p.k) + seq * p.k_seq_stride + head * p.k_head_stride + row * p.k_row_stride;
  load_dense(x, k, p.dtype, int(p.head_dim), lane);
  if (p.rope.layout != KVLAR_ROPE_NONE) {
    float* own = scratch[warp];
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) own[kLaneDims * lane + i] = x[i];
    __syncwarp();
    if (kLaneDims * lane < int(p.head_dim))
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) x[i] = rotated(p.rope, own, kLaneDims * lane + i, position);
    __syncwarp();
  }
  store_row(place_row(p.key_pool, seq, head, page, in_page), p.key_format, head, x, scratch[warp], int(p.head_dim), lane);

  const uint16_t* v = static_cast<const uint16_t*>(p.v) + seq * p.v_seq_stride + head * p.v_head_stride + row * p.v_row_stride;
  load_dense(x, v, p.dtype, int(p.value_dim), lane);
  store_row(place_row(p.value_pool, seq, head, page, in_page), p.value_format, head, x, scratch[warp], int(p.value_dim), lane);

  // One write a stored row: heads that share pages share its position.
  const bool own_pages = p.rows.table_head_stride != 0 || p.rows.position_head_stride != 0;
  if (p.rows.positions && lane == 0 && (head == 0 || own_pages))
    p.rows.positions[seq * p.rows.position_seq_stride + head * p.rows.position_head_stride +
                     (int64_t(page) << p.rows.page_rows_log2) + in_page] = position;
}
GPU_EXPORT(kvlar_append)
