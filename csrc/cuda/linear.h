// Squared norms of a linear layer's per-sample gradients G = sum_t b_t a_t^T without forming them (linear-simd.h):
// |b|^2 |a|^2 of one position, which reads (I + O) sizeof(T) bytes of a record; of T positions the sum of the products
// of two Gram matrices, |G|^2 = sum_{t,u} <a_t, a_u> <b_t, b_u>, of whose tiles only those on and above the diagonal
// are computed: T (T + tile) (I + O) operations of double a record.
// Of double, as on the CPU: the terms may cancel, and the room that clipping leaves for that (Norms._gram_roundings of
// fastdp/gradients.py) is in roundings of a double. An H100 does half as many operations of double as of float, 34
// TFLOPS without tensor cores: 1.1 us a record of T = 128, I = O = 768. An L4 does 1/64, 0.5 TFLOPS: 80 us, where
// forming the gradient in float would take 5 us, and 16 us to write and read it.
#pragma once

#include <cmath>
#include <cstdint>

#include "block.h"

namespace fastdp::cuda {

// ---- one position

// |b a^T|^2 + |b|^2 = |b|^2 (|a|^2 + 1), a record a block. No product of squares of floats leaves a double's range. Of
// an element, a conversion and a multiply-add: an L4, of 240 G of them a second in double, keeps up with its memory for
// float (75 G elements a second), and just not for bfloat16; an H100 by far.
template <class T>
struct ProductSquares {
  static constexpr const char* kName = "linear_sq_norms";
  static constexpr int kThreads = 128;  // 32 registers
  struct Shared {
    double warps[kThreads / kWarp];
  };

  Sequences<T> a, b;
  bool bias;
  double* out;

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    const double own_a = squares_of(c, a.record(c.block()).data, a.n);
    const double own_b = squares_of(c, b.record(c.block()).data, b.n);
    const double of_a = block_sum(c, s.warps, own_a), of_b = block_sum(c, s.warps, own_b);
    if (c.thread() == 0) out[c.block()] += of_a * of_b + (bias ? of_b : 0.0);
  }

 private:
  // By norms.h's `squares`, which begins at an address that is aligned, 8 bytes would be spilled on sm_90.
  template <class Context>
  FASTDP_DEVICE double squares_of(Context& c, const T* row, int64_t n) const {
    constexpr int kPer = Pack<T>::kCount;
    double sum = 0.0;
    for (int64_t from = c.thread() * kPer; from < n; from += kThreads * kPer) {
      Pack<T> x[1];
      load_packs(row + from, n - from, x);
      sum += squares(x[0]);
    }
    return sum;
  }
};

// ---- several positions

struct PositionSquares {
  double a, b;
};

// A tile of both Gram matrices a block: the sum of its products, twice above the diagonal. Panels of kTile positions
// and kDepth elements are in shared memory as doubles, 16 KiB, converted once, not once a use: an SM of an H100
// converts 16 a clock and multiplies 64. A thread's sums of the largest tile are 8 x 4, in 64 registers for each
// matrix: of 12 operands that it reads it makes 32 multiply-adds. Of one result, that are rounded one after the other:
// I + O, 32 products, and 15 + T^2 / 2^20 sums, fewer than Norms._gram_roundings has.
template <class T, int kTile>
struct GramTile {
  static constexpr const char* kName = "linear_sq_norms of a tile";
  // 210 registers of a tile of 64: 8 warps an SM, of 32 independent multiply-adds each; of 32, 80; of 16, 64
  static constexpr int kThreads = 128;
  static constexpr int kAcross = 16, kDown = kThreads / kAcross;                  // threads
  static constexpr int kRows = kTile / kDown, kColumns = kTile / kAcross;         // sums of a thread
  static constexpr int kEach = 8, kPer = Pack<T>::kCount, kPacks = kEach / kPer;  // elements that a thread loads
  static constexpr int kDepth = kEach * kThreads / kTile;
  using Sums = double[kRows][kColumns];
  struct Shared {
    alignas(16) double rows[kDepth][kTile];
    alignas(16) double columns[kDepth][kTile];
    double warps[kThreads / kWarp];
  };

  Sequences<T> a, b;
  double* partial;           // [a.records, pairs]
  PositionSquares* squares;  // [a.records, a.positions], or null

