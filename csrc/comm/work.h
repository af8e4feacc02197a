#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "transport.h"

namespace fastdp::comm {

// A collective under way, or a part of one. It never waits; wait.h does, or a caller who comes back later.
class Work {
 public:
  virtual ~Work() = default;
  // Moves what can be moved now; whether anything was. Not when it is done.
  virtual bool advance() = 0;
  virtual bool done() const = 0;
  // What it waits for, for an error's text; only while it is not done.
  virtual std::string missing() const = 0;
  // Seconds beyond the deadline, where those who are waited for may themselves wait for others: they tell more. A rank
  // that speaks for its host may wait for another of it, and that host's others for what comes from other hosts.
  virtual double grace() const { return 0.0; }
  static constexpr double kForOtherHosts = 1.0, kForOwnHost = 2.0;
  // Throws if what it waits for can never come.
  virtual void check() const {}
  // Until something may have moved, or `at_most` has passed. Messages make progress only when they are asked about:
  // this is 70 µs in effect, by the kernel's timer slack. Less slack and 5 µs of sleep took 130 ms for the ring of 4
  // bytes of 8 ranks on 2 cores that takes 2 ms so.
  virtual void sleep(std::chrono::microseconds at_most) const {
    std::this_thread::sleep_for(std::min(at_most, std::chrono::microseconds(20)));
  }
};

// One after the other; each is made when its turn comes.
class InTurn final : public Work {
 public:
  using Make = std::function<std::unique_ptr<Work>()>;

  explicit InTurn(std::vector<Make> parts) : parts_(std::move(parts)) {}

  bool advance() override {
    if (current_ == nullptr) current_ = parts_[next_++]();
    const bool moved = current_ != nullptr && !current_->done() && current_->advance();
    if (current_ != nullptr && !current_->done()) return moved;
    current_.reset();
    finished_ = next_ == parts_.size();
    return true;
  }
  bool done() const override { return finished_ || parts_.empty(); }
  std::string missing() const override { return current_ == nullptr ? "nothing" : current_->missing(); }
  double grace() const override { return current_ == nullptr ? 0.0 : current_->grace(); }
  void check() const override {
    if (current_ != nullptr) current_->check();
  }
  void sleep(std::chrono::microseconds at_most) const override {
    if (current_ != nullptr) current_->sleep(at_most);
  }

 private:
  std::vector<Make> parts_;
  std::unique_ptr<Work> current_;
  std::size_t next_ = 0;
  bool finished_ = false;
};

// A request of the transport, to be waited for.
class Pending final : public Work {
 public:
  Pending(Transport& transport, Transport::Request& request, std::function<std::string()> missing)
      : transport_(transport), request_(request), missing_(std::move(missing)) {}

  bool advance() override { return done_ = transport_.test(request_); }
  bool done() const override { return done_; }
  std::string missing() const override { return missing_(); }

 private:
  Transport& transport_;
  Transport::Request& request_;
  std::function<std::string()> missing_;
  bool done_ = false;
};

}  // namespace fastdp::comm
