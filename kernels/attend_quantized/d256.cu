// Decode attention over quantized rows of up to 256 dimensions.
#include "attend/attend.cuh"
#include "attend_quantized/warp.cuh"

KVLAR_ATTEND_ENTRY(kvlar_attend_quantized_d256_n8, kvlar::attend_quantized::WarpQuantized<256, 1>)
GPU_EXPORT(kvlar_attend_quantized_d256_n8)
