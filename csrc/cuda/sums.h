// Sums of rows times their factors: what a row adds has a norm of at most max_norm, roundings included, and a row of
// factor 0 is left out by selection. In a fixed order, so that results are the same from run to run. Bytes that move,
// of a row of D elements of T: D sizeof(T). Registers (as in norms.h): AddPartial 32, SumRows 76.
#pragma once

#include "norms.h"

namespace fastdp::cuda {

// A factor as rows are multiplied by it: rounded to an F, or 0 there if an F has not all its digits.
template <class F>
struct Factor {
  double exact;
  F rounded;

  FASTDP_DEVICE static Factor of(double factor) {
    const bool fits = factor >= Limits<F>::kLeast && factor <= Limits<F>::kMost;
    return {factor, fits ? static_cast<F>(factor) : F{0}};
  }
};

// sums += factor x. A row of factor 0 is left out: 0 * NaN would be NaN. A subnormal factor has too few digits to keep
// the norm: products in double, and those too small for an F's digits become 0.
template <class T, class F>
FASTDP_DEVICE void add_scaled(F (&sums)[Pack<T>::kCount], const Pack<T>& x, const Factor<F>& factor) {
  if (factor.rounded != F{0}) {
    FASTDP_UNROLL
    for (int j = 0; j < Pack<T>::kCount; ++j) sums[j] = fused(factor.rounded, F{load(x.at[j])}, sums[j]);
  } else if (factor.exact != 0.0) {
    FASTDP_UNROLL
    for (int j = 0; j < Pack<T>::kCount; ++j) {
      const double v = factor.exact * double{load(x.at[j])};
      if ((v < 0.0 ? -v : v) >= Limits<F>::kLeast) sums[j] += static_cast<F>(v);
    }
  }
}

// out[column] (+)= sum over `count` of partial[., column]: a lane has a column, a warp an eighth of the partial sums.
template <class F>
struct AddPartial {
  static constexpr const char* kName = "sum of partial sums";
  static constexpr int kThreads = kRowThreads;
  struct Shared {
    F sums[kRowWarps][kWarp];
  };

  const F* partial;  // [count, n]
  int64_t count, n;
  F* out;
  bool add;

  int64_t blocks() const { return cut(n, kWarp); }

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    const int64_t column = int64_t{c.block()} * kWarp + c.lane(), each = cut(count, kRowWarps);
    F sum = 0;
    if (column < n)
      for (int64_t k = c.warp() * each; k < count && k < (c.warp() + 1) * each; ++k) sum += partial[k * n + column];
    s.sums[c.warp()][c.lane()] = sum;
    c.sync();
    if (c.warp() > 0 || column >= n) return;
    for (int w = 1; w < kRowWarps; ++w) sum += s.sums[w][c.lane()];
    out[column] = add ? out[column] + sum : sum;
  }
};

// Has body(to, add) write partial sums [count, n], if count > 1, and adds them up. Such a body adds to nothing.
template <class F, class Launcher, class Run>
void sum_of_parts(Launcher& on, int64_t count, int64_t n, F* out, bool add, Run run) {
  if (count == 1) return run(out, add);
  F* partial = on.template scratch<F>(count * n);
  run(partial, false);
  const AddPartial<F> body{partial, count, n, out, add};
  on.run(body, body.blocks());
}

// A block sums rows [part * each, (part + 1) * each) over the columns of kThreads packs.
template <class T, bool kAligned>
struct SumRows {
  static constexpr const char* kName = "sum_rows";
  static constexpr int kThreads = kRowThreads;
  static constexpr int kPer = Pack<T>::kCount, kAtOnce = 4;  // rows that are loaded at once
  static constexpr int64_t kWidth = kThreads * kPer;
  using Shared = NothingShared;
  using F = typename SumOf<T>::type;

  Rows<T> g;
  const double* factors;  // [g.rows]
  int64_t each;
  F* out;  // [parts, g.n]
  bool add;

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared&) const {
    const int64_t tiles = cut(g.n, kWidth), part = c.block() / tiles, left = c.block() % tiles * kWidth;
    const int64_t from = part * each, to = from + each < g.rows ? from + each : g.rows;
    const int n = static_cast<int>(g.n - left < kWidth ? g.n - left : kWidth);
    const Columns<T, kThreads, kAligned> columns{c.thread()};
    F sums[kPer] = {};
    for (int64_t i = from; i < to; i += kAtOnce) {
      Pack<T> x[kAtOnce];
      double factor[kAtOnce];
      FASTDP_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        factor[k] = i + k < to ? factors[i + k] : 0.0;
        if (factor[k] != 0.0) x[k] = columns.load(g.row(i + k) + left, n, 0);
      }
      FASTDP_UNROLL
      for (int k = 0; k < kAtOnce; ++k) add_scaled(sums, x[k], Factor<F>::of(factor[k]));
    }
    FASTDP_UNROLL
    for (int j = 0; j < kPer; ++j) {
      if (columns.at(0, j) >= n) continue;
      F& sum = out[part * g.n + left + columns.at(0, j)];
      sum = add ? sum + sums[j] : sums[j];
    }
  }
};

// out (+)= sum of factor_i g_i, [g.n]; rows of factor 0 are not read
template <class T, class Launcher>
void sum_rows(Launcher& on, Rows<T> g, const double* factors, typename SumOf<T>::type* out, bool add) {
  using F = typename SumOf<T>::type;
  constexpr int64_t kBlocks = 512, kLeast = 16;  // for a GPU of some 130 multiprocessors; rows that a part has
  if (g.n == 0) return;
  const int64_t tiles = cut(g.n, SumRows<T, true>::kWidth);
  const int64_t wanted = std::clamp<int64_t>(kBlocks / tiles, 1, std::max<int64_t>(1, g.rows / kLeast));
  const int64_t each = std::max<int64_t>(1, cut(g.rows, wanted)), parts = std::max<int64_t>(1, cut(g.rows, each));
  sum_of_parts(on, parts, g.n, out, add, [&](F* to, bool add_to) {
    if (aligned(g))
      on.run(SumRows<T, true>{g, factors, each, to, add_to}, parts * tiles);
    else
      on.run(SumRows<T, false>{g, factors, each, to, add_to}, parts * tiles);
  });
}

}  // namespace fastdp::cuda
