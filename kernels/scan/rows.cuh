// Scans without tensor cores: a lane has a row and up to 8 query heads.
//
// Score tables (WarpTables): q_s · C_s[a] of every sub-vector s and centroid a, in fp32 in shared memory, 1, 2, 4 or 8 heads an
// entry; a row's logit is a sum of m entries (HCAttention, arXiv 2507.19823, §3). centroids.cuh says when that is cheaper. Per
// row m lookups of 4 G B; 1M rows (128K of 8 heads) on an H200, G = 1: m = 16 7.2 us, m = 32 14 us of lookups beside 3.9 and
// 7.8 us for the codes' bytes. Making the tables takes c * d * G multiplications a CTA and unit, 1 us at c = 256, d = 128, G = 1.
//
// Decoded rows (WarpDecoded): a warp decodes one row after the other as decode does and multiplies in fp32: any format there
// is, exactly, at 30 instructions a row and head: a way for formats that no tile fits (groups of a row, scales of channels,
// odd sub-vectors).
#pragma once
#include "attend_quantized/copy.cuh"
#include "attend_quantized/keys.cuh"
#include "device/row_codec.cuh"
#include "scan/scan.cuh"

namespace kvlar::scan {

struct WarpRows : attend::Columns<1> {
  using Rows = attend_quantized::LaneRows;
  using BlockPage = attend_quantized::BlockPage;
  using Mine = attend_quantized::BlockLane<16>;  // of 32 rows
  static constexpr bool kPrepares = true;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 32;

  const KvlarScan& scan;
  SharedScan& all;
  const Outputs& out;
  unsigned char* const raw;
  float* const queries;  // [column][kMaxDim], times the scale of logits; those of columns without a head are 0
  const KvlarSegment& segment;
  LogSum sums[kColumns];

  __device__ WarpRows(const KvlarScan& params, SharedScan& shared, unsigned char* memory, const Outputs& outputs, int&)
      : Columns<1>(params.attend, shared.unit), scan(params), all(shared), out(outputs), raw(memory),
        queries(reinterpret_cast<float*>(memory + params.shared_queries)), segment(params.attend.segments[0]) {
#pragma unroll
    for (int h = 0; h < kColumns; ++h) sums[h] = LogSum::empty();
  }

  // `rotated`: as keys are before they are decoded to the end.
  __device__ void load_queries(bool rotated) const {
    for (int column = warp; column < kColumns; column += kWarps) {
      int head = 0, row = 0;
      float x[kLaneDims] = {};
      if (column_at(column, head, row)) load_dense(x, query_row(head, row), p.q_dtype, int(p.head_dim), lane);
      if (rotated) hadamard(x, int(p.head_dim), lane);
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) queries[column * kMaxDim + kLaneDims * lane + i] = x[i] * p.scale;
    }
  }

  __device__ __forceinline__ void place_tile(int tile, TilePlace& rows) const {
    place(tile, rows, [](int) { return int(kRows); });
  }
  __device__ __forceinline__ void find(int tile, Rows& rows) const {
    place_tile(tile, rows);
    find_page(rows, Mine(lane).first);
  }

  // Logits of the lane's row.
  __device__ __forceinline__ void put(const float (&x)[kColumns], const TilePlace& rows) {
    const bool exists = lane < rows.valid, mean = scan.method == KVLAR_SCORE_MEAN_LOGIT;
    const float weight = 1.f / float(p.group);
    float score = mean ? 0.f : __uint_as_float(0x7fc00000u);  // NaN is the least
#pragma unroll
    for (int h = 0; h < kColumns; ++h)
      if (h < out.heads) {
        if (out.logits && exists) out.logits[int64_t(h) * scan.row_count + rows.row + lane] = x[h];
        score = mean ? fmaf(x[h], weight, score) : fmaxf(score, x[h]);
        const float one[1] = {exists ? x[h] : -INFINITY};
        if (out.sums) sums[h].add(one);
      }
    if (out.scores && exists) out.put_score(rows.row + lane, score);
  }

  __device__ void store_sums() {
#pragma unroll
    for (int h = 0; h < kColumns; ++h) {
      LogSum sum = sums[h];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) sum = LogSum::merge(sum, sum.of_lane(step));
      if (lane == 0) all.states[warp][h] = sum;
    }
  }
};

struct WarpTables : WarpRows {
  using WarpRows::WarpRows;

  __device__ __forceinline__ unsigned char* stage_at(int stage) const { return raw + (stage * kWarps + warp) * p.stage_bytes; }

  __device__ void prepare() const {
    load_queries(segment.key_format.hadamard != 0);
    __syncthreads();
    make_tables();
    __syncthreads();
  }

