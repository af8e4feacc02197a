#include "ops.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "parts.h"
#include "threads.h"

namespace fastdp {

template <class T>
void sq_norms(Rows<T> g, double* out, int threads) {
  const auto& k = kernels().typed(T{});
  if (g.n <= kPart) {  // several rows a part
    const int64_t group = std::max<int64_t>(1, kPart / std::max<int64_t>(1, g.n));
    parallel_parts(threads, ceil_div(g.rows, group), [&](int64_t part) {
      const int64_t end = std::min(g.rows, (part + 1) * group);
      k.square_rows({g.row(part * group), end - part * group, g.n, g.stride}, out + part * group);
    });
    return;
  }
  const int64_t pieces = ceil_div(g.n, kPart);
  std::vector<double> partial(pieces * g.rows);
  parallel_parts(threads, ceil_div(g.rows, kRows) * pieces, [&](int64_t part) {
    const int64_t piece = part % pieces, at = part / pieces * kRows;
    const Rows<T> rows{g.row(at), std::min(kRows, g.rows - at), g.n, g.stride};
    k.square_rows(columns(rows, piece * kPart, kPart), &partial[piece * g.rows + at]);
  });
  for (int64_t i = 0; i < g.rows; ++i) out[i] = sum_pieces(&partial[i], pieces, g.rows);
}

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
  out += kernels().typed(T{}).gram_sq_norm(a, b, scratch.data(), found) + (bias ? sum_sq_norm(b) : 0.0);
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

template <class T>
int64_t clip_factors(const double* sq_norms, int64_t batch, double scale, double max_norm, double* factors,
                     std::optional<double> gamma) {
  // The factor and its product with an element are rounded once each, a matrix product rounds once more: 4 epsilon
  // covers them and the error of the sum of squares.
  using F = typename SumOf<T>::type;
  const double epsilon = std::numeric_limits<F>::epsilon();
  int64_t zeros = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const double norm = scale * std::sqrt(sq_norms[i]);
    if (!std::isfinite(norm))
      factors[i] = 0.0;
    else if (!gamma && norm * (1.0 + 4.0 * epsilon) <= max_norm)
      factors[i] = scale;
    else
      factors[i] = scale * (max_norm / (norm + gamma.value_or(0.0)) * (1.0 - 4.0 * epsilon));
    zeros += factors[i] == 0.0;
  }
  return zeros;
}

template <class T>
void scale_rows(Sequences<T> x, const double* factors, T* out, typename SumOf<T>::type* sums, int threads) {
  const auto scale = kernels().typed(T{}).scale_rows;
  if (sums != nullptr) return scale(x.rows(0, x.records), factors, out, sums);
  const int64_t group = std::max<int64_t>(1, kPart / std::max<int64_t>(1, x.positions * x.n));
  parallel_parts(threads, ceil_div(x.records, group), [&](int64_t part) {
    const int64_t from = part * group, count = std::min(group, x.records - from);
    if (x.positions == 1) return scale(x.rows(from, count), factors + from, out + from * x.n, nullptr);
    for (int64_t i = from; i < from + count; ++i)
      scale(x.record(i), factors + i * x.positions, out + i * x.positions * x.n, nullptr);
  });
}

namespace {

constexpr int64_t kNoisePart = 64 * kChunk;  // about 30 us of ChaCha20

// Parts of n elements whose noise starts at index `first`. They end where chunks of noise end: none is made twice.
int64_t noise_parts(int64_t n, uint64_t first) {
  return n == 0 ? 0 : ceil_div(static_cast<int64_t>(first % kChunk) + n, kNoisePart);
}

struct Range {
  int64_t begin, count;
};

Range noise_part(int64_t n, uint64_t first, int64_t part) {
  const int64_t offset = first % kChunk;
  const int64_t begin = std::max<int64_t>(0, part * kNoisePart - offset);
  return {begin, std::min(n, (part + 1) * kNoisePart - offset) - begin};
}

}  // namespace

