// The work list of attend_lowrank: see attend/schedule.cuh.
#include "attend/schedule.cuh"
#include "attend_lowrank/unit.cuh"

extern "C" __global__ void __launch_bounds__(1024, 1) kvlar_attend_lowrank_schedule(const __grid_constant__ KvlarAttendLowrank p) {
  using namespace kvlar::attend_lowrank;
  kvlar::attend::build_work_list(p.attend, [&](int index) {
    const Place at(p, index);
    const Visible visible(p.attend, at);
    visible.store(unit_record(p.attend, index));
    return visible.count(p, at);
  });
}
GPU_EXPORT(kvlar_attend_lowrank_schedule)
