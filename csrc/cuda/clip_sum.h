// Norms, factors and sum in one: rows are read once, D sizeof(T) bytes each, if they fit on the chip, else twice.
// Registers (as in norms.h): ClipSumStaged 48, ClipSumHeld 57 to 80 with 8 elements a thread and 128, so that two
// blocks share a multiprocessor, with 24 or, of a warp, 32. double: 225 there at most.
#pragma once

#include "sums.h"

namespace fastdp::cuda {

// ---- rows in registers

// A team, which is a warp or the block, has a row in its registers, kHeld elements a thread, while the next one is
// loaded. Teams take `each` rows, one after the other; a block's sums are out's row of its number.
template <class T, int kTeam, int kHeld, bool kAligned>
struct ClipSumHeld {
  static constexpr const char* kName = "clip_sum";
  static constexpr int kThreads = kRowThreads, kTeams = kThreads / kTeam;
  static constexpr int kPer = Pack<T>::kCount, kPacks = kHeld / kPer;
  static constexpr int64_t kMost = kTeam * kHeld;  // columns
  using F = typename SumOf<T>::type;
  struct Shared {
    double sums[kRowWarps];
    Factor<F> factor;
    F columns[kTeams > 1 ? kMost : 1];
  };

  Rows<T> g;
  double max_norm;
  int64_t each;
  F* out;  // [blocks, g.n]

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    const Columns<T, kTeam, kAligned> columns{c.thread() % kTeam};
    const int64_t from = (int64_t{c.block()} * kTeams + c.thread() / kTeam) * each;
    const int64_t rows = from + each < g.rows ? each : g.rows - from;
    const T* row = g.row(from);
    F sums[kPacks][kPer] = {};
    Pack<T> x[kPacks], next[kPacks];
    if (rows > 0) read(columns, row, next);
    for (int left = static_cast<int>(rows); left > 0; --left) {
      FASTDP_UNROLL
      for (int k = 0; k < kPacks; ++k) x[k] = next[k];
      row += g.stride;
      if (left > 1) read(columns, row, next);
      double sum = 0.0;
      FASTDP_UNROLL
      for (int k = 0; k < kPacks; ++k) sum += squares(x[k]);
      const Factor<F> factor = team_factor(c, s, sum);
      FASTDP_UNROLL
      for (int k = 0; k < kPacks; ++k) add_scaled(sums[k], x[k], factor);
    }
    write(c, s, columns, sums);
  }

 private:
  using Own = Columns<T, kTeam, kAligned>;

  FASTDP_DEVICE void read(const Own& columns, const T* row, Pack<T> (&x)[kPacks]) const {
    FASTDP_UNROLL
    for (int k = 0; k < kPacks; ++k) x[k] = columns.load(row, static_cast<int>(g.n), k);
  }

  // One thread makes the block's factor: a square root and a division in double by all would take as long as the row.
  template <class Context>
  FASTDP_DEVICE Factor<F> team_factor(Context& c, Shared& s, double sum) const {
    sum = warp_sum(c, sum);
    if constexpr (kTeams > 1) return Factor<F>::of(clip_factor<F>(sum, 1.0, max_norm, -1.0));
    if (c.lane() == 0) s.sums[c.warp()] = sum;
    c.sync();
    if (c.thread() == 0) {
      for (int w = 1; w < kRowWarps; ++w) sum += s.sums[w];
      s.factor = Factor<F>::of(clip_factor<F>(sum, 1.0, max_norm, -1.0));
    }
    c.sync();
    return s.factor;
  }

  // Teams add to the block's sums in turn.
  template <class Context>
  FASTDP_DEVICE void write(Context& c, Shared& s, const Own& columns, const F (&sums)[kPacks][kPer]) const {
    F* to = out + c.block() * g.n;
    for (int team = 0; team < kTeams; ++team) {
      if (team == c.thread() / kTeam) add_team(columns, sums, team == 0, team == kTeams - 1, s.columns, to);
      if (team < kTeams - 1) c.sync();
    }
  }
  FASTDP_DEVICE void add_team(const Own& columns, const F (&sums)[kPacks][kPer], bool first, bool last, F* shared,
                              F* to) const {
    FASTDP_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      FASTDP_UNROLL
      for (int j = 0; j < kPer; ++j) {
        const int column = columns.at(k, j);
        if (column >= g.n) continue;
        const F sum = first ? sums[k][j] : shared[column] + sums[k][j];
        (last ? to : shared)[column] = sum;
      }
    }
  }
};

