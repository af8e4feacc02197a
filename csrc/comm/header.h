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

// An all-gather of headers by direct messages: P-1 eager sends cost less than MPI_Iallgather's schedule on one host,
// and a timeout can name the ranks that are missing. In log2 P rounds (Bruck et al. 1997) a barrier of 4 hosts on 2
// cores takes 110 us instead of 210, but whoever waits for one that forwards names an innocent one. Nobody leaves
// before everybody has entered: also a barrier. Where hosts are known, it is one rank of each that speaks for its host.
class HeaderExchange final : public Work {
 public:
  // blocks [transport.size()]: of each rank, what it has to say, its own among them; they must outlive the transport's
  // requests if this is given up.
  HeaderExchange(Transport& transport, std::vector<std::vector<Header>>& blocks)
      : transport_(transport),
        sends_(blocks.size()),
        receives_(blocks.size()),
        arrived_(blocks.size()),
        sent_(blocks.size()),
        missing_(2 * (blocks.size() - 1)) {
    const int size = transport.size(), rank = transport.rank();
    for (int peer = 0; peer < size; ++peer) {
      arrived_[peer] = sent_[peer] = peer == rank;
      if (peer != rank)
        receives_[peer] = transport.receive(blocks[peer].data(), blocks[peer].size() * sizeof(Header), peer,
                                            Transport::Channel::header);
    }
    for (int step = 1; step < size; ++step) {  // each rank starts with another peer
      const int peer = (rank + step) % size;
      sends_[peer] =
          transport.send(blocks[rank].data(), blocks[rank].size() * sizeof(Header), peer, Transport::Channel::header);
    }
  }

  bool done() const override { return missing_ == 0; }

  bool advance() override {
    const std::size_t before = missing_;
    for (std::size_t peer = 0; peer < arrived_.size(); ++peer) {
      if (!arrived_[peer] && transport_.test(receives_[peer])) arrived_[peer] = 1, --missing_;
      if (!sent_[peer] && transport_.test(sends_[peer])) sent_[peer] = 1, --missing_;
    }
    return missing_ < before;
  }

  std::string missing() const override {
    std::vector<int> absent;
    for (std::size_t peer = 0; peer < arrived_.size(); ++peer)
      if (!arrived_[peer] || !sent_[peer]) absent.push_back(transport_.name(static_cast<int>(peer)));
    return list_ranks(absent) + (transport_.between_hosts() ? ", or others of their hosts," : "") + " did not call it";
  }
  double grace() const override { return transport_.between_hosts() ? kForOtherHosts : 0.0; }

 private:
  Transport& transport_;
  std::vector<Transport::Request> sends_, receives_;
  std::vector<char> arrived_, sent_;
  std::size_t missing_;
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
