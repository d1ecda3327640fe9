// append_groups: append of new rows that stay as they are for now, and rows that have stayed long enough encoded, several at
// a time, in one launch: channel-wise keys need a whole group (KIVI, arXiv 2402.02750, §3.2), and an exact recent window
// lets go of rows whatever their format.
//
//   k, v as in append.cu -> pages of exact rows; rows of packing[seq] -> pages of encoded rows.
//
// The first row_ctas CTAs append, a warp a row. Of the others two encode pack_rows rows of a (sequence, head), one its keys, one
// its values: rows of earlier steps from their pages, rows of this one from k and v, rounded as if they had been stored, so
// that it makes no difference how many came at a time. Nothing that is read here is written here.
//
// Floor: a row that is encoded is read once in 16 bits and written in its format; a decode step is launch latency, every
// 32nd step of a sequence reads 16 KB a head more (d = 128): four waits for the L2 (what to pack, pages, their numbers, rows).
#include "append/packed_rows.cuh"
#include "device/channel_codec.cuh"

namespace kvlar {

static_assert(kPackWarps == kChannelWarps, "the CTA's");

struct PackingScratch {
  ChannelScratch channels;
  float rows[kPackWarps][kMaxDim];
  PackedRows::Staged staged;
};

// Keys or values of the CTA's rows.
__device__ inline void encode_pack(const KvlarAppendGroups& p, const Pack& at, int page, bool values, PackingScratch& scratch) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const KvlarPool& pool = values ? p.value_pool : p.key_pool;
  const KvlarFormat& format = values ? p.value_format : p.key_format;
  const int in_page = at.first & ((1 << p.rows.page_rows_log2) - 1);
  PackedRows rows(p, at, values, scratch.staged, scratch.rows[warp]);
  if (channel_wise(format.codec)) {
    encode_channels(place_row(pool, format, at.seq, at.head, page, in_page), pool.row_stride, format, rows.dim(), scratch.channels,
                    [&](float (&x)[kLaneDims], int r) { rows.load(x, r); });
    return;
  }
#pragma unroll 1
  for (int r = warp; r < int(p.pack_rows); r += kPackWarps) {
    float x[kLaneDims];
    rows.load(x, r);
    store_row(place_row(pool, format, at.seq, at.head, page, in_page + r), format, at.head, x, scratch.rows[warp], rows.dim(), lane);
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
  const int index = int(blockIdx.x - p.row_ctas) / 2, pack = index % int(p.max_packs);
  const bool values = (blockIdx.x - p.row_ctas) % 2;
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
  encode_pack(p, at, page, values, scratch);
}
GPU_EXPORT(kvlar_append_groups)
