#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "transport.h"
#include "wait.h"

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

// The steps that make up `operation`: all_reduce, reduce_scatter or all_gather. data [chunks.back()] in place; scratch
// [kReceiveBuffers * segment], unused by all_gather. Both must outlive the transport's requests if this throws.
template <class T>
void ring(Transport& transport, Wait& wait, Operation operation, T* data, std::span<const std::size_t> chunks,
          T* scratch, std::size_t segment) {
  const int ranks = transport.size(), rank = transport.rank();
  const int next = (rank + 1) % ranks, previous = (rank + ranks - 1) % ranks;
  constexpr auto channel = Transport::Channel::data;
  const int reducing_steps = operation == Operation::all_gather ? 0 : ranks - 1;
  const int steps = reducing_steps + (operation == Operation::reduce_scatter ? 0 : ranks - 1);
  const int first = reducing_steps ? previous : rank;

  SegmentStream to_send(chunks, first, reducing_steps, segment);
  SegmentStream to_post(chunks, (first + ranks - 1) % ranks, reducing_steps, segment);
  SegmentStream to_use = to_post;
  const std::size_t total_sends = to_send.segments_in(steps);
  const std::size_t total_receives = to_post.segments_in(steps);
  const std::size_t reducing = to_post.segments_in(reducing_steps);
  const std::size_t own = to_send.segments_in(1);

  std::array<Transport::Request, kReceiveBuffers> receives{};
  std::array<Transport::Request, kSendsInFlight> sends{};
  std::size_t posted = 0, received = 0, started = 0, sent = 0;

  while (received < total_receives || sent < total_sends) {
    while (posted < total_receives && posted - received < kReceiveBuffers) {
      // After a reduce-scatter, the all-gather's n-th segment overwrites what the n-th send reads: chunks r-1, r-2, ...
      if (reducing_steps && posted >= reducing && sent <= posted - reducing) break;
      const auto [begin, length, reduce] = to_post.next();
      T* into = reduce ? scratch + posted % kReceiveBuffers * segment : data + begin;
      receives[posted++ % kReceiveBuffers] = transport.receive(into, length * sizeof(T), previous, channel);
    }
    // After the first chunk, what is sent is what has been received, in the same order.
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
