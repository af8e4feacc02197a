#pragma once

#include <sched.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "transport.h"
#include "work.h"

namespace fastdp::comm {

struct WaitPolicy {
  double timeout_seconds;
  // Now and then while nothing moves: throws, which ends the wait, on a signal or when a peer is known to be gone.
  std::function<void()> check;
  // When a wait turns out not to be short.
  std::function<void()> let_go = [] {};
  // 0 when ranks outnumber cores: sched_yield does not give way among waiting ranks. With 8 ranks on 2 cores a ring of
  // 4 bytes takes 14 ms with 2 ms of yielding, 2 ms without. With a core per rank, sleeping at once would cost 70 µs.
  std::chrono::microseconds yield_for{2000};
  // Whether waits begin by polling without giving way. Not between hosts: the network is asked by a system call that
  // takes as long as giving way, and ranks that share cores with others gain 5 to 10 % of 64 KiB on 2 or 4 hosts.
  bool spin = true;
};

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

// Waiting for other ranks without hanging, and without starving them when ranks outnumber cores.
// A wait ends in a Failure when nothing has moved for `timeout` seconds: a long transfer that moves is never cut off.
class Wait {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Wait(const WaitPolicy& policy) : policy_(policy) {}

  // Until it is done.
  void finish(Work& work) {
    while (!work.done()) {
      if (work.advance())
        progressed();
      else
        pause(work);
    }
  }

  void progressed() {
    polls_ = 0;
    // A transfer that never stalls must notice Ctrl-C too; 64 segments of 256 KiB take about 10 ms.
    if (++progress_ % 64 == 0 && due(Clock::now())) policy_.check();
  }

  // After an attempt that moved nothing.
  void pause(const Work& work) {
    if (policy_.spin && ++polls_ < kSpins && !spun_enough()) return polls_ > kHotSpins ? relax() : void();
    const auto idle = check_deadline(work);
    if (idle < policy_.yield_for) {
      sched_yield();
    } else {
      work.sleep(kCheckEvery);
    }
  }

  // The same without waiting, for those who come back later.
  std::chrono::duration<double> check_deadline(const Work& work) {
    const auto now = Clock::now();
    if (polls_ <= kSpins) {
      idle_since_ = now, polls_ = kSpins + 1;
      policy_.let_go();
    }
    const std::chrono::duration<double> idle = now - idle_since_;
    if (idle.count() > policy_.timeout_seconds && idle.count() > policy_.timeout_seconds + work.grace())
      throw Failure(work.missing() + " within " + seconds(policy_.timeout_seconds), Failure::Peers::missing);
    if (due(now)) {
      work.check();
      policy_.check();
    }
    return idle;
  }

 private:
  // Spinning covers the 5 µs that a small message needs, no more, since the rank waited for may need this core. A poll
  // takes 10 to 50 ns in memory that ranks share, 0.4 to 1 µs where MPI asks the network.
  static constexpr std::uint64_t kSpins = 200, kHotSpins = 100, kPollsPerLook = 8;
  static constexpr auto kSpinFor = std::chrono::microseconds(5);
  static constexpr auto kCheckEvery = std::chrono::milliseconds(50);

  bool spun_enough() {
    if (polls_ % kPollsPerLook != 0) return false;
    const auto now = Clock::now();
    if (polls_ == kPollsPerLook) spinning_since_ = now;
    if (now - spinning_since_ < kSpinFor) return false;
    polls_ = kSpins;
    return true;
  }

  bool due(Clock::time_point now) {
    if (checked_ == Clock::time_point{}) checked_ = now;
    if (now - checked_ < kCheckEvery) return false;
    checked_ = now;
    return true;
  }

  static std::string seconds(double value) {
    auto text = std::to_string(value);
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
    return text + " s";
  }

  const WaitPolicy& policy_;
  std::uint64_t polls_ = 0;
  std::uint64_t progress_ = 0;
  Clock::time_point spinning_since_{}, idle_since_{}, checked_{};
};

}  // namespace fastdp::comm
