#pragma once

#include <sched.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>

#include "transport.h"

namespace fastdp::comm {

struct WaitPolicy {
  double timeout_seconds;
  std::function<void()> check_signals;  // may throw, which ends the wait
  // 0 when ranks outnumber cores: sched_yield does not give way among waiting ranks. With 8 ranks on 2 cores a ring of
  // 4 bytes takes 14 ms with 2 ms of yielding, 2 ms without. With a core per rank, sleeping at once would cost 70 µs.
  std::chrono::microseconds yield_for{2000};
};

// Waiting for other ranks without hanging, and without starving them when ranks outnumber cores.
// A wait ends in a Failure when nothing has arrived for `timeout` seconds: a long transfer that moves is never cut off.
class Wait {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Wait(const WaitPolicy& policy) : policy_(policy) {}

  void progressed() {
    polls_ = 0;
    // A transfer that never stalls must notice Ctrl-C too; 64 segments of 256 KiB take about 10 ms.
    if (++progress_ % 64 == 0) check_signals_if_due(Clock::now());
  }

  // Called after a poll that found nothing. `what` is asked only on failure: what was waited for.
  template <class What>
  void pause(What what) {
    if (++polls_ < kSpins) return;
    const auto now = Clock::now();
    if (polls_ == kSpins) idle_since_ = now;
    const std::chrono::duration<double> idle = now - idle_since_;
    if (idle.count() > policy_.timeout_seconds) throw Failure(what() + " within " + seconds(policy_.timeout_seconds));
    check_signals_if_due(now);
    if (idle < policy_.yield_for) {
      sched_yield();
    } else {
      std::this_thread::sleep_for(kSleep);
    }
  }

 private:
  // A poll takes about 50 ns: spinning covers the 5 µs that a small message needs, no more, since the rank waited for
  // may need this core.
  static constexpr std::uint64_t kSpins = 100;
  // 70 µs in effect, by the kernel's timer slack. Less slack and 5 µs of sleep took 130 ms for the ring above.
  static constexpr auto kSleep = std::chrono::microseconds(20);
  static constexpr auto kSignalsEvery = std::chrono::milliseconds(50);

  void check_signals_if_due(Clock::time_point now) {
    if (now - signals_checked_ < kSignalsEvery) return;
    signals_checked_ = now;
    policy_.check_signals();
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
  Clock::time_point idle_since_{};
  Clock::time_point signals_checked_ = Clock::now();
};

// Until one request is complete.
template <class What>
void complete(Transport& transport, Wait& wait, Transport::Request& request, What what) {
  while (!transport.test(request)) wait.pause(what);
  wait.progressed();
}

}  // namespace fastdp::comm
