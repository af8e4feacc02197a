#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "ring.h"
#include "transport.h"
#include "work.h"

namespace fastdp::comm {

// Two-tree all-reduce (Sanders, Speck & Traeff 2009): sums go up a binary tree, the total comes down, both pipelined by
// segments. Half of the data takes a second tree in which the leaves of the first are inner nodes, so that everybody
// sends and receives about twice the data, as in the ring, with 2 ceil(log2 P) messages in a row instead of 2(P-1).
// The order of summation is fixed by count and P: node + left subtree + right subtree.
//
// Why this one, by counting, the others were not measured: a binomial tree has as few steps, but its root moves log2 P
// times the data; recursive doubling has half of the steps, but everybody moves log2 P times the data, and ranks beyond
// a power of two cost steps of their own.
// Median microseconds of 2 ranks on 2 quiet cores, three runs of bench/bench_allreduce.py, MPICH 5.0.2 (mpi:
// MPI_Iallreduce, which can be given up):
//            64 B   4 KiB   64 KiB   1 MiB   14 MiB   64 MiB
//     ring    7.3     7.9       27     160     3266    18372
//     tree    6.3     6.9       26     161     3124    15172
//     mpi     7.6     9.3       30     177     4248    39538
// The tree was ahead by 13 % up to 4 KiB and by 13 to 17 % at 64 MiB in each run, and level between. With 4 and 8 ranks
// on these cores, waits for a core (4 ms each) hid all differences between algorithms.

// Neighbours of a rank in a tree; at most two children, added in this order.
struct TreeNode {
  int parent = -1;  // none: the root
  std::vector<int> children;
};

// Position 0 is the root; below it stands the in-order tree of positions 1 to P-1, whose odd positions are its leaves.
// In tree 1 each rank has the position of the next one in tree 0: even positions become odd ones.
inline TreeNode tree_node(int rank, int ranks, int tree) {
  const int position = (rank + tree) % ranks;
  const auto rank_at = [&](int place) { return (place - tree + ranks) % ranks; };
  // The left subtree is complete. `first` - 1 is a multiple of twice this power of two, so tops of inner nodes are
  // even.
  const auto top = [](int first, int last) {
    return first - 1 + static_cast<int>(std::bit_floor(static_cast<unsigned>(last - first + 1)));
  };
  TreeNode node;
  int first = 1, last = ranks - 1;  // positions below this one, itself included unless it is the root
  if (position == 0) {
    if (last >= first) node.children.push_back(rank_at(top(first, last)));
    return node;
  }
  int above = 0;
  for (int here; (here = top(first, last)) != position; above = here) {
    if (position < here) {
      last = here - 1;
    } else {
      first = here + 1;
    }
  }
  node.parent = rank_at(above);
  if (first < position) node.children.push_back(rank_at(top(first, position - 1)));
  if (position < last) node.children.push_back(rank_at(top(position + 1, last)));
  return node;
}

// Requests that are started and finished in one order, at most `window` of them at a time.
class Flow {
 public:
  Flow(std::size_t total, std::size_t window) : total_(total), window_(window) {}

  // Starts what may be started, the first `allowed`, and finishes one if it can: whether it could.
  template <class Start, class Finish>
  bool advance(Transport& transport, std::size_t allowed, Start start, Finish finish) {
    for (; started_ < std::min(allowed, total_) && started_ - finished_ < window_; ++started_)
      requests_[started_ % window_] = start(started_);
    if (!waiting() || !transport.test(requests_[finished_ % window_])) return false;
    finish(finished_++);
    return true;
  }

  std::size_t finished() const { return finished_; }
  bool waiting() const { return finished_ < started_; }
  bool done() const { return finished_ == total_; }

 private:
  std::size_t total_, window_, started_ = 0, finished_ = 0;
  std::array<Transport::Request, std::max(kReceiveBuffers, kSendsInFlight)> requests_{};
};

// One rank's part in one tree. data [count] in place; scratch [kReceiveBuffers * segment].
template <class T>
class TreeSum {
 public:
  TreeSum(Transport& transport, Transport::Channel channel, TreeNode node, T* data, std::size_t count, T* scratch,
          std::size_t segment)
      : transport_(transport),
        channel_(channel),
        node_(std::move(node)),
        data_(data),
        count_(count),
        scratch_(scratch),
        segment_(segment),
        segments_((count + segment - 1) / segment),
        children_(node_.children.size()),
        from_children_(segments_ * children_, kReceiveBuffers),
        to_parent_(node_.parent < 0 ? 0 : segments_, kSendsInFlight),
        from_parent_(node_.parent < 0 ? 0 : segments_, kReceiveBuffers),
        to_children_(segments_ * children_, kSendsInFlight) {}

