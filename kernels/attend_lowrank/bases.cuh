// What a CTA keeps of its heads' key bases: their rows in shared memory, in the order of the rebuild, the rows' sums, which
// the zeros of int8 latents multiply, and the keys' means.
//
// Eight lanes a row and four rows a lane at a time: requests are of whole rows, and 32 KB of a CTA's are on their way at once.
// At two heads of 128 dimensions and rank 128 (64 KB) this is one wait for the L2 and 1024 cycles of an SM's 64 B a cycle from it.
#pragma once
#include "attend_lowrank/scores.cuh"

namespace kvlar::attend_lowrank {

template <class T, int NT, int kLatent> struct KeyBases {
  using Scoring = Scores<T, NT, kLatent>;
  using Latents = typename Scoring::Latents;
  static constexpr bool kInt8 = kLatent != KVLAR_LATENT_DTYPE, kByteBasis = kLatent == KVLAR_LATENT_INT8_BASIS;
  static constexpr int kLanesARow = 8, kRowsALane = 4, kRowsAWarp = kRowsALane * 32 / kLanesARow;

  const KvlarAttendLowrank& p;
  const Unit& unit;
  unsigned char* const memory;  // the CTA's

  // Where row `i` of the rebuild's order comes from.
  struct Row {
    int head, pair, dim;  // of the tile's heads; a dim beyond the head's pads
    __device__ Row(const KvlarAttendLowrank& p, int i) {
      const int groups = int(p.padded_dim) / 32, group = i / 32;
      head = group / groups;
      pair = group % groups * kGroupPairs + i % kGroupPairs;
      dim = dim_of_pair(p.rope, pair, i / kGroupPairs % 2);
    }
  };

  __device__ int rows() const { return unit.heads * int(p.padded_dim); }

  __device__ void load(int warps) const {
    if (p.shared.resident || kInt8) load_rows(warps);
    if (p.key_mean) load_means(32 * warps);
  }

  __device__ void load_rows(int warps) const {
    // Worked out for each unit, instead of held in registers through its rows.
    const int t = ptx::unknown(int(threadIdx.x)), rank = ptx::unknown(int(p.key_rank));
    const int lane = t & 31, parts = (rank << Scoring::kBasisShift) / 32;
    const SwizzledRows layout(Latents::basis_chunks(rank));
    const char* const bases = static_cast<const char*>(p.key_basis) + ((unit.seq * p.key_basis_seq_stride) << Scoring::kBasisShift);
#pragma unroll 1
    for (int first = t / 32 * kRowsAWarp + lane / kLanesARow; first < rows(); first += warps * kRowsAWarp) {
      const uint4* from[kRowsALane];
      bool exists[kRowsALane];  // a row that pads is read as another, and is zeros: a load on a condition takes its registers from afar
      float sum[kRowsALane] = {};
#pragma unroll
      for (int j = 0; j < kRowsALane; ++j) {
        const Row row(p, first + 32 / kLanesARow * j);
        exists[j] = row.dim < int(p.attend.head_dim);
        const int64_t element = (int64_t(unit.head[row.head]) * p.attend.head_dim + (exists[j] ? row.dim : 0)) * rank;
        from[j] = reinterpret_cast<const uint4*>(bases + (element << Scoring::kBasisShift));
      }
#pragma unroll 1
      for (int part = lane % kLanesARow; part < parts; part += kLanesARow) {  // 32 bytes each
        uint4 low[kRowsALane], high[kRowsALane];
#pragma unroll
        for (int j = 0; j < kRowsALane; ++j) {
          low[j] = __ldg(from[j] + 2 * part);
          high[j] = __ldg(from[j] + 2 * part + 1);
        }
#pragma unroll
        for (int j = 0; j < kRowsALane; ++j) {
          uint32_t words[8] = {low[j].x, low[j].y, low[j].z, low[j].w, high[j].x, high[j].y, high[j].z, high[j].w};
#pragma unroll
          for (int i = 0; i < 8; ++i) words[i] = exists[j] ? words[i] : 0u;
          if (p.shared.resident) store(layout, first + 32 / kLanesARow * j, part, words);
          if constexpr (kInt8) sum[j] += sum_of(words);
        }
      }
      if constexpr (kInt8) {
#pragma unroll
        for (int j = 0; j < kRowsALane; ++j) {
#pragma unroll
          for (int step = 1; step < kLanesARow; step *= 2) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
          if (lane % kLanesARow == 0) reinterpret_cast<float*>(memory + p.shared.basis_sums)[first + 32 / kLanesARow * j] = sum[j];
        }
      }
    }
  }

  // 32 bytes in the order of the fragments.
  __device__ void store(const SwizzledRows& layout, int row, int part, const uint32_t (&words)[8]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<uint4*>(memory + p.shared.basis + layout.at(row, 2 * part + h)) =
          make_uint4(words[Latents::basis_word(4 * h)], words[Latents::basis_word(4 * h + 1)], words[Latents::basis_word(4 * h + 2)],
                     words[Latents::basis_word(4 * h + 3)]);
  }

  __device__ static float sum_of(const uint32_t (&words)[8]) {
    if constexpr (kByteBasis) {
      int sum = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = __dp4a(int(words[i]), 0x01010101, sum);
      return float(sum);
    }
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 two = Half16<__half>::unpack(words[i]);
      sum += two.x + two.y;
    }
    return sum;
  }

  __device__ void load_means(int threads) const {
#pragma unroll 1
    for (int i = int(threadIdx.x); i < rows(); i += threads) {
      const Row row(p, i);
      const int head = unit.head[row.head];
      float mean = row.dim < int(p.attend.head_dim) ? __ldg(p.key_mean + int64_t(head) * p.attend.head_dim + row.dim) : 0.f;
      if constexpr (kByteBasis) {
        const float scale = __ldg(p.key_scales + unit.seq * p.key_scales_seq_stride + int64_t(head) * (p.padded_dim / 2) + row.pair);
        mean = scale > 0.f ? mean / (128.f * scale) : 0.f;
      }
      reinterpret_cast<float*>(memory + p.shared.means)[i] = mean;
    }
  }
};

}  // namespace kvlar::attend_lowrank