// How many blocks there are follows from the shape of g, and so do the bits, whatever the GPU.
template <int kTeam, int kHeld, class T, class Launcher>
void clip_sum_held(Launcher& on, Rows<T> g, double max_norm, typename SumOf<T>::type* out) {
  using F = typename SumOf<T>::type;
  constexpr int64_t kBlocks = 216, kLeast = 4;  // 2 on each of an A100's 108 multiprocessors; rows that a team has
  constexpr int64_t kTeams = kRowThreads / kTeam;
  const int64_t each = std::max(kLeast, cut(g.rows, kBlocks * kTeams)), blocks = cut(g.rows, each * kTeams);
  sum_of_parts(on, blocks, g.n, out, false, [&](F* to, bool) {
    if (aligned(g))
      on.run(ClipSumHeld<T, kTeam, kHeld, true>{g, max_norm, each, to}, blocks);
    else
      on.run(ClipSumHeld<T, kTeam, kHeld, false>{g, max_norm, each, to}, blocks);
  });
}

// ---- rows in the shared memory of several blocks

// How blocks share the rows: gangs of `members` blocks take `each` rows, one group of `group` rows after the other,
// and each member has `width` of the columns, whose norms `segments` warps per row sum.
struct Staging {
  int64_t width = 0, members = 0, gangs = 0, each = 0;
  int group = 0, segments = 0;
  std::size_t dynamic_bytes = 0;
};

// A group is normed and then added from shared memory, to sums there, while the next one is copied. Members exchange
// the squares of their slices by memory that all see: 8 members^2 bytes a row in the second-level cache, which is why
// a slice is not narrower than kNarrowest.
template <class T, bool kAligned>
struct ClipSumStaged {
  static constexpr const char* kName = "clip_sum of staged rows";
  static constexpr int kThreads = kRowThreads;
  static constexpr int kPer = Pack<T>::kCount;
  static constexpr int kMostRows = 32;         // of a group
  static constexpr int64_t kNarrowest = 2048;  // columns
  using F = typename SumOf<T>::type;
  struct Shared {
    Factor<F> factors[kMostRows];
  };

  Rows<T> g;
  double max_norm;
  Staging staging;
  double* partial;    // [g.rows, members * segments]
  uint32_t* arrived;  // [gangs], 0
  F* out;             // [gangs, g.n]

  template <class Context>
  FASTDP_DEVICE void operator()(Context& c, Shared& s) const {
    const int64_t gang = c.block() / staging.members, member = c.block() % staging.members;
    const int64_t left = member * staging.width, from = gang * staging.each;
    const int64_t rows = from + staging.each < g.rows ? staging.each : g.rows - from;
    const int columns = static_cast<int>(left + staging.width < g.n ? staging.width : g.n - left);
    F* sums = reinterpret_cast<F*>(c.dynamic());
    T* stages = reinterpret_cast<T*>(sums + staging.width);
    for (int k = c.thread() * kPer; k < columns; k += kThreads * kPer)
      for (int j = k; j < k + kPer; ++j) sums[j] = 0;
    const auto stage = [&](int64_t number) {
      return Slice{stages + number % 2 * staging.group * staging.width, from + number * staging.group,
                   count_of(rows, number), columns};
    };
    copy(c, stage(0), left);
    for (int64_t number = 0; number * staging.group < rows; ++number) {
      if (!kAligned) c.sync();  // the threads that copy are not those that added
      copy(c, stage(number + 1), left);
      c.template copied<1>();
      c.sync();
      norm(c, stage(number), member);
      c.sync();
      if (c.thread() == 0) {
        c.arrive(arrived + gang);
        c.await(arrived + gang, static_cast<uint32_t>((number + 1) * staging.members));
      }
      c.sync();
      make_factors(c, s, stage(number));
      c.sync();
      add(c, s, stage(number), sums);
    }
    c.template copied<0>();
    for (int k = c.thread() * kPer; k < columns; k += kThreads * kPer)
      for (int j = k; j < k + kPer && j < columns; ++j) out[gang * g.n + left + j] = sums[j];
  }

