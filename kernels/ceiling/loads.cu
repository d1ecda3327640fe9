// What memory can do, for benches to measure other kernels by: bytes read by loads, past the L1.
//
//   in: `count` chunks of 16 bytes, read `arg` times -> out [CTAs], the sum (mod 2^32) of the words that each CTA read.
//   row_loads: `count` rows of `arg` chunks, both powers of two, fewer than 2^31 chunks; each row once, far from the one before.
//
// From memory where `in` is larger than the L2, from the L2 where it is read more than once and fits, over the link where it is
// the host's. Floor: the bytes / what the data sheet says (H200: 4.8 TB/s from memory, 64 GB/s from the host; none is given for
// its L2).
#include "abi.h"
#include "ceiling/sums.cuh"

using namespace ceiling;

namespace {
constexpr int kThreads = 512, kInFlight = 8;  // 64 KB a CTA
}

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

extern "C" __global__ void __launch_bounds__(kThreads, 2) kvlar_ceiling_row_loads(const __grid_constant__ KvlarConformance p) {
  const uint4* const chunks = reinterpret_cast<const uint4*>(p.in);
  const uint32_t row_log2 = 31 - __clz(int(p.arg)), count = p.count << row_log2, step = gridDim.x * kThreads;
  const auto load = [&](uint32_t i) {
    return __ldcg(chunks + (uint64_t(scattered(i >> row_log2, p.count)) << row_log2) + (i & (p.arg - 1)));
  };
  uint32_t sum = 0, i = blockIdx.x * kThreads + threadIdx.x;
  for (; i + (kInFlight - 1) * step < count; i += kInFlight * step) {
    uint4 x[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) x[j] = load(i + j * step);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) sum += words_of(x[j]);
  }
  for (; i < count; i += step) sum += words_of(load(i));
  put_sum(p.out, sum);
}
GPU_EXPORT(kvlar_ceiling_row_loads)
