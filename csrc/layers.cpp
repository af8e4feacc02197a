// What the layers' rules need: norms of linear layers, gradients of normalisations and convolutions, cells.
#include <algorithm>
#include <array>
#include <cmath>

#include "ops.h"
#include "parts.h"
#include "threads.h"

namespace fastdp {

namespace {

template <class F>
F* offset(F* memory, int64_t elements) {
  return memory == nullptr ? nullptr : memory + elements;
}

constexpr int64_t kRowsAtOnce = 64;  // whose squares wait on the stack

// Also of a row whose squares vanish: its product with another's norm may not be small.
inline double row_norm(Rows<double> rows, int64_t i) {
  const double sq = kernels().typed(double{}).sum_squares(rows.row(i), rows.n);
  if (!(sq < 1e-280)) return std::sqrt(sq);
  double largest = 0.0, sum = 0.0;
  for (int64_t j = 0; j < rows.n; ++j) largest = std::max(largest, std::abs(rows.row(i)[j]));
  if (largest == 0.0) return 0.0;
  for (int64_t j = 0; j < rows.n; ++j) {
    const double v = load(rows.row(i)[j]) / largest;
    sum += v * v;
  }
  return largest * std::sqrt(sum);
}

// Whether a row is not 0, but its square is, or has few digits.
inline bool vanishes(Rows<double> rows) {
  for (int64_t t = 0; t < rows.rows; ++t) {
    const double norm = row_norm(rows, t);
    if (norm > 0.0 && norm < 1e-140) return true;
  }
  return false;
}

// The square of sum_t |a_t| |b_t|, which is no less than that of the norm.
inline double bound_norms(Rows<double> a, Rows<double> b, SequenceBounds& found) {
  found = {};
  for (int64_t t = 0; t < a.rows; ++t) {
    const double of_a = row_norm(a, t), of_b = row_norm(b, t);
    found.products += of_a * of_b;
    found.largest_b = std::max(found.largest_b, of_b);
    found.inputs += of_a;
  }
  return found.products * found.products;
}

// |sum_t b_t|^2
template <class T>
double sum_sq_norm(Rows<T> b) {
  std::vector<double> sums(b.n);
  for (int64_t t = 0; t < b.rows; ++t)
    for (int64_t j = 0; j < b.n; ++j) sums[j] += load(b.row(t)[j]);
  double sq = 0.0;
  for (const double sum : sums) sq += sum * sum;
  return sq;
}

// Of one position: |b a^T|^2 + |b|^2 = |b|^2 (|a|^2 + 1).
template <class T>
void add_product_sq_norms(Rows<T> a, Rows<T> b, bool bias, double* out) {
  if constexpr (sizeof(T) == sizeof(double)) {
    for (int64_t i = 0; i < a.rows; ++i) {
      const double norm = row_norm(b, i), product = norm * row_norm(a, i);
      out[i] += product * product + (bias ? norm * norm : 0.0);
    }
  } else {  // no square, and no product of two, of numbers from 1e-45 to 3e38 leaves a double's range
    double of_a[kRowsAtOnce], of_b[kRowsAtOnce];
    for (int64_t from = 0; from < a.rows; from += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, a.rows - from);
      kernels().typed(T{}).square_rows({a.row(from), count, a.n, a.stride}, of_a);
      kernels().typed(T{}).square_rows({b.row(from), count, b.n, b.stride}, of_b);
      for (int64_t i = 0; i < count; ++i) out[from + i] += of_a[i] * of_b[i] + (bias ? of_b[i] : 0.0);
    }
  }
}

template <class T>
void add_gram_sq_norm(Rows<T> a, Rows<T> b, bool bias, double& out, SequenceBounds* bounds) {
  thread_local std::vector<double> scratch;  // from call to call: new memory costs more than a short sequence
  scratch.resize(gram_scratch(a.rows, a.n + b.n));
  SequenceBounds found{};
  double sq = kernels().typed(T{}).gram_sq_norm(a, b, scratch.data(), found);
  if constexpr (sizeof(T) == sizeof(double)) {
    if (vanishes(a) || vanishes(b)) sq = bound_norms(a, b, found);
  }
  out += sq + (bias ? sum_sq_norm(b) : 0.0);
  if (bounds == nullptr) return;
  bounds->products += found.products;
  bounds->largest_b = std::max(bounds->largest_b, found.largest_b);
  bounds->inputs += std::sqrt(static_cast<double>(b.n)) * found.inputs;
}

}  // namespace