 private:
  // The block's columns of `count` rows from row `from` on, staging.width elements apart.
  struct Slice {
    T* at;
    int64_t from;
    int count, columns;
  };

  FASTDP_DEVICE int count_of(int64_t rows, int64_t number) const {
    const int64_t left = rows - number * staging.group;
    return static_cast<int>(left < 0 ? 0 : left < staging.group ? left : staging.group);
  }

  // The last pack is filled up with zeros. Aligned packs are copied by the threads that will add them, so that these
  // may overwrite them without a sync.
  template <class Context>
  FASTDP_DEVICE void copy(Context& c, const Slice& to, int64_t left) const {
    const int width = static_cast<int>(staging.width);
    for (int row = 0; row < to.count; ++row) {
      const T* x = g.row(to.from + row) + left;
      T* y = to.at + row * width;
      if constexpr (kAligned) {
        for (int k = c.thread() * kPer; k < to.columns; k += kThreads * kPer) {
          if (k + kPer <= to.columns)
            c.copy_async(y + k, x + k);
          else
            for (int j = k; j < k + kPer; ++j) y[j] = j < to.columns ? x[j] : T{};
        }
      } else {
        for (int k = c.thread(); k < to.columns; k += kThreads) y[k] = x[k];
        if (to.columns + c.thread() < cut(to.columns, kPer) * kPer) y[to.columns + c.thread()] = T{};
      }
    }
    c.copy_commit();
  }

  template <class Context>
  FASTDP_DEVICE void norm(Context& c, const Slice& x, int64_t member) const {
    const int packs = static_cast<int>(cut(x.columns, kPer)), each = static_cast<int>(cut(packs, staging.segments));
    for (int item = c.warp(); item < x.count * staging.segments; item += kRowWarps) {
      const int row = item / staging.segments, segment = item % staging.segments;
      const T* y = x.at + row * staging.width;
      double sum = 0.0;
      for (int k = segment * each + c.lane(); k < packs && k < (segment + 1) * each; k += kWarp)
        sum += squares(load_pack(y + k * kPer));
      sum = warp_sum(c, sum);
      if (c.lane() == 0) partial[((x.from + row) * staging.members + member) * staging.segments + segment] = sum;
    }
  }

  // A lane keeps the sum of one of its warp's rows: all their factors take the time of one.
  template <class Context>
  FASTDP_DEVICE void make_factors(Context& c, Shared& s, const Slice& x) const {
    const int64_t count = staging.members * staging.segments;
    double own = 0.0;
    for (int k = 0; k * kRowWarps + c.warp() < x.count; ++k) {
      const double* squares_of = partial + (x.from + k * kRowWarps + c.warp()) * count;
      double sum = 0.0;
      for (int64_t i = c.lane(); i < count; i += kWarp) sum += squares_of[i];
      sum = warp_sum(c, sum);
      if (c.lane() == k) own = sum;
    }
    const int row = c.lane() * kRowWarps + c.warp();
    if (row < x.count) s.factors[row] = Factor<F>::of(clip_factor<F>(own, 1.0, max_norm, -1.0));
  }

  template <class Context>
  FASTDP_DEVICE void add(Context& c, const Shared& s, const Slice& x, F* sums) const {
    for (int k = c.thread() * kPer; k < x.columns; k += kThreads * kPer) {
      F own[kPer];
      FASTDP_UNROLL
      for (int j = 0; j < kPer; ++j) own[j] = sums[k + j];
      for (int row = 0; row < x.count; ++row)
        add_scaled(own, load_pack(x.at + row * staging.width + k), s.factors[row]);
      FASTDP_UNROLL
      for (int j = 0; j < kPer; ++j) sums[k + j] = own[j];
    }
  }
};

