// merge: attention results over disjoint sets of rows into the result over their union.
//
//   out[r] = sum_p w_p parts[p][r] / sum_p w_p,  lse[r] = ln sum_p exp(part_lse[p][r]),  w_p = exp(part_lse[p][r] - max)
//   (FlashInfer's "attention state"; Flash-Decoding, 2023.)
//
// parts [part_count][row_count][dim] fp32. A CTA takes one row; parts are added in order, so results do not vary from
// run to run. Floor: (part_count + 1) x dim x 4 B a row; a decode step's 32 rows are launch latency.
#include "abi.h"
#include "device/softmax.cuh"

extern "C" __global__ void __launch_bounds__(128) kvlar_merge(const __grid_constant__ KvlarMerge p) {
  using namespace kvlar;
  const int64_t row = blockIdx.x;
  float top = -INFINITY;
  bool any = false;  // a part with rows: its lse is not -inf (it may be NaN)
  for (uint32_t i = 0; i < p.part_count; ++i) {
    const float lse = __ldg(p.part_lse + int64_t(i) * p.row_count + row);
    top = fmaxf(top, lse);
    any = any || lse != -INFINITY;
  }
  float sum = 0.f;
  for (uint32_t i = 0; i < p.part_count; ++i) {
    const float lse = __ldg(p.part_lse + int64_t(i) * p.row_count + row);
    if (lse != -INFINITY) sum += ptx::ex2_approx((lse - top) * kLog2E);
  }
  for (int d = int(threadIdx.x); d < int(p.dim); d += int(blockDim.x)) {
    float x = 0.f;
#pragma unroll 1  // the parts are few; unrolled, the row's factors spill
    for (uint32_t i = 0; i < p.part_count; ++i) {
      const float lse = __ldg(p.part_lse + int64_t(i) * p.row_count + row);
      if (lse == -INFINITY) continue;
      x = fmaf(ptx::ex2_approx((lse - top) * kLog2E), __ldg(p.parts + (int64_t(i) * p.row_count + row) * p.dim + d), x);
    }
    p.out[row * p.dim + d] = any ? x / sum : 0.f;
  }
  if (threadIdx.x == 0) p.lse[row] = any ? top + __log2f(sum) * kLn2 : -INFINITY;
}
GPU_EXPORT(kvlar_merge)
