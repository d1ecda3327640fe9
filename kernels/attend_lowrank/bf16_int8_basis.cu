// Low-rank attention, bf16 queries: int8 latents, int8 basis.
#include "attend_lowrank/cta.cuh"

KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_int8_basis_v128_n8, __nv_bfloat16, 1, 128, KVLAR_LATENT_INT8_BASIS)
GPU_EXPORT(kvlar_attend_lowrank_bf16_int8_basis_v128_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_int8_basis_v256_n8, __nv_bfloat16, 1, 256, KVLAR_LATENT_INT8_BASIS)
GPU_EXPORT(kvlar_attend_lowrank_bf16_int8_basis_v256_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_int8_basis_v128_n16, __nv_bfloat16, 2, 128, KVLAR_LATENT_INT8_BASIS)
GPU_EXPORT(kvlar_attend_lowrank_bf16_int8_basis_v128_n16)
