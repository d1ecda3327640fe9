// What memory can do, for benches to measure other kernels by: bytes read by bulk copies (sm_90 and later; elsewhere nothing).
//
//   in: `count` chunks of 16 bytes, a multiple of 512, read `arg` times -> out [CTAs], the sum (mod 2^32) of the words that each
//   CTA read: a copy for each 512 chunks.
//   row_copies: `count` rows of `arg` chunks, both powers of two, at most 512 chunks a row, and at least 512 in all; a copy a
//   row, each row once, far from the one before.
//
// Whose memory that measures, and the floor: ceiling/loads.cu.
#include "abi.h"
#include "ceiling/sums.cuh"
#include "device/mbarrier.cuh"

// The emulation has them, too.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BULK_COPIES 1
#endif

namespace {
constexpr int kCopyThreads = 256;

#if BULK_COPIES
using namespace ceiling;
constexpr int kStages = 4, kStageBytes = 8 << 10, kStageChunks = kStageBytes / 16;  // 32 KB on their way to a CTA

// The words of this CTA's part of `whole` stages, `rounds` times: stage blockIdx.x of the whole, then that `gridDim.x` behind it.
// `fill(stage of the whole, where to, barrier)` is called by the first warp, and begins copies of kStageBytes.
template <class Fill> __device__ __forceinline__ uint32_t sum_of_stages(uint32_t whole, uint32_t rounds, Fill fill) {
  __shared__ __align__(128) unsigned char stages[kStages * kStageBytes];
  __shared__ __align__(8) uint64_t barriers[kStages];
  const int t = int(threadIdx.x);
  const uint32_t mine = blockIdx.x < whole ? (whole - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
  const int64_t turns = int64_t(mine) * rounds;
  if (t == 0)
    for (int s = 0; s < kStages; ++s) ptx::mbarrier_init(ptx::to_smem(&barriers[s]), 1);
  __syncthreads();
  const auto begin = [&](int64_t turn) {
    const int s = int(turn % kStages);
    const ptx::smem barrier = ptx::to_smem(&barriers[s]);
    if (t == 0) ptx::mbarrier_arrive_expect(barrier, kStageBytes);
    __syncwarp();
    fill(blockIdx.x + uint32_t(turn % mine) * gridDim.x, ptx::to_smem(stages + s * kStageBytes), barrier);
  };
  if (t < 32)
    for (int64_t turn = 0; turn < kStages && turn < turns; ++turn) begin(turn);
  uint32_t sum = 0;
#pragma unroll 1
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int s = int(turn % kStages);
    ptx::mbarrier_wait(ptx::to_smem(&barriers[s]), uint32_t(turn / kStages) & 1u);
    const uint4* const stage = reinterpret_cast<const uint4*>(stages + s * kStageBytes);
#pragma unroll
    for (int i = 0; i < kStageChunks; i += kCopyThreads) sum += words_of(stage[i + t]);
    __syncthreads();  // the stage is read before it is filled again
    if (t < 32 && turn + kStages < turns) begin(turn + kStages);
  }
  return sum;
}
#endif
}  // namespace

extern "C" __global__ void __launch_bounds__(kCopyThreads, 4) kvlar_ceiling_bulk_copies(const __grid_constant__ KvlarConformance p) {
#if BULK_COPIES
  const uint4* const chunks = reinterpret_cast<const uint4*>(p.in);
  put_sum(p.out, sum_of_stages(p.count / kStageChunks, p.arg, [&](uint32_t stage, ptx::smem to, ptx::smem barrier) {
    if (threadIdx.x == 0) ptx::bulk_copy(to, chunks + int64_t(stage) * kStageChunks, kStageBytes, barrier);
  }));
#else
  (void)p;
#endif
}
GPU_EXPORT(kvlar_ceiling_bulk_copies)

extern "C" __global__ void __launch_bounds__(kCopyThreads, 4) kvlar_ceiling_row_copies(const __grid_constant__ KvlarConformance p) {
#if BULK_COPIES
  const unsigned char* const rows = reinterpret_cast<const unsigned char*>(p.in);
  const uint32_t row_bytes = 16 * p.arg, stage_rows = kStageChunks / p.arg;
  put_sum(p.out, sum_of_stages(p.count / stage_rows, 1, [&](uint32_t stage, ptx::smem to, ptx::smem barrier) {
    for (uint32_t i = threadIdx.x; i < stage_rows; i += 32)
      ptx::bulk_copy(to + i * row_bytes, rows + int64_t(scattered(stage * stage_rows + i, p.count)) * row_bytes, row_bytes, barrier);
  }));
#else
  (void)p;
#endif
}
GPU_EXPORT(kvlar_ceiling_row_copies)
