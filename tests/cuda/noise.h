// Noise: the bits of the CPU's kernels, which tests/test_noise.py holds against RFC 8439 and a float64 Box-Muller.
#pragma once

#include "../../csrc/cuda/noise.h"
#include "../../csrc/kernels.h"
#include "cases.h"

namespace fastdp::cuda::test {

template <class T, class Machine>
void noise_has_the_cpus_bits(Machine& m, int64_t n, uint64_t first) {
  const Stream stream = stream_of(7 + n);
  auto x = m.template array<T>(n);
  fill(x.get(), n, 3);
  std::vector<T> expected(x.get(), x.get() + n);
  auto launcher = m.launcher();
  gaussian_noise(launcher, x.get(), n, stream, first, 0.7);
  m.finish();
  kernels().typed(T{}).add_noise(expected.data(), n, stream, first, 0.7);
  require(same_bits(x.get(), expected.data(), n), text("noise", sizeof(T), n, first));
}

template <class Machine>
void test_noise(Machine& m) {
  // The second last: a counter that passes 32 bits. The last: 40,000 normals have ten near an end.
  for (const uint64_t first : {uint64_t{0}, uint64_t{17}, uint64_t{255}, 16 * ((uint64_t{1} << 32) - 3)})
    for (const int64_t n : {0, 1, 255, 256, 257, 4097, 40'000}) {
      noise_has_the_cpus_bits<float>(m, n, first);
      if (n < 5000) noise_has_the_cpus_bits<bf16>(m, n, first);
    }
}

}  // namespace fastdp::cuda::test
