#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

#include "../common.h"

namespace fastdp::comm {

// Of integers, what wraps as they do in MPI and in torch; signed overflow would be undefined.
template <class T>
using Wrapping = typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::type_identity<T>>::type;

// out[k][i] = in[0][i] + in[1][i] + ..., added in that order, bfloat16 in float32; for all `outs` k and n i. An out may
// be an in, but must not overlap one otherwise.
void sum_ranks(const float* const* in, int ranks, float* const* out, int outs, std::size_t n);
void sum_ranks(const double* const* in, int ranks, double* const* out, int outs, std::size_t n);
void sum_ranks(const std::int64_t* const* in, int ranks, std::int64_t* const* out, int outs, std::size_t n);
void sum_ranks(const bf16* const* in, int ranks, bf16* const* out, int outs, std::size_t n);

// For code that moves numbers as well as bytes, which are never added.
inline void sum_ranks(const std::uint8_t* const*, int, std::uint8_t* const*, int, std::size_t) { std::abort(); }

// sum[n] += x[n]
template <class T>
void add(T* sum, const T* x, std::size_t n) {
  const T* in[] = {sum, x};
  sum_ranks(in, 2, &sum, 1, n);
}

}  // namespace fastdp::comm
