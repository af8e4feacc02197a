#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <type_traits>

#include "transport.h"
#include "wait.h"

namespace fastdp::comm {

// Ring all-reduce (Patarasuk & Yuan 2009): reduce-scatter, then all-gather.
//   chunk    one of the P parts of the data, as even as possible; the unit of a step
//   segment  at most `segment` elements of a chunk; the unit of a message
// In step s of 2(P-1), rank r sends chunk r-s to r+1 and receives chunk r-s-1 from r-1. In the first P-1 steps what
// arrives is added, afterwards it is the sum. So chunk c is summed in the order c, c+1, ..., c-1 (mod P), by one rank:
// bitwise the same everywhere and every time. Each rank sends and receives 2(P-1)/P of the data, the least possible.

// The segments that cross one edge of the ring, in order: those of chunk `first`, first-1, ... (mod P).
class SegmentStream {
 public:
  struct Segment {
    std::size_t begin, count;  // elements
    bool reducing;
  };

  SegmentStream(std::size_t count, int ranks, int first, std::size_t segment)
      : count_(count), ranks_(ranks), first_(first), segment_(segment) {}

  std::size_t chunk_begin(int chunk) const {
    const std::size_t part = count_ / ranks_, rest = count_ % ranks_, c = chunk;
    return c * part + std::min(c, rest);
  }
  std::size_t segments_of(int chunk) const {
    return (chunk_begin(chunk + 1) - chunk_begin(chunk) + segment_ - 1) / segment_;
  }
  std::size_t segments_in(int steps) const {
    std::size_t total = 0;
    for (int step = 0; step < steps; ++step) total += segments_of(chunk_in(step));
    return total;
  }

  Segment next() {
    while (index_ == segments_of(chunk_in(step_))) ++step_, index_ = 0;  // chunks are empty when P > count
    const int chunk = chunk_in(step_);
    const std::size_t begin = chunk_begin(chunk) + index_++ * segment_;
    return {begin, std::min(segment_, chunk_begin(chunk + 1) - begin), step_ < ranks_ - 1};
  }

 private:
  int chunk_in(int step) const { return (first_ - step + 2 * ranks_) % ranks_; }

  std::size_t count_;
  int ranks_, first_;
  std::size_t segment_;
  int step_ = 0;
  std::size_t index_ = 0;  // of the next segment within the chunk of step_
};

template <class T>
void add(T* __restrict sum, const T* __restrict x, std::size_t count) {
  // Integers wrap, as they do in MPI and in torch; signed overflow would be undefined.
  using U = typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::type_identity<T>>::type;
  for (std::size_t i = 0; i < count; ++i) sum[i] = static_cast<T>(static_cast<U>(sum[i]) + static_cast<U>(x[i]));
}

// Two: one segment arrives while the one before is added.
inline constexpr std::size_t kReceiveBuffers = 2;
// Enough that a neighbour which was descheduled finds work when it returns; more only hold more requests.
inline constexpr std::size_t kSendsInFlight = 4;

// data [count] in place; scratch [kReceiveBuffers * segment]. Both must outlive the transport's requests if this
// throws.
template <class T>
void ring_all_reduce(Transport& transport, Wait& wait, T* data, std::size_t count, T* scratch, std::size_t segment) {
  const int ranks = transport.size(), rank = transport.rank();
  const int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
  constexpr auto channel = Transport::Channel::data;

  SegmentStream to_send(count, ranks, rank, segment);
  SegmentStream to_post(count, ranks, previous, segment);
  SegmentStream to_use = to_post;
  const std::size_t total_sends = to_send.segments_in(2 * (ranks - 1));
  const std::size_t total_receives = to_post.segments_in(2 * (ranks - 1));
  const std::size_t reducing = to_post.segments_in(ranks - 1);
  const std::size_t own = to_send.segments_of(rank);

  std::array<Transport::Request, kReceiveBuffers> receives{};
  std::array<Transport::Request, kSendsInFlight> sends{};
  std::size_t posted = 0, received = 0, started = 0, sent = 0;

  while (received < total_receives || sent < total_sends) {
    while (posted < total_receives && posted - received < kReceiveBuffers) {
      // The all-gather's n-th segment overwrites what the n-th send reads: chunks r, r-1, ... in both.
      if (posted >= reducing && sent <= posted - reducing) break;
      const auto [begin, length, reduce] = to_post.next();
      T* into = reduce ? scratch + posted % kReceiveBuffers * segment : data + begin;
      receives[posted++ % kReceiveBuffers] = transport.receive(into, length * sizeof(T), previous, channel);
    }
    // After the own chunk, what is sent is what has been received, in the same order.
    while (started < total_sends && started - sent < kSendsInFlight && started < own + received) {
      const auto [begin, length, reduce] = to_send.next();
      sends[started++ % kSendsInFlight] = transport.send(data + begin, length * sizeof(T), next, channel);
    }
    bool progress = false;
    if (received < posted && transport.test(receives[received % kReceiveBuffers])) {
      const auto [begin, length, reduce] = to_use.next();
      if (reduce) add(data + begin, scratch + received % kReceiveBuffers * segment, length);
      ++received;
      progress = true;
    }
    if (sent < started && transport.test(sends[sent % kSendsInFlight])) {
      ++sent;
      progress = true;
    }
    if (progress) {
      wait.progressed();
    } else {
      wait.pause([&] {
        return received < posted
                   ? "rank " + std::to_string(previous) + " sent nothing (segment " + std::to_string(received) +
                         " of " + std::to_string(total_receives) + "; it may itself be waiting for another rank)"
                   : "rank " + std::to_string(next) + " took nothing (segment " + std::to_string(sent) + " of " +
                         std::to_string(total_sends) + ")";
      });
    }
  }
}

}  // namespace fastdp::comm