template <class T>
void gaussian_noise(T* x, int64_t n, const Stream& stream, uint64_t first, double std, int threads) {
  if (std == 0.0) return;
  parallel_parts(threads, noise_parts(n, first), [&](int64_t part) {
    const Range r = noise_part(n, first, part);
    kernels().typed(T{}).add_noise(x + r.begin, r.count, stream, first + r.begin, std);
  });
}

template <class T>
void secure_noise(T* x, int64_t n, const Stream& stream, uint64_t first, double std, int threads) {
  if (std == 0.0) return;
  // Fine against the noise: rounding adds 2^-20 / 12 = 8e-8 of its variance. Coarse against the steps of four float32
  // normals, at most 2^-21 of std each, and of float32 sums: 2^24 grids, which float32 holds exactly, are 2^13 std or
  // more either way. Beyond, it rounds once more, to multiples of 2, 4, ... grids: post-processing too.
  const double grid = std::ldexp(1.0, std::ilogb(std) - 10);
  parallel_parts(threads, noise_parts(n, first), [&](int64_t part) {
    const Range r = noise_part(n, first, part);
    kernels().typed(T{}).add_secure_noise(x + r.begin, r.count, stream, first + r.begin, std, grid);
  });
}

template <class T, class Step>
void noise_step(const std::vector<StepParameter>& parameters, const T* flat, const Stream& stream, const Step& h,
                int threads) {
  const auto kernel = kernels().step(T{}).of(h);
  // All parameters in one parallel region: waking the team for each bias would cost more than its step.
  std::vector<int64_t> ends;  // of each parameter's parts
  int64_t parts = 0;
  for (const StepParameter& q : parameters) ends.push_back(parts += noise_parts(q.n, q.offset));
  parallel_parts(threads, parts, [&](int64_t part) {
    const size_t which = std::upper_bound(ends.begin(), ends.end(), part) - ends.begin();
    const StepParameter& q = parameters[which];
    const Range r = noise_part(q.n, q.offset, part - (which == 0 ? 0 : ends[which - 1]));
    const auto at = [&](uintptr_t memory) { return memory == 0 ? nullptr : reinterpret_cast<T*>(memory) + r.begin; };
    const uint64_t first = q.offset + r.begin;
    kernel({at(q.p), flat + first, {at(q.state[0]), at(q.state[1])}, r.count, first}, stream, h);
  });
}

namespace {

constexpr int64_t kGatherAhead = 8192, kGatherPart = 1 << 18;  // bytes

}  // namespace

bool gather(const Stack& stack, const int64_t* ids, int64_t n, char* out, int threads) {
  const std::vector<int64_t>& starts = stack.starts;
  const int64_t bytes = stack.row_bytes;
  std::vector<const char*> rows(n);
  size_t part = 0;  // of the last id: the next one's, too, mostly
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = ids[i];
    if (id < 0 || id >= starts.back()) return false;
    if (id < starts[part] || id >= starts[part + 1])
      part = std::upper_bound(starts.begin(), starts.end(), id) - starts.begin() - 1;
    rows[i] = reinterpret_cast<const char*>(stack.parts[part]) + (id - starts[part]) * bytes;
  }
  if (bytes == 0) return true;
  // Rows lie anywhere in memory: those that come next are fetched while one is copied, 1.7 times as fast for 2 KB.
  const int64_t ahead = std::clamp<int64_t>(kGatherAhead / bytes, 1, 16);
  const int64_t at_once = std::max<int64_t>(1, kGatherPart / bytes);
  parallel_parts(threads, ceil_div(n, at_once), [&](int64_t number) {
    const int64_t begin = number * at_once, end = std::min(n, begin + at_once);
    const auto fetch = [&](int64_t i) {
      for (int64_t byte = 0; i < end && byte < bytes; byte += 64) __builtin_prefetch(rows[i] + byte);
    };
    for (int64_t i = begin; i < begin + ahead; ++i) fetch(i);
    for (int64_t i = begin; i < end; ++i) {
      fetch(i + ahead);
      std::memcpy(out + i * bytes, rows[i], bytes);
    }
  });
  return true;
}

