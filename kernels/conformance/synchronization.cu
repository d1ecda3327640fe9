// Warp collectives, named barriers and the one way for CTAs to meet; see memory.cu.
#include "abi.h"
#include "device/gpu.cuh"

// in: a word a lane, then an index a lane. out: 17 words a lane.
extern "C" __global__ void __launch_bounds__(32) kvlar_conformance_warp(const __grid_constant__ KvlarConformance p) {
  const int lane = int(threadIdx.x);
  const uint32_t all = 0xffffffffu, x = p.in[lane], index = p.in[32 + lane];
  uint32_t* out = p.out + 17 * lane;
  int same = 0;
  out[0] = __shfl_sync(all, x, int(index));
  out[1] = __shfl_up_sync(all, x, 3);
  out[2] = __shfl_down_sync(all, x, 5);
  out[3] = __shfl_xor_sync(all, x, 9);
  out[4] = __shfl_sync(all, x, int(index), 8);
  out[5] = __ballot_sync(all, x & 1);
  out[6] = uint32_t(__any_sync(all, x == 77));
  out[7] = uint32_t(__all_sync(all, x != 77));
  out[8] = __match_any_sync(all, index);
  out[9] = __match_all_sync(all, p.arg, &same);
  out[10] = uint32_t(same);
  out[11] = __reduce_add_sync(all, x);
  out[12] = __reduce_min_sync(all, x);
  out[13] = __reduce_max_sync(all, x);
  out[14] = __reduce_and_sync(all, x);
  out[15] = __reduce_or_sync(all, x);
  out[16] = __reduce_xor_sync(all, x);
}
GPU_EXPORT(kvlar_conformance_warp)

// Warp 0 produces, warp 1 consumes, over `count` rounds and two named barriers (full, empty).
extern "C" __global__ void __launch_bounds__(64) kvlar_conformance_named_barriers(const __grid_constant__ KvlarConformance p) {
  __shared__ uint32_t slot[32];
  const int lane = int(threadIdx.x) % 32;
  const bool producer = threadIdx.x < 32;
  for (uint32_t round = 0; round < p.count; ++round) {
    if (producer) {
      if (round > 0) ptx::bar_sync(2, 64);
      slot[31 - lane] = p.in[32 * round + lane];
      __threadfence_block();
      ptx::bar_arrive(1, 64);
    } else {
      ptx::bar_sync(1, 64);
      p.out[32 * round + lane] = slot[lane];
      if (round + 1 < p.count) ptx::bar_arrive(2, 64);
    }
  }
}
GPU_EXPORT(kvlar_conformance_named_barriers)

// Each CTA writes 64 words; the last to arrive adds all of them up. out: counter, sum, number of last ones, words.
// A fence that is missing shows on a GPU only, and only under repetition: the test launches this many times.
extern "C" __global__ void __launch_bounds__(64) kvlar_conformance_arrive_last(const __grid_constant__ KvlarConformance p) {
  __shared__ uint32_t sum;
  const uint32_t t = threadIdx.x;
  uint32_t* words = p.out + 3;
  if (t == 0) sum = 0;
  __stcg(words + 64 * blockIdx.x + t, p.in[(64 * blockIdx.x + t) % p.count] + p.arg);
  if (!ptx::arrive_last(p.out, gridDim.x)) return;
  uint32_t own = 0;
  for (uint32_t c = 0; c < gridDim.x; ++c) own += __ldcg(words + 64 * c + t);
  atomicAdd(&sum, own);
  __syncthreads();
  if (t == 0) {
    p.out[1] = sum;
    atomicAdd(p.out + 2, 1u);
  }
}
GPU_EXPORT(kvlar_conformance_arrive_last)
