// Poisson sampling: the CPU's batch (sample-simd.h), drawn by a thread for each 4096 records. Counted first and drawn
// again once the places are known: the generator is cheaper than room for what every block might take.
#pragma once

#include "lane.h"
#include "noise.h"

namespace fastdp::cuda {

// Calls take(i), ascending, for those of the records 0..n-1 of sampling block `block` that are in the batch.
template <class Take>
FASTDP_DEVICE void sample_block(const Stream& s, int64_t block, int64_t n, double log_out, Take take) {
  int64_t at = 0;
  for (uint64_t next = block * kBlocksPerSample; at < n; ++next) {
    u32v words[16];
    stream_blocks(s, next, words);
    FASTDP_UNROLL_16
    for (int k = 0; k < 16; k += 2) {
      if (at >= n) break;
      const double skip = portable_log(open_unit(words[k], words[k + 1])) / log_out;
      if (skip >= static_cast<double>(n - at)) return;
      at += static_cast<int64_t>(skip);
      take(at++);
    }
  }
}

// counts[block], or, where places are known, the ids themselves, as far as there is room for them.
template <bool kCounts>
struct Sample {
  static constexpr const char* kName = "poisson_sample";
  static constexpr int kThreads = 128;
  using Shared = NothingShared;

  Stream stream;
  int64_t n;
  double log_out;  // log(1 - rate); 0: all are in
  int64_t* places;
  int64_t* ids;
  int64_t room;

  FASTDP_BOTH int64_t samples() const { return (n + kSampleBlock - 1) / kSampleBlock; }
  int64_t blocks() const { return (samples() + kThreads - 1) / kThreads; }

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared&) const {
    const int64_t block = int64_t{c.block()} * kThreads + c.thread();
    if (block >= samples()) return;
    const int64_t first = block * kSampleBlock;
    int64_t place = kCounts ? 0 : places[block];
    const auto take = [&](int64_t i) {
      if (!kCounts && place < room) ids[place] = first + i;
      ++place;
    };
    const int64_t size = n - first < kSampleBlock ? n - first : kSampleBlock;
    if (log_out == 0.0)
      for (int64_t i = 0; i < size; ++i) take(i);
    else
      sample_block(stream, block, size, log_out, take);
    if (kCounts) places[block] = place;
  }
};

// counts[n] become places, the sum of those before; total[0] is that of all. By one block: 1.2 million records are 293.
struct CountsToPlaces {
  static constexpr const char* kName = "poisson_sample";
  static constexpr int kThreads = 256;
  struct Shared {
    int64_t warps[kThreads / kWarp];
  };

  int64_t* counts;
  int64_t n;
  int64_t* total;

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    int64_t before = 0;
    for (int64_t from = 0; from < n; from += kThreads) {
      const int64_t i = from + c.thread(), count = i < n ? counts[i] : 0;
      int64_t sum = count;  // of this lane and those below it
      for (int by = 1; by < kWarp; by *= 2) {
        const int64_t below = c.shuffle(sum, c.lane() >= by ? c.lane() - by : c.lane());
        if (c.lane() >= by) sum += below;
      }
      if (c.lane() == kWarp - 1) s.warps[c.warp()] = sum;
      c.sync();
      int64_t here = 0, all = 0;
      for (int warp = 0; warp < kThreads / kWarp; ++warp) {
        if (warp == c.warp()) here = all;
        all += s.warps[warp];
      }
      if (i < n) counts[i] = before + here + sum - count;
      before += all;
      c.sync();  // before warps are written again
    }
    if (c.thread() == 0) *total = before;
  }
};

// ids[room], ascending: those of 0..n-1 that are in the batch, each with probability `rate`; total: how many, which may
// be more than there was room for.
template <class Launcher>
void poisson_sample(Launcher& on, int64_t n, double rate, const Stream& stream, int64_t* ids, int64_t room,
                    int64_t* total) {
  if (rate <= 0.0) n = 0;
  Sample<true> counts{stream, n, rate >= 1.0 ? 0.0 : portable_log1m(rate), nullptr, nullptr, 0};
  counts.places = on.template scratch<int64_t>(counts.samples());
  on.run(counts, counts.blocks());
  on.run(CountsToPlaces{counts.places, counts.samples(), total}, 1);
  on.run(Sample<false>{stream, n, counts.log_out, counts.places, ids, room}, counts.blocks());
}

}  // namespace fastdp::cuda
