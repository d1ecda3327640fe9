// Compile-time checks of centroids.cuh: no entry points, nothing at run time.
#include "scan/centroids.cuh"

namespace kvlar::scan {
namespace {

// The four lanes of a row meet every dimension once.
constexpr bool covers(int dim, int width) {
  bool seen[256] = {};
  for (int c = 0; c < 4; ++c)
    for (int i = 0; i < dim / 4; ++i) {
      const int at = centroid_dim(width, c, i);
      if (at < 0 || at >= dim || seen[at]) return false;
      seen[at] = true;
    }
  return true;
}
static_assert(covers(64, 2) && covers(128, 2) && covers(256, 2) && covers(80, 4) && covers(128, 4) && covers(128, 8) && covers(96, 8) &&
                  covers(256, 16) && covers(64, 16),
              "dimensions");

// Equal codes of the four sub-vectors of a word fall on different banks, at two and four dimensions a code.
constexpr bool spreads(int width) {
  for (int c = 1; c < 4; ++c)
    if (centroids_stride(256, width) * c / 4 % 32 == 0) return false;
  return centroids_stride(256, width) / 4 % 32 == width / 2;
}
static_assert(spreads(2) && spreads(4) && spreads(8), "banks");

}  // namespace
}  // namespace kvlar::scan
