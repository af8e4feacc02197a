#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "transport.h"
#include "work.h"

namespace fastdp::comm {

// Binomial tree over ranks numbered from the root, pipelined by segments: a rank forwards one while the next arrives.
// data [bytes] must outlive the transport's requests if it is given up.
class TreeBroadcast final : public Work {
 public:
  TreeBroadcast(Transport& transport, std::byte* data, std::size_t bytes, int root, std::size_t segment_bytes)
      : transport_(transport),
        data_(data),
        bytes_(bytes),
        segment_bytes_(segment_bytes),
        segments_((bytes + segment_bytes - 1) / segment_bytes) {
    const int size = transport.size(), from_root = (transport.rank() - root + size) % size;
    const auto rank_of = [&](int position) { return (position + root) % size; };
    // Clearing the lowest set bit leads to the parent; setting a lower one to a child. Far children first: they have
    // the most to forward.
    is_root_ = from_root == 0;
    parent_ = rank_of(from_root & (from_root - 1));
    for (int bit = 1; bit < size && !(from_root & bit); bit *= 2)
      if (from_root + bit < size) children_.insert(children_.begin(), rank_of(from_root + bit));
  }

  bool done() const override { return forwarded_ == segments_ && sent_ == forwarded_; }

  bool advance() override {
    constexpr auto channel = Transport::Channel::data;
    for (; !is_root_ && posted_ < segments_ && posted_ < forwarded_ + kInFlight; ++posted_)
      receives_[posted_ % kInFlight] = transport_.receive(at(posted_), length(posted_), parent_, channel);
    bool moved = false;
    if (sent_ < forwarded_ && sent(sends_[sent_ % kInFlight])) ++sent_, moved = true;
    if (forwarded_ < segments_ && forwarded_ < sent_ + kInFlight &&
        (is_root_ || transport_.test(receives_[forwarded_ % kInFlight]))) {
      for (const int child : children_)
        sends_[forwarded_ % kInFlight].push_back(transport_.send(at(forwarded_), length(forwarded_), child, channel));
      ++forwarded_, moved = true;
    }
    return moved;
  }

  std::string missing() const override {
    if (!is_root_ && forwarded_ < posted_) return "rank " + std::to_string(transport_.name(parent_)) + " sent nothing";
    return "rank " + std::to_string(transport_.name(children_.at(taken_))) + " took nothing";
  }

 private:
  static constexpr std::size_t kInFlight = 2;  // segments

  std::byte* at(std::size_t segment) { return data_ + segment * segment_bytes_; }
  std::size_t length(std::size_t segment) const { return std::min(segment_bytes_, bytes_ - segment * segment_bytes_); }

  // To all children, of one segment.
  bool sent(std::vector<Transport::Request>& requests) {
    while (taken_ < requests.size() && transport_.test(requests[taken_])) ++taken_;
    if (taken_ < requests.size()) return false;
    requests.clear(), taken_ = 0;
    return true;
  }

  Transport& transport_;
  std::byte* data_;
  std::size_t bytes_, segment_bytes_, segments_;
  bool is_root_;
  int parent_;
  std::vector<int> children_;
  std::array<Transport::Request, kInFlight> receives_{};
  std::array<std::vector<Transport::Request>, kInFlight> sends_;
  std::size_t posted_ = 0, forwarded_ = 0, sent_ = 0;  // segments
  std::size_t taken_ = 0;                              // by so many children, of segment sent_
};

}  // namespace fastdp::comm
