// Runs the bodies of csrc/cuda (context.h) on the CPU, with the rules of a GPU and less patience: a fiber, or under
// ThreadSanitizer an OS thread, for each of a block's threads, in an order that is shuffled; shared memory that is NaN
// until it is written; copies that arrive as late as they may; and an Emulation error where threads of a block, or
// lanes of a warp, do not meet in the same line.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cuda/context.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastdp::cuda {

struct Emulation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Tasks of one launch, `block` of them after the other for each block, which take turns where they wait.
class Tasks {
 public:
  virtual ~Tasks() = default;
  virtual void run(std::vector<std::function<void()>> tasks, std::size_t block, std::mt19937& order) = 0;
  // Something that others may wait for has happened.
  virtual void progressed() = 0;
  // Of a task, while what it waits for has not.
  virtual void yield() = 0;
};

// One after the other in one OS thread. When all wait and nothing has happened, they wait forever: an error.
class Fibers final : public Tasks {
 public:
  void run(std::vector<std::function<void()>> tasks, std::size_t block, std::mt19937& order) override {
    const std::size_t count = tasks.size();
    fibers_.clear();
    for (auto& task : tasks) {
      fibers_.push_back(std::make_unique<Fiber>());
      fibers_.back()->body = std::move(task);
    }
    std::vector<std::size_t> turns(count);
    for (std::size_t i = 0; i < count; ++i) turns[i] = i;
    std::exception_ptr error;
    const std::size_t nobody = count;
    std::size_t late = nobody;  // a block that does not get a turn while the others have anything to do
    for (std::size_t left = count; left > 0 && !error;) {
      happened_ = false;
      std::shuffle(turns.begin(), turns.end(), order);
      for (const std::size_t i : turns) {
        Fiber& fiber = *fibers_[i];
        if (fiber.done || i / block == late) continue;
        resume(fiber);
        if (fiber.error && !error) error = fiber.error;
        if (fiber.done) --left, happened_ = true;
      }
      if (!happened_ && !error && late == nobody)
        error = std::make_exception_ptr(Emulation("all threads wait forever"));
      late = !happened_ || count == block ? nobody : late == nobody ? order() % (count / block) : late;
    }
    fibers_.clear();  // those that wait are not unwound: their stacks hold nothing that owns memory
    if (error) std::rethrow_exception(error);
  }

  void progressed() override { happened_ = true; }
  void yield() override { leave(*current_); }

 private:
  static constexpr std::size_t kStack = 128 * 1024;

  struct Fiber {
    Fiber() = default;
    ~Fiber() { spare_.push_back(std::move(stack)); }

    std::function<void()> body;
    std::unique_ptr<std::byte[]> stack = new_stack();
    ucontext_t context{};
    std::exception_ptr error;
    bool begun = false, done = false;
    void* fake_stack = nullptr;  // AddressSanitizer's
  };

  // Stacks are used again: for fresh ones, AddressSanitizer has the system clear most of what a test then writes.
  static std::unique_ptr<std::byte[]> new_stack() {
    if (spare_.empty()) return std::make_unique_for_overwrite<std::byte[]>(kStack);
    auto stack = std::move(spare_.back());
    spare_.pop_back();
    forget_frames(stack.get());
    return stack;
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    if (!fiber.begun) {
      fiber.begun = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      const auto address = reinterpret_cast<std::uintptr_t>(this);
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Fibers::enter), 2, static_cast<unsigned>(address >> 32),
                  static_cast<unsigned>(address));
    }
    enter_stack(&main_fake_, fiber.stack.get(), kStack);
    swapcontext(&main_, &fiber.context);
    entered_stack(main_fake_, nullptr, nullptr);
  }

  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fibers*>(static_cast<std::uintptr_t>(high) << 32 | low);
    self->entered_stack(nullptr, &self->main_stack_, &self->main_size_);
    Fiber& fiber = *self->current_;
    try {
      fiber.body();
    } catch (...) {
      fiber.error = std::current_exception();
    }
    fiber.done = true;
    self->enter_stack(nullptr, self->main_stack_, self->main_size_);
    swapcontext(&fiber.context, &self->main_);
  }

  void leave(Fiber& fiber) {
    enter_stack(&fiber.fake_stack, main_stack_, main_size_);
    swapcontext(&fiber.context, &main_);
    entered_stack(fiber.fake_stack, &main_stack_, &main_size_);
  }

#if defined(__SANITIZE_ADDRESS__)
  static void enter_stack(void** save, const void* bottom, std::size_t size) {
    __sanitizer_start_switch_fiber(save, bottom, size);
  }
  static void entered_stack(void* saved, const void** bottom, std::size_t* size) {
    __sanitizer_finish_switch_fiber(saved, bottom, size);
  }
  static void forget_frames(const void* bottom) { __asan_unpoison_memory_region(bottom, kStack); }
#else
  static void enter_stack(void**, const void*, std::size_t) {}
  static void entered_stack(void*, const void**, std::size_t*) {}
  static void forget_frames(const void*) {}
