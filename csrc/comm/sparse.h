#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "team.h"
#include "transport.h"

namespace fastdp::comm {

// Rows of a table: indices [count], and the rows' values one after the other.
struct RowList {
  const std::int64_t* indices;
  std::size_t count;
  const void* values;
};

// Where a rank of a host leaves its rows for the others: how many, indices, values. It does so after one meeting, and
// they read before the next but one.
struct RowRoom {
  static constexpr std::size_t kLine = 64;
  std::byte* begin;
  std::size_t count, row_bytes;

  std::byte* indices() const { return begin + kLine; }
  std::byte* values() const { return indices() + (count * sizeof(std::int64_t) + kLine - 1) / kLine * kLine; }
  bool fits() const {
    constexpr std::size_t bytes = Team::kSlots * Team::kSlotBytes;
    return count <= bytes / sizeof(std::int64_t) / 2 && (values() - begin) + count * row_bytes <= bytes;
  }
};

// Where they do not fit, only how many.
inline void leave_rows(Team& team, const RowList& rows, std::size_t row_bytes) {
  const RowRoom room{team.slot(team.rank(), 0), rows.count, row_bytes};
  std::memcpy(room.begin, &rows.count, sizeof rows.count);
  if (!room.fits()) return;
  team.hand_over(room.indices(), rows.indices, rows.count * sizeof(std::int64_t));
  team.hand_over(room.values(), rows.values, rows.count * row_bytes);
}

// Of all ranks; none where some do not fit.
inline std::vector<RowList> rows_left(const Team& team, std::size_t row_bytes) {
  std::vector<RowList> lists;
  for (int rank = 0; rank < team.size(); ++rank) {
    RowRoom room{team.slot(rank, 0), 0, row_bytes};
    std::memcpy(&room.count, room.begin, sizeof room.count);
    if (!room.fits()) return {};
    lists.push_back({reinterpret_cast<const std::int64_t*>(room.indices()), room.count, room.values()});
  }
  return lists;
}

// The first of indices [count] that is not in [0, table), or count.
inline std::size_t row_outside(const std::int64_t* indices, std::size_t count, std::int64_t table) {
  const auto outside = [=](std::int64_t index) { return index < 0 || index >= table; };
  return static_cast<std::size_t>(std::find_if(indices, indices + count, outside) - indices);
}

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