  // Moves what can be moved without waiting; whether anything was.
  bool advance() {
    const auto nothing = [](std::size_t) {};
    bool moved = from_children_.advance(
        transport_, segments_ * children_,
        [&](std::size_t i) {
          return transport_.receive(slot(i), bytes(i / children_), node_.children[i % children_], channel_);
        },
        [&](std::size_t i) { add(at(i / children_), slot(i), length(i / children_)); });
    moved |= to_parent_.advance(
        transport_, summed(), [&](std::size_t i) { return transport_.send(at(i), bytes(i), node_.parent, channel_); },
        nothing);
    // The total overwrites what was sent.
    moved |= from_parent_.advance(
        transport_, to_parent_.finished(),
        [&](std::size_t i) { return transport_.receive(at(i), bytes(i), node_.parent, channel_); }, nothing);
    moved |= to_children_.advance(
        transport_, (node_.parent < 0 ? summed() : from_parent_.finished()) * children_,
        [&](std::size_t i) {
          return transport_.send(at(i / children_), bytes(i / children_), node_.children[i % children_], channel_);
        },
        nothing);
    return moved;
  }

  bool done() const { return to_children_.done() && from_parent_.done() && from_children_.done(); }

  // Only while it is not done.
  std::string missing() const {
    if (from_children_.waiting())
      return sent_nothing(node_.children[from_children_.finished() % children_], from_children_.finished() / children_);
    if (from_parent_.waiting()) return sent_nothing(node_.parent, from_parent_.finished());
    if (to_parent_.waiting()) return took_nothing(node_.parent, to_parent_.finished());
    return took_nothing(node_.children[to_children_.finished() % children_], to_children_.finished() / children_);
  }

 private:
  // Segments to which all children have been added.
  std::size_t summed() const { return children_ ? from_children_.finished() / children_ : segments_; }
  T* at(std::size_t segment) { return data_ + segment * segment_; }
  T* slot(std::size_t receive) { return scratch_ + receive % kReceiveBuffers * segment_; }
  std::size_t length(std::size_t segment) const { return std::min(segment_, count_ - segment * segment_); }
  std::size_t bytes(std::size_t segment) const { return length(segment) * sizeof(T); }
  std::string of(std::size_t segment) const {
    return "segment " + std::to_string(segment) + " of " + std::to_string(segments_);
  }
  std::string sent_nothing(int rank, std::size_t segment) const {
    return "rank " + std::to_string(transport_.name(rank)) + " sent nothing (" + of(segment) +
           "; it may itself be waiting for another rank)";
  }
  std::string took_nothing(int rank, std::size_t segment) const {
    return "rank " + std::to_string(transport_.name(rank)) + " took nothing (" + of(segment) + ")";
  }

  Transport& transport_;
  Transport::Channel channel_;
  TreeNode node_;
  T* data_;
  std::size_t count_;
  T* scratch_;
  std::size_t segment_, segments_, children_;
  Flow from_children_, to_parent_, from_parent_, to_children_;
};

inline constexpr int kTrees = 2;
// Fewer elements take the first tree only: half of so little saves less than a second message costs.
inline constexpr std::size_t kTwoTreesFrom = 4096;

// data [count] in place; scratch [kTrees * kReceiveBuffers * segment]. Both must outlive the transport's requests if it
// is given up.
template <class T>
class TreeAllReduce final : public Work {
 public:
  TreeAllReduce(Transport& transport, T* data, std::size_t count, T* scratch, std::size_t segment)
      : TreeAllReduce(transport, data, count, count < kTwoTreesFrom ? count : (count + 1) / 2, scratch, segment) {}

  bool done() const override { return one_.done() && two_.done(); }
  bool advance() override {
    const bool moved = one_.advance(), moved_too = two_.advance();
    return moved || moved_too;
  }
  std::string missing() const override { return (one_.done() ? two_ : one_).missing(); }

 private:
  // Channels of their own: one rank may be another's parent in one tree and its child in the other.
  TreeAllReduce(Transport& transport, T* data, std::size_t count, std::size_t first, T* scratch, std::size_t segment)
      : one_(transport, Transport::Channel::data, tree_node(transport.rank(), transport.size(), 0), data, first,
             scratch, segment),
        two_(transport, Transport::Channel::second_tree, tree_node(transport.rank(), transport.size(), 1), data + first,
             count - first, scratch + kReceiveBuffers * segment, segment) {}

  TreeSum<T> one_, two_;
};

}  // namespace fastdp::comm
