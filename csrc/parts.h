// How the operations cut their work: what ops.cpp and clip_sum.cpp share.
#pragma once

#include <algorithm>

#include "common.h"

namespace fastdp {

// Elements per part of work: 16384 floats take 3 us, several times what waking the team costs.
inline constexpr int64_t kPart = 16384;

// Rows that are read side by side: see square_rows and accumulate_rows.
inline constexpr int64_t kRows = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// at most `width` columns
template <class T>
Rows<T> columns(Rows<T> g, int64_t from, int64_t width) {
  return {g.data + from, g.rows, std::min(width, g.n - from), g.stride};
}

inline double sum_pieces(const double* partial, int64_t pieces, int64_t stride) {
  double sum = 0.0;
  for (int64_t piece = 0; piece < pieces; ++piece) sum += partial[piece * stride];
  return sum;
}

}  // namespace fastdp
