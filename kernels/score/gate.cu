// score_gate: scores of tokens from their hidden states; see gate.cuh and gate_few.cuh.
#include "score/gate_few.cuh"

#define KVLAR_SCORE_GATE_ENTRY(name, tiling, ctas, body)                                                                         \
  extern "C" __global__ void __launch_bounds__(kvlar::gate::tiling::kThreads, ctas) name(const __grid_constant__ KvlarScoreGate p) { \
    kvlar::gate::body(p);                                                                                                        \
  }

KVLAR_SCORE_GATE_ENTRY(kvlar_score_gate_bf16_many, Many, 2, score_many<__nv_bfloat16>)
GPU_EXPORT(kvlar_score_gate_bf16_many)
KVLAR_SCORE_GATE_ENTRY(kvlar_score_gate_bf16_few, Few, 4, score_few<__nv_bfloat16>)
GPU_EXPORT(kvlar_score_gate_bf16_few)
KVLAR_SCORE_GATE_ENTRY(kvlar_score_gate_f16_many, Many, 2, score_many<__half>)
GPU_EXPORT(kvlar_score_gate_f16_many)
KVLAR_SCORE_GATE_ENTRY(kvlar_score_gate_f16_few, Few, 4, score_few<__half>)
GPU_EXPORT(kvlar_score_gate_f16_few)
