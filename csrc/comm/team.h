#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "header.h"
#include "process.h"
#include "stream.h"
#include "transport.h"

namespace fastdp::comm {

// The ranks of one host, who meet in shared memory. Each has a seat with a counter of events that it alone moves; all
// ranks go through the same events in the same order, so "rank r has done what I wait for" is "its counter has reached
// n". What a rank wrote before an event is seen by those who have seen the event.
class Team {
 public:
  // What a rank says when it enters a collective; in the cache line of its counter, so that hearing it costs nothing
  // more.
  struct Call {
    std::uint64_t digest = 0;                 // of what all must call alike, Header::digest
    std::int64_t place = -1, out_place = -1;  // packed; of an all-reduce
    bool in_segment() const { return place >= 0 && out_place >= 0; }
  };

  // The data of a small collective, or the header of one that not all call alike. Two for each rank, used in turn: when
  // a rank writes the one of collective n + 2, everybody has entered n + 1, and so has done with n.
  static constexpr std::size_t kLetterBytes = 4 * 1024;
  struct Letter {
    alignas(64) std::byte data[kLetterBytes];
  };
  // Whether a sum of so many bytes goes by letter. What the others can reach where it lies costs fewer cache lines that
  // change hands, but one more meeting.
  static bool fits_letter(std::size_t bytes, bool in_segment) { return bytes <= (in_segment ? 512 : kLetterBytes); }
  static constexpr int kMaxRanks = 1024;  // of one host

  // Room of each rank for data on its way, used in turn, by collectives too: a slot that its reader still has in its
  // second-level cache costs 7.5 ns a line to write, one that has left it 1.6. More than these cost more than they
  // give: 4 MiB take 15 % longer with 16.
  static constexpr std::size_t kSlots = 10, kSlotBytes = 128 * 1024;

  static std::size_t bytes(int ranks) { return sizeof(Board) + ranks * sizeof(PerRank); }

  // In `memory` [bytes(ranks)], zeros at the beginning. names: the ranks' numbers among all.
  Team(std::byte* memory, int rank, std::vector<int> names, std::vector<Process> processes)
      : board_(std::launder(reinterpret_cast<Board*>(memory))),
        ranks_(std::launder(reinterpret_cast<PerRank*>(memory + sizeof(Board)))),
        rank_(rank),
        names_(std::move(names)),
        processes_(std::move(processes)) {}

  HandOver hand_over;
  bool among_hosts = false;  // some of these ranks wait for those of other hosts

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(names_.size()); }
  int name(int rank) const { return names_[rank]; }

  // This rank's next event has happened.
  void post() {
    post_and_ask();
    wake();
  }

  // The same for one who will ask about the others at once: those who sleep are woken then, and the store is not waited
  // for (100 ns of a small collective).
  void post_and_ask() {
    ranks_[rank_].seat.events.store(++events_, std::memory_order_release);
    owes_wake_ = true;
  }

  // What this rank says when it enters collective `sequence`, with its next event.
  void say(std::int64_t sequence, const Call& call) { ranks_[rank_].seat.calls[sequence % 2] = call; }
  const Call& call(int rank, std::int64_t sequence) const { return ranks_[rank].seat.calls[sequence % 2]; }

  // How many of its events this rank has posted.
  std::uint64_t events() const { return events_; }

  // A rank that has not posted event n yet, or -1.
  int lagging(std::uint64_t n) {
    int late = -1;
    for (int step = 1; step < size() && late < 0; ++step) {  // each begins with another
      const int rank = rank_ + step < size() ? rank_ + step : rank_ + step - size();
      if (ranks_[rank].seat.events.load(std::memory_order_acquire) < n) late = rank;
    }
    if (owes_wake_) wake();
    return late;
  }

  // Until `rank` has posted event n, or `at_most` has passed.
  void sleep(int rank, std::uint64_t n, std::chrono::microseconds at_most) const {
    const Seat& seat = ranks_[rank].seat;
    std::atomic<std::uint32_t>& sleepers = ranks_[rank].sleepers;
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    const std::uint64_t seen = seat.events.load(std::memory_order_seq_cst);
    if (seen < n) {
      const timespec time{at_most.count() / 1'000'000, at_most.count() % 1'000'000 * 1000};
      syscall(SYS_futex, word(seat), FUTEX_WAIT, static_cast<std::uint32_t>(seen), &time, nullptr, 0);
    }
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }

  Letter& letter(int rank, std::int64_t sequence) const { return ranks_[rank].letters[sequence % 2]; }
  // The number of the first of some slots. All ranks take as many.
  std::size_t take_slots(std::size_t count) { return (slots_taken_ += count) - count; }
  std::byte* slot(int rank, std::size_t number) const { return ranks_[rank].slots[number % kSlots]; }

