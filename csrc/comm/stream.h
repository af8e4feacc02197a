#pragma once

#include <chrono>
#include <cstddef>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastdp::comm {

// Past the caches. `to` must be aligned to 16 bytes. What is copied is seen by those who see a later Team::post.
inline void stream_copy(void* to, const void* from, std::size_t bytes) {
  std::size_t done = 0;
#if defined(__SSE2__)
  auto* out = static_cast<__m128i*>(to);
  const auto* in = static_cast<const __m128i*>(from);
  for (; done + 64 <= bytes; done += 64, in += 4, out += 4) {
    const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    const __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a), _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c), _mm_stream_si128(out + 3, d);
  }
#endif
  if (done != bytes)
    std::memcpy(static_cast<std::byte*>(to) + done, static_cast<const std::byte*>(from) + done, bytes - done);
#if defined(__SSE2__)
  _mm_sfence();  // x86 keeps no order between these stores and others
#endif
}

// Copies to memory that another core has read, and will read next, in the way that suits these cores. An ordinary store
// takes the line from the other core first. On an AMD EPYC that is 1.6 ns where both have their third-level cache in
// common, and 26 to 35 where not; past the caches it is 2 to 4, and the reader fetches the data from memory. An
// all-reduce of 1 MiB of two ranks takes 50 µs by ordinary stores and 140 past the caches there, 600 and 100 here; a
// virtual machine moves from one to the other within minutes. So ordinary stores are timed, and tried again.
class HandOver {
 public:
  void operator()(void* to, const void* from, std::size_t bytes) {
    if (bytes < kStreamFrom) return copy(to, from, bytes);
    if (untimed_ > 0) {
      --untimed_;
      return again(to, from, bytes);
    }
    const auto begin = Clock::now();
    copy(to, from, kTrial);
    past_caches_ = Clock::now() - begin > kTrial / 64 * kSlowLine;
    untimed_ = past_caches_ ? kBetweenTrials : 0;
    again(static_cast<std::byte*>(to) + kTrial, static_cast<const std::byte*>(from) + kTrial, bytes - kTrial);
  }

  // The same for a part of what is handed over.
  void again(void* to, const void* from, std::size_t bytes) const {
    past_caches_ ? stream_copy(to, from, bytes) : copy(to, from, bytes);
  }

 private:
  using Clock = std::chrono::steady_clock;
  // Level at 8 KiB; at 1 KiB an all-reduce takes 0.9 µs by ordinary stores, 1.2 past the caches.
  static constexpr std::size_t kStreamFrom = 8192;
  static constexpr std::size_t kTrial = 8192;
  static constexpr auto kSlowLine = std::chrono::nanoseconds(16);
  static constexpr int kBetweenTrials = 64;

  static void copy(void* to, const void* from, std::size_t bytes) {
    if (bytes != 0) std::memcpy(to, from, bytes);
  }

  bool past_caches_ = false;
  int untimed_ = 0;
};

}  // namespace fastdp::comm
