// The one include of a kernel: CUDA under nvcc, the CPU emulation (kernels/simt) under a host compiler.
//
// What keeps a kernel runnable on both:
//   * inline assembly only in device/ptx.cuh and device/mbarrier.cuh, where each instruction has two bodies;
//   * dynamic shared memory only through GPU_DYN_SMEM(name), addresses as ptx::smem;
//   * an entry point is extern "C" __global__, takes one struct by value and is followed by GPU_EXPORT(name)
//     on a line of its own (the build finds entry points by these lines);
//   * full explicit masks; __syncwarp() before a lane reads what another wrote; no return before a barrier.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cstdint>
#define GPU_DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#define GPU_EXPORT(kernel)
#else
#include "simt/host.h"
#define GPU_DYN_SMEM(name) unsigned char* const name = simt::dyn_smem()
#endif
#include "device/ptx.cuh"
