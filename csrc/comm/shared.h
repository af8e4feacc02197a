#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "stream.h"
#include "sum.h"
#include "team.h"
#include "work.h"

namespace fastdp::comm {

// Collectives of one host: loads and stores. A sum is always taken in the order of ranks, 0 first, whatever the way.

// Waits for events of all others.
class TeamWork : public Work {
 public:
  explicit TeamWork(Team& team) : team_(team) {}
  std::string missing() const override { return team_.absent(awaited_) + " did not go on"; }
  void check() const override { team_.check_left(awaited_); }
  void sleep(std::chrono::microseconds at_most) const override {
    const int late = team_.lagging(awaited_);
    if (late >= 0) team_.sleep(late, awaited_, at_most);
  }

 protected:
  bool reached(std::uint64_t event) {
    awaited_ = event;
    return team_.lagging(event) < 0;
  }
  Team& team_;
  std::uint64_t awaited_ = 0;
};

// All ranks of the host have come here.
class Meeting : public TeamWork {
 public:
  explicit Meeting(Team& team) : TeamWork(team) { come(); }
  bool advance() override { return done_ = reached(awaited_); }
  bool done() const override { return done_; }
  double grace() const override { return team_.among_hosts && !team_.stopped_before(awaited_) ? kForOwnHost : 0.0; }

 protected:
  struct Later {};
  Meeting(Team& team, Later) : TeamWork(team) {}  // comes when it has done something else
  void come() {
    team_.post_and_ask();
    awaited_ = team_.events();
  }

 private:
  bool done_ = false;
};

// They have entered a collective, and what they said is there. Ranks that know so also know that all have done with the
// collective before.
class RollCall final : public Meeting {
 public:
  RollCall(Team& team, std::int64_t sequence, const Team::Call& mine) : Meeting(team, Later{}) {
    team.say(sequence, mine);
    come();
  }
  std::string missing() const override { return team_.absent(awaited_) + " did not call it"; }
  double grace() const override { return 0.0; }  // nobody who has not called it waits for others
};

// An all-reduce of tensors that all ranks can reach: each rank sums a part over all of them and stores it in each.
// in, out: of each rank, [count], the same or not overlapping.
template <class T>
class DirectSum final : public Meeting {
 public:
  // in, out: [ranks], spent.
  DirectSum(Team& team, const T** in, T** out, std::size_t count) : Meeting(team, Later{}) {
    // Parts end where cache lines do: two ranks that write to one would take it from each other.
    constexpr std::size_t line = 64 / sizeof(T);
    const std::size_t lines = (count + line - 1) / line, ranks = team.size(), rank = team.rank();
    const auto begin = [&](std::size_t r) { return std::min(count, (r * lines / ranks) * line); };
    for (std::size_t r = 0; r < ranks; ++r) in[r] += begin(rank), out[r] += begin(rank);
    sum_ranks(in, team.size(), out, team.size(), begin(rank + 1) - begin(rank));
    come();
  }
};

// Tensors in memory of their own pass through the slots of the team, piece by piece. The data has a part for each rank;
// in one round, a piece of each part:
//   stage    a rank copies its pieces of the others' parts to its slot,
//   reduce   sums the pieces of its own part over the ranks, to its tensor and to its slot, where that piece's place is
//            free,
//   collect  and copies the others' sums from their slots.
// An all-reduce does all three, a reduce-scatter the first two; an all-gather stages its own part and collects.
// Rounds overlap: while a rank stages round k, it reduces k-1 and collects k-2, so that nobody waits for the slowest in
// each step. A slot is used again after kSlots rounds, 5 or more: whoever has staged round k-2 has collected k-5, so
// the wait for staged pieces is enough.
template <class T>
class Staged final : public TeamWork {
 public:
  // x [parts.back()]; part r is [parts[r], parts[r + 1]).
  Staged(Team& team, Operation operation, T* x, std::vector<std::size_t> parts)
      : TeamWork(team),
        x_(x),
        parts_(std::move(parts)),
        reduces_(operation != Operation::all_gather),
        collects_(operation != Operation::reduce_scatter),
        piece_(std::max<std::size_t>(1, Team::kSlotBytes / sizeof(T) / team.size() / kLine * kLine)),
        in_(team.size()) {
    std::size_t longest = 0;
    for (int rank = 0; rank < team.size(); ++rank) longest = std::max(longest, parts_[rank + 1] - parts_[rank]);
    rounds_ = (longest + piece_ - 1) / piece_;
    first_ = team.events();
    slots_ = team.take_slots(rounds_);
  }

