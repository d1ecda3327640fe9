// Warp collectives of the emulation: the last lane to arrive computes for all 32. Never sanitized.
#include "simt/host.h"

namespace simt {
namespace {
template <class T> T in(const Lane* l, unsigned at = 0) {
  T v;
  memcpy(&v, l->in + at, sizeof v);
  return v;
}
template <class T> void out(Lane* l, T v, unsigned at = 0) { memcpy(l->out + at, &v, sizeof v); }
}  // namespace
#define EACH(l) for (int l = 0; l < 32; ++l) if (mask >> l & 1)

void c_nop(Lane* const*, unsigned, int) {}

void c_shfl(Lane* const* lanes, unsigned mask, int) {
  EACH(l) {  // a source outside the mask is undefined: garbage
    const int s = in<int>(lanes[l], 8) & 31;
    out<uint64_t>(lanes[l], mask >> s & 1 ? in<uint64_t>(lanes[s]) : 0xBADBADBADBADBADBull);
  }
}
void c_ballot(Lane* const* lanes, unsigned mask, int) {
  unsigned r = 0;
  EACH(l) if (in<int>(lanes[l])) r |= 1u << l;
  EACH(l) out(lanes[l], r);
}
void c_match_any(Lane* const* lanes, unsigned mask, int) {
  EACH(l) {
    unsigned r = 0;
    EACH(m) if (in<unsigned>(lanes[m]) == in<unsigned>(lanes[l])) r |= 1u << m;
    out(lanes[l], r);
  }
}
void c_match_all(Lane* const* lanes, unsigned mask, int) {
  const unsigned first = in<unsigned>(lanes[__builtin_ctz(mask)]);
  bool same = true;
  EACH(l) same = same && in<unsigned>(lanes[l]) == first;
  EACH(l) out(lanes[l], same ? mask : 0u);
}
void c_reduce(Lane* const* lanes, unsigned mask, int kind) {
  static const unsigned start[6] = {0, ~0u, 0, ~0u, 0, 0};
  unsigned r = start[kind];
  EACH(l) {
    const unsigned v = in<unsigned>(lanes[l]);
    switch (kind) {
      case 0: r += v; break;
      case 1: r = v < r ? v : r; break;
      case 2: r = v > r ? v : r; break;
      case 3: r &= v; break;
      case 4: r |= v; break;
      default: r ^= v;
    }
  }
  EACH(l) out(lanes[l], r);
}

// ldmatrix: lane 8m + i holds the address of row i of matrix m. A plain lane needs row lane / 4 of each matrix; a
// transposed one rows 2 (lane % 4) and + 1.
void c_gather_rows(Lane* const* lanes, unsigned, int trans) {
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < 4; ++m)
      if (!trans) {
        out(lanes[l], in<void*>(lanes[8 * m + l / 4]), 8 * m);
      } else {
        out(lanes[l], in<void*>(lanes[8 * m + 2 * (l % 4)]), 16 * m);
        out(lanes[l], in<void*>(lanes[8 * m + 2 * (l % 4) + 1]), 16 * m + 8);
      }
}
void c_movmatrix(Lane* const* lanes, unsigned, int) {
  uint16_t x[8][8];
  for (int l = 0; l < 32; ++l) {
    const uint32_t v = in<uint32_t>(lanes[l]);
    x[l / 4][2 * (l % 4)] = uint16_t(v);
    x[l / 4][2 * (l % 4) + 1] = uint16_t(v >> 16);
  }
  for (int l = 0; l < 32; ++l) out(lanes[l], uint32_t(x[2 * (l % 4)][l / 4]) | uint32_t(x[2 * (l % 4) + 1][l / 4]) << 16);
}

