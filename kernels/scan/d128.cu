// Scans of keys of up to 128 dimensions.
#include "scan/warp.cuh"

KVLAR_SCAN_ENTRY(kvlar_scan_d128_n8, 2, kvlar::scan::WarpScan<128, 1>)
GPU_EXPORT(kvlar_scan_d128_n8)
KVLAR_SCAN_ENTRY(kvlar_scan_d128_n16, 2, kvlar::scan::WarpScan<128, 2>)
GPU_EXPORT(kvlar_scan_d128_n16)
