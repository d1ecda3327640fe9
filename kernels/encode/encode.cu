// encode: dense rows into stored rows of any codec; decode: stored rows into dense ones, fp32 or 16 bits.
//
//   x [seqs][heads][row_count][dim] <-> rows 0 .. row_count of each (sequence, head). A warp takes one row; of channel-wise
//   formats, a CTA encodes one group of rows.
//
// Floor: bytes read and written / bandwidth; for int8 and bf16 input 3 B a value. A group of rows is read twice, the second
// time from the L1: 32 rows of 128 bf16 values are 8 KB.
#include "device/channel_codec.cuh"

namespace kvlar {

struct RowIndex { int seq, head, row; bool exists; };

__device__ inline RowIndex row_index(const KvlarTranscode& p) {
  const int64_t i = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  return {int(i / p.row_count / p.heads), int(i / p.row_count % p.heads), int(i % p.row_count),
          i < int64_t(p.seqs) * p.heads * p.row_count};
}

}  // namespace kvlar

extern "C" __global__ void __launch_bounds__(128, 8) kvlar_encode(const __grid_constant__ KvlarTranscode p) {
  using namespace kvlar;
  __shared__ float scratch[4][kMaxDim];
  const int lane = int(threadIdx.x) % 32;
  const RowIndex at = row_index(p);
  if (!at.exists) return;
  const int page = checked_page(p.rows, p.pool.page_count, at.seq, at.head, at.row, p.status);
  if (page < 0) return;
  float x[kLaneDims];
  const int64_t offset = at.seq * p.x_seq_stride + at.head * p.x_head_stride + at.row * p.x_row_stride;
  load_dense(x, static_cast<const char*>(p.x) + offset * (p.dtype == KVLAR_DTYPE_F32 ? 4 : 2), p.dtype, int(p.dim), lane);
  const int in_page = at.row & ((1 << p.rows.page_rows_log2) - 1);
  store_row(place_row(p.pool, p.format, at.seq, at.head, page, in_page), p.format, at.head, x, scratch[threadIdx.x / 32], int(p.dim), lane);
}
GPU_EXPORT(kvlar_encode)

// row_count is a multiple of the group, and pages hold whole groups.
extern "C" __global__ void __launch_bounds__(128) kvlar_encode_channels(const __grid_constant__ KvlarTranscode p) {
  using namespace kvlar;
  __shared__ ChannelScratch scratch;
  const int groups = int(p.row_count / p.format.group), group = int(blockIdx.x) % groups;
  const int head = int(blockIdx.x) / groups % int(p.heads), seq = int(blockIdx.x) / groups / int(p.heads), row = group * int(p.format.group);
  const int page = checked_page(p.rows, p.pool.page_count, seq, head, row, p.status);
  if (page < 0) return;  // the whole CTA
  const char* x = static_cast<const char*>(p.x);
  const int64_t offset = seq * p.x_seq_stride + head * p.x_head_stride + row * p.x_row_stride;
  const int in_page = row & ((1 << p.rows.page_rows_log2) - 1), lane = int(threadIdx.x) % 32;
  encode_channels(place_row(p.pool, p.format, seq, head, page, in_page), p.pool.row_stride, p.format, int(p.dim), scratch,
                  [&](float (&values)[kLaneDims], int r) {
                    load_dense(values, x + (offset + r * p.x_row_stride) * (p.dtype == KVLAR_DTYPE_F32 ? 4 : 2), p.dtype, int(p.dim), lane);
                  });
}
GPU_EXPORT(kvlar_encode_channels)

extern "C" __global__ void __launch_bounds__(128) kvlar_decode(const __grid_constant__ KvlarTranscode p) {
  using namespace kvlar;
  const int lane = int(threadIdx.x) % 32;
  const RowIndex at = row_index(p);
  if (!at.exists) return;
  float x[kLaneDims] = {};
  const int length = p.rows.lengths ? __ldg(p.rows.lengths + at.seq * p.rows.length_seq_stride + at.head * p.rows.length_head_stride)
                                    : int(p.row_count);
  if (at.row < length) {
    const int page = checked_page(p.rows, p.pool.page_count, at.seq, at.head, at.row, p.status);
    const int in_page = at.row & ((1 << p.rows.page_rows_log2) - 1);
    if (page >= 0) load_row(x, place_row(p.pool, p.format, at.seq, at.head, page, in_page), p.format, at.head, int(p.dim), lane);
  } else if (p.held_only) {
    return;
  }
  if (kLaneDims * lane >= int(p.dim)) return;
  const int64_t first = at.seq * p.x_seq_stride + at.head * p.x_head_stride + at.row * p.x_row_stride + kLaneDims * lane;
  if (p.dtype == KVLAR_DTYPE_F32) {
    float4* out = reinterpret_cast<float4*>(static_cast<float*>(p.x) + first);
    out[0] = make_float4(x[0], x[1], x[2], x[3]);
    out[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    const auto pack = [&](int i) { return p.dtype == KVLAR_DTYPE_F16 ? ptx::pack_f16(x[i], x[i + 1]) : ptx::pack_bf16(x[i], x[i + 1]); };
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.x) + first) = make_uint4(pack(0), pack(2), pack(4), pack(6));
  }
}
GPU_EXPORT(kvlar_decode)
