// Decode attention, bf16 queries: bf16 rows.
#include "attend/attend.cuh"

KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d64_n8, 64, 1, __nv_bfloat16, false)
GPU_EXPORT(kvlar_attend_bf16_d64_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d64_n16, 64, 2, __nv_bfloat16, false)
GPU_EXPORT(kvlar_attend_bf16_d64_n16)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d128_n8, 128, 1, __nv_bfloat16, false)
GPU_EXPORT(kvlar_attend_bf16_d128_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d128_n16, 128, 2, __nv_bfloat16, false)
GPU_EXPORT(kvlar_attend_bf16_d128_n16)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d256_n8, 256, 1, __nv_bfloat16, false)
GPU_EXPORT(kvlar_attend_bf16_d256_n8)
