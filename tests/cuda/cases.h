// What the suites of tests/cuda are made of. A suite is a function of a Machine, which is the CPU's emulator in
// host.cpp and a GPU in gpu.cu:
//   m.launcher()        a Launcher; on the CPU each has another order of threads, and takes its turn with 1 to 5
//   processors m.array<T>(n)       zeros that device code reaches, aligned to 256; on the CPU just n of them,
//   AddressSanitizer knows m.finish()          what has been launched is done
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/common.h"
#include "../../csrc/cuda/half.h"

namespace fastdp::cuda::test {

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}
inline void require(bool right, const std::string& what) {
  if (!right) fail(what);
}

template <class... Of>
std::string text(const char* name, Of... numbers) {
  std::string out = name;
  ((out += " " + std::to_string(numbers)), ...);
  return out;
}

template <class T>
bool same_bits(const T* x, const T* y, std::size_t n) {
  return n == 0 || std::memcmp(x, y, n * sizeof(T)) == 0;
}

inline Stream stream_of(uint64_t step, Domain domain = Domain::noise) {
  Stream s{{}, domain, step};
  for (uint32_t i = 0; i < 8; ++i) s.key[i] = 0x9e3779b9u * (i + 1);
  return s;
}

// Numbers that no two places have in common, rounded to T.
template <class T>
void fill(T* x, std::size_t n, unsigned seed, float size = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, size);
  for (std::size_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, double>)
      x[i] = normal(random);
    else
      store(x[i], normal(random));
  }
}

}  // namespace fastdp::cuda::test
