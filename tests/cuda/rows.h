// Norms, clip factors and clipped sums of rows, against the paper's sum of g_i min(1, C / |g_i|) in plain float64.
#pragma once

#include <algorithm>
#include <map>

#include "../../csrc/cuda/clip_sum.h"
#include "../../csrc/ops.h"
#include "cases.h"

namespace fastdp::cuda::test {

template <class T>
double value(T x) {
  return double{load(x)};
}

// Rows whose last element is the last of their array, and whose first is `offset` elements into it.
template <class T>
struct Matrix {
  std::shared_ptr<T[]> memory;
  Rows<T> g;
  std::size_t size;

  template <class Machine>
  Matrix(Machine& m, int64_t rows, int64_t n, int64_t stride, int64_t offset)
      : size(offset + (rows == 0 ? 0 : (rows - 1) * stride + n)) {
    memory = m.template array<T>(size);
    fill(memory.get(), size, static_cast<unsigned>(rows * 7 + n));
    g = {memory.get() + offset, rows, n, stride};
  }
  T* row(int64_t i) { return memory.get() + (g.row(i) - memory.get()); }
  void set(int64_t i, float x) {
    for (int64_t j = 0; j < g.n; ++j) store(row(i)[j], static_cast<typename SumOf<T>::type>(x));
  }
};

// How rows lie: packed; aligned to 16 though their length may not be; odd.
struct Layout {
  int64_t offset, stride;
};
inline std::vector<Layout> layouts(int64_t n) { return {{0, n}, {0, (n + 7) / 8 * 8}, {1, n + 1 + n % 2}}; }

template <class T>
double sq_norm(const T* x, int64_t n) {
  long double sum = 0.0;  // a double's, of 8,195 terms, would be off by more than the sums of doubles below
  for (int64_t j = 0; j < n; ++j) sum += static_cast<long double>(value(x[j])) * value(x[j]);
  return static_cast<double>(sum);
}

template <class T, class Machine>
void norms_are_right(Machine& m, int64_t rows, int64_t n) {
  for (const auto [offset, stride] : layouts(n)) {
    Matrix<T> x(m, rows, n, stride, offset);
    auto out = m.template array<double>(rows), again = m.template array<double>(rows);
    auto on = m.launcher(), other = m.launcher();
    sq_norms(on, x.g, out.get());
    sq_norms(other, x.g, again.get());
    m.finish();
    const std::string what = text("sq_norms", sizeof(T), rows, n, stride, offset);
    for (int64_t i = 0; i < rows; ++i) {
      const double right = sq_norm(x.g.row(i), n);
      require(std::abs(out[i] - right) <= 1e-13 * right, what);
    }
    require(same_bits(out.get(), again.get(), rows), what + ": other bits");
  }
}

template <class T, class Machine>
void factors_have_the_cpus_bits(Machine& m) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  std::vector<double> sq{0.0, 1.0, 1.0 + 1e-6, 1.0 - 1e-7, 1.0 - 1e-15, 25.0, 1e-90, 9e76, 1e300, inf, std::nan("")};
  for (int i = 0; i < 300; ++i) sq.push_back(std::exp(0.1 * i - 15.0));
  const auto n = static_cast<int64_t>(sq.size());
  auto in = m.template array<double>(n), out = m.template array<double>(n);
  std::copy(sq.begin(), sq.end(), in.get());
  for (const double scale : {1.0, 64.0, 1e170})
    for (const double max_norm : {0.0, 1e-40, 1.0, 5.0, inf})
      for (const double gamma : {-1.0, 0.0, 0.01}) {
        auto on = m.launcher();
        clip_factors<T>(on, in.get(), n, scale, max_norm, gamma, out.get());
        m.finish();
        std::vector<double> right(n);
        fastdp::clip_factors<std::conditional_t<std::is_same_v<T, f16>, bf16, T>>(
            sq.data(), n, scale, max_norm, right.data(), gamma < 0.0 ? std::nullopt : std::optional(gamma));
        for (int64_t i = 0; i < n; ++i)
          require(same_bits(&out[i], &right[i], 1) || (std::isnan(out[i]) && std::isnan(right[i])),
                  text("clip_factors", sizeof(T), scale, max_norm, gamma, i));
      }
}

