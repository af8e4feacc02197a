#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "transport.h"
#include "work.h"

namespace fastdp::comm {

// Where a tensor lies in memory that the ranks of a host share; the same for those who can take the direct way.
struct Place {
  std::int64_t segment = -1;  // -1: in memory of its own
  std::int64_t offset = 0;    // bytes, in each rank's part of the segment

  static constexpr std::int64_t kSegments = 1 << 16;

  // -1 where there is none; parts are below 2^47 bytes, and segments below kSegments.
  std::int64_t packed() const { return segment < 0 ? -1 : segment << 47 | offset; }
  static Place unpacked(std::int64_t word) {
    return word < 0 ? Place{} : Place{word >> 47, word & ((std::int64_t{1} << 47) - 1)};
  }
};

// What one rank calls. Ranks compare these before any data is touched: a mismatch is an error on every rank.
struct Header {
  std::int64_t sequence = 0;  // number of this collective on its communicator
  Operation operation{};
  Algorithm algorithm{};
  DType dtype{};
  std::int64_t count = 0;  // elements; of all_gather, in this rank's part
  std::int64_t out = -1;   // elements of all_gather's result where the caller brought memory for it
  // Or the width of a sparse_all_reduce, whose count is the rows of the table; or a digest of how reduce_noise_step is
  // called.
  std::int64_t root = 0;
  std::int64_t segment_bytes = 0;
  // These may differ.
  Place place, out_place;
  std::int64_t note = 0;  // this rank's wish, of which all learn (Communicator::noted)

  // 64 bits that differ where same_call does.
  std::uint64_t digest() const {
    std::uint64_t mixed = 0;
    for (const auto field : {sequence, static_cast<std::int64_t>(operation), static_cast<std::int64_t>(algorithm),
                             static_cast<std::int64_t>(dtype), count, out, root, segment_bytes}) {
      mixed = (mixed ^ static_cast<std::uint64_t>(field)) * 0x9e3779b97f4a7c15;
      mixed ^= mixed >> 32;
    }
    return mixed;
  }
  bool same_call(const Header& other) const {
    return sequence == other.sequence && operation == other.operation && algorithm == other.algorithm &&
           dtype == other.dtype && count == other.count && out == other.out && root == other.root &&
           segment_bytes == other.segment_bytes;
  }
};

inline std::string describe(const Header& header, bool with_segments = false) {
  const auto name = [](auto code, const auto& names) {
    const auto index = static_cast<std::size_t>(code);
    return index < names.size() ? std::string(names[index]) : "unknown " + std::to_string(index);
  };
  std::string list;
  const auto add = [&](const char* what, const std::string& value) {
    list += (list.empty() ? "" : ", ") + std::string(what) + "=" + value;
  };
  if (header.operation != Operation::barrier) {
    add("count", std::to_string(header.count));
    add("dtype", name(header.dtype, kDTypeNames));
    if (header.operation == Operation::all_reduce || header.operation == Operation::reduce_scatter)
      add("algorithm", name(header.algorithm, kAlgorithmNames));
    if (header.out >= 0) add("out", std::to_string(header.out));
    if (header.operation == Operation::sparse) add("width", std::to_string(header.root));
    if (header.operation == Operation::broadcast) add("root", std::to_string(header.root));
  }
  if (with_segments) add("segment_bytes", std::to_string(header.segment_bytes));
  return name(header.operation, kOperationNames) + "(" + list + ") as collective " + std::to_string(header.sequence);
}

// "rank 3" or "ranks 0, 2, 5"; more than 8 are cut short.
inline std::string list_ranks(std::span<const int> ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    if (i == 8) return text + " and " + std::to_string(ranks.size() - i) + " more";
    if (i) text += ", ";
    text += std::to_string(ranks[i]);
  }
  return text;
}

// What the ranks of a transport have to say, in the order in which it travels: this rank's headers, then those of the
// rank before it, and so on, around to the rank after it.
class HeaderBlocks {
 public:
  // counts [size]: headers of each rank.
  void lay_out(int rank, std::span<const std::size_t> counts) {
    size_ = static_cast<int>(counts.size()), rank_ = rank;
    begins_.assign(1, 0);
    for (int back = 0; back < size_; ++back)
      begins_.push_back(begins_.back() + counts[static_cast<std::size_t>((rank + size_ - back) % size_)]);
    headers_.resize(begins_.back());
  }
  Header* of(int rank) { return at((rank_ + size_ - rank) % size_); }
  // Of the rank so far before this one; and the bytes of it and the next ones, in all `ranks`.
  Header* at(int back) { return headers_.data() + begins_[back]; }
  std::size_t bytes(int back, int ranks) const { return (begins_[back + ranks] - begins_[back]) * sizeof(Header); }

