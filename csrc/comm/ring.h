#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "sum.h"
#include "transport.h"
#include "work.h"

namespace fastdp::comm {

// Ring all-reduce (Patarasuk & Yuan 2009): reduce-scatter, then all-gather, each of which is also a collective.
//   chunk    one of the P parts of the data; the unit of a step
//   segment  at most `segment` elements of a chunk; the unit of a message
// In step s of 2(P-1), rank r sends chunk r-1-s to r+1 and receives chunk r-2-s from r-1. In the first P-1 steps what
// arrives is added, and ends with chunk r complete on rank r; afterwards it is the sum. So chunk c is summed in the
// order c+1, c+2, ..., c (mod P), by one rank: bitwise the same everywhere and every time, and for both ways of asking.
// Each rank sends and receives 2(P-1)/P of the data, the least possible.

// Where chunks begin, and the last one ends: [ranks + 1]. As even as possible, the first ones longer by one.
inline std::vector<std::size_t> even_chunks(std::size_t count, int ranks) {
  std::vector<std::size_t> begins;
  for (std::size_t c = 0; c <= static_cast<std::size_t>(ranks); ++c)
    begins.push_back(c * (count / ranks) + std::min(c, count % ranks));
  return begins;
}

// The segments that cross one edge of the ring, in order: those of chunk `first`, first-1, ... (mod P).
class SegmentStream {
 public:
  struct Segment {
    std::size_t begin, count;  // elements
    bool reducing;
  };

  SegmentStream(std::span<const std::size_t> chunks, int first, int reducing_steps, std::size_t segment)
      : chunks_(chunks),
        ranks_(static_cast<int>(chunks.size()) - 1),
        first_(first),
        reducing_steps_(reducing_steps),
        segment_(segment) {}

  int first() const { return first_; }
  std::size_t segments_in(int steps) const {
    std::size_t total = 0;
    for (int step = 0; step < steps; ++step) total += segments_of(chunk_in(step));
    return total;
  }

  Segment next() {
    while (index_ == segments_of(chunk_in(step_))) ++step_, index_ = 0;  // chunks may be empty
    const int chunk = chunk_in(step_);
    const std::size_t begin = chunks_[chunk] + index_++ * segment_;
    return {begin, std::min(segment_, chunks_[chunk + 1] - begin), step_ < reducing_steps_};
  }

 private:
  std::size_t segments_of(int chunk) const { return (chunks_[chunk + 1] - chunks_[chunk] + segment_ - 1) / segment_; }
  int chunk_in(int step) const { return (first_ - step + 2 * ranks_) % ranks_; }

  std::span<const std::size_t> chunks_;
  int ranks_, first_, reducing_steps_;
  std::size_t segment_;
  int step_ = 0;
  std::size_t index_ = 0;  // of the next segment within the chunk of step_
};

// Two: one segment arrives while the one before is added.
inline constexpr std::size_t kReceiveBuffers = 2;
// Enough that a neighbour which was descheduled finds work when it returns; more only hold more requests.
inline constexpr std::size_t kSendsInFlight = 4;

// The steps that make up `operation`: all_reduce, reduce_scatter or all_gather. data [chunks.back()] in place; scratch
// [kReceiveBuffers * segment], unused by all_gather. Both must outlive the transport's requests if it is given up.
template <class T>
class Ring final : public Work {
 public:
  Ring(Transport& transport, Operation operation, T* data, std::vector<std::size_t> chunks, T* scratch,
       std::size_t segment)
      : transport_(transport),
        data_(data),
        scratch_(scratch),
        segment_(pipelined(chunks, segment)),
        chunks_(std::move(chunks)),
        next_((transport.rank() + 1) % transport.size()),
        previous_((transport.rank() + transport.size() - 1) % transport.size()),
        reducing_steps_(operation == Operation::all_gather ? 0 : transport.size() - 1),
        to_send_(chunks_, reducing_steps_ ? previous_ : transport.rank(), reducing_steps_, segment_),
        to_post_(chunks_, (to_send_.first() + transport.size() - 1) % transport.size(), reducing_steps_, segment_),
        to_use_(to_post_) {
    const int steps = reducing_steps_ + (operation == Operation::reduce_scatter ? 0 : transport.size() - 1);
    total_sends_ = to_send_.segments_in(steps);
    total_receives_ = to_post_.segments_in(steps);
    reducing_ = to_post_.segments_in(reducing_steps_);
    own_ = to_send_.segments_in(1);
  }
  Ring(const Ring&) = delete;  // the streams look at chunks_
  Ring& operator=(const Ring&) = delete;