#endif

  static inline std::vector<std::unique_ptr<std::byte[]>> spare_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  ucontext_t main_{};
  const void* main_stack_ = nullptr;
  std::size_t main_size_ = 0;
  void* main_fake_ = nullptr;
  bool happened_ = false;
};

// All at once, for ThreadSanitizer.
class Threads final : public Tasks {
 public:
  void run(std::vector<std::function<void()>> tasks, std::size_t, std::mt19937& order) override {
    std::shuffle(tasks.begin(), tasks.end(), order);
    std::exception_ptr error;
    std::mutex mutex;
    std::vector<std::thread> threads;
    stop_ = false;
    for (auto& task : tasks)
      threads.emplace_back([&] {
        try {
          task();
        } catch (...) {
          const std::lock_guard lock(mutex);
          if (!error) error = std::current_exception();
          stop_ = true;
        }
      });
    for (auto& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
  }
  void progressed() override {}
  void yield() override {
    if (stop_) throw Emulation("another thread failed");
    std::this_thread::yield();
  }

 private:
  std::atomic<bool> stop_{false};
};

// Where a number of threads meet.
class Meeting {
 public:
  explicit Meeting(int threads) : threads_(threads) {}

  // All of them in the same line.
  void arrive_and_wait(Tasks& tasks, const std::source_location& where, const char* who) {
    const unsigned now = round_.load();
    const unsigned expected = line_of(where);
    unsigned first = 0;
    if (!lines_[now % 2].compare_exchange_strong(first, expected) && first != expected)
      throw Emulation(std::string(who) + " diverge: some are in line " + std::to_string(first) + ", others in line " +
                      std::to_string(expected) + " of " + where.file_name());
    tasks.progressed();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_ = 0;
      lines_[(now + 1) % 2] = 0;
      round_ = now + 1;
      return;
    }
    while (round_.load() == now) tasks.yield();
  }

 private:
  static unsigned line_of(const std::source_location& where) { return where.line(); }

  int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> round_{0}, lines_[2]{0, 0};
};

struct BlockState {
  BlockState(int threads, std::size_t dynamic_bytes)
      : everybody(threads),
        dynamic((dynamic_bytes + sizeof(Line) - 1) / sizeof(Line)),
        lanes(threads * 2),
        exchanged(threads) {
    for (int w = 0; w < threads / kWarp; ++w) warps.push_back(std::make_unique<Meeting>(kWarp));
    if (dynamic_bytes > 0) std::memset(static_cast<void*>(dynamic.data()), 0xff, dynamic.size() * sizeof(Line));
  }

  struct alignas(16) Line {
    std::byte bytes[16];
  };
  struct Word {
    std::byte bytes[16];
  };
  Meeting everybody;
  std::vector<std::unique_ptr<Meeting>> warps;
  std::vector<Line> dynamic;        // NaN
  std::vector<Word> lanes;          // what lanes show each other, in turn
  std::vector<unsigned> exchanged;  // how often, by thread
};

// A thread's view: context.h.
class Emulated {
 public:
  Emulated(Tasks& tasks, BlockState& state, int thread, int block, int blocks, int threads)
      : tasks_(tasks), state_(state), thread_(thread), block_(block), blocks_(blocks), threads_(threads) {}

  using Where = std::source_location;

  int thread() const { return thread_; }
  int block() const { return block_; }
  int blocks() const { return blocks_; }
  int lane() const { return thread_ % kWarp; }
  int warp() const { return thread_ / kWarp; }

  void sync(Where where = Where::current()) { state_.everybody.arrive_and_wait(tasks_, where, "threads of a block"); }

  template <class T>
  T shuffle_xor(T x, int mask, Where where = Where::current()) {
    return exchange(x, lane() ^ mask, where);
  }
  template <class T>
  T shuffle(T x, int lane, Where where = Where::current()) {
    return exchange(x, lane, where);
  }
  uint32_t ballot(bool flag, Where where = Where::current()) {
    exchange(flag, 0, where);
    uint32_t bits = 0;
    for (int other = 0; other < kWarp; ++other) bits |= uint32_t{shown<bool>(other)} << other;
    return bits;
  }

  void copy_async(void* to, const void* from) {
    if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
      throw Emulation("copy_async: not aligned to 16 bytes");
    open_.push_back({to, from});
  }
  void copy_commit() { groups_.push_back(std::exchange(open_, {})); }
  template <int n>
  void copied() {
    while (groups_.size() > n) {
      for (const auto& [to, from] : groups_.front()) std::memcpy(to, from, 16);
      groups_.erase(groups_.begin());
    }
  }

  void arrive(uint32_t* counter) {
    std::atomic_ref(*counter).fetch_add(1);
    tasks_.progressed();
  }
  void await(const uint32_t* counter, uint32_t n) {
    while (std::atomic_ref(*const_cast<uint32_t*>(counter)).load() < n) tasks_.yield();
  }

  std::byte* dynamic() { return reinterpret_cast<std::byte*>(state_.dynamic.data()); }

  // Copies that nobody waited for never arrive on a GPU's terms: a body must wait for all of them.
  void finish() const {
    if (!open_.empty() || !groups_.empty()) throw Emulation("copy_async: not waited for");
  }

