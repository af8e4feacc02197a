// Noise and step: the bits of the CPU's kernels, which tests/test_fused.py holds against torch's optimizers.
#pragma once

#include "../../csrc/cuda/step.h"
#include "cases.h"

namespace fastdp::cuda::test {

// Parameters of several sizes, some in the middle of a chunk of noise, more than one launch takes.
inline std::vector<std::pair<int64_t, uint64_t>> places_of_parameters() {
  std::vector<std::pair<int64_t, uint64_t>> places{{5000, 0}, {1, 5008}, {0, 5024}, {300, 5024}};
  for (int i = 0; i < 70; ++i) places.emplace_back(17 + i, 6000 + 100 * i);
  return places;
}

template <class Machine, class Step>
void step_has_the_cpus_bits(Machine& m, const Step& h, int states, const std::string& what) {
  const auto places = places_of_parameters();
  const std::size_t all = places.back().second + places.back().first;
  const Stream stream = stream_of(11);
  auto flat = m.template array<float>(all);
  fill(flat.get(), all, 1);
  auto launcher = m.launcher();
  std::vector<StepTensor> tensors;
  std::vector<std::vector<float>> expected;  // p and states of each
  decltype(m.template array<float>(0)) arrays[3];
  for (int k = 0; k < 3; ++k) {
    arrays[k] = m.template array<float>(all);
    fill(arrays[k].get(), all, 5 + k);
    for (std::size_t i = 0; i < all && k == 2; ++i) arrays[k][i] = std::fabs(arrays[k][i]);
    expected.emplace_back(arrays[k].get(), arrays[k].get() + all);
  }
  const auto state = [=](auto& of, int k, uint64_t at) { return k <= states ? &of[k][at] : nullptr; };
  for (const auto& [n, at] : places) {
    tensors.push_back({&arrays[0][at], {state(arrays, 1, at), state(arrays, 2, at)}, n, at});
    const StepRange<float> range{
        &expected[0][at], flat.get() + at, {state(expected, 1, at), state(expected, 2, at)}, n, at};
    kernels().step(0.0f).of(h)(range, stream, h);
  }
  noise_step(launcher, tensors, flat.get(), stream, h);
  m.finish();
  for (int k = 0; k < 3; ++k) require(same_bits(arrays[k].get(), expected[k].data(), all), text(what.c_str(), k));
}

template <class Machine>
void test_step(Machine& m) {
  const NoisedGradient h{1.5, 1.0 / 64, 0.01};
  for (const bool first : {true, false})
    for (const bool nesterov : {true, false}) {
      step_has_the_cpus_bits(m, SgdStep{h, 0.1, 0.9, nesterov ? 0.0 : 0.3, nesterov, first}, 1, "momentum");
    }
  step_has_the_cpus_bits(m, SgdStep{h, 0.1, 0.0, 0.0, false, true}, 0, "sgd");
  step_has_the_cpus_bits(m, AdamStep{h, 0.9, 0.999, 1e-8, 0.999, 0.01, 0.7}, 2, "adam");
  auto launcher = m.launcher();
  noise_step(launcher, {}, nullptr, stream_of(1), SgdStep{});  // of nothing
}

}  // namespace fastdp::cuda::test