  bool done() const override { return at_ == 3 * (rounds_ + 2) || rounds_ == 0; }

  // Steps 3k, 3k + 1, 3k + 2: stage round k, reduce k - 1, collect k - 2.
  bool advance() override {
    bool moved = false;
    for (; !done(); ++at_, moved = true) {
      const std::size_t round = at_ / 3 - at_ % 3;
      if (at_ / 3 < at_ % 3 || round >= rounds_) continue;
      if (at_ % 3 == 0) {
        stage(round);
      } else if (at_ % 3 == 1) {
        if (!reached(first_ + staged(round))) break;
        if (reduces_) reduce(round);
      } else if (collects_) {
        if (!reached(first_ + (reduces_ ? reduced(round) : staged(round)))) break;
        collect(round);
      }
    }
    return moved;
  }

 private:
  static constexpr std::size_t kLine = 64 / sizeof(T), kBlock = 4096 / sizeof(T);

  // Numbers of events: stage 0, stage 1, reduce 0, stage 2, reduce 1, ..., reduce of the last.
  std::uint64_t staged(std::size_t round) const { return reduces_ && round > 0 ? 2 * round : round + 1; }
  std::uint64_t reduced(std::size_t round) const { return std::min(2 * round + 3, 2 * rounds_); }

  // Of part r in this round: where it begins in x, and its length.
  std::pair<std::size_t, std::size_t> piece(int part, std::size_t round) const {
    const std::size_t begin = std::min(parts_[part] + round * piece_, parts_[part + 1]);
    return {begin, std::min(piece_, parts_[part + 1] - begin)};
  }
  T* slot(int rank, std::size_t round, int part) const {
    return reinterpret_cast<T*>(team_.slot(rank, slots_ + round)) + part * piece_;
  }

  void stage(std::size_t round) {
    for (int part = 0; part < team_.size(); ++part) {
      if ((part == team_.rank()) == reduces_) continue;
      const auto [begin, count] = piece(part, round);
      team_.hand_over(slot(team_.rank(), round, part), x_ + begin, count * sizeof(T));
    }
    team_.post();
  }

  void reduce(std::size_t round) {
    const int me = team_.rank();
    const auto [begin, count] = piece(me, round);
    for (int rank = 0; rank < team_.size(); ++rank) in_[rank] = rank == me ? x_ + begin : slot(rank, round, me);
    // In blocks, which are copied while they are in the first-level cache.
    for (std::size_t at = 0; at < count; at += kBlock) {
      const std::size_t length = std::min(kBlock, count - at);
      T* sum = x_ + begin + at;
      sum_ranks(in_.data(), team_.size(), &sum, 1, length);
      if (collects_) team_.hand_over.again(slot(me, round, me) + at, sum, length * sizeof(T));
      for (const T*& in : in_) in += length;
    }
    team_.post();
  }

  void collect(std::size_t round) {
    for (int step = 1; step < team_.size(); ++step) {
      const int rank = (team_.rank() + step) % team_.size();
      const auto [begin, count] = piece(rank, round);
      if (count != 0) std::memcpy(x_ + begin, slot(rank, round, rank), count * sizeof(T));
    }
  }

  T* x_;
  std::vector<std::size_t> parts_;
  bool reduces_, collects_;
  std::size_t piece_, rounds_ = 0, at_ = 0, slots_;
  std::uint64_t first_ = 0;
  std::vector<const T*> in_;
};

}  // namespace fastdp::comm
