// One warp's part of a scan on tensor cores: queries in registers as B fragments, tiles of keys through a private ring of
// cp.async stages as A fragments, 32 rows at a time. Keys are stored as they are, in fp8 or integer codes with one scale and
// zero a row (attend_quantized/keys.cuh), or in codebooks whose centroids are A fragments (centroids.cuh). Which it is decides
// a branch a tile, so that one kernel serves all.
#pragma once
#include "attend/dense_tile.cuh"
#include "attend_quantized/copy.cuh"
#include "attend_quantized/queries.cuh"
#include "scan/centroids.cuh"
#include "scan/scan.cuh"

namespace kvlar::scan {

template <int D, int NT> struct WarpScan : attend::Columns<NT> {
  using Base = attend::Columns<NT>;
  using Base::at, Base::lane, Base::p, Base::kColumns;
  using Keys = attend_quantized::KeyScores<D, NT>;
  using Layout = attend::DenseLayout<D>;
  using Rows = attend_quantized::LaneRows;
  static constexpr bool kPrepares = true;
  static constexpr int kWarps = attend::warps_of(D), kThreads = 32 * kWarps, kSteps = D / 16, kDenseRows = 32;

  const KvlarScan& scan;
  SharedScan& all;
  const Outputs& out;
  unsigned char* const raw;
  int& staged_head;  // whose centroids lie in shared memory
  const KvlarSegment& segment;
  attend_quantized::Queries<D, NT> coded;
  LogSum sums[NT][2];  // of the lane's columns, over its own rows

  __device__ WarpScan(const KvlarScan& params, SharedScan& shared, unsigned char* memory, const Outputs& outputs, int& head)
      : Base(params.attend, shared.unit), scan(params), all(shared), out(outputs), raw(memory), staged_head(head), segment(params.attend.segments[0]) {
#pragma unroll
    for (int n = 0; n < NT; ++n) sums[n][0] = sums[n][1] = LogSum::empty();
  }

  __device__ bool is_dense() const { return p.key_codec <= KVLAR_CODEC_F16; }
  __device__ bool is_pq() const { return p.key_codec == KVLAR_CODEC_PQ; }

  __device__ __forceinline__ unsigned char* stage_at(int stage) const { return raw + (stage * kWarps + Base::warp) * p.stage_bytes; }

  // Queries (in what will be the last stages), and centroids of the unit's head, unless they are there.
  __device__ void prepare() {
    float* const scratch = reinterpret_cast<float*>(raw + (p.stages - 1) * kWarps * p.stage_bytes);
    const int head = Base::shared.unit().head;
    if (is_pq() && head != staged_head) {
      const float scale = stage_centroids(raw + scan.shared_tables, segment.key_format, head, int(p.head_dim), kThreads);
      if (threadIdx.x == 0) all.centroid_scale = scale;
      staged_head = head;
    }
    if (is_pq()) coded.prepare(scratch, *this, CentroidKeys{int(segment.key_format.group)});
    else if (!is_dense()) coded.prepare_for(p.key_codec, scratch, *this);
    __syncthreads();
    if (is_dense()) Base::load_queries(coded.b);
    else coded.load_fragments(scratch);
    __syncthreads();
  }

  // ---- rows

  __device__ __forceinline__ void place_tile(int tile, TilePlace& rows) const {
    Base::place(tile, rows, [this](int) { return int(segment.tile_rows); });
  }
  __device__ __forceinline__ void find(int tile, Rows& rows) const {
    place_tile(tile, rows);
    Base::find_page(rows, lane * int(segment.tile_rows) / 32 & ~15);
  }

  __device__ __forceinline__ void issue(const Rows& rows, int stage) const {
    const ptx::smem to = ptx::to_smem(stage_at(stage));
    if (segment.tile_rows == 64) issue_as(attend_quantized::BlockLane<8>(lane), rows, to);
    else issue_as(attend_quantized::BlockLane<16>(lane), rows, to);
  }

  template <int kLanes> __device__ __forceinline__ void issue_as(attend_quantized::BlockLane<kLanes> mine, const Rows& rows, ptx::smem to) const {
    using namespace attend_quantized;
    const KvlarPool& pool = segment.keys;
    const char* base = Base::shared.keys[0];
    constexpr int kRows = 16 * (32 / kLanes);
    const int mask = (1 << segment.rows.page_rows_log2) - 1, dim = int(p.head_dim);
    if constexpr (kRows == kDenseRows)
      if (is_dense()) {
        const attend::TileRows all = all_pages(rows);
        if (rows.valid == kDenseRows && dim == D)
          attend::copy_rows<D / 8, kDenseRows, Layout, false>(lane, to, base, pool, all, mask, dim / 8);
        else
          attend::copy_rows<D / 8, kDenseRows, Layout, true>(lane, to, base, pool, all, mask, dim / 8);
        return;
      }
    const BlockPage page(base, pool.page_stride, rows, mine.first, int(segment.rows.page_rows_log2));
    const char* block = page.at(pool.row_stride);
    if (is_pq()) {
      copy_part(mine, to, block, pool.row_stride, rows.valid, int(scan.code_log), pq_row_bytes(dim / int(segment.key_format.group)) / 16);
      return;
    }
    const int bits = p.key_codec == KVLAR_CODEC_INT4 ? 4 : p.key_codec == KVLAR_CODEC_INT2 ? 2 : 8;
    if (rows.valid < kRows || dim != D) copy_part(mine, to, block, pool.row_stride, rows.valid, log_chunks<D>(bits), (dim * bits / 8 + 15) / 16);
    else if (bits == 4) copy_whole<log_chunks<D>(4)>(mine, to, block, pool.row_stride);
    else if (bits == 8) copy_whole<log_chunks<D>(8)>(mine, to, block, pool.row_stride);
    else copy_whole<log_chunks<D>(2)>(mine, to, block, pool.row_stride);
    if (p.key_codec == KVLAR_CODEC_FP8) return;
    copy_words(mine, to + segment.stage_key_params, page.at(pool.params_stride, pool.params_offset), pool.params_stride, rows.valid);
  }

  // ---- one tile

  __device__ __forceinline__ void consume(const TilePlace& rows, int stage) {
    const unsigned char* tile = stage_at(stage);
#pragma unroll 1
    for (int row = 0; row < rows.valid; row += 32) {
      float s[2][NT][4];
      score(s, tile, row);
      put(s, rows.row + row, rows.valid - row);
    }
  }

  // Logits of 32 rows from `row` of the tile on.
  __device__ __forceinline__ void score(float (&s)[2][NT][4], const unsigned char* tile, int row) const {
    const bool integer = !is_dense() && !is_pq() && p.key_codec != KVLAR_CODEC_FP8;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[b][n][e] = integer ? -coded.magic[n][e % 2] : 0.f;  // what the codes' 1024 adds
    if (is_dense()) {
      if (p.q_dtype == KVLAR_DTYPE_F16) dense<__half>(s, tile, row); else dense<__nv_bfloat16>(s, tile, row);
    } else if (is_pq()) {
      centroids(s, tile, row);
    } else if (p.key_codec == KVLAR_CODEC_FP8) {
      Keys::fp8(s, tile, row, coded.b);
    } else if (p.key_codec == KVLAR_CODEC_INT4) {
      Keys::int4(s, tile, row, coded.b);
    } else if (p.key_codec == KVLAR_CODEC_INT8) {
      Keys::int8(s, tile, row, coded.b);
    } else {
      Keys::int2(s, tile, row, coded.b);
    }
    float head_scale = p.scale;
    if (p.key_codec == KVLAR_CODEC_FP8) head_scale *= 256.f * (segment.key_format.tables ? __ldg(segment.key_format.tables + Base::shared.unit().head) : 1.f);
    if (is_pq()) head_scale *= all.centroid_scale;
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2 k = make_float2(1.f, 0.f);  // a row's scale and zero
        if (integer) k = ptx::unpack_f16(*reinterpret_cast<const uint32_t*>(tile + segment.stage_key_params + 4 * (row + 16 * b + 8 * h + at.g)));
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            float& x = s[b][n][2 * h + e];
            if (integer) x = fmaf(k.x, x, k.y * coded.sum[n][e]);
            x *= is_dense() ? head_scale : coded.scale[n][e] * head_scale;
          }
      }
  }

  template <class T> __device__ __forceinline__ void dense(float (&s)[2][NT][4], const unsigned char* tile, int row) const {
    const ptx::smem tile_s = ptx::to_smem(tile);
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        uint32_t a[4];
        ptx::ldmatrix_x4(a, tile_s + uint32_t(Layout::at(row + 16 * b + (lane & 15), 2 * k + (lane >> 4))));
#pragma unroll
        for (int n = 0; n < NT; ++n) Half16<T>::mma(s[b][n], a, coded.b[k][n]);
      }
  }

  __device__ __forceinline__ void centroids(float (&s)[2][NT][4], const unsigned char* tile, int row) const {
    const CentroidLookup look{raw + scan.shared_tables, int(scan.code_log), int(segment.key_format.centroids), int(p.head_dim) / 16};
    switch (segment.key_format.group) {
      case 2: return look.template scores<D, NT, 2>(s, tile, row, coded.b);
      case 4: return look.template scores<D, NT, 4>(s, tile, row, coded.b);
      case 8: return look.template scores<D, NT, 8>(s, tile, row, coded.b);
      default: return look.template scores<D, NT, 16>(s, tile, row, coded.b);
    }
  }

  // ---- results of 32 rows, the first being `first` of all, of which `valid` exist

  __device__ __forceinline__ void put(float (&s)[2][NT][4], int first, int valid) {
    if (out.logits) put_logits(s, first, valid);
    if (out.scores) put_scores(s, first, valid);
    if (!out.sums) return;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = 8 * i + at.g < valid ? s[i / 2][n][2 * (i % 2) + e] : -INFINITY;
        sums[n][e].add(x);
      }
  }

  // Eight lanes write neighbours of a head's row of logits: whole 32-byte sectors.
  __device__ __forceinline__ void put_logits(const float (&s)[2][NT][4], int first, int valid) const {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + 2 * at.c + e;
        if (column >= out.heads) continue;
        float* to = out.logits + int64_t(column) * scan.row_count + first;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * i + at.g < valid) to[8 * i + at.g] = s[i / 2][n][2 * (i % 2) + e];
      }
  }

  // The four lanes of a row agree on its score; each writes one of their four rows, a warp 32 neighbours.
  __device__ __forceinline__ void put_scores(const float (&s)[2][NT][4], int first, int valid) const {
    const bool mean = scan.method == KVLAR_SCORE_MEAN_LOGIT;
    const float weight = 1.f / float(p.group);  // before the sum: that of large logits may not be finite
    float own = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = mean ? 0.f : __uint_as_float(0x7fc00000u);  // NaN is the least
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * n + 2 * at.c + e < out.heads) {
            const float y = s[i / 2][n][2 * (i % 2) + e];
            x = mean ? fmaf(y, weight, x) : fmaxf(x, y);
          }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) {
        const float y = __shfl_xor_sync(0xffffffffu, x, step);
        x = mean ? x + y : fmaxf(x, y);
      }
      if (i == at.c) own = x;
    }
    const int row = 8 * at.c + at.g;
    if (row < valid) out.put_score(first + row, own);
  }

  __device__ void store_sums() {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        LogSum sum = sums[n][e];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum = LogSum::merge(sum, sum.of_lane(step));
        if (at.g == 0) all.states[Base::warp][8 * n + 2 * at.c + e] = sum;
      }
  }
};

}  // namespace kvlar::scan
