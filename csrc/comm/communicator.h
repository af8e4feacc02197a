#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "broadcast.h"
#include "header.h"
#include "ring.h"
#include "transport.h"
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
      switch (dtype) {
        case DType::float32: return ring(wait, static_cast<float*>(data), count);
        case DType::float64: return ring(wait, static_cast<double*>(data), count);
        case DType::int64: return ring(wait, static_cast<std::int64_t*>(data), count);
        default: throw Failure("this dtype cannot be summed");
      }
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
          scratch(
              static_cast<std::byte*>(::operator new(kReceiveBuffers * segment_bytes, std::align_val_t{kCacheLine}))) {}
    ~Buffers() { ::operator delete(scratch, std::align_val_t{kCacheLine}); }
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    static constexpr std::size_t kCacheLine = 64;
    HeaderBuffers headers;
    std::byte* scratch;  // [kReceiveBuffers * segment_bytes]
  };

  // MPI has no safe way to take back a send, so after a failure the memory of requests in flight is leaked on purpose,
  // about kReceiveBuffers segments per failed communicator. The caller's tensor is kept alive by fastdp/comm.py.
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

  template <class T>
  void ring(Wait& wait, T* data, std::size_t count) {
    ring_all_reduce(*transport_, wait, data, count, reinterpret_cast<T*>(buffers_->scratch),
                    segment_bytes_ / sizeof(T));
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
