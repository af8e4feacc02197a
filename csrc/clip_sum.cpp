// Sums of rows over their columns: clip_sum and sum_rows.
#include <atomic>
#include <thread>

#include "ops.h"
#include "parts.h"
#include "threads.h"

namespace fastdp {
namespace {

// What clip_sum norms and then sums before it goes on, which the second-level cache holds, or kRows rows if those are
// larger; and elements of a part of it.
constexpr int64_t kGroupBytes = 1 << 18, kGroupPart = kRows * kPart;

// Waits for what another thread does meanwhile; that thread may have lost its core.
void wait_for(const std::atomic<int64_t>& count, int64_t value) {
  for (int tries = 0; count.load(std::memory_order_acquire) < value; ++tries)
    if (tries > 1000) std::this_thread::yield();
}

// clip_sum in one pass over memory. A group of rows is normed, which leaves it in cache, and then summed; columns are
// cut into pieces, and each piece of `out` takes the groups in order. The parts are numbered so that a part only waits
// for parts of lower numbers, which a thread has begun already: no barrier, no deadlock with any number of threads. The
// norms of a few pieces of the next group come before the sums of this one, so that nobody waits for the last norm.
template <class T>
class OnePass {
 public:
  using Sum = typename SumOf<T>::type;

  OnePass(Rows<T> g, double max_norm, Sum* out, int threads)
      : g_(g),
        max_norm_(max_norm),
        out_(out),
        threads_(threads),
        group_(group_of(g)),
        width_(std::clamp<int64_t>(kGroupPart / group_, 1024, kPart)),
        pieces_(ceil_div(g.n, width_)),
        ahead_(threads > 1 ? std::min<int64_t>(threads, pieces_) : 0),
        partial_(g.rows * pieces_),
        factors_(g.rows),
        normed_(ceil_div(g.rows, group_)),
        added_(pieces_) {}

  void run() {
    const int64_t groups = static_cast<int64_t>(normed_.size());
    parallel_parts(threads_, (groups + 1) * 2 * pieces_, [&](int64_t part) {
      const int64_t number = part / (2 * pieces_), at = part % (2 * pieces_);
      if (at >= ahead_ && at < ahead_ + pieces_) {
        if (number > 0) add(number - 1, at - ahead_);
      } else if (number < groups) {
        norm(number, at < ahead_ ? at : at - pieces_);
      }
    });
  }

 private:
  static int64_t group_of(Rows<T> g) {
    const int64_t rows = kGroupBytes / std::max<int64_t>(1, g.n * static_cast<int64_t>(sizeof(T)));
    return std::max(kRows, rows / kRows * kRows);
  }

  Rows<T> rows_of(int64_t group) const {
    const int64_t from = group * group_;
    return {g_.row(from), std::min(group_, g_.rows - from), g_.n, g_.stride};
  }

  void norm(int64_t group, int64_t piece) {
    const int64_t from = group * group_;
    const Rows<T> rows = rows_of(group);
    kernels().typed(T{}).square_rows(columns(rows, piece * width_, width_), &partial_[piece * g_.rows + from]);
    if (normed_[group].fetch_add(1, std::memory_order_acq_rel) + 1 < pieces_) return;
    std::vector<double> sq(rows.rows);
    for (int64_t i = 0; i < rows.rows; ++i) sq[i] = sum_pieces(&partial_[from + i], pieces_, g_.rows);
    clip_factors<T>(sq.data(), rows.rows, 1.0, max_norm_, &factors_[from]);
    normed_[group].store(pieces_ + 1, std::memory_order_release);
  }

  void add(int64_t group, int64_t piece) {
    wait_for(normed_[group], pieces_ + 1);
    wait_for(added_[piece], group);
    const Rows<T> rows = columns(rows_of(group), piece * width_, width_);
    Sum* to = out_ + piece * width_;
    if (group == 0) std::fill(to, to + rows.n, Sum{0});
    kernels().typed(T{}).accumulate_rows(rows, &factors_[group * group_], to);
    added_[piece].store(group + 1, std::memory_order_release);
  }

  const Rows<T> g_;
  const double max_norm_;
  Sum* const out_;
  const int threads_;
  const int64_t group_, width_, pieces_, ahead_;  // rows of a group, columns of a piece, pieces, pieces normed early
  std::vector<double> partial_, factors_;         // squares of [piece, row], factor of [row]
  std::vector<std::atomic<int64_t>> normed_;      // pieces of each group; one more when its factors are there
  std::vector<std::atomic<int64_t>> added_;       // groups in each piece of out
};

}  // namespace

template <class T>
void clip_sum(Rows<T> g, double max_norm, typename SumOf<T>::type* out, int threads) {
  if (g.rows == 0)
    std::fill(out, out + g.n, 0);
  else if (g.n > 0)
    OnePass<T>(g, max_norm, out, threads).run();
}

template <class T>
void sum_rows(Rows<T> g, const double* factors, typename SumOf<T>::type* out, bool add, int threads) {
  // Columns are shared out, not rows, so that each sum is added in the order of the records.
  const int64_t width = std::clamp<int64_t>(kGroupPart / std::max<int64_t>(1, g.rows), 1024, kPart);
  parallel_parts(threads, ceil_div(g.n, width), [&](int64_t part) {
    const Rows<T> rows = columns(g, part * width, width);
    auto* to = out + part * width;
    if (!add) std::fill(to, to + rows.n, 0);
    kernels().typed(T{}).accumulate_rows(rows, factors, to);
  });
}

#define FASTDP_INSTANTIATE(T)                                    \
  template void clip_sum(Rows<T>, double, SumOf<T>::type*, int); \
  template void sum_rows(Rows<T>, const double*, SumOf<T>::type*, bool, int);
FASTDP_INSTANTIATE(float)
FASTDP_INSTANTIATE(bf16)
FASTDP_INSTANTIATE(double)

}  // namespace fastdp
