// Compile-time checks of how rows are read as B fragments (tile.cuh): no entry points, nothing at run time.
#include "attend/tiles.cuh"
#include "device/layout_check.cuh"

namespace kvlar::score {
namespace {

template <int D> constexpr bool reads_are_conflict_free() {
  for (int k = 0; k < D / 16; k += 2)
    if (!conflict_free([=](int lane) { return attend::DenseLayout<D>::at(lane & 7, 2 * k + (lane >> 3)); }, 16)) return false;
  return true;
}
static_assert(reads_are_conflict_free<64>() && reads_are_conflict_free<128>() && reads_are_conflict_free<256>(), "banks");

}  // namespace
}  // namespace kvlar::score
