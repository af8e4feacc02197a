#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include "transport.h"
#include "wait.h"

namespace fastdp::comm {

// Binomial tree over ranks numbered from the root, pipelined by segments: a rank forwards one while the next arrives.
// data [bytes] must outlive the transport's requests if this throws.
inline void tree_broadcast(Transport& transport, Wait& wait, std::byte* data, std::size_t bytes, int root,
                           std::size_t segment_bytes) {
  const int size = transport.size(), from_root = (transport.rank() - root + size) % size;
  const auto rank_of = [&](int position) { return (position + root) % size; };
  constexpr auto channel = Transport::Channel::data;
  // Clearing the lowest set bit leads to the parent; setting a lower one to a child. Far children first: they have
  // the most to forward.
  const int parent = rank_of(from_root & (from_root - 1));
  std::vector<int> children;
  for (int bit = 1; bit < size && !(from_root & bit); bit *= 2)
    if (from_root + bit < size) children.insert(children.begin(), rank_of(from_root + bit));

  const std::size_t segments = (bytes + segment_bytes - 1) / segment_bytes;
  const auto length = [&](std::size_t i) { return std::min(segment_bytes, bytes - i * segment_bytes); };
  constexpr std::size_t kInFlight = 2;  // segments
  std::array<Transport::Request, kInFlight> receives{};
  std::array<std::vector<Transport::Request>, kInFlight> sends;

  const auto post = [&](std::size_t i) {
    if (from_root != 0 && i < segments)
      receives[i % kInFlight] = transport.receive(data + i * segment_bytes, length(i), parent, channel);
  };
  const auto finish_sends = [&](std::size_t i) {
    auto& requests = sends[i % kInFlight];
    for (std::size_t c = 0; c < requests.size(); ++c)
      complete(transport, wait, requests[c], [&] { return "rank " + std::to_string(children[c]) + " took nothing"; });
    requests.clear();
  };

  for (std::size_t i = 0; i < kInFlight; ++i) post(i);
  for (std::size_t i = 0; i < segments; ++i) {
    if (from_root != 0)
      complete(transport, wait, receives[i % kInFlight],
               [&] { return "rank " + std::to_string(parent) + " sent nothing"; });
    post(i + kInFlight);
    finish_sends(i);
    for (const int child : children)
      sends[i % kInFlight].push_back(transport.send(data + i * segment_bytes, length(i), child, channel));
  }
  for (std::size_t i = 0; i < kInFlight; ++i) finish_sends(i);
}

}  // namespace fastdp::comm
