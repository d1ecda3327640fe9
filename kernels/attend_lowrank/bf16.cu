// Low-rank attention, bf16 queries. Latents in 16 bits: 8 or 16 packed columns, values or slices of up to 128 or 256.
// int8 latents, and those with an int8 basis, are rarer and bound by tensor cores: one shape serves them.
#include "attend_lowrank/cta.cuh"

KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_v128_n8, __nv_bfloat16, 1, 128, KVLAR_LATENT_DTYPE)
GPU_EXPORT(kvlar_attend_lowrank_bf16_v128_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_v256_n8, __nv_bfloat16, 1, 256, KVLAR_LATENT_DTYPE)
GPU_EXPORT(kvlar_attend_lowrank_bf16_v256_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_v128_n16, __nv_bfloat16, 2, 128, KVLAR_LATENT_DTYPE)
GPU_EXPORT(kvlar_attend_lowrank_bf16_v128_n16)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_int8_v256_n8, __nv_bfloat16, 1, 256, KVLAR_LATENT_INT8)
GPU_EXPORT(kvlar_attend_lowrank_bf16_int8_v256_n8)
KVLAR_ATTEND_LOWRANK_ENTRY(kvlar_attend_lowrank_bf16_int8_basis_v256_n8, __nv_bfloat16, 1, 256, KVLAR_LATENT_INT8_BASIS)
GPU_EXPORT(kvlar_attend_lowrank_bf16_int8_basis_v256_n8)
