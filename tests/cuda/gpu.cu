// The suites of host.cpp on a GPU: built and run by tests/test_cuda.py where there is one, and by
//   nvcc -std=c++20 -O2 -fmad=false -arch=native tests/cuda/gpu.cu csrc/{dispatch,isa_scalar,ops,threads}.cpp -o gpu
#include "../../csrc/cuda/launcher.h"
//
#include <cstdio>
#include <memory>
#include <vector>

#include "embedding.h"
#include "linear.h"
#include "noise.h"
#include "rows.h"
#include "sample.h"
#include "scale.h"
#include "step.h"

namespace fastdp::cuda::test {
namespace {

// In memory that both reach: the CPU between finish() and the next launch.
class Device {
 public:
  Launcher launcher() {
    return {nullptr, [this](std::size_t bytes) {
              scratch_.push_back(bytes_of(bytes));
              return static_cast<void*>(scratch_.back().get());
            }};
  }
  template <class T>
  auto array(std::size_t n) {
    const auto memory = bytes_of(n * sizeof(T));
    return std::shared_ptr<T[]>(memory, reinterpret_cast<T*>(memory.get()));
  }
  void finish() {
    check(cudaDeviceSynchronize(), "finish");
    scratch_.clear();
  }

 private:
  static std::shared_ptr<unsigned char[]> bytes_of(std::size_t bytes) {
    void* at = nullptr;
    check(cudaMallocManaged(&at, bytes == 0 ? 1 : bytes), "memory");
    check(cudaMemset(at, 0, bytes), "memory");
    check(cudaDeviceSynchronize(), "memory");
    return {static_cast<unsigned char*>(at), [](unsigned char* x) {
              static_cast<void>(cudaDeviceSynchronize());  // a suite may drop what a kernel still reads
              static_cast<void>(cudaFree(x));
            }};
  }

  std::vector<std::shared_ptr<unsigned char[]>> scratch_;
};

}  // namespace
}  // namespace fastdp::cuda::test

int main() {
  using namespace fastdp::cuda::test;
  int count = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess || count == 0) {
    std::printf("no GPU: %s\n", cudaGetErrorString(error));
    return 3;
  }
  Device device;
  test_embedding(device);
  test_linear(device);
  test_noise(device);
  test_rows(device);
  test_sample(device);
  test_scale(device);
  test_step(device);
  std::puts("done");
}
