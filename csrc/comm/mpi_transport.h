#pragma once

#include <mpi.h>

#include <cstring>
#include <memory>
#include <string>

#include "transport.h"
#include "wait.h"

namespace fastdp::comm {

inline void check_mpi(int code, const char* function) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  std::string line(text, length);
  for (char& c : line)
    if (c == '\n') c = ' ';
  throw Failure(std::string(function) + " failed: " + line, Failure::Peers::missing);
}

// A duplicate of the user's communicator, so that our messages never meet theirs. Never freed: MPI_Comm_free is
// collective, and Python's destructors run at another time on each rank. MPI_Finalize reclaims it.
class MpiTransport final : public Transport {
 public:
  MpiTransport(MPI_Comm of, Wait& wait) {
    // On the heap, and left there on failure: MPI writes to it when a late rank joins.
    auto duplicate = std::make_unique<MPI_Comm>(MPI_COMM_NULL);
    MPI_Request request;
    check_mpi(MPI_Comm_idup(of, duplicate.get(), &request), "MPI_Comm_idup");
    ++outstanding_;
    Request handle = pack(request);
    Pending pending(*this, handle, [] { return std::string("not all ranks called fastdp.comm.init"); });
    try {
      wait.finish(pending);
    } catch (...) {
      static_cast<void>(duplicate.release());
      throw;
    }
    comm_ = *duplicate;
    // Errors become exceptions instead of ending the process.
    check_mpi(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check_mpi(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank");
    check_mpi(MPI_Comm_size(comm_, &size_), "MPI_Comm_size");
  }

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::size_t outstanding() const override { return outstanding_; }

  Request send(const void* buffer, std::size_t bytes, int to, Channel channel) override {
    require_running(channel);
    MPI_Request request;
    check_mpi(MPI_Isend(buffer, static_cast<int>(bytes), MPI_BYTE, to, static_cast<int>(channel), comm_, &request),
              "MPI_Isend");
    ++outstanding_;
    return pack(request);
  }

  Request receive(void* buffer, std::size_t bytes, int from, Channel channel) override {
    require_running(channel);
    MPI_Request request;
    check_mpi(MPI_Irecv(buffer, static_cast<int>(bytes), MPI_BYTE, from, static_cast<int>(channel), comm_, &request),
              "MPI_Irecv");
    ++outstanding_;
    return pack(request);
  }

  // Non-blocking, for the sake of the deadline; MPICH's blocking one is faster (bench/bench_allreduce.py).
  Request all_reduce(void* data, std::size_t count, DType dtype) override {
    const MPI_Datatype type = dtype == DType::float32 ? MPI_FLOAT : dtype == DType::float64 ? MPI_DOUBLE : MPI_INT64_T;
    MPI_Request request;
    check_mpi(MPI_Iallreduce(MPI_IN_PLACE, data, static_cast<int>(count), type, MPI_SUM, comm_, &request),
              "MPI_Iallreduce");
    ++outstanding_;
    return pack(request);
  }

  bool test(Request& handle) override {
    MPI_Request request = unpack(handle);
    int done = 0;
    check_mpi(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Test");
    handle = pack(request);
    if (done) --outstanding_;
    return done;
  }

  // The text is left to MPI, which may send it later. Errors say nothing new: this rank has failed, and whoever is not
  // told has a deadline.
  void give_up(const std::string& reason) override {
    if (finalized()) return;
    const auto* text = new std::string(reason.substr(0, kNewsBytes));
    MPI_Request request;
    for (int to = 0; to < size_; ++to)
      if (to != rank_)
        MPI_Isend(text->data(), static_cast<int>(text->size()), MPI_CHAR, to, static_cast<int>(Channel::news), comm_,
                  &request);
  }

  std::string heard() override {
    int there = 0, length = 0;
    MPI_Status status;
    const int tag = static_cast<int>(Channel::news);
    check_mpi(MPI_Iprobe(MPI_ANY_SOURCE, tag, comm_, &there, &status), "MPI_Iprobe");
    if (!there) return {};
    char text[kNewsBytes];
    check_mpi(MPI_Get_count(&status, MPI_CHAR, &length), "MPI_Get_count");
    check_mpi(MPI_Recv(text, length, MPI_CHAR, status.MPI_SOURCE, tag, comm_, MPI_STATUS_IGNORE), "MPI_Recv");
    return "rank " + std::to_string(status.MPI_SOURCE) + " gave up: " + std::string(text, length);
  }

 private:
  static constexpr std::size_t kNewsBytes = 1024;
  static_assert(sizeof(MPI_Request) <= sizeof(Request));

  static Request pack(MPI_Request request) {
    Request handle = 0;
    std::memcpy(&handle, &request, sizeof request);
    return handle;
  }
  static MPI_Request unpack(Request handle) {
    MPI_Request request;
    std::memcpy(&request, &handle, sizeof request);
    return request;
  }

  // Every collective begins with headers: asking there is enough.
  static void require_running(Channel channel) {
    if (channel != Channel::header) return;
    if (finalized()) throw Failure("MPI has been finalized");
  }
  static bool finalized() {
    int is = 0;
    MPI_Finalized(&is);
    return is != 0;
  }

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1;
  std::size_t outstanding_ = 0;
};

}  // namespace fastdp::comm