  FASTDP_BOTH int64_t pairs() const {
    const int64_t tiles = (a.positions + kTile - 1) / kTile;
    return tiles * (tiles + 1) / 2;
  }

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    const int64_t record = c.block() / pairs();
    int64_t above = c.block() % pairs(), across = 0;  // tiles above this one and to the left of it
    while (above > across) above -= ++across;
    Sums x, y;
    gram(c, s, a.record(record), above * kTile, across * kTile, x);
    gram(c, s, b.record(record), above * kTile, across * kTile, y);
    if (above == across && squares != nullptr) write_squares(c, x, y, squares + record * a.positions, above * kTile);
    double sum = 0.0;
    FASTDP_UNROLL
    for (int i = 0; i < kRows; ++i) FASTDP_UNROLL
    for (int j = 0; j < kColumns; ++j) sum = fused(x[i][j], y[i][j], sum);
    sum = block_sum(c, s.warps, sum);
    if (c.thread() == 0) partial[c.block()] = above == across ? sum : 2.0 * sum;
  }

 private:
  // A warp reads adjacent columns, and the rows of two at once.
  FASTDP_DEVICE static int row(int thread, int i) { return thread / kAcross * kRows + i; }
  FASTDP_DEVICE static int column(int thread, int j) { return j * kAcross + thread % kAcross; }

  // sums[i][j] = <x_{down + row(i)}, x_{right + column(j)}>; of positions that there are not, 0
  template <class Context>
  FASTDP_DEVICE void gram(Context& c, Shared& s, Rows<T> x, int64_t down, int64_t right, Sums& sums) const {
    const int lane = c.thread() % kTile, from = c.thread() / kTile * kEach;  // of what this thread loads
    FASTDP_UNROLL
    for (int i = 0; i < kRows; ++i) FASTDP_UNROLL
    for (int j = 0; j < kColumns; ++j) sums[i][j] = 0.0;
    Pack<T> of_rows[kPacks], of_columns[kPacks];
    read(x, down + lane, from, of_rows);
    read(x, right + lane, from, of_columns);
    for (int64_t k = 0; k < x.n; k += kDepth) {
      c.sync();  // the panels before have been read
      write(of_rows, s.rows, lane, from);
      write(of_columns, s.columns, lane, from);
      c.sync();
      read(x, down + lane, k + kDepth + from, of_rows);  // arrives while these are multiplied
      read(x, right + lane, k + kDepth + from, of_columns);
      multiply(c.thread(), s, sums);
    }
  }

  FASTDP_DEVICE void read(Rows<T> x, int64_t t, int64_t k, Pack<T> (&to)[kPacks]) const {
    load_packs(x.row(t) + k, t < x.rows ? x.n - k : 0, to);
  }

  FASTDP_DEVICE void write(const Pack<T> (&from)[kPacks], double (&to)[kDepth][kTile], int lane, int k) const {
    FASTDP_UNROLL
    for (int p = 0; p < kPacks; ++p) FASTDP_UNROLL
    for (int j = 0; j < kPer; ++j) to[k + p * kPer + j][lane] = load(from[p].at[j]);
  }

  FASTDP_DEVICE void multiply(int thread, const Shared& s, Sums& sums) const {
    for (int k = 0; k < kDepth; ++k) {
      double of_row[kRows], of_column[kColumns];
      FASTDP_UNROLL
      for (int i = 0; i < kRows; ++i) of_row[i] = s.rows[k][row(thread, i)];
      FASTDP_UNROLL
      for (int j = 0; j < kColumns; ++j) of_column[j] = s.columns[k][column(thread, j)];
      FASTDP_UNROLL
      for (int i = 0; i < kRows; ++i) FASTDP_UNROLL
      for (int j = 0; j < kColumns; ++j) sums[i][j] = fused(of_row[i], of_column[j], sums[i][j]);
    }
  }

  // The squares of a_t and b_t are on the diagonals.
  template <class Context>
  FASTDP_DEVICE void write_squares(Context& c, const Sums& x, const Sums& y, PositionSquares* to, int64_t first) const {
    FASTDP_UNROLL
    for (int i = 0; i < kRows; ++i) FASTDP_UNROLL
    for (int j = 0; j < kColumns; ++j) {
      const int64_t t = first + row(c.thread(), i);
      if (row(c.thread(), i) == column(c.thread(), j) && t < a.positions) to[t] = {x[i][j], y[i][j]};
    }
  }
};

