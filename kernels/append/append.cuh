// The rows that append writes; see append.cu.
#pragma once
#include "device/mma.cuh"
#include "device/norm.cuh"
#include "device/rope.cuh"
#include "device/row_codec.cuh"

namespace kvlar {

// A new key's dims of the lane, before RoPE.
__device__ inline void load_new_key(float (&x)[kLaneDims], const KvlarAppend& p, int seq, int head, int row, int lane) {
  const uint16_t* k = static_cast<const uint16_t*>(p.k) + seq * p.k_seq_stride + head * p.k_head_stride + row * p.k_row_stride;
  load_dense(x, k, p.dtype, int(p.head_dim), lane);
}

__device__ inline int position_of_new(const KvlarAppend& p, int seq, int row) { return __ldg(p.positions + int64_t(seq) * p.new_rows + row); }

// Rotates a key to its position. `scratch` is the warp's.
__device__ inline void rotate_key(float (&x)[kLaneDims], const KvlarAppend& p, int position, float* scratch, int lane) {
  if (p.rope.layout == KVLAR_ROPE_NONE) return;
  float4* const to = reinterpret_cast<float4*>(scratch + kLaneDims * lane);
  to[0] = make_float4(x[0], x[1], x[2], x[3]);
  to[1] = make_float4(x[4], x[5], x[6], x[7]);
  __syncwarp();
  if (kLaneDims * lane < int(p.head_dim)) rotate_dims(x, p.rope, scratch, kLaneDims * lane, position);
  __syncwarp();
}

__device__ inline void load_new_value(float (&x)[kLaneDims], const KvlarAppend& p, int seq, int head, int row, int lane) {
  const uint16_t* v = static_cast<const uint16_t*>(p.v) + seq * p.v_seq_stride + head * p.v_head_stride + row * p.v_row_stride;
  load_dense(x, v, p.dtype, int(p.value_dim), lane);
}

// A key as it is read back: of its codec where that is dense, else of the type it came in.
__device__ inline void round_key(float (&k)[kLaneDims], const KvlarAppend& p) {
  const bool dense = code_bits(p.key_format.codec) == 0 && p.key_format.codec <= KVLAR_CODEC_F16;
  const bool f16 = dense ? p.key_format.codec == KVLAR_CODEC_F16 : p.dtype == KVLAR_DTYPE_F16;
#pragma unroll
  for (int i = 0; i < kLaneDims; i += 2) {
    const float2 two = f16 ? ptx::unpack_f16(ptx::pack_f16(k[i], k[i + 1]))
                           : Half16<__nv_bfloat16>::unpack(ptx::pack_bf16(k[i], k[i + 1]));
    k[i] = two.x;
    k[i + 1] = two.y;
  }
}

// What scores by keys alone need of a new one, with the bits of score_keys: its norm, and the sum of directions. The sum is the
// warp's own: a head has one new row.
__device__ inline void score_new_key(const float (&x)[kLaneDims], const KvlarAppend& p, int seq, int head, int slot, int lane) {
  float k[kLaneDims];
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) k[i] = x[i];
  round_key(k, p);
  const Norm length = norm_of(k, 32);
  if (p.key_scores && lane == 0) p.key_scores[seq * p.key_score_seq_stride + head * p.key_score_head_stride + slot] = -length.value();
  const float factor = length.direction();
  if (!p.key_sums || factor == 0.f || kLaneDims * lane >= int(p.head_dim)) return;
  float* sums = p.key_sums + (int64_t(seq) * p.kv_heads + head) * p.head_dim + kLaneDims * lane;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) sums[i] = __fmaf_rn(__fmul_rn(k[i], length.scale), factor, sums[i]);
}

// The warp's row of one head, of those that CTA `cta` takes: four, or (codes of product quantization take long) one that its warps
// share. No barriers of the CTA: warps without a row return. All that a row is made from is on its way before it is known where
// the row goes.
template <bool kScored = false> __device__ inline void append_row(const KvlarAppend& p, int64_t cta, float (&scratch)[4][kMaxDim]) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const bool shared = p.key_format.codec == KVLAR_CODEC_PQ || p.value_format.codec == KVLAR_CODEC_PQ;
  const RowShare share = shared ? RowShare{warp, 4} : RowShare{0, 1};
  const int64_t index = shared ? cta : cta * 4 + warp;
  if (index >= int64_t(p.seqs) * p.kv_heads * p.new_rows) return;
  const int row = int(index % p.new_rows), head = int(index / p.new_rows % p.kv_heads), seq = int(index / p.new_rows / p.kv_heads);
  const int slot = __ldg(p.slots + seq * p.slot_seq_stride + head * p.slot_head_stride + row), position = position_of_new(p, seq, row);
  float k[kLaneDims], v[kLaneDims];
  load_new_key(k, p, seq, head, row, lane);
  load_new_value(v, p, seq, head, row, lane);
  if (slot < 0) return;
  if (slot >= int(p.rows.max_rows)) {
    if (p.status && lane == 0) atomicOr(p.status, uint32_t(KVLAR_STATUS_BAD_SLOT));
    return;
  }
  const int page = checked_page(p.rows, min(p.key_pool.page_count, p.value_pool.page_count), seq, head, slot, p.status);
  if (page < 0) return;
  const int in_page = slot & ((1 << p.rows.page_rows_log2) - 1);

  rotate_key(k, p, position, scratch[warp], lane);
  if (kScored && share.part == 0) score_new_key(k, p, seq, head, slot, lane);
  store_row(place_row(p.key_pool, p.key_format, seq, head, page, in_page), p.key_format, head, k, scratch[warp], int(p.head_dim), lane, share);
  store_row(place_row(p.value_pool, p.value_format, seq, head, page, in_page), p.value_format, head, v, scratch[warp], int(p.value_dim), lane, share);

  // One write a stored row: heads that share pages share its position.
  const bool own_pages = p.rows.table_head_stride != 0 || p.rows.position_head_stride != 0;
  if (p.rows.positions && lane == 0 && share.part == 0 && (head == 0 || own_pages))
    p.rows.positions[seq * p.rows.position_seq_stride + head * p.rows.position_head_stride +
                     (int64_t(page) << p.rows.page_rows_log2) + in_page] = position;
}

}  // namespace kvlar
