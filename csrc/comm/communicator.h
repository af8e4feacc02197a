#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "algorithms.h"
#include "broadcast.h"
#include "header.h"
#include "hosts.h"
#include "segments.h"
#include "shared.h"
#include "transport.h"
#include "wait.h"

namespace fastdp::comm {

// The collectives of some ranks. They run one after the other, in the order in which they were started, whenever this
// rank asks about one. After the first failure every call fails with the first reason: ranks no longer agree on what
// comes next.
class Communicator {
 public:
  Communicator(std::unique_ptr<Transport> transport, WaitPolicy policy, std::size_t segment_bytes)
      : transport_(std::move(transport)),
        signals_(std::move(policy.check)),
        policy_{policy.timeout_seconds, [this] { check_peers(); }, std::move(policy.let_go), policy.yield_for},
        segment_bytes_(segment_bytes),
        headers_(std::make_unique<Headers>()),
        algorithms_(std::make_unique<Algorithms>(*transport_, segments_, segment_bytes)) {
    headers_->of.resize(transport_->size());
  }
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  ~Communicator() {
    if (!running_.empty()) fail("the communicator was dropped with collectives under way");
    if (!failure_.empty() && pending()) unfinished = true;
    if (transport_->outstanding() > 0) abandon();
  }
  // Whether one is gone whose peers MPI_Finalize would wait for.
  static inline std::atomic<bool> unfinished = false;

  // From now on the ranks of this host meet in `memory`, and the hosts are known. Between collectives, on all ranks.
  void join(std::unique_ptr<Hosts> hosts) {
    hosts_ = std::move(hosts);
    algorithms_->join(*hosts_);
    policy_.spin = hosts_->single();
  }

  // What the caller wants kept until a collective has ended, or for good where MPI may still write after a failure.
  using Keep = std::shared_ptr<void>;

  // Sums data [count] over the ranks into out, which is data or does not overlap it: all of it, or for a reduce_scatter
  // this rank's chunk (even_chunks), and then the other chunks are left with anything.
  std::int64_t start_sum(Operation operation, void* data, void* out, std::size_t count, DType dtype,
                         Algorithm algorithm, Keep keep = {}) {
    const Header header = sum_header(operation, data, out, count, dtype, algorithm);
    return start(
        header, [=, this] { return algorithms_->sum(running_.front().header, data, out); }, std::move(keep),
        header.algorithm == Algorithm::shared && operation == Operation::all_reduce ? data : nullptr);
  }

  // An all-reduce by loads and stores, at once: the same as start_sum and wait, without what makes those wait their
  // turn. What has ended since the last call.
  std::vector<Keep> sum_shared(void* data, void* out, std::size_t count, DType dtype) {
    const Busy busy(*this);
    while (!running_.empty()) wait_for(sequence_);
    Header header = sum_header(Operation::all_reduce, data, out, count, dtype, Algorithm::shared);
    header.sequence = ++sequence_;
    failing(header, [&] {
      Wait wait(policy_);
      RollCall roll = roll_call(header, data);
      wait.finish(roll);
      if (const auto differ = compare(header)) wait.finish(*differ);
      if (const auto work = algorithms_->sum(header, data, out)) wait.finish(*work);
    });
    finished_ = sequence_;
    return std::exchange(ended_, {});
  }

  // part [count], which may lie in the result. `result` maps the elements of all parts to where they go, [elements],
  // which outlives the transport's requests if this throws. out: how many it has room for, -1 for as many as needed.
  std::int64_t start_all_gather(const void* part, std::size_t count, DType dtype, std::int64_t out,
                                std::function<void*(std::size_t)> result, Keep keep = {}) {
    Header header = header_of(Operation::all_gather, count, dtype);
    header.out = out;
    const auto body = [=, this] {
      std::vector<std::size_t> begins{0};  // bytes
      for (const Header& each : headers_->of)
        begins.push_back(begins.back() + static_cast<std::size_t>(each.count) * item_bytes(dtype));
      auto* bytes = static_cast<std::uint8_t*>(result(begins.back() / item_bytes(dtype)));
      if (count > 0) std::memmove(bytes + begins[rank()], part, count * item_bytes(dtype));
      return algorithms_->move(bytes, std::move(begins));
    };
    return start(header, body, std::move(keep));
  }

