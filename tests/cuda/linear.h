// Norms of a linear layer's per-sample gradients, against gradients that are formed.
#pragma once

#include <algorithm>
#include <array>

#include "../../csrc/cuda/linear.h"
#include "sequences.h"

namespace fastdp::cuda::test {

struct Shape {
  int64_t records, positions, inputs, outputs;
};

template <class T>
struct Linear {
  Filled<T> a, b;
  std::string what;

  template <class Machine>
  Linear(Machine& m, const Shape& s, int lie = 0)
      : a(m, s.records, s.positions, s.inputs, gaps(s.inputs)[lie % 4], 1),
        b(m, s.records, s.positions, s.outputs, gaps(s.outputs)[lie / 4 % 4], 100'000),
        what(text("linear_sq_norms", sizeof(T), s.records, s.positions, s.inputs, s.outputs, lie)) {}
};

constexpr SequenceBounds kBefore{0.5, 0.25, 0.125};  // what bounds hold, and 2 what norms do

struct Squares {
  std::vector<double> norms;
  std::vector<SequenceBounds> bounds;
};

template <class T, class Machine>
Squares squares_of(Machine& m, Linear<T>& of, bool bias, bool with_bounds, double before = 0.0) {
  const int64_t records = of.a.x.records;
  auto out = m.template array<double>(records);
  auto bounds = m.template array<SequenceBounds>(records);
  std::fill(out.get(), out.get() + records, before);
  std::fill(bounds.get(), bounds.get() + records, kBefore);
  auto on = m.launcher();
  linear_sq_norms(on, of.a.x, of.b.x, bias, out.get(), with_bounds ? bounds.get() : nullptr);
  m.finish();
  return {{out.get(), out.get() + records}, {bounds.get(), bounds.get() + records}};
}

inline bool near(double x, long double right, long double limit) { return std::abs(x - right) <= limit; }

// Of finite numbers: within the roundings that Norms._gram_roundings of fastdp/gradients.py leaves room for.
template <class T>
void are_right(Linear<T>& of, const Squares& found, bool bias, double before = 0.0) {
  const int64_t positions = of.a.x.positions, inputs = of.a.x.n, outputs = of.b.x.n;
  const double roundings = inputs + outputs + positions * positions / 16.0 + 32.0;
  for (int64_t i = 0; i < of.a.x.records; ++i) {
    const Rows<T> a = of.a.x.record(i), b = of.b.x.record(i);
    long double right = before + formed_sq_norm(&a, b, range(positions)), products = 0.0, sum_b = 0.0;
    for (int64_t t = 0; t < positions; ++t) {
      products += length(a.row(t), inputs) * length(b.row(t), outputs);
      sum_b += length(b.row(t), outputs);
    }
    if (bias) right += formed_sq_norm<T>(nullptr, b, range(positions));
    const long double slack = products * products + (bias ? sum_b * sum_b : 0.0L) + before;
    require(near(found.norms[i], right, 0x1p-53L * roundings * slack) && found.norms[i] >= before,
            of.what + text(": record, bias, norm, right", i, bias, found.norms[i], right));
  }
}

template <class T>
void bounds_are_right(Linear<T>& of, const Squares& found, bool given) {
  const bool changed = given && of.a.x.positions != 1;
  for (int64_t i = 0; i < of.a.x.records; ++i) {
    long double products = 0.0, largest_b = 0.0, inputs = 0.0;
    for (int64_t t = 0; changed && t < of.a.x.positions; ++t) {
      const long double of_a = length(of.a.at(i, t), of.a.x.n), of_b = length(of.b.at(i, t), of.b.x.n);
      products += of_a * of_b;
      largest_b = std::max(largest_b, of_b);
      inputs += of_a;
    }
    products += kBefore.products;
    largest_b = std::max<long double>(largest_b, kBefore.largest_b);
    inputs = kBefore.inputs + std::sqrt(static_cast<long double>(of.b.x.n)) * inputs;
    const SequenceBounds& bounds = found.bounds[i];
    require(near(bounds.products, products, 1e-13L * products) && near(bounds.inputs, inputs, 1e-13L * inputs) &&
                near(bounds.largest_b, largest_b, 1e-13L * largest_b),
            of.what + text(": bounds of record", i));
  }
}

template <class T, class Machine>
void linear_is_right(Machine& m, const Shape& shape, int lie, bool bias, bool with_bounds) {
  Linear<T> of(m, shape, lie);
  const Squares found = squares_of(m, of, bias, with_bounds);
  are_right(of, found, bias);
  bounds_are_right(of, found, with_bounds);
}

// Each in a record of its own, between others that stay as they are.
template <class T, class Machine>
void numbers_that_are_not_finite(Machine& m, Shape shape) {
  const double inf = std::numeric_limits<double>::infinity();
  shape.records = 3 * 2 * 3 * 2 + 1;
  Linear<T> of(m, shape, 2);
  const Squares before = squares_of(m, of, true, true);
  std::vector<double> values(shape.records);
  int64_t record = 0;
  for (const double value : {std::nan(""), inf, -inf})
    for (Filled<T>* x : {&of.a, &of.b})
      for (const int64_t t : {int64_t{0}, shape.positions / 2, shape.positions - 1}) {
        values[record] = value;
        store(*x->at(record, t, record % 4 < 2 ? x->x.n - 1 : 0), static_cast<float>(value));
        record += 2;
      }
  const Squares found = squares_of(m, of, true, true);
  for (int64_t i = 0; i < shape.records; ++i)
    require(std::isnan(values[i])   ? std::isnan(found.norms[i])
            : std::isinf(values[i]) ? !std::isfinite(found.norms[i])
                                    : same_bits(&found.norms[i], &before.norms[i], 1),
            of.what + text(": record beside, or of, what is not finite", i));
}

template <class T, class Machine>
void extreme_numbers(Machine& m, Shape shape) {
  constexpr bool kHalf = std::is_same_v<T, f16>;
  constexpr float kLarge = kHalf ? 65504.0f : 3e38f, kSmall = kHalf ? 6e-8f : std::is_same_v<T, bf16> ? 1e-40f : 1e-45f;
  shape.records = 9;
  Linear<T> of(m, shape);
  for (int64_t i = 0; i < shape.records; ++i)
    for (int64_t t = 0; t < shape.positions; ++t) {
      of.a.set(i, t, std::array{0.0f, kSmall, kLarge}[i % 3]);
      of.b.set(i, t, std::array{0.0f, kSmall, -kLarge}[i / 3]);
    }
  for (const bool bias : {false, true}) {
    const Squares found = squares_of(m, of, bias, true);
    are_right(of, found, bias);
    bounds_are_right(of, found, true);
  }
}

// The sum over positions is 0, each of its terms is not.
template <class T, class Machine>
void sums_that_cancel(Machine& m, const Shape& shape) {
  Linear<T> of(m, shape);
  const int64_t half = shape.positions / 2;
  for (int64_t i = 0; i < shape.records; ++i)
    for (int64_t t = 0; t < half; ++t) {
      std::copy(of.a.at(i, t), of.a.at(i, t) + shape.inputs, of.a.at(i, t + half));
      for (int64_t o = 0; o < shape.outputs; ++o) store(*of.b.at(i, t + half, o), -load(*of.b.at(i, t, o)));
    }
  const Squares found = squares_of(m, of, true, true);
  are_right(of, found, true);
  for (const double norm : found.norms) require(norm < 1e-9, of.what + text(": should cancel", norm));
}

// A thread has the first position and the last.
template <class T, class Machine>
void the_largest_b_comes_first(Machine& m) {
  Linear<T> of(m, {1, 129, 2, 5});
  of.b.set(0, 0, 100.0f);
  bounds_are_right(of, squares_of(m, of, false, true), true);
}

template <class T, class Machine>
void norms_are_added(Machine& m, const Shape& shape) {
  Linear<T> of(m, shape);
  are_right(of, squares_of(m, of, true, false, 2.0), true, 2.0);
}

template <class T, class Machine>
void bits_are_the_same(Machine& m, const Shape& shape) {
  Linear<T> of(m, shape);
  const Squares found = squares_of(m, of, true, true);
  for (int tries = 0; tries < 5; ++tries) {
    const Squares again = squares_of(m, of, true, true);
    require(same_bits(found.norms.data(), again.norms.data(), shape.records), of.what + ": other bits");
    require(same_bits(found.bounds.data(), again.bounds.data(), shape.records), of.what + ": other bits of bounds");
  }
}

template <class T, class Machine>
void test_linear(Machine& m) {
  constexpr bool kAll = std::is_same_v<T, float>;  // other types differ in how they are loaded only
  int lie = 0;
  const auto next = [&](const Shape& shape) {
    lie += 5;
    linear_is_right<T>(m, shape, lie, lie % 2 == 0, lie / 2 % 2 == 0);
  };
  for (const int64_t n : {0, 1, 2, 7, 8, 130, 1030})
    for (const int64_t records : {1, 2, 3}) next({records, 1, n, n % 9 + n / 3});
  // On both sides of a tile's ends, with elements on both sides of a panel's.
  const std::vector<std::pair<int64_t, int64_t>> sizes{{1, 1}, {2, 5}, {0, 3}, {3, 0}, {16, 17}, {65, 64}, {130, 2}};
  for (const int64_t positions : {0, 2, 3, 15, 16, 17, 32, 33, 64, 65, 130})
    for (int64_t records = 1; records < (kAll ? 5 : 2); ++records) {
      const auto [inputs, outputs] = sizes[lie / 5 % sizes.size()];
      next({positions < 64 ? records : 1, positions, inputs, outputs});
    }
  for (const int64_t positions : {1, 5}) next({0, positions, 3, 4});
  for (const Shape& shape : {Shape{3, 1, 9, 5}, {3, 2, 9, 5}, {3, 20, 3, 8}}) {
    numbers_that_are_not_finite<T>(m, shape);
    extreme_numbers<T>(m, shape);
    norms_are_added<T>(m, shape);
  }
  the_largest_b_comes_first<T>(m);
  for (const int64_t positions : {2, 18, 80}) sums_that_cancel<T>(m, {2, positions, 5, 9});
  for (const Shape& shape : {Shape{2, 1, 1030, 5}, {2, 70, 20, 17}})
    if constexpr (kAll) bits_are_the_same<T>(m, shape);
}

template <class Machine>
void test_linear(Machine& m) {
  test_linear<float>(m);
  test_linear<bf16>(m);
  test_linear<f16>(m);
}

// What ThreadSanitizer, with an OS thread for each of a GPU's, gets through in seconds.
template <class Machine>
void test_linear_in_threads(Machine& m) {
  linear_is_right<float>(m, {2, 1, 130, 7}, 0, true, true);
  linear_is_right<bf16>(m, {2, 5, 70, 7}, 5, true, true);
  linear_is_right<float>(m, {1, 20, 3, 40}, 10, true, true);
  linear_is_right<float>(m, {1, 70, 17, 3}, 15, true, true);
}

}  // namespace fastdp::cuda::test
