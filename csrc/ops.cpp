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

namespace {

// The part of the parameter that lies in [begin, end) of the flat buffer.
template <class T>
StepParameter clipped(const StepParameter& q, uint64_t begin, uint64_t end) {
  const uint64_t from = std::clamp(begin, q.offset, q.offset + q.n), to = std::clamp(end, from, q.offset + q.n);
  const auto at = [&](uintptr_t memory) { return memory == 0 ? 0 : memory + (from - q.offset) * sizeof(T); };
  return {at(q.p), {at(q.state[0]), at(q.state[1])}, static_cast<int64_t>(to - from), from};
}

}  // namespace

template <class T, class Step>
void noise_step(std::vector<StepParameter> parameters, const T* flat, const Stream& stream, const Step& h,
                const StepShare& share, int threads) {
  const auto kernel = kernels().step(T{}).of(h);
  // All parameters in one parallel region: waking the team for each bias would cost more than its step.
  std::vector<int64_t> ends;  // of each parameter's parts
  int64_t parts = 0;
  for (StepParameter& q : parameters) {
    q = clipped<T>(q, share.begin, share.end);
    ends.push_back(parts += noise_parts(q.n, q.offset));
  }
  const auto elements = [](int64_t bytes) { return bytes / static_cast<int64_t>(sizeof(T)); };
  parallel_parts(threads, parts, [&](int64_t part) {
    const size_t which = std::upper_bound(ends.begin(), ends.end(), part) - ends.begin();
    const StepParameter& q = parameters[which];
    const Range r = noise_part(q.n, q.offset, part - (which == 0 ? 0 : ends[which - 1]));
    const auto at = [&](uintptr_t memory) { return memory == 0 ? nullptr : reinterpret_cast<T*>(memory) + r.begin; };
    const uint64_t first = q.offset + r.begin;
    kernel({at(q.p),
            flat + first,
            {at(q.state[0]), at(q.state[1])},
            r.count,
            first,
            share.sums,
            elements(share.sums_apart),
            at(q.p) + elements(share.first_copy),
            share.copies,
            elements(share.copies_apart)},
           stream, h);
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

#define FASTDP_INSTANTIATE(T)                                                                               \
  template void sq_norms(Rows<T>, double*, int);                                                            \
  template int64_t clip_factors<T>(const double*, int64_t, double, double, double*, std::optional<double>); \
  template void scale_rows(Sequences<T>, const double*, T*, SumOf<T>::type*, int);                          \
  template void gaussian_noise(T*, int64_t, const Stream&, uint64_t, double, int);                          \
  template void secure_noise(T*, int64_t, const Stream&, uint64_t, double, int);
FASTDP_INSTANTIATE(float)
FASTDP_INSTANTIATE(bf16)
FASTDP_INSTANTIATE(double)
#define FASTDP_INSTANTIATE_STEP(T, Step) \
  template void noise_step(std::vector<StepParameter>, const T*, const Stream&, const Step&, const StepShare&, int);
FASTDP_INSTANTIATE_STEP(float, SgdStep)
FASTDP_INSTANTIATE_STEP(double, SgdStep)
FASTDP_INSTANTIATE_STEP(float, AdamStep)
FASTDP_INSTANTIATE_STEP(double, AdamStep)

}  // namespace fastdp