template <class T>
void linear_sq_norms(const std::vector<LinearRows<T>>& layers, double* out, SequenceBounds* bounds, int threads) {
  const int64_t batch = layers[0].a.records, positions = layers[0].a.positions;
  int64_t work = 1;  // of one record
  for (const auto& [a, b, bias] : layers) work += positions * positions * (a.n + b.n);
  const int64_t group = std::max<int64_t>(1, kPart / work);
  parallel_parts(threads, ceil_div(batch, group), [&](int64_t part) {
    const int64_t from = part * group, count = std::min(group, batch - from);
    for (const auto& [a, b, bias] : layers) {
      if (positions == 1) add_product_sq_norms(a.rows(from, count), b.rows(from, count), bias, out + from);
      for (int64_t i = from; i < from + count && positions > 1; ++i)
        add_gram_sq_norm(a.record(i), b.record(i), bias, out[i], offset(bounds, i));
    }
  });
}

namespace {

// call(a, b, i) for each record i, of which a and b have as many rows; records of kPart elements or more together.
template <class T, class Call>
void for_each_record(Rows<T> a, Rows<T> b, int64_t batch, int threads, Call call) {
  const int64_t rows = batch == 0 ? 0 : a.rows / batch;
  const int64_t group = std::max<int64_t>(1, kPart / std::max<int64_t>(1, rows * a.n));
  parallel_parts(threads, ceil_div(batch, group), [&](int64_t part) {
    const int64_t end = std::min(batch, (part + 1) * group);
    for (int64_t i = part * group; i < end; ++i)
      call(Rows<T>{a.row(i * rows), rows, a.n, a.stride}, Rows<T>{b.row(i * rows), rows, b.n, b.stride}, i);
  });
}

}  // namespace

template <class T>
void layer_norm_gradients(Rows<T> a, Rows<T> b, int64_t batch, double eps, bool centre, typename SumOf<T>::type* weight,
                          typename SumOf<T>::type* bias, int threads) {
  const auto kernel = kernels().typed(T{}).layer_norm_gradients;
  for_each_record(a, b, batch, threads, [&](Rows<T> x, Rows<T> g, int64_t i) {
    kernel(x, g, eps, centre, offset(weight, i * a.n), offset(bias, i * a.n));
  });
}

template <class T>
void group_norm_gradients(Rows<T> a, Rows<T> b, int64_t batch, int64_t groups, double eps,
                          typename SumOf<T>::type* weight, typename SumOf<T>::type* bias, int threads) {
  const auto kernel = kernels().typed(T{}).group_norm_gradients;
  for_each_record(a, b, batch, threads, [&](Rows<T> x, Rows<T> g, int64_t i) {
    kernel(x, g, x.rows / groups, eps, offset(weight, i * x.rows), offset(bias, i * x.rows));
  });
}

namespace {

// Of a cell's rows, n wide: about 5 us each, since exponentials take ten times what kPart is made for.
template <class Call>
void for_each_row(int64_t rows, int64_t n, int threads, Call call) {
  const int64_t group = std::max<int64_t>(1, kPart / 8 / std::max<int64_t>(1, n));
  parallel_parts(threads, ceil_div(rows, group), [&](int64_t part) {
    for (int64_t i = part * group; i < std::min(rows, (part + 1) * group); ++i) call(i);
  });
}

}  // namespace

template <class T>
void lstm_forward(MutableRows<T> gates, MutableRows<T> before, MutableRows<T> c, MutableRows<T> h, int threads) {
  const auto kernel = kernels().cell(T{}).lstm_forward;
  for_each_row(c.rows, c.n, threads, [&](int64_t i) { kernel(gates.row(i), before.row(i), c.row(i), h.row(i), c.n); });
}

template <class T>
void lstm_backward(MutableRows<T> gates, MutableRows<T> before, MutableRows<T> c, MutableRows<T> dh, MutableRows<T> dc,
                   int threads) {
  const auto kernel = kernels().cell(T{}).lstm_backward;
  for_each_row(c.rows, c.n, threads,
               [&](int64_t i) { kernel(gates.row(i), before.row(i), c.row(i), dh.row(i), dc.row(i), c.n); });
}

