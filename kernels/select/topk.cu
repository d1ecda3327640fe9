// topk: the k largest scores of each row, beside its first and last ones, which are always in and count towards k.
//
//   scores [rows][row_count] fp32 -> a cut a row (order.cuh); on request counts [rows], the scores kept in ascending order
//   [rows][k] (-1 behind them), and a mask [rows][row_count].
//   Order: NaN < -inf < finite < +inf, -0 = +0, ties to the lower index. k and lengths are read from device memory.
//
// A CTA takes a row: row.cuh finds its cut, in a pass less where the scan that made the scores has counted them (histogram); two
// more passes where rows are listed. Longer rows than 32K, and sets of rows: set.cu, for which this finds the floors of rows.
// Floor: 4 B a score; 8 rows of 32K from L2 1 MB, 1.2 us at the 110 GB/s of an SM; each further pass half of that.
#include "select/row.cuh"

extern "C" __global__ void __launch_bounds__(1024, 1) kvlar_topk(const __grid_constant__ KvlarTopk p) {
  using namespace kvlar::select;
  __shared__ Shared shared;
  const int row = int(blockIdx.x);
  const Free free(p, row);
  const int forced = free.length - free.count();
  const uint64_t cut = find_cut(shared, p, free, wanted(p, row) - forced);
  __syncthreads();
  if (threadIdx.x == 0 && p.cuts) p.cuts[row] = cut;
  put_selected(shared, p, free, row, cut);
}
GPU_EXPORT(kvlar_topk)
