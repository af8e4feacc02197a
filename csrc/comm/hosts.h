#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ring.h"
#include "shared.h"
#include "shared_memory.h"
#include "team.h"
#include "transport.h"

namespace fastdp::comm {

// Which ranks share memory with which, seen from this rank, and the sum that makes use of it: within each host by
// loads and stores, between hosts by rings, of which each joins one rank of every host and sums one part of the data.
class Hosts {
 public:
  // host [ranks]: a number for each rank's host. memory: this host's, Team::bytes of its ranks.
  Hosts(Transport& transport, const std::vector<int>& host, std::shared_ptr<SharedMemory> memory,
        std::vector<Process> processes)
      : memory_(std::move(memory)) {
    const int hosts = 1 + *std::max_element(host.begin(), host.end());
    std::vector<std::vector<int>> ranks(hosts);
    for (std::size_t rank = 0; rank < host.size(); ++rank) ranks[host[rank]].push_back(static_cast<int>(rank));
    leaders_ = ranks[0].size();
    for (const auto& of : ranks) leaders_ = std::min(leaders_, of.size());
    const int here = host[transport.rank()];
    const auto me = std::find(ranks[here].begin(), ranks[here].end(), transport.rank()) - ranks[here].begin();
    team_ = std::make_unique<Team>(memory_->data(), static_cast<int>(me), ranks[here], std::move(processes));
    single_ = hosts == 1;
    if (static_cast<std::size_t>(me) >= leaders_) return;
    std::vector<int> column;
    for (const auto& of : ranks) column.push_back(of[me]);
    column_ = std::make_unique<Subset>(transport, std::move(column), here);
  }

  bool single() const { return single_; }
  Team& team() { return *team_; }

  // x [count] in place; scratch as for a ring.
  template <class T>
  std::unique_ptr<Work> all_reduce(T* x, std::size_t count, T* scratch, std::size_t segment) {
    // In blocks, so that ranks which wait for their host's leaders see them come forward.
    const std::size_t block = kBlockBytes / sizeof(T);
    std::vector<InTurn::Make> turns;
    for (std::size_t begin = 0; begin < count; begin += block) {
      T* at = x + begin;
      const std::vector<std::size_t> parts = parts_of(std::min(block, count - begin));
      turns.push_back([=, this] { return std::make_unique<Staged<T>>(*team_, Operation::reduce_scatter, at, parts); });
      turns.push_back([=, this]() -> std::unique_ptr<Work> {
        if (column_ == nullptr) return nullptr;
        const std::size_t first = parts[team_->rank()], length = parts[team_->rank() + 1] - first;
        return std::make_unique<Ring<T>>(*column_, Operation::all_reduce, at + first,
                                         even_chunks(length, column_->size()), scratch, segment);
      });
      turns.push_back([this] { return std::make_unique<Meeting>(*team_); });  // all are done with the slots
      turns.push_back([=, this] { return std::make_unique<Staged<T>>(*team_, Operation::all_gather, at, parts); });
      turns.push_back([this] { return std::make_unique<Meeting>(*team_); });
    }
    return std::make_unique<InTurn>(std::move(turns));
  }

 private:
  static constexpr std::size_t kBlockBytes = std::size_t{16} << 20;

  // Of `count` elements, which each rank of this host sums: ranks beyond the leaders none.
  std::vector<std::size_t> parts_of(std::size_t count) const {
    std::vector<std::size_t> parts = even_chunks(count, static_cast<int>(leaders_));
    parts.resize(team_->size() + 1, count);
    return parts;
  }

  std::shared_ptr<SharedMemory> memory_;
  std::size_t leaders_ = 0;  // ranks of each host that have a ring
  bool single_ = true;
  std::unique_ptr<Team> team_;
  std::unique_ptr<Subset> column_;  // none: not a leader
};

}  // namespace fastdp::comm
