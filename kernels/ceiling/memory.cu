// What memory can do, for benches to measure other kernels by: bytes read by loads, or by bulk copies.
//
//   in: `count` chunks of 16 bytes, read `arg` times -> out [CTAs], the sum (mod 2^32) of the words that each CTA read.
//
// From memory where `in` is larger than the L2, from the L2 where it is read more than once and fits. Floor: the bytes / what the
// data sheet says (H200: 4.8 TB/s from memory; none is given for its L2).
#include "abi.h"
#include "device/gpu.cuh"
#include "device/mbarrier.cuh"

namespace {
constexpr int kThreads = 512, kInFlight = 8;  // of loads: 64 KB a CTA

__device__ uint32_t words_of(uint4 x) { return x.x + x.y + x.z + x.w; }

// Of a CTA's threads, by the first.
__device__ void put_sum(uint32_t* out, uint32_t sum) {
  __shared__ uint32_t sums[32];
  const int warps = int(blockDim.x) / 32;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < warps; ++i) sum += sums[i];
  out[blockIdx.x] = sum;
}
}  // namespace

// The L1 is passed by.
extern "C" __global__ void __launch_bounds__(kThreads, 2) kvlar_ceiling_loads(const __grid_constant__ KvlarConformance p) {
  const uint4* const chunks = reinterpret_cast<const uint4*>(p.in);
  const int64_t count = p.count, step = int64_t(gridDim.x) * kThreads;
  uint32_t sum = 0;
#pragma unroll 1
  for (uint32_t round = 0; round < p.arg; ++round) {
    int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    for (; i + (kInFlight - 1) * step < count; i += kInFlight * step) {
      uint4 x[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) x[j] = __ldcg(chunks + i + j * step);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) sum += words_of(x[j]);
    }
    for (; i < count; i += step) sum += words_of(__ldcg(chunks + i));
  }
  put_sum(p.out, sum);
}
GPU_EXPORT(kvlar_ceiling_loads)

// `count` is a multiple of 512. CTA i takes stage i of the whole, then stage i + CTAs, ...
extern "C" __global__ void __launch_bounds__(256, 4) kvlar_ceiling_bulk_copies(const __grid_constant__ KvlarConformance p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kStages = 4, kStageBytes = 8 << 10;  // 32 KB on their way to a CTA
  constexpr int kStageChunks = kStageBytes / 16;
  __shared__ __align__(128) unsigned char stages[kStages * kStageBytes];
  __shared__ __align__(8) uint64_t barriers[kStages];
  const int t = int(threadIdx.x);
  const uint4* const chunks = reinterpret_cast<const uint4*>(p.in);
  const int64_t whole = p.count / kStageChunks;
  // Stages that are this CTA's, in all rounds.
  const int64_t mine = (whole - blockIdx.x + gridDim.x - 1) / gridDim.x, turns = blockIdx.x < whole ? mine * p.arg : 0;
  if (t == 0)
    for (int s = 0; s < kStages; ++s) ptx::mbarrier_init(ptx::to_smem(&barriers[s]), 1);
  __syncthreads();
  const auto issue = [&](int64_t turn) {
    const int s = int(turn % kStages);
    const ptx::smem barrier = ptx::to_smem(&barriers[s]);
    ptx::mbarrier_arrive_expect(barrier, kStageBytes);
    ptx::bulk_copy(ptx::to_smem(stages + s * kStageBytes), chunks + (blockIdx.x + turn % mine * gridDim.x) * kStageChunks, kStageBytes, barrier);
  };
  if (t == 0)
    for (int64_t turn = 0; turn < kStages && turn < turns; ++turn) issue(turn);
  uint32_t sum = 0;
#pragma unroll 1
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int s = int(turn % kStages);
    ptx::mbarrier_wait(ptx::to_smem(&barriers[s]), uint32_t(turn / kStages) & 1u);
    const uint4* const stage = reinterpret_cast<const uint4*>(stages + s * kStageBytes);
#pragma unroll
    for (int i = 0; i < kStageChunks; i += 256) sum += words_of(stage[i + t]);
    __syncthreads();  // the stage is read before it is filled again
    if (t == 0 && turn + kStages < turns) issue(turn + kStages);
  }
  put_sum(p.out, sum);
#else
  (void)p;
#endif
}
GPU_EXPORT(kvlar_ceiling_bulk_copies)
