// Low-rank attention, f16 queries: int8 latents, f16 basis.
#include "attend_lowrank/cta.cuh"

KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_f16_int8_v128_n8, __half, 1, 128, KVLAR_LATENT_INT8)
GPU_EXPORT(kvlar_attend_lowrank_f16_int8_v128_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_f16_int8_v256_n8, __half, 1, 256, KVLAR_LATENT_INT8)
GPU_EXPORT(kvlar_attend_lowrank_f16_int8_v256_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_f16_int8_v128_n16, __half, 2, 128, KVLAR_LATENT_INT8)
GPU_EXPORT(kvlar_attend_lowrank_f16_int8_v128_n16)