 private:
  int size_ = 0, rank_ = 0;
  std::vector<std::size_t> begins_;
  std::vector<Header> headers_;
};

// An all-gather of headers (Bruck et al. 1997): in round k, each rank sends to the one 2^k after it all that it knows,
// so that all know all after log2 P rounds. 4 hosts on 2 cores: 105 us, where a message to each took 210. Nobody leaves
// before everybody has entered: also a barrier. Where hosts are known, one rank of each speaks for its host.
class HeaderExchange final : public Work {
 public:
  // blocks: this rank's own is filled in; they must outlive the transport's requests if this is given up.
  HeaderExchange(Transport& transport, HeaderBlocks& blocks) : transport_(transport), blocks_(blocks) {
    for (int back = 1; back < transport.size(); back *= 2)
      receives_.push_back(
          transport.receive(blocks.at(back), blocks.bytes(back, known_at(back)), before(back), kChannel));
    if (!receives_.empty()) send();
  }

  bool done() const override { return arrived_ == receives_.size() && sent_ == receives_.size(); }

  bool advance() override {
    const std::size_t before = arrived_ + sent_;
    if (arrived_ < receives_.size() && transport_.test(receives_[arrived_]) && ++arrived_ < receives_.size()) send();
    if (sent_ < sends_.size() && transport_.test(sends_[sent_])) ++sent_;
    return arrived_ + sent_ > before;
  }

  std::string missing() const override {
    const int rank = arrived_ < receives_.size() ? before(1 << arrived_) : before(-(1 << sent_));
    std::string others;
    if (arrived_ > 0) others += ", or one that it waits for,";
    if (transport_.between_hosts())
      others += " or others of " + std::string(arrived_ > 0 ? "their hosts," : "its host,");
    return "rank " + std::to_string(transport_.name(rank)) + others + " did not call it";
  }
  // Who waits in the first round knows whom for, and tells the others.
  double grace() const override {
    return (transport_.between_hosts() ? kForOtherHosts : 0.0) + (arrived_ > 0 ? kForLaterRounds : 0.0);
  }

 private:
  static constexpr auto kChannel = Transport::Channel::header;
  static constexpr double kForLaterRounds = 0.5;

  int before(int back) const { return (transport_.rank() - back + transport_.size()) % transport_.size(); }
  int known_at(int back) const { return std::min(back, transport_.size() - back); }

  void send() {
    const int back = 1 << sends_.size();
    sends_.push_back(transport_.send(blocks_.at(0), blocks_.bytes(0, known_at(back)), before(-back), kChannel));
  }

  Transport& transport_;
  HeaderBlocks& blocks_;
  std::vector<Transport::Request> sends_, receives_;  // one of each a round
  std::size_t arrived_ = 0, sent_ = 0;
};

// Throws the same text on every rank, since every rank compares the same list.
inline void require_same(std::span<const Header> headers) {
  // The parts of an all_gather may differ in size: everybody learns the sizes here, and whether each result fits.
  const auto shared = [](Header header) {
    if (header.operation == Operation::all_gather) header.count = 0, header.out = -1;
    return header;
  };
  const auto alike = [&](const Header& header) { return shared(header).same_call(shared(headers[0])); };
  std::string text = "ranks disagree: ";
  if (std::ranges::all_of(headers, alike)) {
    std::int64_t total = 0;
    for (const Header& header : headers) total += header.count;
    const auto fits = [&](const Header& header) { return header.out < 0 || header.out == total; };
    if (std::ranges::all_of(headers, fits)) return;
    text = "the parts have " + std::to_string(total) + " elements, and not all of out: ";
  }
  const auto as_large = [&](const Header& header) { return header.segment_bytes == headers[0].segment_bytes; };
  const bool with_segments = !std::ranges::all_of(headers, as_large);
  std::vector<char> told(headers.size());
  for (std::size_t i = 0; i < headers.size(); ++i) {
    if (told[i]) continue;
    std::vector<int> same;
    for (std::size_t j = i; j < headers.size(); ++j)
      if (headers[j].same_call(headers[i])) told[j] = 1, same.push_back(static_cast<int>(j));
    if (i) text += "; ";
    text += list_ranks(same) + " called " + describe(headers[i], with_segments);
  }
  const auto agrees = [&](const Header& header) { return header.root == headers[0].root; };
  if (headers[0].operation == Operation::noise_step && !std::ranges::all_of(headers, agrees))
    text += " (with another noise, batch size, key, step or optimizer's settings)";
  throw Failure(text, Failure::Peers::alike);
}

}  // namespace fastdp::comm
