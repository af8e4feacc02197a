#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../common.h"
#include "work.h"

namespace fastdp::comm {

// A sum of bfloat16 by messages, in float32: partial sums are never rounded to bfloat16.
class Widened final : public Work {
 public:
  Widened(bf16* x, std::size_t count, const std::function<std::unique_ptr<Work>(float*)>& sum) : x_(x), wide_(count) {
    for (std::size_t i = 0; i < count; ++i) wide_[i] = load(x[i]);
    sum_ = sum(wide_.data());
    if (sum_->done()) finish();
  }
  bool advance() override {
    const bool moved = sum_->advance();
    if (sum_->done()) finish();
    return moved;
  }
  bool done() const override { return sum_->done(); }
  std::string missing() const override { return sum_->missing(); }
  void check() const override { sum_->check(); }
  double grace() const override { return sum_->grace(); }
  void sleep(std::chrono::microseconds at_most) const override { sum_->sleep(at_most); }

 private:
  void finish() {
    for (std::size_t i = 0; i < wide_.size(); ++i) store(x_[i], wide_[i]);
  }

  bf16* x_;
  std::vector<float> wide_;
  std::unique_ptr<Work> sum_;
};

}  // namespace fastdp::comm
