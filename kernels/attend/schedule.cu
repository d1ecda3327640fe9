// The work list of attend: see schedule.cuh.
#include "attend/schedule.cuh"

extern "C" __global__ void __launch_bounds__(1024) kvlar_attend_schedule(const __grid_constant__ KvlarAttend p) {
  using namespace kvlar::attend;
  static_assert(sizeof(CtaRecord<Unit>) == 4 * KVLAR_WORK_RECORD, "the host counts on it");
  build_work_list<Unit>(p, [&](int index, Unit& unit) {
    unit = {};
    load_unit(p, index, unit);
    return unit.tile_count;
  });
}
GPU_EXPORT(kvlar_attend_schedule)
