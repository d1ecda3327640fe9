// The work list of attend: see schedule.cuh.
#include "attend/schedule.cuh"

extern "C" __global__ void __launch_bounds__(1024) kvlar_attend_schedule(const __grid_constant__ KvlarAttend p) {
  kvlar::attend::build_work_list(p, [&](int unit) {
    kvlar::attend::Unit u;
    load_unit(p, unit, u);
    return u.tile_count;
  });
}
GPU_EXPORT(kvlar_attend_schedule)
