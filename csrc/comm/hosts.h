#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "header.h"
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
    ranks_.resize(1 + *std::max_element(host.begin(), host.end()));
    for (std::size_t rank = 0; rank < host.size(); ++rank) ranks_[host[rank]].push_back(static_cast<int>(rank));
    leaders_ = ranks_[0].size();
    for (const auto& of : ranks_) leaders_ = std::min(leaders_, of.size());
    here_ = host[transport.rank()];
    const auto& local = ranks_[here_];
    const auto me = std::find(local.begin(), local.end(), transport.rank()) - local.begin();
    team_ = std::make_unique<Team>(memory_->data(), static_cast<int>(me), local, std::move(processes));
    team_->among_hosts = !single();
    if (static_cast<std::size_t>(me) >= leaders_) return;
    std::vector<int> column;
    for (const auto& of : ranks_) column.push_back(of[me]);
    column_ = std::make_unique<Subset>(transport, std::move(column), here_);
  }

  bool single() const { return ranks_.size() == 1; }

  // Everybody's header to `all` [ranks]: within the host by letter, between hosts by their first ranks. blocks outlives
  // the transport's requests if this is given up.
  std::unique_ptr<Work> exchange(const Header& mine, std::vector<std::vector<Header>>& blocks,
                                 std::vector<Header>& all) {
    const auto tell = [=, this]() -> std::unique_ptr<Work> {
      std::memcpy(team_->letter(team_->rank(), mine.sequence).data, &mine, sizeof mine);
      return std::make_unique<RollCall>(*team_, mine.sequence, Team::Call{});
    };
    const auto between = [=, this, &blocks]() -> std::unique_ptr<Work> {
      if (team_->rank() != 0) return nullptr;
      blocks.resize(ranks_.size());
      for (std::size_t host = 0; host < ranks_.size(); ++host) blocks[host].resize(ranks_[host].size());
      for (int rank = 0; rank < team_->size(); ++rank)
        std::memcpy(&blocks[here_][rank], team_->letter(rank, mine.sequence).data, sizeof mine);
      return std::make_unique<HeaderExchange>(*column_, blocks);
    };
    const auto publish = [this, &blocks, &all]() -> std::unique_ptr<Work> {
      if (team_->rank() == 0) {
        for (std::size_t host = 0; host < ranks_.size(); ++host)
          for (std::size_t i = 0; i < ranks_[host].size(); ++i) all[ranks_[host][i]] = blocks[host][i];
        if (all.size() * sizeof(Header) > Team::kSlots * Team::kSlotBytes) throw Failure("too many ranks");
        std::memcpy(team_->slot(0, 0), all.data(), all.size() * sizeof(Header));
      }
      return std::make_unique<Meeting>(*team_);
    };
    const auto read = [this, &all]() -> std::unique_ptr<Work> {
      if (team_->rank() != 0) std::memcpy(all.data(), team_->slot(0, 0), all.size() * sizeof(Header));
      return std::make_unique<Meeting>(*team_);  // the slot is free again
    };
    return std::make_unique<InTurn>(std::vector<InTurn::Make>{tell, between, publish, read});
  }

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
  std::vector<std::vector<int>> ranks_;  // of each host
  int here_ = 0;                         // this host
  std::size_t leaders_ = 0;              // ranks of each host that have a ring
  std::unique_ptr<Team> team_;
  std::unique_ptr<Subset> column_;  // none: not a leader
};

}  // namespace fastdp::comm
