// What the body of a kernel may ask of whoever runs it, and a GPU's answers. A body is a struct of its arguments:
//
//   struct Body {
//     static constexpr const char* kName;   // in error messages
//     static constexpr int kThreads;        // of a block, a multiple of 32
//     struct Shared {...};                  // of a block's threads; holds anything at the beginning
//     template <class Context> FASTDP_DEVICE void operator()(Context& c, Shared& s) const;
//   };
//
// It is written once. A GPU runs it by Gpu below, tests/cuda/emulator.h by fibers on the CPU, where the tests find what
// it does wrong without a GPU.
//   c.thread(), c.block(), c.blocks()    which of the block's threads, which of how many blocks
//   c.lane(), c.warp()                   which of its warp's 32 threads, which of the block's warps
//   c.sync()                             all threads of the block have come here, and see what the others wrote
//   c.shuffle_xor(x, mask)               x of the lane whose number differs by mask; all 32 call, as for the next two
//   c.shuffle(x, lane), c.ballot(flag)   x of that lane; bit i is lane i's flag
//   c.copy_async(to, from)               16 bytes to shared memory, both aligned to that, there after c.copied<n>(), by
//   c.copy_commit(), c.copied<n>()       this thread: all but its n newest groups of copies, which commit has closed
//   c.arrive(counter)                    this block, all of whose threads have synced, counts itself; one thread calls
//   c.await(counter, n)                  until n blocks have; then one sees what they wrote. Only in blocks that run
//                                        together (Launcher::run_together)
//   c.dynamic()                          shared memory of as many bytes as the launch asked for, aligned to 16
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define FASTDP_DEVICE __device__ __forceinline__
#else
#define FASTDP_DEVICE inline
#endif
#if defined(__CUDA_ARCH__)
#define FASTDP_UNROLL _Pragma("unroll")
#else
#define FASTDP_UNROLL
#endif

namespace fastdp::cuda {

constexpr int kWarp = 32;

struct NothingShared {};

#if defined(__CUDACC__)
class Gpu {
 public:
  FASTDP_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  FASTDP_DEVICE int block() const { return static_cast<int>(blockIdx.x); }
  FASTDP_DEVICE int blocks() const { return static_cast<int>(gridDim.x); }
  FASTDP_DEVICE int lane() const { return thread() % kWarp; }
  FASTDP_DEVICE int warp() const { return thread() / kWarp; }
  FASTDP_DEVICE void sync() { __syncthreads(); }

  template <class T>
  FASTDP_DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(kAll, x, mask);
  }
  template <class T>
  FASTDP_DEVICE T shuffle(T x, int lane) {
    return __shfl_sync(kAll, x, lane);
  }
  FASTDP_DEVICE uint32_t ballot(bool flag) { return __ballot_sync(kAll, flag); }

  FASTDP_DEVICE void copy_async(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#else
    *static_cast<int4*>(to) = *static_cast<const int4*>(from);
#endif
  }
  FASTDP_DEVICE void copy_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  template <int n>
  FASTDP_DEVICE void copied() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
  }

  FASTDP_DEVICE void arrive(uint32_t* counter) {
    __threadfence();
    atomicAdd(counter, 1u);
  }
  FASTDP_DEVICE void await(const uint32_t* counter, uint32_t n) {
    while (*static_cast<const volatile uint32_t*>(counter) < n) __nanosleep(32);
    __threadfence();
  }

  FASTDP_DEVICE std::byte* dynamic() {
    extern __shared__ int4 memory[];
    return reinterpret_cast<std::byte*>(memory);
  }

 private:
  static constexpr unsigned kAll = 0xffffffffu;
};
#endif

}  // namespace fastdp::cuda
