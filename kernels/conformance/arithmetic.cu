// Scalar instructions, element by element; see memory.cu.
#include "abi.h"
#include "device/gpu.cuh"

// in: three words an element; out: two. arg names the operation.
extern "C" __global__ void __launch_bounds__(64) kvlar_conformance_arithmetic(const __grid_constant__ KvlarConformance p) {
  const uint32_t i = blockIdx.x * 64 + threadIdx.x;
  if (i >= p.count) return;
  const uint32_t x = p.in[3 * i], y = p.in[3 * i + 1], z = p.in[3 * i + 2];
  const float a = __uint_as_float(x), b = __uint_as_float(y), c = __uint_as_float(z);
  uint32_t r = 0, s = 0;
  switch (p.arg) {
    case 0: r = __float_as_uint(ptx::ex2_approx(a)); break;
    case 1: r = __float_as_uint(ptx::lg2_approx(a)); break;
    case 2: r = __float_as_uint(ptx::rcp_approx(a)); break;
    case 3: r = __float_as_uint(ptx::tanh_approx(a)); break;
    case 4: r = ptx::pack_bf16(a, b); break;
    case 5: r = ptx::pack_f16(a, b); break;
    case 6: {
      const float2 two = ptx::unpack_f16(x);
      r = __float_as_uint(two.x);
      s = __float_as_uint(two.y);
      break;
    }
    case 7: r = ptx::lop3<0x96>(x, y, z); break;
    case 8: r = ptx::lop3<0xea>(x, y, z); break;
    case 9: r = uint32_t(__dp4a(int(x), int(y), int(z))); break;
    case 10: r = __dp4a(x, y, z); break;
    case 11: r = __byte_perm(x, y, z & 0x7777); break;
    case 12: r = __float_as_uint(__fmaf_rn(a, b, c)); break;
    case 13: r = __float_as_uint(__fdiv_rn(a, b)); break;
    case 14: r = __float_as_uint(rintf(a)); break;
    case 15: {
      const __nv_fp8_e4m3 e(a);
      r = e.__x;
      s = __float_as_uint(float(e));
      break;
    }
    case 16: r = uint32_t(__popc(x)), s = uint32_t(__clz(int(y))); break;
    case 17: r = __funnelshift_l(x, y, z), s = __funnelshift_r(x, y, z); break;
    case 19: r = ptx::fma_f16x2(x, y, z), s = ptx::mul_f16x2(x, y); break;
    default: r = __float_as_uint(__fsub_rn(a, b)), s = __float_as_uint(__fmul_rn(a, b)); break;
  }
  p.out[2 * i] = r;
  p.out[2 * i + 1] = s;
}
GPU_EXPORT(kvlar_conformance_arithmetic)
