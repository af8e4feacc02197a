#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "broadcast.h"
#include "header.h"
#include "ring.h"
#include "transport.h"
#include "tree.h"
#include "wait.h"

namespace fastdp::comm {

// The collectives over one transport. After the first failure every call fails with the first reason: ranks no longer
// agree on what comes next.
class Communicator {
 public:
  Communicator(std::unique_ptr<Transport> transport, WaitPolicy policy, std::size_t segment_bytes)
      : transport_(std::move(transport)),
        policy_(std::move(policy)),
        segment_bytes_(segment_bytes),
        buffers_(std::make_unique<Buffers>(transport_->size(), segment_bytes)) {}

  ~Communicator() {
    if (pending()) abandon();
  }

  // data [count], in place
  void all_reduce(void* data, std::size_t count, DType dtype, Algorithm algorithm) {
    Header header = header_of(Operation::all_reduce, count, dtype);
    header.algorithm = algorithm;
    collective(header, [&](Wait& wait) {
      if (algorithm == Algorithm::mpi) return library_all_reduce(wait, data, count, dtype);
      as_numbers(data, dtype, [&](auto* numbers) {
        if (algorithm == Algorithm::tree) {
          tree_all_reduce(*transport_, wait, numbers, count, scratch(numbers), segment_bytes_ / sizeof *numbers);
        } else {
          ring_steps(wait, Operation::all_reduce, numbers, even_chunks(count, size()));
        }
      });
    });
  }

  // data [count], in place: afterwards this rank's chunk (even_chunks) is the sum, the others are partial sums.
  void reduce_scatter(void* data, std::size_t count, DType dtype) {
    collective(header_of(Operation::reduce_scatter, count, dtype), [&](Wait& wait) {
      as_numbers(data, dtype, [&](auto* numbers) {
        ring_steps(wait, Operation::reduce_scatter, numbers, even_chunks(count, size()));
      });
    });
  }

  // part [count], which may lie in the result. `result` maps the elements of all parts to where they go, [elements],
  // which outlives the transport's requests if this throws. out: how many it has room for, -1 for as many as needed.
  void all_gather(const void* part, std::size_t count, DType dtype, std::int64_t out,
                  const std::function<void*(std::size_t)>& result) {
    Header header = header_of(Operation::all_gather, count, dtype);
    header.out = out;
    collective(header, [&](Wait& wait) {
      std::vector<std::size_t> begins{0};  // bytes
      for (const Header& each : buffers_->headers.headers)
        begins.push_back(begins.back() + static_cast<std::size_t>(each.count) * item_bytes(dtype));
      auto* bytes = static_cast<std::uint8_t*>(result(begins.back() / item_bytes(dtype)));
      if (count > 0) std::memmove(bytes + begins[rank()], part, count * item_bytes(dtype));
      ring_steps(wait, Operation::all_gather, bytes, begins);
    });
  }

  // data [count]: from `root` to the others
  void broadcast(void* data, std::size_t count, DType dtype, int root) {
    Header header = header_of(Operation::broadcast, count, dtype);
    header.root = root;
    collective(header, [&](Wait& wait) {
      tree_broadcast(*transport_, wait, static_cast<std::byte*>(data), count * item_bytes(dtype), root, segment_bytes_);
    });
  }

  void barrier() {
    collective(header_of(Operation::barrier, 0, DType::float32), [](Wait&) {});
  }

  // Ranks outnumber the cores that they may use.
  void share_cores() { policy_.yield_for = {}; }

  int rank() const { return transport_->rank(); }
  int size() const { return transport_->size(); }
  // Empty, or why this communicator is unusable.
  const std::string& failure() const { return failure_; }
  // Whether memory passed to a failed collective may still be read or written by a late peer.
  bool pending() const { return transport_->outstanding() > 0; }

 private:
  struct Buffers {
    Buffers(int size, std::size_t segment_bytes)
        : headers(size),
          scratch(static_cast<std::byte*>(
              ::operator new(kTrees * kReceiveBuffers * segment_bytes, std::align_val_t{kCacheLine}))) {}
    ~Buffers() { ::operator delete(scratch, std::align_val_t{kCacheLine}); }
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    static constexpr std::size_t kCacheLine = 64;
    HeaderBuffers headers;
    std::byte* scratch;  // [kTrees * kReceiveBuffers * segment_bytes]; the ring leaves half of it untouched
  };

  // MPI has no safe way to take back a send, so after a failure the memory of requests in flight is leaked on purpose,
  // at most kTrees * kReceiveBuffers segments per failed communicator. The caller's tensor is kept alive by
  // fastdp/comm.py.
  void abandon() { static_cast<void>(buffers_.release()); }

  Header header_of(Operation operation, std::size_t count, DType dtype) {
    Header header;
    header.operation = operation;
    header.count = static_cast<std::int64_t>(count);
    header.dtype = dtype;
    header.segment_bytes = static_cast<std::int64_t>(segment_bytes_);
    return header;
  }

  template <class Body>
  void collective(Header header, Body body) {
    if (busy_.test_and_set())
      throw Failure("this communicator is in use by another thread or by the caller of this signal handler");
    struct Release {
      std::atomic_flag& flag;
      ~Release() { flag.clear(); }
    } release{busy_};
    if (!failure_.empty()) throw Failure("this communicator failed before: " + failure_);
    header.sequence = ++sequence_;
    try {
      Wait wait(policy_);
      exchange_headers(*transport_, wait, header, buffers_->headers);
      require_same(buffers_->headers.headers);
      body(wait);
    } catch (const Failure& failure) {
      throw Failure(failure_ = describe(header) + " on rank " + std::to_string(rank()) + " of " +
                               std::to_string(size()) + ": " + failure.what());
    } catch (...) {
      failure_ = describe(header) + " on rank " + std::to_string(rank()) + ": interrupted by a signal";
      throw;
    }
  }

  template <class Body>
  static void as_numbers(void* data, DType dtype, Body body) {
    switch (dtype) {
      case DType::float32: return body(static_cast<float*>(data));
      case DType::float64: return body(static_cast<double*>(data));
      case DType::int64: return body(static_cast<std::int64_t*>(data));
      default: throw Failure("this dtype cannot be summed");
    }
  }

  template <class T>
  T* scratch(T*) {
    return reinterpret_cast<T*>(buffers_->scratch);
  }

  template <class T>
  void ring_steps(Wait& wait, Operation operation, T* data, const std::vector<std::size_t>& chunks) {
    ring(*transport_, wait, operation, data, chunks, scratch(data), segment_bytes_ / sizeof(T));
  }

  void library_all_reduce(Wait& wait, void* data, std::size_t count, DType dtype) {
    const std::size_t block = kMaxMessageBytes / item_bytes(dtype);
    for (std::size_t begin = 0; begin < count; begin += block) {
      auto request = transport_->all_reduce(static_cast<std::byte*>(data) + begin * item_bytes(dtype),
                                            std::min(block, count - begin), dtype);
      complete(*transport_, wait, request, [] { return std::string("MPI_Iallreduce did not complete"); });
    }
  }

  std::unique_ptr<Transport> transport_;
  WaitPolicy policy_;
  std::size_t segment_bytes_;
  std::unique_ptr<Buffers> buffers_;
  std::int64_t sequence_ = 0;
  std::string failure_;
  std::atomic_flag busy_;
};

}  // namespace fastdp::comm
