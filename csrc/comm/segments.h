#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "header.h"
#include "shared_memory.h"

namespace fastdp::comm {

// Memory of a host in which each of its ranks has a part, and tensors in it.
struct Segment {
  std::weak_ptr<SharedMemory> memory;  // its tensors keep it
  std::byte* begin;
  std::int64_t number;  // the same on all ranks
  std::size_t part_bytes;
};

// Those of this process, `rank` on its host.
class Segments {
 public:
  void add(const std::shared_ptr<SharedMemory>& memory, std::int64_t number, std::size_t part_bytes, int rank) {
    std::erase_if(segments_, [](const Segment& segment) { return segment.memory.expired(); });
    segments_.push_back({memory, memory->data(), number, part_bytes});
    rank_ = rank;
  }

  // The numbers of those that some tensor of this rank keeps.
  std::vector<std::int64_t> kept() const {
    std::vector<std::int64_t> numbers;
    for (const Segment& segment : segments_)
      if (!segment.memory.expired()) numbers.push_back(segment.number);
    return numbers;
  }

  // Of what lies in this rank's own part of a segment.
  Place place_of(const void* data) const {
    const auto* at = static_cast<const std::byte*>(data);
    for (const Segment& segment : segments_) {
      const std::byte* part = segment.begin + rank_ * segment.part_bytes;
      if (part <= at && at < part + segment.part_bytes && !segment.memory.expired()) return {segment.number, at - part};
    }
    return {};
  }

  // Where rank `of` of this host has what it says lies at `place`; null if in memory of its own. It stays while this
  // rank's tensor does.
  template <class T>
  T* at(const Place& place, int of) const {
    for (const Segment& segment : segments_)
      if (segment.number == place.segment && !segment.memory.expired())
        return reinterpret_cast<T*>(segment.begin + of * segment.part_bytes + place.offset);
    return nullptr;
  }

 private:
  int rank_ = 0;
  std::vector<Segment> segments_;
};

}  // namespace fastdp::comm
