// All bodies of csrc/cuda on the CPU: built and run by tests/test_cuda.py, also under sanitizers and gcov.
//   host [threads]    "threads": the cases for ThreadSanitizer, with OS threads; built with FASTDP_ONLY_THREADS, in half
//                     the time, it has no others
// FASTDP_SUITES: which are in it, rows (1) or the others (2): two compilers at once take half of the time.
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "emulator.h"
#if FASTDP_SUITES & 1
#include "rows.h"
#endif
#if FASTDP_SUITES & 2
#include "embedding.h"
#include "linear.h"
#include "noise.h"
#include "sample.h"
#include "scale.h"
#include "step.h"
#endif

namespace fastdp::cuda::test {
namespace {

struct Host {
  bool os_threads = false;
  unsigned seed = 0;

  Launcher launcher() {
    ++seed;
    return Launcher(seed, 1 + static_cast<int>(seed % 5), os_threads);
  }
  template <class T>
  auto array(std::size_t n) {
    constexpr std::align_val_t alignment{256};
    auto* memory = static_cast<T*>(::operator new(n * sizeof(T), alignment));
    std::memset(static_cast<void*>(memory), 0, n * sizeof(T));
    return std::shared_ptr<T[]>(memory, [](T* at) { ::operator delete(at, std::align_val_t{256}); });
  }
  void finish() {}
};

}  // namespace
}  // namespace fastdp::cuda::test

int main(int count, char** arguments) {
  using namespace fastdp::cuda::test;
  const bool os_threads = count > 1 && std::strcmp(arguments[1], "threads") == 0;
  Host host{os_threads};
  if (!os_threads) {
#if !defined(FASTDP_ONLY_THREADS)
#if FASTDP_SUITES & 1
    test_rows(host);
#endif
#if FASTDP_SUITES & 2
    test_embedding(host);
    test_linear(host);
    test_noise(host);
    test_sample(host);
    test_scale(host);
    test_step(host);
#endif
#endif
  } else {
#if FASTDP_SUITES & 1
    test_rows_in_threads(host);
#endif
#if FASTDP_SUITES & 2
    test_embedding_in_threads(host);
    test_linear_in_threads(host);
#endif
  }
  std::puts("done");
}
