// Gaussian noise in registers: nothing of the generator's state is ever in memory. A thread makes one block of
// ChaCha20, 16 normals, which lie 16 elements apart (kernels.h): half a warp then touches 64 adjacent bytes at a time,
// two whole sectors. By count (bench/roofline.py), 74 integer operations and 8 bytes a normal: on an H100 (16.7 T of
// them a second) the generator limits, on an L4 memory.
#pragma once

#include "half.h"
#include "lane.h"

namespace fastdp::cuda {

// Calls body(index, z) for the 16 normals N(index) of block `number` of the stream.
template <class Body>
FASTDP_DEVICE void for_each_normal(const Stream& s, uint64_t number, Body body) {
  u32v x[16], low[16] = {};
  stream_blocks(s, number, x);
  u32v nearest = ~0u;
  FASTDP_UNROLL_16
  for (int pair = 0; pair < 8; ++pair) nearest = from_end(x[2 * pair]) < nearest ? from_end(x[2 * pair]) : nearest;
  if (nearest < 2 * kEnd) {  // one pair in 4096; of a warp, one in 16 goes this way
    Stream tail = s;
    tail.domain = Domain::noise_tail;
    stream_blocks(tail, number, low);
  }
  const uint64_t first = number / 16 * kChunk + number % 16;
  FASTDP_UNROLL_16
  for (int pair = 0; pair < 8; ++pair) {
    const u32v high = x[2 * pair];
    float z0, z1;
    normal_pair(from_end(high) < 2 * kEnd ? signed_uniform(high, low[pair]) : signed_uniform(high), x[2 * pair + 1], z0,
                z1);
    body(first + 32 * pair, z0);
    body(first + 32 * pair + 16, z1);
  }
}

// That make N(first) to N(first + n - 1), a thread 16 of them; they begin where a chunk does.
inline int64_t noise_blocks(int64_t n, uint64_t first, int threads) {
  return n == 0 ? 0 : (static_cast<int64_t>(first % kChunk) + n + 16 * threads - 1) / (16 * threads);
}

// x[i] += std N(first + i)
template <class T>
struct AddNoise {
  static constexpr const char* kName = "gaussian_noise";
  static constexpr int kThreads = 256;
  using Shared = NothingShared;
  using F = typename SumOf<T>::type;

  T* x;
  int64_t n;
  Stream stream;
  uint64_t first;
  F std;

  int64_t blocks() const { return noise_blocks(n, first, kThreads); }

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared&) const {
    const uint64_t number = first / kChunk * 16 + static_cast<uint64_t>(c.block()) * kThreads + c.thread();
    for_each_normal(stream, number, [&](uint64_t index, float z) {
      if (index < first || index - first >= static_cast<uint64_t>(n)) return;
      T& to = x[index - first];
      store(to, load(to) + std * static_cast<F>(z));
    });
  }
};

// x[n] += std * N(first + i), to the bit what the CPU's kernels add.
template <class T, class Launcher>
void gaussian_noise(Launcher& on, T* x, int64_t n, const Stream& stream, uint64_t first, double std) {
  if (std == 0.0) return;
  const AddNoise<T> body{x, n, stream, first, static_cast<typename SumOf<T>::type>(std)};
  on.run(body, body.blocks());
}

}  // namespace fastdp::cuda
