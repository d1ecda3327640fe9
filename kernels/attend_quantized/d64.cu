// Decode attention over quantized rows of up to 64 dimensions.
#include "attend/attend.cuh"
#include "attend_quantized/warp.cuh"

KVLAR_ATTEND_ENTRY(kvlar_attend_quantized_d64_n8, kvlar::attend_quantized::WarpQuantized<64, 1>)
GPU_EXPORT(kvlar_attend_quantized_d64_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_quantized_d64_n16, kvlar::attend_quantized::WarpQuantized<64, 2>)
GPU_EXPORT(kvlar_attend_quantized_d64_n16)
