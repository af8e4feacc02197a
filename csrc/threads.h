// Threads for the kernels: the team of the OpenMP runtime that torch has already loaded. A pool of our own would fight
// with torch's for the cores, and linking an OpenMP runtime would bring a second team.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fastdp {

// Runs body(context, part) for each part in [0, parts), on up to `threads` threads; returns when all are done. Which
// thread runs which part is open, so parts must not depend on each other.
void parallel_parts(int threads, int64_t parts, void (*body)(void* context, int64_t part), void* context);

template <class Body>
void parallel_parts(int threads, int64_t parts, Body&& body) {
  parallel_parts(
      threads, parts,
      [](void* context, int64_t part) { (*static_cast<std::remove_reference_t<Body>*>(context))(part); }, &body);
}

// Whether a team was found; without one the kernels run on the calling thread.
bool threads_available();

}  // namespace fastdp
