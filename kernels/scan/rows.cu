// Scans of keys that no tile of tensor cores fits, or that tables of scores serve better.
#include "scan/rows.cuh"

KVLAR_SCAN_ENTRY(kvlar_scan_tables, 2, kvlar::scan::WarpTables)
GPU_EXPORT(kvlar_scan_tables)
KVLAR_SCAN_ENTRY(kvlar_scan_decoded, 2, kvlar::scan::WarpDecoded)
GPU_EXPORT(kvlar_scan_decoded)
