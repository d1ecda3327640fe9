// Compile-time checks of the shared-memory layout in tiles.cuh: no entry points, nothing at run time.
#include "attend/dense_tile.cuh"
#include "device/layout_check.cuh"

namespace kvlar::attend {
namespace {

template <int D> constexpr bool reads_are_conflict_free() {
  using Layout = DenseLayout<D>;
  for (int k = 0; k < D / 16; ++k) {
    if (!conflict_free([=](int lane) { return Layout::at(lane & 15, 2 * k + (lane >> 4)); }, 16)) return false;
    if (!conflict_free([=](int lane) { return Layout::at((lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)); }, 16)) return false;
  }
  return true;
}

template <int D> constexpr bool check() {
  constexpr auto at = [](int r, int c) { return DenseLayout<D>::at(r, c); };
  static_assert(places_every_chunk_once<Tiling<D>::kRows, D / 8>(at), "dense layout");
  static_assert(copies_are_conflict_free<D / 8>(at), "dense copies");
  static_assert(reads_are_conflict_free<D>(), "dense reads");
  return true;
}
static_assert(check<64>() && check<128>() && check<256>());

}  // namespace
}  // namespace kvlar::attend