namespace {

// Offsets in an array of `size` of `count` elements, `step` apart, in each dimension.
std::vector<int64_t> offsets(const std::array<int64_t, 3>& count, const std::array<int64_t, 3>& step,
                             const std::array<int64_t, 3>& size) {
  std::vector<int64_t> out;
  out.reserve(count[0] * count[1] * count[2]);
  for (int64_t z = 0; z < count[0]; ++z)
    for (int64_t y = 0; y < count[1]; ++y)
      for (int64_t x = 0; x < count[2]; ++x)
        out.push_back((z * step[0] * size[1] + y * step[1]) * size[2] + x * step[2]);
  return out;
}

}  // namespace

template <class F>
void convolution_gradients(const ConvolutionShape& s, const F* a, const F* b, F* out, int threads) {
  std::array<int64_t, 3> padded;
  Convolution of{};
  of.groups = s.groups, of.channels = s.channels, of.outputs = s.outputs, of.plane = 1;
  // Lanes of few outputs would be empty; but where lanes are groups, inputs must be transposed, too.
  of.by_group = s.outputs < 8 && s.groups > s.outputs;
  int64_t elements = 1;
  for (int i = 0; i < 3; ++i) {
    of.size[i] = s.input[i], of.padding[i] = s.padding[i];
    padded[i] = s.input[i] + 2 * s.padding[i];
    of.plane *= padded[i], elements *= s.input[i];
  }
  const std::vector<int64_t> window = offsets(s.kernel, s.dilation, padded),
                             begin = offsets(s.output, s.stride, padded);
  of.window = window.data(), of.taps = window.size();
  of.begin = begin.data(), of.positions = begin.size();
  // A record's work is cut into units: groups, and weights of each output.
  const int64_t weights = s.channels * of.taps, width = of.by_group ? kConvolutionPanel : 1;
  const int64_t cuts = ceil_div(weights, kConvolutionWeights), units = ceil_div(s.groups, width) * cuts;
  const int64_t at_once = std::min(weights, kConvolutionWeights);
  const int64_t channels = std::min(s.channels, at_once / std::max<int64_t>(1, of.taps) + 2);  // of a unit, at most
  const int64_t work = ceil_div(width * s.outputs, 16) * of.positions * at_once;
  const int64_t group = std::max<int64_t>(1, kPart / std::max<int64_t>(1, work));  // units of a part
  const auto kernel = kernels().convolution(F{});
  constexpr int64_t kLine = 64 / sizeof(F);
  parallel_parts(threads, ceil_div(s.batch * units, group), [&](int64_t part) {
    thread_local std::vector<F> scratch;  // from call to call
    scratch.resize(kConvolutionPanel * (kConvolutionBlock + kConvolutionWeights) +
                   (channels * of.plane + elements) * (of.by_group ? 16 : 1) + kLine);
    F* const aligned = scratch.data() + kLine - reinterpret_cast<uintptr_t>(scratch.data()) / sizeof(F) % kLine;
    const int64_t end = std::min(s.batch * units, (part + 1) * group);
    for (int64_t unit = part * group; unit < end; ++unit) {
      const int64_t i = unit / units, from = unit % cuts * kConvolutionWeights;
      kernel(of, a + i * s.groups * s.channels * elements, b + i * s.groups * s.outputs * of.positions,
             unit % units / cuts * width, from, std::min(weights, from + kConvolutionWeights), aligned,
             out + i * s.groups * s.outputs * weights);
    }
  });
}

#define FASTDP_INSTANTIATE(T)                                                                                         \
  template void linear_sq_norms(const std::vector<LinearRows<T>>&, double*, SequenceBounds*, int);                    \
  template void layer_norm_gradients(Rows<T>, Rows<T>, int64_t, double, bool, SumOf<T>::type*, SumOf<T>::type*, int); \
  template void group_norm_gradients(Rows<T>, Rows<T>, int64_t, int64_t, double, SumOf<T>::type*, SumOf<T>::type*, int);
FASTDP_INSTANTIATE(float)
FASTDP_INSTANTIATE(bf16)
FASTDP_INSTANTIATE(double)
#undef FASTDP_INSTANTIATE

#define FASTDP_INSTANTIATE(F)                                                                                       \
  template void lstm_forward(MutableRows<F>, MutableRows<F>, MutableRows<F>, MutableRows<F>, int);                  \
  template void lstm_backward(MutableRows<F>, MutableRows<F>, MutableRows<F>, MutableRows<F>, MutableRows<F>, int); \
  template void convolution_gradients(const ConvolutionShape&, const F*, const F*, F*, int);
FASTDP_INSTANTIATE(float)
FASTDP_INSTANTIATE(double)

}  // namespace fastdp
