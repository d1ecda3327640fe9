// Decode attention, f16 queries: f16 rows.
#include "attend/attend.cuh"

KVLAR_ATTEND_ENTRY(kvlar_attend_f16_d64_n8, 64, 1, __half, false)
GPU_EXPORT(kvlar_attend_f16_d64_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_f16_d64_n16, 64, 2, __half, false)
GPU_EXPORT(kvlar_attend_f16_d64_n16)
KVLAR_ATTEND_ENTRY(kvlar_attend_f16_d128_n8, 128, 1, __half, false)
GPU_EXPORT(kvlar_attend_f16_d128_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_f16_d128_n16, 128, 2, __half, false)
GPU_EXPORT(kvlar_attend_f16_d128_n16)
KVLAR_ATTEND_ENTRY(kvlar_attend_f16_d256_n8, 256, 1, __half, false)
GPU_EXPORT(kvlar_attend_f16_d256_n8)
