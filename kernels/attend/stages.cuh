// Stages of the ring that a warp's copies go through.
#pragma once
#include "device/gpu.cuh"

namespace kvlar::attend {

// GPUs with 99 KB of shared memory a block (sm_86, sm_89, sm_120) take a shorter ring.
#if defined(KVLAR_SMALL_SHARED) || \
    (defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200))
constexpr int kStages = 2;
#else
constexpr int kStages = 3;
#endif

}  // namespace kvlar::attend
