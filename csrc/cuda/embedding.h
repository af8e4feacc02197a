// Squared norms of an embedding table's per-sample gradients, without the table: the rows of b that a record's equal
// ids have are summed, then squared. A warp has 256 columns of one position at a time; if no position before has its
// id, it adds up the rows of all that have it. Each row is read once, E sizeof(T) bytes, for E additions in double, and
// T ids T / 64 times per 256 columns, mostly from the first-level cache.
#pragma once

#include <cstdint>

#include "block.h"

namespace fastdp::cuda {

#if defined(__CUDA_ARCH__)
FASTDP_DEVICE int lowest_bit(uint32_t x) { return __ffs(static_cast<int>(x)) - 1; }
#else
FASTDP_DEVICE int lowest_bit(uint32_t x) { return __builtin_ctz(x); }
#endif

template <class T>
struct EmbeddingSquares {
  static constexpr const char* kName = "embedding_sq_norms";
  static constexpr int kThreads = 512;  // 56 registers: 2 blocks of an SM
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kEach = 8, kWidth = kEach * kWarp;  // columns of a thread, and of a warp
  static constexpr int kPer = Pack<T>::kCount, kPacks = kEach / kPer;
  struct Shared {
    double warps[kWarps];
  };

  const int64_t* index;  // [b.records, b.positions]
  Sequences<T> b;
  int64_t padding_index;
  double* out;

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    const int64_t* ids = index + c.block() * b.positions;
    const Rows<T> rows = b.record(c.block());
    const int64_t parts = (b.n + kWidth - 1) / kWidth;
    double sum = 0.0;
    for (int64_t i = c.warp(); i < b.positions * parts; i += kWarps)
      if (is_first(c, ids, i / parts)) sum += square_of_sum(c, ids, i / parts, rows, i % parts * kWidth);
    sum = block_sum(c, s.warps, sum);
    if (c.thread() == 0) out[c.block()] += sum;
  }

 private:
  template <class Context>
  FASTDP_DEVICE bool is_first(Context& c, const int64_t* ids, int64_t t) const {
    const int64_t id = ids[t];
    if (id == padding_index) return false;
    for (int64_t from = 0; from < t; from += kWarp) {
      const int64_t u = from + c.lane();
      if (c.ballot(u < t && ids[u] == id) != 0) return false;
    }
    return true;
  }

  // This lane's share of |sum of rows u >= t whose id is that of t|^2, of columns left to left + kWidth - 1.
  template <class Context>
  FASTDP_DEVICE double square_of_sum(Context& c, const int64_t* ids, int64_t t, Rows<T> rows, int64_t left) const {
    double sums[kPacks][kPer] = {};
    for (int64_t from = t; from < rows.rows; from += kWarp) {
      const int64_t u = from + c.lane();
      uint32_t equal = c.ballot(u < rows.rows && ids[u] == ids[t]);
      for (; equal != 0; equal &= equal - 1) add(c, rows.row(from + lowest_bit(equal)) + left, rows.n - left, sums);
    }
    double square = 0.0;
    FASTDP_UNROLL
    for (int p = 0; p < kPacks; ++p) FASTDP_UNROLL
    for (int j = 0; j < kPer; ++j) square = fused(sums[p][j], sums[p][j], square);
    return square;
  }

  template <class Context>
  FASTDP_DEVICE void add(Context& c, const T* row, int64_t n, double (&sums)[kPacks][kPer]) const {
    FASTDP_UNROLL
    for (int p = 0; p < kPacks; ++p) {
      const int64_t column = (p * kWarp + c.lane()) * kPer;  // a warp's packs are adjacent
      Pack<T> x[1];
      load_packs(row + column, n - column, x);
      FASTDP_UNROLL
      for (int j = 0; j < kPer; ++j) sums[p][j] += load(x[0].at[j]);
    }
  }
};

// out[B] += squared norms of the table's gradients, of sum_{t: index_t = id} b_t for each id but padding_index (-1:
// none)
template <class T, class Launcher>
void embedding_sq_norms(Launcher& on, const int64_t* index, Sequences<T> b, int64_t padding_index, double* out) {
  on.run(EmbeddingSquares<T>{index, b, padding_index, out}, b.records);
}

}  // namespace fastdp::cuda
