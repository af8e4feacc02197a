#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "types.h"

namespace fastdp::comm {

// A collective could not be completed; the text is for the user. Becomes fastdp.errors.CommError in Python.
struct Failure : std::runtime_error {
  // The others know nothing of it; or fail in the same way by themselves, and may need what this rank has sent for
  // that; or some are gone or late, and MPI_Finalize may wait for them.
  enum class Peers { unaware, alike, missing };
  explicit Failure(const std::string& text, Peers peers = Peers::unaware) : std::runtime_error(text), peers(peers) {}
  Peers peers;
};

// What the collectives ask of whatever carries their messages: MPI between processes (mpi_transport.h), queues between
// threads in tests. Messages of one kind between two ranks arrive in the order in which they were sent.
class Transport {
 public:
  // Wide enough for MPICH's int and Open MPI's pointer, so that requests need no table.
  using Request = std::uint64_t;
  // Headers have a channel of their own: a rank that is ahead can never have one taken for data.
  enum class Channel { header, data, second_tree, news };

  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // What users know a rank by.
  virtual int name(int rank) const { return rank; }
  // Each of its ranks speaks for a host, and may wait for the others of that host.
  virtual bool between_hosts() const { return false; }

  // `buffer` must outlive the request, whatever happens. At most kMaxMessageBytes.
  virtual Request send(const void* buffer, std::size_t bytes, int to, Channel channel) = 0;
  virtual Request receive(void* buffer, std::size_t bytes, int from, Channel channel) = 0;
  // The all-reduce of the library below, in place; refused where there is none.
  virtual Request all_reduce(void* data, std::size_t count, DType dtype) = 0;
  // Tells all others, as well as it can, why this rank gives up; and what another has told, or nothing.
  virtual void give_up(const std::string& reason) = 0;
  virtual std::string heard() = 0;
  // Makes progress; true once, when the request is complete.
  virtual bool test(Request& request) = 0;
  // Requests whose completion test() has not reported: while there are any, their buffers may still be read or written.
  virtual std::size_t outstanding() const = 0;
};

// One rank of each host, numbered from 0 among themselves.
class Subset final : public Transport {
 public:
  Subset(Transport& of, std::vector<int> ranks, int rank) : of_(of), ranks_(std::move(ranks)), rank_(rank) {}
  int rank() const override { return rank_; }
  int size() const override { return static_cast<int>(ranks_.size()); }
  int name(int rank) const override { return of_.name(ranks_[rank]); }
  bool between_hosts() const override { return true; }
  Request send(const void* buffer, std::size_t bytes, int to, Channel channel) override {
    return of_.send(buffer, bytes, ranks_[to], channel);
  }
  Request receive(void* buffer, std::size_t bytes, int from, Channel channel) override {
    return of_.receive(buffer, bytes, ranks_[from], channel);
  }
  Request all_reduce(void*, std::size_t, DType) override { throw Failure("a part of the ranks has no MPI_Allreduce"); }
  void give_up(const std::string& reason) override { of_.give_up(reason); }
  std::string heard() override { return of_.heard(); }
  bool test(Request& request) override { return of_.test(request); }
  std::size_t outstanding() const override { return of_.outstanding(); }

 private:
  Transport& of_;
  std::vector<int> ranks_;
  int rank_;
};

// MPI counts are ints.
inline constexpr std::size_t kMaxMessageBytes = std::size_t{1} << 30;

}  // namespace fastdp::comm
