// The collectives in shared memory with threads for ranks, so that ThreadSanitizer sees both sides of every access:
// built and run by test_threads.py. Prints "done" if every result was right.
#include <sys/types.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "../csrc/comm/communicator.h"

using namespace fastdp::comm;

namespace {

// One host needs no messages.
class Nobody final : public Transport {
 public:
  Nobody(int rank, int size) : rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  Request send(const void*, std::size_t, int, Channel) override { throw Failure("a message"); }
  Request receive(void*, std::size_t, int, Channel) override { throw Failure("a message"); }
  Request all_reduce(void*, std::size_t, DType) override { throw Failure("a message"); }
  void give_up(const std::string&) override {}
  std::string heard() override { return {}; }
  bool test(Request&) override { throw Failure("a message"); }
  std::size_t outstanding() const override { return 0; }

 private:
  int rank_, size_;
};

float value(int rank, std::size_t i, int round) { return static_cast<float>((i * 31 + rank * 17 + round) % 101); }

void require(bool right, const char* what, int rank) {
  if (right) return;
  std::printf("%s is wrong on rank %d\n", what, rank);
  std::exit(1);
}

struct Rank {
  int rank, size;
  Communicator& comm;
  int round = 0;

  void fill(float* x, std::size_t n) {
    ++round;
    for (std::size_t i = 0; i < n; ++i) x[i] = value(rank, i, round);
  }
  void check(const float* x, std::size_t begin, std::size_t end, const char* what) {
    for (std::size_t i = begin; i < end; ++i) {
      float total = 0;
      for (int r = 0; r < size; ++r) total += value(r, i, round);
      require(x[i] == total, what, rank);
    }
  }

  // x: in the window, or not
  void sums(float* x, std::size_t n, const char* what) {
    fill(x, n);
    comm.sum_shared(x, x, n, DType::float32);
    check(x, 0, n, what);
    fill(x, n);
    const std::int64_t number = comm.start_sum(Operation::all_reduce, x, x, n, DType::float32, Algorithm::shared);
    while (!comm.test(number).first) std::this_thread::yield();
    check(x, 0, n, what);
  }

  void others(std::size_t n) {
    std::vector<float> x(n);
    fill(x.data(), n);
    comm.wait(comm.start_sum(Operation::reduce_scatter, x.data(), x.data(), n, DType::float32, Algorithm::shared));
    const auto parts = even_chunks(n, size);
    check(x.data(), parts[rank], parts[rank + 1], "reduce_scatter");
    std::vector<float> all;
    comm.wait(comm.start_all_gather(x.data() + parts[rank], parts[rank + 1] - parts[rank], DType::float32, -1,
                                    [&](std::size_t elements) {
                                      all.resize(elements);
                                      return static_cast<void*>(all.data());
                                    }));
    check(all.data(), 0, n, "all_gather");
    const int root = round % size;
    fill(x.data(), n);
    comm.wait(comm.start_broadcast(x.data(), n, DType::float32, root));
    for (std::size_t i = 0; i < n; ++i) require(x[i] == value(root, i, round), "broadcast", rank);
    comm.wait(comm.start_meeting(Operation::barrier, 0, DType::float32, 0));
  }
};

void run(int rank, int size, const std::shared_ptr<SharedMemory>& team, const std::shared_ptr<SharedMemory>& window,
         std::size_t part_bytes) {
  WaitPolicy policy{60.0, [] {}};
  policy.yield_for = std::chrono::microseconds(rank % 2 ? 0 : 2000);  // some sleep at once
  Communicator comm(std::make_unique<Nobody>(rank, size), policy, 4096);
  const std::vector<Process> processes(size, Process::of(getpid()));
  comm.join(std::make_unique<Hosts>(comm.transport(), std::vector<int>(size, 0), team, processes));
  comm.segments().add(window, 1, part_bytes, rank);
  Rank me{rank, size, comm};
  auto* shared = reinterpret_cast<float*>(window->data() + rank * part_bytes);
  std::vector<float> own(part_bytes / sizeof(float));
  for (int repeat = 0; repeat < 3; ++repeat)
    for (const std::size_t n : {std::size_t{1}, std::size_t{100}, std::size_t{2000}, own.size()}) {
      me.sums(shared, n, "all_reduce in the window");
      me.sums(own.data(), n, "all_reduce of other memory");
      me.others(n);
    }
}

std::shared_ptr<SharedMemory> memory(std::size_t bytes) {
  auto made = std::make_shared<SharedMemory>(SharedMemory::create(bytes));
  made->reserve(0, bytes);
  made->map();
  made->touch();
  return made;
}

}  // namespace

// Whether cores are such that it is used at all is found while it runs (HandOver).
void check_stream_copy() {
  constexpr std::size_t most = 1000;
  alignas(64) std::byte to[most + 64];
  std::byte from[most + 64];
  for (std::size_t i = 0; i < sizeof from; ++i) from[i] = static_cast<std::byte>(i * 37 + 1);
  for (std::size_t bytes = 0; bytes <= most; ++bytes) {
    std::memset(to, 0, sizeof to);
    stream_copy(to + 16, from + bytes % 5, bytes);
    const bool copied = std::memcmp(to + 16, from + bytes % 5, bytes) == 0;
    require(copied && to[15] == std::byte{0} && to[16 + bytes] == std::byte{0}, "stream_copy", 0);
  }
}

int main() {
  check_stream_copy();
  constexpr std::size_t part_bytes = 1 << 20;  // several rounds through the slots
  for (const int size : {2, 3, 4}) {
    const auto team = memory(Team::bytes(size)), window = memory(size * part_bytes);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) threads.emplace_back(run, rank, size, team, window, part_bytes);
    for (auto& thread : threads) thread.join();
  }
  std::puts("done");
}
