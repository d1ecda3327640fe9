// What compile-time checks of shared-memory layouts share.
//
// A 16-byte access is served a quarter warp at a time, an 8-byte one a half warp at a time, a 4-byte one all at once: the
// lanes must fall on different columns of that width of the 128 bytes that the banks deliver a cycle (or read the same
// word). Each layout must also place every 16-byte chunk once, within the tile.
#pragma once

namespace kvlar {

template <int kRows, int kChunks, class At> constexpr bool places_every_chunk_once(At at) {
  bool seen[kRows * kChunks] = {};
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kChunks; ++c) {
      const int byte = at(r, c);
      if (byte % 16 || byte < 0 || byte / 16 >= kRows * kChunks || seen[byte / 16]) return false;
      seen[byte / 16] = true;
    }
  return true;
}

// `address` gives the byte that a lane accesses; `width` is 16, 8, 4 or 2.
template <class F> constexpr bool conflict_free(F address, int width) {
  const int lanes = width == 16 ? 8 : width == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += lanes)
    for (int a = first; a < first + lanes; ++a)
      for (int b = first; b < a; ++b)
        for (int word = 0; word < (width + 3) / 4; ++word) {
          const int x = address(a) / 4 + word, y = address(b) / 4;
          for (int other = 0; other < (width + 3) / 4; ++other)
            if (x != y + other && x % 32 == (y + other) % 32) return false;
        }
  return true;
}

// As rows are copied: neighbouring lanes have neighbouring chunks of a row, up to 8 of it.
template <int kChunks, class At> constexpr bool copies_are_conflict_free(At at) {
  constexpr int kLanes = kChunks < 8 ? kChunks : 8, kPassRows = 32 / kLanes;
  for (int i = 0; i < (kPassRows > 16 ? kPassRows : 16); i += kPassRows)
    for (int j = 0; j < kChunks; j += kLanes)
      if (!conflict_free([=](int lane) { return at(i + lane / kLanes, lane % kLanes + j); }, 16)) return false;
  return true;
}

}  // namespace kvlar
