// Decode attention over selected rows, bf16 queries and rows.
#include "attend_cut/warp.cuh"

KVLAR_ATTEND_CUT_ENTRY(kvlar_attend_cut_bf16_d64_n8, kvlar::attend_cut::WarpCut<64, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_cut_bf16_d64_n8)
KVLAR_ATTEND_CUT_ENTRY(kvlar_attend_cut_bf16_d64_n16, kvlar::attend_cut::WarpCut<64, 2, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_cut_bf16_d64_n16)
KVLAR_ATTEND_CUT_ENTRY(kvlar_attend_cut_bf16_d128_n8, kvlar::attend_cut::WarpCut<128, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_cut_bf16_d128_n8)
KVLAR_ATTEND_CUT_ENTRY(kvlar_attend_cut_bf16_d128_n16, kvlar::attend_cut::WarpCut<128, 2, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_cut_bf16_d128_n16)
KVLAR_ATTEND_CUT_ENTRY(kvlar_attend_cut_bf16_d256_n8, kvlar::attend_cut::WarpCut<256, 1, __nv_bfloat16>)
GPU_EXPORT(kvlar_attend_cut_bf16_d256_n8)
