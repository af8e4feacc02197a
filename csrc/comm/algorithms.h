#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "header.h"
#include "hosts.h"
#include "ring.h"
#include "segments.h"
#include "shared.h"
#include "transport.h"
#include "tree.h"
#include "widened.h"

namespace fastdp::comm {

// What moves and adds data, once it is known that all ranks have called the same.
class Algorithms {
 public:
  Algorithms(Transport& transport, const Segments& segments, std::size_t segment_bytes)
      : transport_(transport),
        segments_(segments),
        segment_bytes_(segment_bytes),
        scratch_(static_cast<std::byte*>(
            ::operator new(kTrees * kReceiveBuffers * segment_bytes, std::align_val_t{kCacheLine}))) {}
  // No message is under way.
  ~Algorithms() { ::operator delete(scratch_, std::align_val_t{kCacheLine}); }
  Algorithms(const Algorithms&) = delete;
  Algorithms& operator=(const Algorithms&) = delete;

  void join(Hosts& hosts) { hosts_ = &hosts; }

  // The all-reduce or reduce-scatter that is called by `header`. Null: it is done already.
  std::unique_ptr<Work> sum(const Header& header, void* data, void* out) {
    return as_numbers(header.dtype, [&](auto number) {
      using T = decltype(number);
      T *x = static_cast<T*>(data), *into = static_cast<T*>(out);
      if (header.algorithm == Algorithm::shared) return shared_sum(header, x, into);
      return sum_by_messages(header.operation, x, into, static_cast<std::size_t>(header.count), header.dtype,
                             header.algorithm);
    });
  }

  // parts [begins]: each rank's part to all others.
  std::unique_ptr<Work> move(std::uint8_t* bytes, std::vector<std::size_t> begins) {
    if (hosts_ != nullptr && hosts_->single())
      return std::make_unique<Staged<std::uint8_t>>(hosts_->team(), Operation::all_gather, bytes, std::move(begins));
    return std::make_unique<Ring<std::uint8_t>>(transport_, Operation::all_gather, bytes, std::move(begins),
                                                scratch<std::uint8_t>(), segment_bytes_);
  }

 private:
  static constexpr std::size_t kCacheLine = 64;

  template <class Body>
  static auto as_numbers(DType dtype, Body body) -> decltype(body(0.0F)) {
    switch (dtype) {
      case DType::float32: return body(0.0F);
      case DType::float64: return body(0.0);
      case DType::int64: return body(std::int64_t{0});
      case DType::bfloat16: return body(bf16{});
      default: throw Failure("this dtype cannot be summed");
    }
  }

  template <class T>
  T* scratch() {
    return reinterpret_cast<T*>(scratch_);
  }

  template <class T>
  std::unique_ptr<Work> sum_by_messages(Operation operation, T* x, T* out, std::size_t count, DType dtype,
                                        Algorithm algorithm) {
    if (out != x) std::memcpy(out, x, count * sizeof(T));
    if constexpr (std::is_same_v<T, bf16>) {
      return std::make_unique<Widened>(out, count, [=, this](float* wide) {
        return message_sum(operation, wide, count, DType::float32, algorithm);
      });
    } else {
      return message_sum(operation, out, count, dtype, algorithm);
    }
  }

  // What a rank has freed is not there any more, even while others keep theirs: what it names itself is.
  static bool same_segment(std::int64_t place, std::int64_t other) {
    return Place::unpacked(place).segment == Place::unpacked(other).segment;
  }

  template <class T>
  std::unique_ptr<Work> shared_sum(const Header& mine, T* x, T* out) {
    Team& team = hosts_->team();
    const auto count = static_cast<std::size_t>(mine.count);
    if (mine.operation == Operation::all_reduce) {
      const T* in[Team::kMaxRanks];
      T* outs[Team::kMaxRanks];
      const Team::Call& own = team.call(team.rank(), mine.sequence);
      bool letters = true, direct = true;
      for (int rank = 0; rank < transport_.size(); ++rank) {
        const Team::Call& call = team.call(rank, mine.sequence);
        letters = letters && Team::fits_letter(count * sizeof(T), call.in_segment());
        direct = direct && call.in_segment() && same_segment(call.place, own.place) &&
                 same_segment(call.out_place, own.out_place);
        in[rank] = reinterpret_cast<const T*>(team.letter(rank, mine.sequence).data);
      }
      if (letters) {
        sum_ranks(in, transport_.size(), &out, 1, count);
        return nullptr;
      }
      if (direct) {
        for (int rank = 0; rank < transport_.size(); ++rank) {
          const Team::Call& call = team.call(rank, mine.sequence);
          in[rank] = segments_.template at<T>(Place::unpacked(call.place), rank);
          outs[rank] = segments_.template at<T>(Place::unpacked(call.out_place), rank);
        }
        return std::make_unique<DirectSum<T>>(team, in, outs, count);
      }
    }
    if (out != x) std::memcpy(out, x, count * sizeof(T));
    return std::make_unique<Staged<T>>(team, mine.operation, out, even_chunks(count, transport_.size()));
  }

  template <class T>
  std::unique_ptr<Work> message_sum(Operation operation, T* x, std::size_t count, DType dtype, Algorithm algorithm) {
    const std::size_t segment = segment_bytes_ / sizeof(T);
    if (operation == Operation::all_reduce) {
      if (algorithm == Algorithm::mpi) return library_all_reduce(x, count, dtype);
      if (algorithm == Algorithm::tree)
        return std::make_unique<TreeAllReduce<T>>(transport_, x, count, scratch<T>(), segment);
      if (algorithm == Algorithm::hierarchical) {
        if (hosts_ == nullptr) throw Failure("algorithm \"hierarchical\" is for ranks that share memory on each host");
        return hosts_->all_reduce(x, count, scratch<T>(), segment);
      }
    }
    return std::make_unique<Ring<T>>(transport_, operation, x, even_chunks(count, transport_.size()), scratch<T>(),
                                     segment);
  }

  std::unique_ptr<Work> library_all_reduce(void* data, std::size_t count, DType dtype) {
    const std::size_t block = kMaxMessageBytes / item_bytes(dtype);
    std::vector<InTurn::Make> blocks;
    for (std::size_t begin = 0; begin < count; begin += block)
      blocks.push_back([=, this]() -> std::unique_ptr<Work> {
        library_request_ = transport_.all_reduce(static_cast<std::byte*>(data) + begin * item_bytes(dtype),
                                                 std::min(block, count - begin), dtype);
        return std::make_unique<Pending>(transport_, library_request_,
                                         [] { return std::string("MPI_Iallreduce did not complete"); });
      });
    return std::make_unique<InTurn>(std::move(blocks));
  }

  Transport& transport_;
  const Segments& segments_;
  std::size_t segment_bytes_;
  std::byte* scratch_;  // [kTrees * kReceiveBuffers * segment_bytes]; the ring leaves half of it untouched
  Hosts* hosts_ = nullptr;
  Transport::Request library_request_{};
};

}  // namespace fastdp::comm