// group = 0 if a row does not fit.
template <class T, class Launcher>
Staging staging_of(Launcher& on, Rows<T> g) {
  using Body = ClipSumStaged<T, false>;
  using F = typename SumOf<T>::type;
  constexpr int64_t kUnit = 64, kLeast = 4;  // columns, whole sectors of memory; rows that a gang has
  const std::size_t kept = sizeof(typename Body::Shared);
  if (on.most_dynamic_bytes() <= kept) return {};
  const int64_t bytes = static_cast<int64_t>(on.most_dynamic_bytes() - kept);
  const int64_t blocks =
      std::min(on.template together<Body>(bytes), on.template together<ClipSumStaged<T, true>>(bytes));
  if (blocks == 0) return {};
  Staging s;
  const int64_t most = std::clamp<int64_t>(g.n / Body::kNarrowest, 1, blocks);  // members
  s.width = cut(cut(g.n, most), kUnit) * kUnit;
  s.members = cut(g.n, s.width);
  s.each = cut(g.rows, std::clamp<int64_t>(cut(g.rows, kLeast), 1, blocks / s.members));
  s.gangs = cut(g.rows, s.each);
  const int64_t fit = (bytes / s.width - static_cast<int64_t>(sizeof(F))) / static_cast<int64_t>(2 * sizeof(T));
  s.group = static_cast<int>(std::clamp<int64_t>(fit, 0, std::min<int64_t>(Body::kMostRows, s.each)));
  if (s.group == 0) return s;
  s.segments = static_cast<int>(cut(kRowWarps, s.group));
  s.dynamic_bytes = s.width * (sizeof(F) + 2 * s.group * sizeof(T));
  return s;
}

// The order of sums depends on how many blocks run together, which the GPU decides.
template <class T, class Launcher>
void clip_sum_staged(Launcher& on, Rows<T> g, double max_norm, const Staging& s, typename SumOf<T>::type* out) {
  using F = typename SumOf<T>::type;
  auto* partial = on.template scratch<double>(g.rows * s.members * s.segments);
  auto* arrived = on.template scratch<uint32_t>(s.gangs);
  on.zero(arrived, s.gangs * sizeof(uint32_t));
  sum_of_parts(on, s.gangs, g.n, out, false, [&](F* to, bool) {
    if (aligned(g))
      on.run_together(ClipSumStaged<T, true>{g, max_norm, s, partial, arrived, to}, s.gangs * s.members,
                      s.dynamic_bytes);
    else
      on.run_together(ClipSumStaged<T, false>{g, max_norm, s, partial, arrived, to}, s.gangs * s.members,
                      s.dynamic_bytes);
  });
}

// ---- rows that are read twice

template <class T, class Launcher>
void clip_sum_twice(Launcher& on, Rows<T> g, double max_norm, typename SumOf<T>::type* out) {
  auto* factors = on.template scratch<double>(g.rows);
  sq_norms(on, g, factors);
  clip_factors<T>(on, factors, g.rows, 1.0, max_norm, -1.0, factors);
  sum_rows(on, g, factors, out, false);
}

// out = sum of g_i min(1, max_norm / |g_i|), [g.n]; of a row that is not finite, nothing
template <class T, class Launcher>
void clip_sum(Launcher& on, Rows<T> g, double max_norm, typename SumOf<T>::type* out) {
  if (g.n == 0) return;
  if (g.rows == 0) return on.zero(out, g.n * sizeof(*out));
  if (g.n <= 8 * kWarp) return clip_sum_held<kWarp, 8>(on, g, max_norm, out);
  if (g.n <= 32 * kWarp) return clip_sum_held<kWarp, 32>(on, g, max_norm, out);
  if (g.n <= 8 * kRowThreads) return clip_sum_held<kRowThreads, 8>(on, g, max_norm, out);
  if (g.n <= 24 * kRowThreads) return clip_sum_held<kRowThreads, 24>(on, g, max_norm, out);
  const Staging s = staging_of(on, g);
  if (s.group > 0) return clip_sum_staged(on, g, max_norm, s, out);
  clip_sum_twice(on, g, max_norm, out);
}

}  // namespace fastdp::cuda
