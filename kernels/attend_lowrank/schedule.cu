// The work list of attend_lowrank: see attend/schedule.cuh.
#include "attend/schedule.cuh"
#include "attend_lowrank/unit.cuh"

extern "C" __global__ void __launch_bounds__(1024, 1) kvlar_attend_lowrank_schedule(const __grid_constant__ KvlarAttendLowrank p) {
  using namespace kvlar::attend_lowrank;
  static_assert(sizeof(Work) == 4 * KVLAR_LOWRANK_WORK_RECORD, "the host counts on it");
  kvlar::attend::build_work_list<Visible>(p.attend, [&](int index, Visible& unit) {
    const Place at(p, index);
    const Visible found(p.attend, at);
    unit = found;
    return found.count(p, at);
  });
}
GPU_EXPORT(kvlar_attend_lowrank_schedule)
