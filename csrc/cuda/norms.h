// Squared norms of rows, and their clip factors. As on the CPU (clip-simd.h): squares are summed in double, in a fixed
// order, and a row whose norm is not finite has the factor 0. Multiply-adds are fused here: a product is then not
// rounded at all, which only leaves the factors more room. Bytes that move, of a row of D elements of T: D sizeof(T).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "block.h"

namespace fastdp::cuda {

// Registers by ptxas (CUDA 13, the more of sm_80 and sm_90, and of float and 16-bit T), nothing spilled: SquareNorms
// 56, SumPieces 30, ClipFactors 26.
constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;

FASTDP_BOTH constexpr int64_t cut(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The share of one of `team` threads.
template <class T>
FASTDP_DEVICE double squares(const T* x, int64_t n, int thread, int team) {
  constexpr int kPer = Pack<T>::kCount;
  const int64_t head = unaligned(x);  // below kPer: of a shorter row, packs are none
  const int64_t packs = (n - head) / kPer, single = n - packs * kPer;
  double sum = 0.0;
  for (int64_t k = thread; k < packs; k += team) sum += squares(load_pack(x + head + k * kPer));
  for (int64_t k = thread; k < single; k += team) {
    const double v = load(x[k < head ? k : k + packs * kPer]);
    sum = fused(v, v, sum);
  }
  return sum;
}

// out[row, piece] = squared norm of a piece of a row, by `team` threads: 2^k of a warp, or the block
template <class T>
struct SquareNorms {
  static constexpr const char* kName = "sq_norms";
  static constexpr int kThreads = kRowThreads;
  static constexpr int64_t kPiece = kThreads * 16 * Pack<T>::kCount;  // 64 KiB: 16 loads a thread
  struct Shared {
    double sums[kRowWarps];
  };

  Rows<T> g;
  double* out;  // [g.rows, pieces]
  int64_t pieces;
  int team;

  SquareNorms(Rows<T> rows, double* to) : g(rows), out(to), pieces(std::max<int64_t>(1, cut(rows.n, kPiece))), team(1) {
    const int64_t packs = cut(g.n, Pack<T>::kCount);
    while (team < kWarp && 2 * team < packs) team *= 2;  // 2 loads a thread
    if (packs > 8 * kWarp) team = kThreads;
  }

  int64_t blocks() const { return cut(g.rows * pieces * team, kThreads); }

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    const int64_t item = (int64_t{c.block()} * kThreads + c.thread()) / team;
    const int64_t row = item / pieces, from = item % pieces * kPiece;
    double sum = 0.0;
    if (row < g.rows)
      sum = squares(g.row(row) + from, g.n - from < kPiece ? g.n - from : kPiece, c.thread() % team, team);
    for (int mask = 1; mask < team && mask < kWarp; mask *= 2) sum += c.shuffle_xor(sum, mask);
    if (team == kThreads) {
      if (c.lane() == 0) s.sums[c.warp()] = sum;
      c.sync();
      sum = 0.0;
      for (int w = 0; w < kRowWarps; ++w) sum += s.sums[w];
    }
    if (row < g.rows && c.thread() % team == 0) out[item] = sum;
  }
};

// out[row] = sum of its pieces, by a warp
struct SumPieces {
  static constexpr const char* kName = "sq_norms of pieces";
  static constexpr int kThreads = kRowThreads;
  using Shared = NothingShared;

  const double* partial;  // [rows, pieces]
  int64_t rows, pieces;
  double* out;

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared&) const {
    const int64_t row = int64_t{c.block()} * kRowWarps + c.warp();
    double sum = 0.0;
    if (row < rows)
      for (int64_t k = c.lane(); k < pieces; k += kWarp) sum += partial[row * pieces + k];
    sum = warp_sum(c, sum);
    if (row < rows && c.lane() == 0) out[row] = sum;
  }
};

// out: [g.rows]
template <class T, class Launcher>
void sq_norms(Launcher& on, Rows<T> g, double* out) {
  SquareNorms<T> body(g, out);
  if (body.pieces > 1) body.out = on.template scratch<double>(g.rows * body.pieces);
  on.run(body, body.blocks());
  if (body.pieces > 1) on.run(SumPieces{body.out, g.rows, body.pieces, out}, cut(g.rows, kRowWarps));
}

// ---- factors

// As constants: device code may not call std's functions. kLeast is the least number that has all its digits.
template <class F>
struct Limits {
  using Of = std::numeric_limits<F>;
  static constexpr double kEpsilon = Of::epsilon(), kLeast = Of::min(), kMost = Of::max();
};

// The rule, and the bits, of clip_factors in csrc/ops.cpp; gamma < 0: none.
template <class F>
FASTDP_DEVICE double clip_factor(double sq_norm, double scale, double max_norm, double gamma) {
  constexpr double kEpsilon = Limits<F>::kEpsilon;
  const double norm = scale * square_root(sq_norm);
  if (!(norm <= Limits<double>::kMost)) return 0.0;
  if (gamma < 0.0 && norm * (1.0 + 4.0 * kEpsilon) <= max_norm) return scale;
  return scale * (max_norm / (norm + (gamma < 0.0 ? 0.0 : gamma)) * (1.0 - 4.0 * kEpsilon));
}

template <class F>
struct ClipFactors {
  static constexpr const char* kName = "clip_factors";
  static constexpr int kThreads = kRowThreads;
  using Shared = NothingShared;

  const double* sq_norms;
  int64_t batch;
  double scale, max_norm, gamma;
  double* factors;

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared&) const {
    const int64_t i = int64_t{c.block()} * kThreads + c.thread();
    if (i < batch) factors[i] = clip_factor<F>(sq_norms[i], scale, max_norm, gamma);
  }
};

// sq_norms, factors: [batch]; they may be the same. For sums of T's.
template <class T, class Launcher>
void clip_factors(Launcher& on, const double* sq_norms, int64_t batch, double scale, double max_norm,
                  double gamma_or_negative, double* factors) {
  using F = typename SumOf<T>::type;
  on.run(ClipFactors<F>{sq_norms, batch, scale, max_norm, gamma_or_negative, factors}, cut(batch, kRowThreads));
}

}  // namespace fastdp::cuda
