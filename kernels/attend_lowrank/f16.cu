// Low-rank attention, f16 queries: f16 latents.
#include "attend_lowrank/cta.cuh"

KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_f16_v128_n8, __half, 1, 128, KVLAR_LATENT_DTYPE)
GPU_EXPORT(kvlar_attend_lowrank_f16_v128_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_f16_v256_n8, __half, 1, 256, KVLAR_LATENT_DTYPE)
GPU_EXPORT(kvlar_attend_lowrank_f16_v256_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_f16_v128_n16, __half, 2, 128, KVLAR_LATENT_DTYPE)
GPU_EXPORT(kvlar_attend_lowrank_f16_v128_n16)
