// score_keys: scores of cached rows from keys and values; see keys.cuh and lags.cuh.
#include "score/keys.cuh"
#include "score/lags.cuh"

#define KVLAR_SCORE_KEYS_ENTRY(name, body)                                                                                 \
  extern "C" __global__ void __launch_bounds__(kvlar::keys::kThreads, 3) name(const __grid_constant__ KvlarScoreKeys p) { \
    kvlar::keys::body(p);                                                                                                  \
  }

KVLAR_SCORE_KEYS_ENTRY(kvlar_score_keys_bf16, score_rows<__nv_bfloat16>)
GPU_EXPORT(kvlar_score_keys_bf16)
KVLAR_SCORE_KEYS_ENTRY(kvlar_score_keys_bf16_sums, sum_directions<__nv_bfloat16>)
GPU_EXPORT(kvlar_score_keys_bf16_sums)
KVLAR_SCORE_KEYS_ENTRY(kvlar_score_keys_bf16_lags, score_lag<__nv_bfloat16>)
GPU_EXPORT(kvlar_score_keys_bf16_lags)
KVLAR_SCORE_KEYS_ENTRY(kvlar_score_keys_f16, score_rows<__half>)
GPU_EXPORT(kvlar_score_keys_f16)
KVLAR_SCORE_KEYS_ENTRY(kvlar_score_keys_f16_sums, sum_directions<__half>)
GPU_EXPORT(kvlar_score_keys_f16_sums)
KVLAR_SCORE_KEYS_ENTRY(kvlar_score_keys_f16_lags, score_lag<__half>)
GPU_EXPORT(kvlar_score_keys_f16_lags)