  // [sub-vector][centroid][table_heads]; they depend on the queries, so that they are made for each unit.
  __device__ void make_tables() const {
    const int heads = int(scan.table_heads), width = int(segment.key_format.group), count = int(segment.key_format.centroids);
    const float* codebooks = codebooks_of(segment.key_format, shared.unit().head, int(p.head_dim));
    float* tables = reinterpret_cast<float*>(raw + scan.shared_tables);
    for (int i = int(threadIdx.x); i < count * (int(p.head_dim) / width); i += kThreads) {
      const float* q = queries + i / count * width;
      for (int h = 0; h < heads; ++h) {
        float sum = 0.f;
        for (int j = 0; j < width; ++j) sum = fmaf(q[h * kMaxDim + j], __ldg(codebooks + int64_t(i) * width + j), sum);
        tables[i * heads + h] = sum;
      }
    }
  }

  __device__ __forceinline__ void issue(const Rows& rows, int stage) const {
    const KvlarPool& pool = segment.keys;
    const int chunks = pq_row_bytes(int(p.head_dim) / int(segment.key_format.group)) / 16;
    const Mine mine(lane);
    const BlockPage page(shared.keys[0], pool.page_stride, rows, mine.first, int(segment.rows.page_rows_log2));
    copy_part(mine, ptx::to_smem(stage_at(stage)), page.at(pool.row_stride), pool.row_stride, rows.valid, int(scan.code_log), chunks);
  }

  __device__ __forceinline__ void consume(const TilePlace& rows, int stage) {
    const unsigned char* tile = stage_at(stage);
    float x[kColumns] = {};
    switch (scan.table_heads) {
      case 1: add_entries<1>(x, tile); break;
      case 2: add_entries<2>(x, tile); break;
      case 4: add_entries<4>(x, tile); break;
      default: add_entries<8>(x, tile); break;
    }
    put(x, rows);
  }

  template <int kHeads> __device__ __forceinline__ void add_entries(float (&x)[kColumns], const unsigned char* tile) const {
    const int count = int(segment.key_format.centroids), subvectors = int(p.head_dim) / int(segment.key_format.group);
    const float* table = reinterpret_cast<const float*>(raw + scan.shared_tables);
#pragma unroll 1
    for (int s = 0; s < subvectors; s += 16) {
      const uint4 codes = *reinterpret_cast<const uint4*>(tile + attend_quantized::chunk_at(int(scan.code_log), lane, s / 16));
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (s + i >= subvectors) break;
        const uint32_t code = __byte_perm(attend_quantized::word_of(codes, i / 4), 0, 0x4440u + i % 4);
        const float* entry = table + int(min(code, uint32_t(count - 1))) * kHeads;
        table += count * kHeads;
        if constexpr (kHeads == 1) {
          x[0] += entry[0];
        } else if constexpr (kHeads == 2) {
          const float2 two = *reinterpret_cast<const float2*>(entry);
          x[0] += two.x;
          x[1] += two.y;
        } else {
#pragma unroll
          for (int h = 0; h < kHeads; h += 4) {
            const float4 four = *reinterpret_cast<const float4*>(entry + h);
            x[h] += four.x;
            x[h + 1] += four.y;
            x[h + 2] += four.z;
            x[h + 3] += four.w;
          }
        }
      }
    }
  }
};

struct WarpDecoded : WarpRows {
  using WarpRows::WarpRows;

  __device__ void prepare() const {
    load_queries(false);
    __syncthreads();
  }
  __device__ __forceinline__ void issue(const Rows&, int) const {}

  __device__ __forceinline__ void consume(const TilePlace& tile, int) {
    Rows rows{tile, 0};
    find_page(rows, Mine(lane).first);  // nothing was copied: rows are read where they are
    float x[kColumns] = {};
#pragma unroll 1
    for (int r = 0; r < rows.valid; ++r) {
      const int page = __shfl_sync(0xffffffffu, rows.page, 16 * (r / 16)), in_page = (rows.row + r) & ((1 << segment.rows.page_rows_log2) - 1);
      const RowPlace place = place_row(segment.keys, segment.key_format, shared.unit().seq, shared.unit().head, page, in_page);
      float key[kLaneDims];
      load_row(key, place, segment.key_format, shared.unit().head, int(p.head_dim), lane);
#pragma unroll
      for (int h = 0; h < kColumns; ++h) {
        if (h >= out.heads) continue;
        float sum = 0.f;
        if (kLaneDims * lane < int(p.head_dim))
#pragma unroll
          for (int i = 0; i < kLaneDims; ++i) sum = fmaf(queries[h * kMaxDim + kLaneDims * lane + i], key[i], sum);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == r) x[h] = sum;
      }
    }
    put(x, rows);
  }
};

}  // namespace kvlar::scan
