// append: new keys are rotated to their positions and encoded, new values encoded, and both written at their slots,
// with their positions, in one launch.
//
//   k [seqs][kv_heads][new_rows][d] before RoPE, v [..][dv] -> rows slots[seq][head?][row] of the caches.
//
// A warp takes one row of one head, keys and values (device/pq.cuh: four share it). Floor: the rows read in 16 bits and written in their format, such
// as 8 heads x (128 + 128) x (2 + 2) B = 8 KB a token for bf16: a decode step is launch latency (about 2 us), a
// prefill of 128K tokens 1 GB, 250 us at 4.3 TB/s. Two sines a rotated pair and head keep the ALU below that.
//
// kvlar_append_scored also writes what eviction by keys alone ranks rows by (score/keys.cuh): -|k|, and the sum of k / |k|.
#include "append/append.cuh"

extern "C" __global__ void __launch_bounds__(128, 6) kvlar_append(const __grid_constant__ KvlarAppend p) {
  __shared__ float scratch[4][kvlar::kMaxDim];
  kvlar::append_row(p, blockIdx.x, scratch);
}
GPU_EXPORT(kvlar_append)

extern "C" __global__ void __launch_bounds__(128, 6) kvlar_append_scored(const __grid_constant__ KvlarAppend p) {
  __shared__ float scratch[4][kvlar::kMaxDim];
  kvlar::append_row<true>(p, blockIdx.x, scratch);
}
GPU_EXPORT(kvlar_append_scored)