  // data [count]: from `root` to the others
  std::int64_t start_broadcast(void* data, std::size_t count, DType dtype, int root, Keep keep = {}) {
    Header header = header_of(Operation::broadcast, count, dtype);
    header.root = root;
    const auto body = [=, this]() -> std::unique_ptr<Work> {
      const std::size_t bytes = count * item_bytes(dtype);
      if (!single_host())
        return std::make_unique<TreeBroadcast>(*transport_, static_cast<std::byte*>(data), bytes, root, segment_bytes_);
      std::vector<std::size_t> parts(size() + 1, 0);
      std::fill(parts.begin() + root + 1, parts.end(), bytes);
      return algorithms_->move(static_cast<std::uint8_t*>(data), std::move(parts));
    };
    return start(header, body, std::move(keep));
  }

  // Nothing but the headers: a barrier, or what comes before and after the ranks touch each other's memory by
  // themselves.
  std::int64_t start_meeting(Operation operation, std::size_t count, DType dtype, std::int64_t width) {
    Header header = header_of(operation, count, dtype);
    header.root = width;
    return start(header, [] { return nullptr; }, {});
  }

  // Whether the collective of that number has ended; and what has ended since the last call.
  std::pair<bool, std::vector<Keep>> test(std::int64_t sequence) {
    const Busy busy(*this);
    while (finished_ < sequence && advance()) {
    }
    const bool ended = finished_ >= sequence;
    if (!ended) {
      failing(running_.front().header, [&] { wait_->check_deadline(running_.front().work); });
      if (policy_.yield_for.count() == 0) sched_yield();  // those who are waited for may need this core
    }
    return {ended, std::exchange(ended_, {})};
  }

  std::vector<Keep> wait(std::int64_t sequence) {
    const Busy busy(*this);
    wait_for(sequence);
    return std::exchange(ended_, {});
  }

  // This rank gives up: the others are told, where they can be, and no call succeeds any more.
  void fail(const std::string& reason) {
    if (!failure_.empty()) return;
    failure_ = reason;
    if (hosts_ != nullptr) hosts_->team().give_up(reason);
    if (!single_host()) transport_->give_up(reason);
  }

  // In a process that was forked from this rank: the rank lives on elsewhere, and nobody is told anything.
  void forked() {
    forked_ = true;
    if (failure_.empty()) failure_ = "this process was forked from rank " + std::to_string(rank()) + ", which goes on";
  }

  // This rank's program ends. Those of its host need not wait for what it has not called.
  void leave() {
    if (hosts_ != nullptr) hosts_->team().leave();
  }

  // Ranks outnumber the cores that they may use.
  void share_cores() { policy_.yield_for = {}; }

  // A wish that travels with this rank's next collectives, and whether any rank had it in the last one that ended.
  void set_note(bool note) { note_ = note; }
  bool noted() const { return noted_; }

  int rank() const { return transport_->rank(); }
  int size() const { return transport_->size(); }
  bool single_host() const { return hosts_ != nullptr && hosts_->single(); }
  Transport& transport() { return *transport_; }
  Segments& segments() { return segments_; }
  Team& team() { return hosts_->team(); }  // once joined
  // Empty, or why this communicator is unusable.
  const std::string& failure() const { return failure_; }
  // Whether MPI may wait for a rank that is gone, or memory passed to a failed collective be read or written by a late
  // one.
  bool pending() const { return !forked_ && (peers_missing_ || transport_->outstanding() > 0); }

 private:
  struct Headers {
    std::vector<Header> of;                   // [size], own one included
    std::vector<std::vector<Header>> blocks;  // as they travel
  };

  struct Running {
    Header header;
    InTurn work;
    Keep keep;
  };