uint64_t read_memory(const uint64_t* words, int64_t n, int threads) {
  constexpr int64_t kStream = 1 << 15;  // 256 KiB; four of them are read side by side, as by the kernels
  std::atomic<uint64_t> all{0};
  parallel_parts(threads, n / (4 * kStream), [&](int64_t part) {
    const uint64_t* from = words + part * 4 * kStream;
    uint64_t bits[8] = {};
    for (int64_t i = 0; i < kStream; i += 32)
      for (int stream = 0; stream < 4; ++stream)
        for (int j = 0; j < 32; j += 8)
          for (int k = 0; k < 8; ++k) bits[k] |= from[stream * kStream + i + j + k];
    for (uint64_t b : bits) all.fetch_or(b, std::memory_order_relaxed);
  });
  return all.load();
}

std::vector<int64_t> poisson_sample(int64_t n, double rate, const Stream& stream) {
  std::vector<int64_t> ids;
  if (rate <= 0.0) return ids;
  // Six standard deviations above the mean: a second allocation is rarer than 1e-9.
  const double mean = static_cast<double>(n) * rate;
  ids.reserve(static_cast<size_t>(std::min(static_cast<double>(n), mean + 6.0 * std::sqrt(mean) + 16.0)));
  int64_t taken[kSampleBlock];
  for (int64_t block = 0; block * kSampleBlock < n; ++block) {
    const int64_t size = std::min(kSampleBlock, n - block * kSampleBlock);
    const int64_t count = kernels().sample_block(stream, block, size, rate, taken);
    ids.insert(ids.end(), taken, taken + count);
  }
  return ids;
}

#define FASTDP_INSTANTIATE(T)                                                                                         \
  template void sq_norms(Rows<T>, double*, int);                                                                      \
  template void linear_sq_norms(const std::vector<LinearRows<T>>&, double*, SequenceBounds*, int);                    \
  template int64_t clip_factors<T>(const double*, int64_t, double, double, double*, std::optional<double>);           \
  template void scale_rows(Sequences<T>, const double*, T*, SumOf<T>::type*, int);                                    \
  template void layer_norm_gradients(Rows<T>, Rows<T>, int64_t, double, bool, SumOf<T>::type*, SumOf<T>::type*, int); \
  template void group_norm_gradients(Rows<T>, Rows<T>, int64_t, int64_t, double, SumOf<T>::type*, SumOf<T>::type*,    \
                                     int);                                                                            \
  template void gaussian_noise(T*, int64_t, const Stream&, uint64_t, double, int);                                    \
  template void secure_noise(T*, int64_t, const Stream&, uint64_t, double, int);
FASTDP_INSTANTIATE(float)
FASTDP_INSTANTIATE(bf16)
FASTDP_INSTANTIATE(double)
template void convolution_gradients(const ConvolutionShape&, const float*, const float*, float*, int);
template void convolution_gradients(const ConvolutionShape&, const double*, const double*, double*, int);
template void noise_step(const std::vector<StepParameter>&, const float*, const Stream&, const SgdStep&, int);
template void noise_step(const std::vector<StepParameter>&, const double*, const Stream&, const SgdStep&, int);
template void noise_step(const std::vector<StepParameter>&, const float*, const Stream&, const AdamStep&, int);
template void noise_step(const std::vector<StepParameter>&, const double*, const Stream&, const AdamStep&, int);

#define FASTDP_INSTANTIATE_CELL(T)                                                                 \
  template void lstm_forward(MutableRows<T>, MutableRows<T>, MutableRows<T>, MutableRows<T>, int); \
  template void lstm_backward(MutableRows<T>, MutableRows<T>, MutableRows<T>, MutableRows<T>, MutableRows<T>, int);
FASTDP_INSTANTIATE_CELL(float)
FASTDP_INSTANTIATE_CELL(double)

}  // namespace fastdp
