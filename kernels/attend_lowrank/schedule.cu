// The work list of attend_lowrank: see attend/schedule.cuh.
#include "attend/schedule.cuh"
#include "attend_lowrank/unit.cuh"

extern "C" __global__ void __launch_bounds__(1024) kvlar_attend_lowrank_schedule(const __grid_constant__ KvlarAttendLowrank p) {
  kvlar::attend::build_work_list(p.attend, [&](int index) {
    kvlar::attend_lowrank::Unit unit;
    load_unit(p, index, unit);
    return unit.tile_count;
  });
}
GPU_EXPORT(kvlar_attend_lowrank_schedule)