// out = sum of factors_i g_i as it is in float64, within the roundings of sums and of products too small for a float.
template <class T>
void is_sum_of(const typename SumOf<T>::type* out, const typename SumOf<T>::type* before, Rows<T> g,
               const std::vector<double>& factors, const std::string& what) {
  using F = typename SumOf<T>::type;
  const double epsilon = std::numeric_limits<F>::epsilon(), least = std::numeric_limits<F>::min();
  for (int64_t j = 0; j < g.n; ++j) {
    double right = before == nullptr ? 0.0 : before[j], size = std::abs(right);
    for (int64_t i = 0; i < g.rows; ++i) {
      if (factors[i] == 0.0) continue;
      right += factors[i] * value(g.row(i)[j]);
      size += std::abs(factors[i] * value(g.row(i)[j]));
    }
    const double limit = size * epsilon * (16.0 + static_cast<double>(g.rows)) + least * static_cast<double>(g.rows);
    require(std::abs(out[j] - right) <= limit, what + text(": column", j) + text(":", double{out[j]}, right));
  }
}

template <class T, class Machine>
void sums_are_right(Machine& m, int64_t rows, int64_t n) {
  using F = typename SumOf<T>::type;
  for (const auto [offset, stride] : layouts(n))
    for (const bool add : {false, true}) {
      Matrix<T> x(m, rows, n, stride, offset);
      std::vector<double> factors(rows);
      for (int64_t i = 0; i < rows; ++i) factors[i] = std::vector{1.0, 0.25, 0.0, 1e-39, 3.0, 1e-310}[i % 6];
      Rows<T> g = x.g;
      if (rows > 2) x.set(2, std::nanf(""));
      if (rows > 0 && factors[rows - 1] != 0.0) ++g.rows, factors.push_back(0.0);  // a row beyond the array: not read
      auto given = m.template array<double>(g.rows);
      std::copy(factors.begin(), factors.end(), given.get());
      auto out = m.template array<F>(n), again = m.template array<F>(n), before = m.template array<F>(n);
      fill(before.get(), n, 5);
      for (auto* to : {out.get(), again.get()}) std::copy(before.get(), before.get() + n, to);
      auto on = m.launcher(), other = m.launcher();
      sum_rows(on, g, given.get(), out.get(), add);
      sum_rows(other, g, given.get(), again.get(), add);
      m.finish();
      const std::string what = text("sum_rows", sizeof(T), rows, n, stride, offset, add);
      is_sum_of(out.get(), add ? before.get() : nullptr, g, factors, what);
      require(same_bits(out.get(), again.get(), n), what + ": other bits");
    }
}

enum class Way { chosen, staged, twice };

template <class Launcher>
void limit_memory(Launcher& on, std::size_t bytes) {
  if constexpr (requires { on.set_most_dynamic_bytes(bytes); }) on.set_most_dynamic_bytes(bytes);
}

template <class T, class Launcher>
void clip_sum_by(Way way, Launcher& on, Rows<T> g, double max_norm, typename SumOf<T>::type* out) {
  if (way == Way::twice) return clip_sum_twice(on, g, max_norm, out);
  if (way == Way::chosen) return clip_sum(on, g, max_norm, out);
  const Staging s = staging_of(on, g);
  require(s.group > 0, "clip_sum: rows that were to be staged do not fit");
  clip_sum_staged(on, g, max_norm, s, out);
}

// A row that is not finite adds nothing.
template <class T>
std::vector<double> factors_of(Rows<T> g, double max_norm) {
  std::vector<double> out(g.rows);
  for (int64_t i = 0; i < g.rows; ++i) {
    const double norm = std::sqrt(sq_norm(g.row(i), g.n));
    out[i] = !std::isfinite(norm) ? 0.0 : norm <= max_norm ? 1.0 : max_norm / norm;
  }
  return out;
}

