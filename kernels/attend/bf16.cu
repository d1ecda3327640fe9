// Decode attention, bf16 queries and rows.
#include "attend/attend.cuh"
#include "attend/warp.cuh"

KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d64_n8, kvlar::attend::WarpAttend<64, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_bf16_d64_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d64_n16, kvlar::attend::WarpAttend<64, 2, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_bf16_d64_n16)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d128_n8, kvlar::attend::WarpAttend<128, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_bf16_d128_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d128_n16, kvlar::attend::WarpAttend<128, 2, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_bf16_d128_n16)
KVLAR_ATTEND_ENTRY(kvlar_attend_bf16_d256_n8, kvlar::attend::WarpAttend<256, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_bf16_d256_n8)
