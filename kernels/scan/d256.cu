// Scans of keys of up to 256 dimensions.
#include "scan/warp.cuh"

KVLAR_SCAN_ENTRY(kvlar_scan_d256_n8, 3, kvlar::scan::WarpScan<256, 1>)
GPU_EXPORT(kvlar_scan_d256_n8)