 private:
  template <class T>
  T exchange(T x, int lane, const Where& where) {
    static_assert(sizeof(T) <= sizeof(BlockState::Word));
    if (lane < 0 || lane >= kWarp) throw Emulation("shuffle: lane " + std::to_string(lane));
    std::memcpy(word(thread_, ++state_.exchanged[thread_]).bytes, &x, sizeof x);
    state_.warps[warp()]->arrive_and_wait(tasks_, where, "lanes of a warp");
    return shown<T>(lane);
  }
  template <class T>
  T shown(int lane) const {
    T x;
    std::memcpy(&x, word(warp() * kWarp + lane, state_.exchanged[thread_]).bytes, sizeof x);
    return x;
  }
  BlockState::Word& word(int thread, unsigned turn) const { return state_.lanes[thread * 2 + turn % 2]; }

  using Copy = std::pair<void*, const void*>;
  Tasks& tasks_;
  BlockState& state_;
  int thread_, block_, blocks_, threads_;
  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> groups_;
};

// As csrc/cuda/launcher.h. `processors` of a GPU decide how work is cut, so tests take several.
class Launcher {
 public:
  // memory: where scratch comes from; none: its own.
  explicit Launcher(unsigned seed = 1, int processors = 2, bool os_threads = false,
                    std::function<void*(std::size_t)> memory = {})
      : order_(seed), processors_(processors), allocate_(std::move(memory)) {
    if (os_threads)
      tasks_ = std::make_unique<Threads>();
    else
      tasks_ = std::make_unique<Fibers>();
  }

  template <class T>
  T* scratch(std::size_t count) {
    const std::size_t bytes = std::max<std::size_t>(count, 1) * sizeof(T);
    if (allocate_) return static_cast<T*>(std::memset(allocate_(bytes), 0xff, bytes));
    memory_.push_back(std::make_unique_for_overwrite<std::byte[]>(bytes));
    return static_cast<T*>(std::memset(static_cast<void*>(memory_.back().get()), 0xff, bytes));
  }
  void zero(void* at, std::size_t bytes) { std::memset(at, 0, bytes); }

  template <class Body>
  void run(const Body& body, int64_t blocks, std::size_t dynamic_bytes = 0) {
    std::vector<int> numbers(blocks);
    for (int64_t i = 0; i < blocks; ++i) numbers[i] = static_cast<int>(i);
    std::shuffle(numbers.begin(), numbers.end(), order_);
    for (const int block : numbers) start(body, {block}, static_cast<int>(blocks), dynamic_bytes);
  }

  template <class Body>
  void run_together(const Body& body, int64_t blocks, std::size_t dynamic_bytes = 0) {
    if (blocks > together<Body>(dynamic_bytes)) throw Emulation(std::string(Body::kName) + ": too many blocks");
    std::vector<int> numbers(blocks);
    for (int64_t i = 0; i < blocks; ++i) numbers[i] = static_cast<int>(i);
    start(body, numbers, static_cast<int>(blocks), dynamic_bytes);
  }

  template <class Body>
  int64_t together(std::size_t dynamic_bytes = 0) {
    return dynamic_bytes + sizeof(typename Body::Shared) > most_dynamic_bytes() ? 0 : processors_;
  }
  int processors() const { return processors_; }
  std::size_t most_dynamic_bytes() const { return most_dynamic_bytes_; }
  void set_most_dynamic_bytes(std::size_t bytes) { most_dynamic_bytes_ = bytes; }

 private:
  template <class Body>
  void start(const Body& body, const std::vector<int>& numbers, int blocks, std::size_t dynamic_bytes) {
    using Shared = typename Body::Shared;
    std::vector<std::unique_ptr<BlockState>> states;
    std::vector<std::unique_ptr<Shared, void (*)(Shared*)>> shareds;
    std::vector<std::function<void()>> threads;
    for (const int block : numbers) {
      states.push_back(std::make_unique<BlockState>(Body::kThreads, dynamic_bytes));
      auto* memory = ::operator new(sizeof(Shared), std::align_val_t{alignof(std::max_align_t)});
      std::memset(memory, 0xff, sizeof(Shared));
      shareds.emplace_back(static_cast<Shared*>(memory), [](Shared* at) {
        ::operator delete(static_cast<void*>(at), std::align_val_t{alignof(std::max_align_t)});
      });
      for (int thread = 0; thread < Body::kThreads; ++thread)
        threads.push_back([this, &body, &state = *states.back(), &shared = *shareds.back(), thread, block, blocks] {
          Emulated context(*tasks_, state, thread, block, blocks, Body::kThreads);
          body(context, shared);
          context.finish();
        });
    }
    try {
      tasks_->run(std::move(threads), Body::kThreads, order_);
    } catch (const Emulation& error) {
      throw Emulation(std::string(Body::kName) + ": " + error.what());
    }
  }

  std::mt19937 order_;
  int processors_;
  std::size_t most_dynamic_bytes_ = 96 * 1024;
  std::unique_ptr<Tasks> tasks_;
  std::function<void*(std::size_t)> allocate_;
  std::vector<std::unique_ptr<std::byte[]>> memory_;
};

}  // namespace fastdp::cuda