  // One thread at a time, and no signal handler in the middle of a collective.
  class Busy {
   public:
    explicit Busy(Communicator& of) : flag_(of.busy_) {
      if (flag_.test_and_set())
        throw Failure("this communicator is in use by another thread or by the caller of this signal handler");
      if (of.failure_.empty()) return;
      flag_.clear();
      throw Failure("this communicator failed before: " + of.failure_);
    }
    ~Busy() { flag_.clear(); }
    Busy(const Busy&) = delete;

   private:
    std::atomic_flag& flag_;
  };

  // MPI has no safe way to take back a send, so after a failure the memory of requests in flight is leaked on purpose,
  // at most kTrees * kReceiveBuffers segments per failed communicator, and what the caller wanted kept.
  void abandon() {
    static_cast<void>(headers_.release());
    static_cast<void>(algorithms_.release());
    static_cast<void>(new std::deque<Running>(std::move(running_)));
  }

  Header header_of(Operation operation, std::size_t count, DType dtype) const {
    Header header;
    header.operation = operation;
    header.count = static_cast<std::int64_t>(count);
    header.dtype = dtype;
    header.segment_bytes = static_cast<std::int64_t>(segment_bytes_);
    header.note = note_;
    return header;
  }

  // data: of an all-reduce by loads and stores, else null.
  std::int64_t start(Header header, InTurn::Make body, Keep keep, const void* data = nullptr) {
    const Busy busy(*this);
    if (header.algorithm == Algorithm::shared && header.operation <= Operation::reduce_scatter && !single_host())
      throw Failure("algorithm \"shared\" is for ranks that share memory");
    header.sequence = ++sequence_;
    const auto roll = [=, this]() -> std::unique_ptr<Work> {
      if (single_host()) return std::make_unique<RollCall>(roll_call(header, data));
      return exchange(header);
    };
    const auto compare = [this, header]() -> std::unique_ptr<Work> {
      if (single_host()) return this->compare(header);
      read_headers();
      check_news();  // a rank that comes too late finds the others' headers, but they have left since
      return nullptr;
    };
    running_.push_back({header, InTurn({roll, compare, std::move(body)}), std::move(keep)});
    return sequence_;
  }

  std::unique_ptr<Work> exchange(const Header& mine) {
    if (hosts_ != nullptr) return hosts_->exchange(mine, headers_->blocks, headers_->of);
    headers_->blocks.assign(size(), std::vector<Header>(1));
    headers_->blocks[rank()][0] = mine;
    return std::make_unique<HeaderExchange>(*transport_, headers_->blocks);
  }

  Header sum_header(Operation operation, const void* data, const void* out, std::size_t count, DType dtype,
                    Algorithm algorithm) {
    Header header = header_of(operation, count, dtype);
    header.algorithm = algorithm;
    header.place = segments_.place_of(data);
    header.out_place = out == data ? header.place : segments_.place_of(out);
    return header;
  }

  Team::Call call_of(const Header& header) const {
    // The note is the lowest bit of what is alike but for it.
    return {(header.digest() & ~std::uint64_t{1}) | static_cast<std::uint64_t>(header.note), header.place.packed(),
            header.out_place.packed()};
  }

  // data: of an all-reduce, left in this rank's letter where that may be all that is needed; else null.
  RollCall roll_call(const Header& header, const void* data) {
    Team& team = hosts_->team();
    const Team::Call call = call_of(header);
    const std::size_t bytes = static_cast<std::size_t>(header.count) * item_bytes(header.dtype);
    if (data != nullptr && Team::fits_letter(bytes, call.in_segment()))
      std::memcpy(team.letter(team.rank(), header.sequence).data, data, bytes);
    return {team, header.sequence, call};
  }

  void wait_for(std::int64_t sequence) {
    while (finished_ < sequence)
      if (!advance()) failing(running_.front().header, [&] { wait_->pause(running_.front().work); });
  }

  // Takes the first of those that run further; whether it moved.
  bool advance() {
    Running& first = running_.front();
    if (!wait_) wait_.emplace(policy_);
    bool moved = false;
    failing(first.header, [&] {
      moved = first.work.advance();
      if (moved) wait_->progressed();
    });
    if (!first.work.done()) return moved;
    finished_ = first.header.sequence;
    if (first.keep) ended_.push_back(std::move(first.keep));
    running_.pop_front();
    wait_.reset();
    return true;
  }

