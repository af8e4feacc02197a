// Sampling: the CPU's batches, which tests/test_sampling.py holds against its oracle.
#pragma once

#include "../../csrc/cuda/sample.h"
#include "cases.h"

namespace fastdp::cuda::test {

template <class Machine>
void sample_is_the_cpus(Machine& m, int64_t n, double rate, std::size_t room) {
  const Stream stream = stream_of(n + 1, Domain::sampling);
  std::vector<int64_t> expected, block(kSampleBlock);
  for (int64_t from = 0; from < n && rate > 0.0; from += kSampleBlock) {
    const int64_t count =
        kernels().sample_block(stream, from / kSampleBlock, std::min(kSampleBlock, n - from), rate, block.data());
    expected.insert(expected.end(), block.begin(), block.begin() + count);
  }
  auto ids = m.template array<int64_t>(room), total = m.template array<int64_t>(1);
  auto launcher = m.launcher();
  poisson_sample(launcher, n, rate, stream, ids.get(), room, total.get());
  m.finish();
  const std::string what = text("sample", n, rate, room);
  require(total[0] == static_cast<int64_t>(expected.size()), what);
  require(same_bits(ids.get(), expected.data(), std::min(room, expected.size())), what);
}

template <class Machine>
void test_sample(Machine& m) {
  for (const int64_t n : {0, 1, 4095, 4096, 4097, 100'000, 1'200'000})
    for (const double rate : {0.0, 1e-9, 0.001, 0.3, 0.999, 1.0})
      if (n * rate < 30'000) sample_is_the_cpus(m, n, rate, 40'000);
  sample_is_the_cpus(m, 100'000, 0.01, 100);  // 1,000 want in
}

}  // namespace fastdp::cuda::test