  bool done() const override { return received_ == total_receives_ && sent_ == total_sends_; }

  bool advance() override {
    post();
    bool moved = false;
    if (received_ < posted_ && transport_.test(receives_[received_ % kReceiveBuffers])) {
      const auto [begin, length, reduce] = to_use_.next();
      if (reduce) add(data_ + begin, scratch_ + received_ % kReceiveBuffers * segment_, length);
      ++received_;
      moved = true;
    }
    if (sent_ < started_ && transport_.test(sends_[sent_ % kSendsInFlight])) {
      ++sent_;
      moved = true;
    }
    return moved;
  }

  std::string missing() const override {
    if (received_ < posted_)
      return "rank " + std::to_string(transport_.name(previous_)) + " sent nothing (segment " +
             std::to_string(received_) + " of " + std::to_string(total_receives_) +
             "; it may itself be waiting for another rank)";
    return "rank " + std::to_string(transport_.name(next_)) + " took nothing (segment " + std::to_string(sent_) +
           " of " + std::to_string(total_sends_) + ")";
  }
  double grace() const override { return transport_.between_hosts() ? kForOtherHosts : 0.0; }

 private:
  static constexpr std::size_t kLeastBytes = 64 * 1024;

  // Two segments of a chunk keep the wire busy while ranks add; messages below 64 KiB cost more than they give
  // where cores have more to do than the wire (4 hosts on 2 cores).
  static std::size_t pipelined(const std::vector<std::size_t>& chunks, std::size_t segment) {
    std::size_t longest = 0;
    for (std::size_t c = 1; c < chunks.size(); ++c) longest = std::max(longest, chunks[c] - chunks[c - 1]);
    return std::min(segment, std::max<std::size_t>((longest + 1) / 2, kLeastBytes / sizeof(T)));
  }

  void post() {
    constexpr auto channel = Transport::Channel::data;
    while (posted_ < total_receives_ && posted_ - received_ < kReceiveBuffers) {
      // After a reduce-scatter, the all-gather's n-th segment overwrites what the n-th send reads: chunks r-1, r-2, ...
      if (reducing_steps_ && posted_ >= reducing_ && sent_ <= posted_ - reducing_) break;
      const auto [begin, length, reduce] = to_post_.next();
      T* into = reduce ? scratch_ + posted_ % kReceiveBuffers * segment_ : data_ + begin;
      receives_[posted_++ % kReceiveBuffers] = transport_.receive(into, length * sizeof(T), previous_, channel);
    }
    // After the first chunk, what is sent is what has been received, in the same order.
    while (started_ < total_sends_ && started_ - sent_ < kSendsInFlight && started_ < own_ + received_) {
      const auto [begin, length, reduce] = to_send_.next();
      sends_[started_++ % kSendsInFlight] = transport_.send(data_ + begin, length * sizeof(T), next_, channel);
    }
  }

  Transport& transport_;
  T *data_, *scratch_;
  std::size_t segment_;
  std::vector<std::size_t> chunks_;
  int next_, previous_, reducing_steps_;
  SegmentStream to_send_, to_post_, to_use_;
  std::size_t total_sends_, total_receives_, reducing_, own_;
  std::array<Transport::Request, kReceiveBuffers> receives_{};
  std::array<Transport::Request, kSendsInFlight> sends_{};
  std::size_t posted_ = 0, received_ = 0, started_ = 0, sent_ = 0;
};

}  // namespace fastdp::comm
