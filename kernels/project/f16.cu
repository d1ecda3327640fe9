// Projection to latents and appending of latents, f16 rows and encoders.
#include "project/append.cuh"
#include "project/project.cuh"

KVLAR_PROJECT_ENTRY(kvlar_project_f16_m16, __half, 1)
GPU_EXPORT(kvlar_project_f16_m16)
KVLAR_PROJECT_ENTRY(kvlar_project_f16_m64, __half, 4)
GPU_EXPORT(kvlar_project_f16_m64)
KVLAR_APPEND_LOWRANK_ENTRY(kvlar_append_lowrank_f16_m16, __half, 1)
GPU_EXPORT(kvlar_append_lowrank_f16_m16)
KVLAR_APPEND_LOWRANK_ENTRY(kvlar_append_lowrank_f16_m64, __half, 4)
GPU_EXPORT(kvlar_append_lowrank_f16_m64)