template <class T, class Machine>
void clip_sum_is_right(Machine& m, Way way, Matrix<T>& x, double max_norm, std::size_t memory = 96 * 1024) {
  using F = typename SumOf<T>::type;
  auto out = m.template array<F>(x.g.n);
  fill(out.get(), x.g.n, 5);
  auto on = m.launcher();
  limit_memory(on, memory);
  clip_sum_by(way, on, x.g, max_norm, out.get());
  m.finish();
  is_sum_of<T>(
      out.get(), nullptr, x.g, factors_of(x.g, max_norm),
      text("clip_sum", static_cast<int>(way), sizeof(T), x.g.rows, x.g.n, x.g.stride, memory, on.processors()));
}

template <class T, class Machine>
void clip_sum_is_right(Machine& m, Way way, int64_t rows, int64_t n, std::size_t memory = 96 * 1024) {
  for (const auto [offset, stride] : layouts(n)) {
    Matrix<T> x(m, rows, n, stride, offset);
    clip_sum_is_right(m, way, x, std::sqrt(static_cast<double>(n)), memory);  // half of the rows are clipped
  }
}

// Each of them alone, at the row's first and last columns and between, among rows that are harmless.
template <class T, class Machine>
void hostile_rows_add_nothing(Machine& m, Way way, int64_t n, Layout layout) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  constexpr double most = std::is_same_v<T, f16> ? 65504.0 : 3e38;
  for (const double max_norm : {0.0, 1e-42, 1e-30, 5.0, 1e30}) {
    Matrix<T> x(m, 10, n, layout.stride, layout.offset);
    store(x.row(0)[n - 1], std::nanf(""));
    store(x.row(2)[0], inf);
    store(x.row(3)[n / 2], -inf);
    x.set(4, static_cast<float>(most));
    x.set(5, 1e-45f);
    x.set(6, 0.0f);
    x.set(7, 0.0f);
    store(x.row(7)[0], 3.0f);
    store(x.row(7)[n - 1], 4.0f);  // its norm is 5
    store(x.row(9)[n - 1], static_cast<float>(most));
    clip_sum_is_right(m, way, x, max_norm);
    if (max_norm == 0.0) {
      auto out = m.template array<typename SumOf<T>::type>(n);
      fill(out.get(), n, 5);
      auto on = m.launcher();
      clip_sum_by(way, on, x.g, max_norm, out.get());
      m.finish();
      for (int64_t j = 0; j < n; ++j) require(out[j] == 0, text("clip_sum at max_norm 0", static_cast<int>(way), n));
    }
  }
}

// |contribution| <= max_norm, exactly, of one row.
template <class T, class Machine>
void contributions_keep_the_norm(Machine& m, Way way, int64_t n) {
  constexpr double most = std::is_same_v<T, f16> ? 1e4 : 1e37;
  for (const double size : {1.0, most})
    for (const double max_norm : {0.3, 1e-20, 1e-42}) {
      Matrix<T> x(m, 1, n, n, 0);
      fill(x.row(0), n, static_cast<unsigned>(n), static_cast<float>(size));
      auto out = m.template array<typename SumOf<T>::type>(n);
      auto on = m.launcher();
      clip_sum_by(way, on, x.g, max_norm, out.get());
      m.finish();
      long double sum = 0.0;
      for (int64_t j = 0; j < n; ++j) sum += static_cast<long double>(out[j]) * out[j];
      const long double norm = std::sqrt(sum);
      require(norm <= max_norm, text("contribution", static_cast<int>(way), sizeof(T), n) + ": norm above max_norm");
      const bool clipped = sq_norm(x.g.row(0), n) > max_norm * max_norm;
      require(!clipped || max_norm < 1e-35 || norm >= 0.999999 * max_norm, text("contribution too small", n));
    }
}

// Launchers start threads in other orders, and some have other processors: that makes another sum of staged rows only.
template <class T, class Machine>
void bits_are_the_same(Machine& m, Way way, int64_t rows, int64_t n) {
  Matrix<T> x(m, rows, n, n, 0);
  std::map<int, std::shared_ptr<typename SumOf<T>::type[]>> seen;
  for (int tries = 0; tries < (way == Way::staged ? 10 : 3); ++tries) {
    auto out = m.template array<typename SumOf<T>::type>(n);
    auto on = m.launcher();
    clip_sum_by(way, on, x.g, 1.0, out.get());
    m.finish();
    const auto [first, fresh] = seen.emplace(way == Way::staged ? on.processors() : 0, out);
    require(same_bits(first->second.get(), out.get(), n), text("clip_sum: other bits", static_cast<int>(way), rows, n));
  }
}

