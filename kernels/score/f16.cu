// Scores by attention, f16 queries and rows.
#include "score/lse.cuh"
#include "score/scores.cuh"

KVLAR_SCORE_LSE_ENTRY(kvlar_score_lse_f16_d64, 64, __half)
GPU_EXPORT(kvlar_score_lse_f16_d64)
KVLAR_SCORE_ROWS_ENTRY(kvlar_score_rows_f16_d64, 64, __half)
GPU_EXPORT(kvlar_score_rows_f16_d64)
KVLAR_SCORE_LSE_ENTRY(kvlar_score_lse_f16_d128, 128, __half)
GPU_EXPORT(kvlar_score_lse_f16_d128)
KVLAR_SCORE_ROWS_ENTRY(kvlar_score_rows_f16_d128, 128, __half)
GPU_EXPORT(kvlar_score_rows_f16_d128)
KVLAR_SCORE_LSE_ENTRY(kvlar_score_lse_f16_d256, 256, __half)
GPU_EXPORT(kvlar_score_lse_f16_d256)
KVLAR_SCORE_ROWS_ENTRY(kvlar_score_rows_f16_d256, 256, __half)
GPU_EXPORT(kvlar_score_rows_f16_d256)
