// Inputs and output gradients of layers, as they may lie in memory.
#pragma once

#include <vector>

#include "cases.h"

namespace fastdp::cuda::test {

// In elements: before the first row, between rows, between records; or records next to each other, as attention has
// them.
struct Gaps {
  int64_t before, rows, records;
  bool positions_first = false;
};
inline std::vector<Gaps> gaps(int64_t n) { return {{0, 0, 0}, {0, (8 - n % 8) % 8, 16}, {1, 3, 5}, {8, 1, 0, true}}; }

// Numbers no two places have in common; the last element is the last of its array, and what lies between rows is NaN.
template <class T>
struct Filled {
  std::shared_ptr<T[]> memory;
  Sequences<T> x;

  template <class Machine>
  Filled(Machine& m, int64_t records, int64_t positions, int64_t n, const Gaps& gaps, unsigned seed) {
    const int64_t row = n + gaps.rows;
    if (gaps.positions_first)
      x = {nullptr, records, positions, n, row, row * records};
    else
      x = {nullptr, records, positions, n, row * positions + gaps.records, row};
    const bool empty = records * positions * n == 0;
    const int64_t last = gaps.before + (records - 1) * x.records_apart + (positions - 1) * x.apart;
    memory = m.template array<T>(empty ? 0 : last + n);
    for (int64_t i = 0; !empty && i < last + n; ++i) store(memory[i], std::nanf(""));
    x.data = memory.get() + (empty ? 0 : gaps.before);
    for (int64_t i = 0; i < records; ++i)
      for (int64_t t = 0; t < positions; ++t) fill(at(i, t), n, seed + static_cast<unsigned>(i * positions + t));
  }

  T* at(int64_t record, int64_t t, int64_t j = 0) {
    return memory.get() + (x.data - memory.get()) + record * x.records_apart + t * x.apart + j;
  }
  void set(int64_t record, int64_t t, float value) {
    for (int64_t j = 0; j < x.n; ++j) store(*at(record, t, j), value);
  }
};

// In long double: a double's roundings would be as many as those that are tested.
template <class T>
long double length(const T* x, int64_t n) {
  long double sq = 0.0;
  for (int64_t j = 0; j < n; ++j) sq += static_cast<long double>(load(x[j])) * load(x[j]);
  return std::sqrt(sq);
}

// |sum over `positions` of b_t a_t^T|^2, formed; without an `a`, of b_t.
template <class T>
long double formed_sq_norm(const Rows<T>* a, Rows<T> b, const std::vector<int64_t>& positions) {
  const int64_t inputs = a == nullptr ? 1 : a->n;
  std::vector<long double> g(b.n * inputs);
  for (const int64_t t : positions)
    for (int64_t o = 0; o < b.n; ++o)
      for (int64_t i = 0; i < inputs; ++i)
        g[o * inputs + i] += double{load(b.row(t)[o])} * (a == nullptr ? 1.0 : double{load(a->row(t)[i])});
  long double sq = 0.0;
  for (const long double x : g) sq += x * x;
  return sq;
}

inline std::vector<int64_t> range(int64_t n) {
  std::vector<int64_t> out(n);
  for (int64_t i = 0; i < n; ++i) out[i] = i;
  return out;
}

}  // namespace fastdp::cuda::test