// Rows and columns.
using Shapes = std::vector<std::pair<int64_t, int64_t>>;

template <class T, class Machine>
void test_clip_sum(Machine& m) {
  using F = typename SumOf<T>::type;
  const Shapes shapes{{5, 0},    {0, 5},   {1, 1},    {2, 7},     {37, 64},  {100, 3},
                      {33, 255}, {9, 257}, {5, 1000}, {17, 1025}, {3, 2051}, {5, 6144}};
  for (const auto& [rows, n] : shapes) clip_sum_is_right<T>(m, Way::chosen, rows, n);
  clip_sum_is_right<T>(m, Way::chosen, 6, 6145);        // staged
  clip_sum_is_right<T>(m, Way::chosen, 6, 6145, 100);   // read twice, as there is no memory,
  clip_sum_is_right<T>(m, Way::chosen, 6, 6145, 6000);  // or not enough of it
  clip_sum_is_right<T>(m, Way::twice, 5, 1000);
  clip_sum_is_right<T>(m, Way::staged, 1, 70);
  clip_sum_is_right<T>(m, Way::staged, 25, 2050);
  clip_sum_is_right<T>(m, Way::staged, 19, 2050, 2048 * (sizeof(F) + 4 * sizeof(T)) + 1024);  // in groups of 2
  for (const Way way : {Way::chosen, Way::staged, Way::twice}) {
    hostile_rows_add_nothing<T>(m, way, 70, {0, 72});
    hostile_rows_add_nothing<T>(m, way, 69, {1, 69});
    for (const int64_t n : {1, 40, 2050}) contributions_keep_the_norm<T>(m, way, n);
    bits_are_the_same<T>(m, way, 10, 2050);
  }
  hostile_rows_add_nothing<T>(m, Way::chosen, 1030, {0, 1032});
  contributions_keep_the_norm<T>(m, Way::chosen, 1030);
  bits_are_the_same<T>(m, Way::chosen, 50, 300);
}

template <class Machine>
void test_rows(Machine& m) {
  const auto all = [&]<class T>(T) {
    const Shapes norms{{0, 3}, {5, 0}, {70, 1}, {300, 2}, {5, 3}, {70, 17}, {9, 64}, {5, 129}, {3, 1000}, {2, 3001}};
    for (const auto& [rows, n] : norms) norms_are_right<T>(m, rows, n);
    norms_are_right<T>(m, 3, SquareNorms<T>::kPiece + 5);
    norms_are_right<T>(m, 1, 2 * SquareNorms<T>::kPiece);
    factors_have_the_cpus_bits<T>(m);
    const Shapes sums{{0, 3}, {5, 0}, {1, 1}, {70, 7}, {3, 64}, {40, 300}, {7, 2049}};
    for (const auto& [rows, n] : sums) sums_are_right<T>(m, rows, n);
    test_clip_sum<T>(m);
  };
  all(0.0f);
  all(bf16{});
  all(f16{});
  all(0.0);
}

// What ThreadSanitizer, with an OS thread for each of a GPU's, gets through in seconds.
template <class Machine>
void test_rows_in_threads(Machine& m) {
  const auto clip = [&]<class T>(T, Way way, int64_t rows, int64_t n, Layout layout) {
    Matrix<T> x(m, rows, n, layout.stride, layout.offset);
    clip_sum_is_right<T>(m, way, x, 1.0, 60'000);
  };
  clip(0.0f, Way::chosen, 9, 7, {0, 8});
  clip(bf16{}, Way::chosen, 3, 1030, {1, 1031});
  clip(0.0f, Way::staged, 4, 4100, {0, 4100});  // two members if there are two processors, two groups
  clip(0.0f, Way::staged, 4, 4100, {1, 4101});
  clip(0.0f, Way::twice, 33, 5, {0, 5});
  clip(bf16{}, Way::twice, 1, 2100, {0, 2100});
}

}  // namespace fastdp::cuda::test
