#include "ops.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "threads.h"

namespace fastdp {
namespace {

// Elements per part of work: 16384 floats take 3 us, several times what waking the team costs.
constexpr int64_t kPart = 16384;

// Rows that clip_sum norms and then sums before it goes on: they should still be in the last-level cache.
constexpr int64_t kBlockBytes = 8 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

template <class T>
void sq_norms(Rows<T> g, double* out, int threads) {
  const auto& k = kernels().typed(T{});
  if (g.n <= kPart) {  // several rows a part
    const int64_t group = std::max<int64_t>(1, kPart / std::max<int64_t>(1, g.n));
    parallel_parts(threads, ceil_div(g.rows, group), [&](int64_t part) {
      const int64_t end = std::min(g.rows, (part + 1) * group);
      for (int64_t i = part * group; i < end; ++i) out[i] = k.sum_squares(g.row(i), g.n);
    });
    return;
  }
  const int64_t pieces = ceil_div(g.n, kPart);
  std::vector<double> partial(g.rows * pieces);
  parallel_parts(threads, g.rows * pieces, [&](int64_t part) {
    const int64_t from = part % pieces * kPart;
    partial[part] = k.sum_squares(g.row(part / pieces) + from, std::min(kPart, g.n - from));
  });
  for (int64_t i = 0; i < g.rows; ++i) {
    out[i] = 0.0;
    for (int64_t piece = 0; piece < pieces; ++piece) out[i] += partial[i * pieces + piece];
  }
}

template <class T>
void linear_sq_norms(Rows<T> a, Rows<T> b, int64_t positions, bool bias, double* out, int threads) {
  const auto& k = kernels().typed(T{});
  const int64_t batch = positions == 0 ? 0 : a.rows / positions;
  const int64_t work = std::max<int64_t>(1, positions * positions * (a.n + b.n));  // of one record
  const int64_t group = std::max<int64_t>(1, kPart / work);
  parallel_parts(threads, ceil_div(batch, group), [&](int64_t part) {
    std::vector<double> scratch(positions > 1 && bias ? b.n : 0);
    const int64_t end = std::min(batch, (part + 1) * group);
    for (int64_t i = part * group; i < end; ++i) {
      const int64_t t = i * positions;
      if (positions == 1)  // |b a^T|^2 + |b|^2 = |b|^2 (|a|^2 + 1)
        out[i] = k.sum_squares(b.row(t), b.n) * (k.sum_squares(a.row(t), a.n) + (bias ? 1.0 : 0.0));
      else
        out[i] = k.gram_sq_norm({a.row(t), positions, a.n, a.stride}, {b.row(t), positions, b.n, b.stride}, bias,
                                scratch.data());
    }
  });
}

template <class T>
int64_t clip_factors(const double* sq_norms, int64_t batch, double max_norm, double* factors) {
  // The factor and its product with an element are rounded once each, a matrix product rounds once more: 4 epsilon
  // covers them. 1e-9 (1e-15 for double) covers the sum of squares.
  using F = typename SumOf<T>::type;
  const double epsilon = std::numeric_limits<F>::epsilon();
  int64_t dropped = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const double norm = std::sqrt(sq_norms[i]) * (1.0 + 1e-2 * epsilon);
    if (!std::isfinite(norm)) {
      factors[i] = 0.0;
      ++dropped;
    } else {
      factors[i] = norm <= max_norm ? 1.0 : max_norm / norm * (1.0 - 4.0 * epsilon);
    }
  }
  return dropped;
}

template <class T>
void clip_sum(Rows<T> g, double max_norm, typename SumOf<T>::type* out, int threads) {
  std::fill(out, out + g.n, 0);
  const int64_t row_bytes = std::max<int64_t>(1, g.n * sizeof(T));
  const int64_t block = std::clamp<int64_t>(kBlockBytes / row_bytes, 1, std::max<int64_t>(1, g.rows));
  std::vector<double> norms(block), factors(block);
  for (int64_t from = 0; from < g.rows; from += block) {
    const Rows<T> rows{g.row(from), std::min(block, g.rows - from), g.n, g.stride};
    sq_norms(rows, norms.data(), threads);
    clip_factors<T>(norms.data(), rows.rows, max_norm, factors.data());
    // Columns are shared out, not rows, so that each sum is added in the order of the records.
    const int64_t width = std::clamp<int64_t>(kPart / rows.rows, 1024, kPart);
    parallel_parts(threads, ceil_div(g.n, width), [&](int64_t part) {
      const int64_t at = part * width;
      kernels().typed(T{}).accumulate_rows({rows.data + at, rows.rows, std::min(width, g.n - at), g.stride},
                                           factors.data(), out + at);
    });
  }
}

template <class T>
void scale_rows(Rows<T> rows, const double* factors, T* out, typename SumOf<T>::type* sums, int threads) {
  const auto& k = kernels().typed(T{});
  if (sums != nullptr || rows.rows * rows.n <= kPart) return k.scale_rows(rows, factors, out, sums);
  const int64_t group = std::max<int64_t>(1, kPart / std::max<int64_t>(1, rows.n));
  parallel_parts(threads, ceil_div(rows.rows, group), [&](int64_t part) {
    const int64_t from = part * group;
    k.scale_rows({rows.row(from), std::min(group, rows.rows - from), rows.n, rows.stride}, factors + from,
                 out + from * rows.n, nullptr);
  });
}

namespace {

// Calls body(begin, count) for pieces of [0, n) that end where chunks of noise end: none is made twice.
template <class Body>
void for_noise_parts(int64_t n, uint64_t first, int threads, Body body) {
  constexpr int64_t per_part = 64 * kChunk;
  const int64_t offset = first % kChunk;
  parallel_parts(threads, ceil_div(offset + n, per_part), [&](int64_t part) {
    const int64_t begin = std::max<int64_t>(0, part * per_part - offset);
    body(begin, std::min(n, (part + 1) * per_part - offset) - begin);
  });
}

}  // namespace

template <class T>
void gaussian_noise(T* x, int64_t n, const Stream& stream, uint64_t first, double std, int threads) {
  if (n == 0 || std == 0.0) return;
  for_noise_parts(n, first, threads, [&](int64_t begin, int64_t count) {
    kernels().typed(T{}).add_noise(x + begin, count, stream, first + begin, std);
  });
}

template <class T>
void noise_sgd(T* p, const T* sum, T* buf, int64_t n, const Stream& stream, uint64_t first, const SgdStep& h,
               int threads) {
  if (n == 0) return;
  for_noise_parts(n, first, threads, [&](int64_t begin, int64_t count) {
    kernels().step(T{}).noise_sgd(p + begin, sum + begin, buf == nullptr ? nullptr : buf + begin, count, stream,
                                  first + begin, h);
  });
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

#define FASTDP_INSTANTIATE(T)                                                                                     \
  template void sq_norms(Rows<T>, double*, int);                                                                  \
  template void linear_sq_norms(Rows<T>, Rows<T>, int64_t, bool, double*, int);                                   \
  template int64_t clip_factors<T>(const double*, int64_t, double, double*);                                      \
  template void clip_sum(Rows<T>, double, SumOf<T>::type*, int);                                                  \
  template void scale_rows(Rows<T>, const double*, T*, SumOf<T>::type*, int);                                     \
  template void gaussian_noise(T*, int64_t, const Stream&, uint64_t, double, int);
FASTDP_INSTANTIATE(float)
FASTDP_INSTANTIATE(bf16)
FASTDP_INSTANTIATE(double)
template void noise_sgd(float*, const float*, float*, int64_t, const Stream&, uint64_t, const SgdStep&, int);
template void noise_sgd(double*, const double*, double*, int64_t, const Stream&, uint64_t, const SgdStep&, int);

}  // namespace fastdp
