#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "transport.h"

namespace fastdp::comm {

// Rows of a table: indices [count], and the rows' values one after the other.
struct RowList {
  const std::int64_t* indices;
  std::size_t count;
  const void* values;
};

// The sum of lists of rows: rows of the same index are added up in the order of the lists, and within one in its order.
// Indices must lie in [0, table).
class RowSum {
 public:
  RowSum(std::vector<RowList> lists, std::int64_t table) : lists_(std::move(lists)) {
    for (const RowList& list : lists_) ends_.push_back(list.count + (ends_.empty() ? 0 : ends_.back()));
    const std::size_t rows = ends_.empty() ? 0 : ends_.back();
    bits_ = std::bit_width(rows);
    if (bits_ + std::bit_width(static_cast<std::uint64_t>(table)) > 64)
      throw Failure("too many rows of too long a table");
    entries_.reserve(rows);
    for (const RowList& list : lists_)
      for (std::size_t i = 0; i < list.count; ++i)
        entries_.push_back(static_cast<std::uint64_t>(list.indices[i]) << bits_ | entries_.size());
    sort(std::bit_width(static_cast<std::uint64_t>(table)));
    for (std::size_t i = 0; i < rows; ++i) count_ += i == 0 || index(i) != index(i - 1);
  }

  std::size_t count() const { return count_; }

  // indices [count], ascending, and sums [count, width]
  template <class T>
  void write(std::size_t width, std::int64_t* indices, T* sums) const {
    std::size_t row = 0;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (i + kAhead < entries_.size()) prefetch(values<T>(i + kAhead, width), width);
      const T* value = values<T>(i, width);
      if (i == 0 || index(i) != index(i - 1)) {
        indices[row] = static_cast<std::int64_t>(index(i));
        std::memcpy(sums + row++ * width, value, width * sizeof(T));
        continue;
      }
      T* sum = sums + (row - 1) * width;
      for (std::size_t k = 0; k < width; ++k) sum[k] += value[k];
    }
  }

 private:
  static constexpr std::size_t kAhead = 4;  // rows lie anywhere
  static constexpr int kBits = 11;          // of a pass: its 2048 counters stay in the first-level cache

  std::uint64_t index(std::size_t i) const { return entries_[i] >> bits_; }

  template <class T>
  const T* values(std::size_t i, std::size_t width) const {
    const std::size_t position = entries_[i] & ((std::uint64_t{1} << bits_) - 1);
    std::size_t list = 0;
    while (position >= ends_[list]) ++list;
    const std::size_t first = list == 0 ? 0 : ends_[list - 1];
    return static_cast<const T*>(lists_[list].values) + (position - first) * width;
  }

  template <class T>
  static void prefetch(const T* row, std::size_t width) {
    for (std::size_t byte = 0; byte < std::min<std::size_t>(width * sizeof(T), 512); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
  }

  // By index, stable: from the lowest of its bits on. 2 ns an entry and pass, where std::stable_sort takes 40 an entry.
  void sort(int index_bits) {
    std::vector<std::uint64_t> other(entries_.size());
    for (int shift = bits_; shift < bits_ + index_bits; shift += kBits) {
      std::array<std::size_t, (1 << kBits) + 1> begins{};
      const auto digit = [&](std::uint64_t entry) { return entry >> shift & ((1 << kBits) - 1); };
      for (const std::uint64_t entry : entries_) ++begins[digit(entry) + 1];
      for (std::size_t d = 1; d < begins.size(); ++d) begins[d] += begins[d - 1];
      for (const std::uint64_t entry : entries_) other[begins[digit(entry)]++] = entry;
      std::swap(entries_, other);
    }
  }

  std::vector<RowList> lists_;
  std::vector<std::size_t> ends_;       // positions at which lists end
  int bits_;                            // of a position
  std::vector<std::uint64_t> entries_;  // index, position
  std::size_t count_ = 0;
};

}  // namespace fastdp::comm
