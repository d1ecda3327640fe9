// Scores by attention, bf16 queries and rows.
#include "score/lse.cuh"
#include "score/scores.cuh"

KVLAR_SCORE_LSE_ENTRY(kvlar_score_lse_bf16_d64, 64, __nv_bfloat16)
GPU_EXPORT(kvlar_score_lse_bf16_d64)
KVLAR_SCORE_ROWS_ENTRY(kvlar_score_rows_bf16_d64, 64, __nv_bfloat16)
GPU_EXPORT(kvlar_score_rows_bf16_d64)
KVLAR_SCORE_LSE_ENTRY(kvlar_score_lse_bf16_d128, 128, __nv_bfloat16)
GPU_EXPORT(kvlar_score_lse_bf16_d128)
KVLAR_SCORE_ROWS_ENTRY(kvlar_score_rows_bf16_d128, 128, __nv_bfloat16)
GPU_EXPORT(kvlar_score_rows_bf16_d128)
KVLAR_SCORE_LSE_ENTRY(kvlar_score_lse_bf16_d256, 256, __nv_bfloat16)
GPU_EXPORT(kvlar_score_lse_bf16_d256)
KVLAR_SCORE_ROWS_ENTRY(kvlar_score_rows_bf16_d256, 256, __nv_bfloat16)
GPU_EXPORT(kvlar_score_rows_bf16_d256)
