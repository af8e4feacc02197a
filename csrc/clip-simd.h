// Norms of rows and clipped sums of rows. Squares are summed in double: a float's square neither overflows nor
// vanishes there (3.4e38^2 = 1e77), and the error of 10^9 terms is below 1e-6 of the rounding of one float.

// Sixteen running sums, then a fixed tree: the order does not depend on the vector width.
constexpr int kSums = 16;

inline double tree_sum(double (&s)[kSums]) {
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) s[k] += s[k + width];
  return s[0];
}

// The least positive number with all its digits, and the greatest finite one, as the compiler knows them: std's are
// inline functions, which would be shared between instruction sets.
template <class F>
constexpr F smallest() {
  return sizeof(F) == 4 ? static_cast<F>(__FLT_MIN__) : static_cast<F>(__DBL_MIN__);
}
template <class F>
constexpr F greatest() {
  return sizeof(F) == 4 ? static_cast<F>(__FLT_MAX__) : static_cast<F>(__DBL_MAX__);
}

template <class T>
double dot(const T* __restrict__ x, const T* __restrict__ y, int64_t n) {
  double s[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) s[k] += double{load(x[i + k])} * double{load(y[i + k])};
  for (int k = 0; i + k < n; ++k) s[k] += double{load(x[i + k])} * double{load(y[i + k])};
  return tree_sum(s);
}

template <class T>
double sum_squares(const T* __restrict__ x, int64_t n) {
  double s[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) {
      const double v = load(x[i + k]);
      s[k] += v * v;
    }
  for (int k = 0; i + k < n; ++k) {
    const double v = load(x[i + k]);
    s[k] += v * v;
  }
  return tree_sum(s);
}

template <class T>
void accumulate_rows(Rows<T> rows, const double* factors, typename SumOf<T>::type* __restrict__ out) {
  using F = typename SumOf<T>::type;
  constexpr int64_t kTile = 1024;  // 4 KiB of sums stay in the first-level cache while the rows stream past
  constexpr int kGroup = 4;        // rows added per load and store of a sum
  for (int64_t from = 0; from < rows.n; from += kTile) {
    const int64_t count = rows.n - from < kTile ? rows.n - from : kTile;
    F* __restrict__ to = out + from;
    const T* row[kGroup];
    F f[kGroup];
    int held = 0;
    for (int64_t i = 0; i < rows.rows; ++i) {
      if (factors[i] == 0.0) continue;  // by selection: 0 * NaN would be NaN
      if (factors[i] < double{smallest<F>()}) {
        // A subnormal factor has too few digits to keep the norm: products in double, and those too small become 0.
        const T* __restrict__ tiny = rows.row(i) + from;
        for (int64_t j = 0; j < count; ++j) {
          const double v = factors[i] * double{load(tiny[j])};
          to[j] += (v < 0.0 ? -v : v) < double{smallest<F>()} ? F{0} : static_cast<F>(v);
        }
        continue;
      }
      row[held] = rows.row(i) + from;
      f[held] = static_cast<F>(factors[i]);
      if (++held < kGroup) continue;
      for (int64_t j = 0; j < count; ++j)
        to[j] = (((to[j] + f[0] * load(row[0][j])) + f[1] * load(row[1][j])) + f[2] * load(row[2][j])) +
                f[3] * load(row[3][j]);
      held = 0;
    }
    for (int k = 0; k < held; ++k)
      for (int64_t j = 0; j < count; ++j) to[j] += f[k] * load(row[k][j]);
  }
}

inline uint32_t size_bits(float x) { return __builtin_bit_cast(uint32_t, x) & 0x7fffffffu; }
inline uint64_t size_bits(double x) { return __builtin_bit_cast(uint64_t, x) & 0x7fffffffffffffffu; }

// out = f * row; false if a product is too great for T. Magnitudes are compared as integers, which order alike and
// whose maximum the compiler vectorises.
template <class T>
bool scale_row(const T* __restrict__ row, double f, int64_t n, T* __restrict__ out) {
  using F = typename SumOf<T>::type;
  const auto least = size_bits(smallest<F>());
  auto largest = size_bits(F{0});
  for (int64_t j = 0; j < n; ++j) {
    const F v = static_cast<F>(f * double{load(row[j])});
    const auto size = size_bits(v);
    largest = size > largest ? size : largest;
    store(out[j], size < least ? F{0} : v);
  }
  return largest <= size_bits(greatest<F>());
}

template <class T>
void scale_rows(Rows<T> rows, const double* factors, T* __restrict__ out, typename SumOf<T>::type* __restrict__ sums) {
  using F = typename SumOf<T>::type;
  const int64_t n = rows.n;
  if (sums != nullptr)
    for (int64_t j = 0; j < n; ++j) sums[j] = 0;
  for (int64_t i = 0; i < rows.rows; ++i, out += n) {
    if (factors[i] == 0.0) {
      for (int64_t j = 0; j < n; ++j) store(out[j], F{0});
      continue;
    }
    // In double, since a factor such as 1e-60 (two layers of 1e30 each) is no float though the product is. Products
    // that are subnormal in F would be rounded up by more than the factor leaves room for: they become 0.
    if (!scale_row(rows.row(i), factors[i], n, out)) {  // the record is dropped: its products do not fit
      for (int64_t j = 0; j < n; ++j) store(out[j], F{0});
      continue;
    }
    if (sums != nullptr)
      for (int64_t j = 0; j < n; ++j) sums[j] += load(out[j]);
  }
}
