// float16, which only GPUs are given. Arithmetic is in float32, as for bfloat16 in common.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "../common.h"

namespace fastdp {

struct f16 {
  uint16_t bits;
};

#if defined(__CUDACC__)
FASTDP_BOTH inline float load(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
FASTDP_BOTH inline void store(f16& to, float x) { to.bits = __half_as_ushort(__float2half_rn(x)); }
#else
inline float load(f16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof half);
  return static_cast<float>(half);
}
inline void store(f16& to, float x) {
  const auto half = static_cast<_Float16>(x);
  std::memcpy(&to.bits, &half, sizeof half);
}
#endif

}  // namespace fastdp
