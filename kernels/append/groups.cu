// append_groups: append of new rows that stay as they are for now, and rows that have stayed long enough encoded, several at
// a time, in one launch: channel-wise keys need a whole group (KIVI, arXiv 2402.02750, §3.2), and an exact recent window
// lets go of rows whatever their format.
//
//   k, v as in append.cu -> pages of exact rows; rows of packing[seq] -> pages of encoded rows.
//
// The first row_ctas CTAs append, a warp a row. Of the others each encodes pack_rows rows of a (sequence, head), keys and
// values: rows of earlier steps from their pages, rows of this one from k and v, rounded as if they had been stored, so that
// it makes no difference how many came at a time. Nothing that is read here is written here.
//
// Floor: a row that is encoded is read twice in 16 bits (the second time from the L1) and written in its format; a decode
// step is launch latency, every 32nd step of a sequence reads 16 KB a head more (d = 128).
#include "append/append.cuh"
#include "device/channel_codec.cuh"

namespace kvlar {

struct PackingScratch {
  ChannelScratch channels;
  float rows[4][kMaxDim];
};

// What a CTA encodes.
struct Pack {
  int seq, head, first;         // first row
  int before, source_first;     // rows before this step; the first row of `source`
};

// The lane's dims of a row as it is stored in `dtype`.
__device__ inline void round_as_stored(float (&x)[kLaneDims], uint32_t dtype) {
#pragma unroll
  for (int i = 0; i < kLaneDims; i += 2) {
    if (dtype == KVLAR_DTYPE_F16) {
      const float2 two = ptx::unpack_f16(ptx::pack_f16(x[i], x[i + 1]));
      x[i] = two.x;
      x[i + 1] = two.y;
    } else {
      const uint32_t two = ptx::pack_bf16(x[i], x[i + 1]);
      x[i] = __uint_as_float(two << 16);
      x[i + 1] = __uint_as_float(two & 0xffff0000u);
    }
  }
}

__device__ inline void load_packed_row(float (&x)[kLaneDims], const KvlarAppendGroups& p, const Pack& at, int row, bool values, float* scratch,
                                       int lane) {
  const int dim = values ? int(p.exact.value_dim) : int(p.exact.head_dim);
  if (row >= at.before) {
    if (values) return load_new_value(x, p.exact, at.seq, at.head, row - at.before, lane);
    load_new_key(x, p.exact, at.seq, at.head, row - at.before, lane);
    rotate_key(x, p.exact, position_of_new(p.exact, at.seq, row - at.before), scratch, lane);
    round_as_stored(x, p.exact.dtype);
    return;
  }
  const KvlarPool& pool = values ? p.exact.value_pool : p.exact.key_pool;
  const uint32_t log2 = p.exact.rows.page_rows_log2;
  const int index = row - at.source_first, page = __ldg(p.source + int64_t(at.seq) * p.source_pages + (index >> log2));
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) x[i] = 0.f;
  if (uint32_t(page) < pool.page_count)
    load_dense(x, place_row(pool, at.seq, at.head, page, index & ((1 << log2) - 1)).codes, p.exact.dtype, dim, lane);
  else if (p.exact.status && lane == 0)
    atomicOr(p.exact.status, uint32_t(KVLAR_STATUS_BAD_PAGE));
}

// Keys or values of the CTA's rows.
__device__ inline void encode_pack(const KvlarAppendGroups& p, const Pack& at, int page, bool values, PackingScratch& scratch) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const KvlarPool& pool = values ? p.value_pool : p.key_pool;
  const KvlarFormat& format = values ? p.value_format : p.key_format;
  const int dim = values ? int(p.exact.value_dim) : int(p.exact.head_dim), in_page = at.first & ((1 << p.rows.page_rows_log2) - 1);
  const auto load = [&](float (&x)[kLaneDims], int r) { load_packed_row(x, p, at, at.first + r, values, scratch.rows[warp], lane); };
  if (channel_wise(format.codec)) {
    encode_channels(place_row(pool, format, at.seq, at.head, page, in_page), pool.row_stride, format, dim, scratch.channels, load);
    __syncthreads();  // the scratch is free again
    return;
  }
  for (int r = warp; r < int(p.pack_rows); r += 4) {
    float x[kLaneDims];
    load(x, r);
    store_row(place_row(pool, format, at.seq, at.head, page, in_page + r), format, at.head, x, scratch.rows[warp], dim, lane);
    __syncwarp();
  }
}

}  // namespace kvlar

extern "C" __global__ void __launch_bounds__(128) kvlar_append_groups(const __grid_constant__ KvlarAppendGroups p) {
  using namespace kvlar;
  __shared__ PackingScratch scratch;
  if (blockIdx.x < p.row_ctas) {
    append_row(p.exact, blockIdx.x, scratch.rows);
    return;
  }
  const int index = int(blockIdx.x - p.row_ctas), pack = index % int(p.max_packs);
  const int head = index / int(p.max_packs) % int(p.exact.kv_heads), seq = index / int(p.max_packs) / int(p.exact.kv_heads);
  const int4 packing = __ldg(reinterpret_cast<const int4*>(p.packing) + seq);
  if ((pack + 1) * int(p.pack_rows) > packing.w) return;  // the whole CTA
  const Pack at = {seq, head, packing.z + pack * int(p.pack_rows), packing.x, packing.y};
  if (at.first + int(p.pack_rows) > int(p.rows.max_rows)) {
    if (p.exact.status && threadIdx.x == 0) atomicOr(p.exact.status, uint32_t(KVLAR_STATUS_BAD_SLOT));
    return;
  }
  const int page = checked_page(p.rows, min(p.key_pool.page_count, p.value_pool.page_count), seq, head, at.first, p.exact.status);
  if (page < 0) return;
  encode_pack(p, at, page, false, scratch);
  encode_pack(p, at, page, true, scratch);
}
GPU_EXPORT(kvlar_append_groups)
