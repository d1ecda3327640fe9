// The rows that append_groups encodes together, as a warp sees them: every fourth one, keys or values.
#pragma once
#include "append/append.cuh"

namespace kvlar {

constexpr int kPackWarps = 4, kStagedRows = 8;  // of a warp, on their way together

// Which rows a CTA encodes.
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

// Rows of earlier steps go through shared memory, eight of a warp at a time: one after the other, each would wait for its page and
// then for itself. A lane reads back what it has copied alone.
struct PackedRows {
  using Staged = uint4[kPackWarps][kStagedRows][32];

  const KvlarAppendGroups& p;
  const Pack& at;
  const bool values;
  Staged& staged;
  float* const scratch;  // of the warp
  int held = -1;         // which eight are staged

  __device__ PackedRows(const KvlarAppendGroups& params, const Pack& pack, bool of_values, Staged& memory, float* warp_scratch)
      : p(params), at(pack), values(of_values), staged(memory), scratch(warp_scratch) {}

  __device__ int dim() const { return values ? int(p.exact.value_dim) : int(p.exact.head_dim); }

  // The lane's dims of row `r`; a warp asks for every fourth one, in order.
  __device__ void load(float (&x)[kLaneDims], int r) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, row = at.first + r, number = r / kPackWarps;
    if (row < at.before) {
      if (held != number / kStagedRows) stage(held = number / kStagedRows);
      return unpack_dense(x, staged[warp][number % kStagedRows][lane], p.exact.dtype);
    }
    if (values) return load_new_value(x, p.exact, at.seq, at.head, row - at.before, lane);
    load_new_key(x, p.exact, at.seq, at.head, row - at.before, lane);
    rotate_key(x, p.exact, position_of_new(p.exact, at.seq, row - at.before), scratch, lane);
    round_as_stored(x, p.exact.dtype);
  }

  // Rows of which there is no page are zeros.
  __device__ void stage(int eight) {
    const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
    const KvlarPool& pool = values ? p.exact.value_pool : p.exact.key_pool;
    const uint32_t log2 = p.exact.rows.page_rows_log2;
    const auto index_of = [&](int i) {  // of this lane's row, or another's; below 0: none
      const int r = kPackWarps * (kStagedRows * eight + i) + warp, row = at.first + r;
      return r < int(p.pack_rows) && row < at.before ? row - at.source_first : -1;
    };
    const int own = lane < kStagedRows ? index_of(lane) : -1;
    int page = -1;
    if (own >= 0) {
      page = __ldg(p.source + int64_t(at.seq) * p.source_pages + (own >> log2));
      if (uint32_t(page) >= pool.page_count) {
        page = -1;
        if (p.exact.status) atomicOr(p.exact.status, uint32_t(KVLAR_STATUS_BAD_PAGE));
      }
    }
#pragma unroll
    for (int i = 0; i < kStagedRows; ++i) {
      const int from = __shfl_sync(0xffffffffu, page, i);
      const bool there = from >= 0 && kLaneDims * lane < dim();
      const char* row = place_row(pool, at.seq, at.head, max(from, 0), index_of(i) & ((1 << log2) - 1)).codes;
      ptx::cp_async16(ptx::to_smem(&staged[warp][i][lane]), there ? row + 2 * kLaneDims * lane : static_cast<const char*>(pool.data), there ? 16 : 0);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
};

}  // namespace kvlar