namespace {
// d (16 x 8) += a (16 x K) b (K x 8), fp32, in order of k.
typedef float Row8 __attribute__((vector_size(32)));
template <int K> void multiply(float (&a)[16][K], float (&b)[K][8], float (&c)[16][8]) {
  for (int i0 = 0; i0 < 16; i0 += 8) {  // 8 rows at a time stay in registers
    Row8 r[8];
    for (int i = 0; i < 8; ++i) memcpy(&r[i], c[i0 + i], 32);
    for (int k = 0; k < K; ++k) {
      Row8 v;
      memcpy(&v, b[k], 32);
      for (int i = 0; i < 8; ++i) r[i] += a[i0 + i][k] * v;
    }
    for (int i = 0; i < 8; ++i) memcpy(c[i0 + i], &r[i], 32);
  }
}
template <int K, bool kBf16> void mma_float(Lane* const* lanes) {
  const auto value = [](uint32_t w, int h) { return kBf16 ? bf16_to_float(uint16_t(w >> 16 * h)) : half_to_float(uint16_t(w >> 16 * h)); };
  alignas(32) float a[16][K], b[K][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = 2 * (l & 3);
    uint32_t x[4], y[2];
    float d[4];
    memcpy(x, lanes[l]->in, sizeof x);
    memcpy(y, lanes[l]->in + 16, sizeof y);
    memcpy(d, lanes[l]->in + 32, sizeof d);
    for (int h = 0; h < 2; ++h) {
      for (int k = 0; k < K; k += 8) {
        a[g][t + h + k] = value(x[k / 4], h);
        a[g + 8][t + h + k] = value(x[k / 4 + 1], h);
        b[t + h + k][g] = value(y[k / 8], h);
      }
      c[g][t + h] = d[h];
      c[g + 8][t + h] = d[2 + h];
    }
  }
  multiply(a, b, c);
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = 2 * (l & 3);
    const float d[4] = {c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]};
    memcpy(lanes[l]->out, d, sizeof d);
  }
}
template <int K> void mma_int(Lane* const* lanes, bool unsigned_a) {
  int a[16][K], b[K][8], c[16][8];
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, q = 4 * (l & 3), t = 2 * (l & 3);
    uint32_t x[4], y[2];
    int d[4];
    memcpy(x, lanes[l]->in, sizeof x);
    memcpy(y, lanes[l]->in + 16, sizeof y);
    memcpy(d, lanes[l]->in + 32, sizeof d);
    const auto code = [&](uint32_t w, int i) { return unsigned_a ? int(uint8_t(w >> 8 * i)) : int(int8_t(w >> 8 * i)); };
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < K; k += 16) {
        a[g][q + i + k] = code(x[k / 8], i);
        a[g + 8][q + i + k] = code(x[k / 8 + 1], i);
        b[q + i + k][g] = int8_t(y[k / 16] >> 8 * i);
      }
    for (int h = 0; h < 2; ++h) {
      c[g][t + h] = d[h];
      c[g + 8][t + h] = d[2 + h];
    }
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < K; ++k)
      for (int j = 0; j < 8; ++j) c[i][j] = int(unsigned(c[i][j]) + unsigned(a[i][k] * b[k][j]));
  for (int l = 0; l < 32; ++l) {
    const int g = l >> 2, t = 2 * (l & 3);
    const int d[4] = {c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]};
    memcpy(lanes[l]->out, d, sizeof d);
  }
}
}  // namespace

void c_mma_16816(Lane* const* lanes, unsigned, int bf16) { bf16 ? mma_float<16, true>(lanes) : mma_float<16, false>(lanes); }
void c_mma_1688(Lane* const* lanes, unsigned, int bf16) { bf16 ? mma_float<8, true>(lanes) : mma_float<8, false>(lanes); }
void c_mma_16832_int8(Lane* const* lanes, unsigned, int unsigned_a) { mma_int<32>(lanes, unsigned_a); }
void c_mma_16816_int8(Lane* const* lanes, unsigned, int unsigned_a) { mma_int<16>(lanes, unsigned_a); }
}  // namespace simt
