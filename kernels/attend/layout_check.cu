// Compile-time checks of the shared-memory layouts in tiles.cuh: no entry points, nothing at run time.
//
// A 16-byte access is served a quarter warp at a time, an 8-byte one a half warp at a time: the 8 (16) lanes must fall
// on different 16-byte (8-byte) columns of the 128 bytes that the banks deliver a cycle. Each layout must also place
// every chunk once, within the tile.
#include "attend/dense_tile.cuh"

namespace kvlar::attend {
namespace {

template <class Layout, int kRows, int kChunks> constexpr bool places_every_chunk_once() {
  bool seen[kRows * kChunks] = {};
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kChunks; ++c) {
      const int at = Layout::at(r, c);
      if (at % 16 || at < 0 || at / 16 >= kRows * kChunks || seen[at / 16]) return false;
      seen[at / 16] = true;
    }
  return true;
}

// `address` gives the byte that a lane accesses; `width` is 16 or 8.
template <class F> constexpr bool conflict_free(F address, int width) {
  const int lanes = 128 / width;
  for (int first = 0; first < 32; first += lanes) {
    unsigned columns = 0;
    for (int lane = first; lane < first + lanes; ++lane) columns |= 1u << (address(lane) % 128 / width);
    if (columns != (width == 16 ? 0xffu : 0xffffu)) return false;
  }
  return true;
}

// As copy_rows writes: `kLanes` neighbours a row.
template <class Layout, int kChunks> constexpr bool copies_are_conflict_free() {
  constexpr int kLanes = kChunks < 8 ? kChunks : 8, kPassRows = 32 / kLanes;
  for (int i = 0; i < 16; i += kPassRows)
    for (int j = 0; j < kChunks; j += kLanes)
      if (!conflict_free([=](int lane) { return Layout::at(i + lane / kLanes, lane % kLanes + j); }, 16)) return false;
  return true;
}

template <int D> constexpr bool dense_reads_are_conflict_free() {
  using Layout = DenseLayout<D>;
  for (int k = 0; k < D / 16; ++k) {
    if (!conflict_free([=](int lane) { return Layout::at(lane & 15, 2 * k + (lane >> 4)); }, 16)) return false;
    if (!conflict_free([=](int lane) { return Layout::at((lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)); }, 16)) return false;
  }
  return true;
}

template <int D> constexpr bool int8_reads_are_conflict_free() {
  for (int h = 0; h < D / 64; ++h)
    if (!conflict_free([=](int lane) { return Int8KeyLayout<D>::at(lane / 4, 4 * h + lane % 4); }, 16)) return false;
  constexpr int kWide = OutputDims<D, true>::kWide;
  for (int r = 0; r < 4; ++r)
    for (int j = 0; j < D / (8 * kWide); ++j) {
      const auto row = [=](int lane) { return 2 * (lane % 4) + (r & 1) + (r >> 1) * 8; };
      if (D == 64) {
        const auto at = [=](int lane) { return Int8ValueLayout<D>::at(row(lane), lane / 8) + ((lane / 4 & 1) << 3); };
        if (!conflict_free(at, 8)) return false;
      } else {
        const auto at = [=](int lane) { return Int8ValueLayout<D>::at(row(lane), 8 * j + lane / 4); };
        if (!conflict_free(at, 16)) return false;
      }
    }
  return true;
}

template <int D> constexpr bool check() {
  static_assert(places_every_chunk_once<DenseLayout<D>, Tiling<D, false>::kDenseRows, D / 8>(), "dense layout");
  static_assert(places_every_chunk_once<Int8KeyLayout<D>, Tiling<D, true>::kInt8Rows, D / 16>(), "int8 key layout");
  static_assert(places_every_chunk_once<Int8ValueLayout<D>, Tiling<D, true>::kInt8Rows, D / 16>(), "int8 value layout");
  static_assert(copies_are_conflict_free<DenseLayout<D>, D / 8>(), "dense copies");
  static_assert(copies_are_conflict_free<Int8KeyLayout<D>, D / 16>(), "int8 key copies");
  static_assert(copies_are_conflict_free<Int8ValueLayout<D>, D / 16>(), "int8 value copies");
  static_assert(dense_reads_are_conflict_free<D>(), "dense reads");
  static_assert(int8_reads_are_conflict_free<D>(), "int8 reads");
  return true;
}
static_assert(check<64>() && check<128>() && check<256>());

}  // namespace
}  // namespace kvlar::attend
