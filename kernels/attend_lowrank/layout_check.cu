// Compile-time checks of SwizzledRows: no entry points, nothing at run time. See attend/layout_check.cu.
#include "attend_lowrank/layout.cuh"

namespace kvlar::attend_lowrank {
namespace {

constexpr bool places_every_chunk_once(int chunks) {
  const SwizzledRows rows(chunks);
  for (int r = 0; r < 32; ++r) {
    unsigned long long seen[4] = {};
    for (int c = 0; c < chunks; ++c) {
      const int at = rows.at(r, c) - r * rows.row_bytes;
      if (at % 16 || at < 0 || at / 16 >= chunks || (seen[at / 1024] >> (at / 16 % 64)) & 1) return false;
      seen[at / 1024] |= 1ull << (at / 16 % 64);
    }
  }
  return true;
}

// 8 rows, one chunk: each in 16-byte columns of its own of the 128 bytes that the banks deliver a cycle.
constexpr bool matrices_are_conflict_free(int chunks) {
  const SwizzledRows rows(chunks);
  for (int first = 0; first < 32; first += 8)
    for (int c = 0; c < chunks; ++c) {
      unsigned columns = 0;
      for (int r = first; r < first + 8; ++r) columns |= 1u << (rows.at(r, c) % 128 / 16);
      if (columns != 0xffu) return false;
    }
  return true;
}

template <int kChunks> constexpr bool check_up_to() {
  static_assert(places_every_chunk_once(kChunks), "layout");
  static_assert(matrices_are_conflict_free(kChunks), "banks");
  if constexpr (kChunks > 2) return check_up_to<kChunks - 2>();
  return true;
}
static_assert(check_up_to<128>());  // rows of up to 1024 values in 16 bits

}  // namespace
}  // namespace kvlar::attend_lowrank
