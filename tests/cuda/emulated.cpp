// fastdp._cuda on the emulator: tests/test_cuda.py builds this with csrc/cuda/bindings.cpp, so that fastdp/cuda.py runs
// on CPU tensors.
#include "emulator.h"
//
#include "../../csrc/cuda/api-inl.h"

namespace fastdp::cuda {
namespace {

Launcher launcher(const Place& place) {
  static unsigned seed = 0;
  return Launcher(++seed, 2, false, place.memory);
}

}  // namespace
}  // namespace fastdp::cuda
