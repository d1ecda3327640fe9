// Encoding a group of rows channel-wise: a scale and zero for each channel of the group (KIVI, arXiv 2402.02750, §3.1).
// Bit-equal to the reference: see its codec module for the rules. Decoding is a row's affair: row_codec.cuh.
#pragma once
#include "device/row_codec.cuh"

namespace kvlar {

constexpr int kChannelWarps = 4;

struct ChannelScratch {  // shared memory
  float low[kChannelWarps][kMaxDim], high[kChannelWarps][kMaxDim];
};

// A CTA of kChannelWarps encodes the `format.group` rows whose first is at `to`. `load(x, r)` gives a lane's dims of row r of
// the group, and is asked twice: for the extremes, then for the codes.
template <class Load>
__device__ void encode_channels(RowPlace to, uint32_t row_stride, const KvlarFormat& format, int dim, ChannelScratch& scratch, Load load) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, first = kLaneDims * lane, rows = int(format.group);
  const int bits = code_bits(format.codec);
  const float levels = float((1 << bits) - 1);
  float low[kLaneDims], high[kLaneDims];
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    low[i] = INFINITY;
    high[i] = -INFINITY;
  }
  const auto rotated = [&](float (&x)[kLaneDims], int r) {
    load(x, r);
    if (format.hadamard) hadamard(x, dim, lane);
  };
  for (int r = warp; r < rows; r += kChannelWarps) {
    float x[kLaneDims];
    rotated(x, r);
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      low[i] = x[i] == x[i] ? fminf(low[i], x[i]) : -INFINITY;  // NaN would vanish: the channel has no finite zero now
      high[i] = fmaxf(high[i], x[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    scratch.low[warp][first + i] = low[i];
    scratch.high[warp][first + i] = high[i];
  }
  __syncthreads();
  Affine affine[kLaneDims];
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    for (int w = 0; w < kChannelWarps; ++w) {
      low[i] = fminf(low[i], scratch.low[w][first + i]);
      high[i] = fmaxf(high[i], scratch.high[w][first + i]);
    }
    affine[i] = affine_of(low[i], high[i], fabsf(low[i]) < INFINITY && fabsf(high[i]) < INFINITY, levels);
  }
  if (warp == 0 && first < dim) {
    uint4* params = reinterpret_cast<uint4*>(to.params + 4 * first);
    params[0] = make_uint4(pack_affine(affine[0]), pack_affine(affine[1]), pack_affine(affine[2]), pack_affine(affine[3]));
    params[1] = make_uint4(pack_affine(affine[4]), pack_affine(affine[5]), pack_affine(affine[6]), pack_affine(affine[7]));
  }
  for (int r = warp; r < rows; r += kChannelWarps) {
    float x[kLaneDims];
    rotated(x, r);
    uint32_t codes[kLaneDims] = {};
    if (first < dim)
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) codes[i] = code_of(x[i], affine[i], levels);
    store_codes(to.codes + uint64_t(uint32_t(r)) * row_stride, codes, bits, dim, lane);
  }
}

}  // namespace kvlar
