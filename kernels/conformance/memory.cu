// One primitive a kernel, as bare as can be: its effect is compared with its definition, in emulation and on a GPU.
// Copies from global to shared memory, and matrix loads from shared memory.
#include "abi.h"
#include "device/gpu.cuh"
#include "device/mbarrier.cuh"

namespace {
// Shared memory starts as this, so that bytes not written are seen.
constexpr uint32_t kUntouched = 0xdeadbeefu;

__device__ void fill(uint32_t* words, int count) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) words[i] = kUntouched;
  __syncthreads();
}
__device__ void dump(const KvlarConformance& p, const uint32_t* words, int count) {
  __syncthreads();
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) p.out[i] = words[i];
}
}  // namespace

// in: 32 x 4 words, then 32 byte counts. Lane l copies to word 4l; arg is the size, 17 the streaming one.
extern "C" __global__ void __launch_bounds__(32) kvlar_conformance_cp_async(const __grid_constant__ KvlarConformance p) {
  __shared__ __align__(16) uint32_t words[128];
  fill(words, 128);
  const int lane = int(threadIdx.x), bytes = int(p.in[128 + lane]);
  const ptx::smem to = ptx::to_smem(words + 4 * lane);
  if (p.arg == 16) ptx::cp_async16(to, p.in + 4 * lane, bytes);
  if (p.arg == 17) ptx::cp_async16_stream(to, p.in + 4 * lane);
  if (p.arg == 8) ptx::cp_async8(to, p.in + 4 * lane, bytes);
  if (p.arg == 4) ptx::cp_async4(to, p.in + 4 * lane, bytes);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  dump(p, words, 128);
}
GPU_EXPORT(kvlar_conformance_cp_async)

// Four groups of copies in flight; each is read when it must have landed, the youngest last.
extern "C" __global__ void __launch_bounds__(32) kvlar_conformance_cp_async_groups(const __grid_constant__ KvlarConformance p) {
  __shared__ __align__(16) uint32_t words[4 * 128];
  fill(words, 512);
  const int lane = int(threadIdx.x);
  for (int g = 0; g < 4; ++g) {
    ptx::cp_async16(ptx::to_smem(words + 128 * g + 4 * lane), p.in + 128 * g + 4 * lane);
    ptx::cp_async_commit();
  }
  const auto read = [&](int g) {
    __syncwarp();
    for (int i = 0; i < 4; ++i) p.out[128 * g + 32 * i + lane] = words[128 * g + 32 * i + lane];
  };
  ptx::cp_async_wait<3>();
  read(0);
  ptx::cp_async_wait<2>();
  read(1);
  ptx::cp_async_wait<1>();
  read(2);
  ptx::cp_async_wait<0>();
  read(3);
}
GPU_EXPORT(kvlar_conformance_cp_async_groups)

// Bulk copies of `count` bytes into two stages, `arg` rounds; a barrier's parity flips at each round.
extern "C" __global__ void __launch_bounds__(64) kvlar_conformance_bulk_copy(const __grid_constant__ KvlarConformance p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ __align__(128) uint32_t words[2][256];
  __shared__ __align__(8) uint64_t barriers[2];
  const int t = int(threadIdx.x), words_each = int(p.count / 4);
  if (t == 0)
    for (int s = 0; s < 2; ++s) ptx::mbarrier_init(ptx::to_smem(&barriers[s]), 2);
  __syncthreads();
  for (int round = 0; round < int(p.arg); ++round) {
    const int stage = round & 1;
    const ptx::smem barrier = ptx::to_smem(&barriers[stage]);
    if (t == 0) {
      ptx::mbarrier_arrive_expect(barrier, p.count);
      ptx::bulk_copy(ptx::to_smem(words[stage]), p.in + round * words_each, p.count, barrier);
    }
    if (t == 32) ptx::mbarrier_arrive(barrier);
    ptx::mbarrier_wait(barrier, uint32_t(round >> 1) & 1u);
    for (int i = t; i < words_each; i += 64) p.out[round * words_each + i] = words[stage][i];
    __syncthreads();  // the stage is read before it is filled again
  }
#else
  (void)p;
#endif
}
GPU_EXPORT(kvlar_conformance_bulk_copy)

// in: 32 rows of 4 words, then the row that each lane names. arg: 0 x1, 1 x2, 2 x2.trans, 3 x4, 4 x4.trans.
extern "C" __global__ void __launch_bounds__(32) kvlar_conformance_ldmatrix(const __grid_constant__ KvlarConformance p) {
  __shared__ __align__(16) uint32_t rows[128];
  const int lane = int(threadIdx.x);
  for (int i = 0; i < 4; ++i) rows[32 * i + lane] = p.in[32 * i + lane];
  __syncthreads();
  const ptx::smem row = ptx::to_smem(rows + 4 * p.in[128 + lane]);
  uint32_t one = 0, two[2] = {}, four[4] = {};
  switch (p.arg) {
    case 0: ptx::ldmatrix_x1(one, row); four[0] = one; break;
    case 1: ptx::ldmatrix_x2(two, row); break;
    case 2: ptx::ldmatrix_x2_trans(two, row); break;
    case 3: ptx::ldmatrix_x4(four, row); break;
    default: ptx::ldmatrix_x4_trans(four, row); break;
  }
  if (p.arg == 1 || p.arg == 2) four[0] = two[0], four[1] = two[1];
  for (int i = 0; i < 4; ++i) p.out[4 * lane + i] = four[i];
}
GPU_EXPORT(kvlar_conformance_ldmatrix)
