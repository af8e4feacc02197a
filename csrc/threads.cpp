#include "threads.h"

#include <dlfcn.h>

#include <atomic>

namespace fastdp {
namespace {

// GNU libgomp's entry for a parallel region, which LLVM's and Intel's runtimes export too.
using GompParallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

GompParallel team() {
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

struct Work {
  void (*body)(void*, int64_t);
  void* context;
  int64_t parts;
  std::atomic<int64_t> next;
};

void take_parts(void* data) {
  Work& work = *static_cast<Work*>(data);
  for (int64_t part; (part = work.next.fetch_add(1, std::memory_order_relaxed)) < work.parts;)
    work.body(work.context, part);
}

}  // namespace

bool threads_available() { return team() != nullptr; }

void parallel_parts(int threads, int64_t parts, void (*body)(void*, int64_t), void* context) {
  Work work{body, context, parts, {0}};
  const int64_t useful = threads < parts ? threads : parts;
  if (useful <= 1 || team() == nullptr)
    take_parts(&work);
  else
    team()(take_parts, &work, static_cast<unsigned>(useful), 0);
}

}  // namespace fastdp
