// Rows times their factors, for the matrix product that sums linear layers' gradients: as on the CPU (clip-simd.h,
// scale_rows), what a row brings to the sum keeps its norm's bound. Bytes that move: 8 for each number.
#pragma once

#include "sums.h"

namespace fastdp::cuda {

// out[i, .] = factors[i] * row i; row i is position i % positions of record i / positions.
struct ScaleRows {
  static constexpr const char* kName = "scale_rows";
  static constexpr int kThreads = kRowThreads, kPer = Pack<float>::kCount;
  using Shared = NothingShared;

  Sequences<float> x;
  const double* factors;
  float* out;
  int64_t packs;  // of a row

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared&) const {
    const int64_t item = int64_t{c.block()} * kThreads + c.thread(), i = item / packs, from = item % packs * kPer;
    if (i >= x.records * x.positions) return;
    const Factor<float> factor = Factor<float>::of(factors[i]);
    Pack<float> v[1], scaled;
    if (factor.exact != 0.0) load_packs<float, 1>(x.record(i / x.positions).row(i % x.positions) + from, x.n - from, v);
    FASTDP_UNROLL
    for (int j = 0; j < kPer; ++j) scaled.at[j] = factor.exact == 0.0 ? 0.0f : product(factor, v[0].at[j]);
    float* to = out + i * x.n + from;
    if (x.n - from >= kPer && unaligned(to) == 0) {
      *reinterpret_cast<Pack<float>*>(to) = scaled;
      return;
    }
    for (int j = 0; j < kPer && from + j < x.n; ++j) to[j] = scaled.at[j];
  }

 private:
  // 0 where a float has not all its digits, or is too small for it: less of a gradient is within the bound, too.
  FASTDP_DEVICE static float product(const Factor<float>& factor, float x) {
    const float v = factor.rounded != 0.0f ? factor.rounded * x : static_cast<float>(factor.exact * double{x});
    const float size = v < 0.0f ? -v : v;
    return size >= static_cast<float>(Limits<float>::kLeast) && size <= static_cast<float>(Limits<float>::kMost) ? v
                                                                                                                 : 0.0f;
  }
};

// out: [records * positions, n]; rows of factor 0 are not read
template <class Launcher>
void scale_rows(Launcher& on, Sequences<float> x, const double* factors, float* out) {
  const int64_t packs = cut(x.n, ScaleRows::kPer);
  on.run(ScaleRows{x, factors, out, packs}, cut(x.records * x.positions * packs, ScaleRows::kThreads));
}

}  // namespace fastdp::cuda