  // Tells the others, once, why this rank gives up: they need not wait for their own deadline.
  void give_up(const std::string& reason) {
    std::uint32_t nobody = 0;
    if (!board_->state.compare_exchange_strong(nobody, 1)) return;
    const std::string text = "rank " + std::to_string(name(rank_)) + " gave up: " + reason;
    const std::size_t length = std::min(text.size(), sizeof board_->text - 1);
    std::memcpy(board_->text, text.data(), length);
    board_->text[length] = 0;
    board_->state.store(2, std::memory_order_release);
  }

  // This rank's program ends, and it will post nothing more.
  void leave() { ranks_[rank_].left.store(1, std::memory_order_release); }

  // Throws if one that has left has not posted event n, with its reason if it gave one.
  void check_left(std::uint64_t n) const {
    for (int rank = 0; rank < size(); ++rank) {
      if (ranks_[rank].left.load(std::memory_order_acquire) == 0 ||
          ranks_[rank].seat.events.load(std::memory_order_acquire) >= n)
        continue;
      check_given_up();
      throw Failure("rank " + std::to_string(name(rank)) + " has left: its program ends", Failure::Peers::missing);
    }
  }

  // Throws if a rank of this host has ended, or has given up.
  void check() const {
    for (int rank = 0; rank < size(); ++rank)
      if (rank != rank_ && processes_[rank].state() == Process::State::gone)
        throw Failure("rank " + std::to_string(name(rank)) + " is gone: its process " +
                          std::to_string(processes_[rank].id) + " has ended",
                      Failure::Peers::missing);
    check_given_up();
  }

  // The second half of it, a glance at memory that nobody writes while all is well. A rank that comes too late finds
  // all others there, but they have left since.
  void check_given_up() const {
    if (board_->state.load(std::memory_order_acquire) == 2) throw Failure(board_->text, Failure::Peers::missing);
  }

  // Whether one that has not posted event n is stopped: it waits for nobody.
  bool stopped_before(std::uint64_t n) const {
    for (int rank = 0; rank < size(); ++rank)
      if (ranks_[rank].seat.events.load(std::memory_order_acquire) < n &&
          processes_[rank].state() == Process::State::stopped)
        return true;
    return false;
  }

  // For an error's text: "; rank 1 is gone: its process 1234 has ended", "; process 1234 of rank 1 is stopped".
  std::string troubles() const {
    std::string text;
    for (int rank = 0; rank < size(); ++rank) {
      const Process::State state = processes_[rank].state();
      const std::string process = "process " + std::to_string(processes_[rank].id);
      if (state == Process::State::gone)
        text += "; rank " + std::to_string(name(rank)) + " is gone: its " + process + " has ended";
      if (state == Process::State::stopped)
        text += "; " + process + " of rank " + std::to_string(name(rank)) + " is stopped";
    }
    return text;
  }

  // For an error's text: "ranks 1, 3", those that have not posted event n.
  std::string absent(std::uint64_t n) const {
    std::string text;
    int late = 0;
    for (int rank = 0; rank < size(); ++rank) {
      if (rank == rank_ || ranks_[rank].seat.events.load(std::memory_order_acquire) >= n) continue;
      if (late++ != 0) text += ", ";
      text += std::to_string(name(rank));
    }
    return (late == 1 ? "rank " : "ranks ") + text;
  }

 private:
  struct alignas(64) Seat {
    std::atomic<std::uint64_t> events;
    Call calls[2];  // in turn, as letters
  };
  static_assert(sizeof(Seat) == 64);
  struct alignas(64) Board {
    std::atomic<std::uint32_t> state;  // 0: all is well; 1: the text is being written; 2: it is there
    char text[508];
  };
  struct PerRank {
    Seat seat;
    alignas(64) std::atomic<std::uint32_t> sleepers;
    std::atomic<std::uint32_t> left;
    Letter letters[2];
    alignas(64) std::byte slots[kSlots][kSlotBytes];
  };
  static_assert(std::atomic<std::uint64_t>::is_always_lock_free && std::atomic<std::uint32_t>::is_always_lock_free);

  // Sequentially consistent, as in sleep: either this rank sees the sleeper, or the sleeper sees the event.
  void wake() {
    owes_wake_ = false;
    std::atomic_thread_fence(std::memory_order_seq_cst);
    PerRank& mine = ranks_[rank_];
    if (mine.sleepers.load(std::memory_order_relaxed) != 0)
      syscall(SYS_futex, word(mine.seat), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }

  // The half of the counter that changes with every event.
  static const std::uint32_t* word(const Seat& seat) {
    const auto* halves = reinterpret_cast<const std::uint32_t*>(&seat.events);
    return halves + (std::endian::native == std::endian::big);
  }

  Board* board_;
  PerRank* ranks_;
  int rank_;
  std::vector<int> names_;
  std::vector<Process> processes_;
  std::uint64_t events_ = 0;
  std::size_t slots_taken_ = 0;
  bool owes_wake_ = false;
};

}  // namespace fastdp::comm