  // Whatever goes wrong in `body` is the end of this communicator.
  template <class Body>
  void failing(const Header& header, Body body) {
    try {
      body();
    } catch (const Failure& failure) {
      peers_missing_ = failure.peers == Failure::Peers::missing;
      const std::string text = describe(header) + " on rank " + std::to_string(rank()) + " of " +
                               std::to_string(size()) + ": " + failure.what() + troubles(failure.what());
      if (failure.peers == Failure::Peers::alike)
        failure_ = text;
      else
        fail(text);
      throw Failure(text, failure.peers);
    } catch (...) {
      peers_missing_ = true;
      fail(describe(header) + " on rank " + std::to_string(rank()) + ": interrupted by a signal");
      throw;
    }
  }

  // Of this host's ranks. MPI may know of a death some milliseconds before the system says so, and names nobody.
  std::string troubles(const std::string& known) const {
    if (hosts_ == nullptr || !peers_missing_) return "";
    std::string text = hosts_->team().troubles();
    for (int tries = 0; text.empty() && known.starts_with("MPI_") && tries < 20; ++tries) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      text = hosts_->team().troubles();
    }
    const bool told = !text.empty() && known.find(text.substr(2)) != std::string::npos;
    return told ? "" : text;
  }

  void check_peers() {
    signals_();
    if (hosts_ != nullptr) hosts_->team().check();
    if (!single_host()) check_news();
  }

  void check_news() {
    const std::string news = transport_->heard();
    if (!news.empty()) throw Failure(news, Failure::Peers::missing);
  }

  // After the roll call: whether all called the same. If not, or if all need to know what the others said (parts of an
  // all-gather), they exchange their headers.
  std::unique_ptr<Work> compare(const Header& mine) {
    Team& team = hosts_->team();
    team.check_given_up();
    constexpr std::uint64_t note = 1;
    std::uint64_t differ = 0, notes = 0;
    for (int rank = 0; rank < team.size(); ++rank) {
      const std::uint64_t theirs = team.call(rank, mine.sequence).digest;
      differ |= theirs ^ mine.digest();
      notes |= theirs;
    }
    noted_ = (notes & note) != 0;
    if ((differ & ~note) == 0 && mine.operation != Operation::all_gather) return nullptr;
    const auto tell = [this, mine]() -> std::unique_ptr<Work> {
      Team& team = hosts_->team();
      std::memcpy(team.letter(team.rank(), mine.sequence).data, &mine, sizeof mine);
      return std::make_unique<Meeting>(team);
    };
    const auto read = [this, mine]() -> std::unique_ptr<Work> {
      const Team& team = hosts_->team();
      for (int rank = 0; rank < team.size(); ++rank)
        std::memcpy(&headers_->of[rank], team.letter(rank, mine.sequence).data, sizeof mine);
      require_same(headers_->of);
      return nullptr;
    };
    return std::make_unique<InTurn>(std::vector<InTurn::Make>{tell, read});
  }

  void read_headers() {
    if (hosts_ == nullptr)
      for (int rank = 0; rank < size(); ++rank) headers_->of[rank] = headers_->blocks[rank][0];
    require_same(headers_->of);
    noted_ = false;
    for (const Header& header : headers_->of) noted_ = noted_ || header.note != 0;
  }

  std::unique_ptr<Transport> transport_;
  std::function<void()> signals_;
  WaitPolicy policy_;
  std::size_t segment_bytes_;
  std::unique_ptr<Headers> headers_;
  Segments segments_;
  std::unique_ptr<Hosts> hosts_;
  std::unique_ptr<Algorithms> algorithms_;
  std::deque<Running> running_;
  std::vector<Keep> ended_;                   // since the caller was last told
  std::optional<Wait> wait_;                  // for the first of them
  std::int64_t sequence_ = 0, finished_ = 0;  // last that was started, last that ended
  bool note_ = false, noted_ = false, peers_missing_ = false, forked_ = false;
  std::string failure_;
  std::atomic_flag busy_;
};

}  // namespace fastdp::comm
