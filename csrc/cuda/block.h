// What the threads of a block do with rows and with each other's results.
#pragma once

#include "pack.h"

namespace fastdp::cuda {

// kPacks packs of adjacent elements; 0 for those after the `left` first ones, which are not read.
template <class T, int kPacks>
FASTDP_DEVICE void load_packs(const T* from, int64_t left, Pack<T> (&to)[kPacks]) {
  constexpr int kCount = Pack<T>::kCount;
  FASTDP_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    if (left >= (p + 1) * kCount && unaligned(from) == 0) {
      to[p] = load_pack(from + p * kCount);
      continue;
    }
    FASTDP_UNROLL
    for (int j = 0; j < kCount; ++j) to[p].at[j] = p * kCount + j < left ? from[p * kCount + j] : T{};
  }
}

// All lanes get the same bits: a + b is b + a.
template <class Context>
FASTDP_DEVICE double warp_sum(Context& c, double x) {
  FASTDP_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += c.shuffle_xor(x, mask);
  return x;
}

// All threads' x, in the same order each time; every thread gets it.
template <int kWarps, class Context, class Fold>
FASTDP_DEVICE double block_fold(Context& c, double (&warps)[kWarps], double x, Fold fold) {
  FASTDP_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fold(x, c.shuffle_xor(x, mask));
  if (c.lane() == 0) warps[c.warp()] = x;
  c.sync();
  x = warps[0];
  FASTDP_UNROLL
  for (int w = 1; w < kWarps; ++w) x = fold(x, warps[w]);
  c.sync();  // before `warps` are written again
  return x;
}

template <int kWarps, class Context>
FASTDP_DEVICE double block_sum(Context& c, double (&warps)[kWarps], double x) {
  return block_fold(c, warps, x, [](double a, double b) { return a + b; });
}

template <int kWarps, class Context>
FASTDP_DEVICE double block_largest(Context& c, double (&warps)[kWarps], double x) {
  return block_fold(c, warps, x, [](double a, double b) { return a < b ? b : a; });
}

}  // namespace fastdp::cuda
