// Starts bodies (context.h) on a GPU's stream. Only nvcc compiles this; for tests, tests/cuda/emulator.h has a Launcher
// of the same members.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#include "context.h"

namespace fastdp::cuda {

template <class Body>
__global__ void __launch_bounds__(Body::kThreads) kernel(const Body body) {
  __shared__ typename Body::Shared shared;
  Gpu gpu;
  body(gpu, shared);
}

inline void check(cudaError_t error, const char* name) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Nothing here waits for the GPU, and everything may be captured in a graph.
class Launcher {
 public:
  // memory(bytes): on the device, aligned to 256, until what has been started on the stream so far has ended.
  Launcher(cudaStream_t stream, std::function<void*(std::size_t)> memory)
      : stream_(stream), memory_(std::move(memory)) {}

  template <class T>
  T* scratch(std::size_t count) {
    return static_cast<T*>(memory_(std::max<std::size_t>(count, 1) * sizeof(T)));
  }

  void zero(void* at, std::size_t bytes) { check(cudaMemsetAsync(at, 0, bytes, stream_), "zero"); }

  // Blocks are independent of each other, and 0 of them are none.
  template <class Body>
  void run(const Body& body, int64_t blocks, std::size_t dynamic_bytes = 0) {
    if (blocks == 0) return;
    check_blocks(blocks, Body::kName);
    allow<Body>(dynamic_bytes);
    kernel<Body><<<static_cast<unsigned>(blocks), Body::kThreads, dynamic_bytes, stream_>>>(body);
    check(cudaGetLastError(), Body::kName);
  }

  // They wait for each other: at most `together` of them.
  template <class Body>
  void run_together(const Body& body, int64_t blocks, std::size_t dynamic_bytes = 0) {
    if (blocks == 0) return;
    check_blocks(blocks, Body::kName);
    allow<Body>(dynamic_bytes);
    Body argument = body;
    void* arguments[] = {&argument};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&kernel<Body>), dim3(static_cast<unsigned>(blocks)),
                                      dim3(Body::kThreads), arguments, dynamic_bytes, stream_),
          Body::kName);
  }

  template <class Body>
  int64_t together(std::size_t dynamic_bytes = 0) {
    allow<Body>(dynamic_bytes);
    int each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel<Body>, Body::kThreads, dynamic_bytes),
          Body::kName);
    return int64_t{each} * processors();
  }

  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // of dynamic shared memory that a block may have
  std::size_t most_dynamic_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kKept; }

 private:
  static constexpr std::size_t kKept = 4096;  // for Body::Shared, and 1 KiB that the system takes

  static int attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "device");
    check(cudaDeviceGetAttribute(&value, which, device), "device");
    return value;
  }

  static void check_blocks(int64_t blocks, const char* name) {
    if (blocks > 0x7fffffff)
      throw std::runtime_error(std::string(name) + ": blocks=" + std::to_string(blocks) + ": must be below 2^31");
  }

  template <class Body>
  static void allow(std::size_t dynamic_bytes) {
    if (dynamic_bytes + sizeof(typename Body::Shared) > 48 * 1024)  // more must be asked for
      check(cudaFuncSetAttribute(kernel<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(dynamic_bytes)),
            Body::kName);
  }

  cudaStream_t stream_;
  std::function<void*(std::size_t)> memory_;
};

}  // namespace fastdp::cuda
