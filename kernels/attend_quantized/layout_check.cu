// Compile-time checks of layout.cuh: no entry points, nothing at run time.
#include "attend_quantized/channel_keys.cuh"
#include "attend_quantized/values.cuh"
#include "device/layout_check.cuh"

namespace kvlar::attend_quantized {
namespace {

constexpr int byte_at(int log, int row, int byte) { return chunk_at(log, row, byte / 16) + byte % 16; }

// Offsets are exclusive sums of those of the bits of r and c.
constexpr bool is_linear(int log) {
  for (int r = 0; r < 64; ++r)
    for (int c = 0; c < 1 << log; ++c) {
      int sum = 0;
      for (int bit = 1; bit < 64; bit *= 2) sum ^= (r & bit ? chunk_at(log, bit, 0) : 0) ^ (c & bit ? chunk_at(log, 0, bit) : 0);
      if (sum != chunk_at(log, r, c)) return false;
    }
  return true;
}

constexpr bool repeats(int log) {
  for (int r = 0; r < 56; ++r)
    for (int c = 0; c < 1 << log; ++c)
      if (chunk_at(log, r + kRepeat, c) != chunk_at(log, r, c) + (kRepeat * 16 << log)) return false;
  return true;
}

// As copy_whole: kLanes serve each block of 16 rows.
template <int kLog, int kLanes> constexpr bool copies_are_conflict_free() {
  constexpr int kChunks = 1 << kLog, kAtOnce = kLanes < kChunks ? kLanes : kChunks;
  for (int i = 0; i < 16; i += kLanes / kAtOnce)
    for (int j = 0; j < kChunks; j += kAtOnce)
      if (!conflict_free(
              [=](int lane) {
                const int place = lane % kLanes;
                return chunk_at(kLog, lane / kLanes * 16 + i + place / kAtOnce, j + place % kAtOnce);
              },
              16))
        return false;
  return true;
}

// Lane (g, c) reads `width` bytes of row g, the c-th of each four.
template <int D> constexpr bool keys_are_conflict_free(int bits) {
  const int log = log_chunks<D>(bits), bytes = D * bits / 8, width = bytes / 4 < 16 ? bytes / 4 : 16;
  for (int unit = 0; unit < bytes / (4 * width); ++unit)
    if (!conflict_free([=](int lane) { return byte_at(log, lane / 4, width * (4 * unit + lane % 4)); }, width)) return false;
  return true;
}

// Lane (g, c) reads the g-th of each eight parts of rows 2c, 2c + 1, 2c + 8, 2c + 9.
template <int D> constexpr bool values_are_conflict_free(int bits) {
  constexpr int kWide = attend::OutputDims<D, true>::kWide;
  const int log = log_chunks<D>(bits), width = kWide * bits / 8;
  for (int r = 0; r < 4; ++r)
    for (int j = 0; j < D / (8 * kWide); ++j)
      if (!conflict_free([=](int lane) { return byte_at(log, 2 * (lane % 4) + (r & 1) + (r >> 1) * 8, width * (8 * j + lane / 4)); }, width))
        return false;
  return true;
}

template <int D, int kBits> constexpr bool check() {
  constexpr int kLog = log_chunks<D>(kBits);
  static_assert((16 << kLog) == D * kBits / 8, "chunks of a row");
  constexpr auto at = [](int r, int c) { return chunk_at(kLog, r, c); };
  static_assert(places_every_chunk_once<64, 1 << kLog>(at), "layout");
  static_assert(is_linear(kLog), "copies and loads take offsets apart");
  static_assert(repeats(kLog), "loads add whole groups of rows");
  static_assert(copies_are_conflict_free<kLog, 8>() && copies_are_conflict_free<kLog, 16>(), "copies");
  static_assert(keys_are_conflict_free<D>(kBits), "keys");
  static_assert(values_are_conflict_free<D>(kBits), "values");
  return true;
}
template <int D> constexpr bool check_all() { return check<D, 8>() && check<D, 4>() && check<D, 2>(); }
static_assert(check_all<64>() && check_all<128>() && check_all<256>());

// Scales and zeros of channels: lanes of equal c read the same four.
template <int D, int kBits> constexpr bool channels_are_conflict_free() {
  using Keys = ChannelKeys<D, kBits>;
  for (int u = 0; u < Keys::kUnits; ++u)
    for (int w = 0; w < Keys::kWords; ++w)
      for (int i = 0; i < Keys::kCodes / 4; ++i)
        for (int a = 0; a < 4; ++a)
          for (int b = 0; b < a; ++b) {
            const int x = channel_chunk_at(Keys::first(u, w, a) / 4 + i), y = channel_chunk_at(Keys::first(u, w, b) / 4 + i);
            if (x % 128 == y % 128) return false;
          }
  return places_every_chunk_once<1, D / 4>([](int, int c) { return channel_chunk_at(c); });
}
template <int D> constexpr bool all_channels() { return channels_are_conflict_free<D, 4>() && channels_are_conflict_free<D, 2>(); }
static_assert(all_channels<64>() && all_channels<128>() && all_channels<256>());

// The contraction meets every dimension once.
template <int D, class Keys> constexpr bool covers() {
  bool seen[D] = {};
  for (int k = 0; k < D / 16; ++k)
    for (int column = 0; column < 16; ++column) {
      const int dim = Keys::dim(k, column);
      if (dim < 0 || dim >= D || seen[dim]) return false;
      seen[dim] = true;
    }
  return true;
}
template <int D> constexpr bool covers_all() {
  return covers<D, RowKeys<D, 8, false>>() && covers<D, RowKeys<D, 8, true>>() && covers<D, RowKeys<D, 4, false>>() &&
         covers<D, RowKeys<D, 2, false>>() && covers<D, ChannelKeys<D, 4>>() && covers<D, ChannelKeys<D, 2>>();
}
static_assert(covers_all<64>() && covers_all<128>() && covers_all<256>());

}  // namespace
}  // namespace kvlar::attend_quantized
