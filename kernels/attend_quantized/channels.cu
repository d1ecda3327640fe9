// Decode attention over channel-wise keys and values in groups.
#include "attend/attend.cuh"
#include "attend_quantized/channels.cuh"

KVLAR_ATTEND_ENTRY(kvlar_attend_quantized_channels_d64_n8, kvlar::attend_quantized::WarpChannels<64>)
GPU_EXPORT(kvlar_attend_quantized_channels_d64_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_quantized_channels_d128_n8, kvlar::attend_quantized::WarpChannels<128>)
GPU_EXPORT(kvlar_attend_quantized_channels_d128_n8)
KVLAR_ATTEND_ENTRY(kvlar_attend_quantized_channels_d256_n8, kvlar::attend_quantized::WarpChannels<256>)
GPU_EXPORT(kvlar_attend_quantized_channels_d256_n8)
