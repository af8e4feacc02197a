// Noise and an optimizer's step in one pass over the parameters, as the CPU's noise_sgd and noise_adam: the noise goes
// from registers into the update, and 16 parameters of a thread lie 16 elements apart (noise.h). With momentum 20 bytes
// an element are moved, with Adam 28, where torch's step after separate noise moves 36 and 44.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "api.h"
#include "lane.h"
#include "noise.h"

namespace fastdp::cuda {

// kStates: how many of the state's tensors there are.
template <class Update, int kStates>
struct NoiseStep {
  static constexpr const char* kName = "noise_step";
  static constexpr int kThreads = 256;  // 56 registers, 4 blocks of an SM
  static constexpr int kTensors = 64;   // of a launch, which takes 4 KiB of arguments at most
  using Shared = NothingShared;

  const float* flat;
  Stream stream;
  float std, scale, decay;
  Update update;
  int count = 0;
  StepTensor tensors[kTensors];
  int ends[kTensors];  // of each tensor's blocks

  void add(const StepTensor& tensor) {
    const int before = count == 0 ? 0 : ends[count - 1];
    tensors[count] = tensor;
    ends[count++] = before + static_cast<int>(noise_blocks(tensor.n, tensor.offset, kThreads));
  }
  int blocks() const { return count == 0 ? 0 : ends[count - 1]; }

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared&) const {
    int which = 0;
    while (c.block() >= ends[which]) ++which;
    const StepTensor& of = tensors[which];
    const int block = c.block() - (which == 0 ? 0 : ends[which - 1]);
    for_each_normal(stream, of.offset / kChunk * 16 + static_cast<uint64_t>(block) * kThreads + c.thread(),
                    [&](uint64_t index, float z) {
                      if (index < of.offset || index - of.offset >= static_cast<uint64_t>(of.n)) return;
                      step(of, index, z);
                    });
  }

 private:
  FASTDP_DEVICE void step(const StepTensor& of, uint64_t index, float z) const {
    const uint64_t i = index - of.offset;
    float p = of.p[i];
    const float g = (flat[index] + std * z) * scale + decay * p;
    if constexpr (kStates == 0) {
      update(g, p);
    } else if constexpr (kStates == 1) {
      float state = of.state[0][i];
      update(g, p, state);
      of.state[0][i] = state;
    } else {
      float first = of.state[0][i], second = of.state[1][i];
      update(g, p, first, second);
      of.state[0][i] = first, of.state[1][i] = second;
    }
    of.p[i] = p;
  }
};

template <class Update, int kStates, class Launcher>
void noise_step(Launcher& on, const std::vector<StepTensor>& tensors, const float* flat, const Stream& stream,
                const NoisedGradient& h, const Update& update) {
  NoiseStep<Update, kStates> body{flat,
                                  stream,
                                  static_cast<float>(h.std),
                                  static_cast<float>(h.scale),
                                  static_cast<float>(h.weight_decay),
                                  update,
                                  0,
                                  {},
                                  {}};
  for (const StepTensor& tensor : tensors) {
    if (body.count == body.kTensors) on.run(body, body.blocks()), body.count = 0;
    body.add(tensor);
  }
  on.run(body, body.blocks());
}

// One step of each parameter on flat[offset + i] and N(offset + i), to the bit the CPU's.
template <class Launcher>
void noise_step(Launcher& on, const std::vector<StepTensor>& tensors, const float* flat, const Stream& stream,
                const SgdStep& h) {
  const SgdUpdate<float> update(h);
  const auto has_velocity = [](const StepTensor& t) { return t.state[0] != nullptr; };
  if (std::any_of(tensors.begin(), tensors.end(), has_velocity))
    noise_step<SgdUpdate<float>, 1>(on, tensors, flat, stream, h.gradient, update);
  else
    noise_step<SgdUpdate<float>, 0>(on, tensors, flat, stream, h.gradient, update);
}

template <class Launcher>
void noise_step(Launcher& on, const std::vector<StepTensor>& tensors, const float* flat, const Stream& stream,
                const AdamStep& h) {
  noise_step<AdamUpdate<float>, 2>(on, tensors, flat, stream, h.gradient, AdamUpdate<float>(h));
}

}  // namespace fastdp::cuda
