// Norms of an embedding table's per-sample gradients, against the sums of the rows of each id.
#pragma once

#include <algorithm>
#include <map>

#include "../../csrc/cuda/embedding.h"
#include "sequences.h"

namespace fastdp::cuda::test {

constexpr int64_t kPadding = 3;

// How often ids come again.
enum class Ids { all_different, all_equal, few, random, differ_in_high_bits };

inline int64_t id_of(Ids ids, int64_t t, std::mt19937& random) {
  switch (ids) {
    case Ids::all_different: return t;
    case Ids::all_equal: return 7;
    case Ids::few: return t * t % 5;
    case Ids::random: return static_cast<int64_t>(random() % 50);
    case Ids::differ_in_high_bits: return (t % 3) << 32;
  }
  return 0;
}

template <class T>
struct Embedding {
  Filled<T> b;
  std::shared_ptr<int64_t[]> index;
  std::string what;

  template <class Machine>
  Embedding(Machine& m, int64_t records, int64_t positions, int64_t n, Ids ids, int lie = 0)
      : b(m, records, positions, n, gaps(n)[lie % 4], 7),
        index(m.template array<int64_t>(records * positions)),
        what(text("embedding_sq_norms", sizeof(T), records, positions, n, static_cast<int>(ids), lie)) {
    std::mt19937 random(5);
    for (int64_t i = 0; i < records * positions; ++i) index[i] = id_of(ids, i, random);
  }