// A record a block: adds up its tiles, sum_t b_t, and its bounds.
template <class T>
struct AddTiles {
  static constexpr const char* kName = "linear_sq_norms of tiles";
  static constexpr int kThreads = 128;  // 40 registers
  struct Shared {
    double warps[kThreads / kWarp];
  };

  Sequences<T> b;
  bool bias;
  const double* partial;  // [b.records, pairs]
  int64_t pairs;
  const PositionSquares* squares;  // [b.records, b.positions], or null
  double* out;
  SequenceBounds* bounds;

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    const int64_t record = c.block();
    double sum = 0.0;
    for (int64_t i = c.thread(); i < pairs; i += kThreads) sum += partial[record * pairs + i];
    sum = block_sum(c, s.warps, sum);
    if (sum < 0.0) sum = 0.0;  // only by rounding; a NaN stays a NaN
    if (bias) sum += block_sum(c, s.warps, square_of_sum(c, b.record(record)));
    if (c.thread() == 0) out[record] += sum;
    if (squares != nullptr) add_bounds(c, s, squares + record * b.positions, bounds[record]);
  }

 private:
  // This thread's columns of |sum_t b_t|^2.
  template <class Context>
  FASTDP_DEVICE double square_of_sum(Context& c, Rows<T> rows) const {
    double square = 0.0;
    for (int64_t j = c.thread(); j < rows.n; j += kThreads) {
      double sum = 0.0;
      for (int64_t t = 0; t < rows.rows; ++t) sum += load(rows.row(t)[j]);
      square = fused(sum, sum, square);
    }
    return square;
  }

  template <class Context>
  FASTDP_DEVICE void add_bounds(Context& c, Shared& s, const PositionSquares* of, SequenceBounds& to) const {
    SequenceBounds own{};
    for (int64_t t = c.thread(); t < b.positions; t += kThreads) {
      const double norm_a = square_root(of[t].a), norm_b = square_root(of[t].b);
      own.products = fused(norm_a, norm_b, own.products);
      own.largest_b = norm_b > own.largest_b ? norm_b : own.largest_b;
      own.inputs += norm_a;
    }
    own = {block_sum(c, s.warps, own.products), block_largest(c, s.warps, own.largest_b),
           block_sum(c, s.warps, own.inputs)};
    if (c.thread() != 0) return;
    to.products += own.products;
    to.largest_b = own.largest_b > to.largest_b ? own.largest_b : to.largest_b;
    to.inputs = fused(square_root(static_cast<double>(b.n)), own.inputs, to.inputs);
  }
};

template <int kTile, class T, class Launcher>
void gram_sq_norms(Launcher& on, Sequences<T> a, Sequences<T> b, bool bias, double* out, SequenceBounds* bounds) {
  GramTile<T, kTile> tile{a, b, nullptr, nullptr};
  tile.partial = on.template scratch<double>(a.records * tile.pairs());
  if (bounds != nullptr) tile.squares = on.template scratch<PositionSquares>(a.records * a.positions);
  on.run(tile, a.records * tile.pairs());
  on.run(AddTiles<T>{b, bias, tile.partial, tile.pairs(), tile.squares, out, bounds}, a.records);
}

// out[B] += squared norms of sum_t b_t a_t^T, and of sum_t b_t if there is a bias; of several positions, what bounds
// their rounding is added to bounds[B], unless null. a [B, T, I], b [B, T, O]
template <class T, class Launcher>
void linear_sq_norms(Launcher& on, Sequences<T> a, Sequences<T> b, bool bias, double* out, SequenceBounds* bounds) {
  if (a.positions == 1) return on.run(ProductSquares<T>{a, b, bias, out}, a.records);
  if (a.positions <= 16) return gram_sq_norms<16>(on, a, b, bias, out, bounds);
  if (a.positions <= 32) return gram_sq_norms<32>(on, a, b, bias, out, bounds);
  gram_sq_norms<64>(on, a, b, bias, out, bounds);
}

}  // namespace fastdp::cuda
