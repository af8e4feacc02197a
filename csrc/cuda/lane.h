// Lanes of one: what csrc/lanes.h gives chacha.h and normal.h, for one GPU thread. So the generator and the transform
// are written once, and the noise is the same to the bit: every operation here is rounded once, as IEEE 754 has it.
// nvcc gets -fmad=false for that, as gcc -ffp-contract=off; its default division and square root are exact.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common.h"
#include "../kernels.h"
#include "context.h"

namespace fastdp::cuda {

#if defined(__CUDA_ARCH__)
#define FASTDP_UNROLL_16 _Pragma("unroll 16")
#elif defined(__CUDACC__)  // nvcc's other half, for the CPU, where nothing of it is run
#define FASTDP_UNROLL_16
#else
#define FASTDP_UNROLL_16 _Pragma("GCC unroll 16")
#endif
#if defined(__CUDACC__)
#define FASTDP_LANES __host__ __device__ __forceinline__
#else
#define FASTDP_LANES inline
#endif

using u32v = uint32_t;
using i32v = int32_t;
using f32v = float;

FASTDP_LANES u32v lane_numbers() { return 0; }
FASTDP_LANES f32v to_float(i32v x) { return static_cast<f32v>(x); }
FASTDP_LANES u32v mask(bool comparison) { return comparison ? ~0u : 0u; }
template <int n>
FASTDP_LANES u32v rotate_left(u32v x) {
  return x << n | x >> (32 - n);  // a funnel shift
}

#if defined(__CUDA_ARCH__)
FASTDP_LANES u32v bits_of(f32v x) { return __float_as_uint(x); }
FASTDP_LANES f32v float_of(u32v bits) { return __uint_as_float(bits); }
FASTDP_LANES f32v fused(f32v a, f32v b, f32v c) { return __fmaf_rn(a, b, c); }
FASTDP_LANES double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
FASTDP_LANES f32v sqrt_lanes(f32v x) { return __fsqrt_rn(x); }
FASTDP_LANES double square_root(double x) { return __dsqrt_rn(x); }
#else
FASTDP_LANES u32v bits_of(f32v x) {
  u32v bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
FASTDP_LANES f32v float_of(u32v bits) {
  f32v x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
FASTDP_LANES f32v fused(f32v a, f32v b, f32v c) { return __builtin_fmaf(a, b, c); }
FASTDP_LANES double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
FASTDP_LANES f32v sqrt_lanes(f32v x) { return __builtin_sqrtf(x); }
FASTDP_LANES double square_root(double x) { return __builtin_sqrt(x); }
#endif
FASTDP_LANES float square_root(float x) { return sqrt_lanes(x); }

#include "../chacha.h"
#include "../normal.h"
#include "../step.h"

}  // namespace fastdp::cuda
