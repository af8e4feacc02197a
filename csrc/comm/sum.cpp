#include "sum.h"

#include <algorithm>
#include <cstring>

// The widest vectors of the machine: the sums are the same to the bit. Chosen when the library is loaded, which
// ThreadSanitizer does not bear.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__SANITIZE_THREAD__)
#define FASTDP_WIDE [[gnu::target_clones("default", "avx2", "arch=x86-64-v4")]]
#else
#define FASTDP_WIDE
#endif

namespace fastdp::comm {

namespace {

// bfloat16 is added in float32.
inline std::int64_t load(std::int64_t x) { return x; }
inline void store(std::int64_t& to, std::int64_t x) { to = x; }
using fastdp::load;
using fastdp::store;

// Elements of a sum that stay in the first-level cache.
constexpr std::size_t kBlock = 1024;

// ivdep: in and out may be the same memory, and then at the same i.
template <class T>
[[gnu::always_inline]] inline void sum_two(const T* a, const T* b, T* const* out, int outs, std::size_t n) {
  using Sum = Wrapping<decltype(load(T{}))>;
  const auto sum = [=](std::size_t i) {
    return static_cast<Sum>(static_cast<Sum>(load(a[i])) + static_cast<Sum>(load(b[i])));
  };
  T* first = out[0];
  if (outs == 1) {
#pragma GCC ivdep
    for (std::size_t i = 0; i < n; ++i) store(first[i], sum(i));
    return;
  }
  T* second = out[1];
#pragma GCC ivdep
  for (std::size_t i = 0; i < n; ++i) {
    T total;
    store(total, sum(i));
    first[i] = second[i] = total;
  }
}

template <class T>
[[gnu::always_inline]] inline void sum_any(const T* const* in, int ranks, T* const* out, int outs, std::size_t n) {
  if (ranks == 2 && outs <= 2) return sum_two(in[0], in[1], out, outs, n);
  using Sum = Wrapping<decltype(load(T{}))>;
  Sum total[kBlock];
  T rounded[kBlock];
  for (std::size_t begin = 0; begin < n; begin += kBlock) {
    const std::size_t count = std::min(kBlock, n - begin);
    for (std::size_t i = 0; i < count; ++i) total[i] = static_cast<Sum>(load(in[0][begin + i]));
    for (int rank = 1; rank < ranks; ++rank) {
      const T* x = in[rank] + begin;
      for (std::size_t i = 0; i < count; ++i) total[i] += static_cast<Sum>(load(x[i]));
    }
    for (std::size_t i = 0; i < count; ++i) store(rounded[i], total[i]);
    for (int k = 0; k < outs; ++k) std::memcpy(out[k] + begin, rounded, count * sizeof(T));
  }
}

}  // namespace

FASTDP_WIDE void sum_ranks(const float* const* in, int ranks, float* const* out, int outs, std::size_t n) {
  sum_any(in, ranks, out, outs, n);
}
FASTDP_WIDE void sum_ranks(const double* const* in, int ranks, double* const* out, int outs, std::size_t n) {
  sum_any(in, ranks, out, outs, n);
}
FASTDP_WIDE void sum_ranks(const std::int64_t* const* in, int ranks, std::int64_t* const* out, int outs,
                           std::size_t n) {
  sum_any(in, ranks, out, outs, n);
}
FASTDP_WIDE void sum_ranks(const bf16* const* in, int ranks, bf16* const* out, int outs, std::size_t n) {
  sum_any(in, ranks, out, outs, n);
}

}  // namespace fastdp::comm
