// Rows in pieces of 16 bytes, the most that a thread loads at once.
#pragma once

#include <cstdint>

#include "half.h"
#include "lane.h"

namespace fastdp::cuda {

template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};

// from: aligned to 16
template <class T>
FASTDP_DEVICE Pack<T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}

// Elements from x on up to the next address that is aligned to 16.
template <class T>
FASTDP_BOTH int unaligned(const T* x) {
  return static_cast<int>(-reinterpret_cast<std::uintptr_t>(x) % 16 / sizeof(T));
}

// Whether each row is aligned to 16.
template <class T>
bool aligned(Rows<T> g) {
  return g.rows == 0 || (unaligned(g.data) == 0 && (g.rows == 1 || g.stride % Pack<T>::kCount == 0));
}

template <class T>
FASTDP_DEVICE double squares(const Pack<T>& x) {
  double sum = 0.0;
  FASTDP_UNROLL
  for (int j = 0; j < Pack<T>::kCount; ++j) {
    const double v = load(x.at[j]);
    sum = fused(v, v, sum);
  }
  return sum;
}

// The columns that one of kTeam threads has of a row, a pack at a time: adjacent ones where rows are aligned, and
// otherwise every kTeam-th, so that in both cases a warp's loads are of adjacent bytes.
template <class T, int kTeam, bool kAligned>
struct Columns {
  static constexpr int kPer = Pack<T>::kCount;
  int thread;

  FASTDP_DEVICE int at(int pack, int j) const {
    return kAligned ? (pack * kTeam + thread) * kPer + j : (pack * kPer + j) * kTeam + thread;
  }

  // 0 where the row, of n elements, has no such column.
  FASTDP_DEVICE Pack<T> load(const T* row, int n, int pack) const {
    if (kAligned && at(pack, kPer - 1) < n) return load_pack(row + at(pack, 0));
    Pack<T> x;
    FASTDP_UNROLL
    for (int j = 0; j < kPer; ++j) x.at[j] = at(pack, j) < n ? row[at(pack, j)] : T{};
    return x;
  }
};

}  // namespace fastdp::cuda
