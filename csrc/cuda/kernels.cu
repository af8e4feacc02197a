// The only file that nvcc compiles: every body of csrc/cuda, for GPUs.
#include "launcher.h"
//
#include "api-inl.h"

namespace fastdp::cuda {
namespace {

Launcher launcher(const Place& place) { return {reinterpret_cast<cudaStream_t>(place.stream), place.memory}; }

}  // namespace
}  // namespace fastdp::cuda
