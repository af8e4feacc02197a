#pragma once

#include <cstddef>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastdp::comm {

// Copies to memory that another core has read, and will read next: past the caches. An ordinary store must first take
// the line from that core, 26 ns each on an AMD EPYC (13.5 µs for 32 KiB), where these take 1.5 ns (0.8 µs), and the
// reader is no slower. But they wait for memory once, whatever their number: not for less than kStreamFrom bytes. `to`
// must be aligned to 16 bytes. What is copied is seen by those who see a later Team::post.
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

// Level at 8 KiB; at 1 KiB an all-reduce takes 0.9 µs without, 1.2 with.
inline constexpr std::size_t kStreamFrom = 8192;

}  // namespace fastdp::comm
