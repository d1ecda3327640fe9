// Scans of keys of up to 64 dimensions.
#include "scan/warp.cuh"

KVLAR_SCAN_ENTRY(kvlar_scan_d64_n8, 3, kvlar::scan::WarpScan<64, 1>)
GPU_EXPORT(kvlar_scan_d64_n8)
KVLAR_SCAN_ENTRY(kvlar_scan_d64_n16, 2, kvlar::scan::WarpScan<64, 2>)
GPU_EXPORT(kvlar_scan_d64_n16)
