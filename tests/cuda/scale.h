// Rows times factors: the CPU's bits, and what no float can hold.
#pragma once

#include "../../csrc/cuda/scale.h"
#include "../../csrc/ops.h"
#include "cases.h"

namespace fastdp::cuda::test {

template <class Machine>
void products_have_the_cpus_bits(Machine& m, int64_t records, int64_t positions, int64_t n, int64_t offset,
                                 int64_t apart) {
  const int64_t rows = records * positions, size = offset + rows * apart;
  auto x = m.template array<float>(size), out = m.template array<float>(rows * n);
  auto factors = m.template array<double>(rows);
  fill(x.get(), size, static_cast<unsigned>(n + offset));
  const double some[] = {1.0, 0.0, 0.37, 1e-42, 3e30};  // one is no float with all its digits
  for (int64_t i = 0; i < rows; ++i) {
    factors[i] = some[i % 5];
    if (factors[i] == 0.0)  // not read
      for (int64_t j = 0; j < n; ++j) x[offset + i * apart + j] = std::nanf("");
    if (factors[i] == 1e-42 && n > 1) x[offset + i * apart] = 3e30f;
  }
  const Sequences<float> of{x.get() + offset, records, positions, n, positions * apart, apart};
  std::vector<float> want(rows * n, -1.0f);
  fastdp::scale_rows<float>(of, factors.get(), want.data(), nullptr, 1);
  auto on = m.launcher();
  scale_rows(on, of, factors.get(), out.get());
  m.finish();
  require(same_bits(out.get(), want.data(), rows * n), text("scale_rows", records, positions, n, offset, apart));
}

template <class Machine>
void products_beyond_a_float_are_0(Machine& m) {
  auto x = m.template array<float>(5), out = m.template array<float>(5);
  auto factor = m.template array<double>(1);
  const float some[] = {1.0f, 1e30f, -1e30f, 1e-39f, -2.0f};
  std::copy(some, some + 5, x.get());
  factor[0] = 1e20;
  auto on = m.launcher();
  scale_rows(on, {x.get(), 1, 1, 5, 5, 5}, factor.get(), out.get());
  m.finish();
  const float want[] = {1e20f, 0.0f, 0.0f, 1e20f * 1e-39f, -2e20f};
  require(same_bits(out.get(), want, 5), "scale_rows: products beyond a float");
}

template <class Machine>
void test_scale(Machine& m) {
  for (const int64_t n : {0, 1, 4, 7, 64, 1030})
    for (const int64_t offset : {0, 1}) {
      products_have_the_cpus_bits(m, 13, 1, n, offset, n);
      products_have_the_cpus_bits(m, 3, 5, n, offset, n + 4);
    }
  products_have_the_cpus_bits(m, 0, 3, 5, 0, 5);
  products_beyond_a_float_are_0(m);
}

}  // namespace fastdp::cuda::test
