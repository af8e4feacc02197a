#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "transport.h"
#include "wait.h"

namespace fastdp::comm {

// What one rank calls. Ranks compare these before any data is touched: a mismatch is an error on every rank.
struct Header {
  std::int64_t sequence = 0;  // number of this collective on its communicator
  Operation operation{};
  Algorithm algorithm{};
  DType dtype{};
  std::int64_t count = 0;  // elements; of all_gather, in this rank's part
  std::int64_t out = -1;   // elements of all_gather's result where the caller brought memory for it
  std::int64_t root = 0;
  std::int64_t segment_bytes = 0;

  bool operator==(const Header&) const = default;
};

inline std::string describe(const Header& header) {
  const auto name = [](auto code, const auto& names) {
    const auto index = static_cast<std::size_t>(code);
    return index < names.size() ? std::string(names[index]) : "unknown " + std::to_string(index);
  };
  std::string text = name(header.operation, kOperationNames) + "(";
  if (header.operation != Operation::barrier) {
    text += "count=" + std::to_string(header.count) + ", dtype=" + name(header.dtype, kDTypeNames) + ", ";
    if (header.operation == Operation::all_reduce)
      text += "algorithm=" + name(header.algorithm, kAlgorithmNames) + ", ";
    if (header.out >= 0) text += "out=" + std::to_string(header.out) + ", ";
    if (header.operation == Operation::broadcast) text += "root=" + std::to_string(header.root) + ", ";
  }
  return text + "segment_bytes=" + std::to_string(header.segment_bytes) + ") as collective " +
         std::to_string(header.sequence);
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

// Memory of an exchange in flight; outlives the requests (see Communicator::abandon).
struct HeaderBuffers {
  explicit HeaderBuffers(int size) : headers(size), sends(size), receives(size), arrived(size), sent(size) {}
  std::vector<Header> headers;  // [size], own one included
  std::vector<Transport::Request> sends, receives;
  std::vector<char> arrived, sent;
};

// An all-gather of 64 bytes by direct messages: P-1 eager sends cost less than MPI_Iallgather's schedule on one host,
// and a timeout can name the ranks that are missing. Nobody leaves before everybody has entered: also a barrier.
inline void exchange_headers(Transport& transport, Wait& wait, const Header& mine, HeaderBuffers& buffers) {
  const int size = transport.size(), rank = transport.rank();
  buffers.headers[rank] = mine;
  for (int peer = 0; peer < size; ++peer) {
    buffers.arrived[peer] = buffers.sent[peer] = peer == rank;
    if (peer == rank) continue;
    buffers.receives[peer] =
        transport.receive(&buffers.headers[peer], sizeof(Header), peer, Transport::Channel::header);
  }
  for (int step = 1; step < size; ++step) {  // each rank starts with another peer
    const int peer = (rank + step) % size;
    buffers.sends[peer] = transport.send(&buffers.headers[rank], sizeof(Header), peer, Transport::Channel::header);
  }
  for (int missing = 2 * (size - 1); missing > 0;) {
    const int before = missing;
    for (int peer = 0; peer < size; ++peer) {
      if (!buffers.arrived[peer] && transport.test(buffers.receives[peer])) buffers.arrived[peer] = 1, --missing;
      if (!buffers.sent[peer] && transport.test(buffers.sends[peer])) buffers.sent[peer] = 1, --missing;
    }
    if (missing < before) {
      wait.progressed();
      continue;
    }
    wait.pause([&] {
      std::vector<int> absent;
      for (int peer = 0; peer < size; ++peer)
        if (!buffers.arrived[peer] || !buffers.sent[peer]) absent.push_back(peer);
      return list_ranks(absent) + " did not call it";
    });
  }
}

// Throws the same text on every rank, since every rank compares the same list.
inline void require_same(std::span<const Header> headers) {
  // The parts of an all_gather may differ in size: everybody learns the sizes here, and whether each result fits.
  const auto shared = [](Header header) {
    if (header.operation == Operation::all_gather) header.count = 0, header.out = -1;
    return header;
  };
  const auto alike = [&](const Header& header) { return shared(header) == shared(headers[0]); };
  std::string text = "ranks disagree: ";
  if (std::ranges::all_of(headers, alike)) {
    std::int64_t total = 0;
    for (const Header& header : headers) total += header.count;
    const auto fits = [&](const Header& header) { return header.out < 0 || header.out == total; };
    if (std::ranges::all_of(headers, fits)) return;
    text = "the parts have " + std::to_string(total) + " elements, and not all of out: ";
  }
  std::vector<char> told(headers.size());
  for (std::size_t i = 0; i < headers.size(); ++i) {
    if (told[i]) continue;
    std::vector<int> same;
    for (std::size_t j = i; j < headers.size(); ++j)
      if (headers[j] == headers[i]) told[j] = 1, same.push_back(static_cast<int>(j));
    if (i) text += "; ";
    text += list_ranks(same) + " called " + describe(headers[i]);
  }
  throw Failure(text);
}

}  // namespace fastdp::comm