  std::map<int64_t, std::vector<int64_t>> positions_of_ids(int64_t record, int64_t padding) const {
    std::map<int64_t, std::vector<int64_t>> out;
    for (int64_t t = 0; t < b.x.positions; ++t) out[index[record * b.x.positions + t]].push_back(t);
    out.erase(padding);
    return out;
  }
};

template <class T, class Machine>
std::vector<double> squares_of(Machine& m, const Embedding<T>& of, int64_t padding, double before = 0.0) {
  const int64_t records = of.b.x.records;
  auto out = m.template array<double>(records);
  std::fill(out.get(), out.get() + records, before);
  auto on = m.launcher();
  embedding_sq_norms(on, of.index.get(), of.b.x, padding, out.get());
  m.finish();
  return {out.get(), out.get() + records};
}

template <class T, class Machine>
void embedding_is_right(Machine& m, const Embedding<T>& of, int64_t padding, double before = 0.0) {
  const std::vector<double> found = squares_of(m, of, padding, before);
  for (int64_t i = 0; i < of.b.x.records; ++i) {
    const Rows<T> b = of.b.x.record(i);
    long double right = before, slack = before;
    for (const auto& [id, positions] : of.positions_of_ids(i, padding)) {
      right += formed_sq_norm<T>(nullptr, b, positions);
      long double sum = 0.0;
      for (const int64_t t : positions) sum += length(b.row(t), b.n);
      slack += sum * sum;
    }
    const long double roundings = 2.0 * b.rows + b.rows / 16 + 32.0;
    require(std::abs(found[i] - right) <= 0x1p-53L * roundings * slack,
            of.what + text(": record, padding, norm, right", i, padding, found[i], right));
  }
}

template <class T, class Machine>
void embedding_is_right(Machine& m, int64_t records, int64_t positions, int64_t n, Ids ids, int lie) {
  embedding_is_right(m, Embedding<T>(m, records, positions, n, ids, lie), lie % 2 == 0 ? -1 : kPadding);
}

// In any column of an id's first row, its last, and one that has no other, a record each; between them, records that
// stay as they are.
template <class T, class Machine>
void rows_that_are_not_finite(Machine& m, int64_t n) {
  const double inf = std::numeric_limits<double>::infinity();
  constexpr int64_t records = 19, positions = 6;
  Embedding<T> of(m, records, positions, n, Ids::all_different);
  std::vector<double> values(records);
  int64_t record = 0;
  for (int64_t i = 0; i < records; ++i) of.index[i * positions + 4] = of.index[i * positions];
  const std::vector<double> before = squares_of(m, of, -1);
  for (const double value : {std::nan(""), inf, -inf})
    for (const int64_t t : {0, 4, 5}) {
      values[record] = value;
      store(*of.b.at(record, t, record % 4 < 2 ? n - 1 : 0), static_cast<float>(value));
      record += 2;
    }
  std::vector<double> found = squares_of(m, of, -1);
  for (int64_t i = 0; i < records; ++i)
    require(std::isnan(values[i]) ? std::isnan(found[i]) : found[i] == (values[i] != 0.0 ? inf : before[i]),
            of.what + text(": record beside, or of, what is not finite", i));
  for (int64_t i = 0; i < records; ++i)
    for (const int64_t t : {0, 4, 5}) of.index[i * positions + t] = kPadding;
  for (const double norm : squares_of(m, of, kPadding)) require(std::isfinite(norm), of.what + ": padding counts");
}

template <class T, class Machine>
void extreme_rows(Machine& m) {
  Embedding<T> of(m, 5, 40, 9, Ids::all_equal);
  for (int64_t t = 0; t < 40; ++t) {
    of.b.set(0, t, 0.0f);
    of.b.set(1, t, std::is_same_v<T, f16> ? 65504.0f : 3e38f);
    of.b.set(2, t, std::is_same_v<T, f16> ? 6e-8f : std::is_same_v<T, bf16> ? 1e-40f : 1e-45f);
    of.b.set(3, t, t % 2 == 0 ? 1.1f : -1.1f);
  }
  embedding_is_right(m, of, -1);
  embedding_is_right(m, of, -1, 2.0);
  require(squares_of(m, of, -1)[3] == 0.0, of.what + ": should cancel");
  for (const double norm : squares_of(m, of, 7, 2.0)) require(norm == 2.0, of.what + ": all are padding");
}

template <class T, class Machine>
void embedding_has_the_same_bits(Machine& m) {
  const Embedding<T> of(m, 2, 70, 300, Ids::random);
  const std::vector<double> found = squares_of(m, of, -1);
  for (int tries = 0; tries < 5; ++tries)
    require(same_bits(found.data(), squares_of(m, of, -1).data(), found.size()), of.what + ": other bits");
}

template <class T, class Machine>
void test_embedding(Machine& m) {
  constexpr bool kAll = std::is_same_v<T, float>;  // other types differ in how they are loaded only
  constexpr Ids kIds[] = {Ids::all_different, Ids::all_equal, Ids::few, Ids::random, Ids::differ_in_high_bits};
  constexpr int64_t kSizes[] = {0, 1, 2, 7, 8, 33, 256, 257, 530};
  int lie = 0;
  for (const int64_t positions : {0, 1, 2, 31, 32, 33, 64, 65, 150})
    for (int tries = 0; tries < (kAll ? 5 : 2); ++tries, ++lie)
      embedding_is_right<T>(m, 1 + lie % 2, positions, kSizes[lie % std::size(kSizes)], kIds[lie % 5], lie);
  for (lie = 0; lie < 4; ++lie) embedding_is_right<T>(m, 2, 40, 520, Ids::few, lie);
  embedding_is_right<T>(m, 0, 5, 3, Ids::few, 0);
  for (const int64_t n : {1, 264}) rows_that_are_not_finite<T>(m, n);
  extreme_rows<T>(m);
  if constexpr (kAll) embedding_has_the_same_bits<T>(m);
}

template <class Machine>
void test_embedding(Machine& m) {
  test_embedding<float>(m);
  test_embedding<bf16>(m);
  test_embedding<f16>(m);
}

// What ThreadSanitizer, with an OS thread for each of a GPU's, gets through in seconds.
template <class Machine>
void test_embedding_in_threads(Machine& m) {
  embedding_is_right<float>(m, 1, 40, 33, Ids::random, 0);
}

}  // namespace fastdp::cuda::test
