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

// Whether a factor has all its digits as an F.
template <class F>
constexpr bool fits(double factor) {
  return factor >= double{smallest<F>()} && factor <= double{greatest<F>()};
}

constexpr int kWide = kSums / kDoubles;  // vectors that hold the running sums: the compiler's own choice for a loop
                                         // over floats goes through shuffles and the stack

// s += squares of kSums elements
inline void add_sixteen(const float* x, f64v (&s)[kWide]) {
  for (int k = 0; k < kWide; ++k) {
    const f64v v = load_doubles(x + k * kDoubles);
    s[k] += v * v;
  }
}
inline void add_sixteen(const double* x, f64v (&s)[kWide]) {
  for (int k = 0; k < kWide; ++k) {
    const f64v v = load_doubles(x + k * kDoubles);
    s[k] += v * v;
  }
}
// Two elements lie in each word: one half of the sums takes the lower ones, the other the upper ones, which spares the
// shuffles of a conversion in order.
inline void add_sixteen(const bf16* x, f64v (&s)[kWide]) {
  for (int k = 0; k < kWide / 2; ++k) {
    const u32h words = load_lanes<u32h>(x + 2 * k * kDoubles);
    const f64v lower = to_double((f32h)(words << 16)), upper = to_double((f32h)(words & 0xffff0000u));
    s[k] += lower * lower;
    s[kWide / 2 + k] += upper * upper;
  }
}

// n is a multiple of kSums
template <class T>
inline void add_squares(const T* __restrict__ x, int64_t n, f64v (&sums)[kWide]) {
  f64v s[kWide];
  for (int k = 0; k < kWide; ++k) s[k] = sums[k];
  for (int64_t i = 0; i < n; i += kSums) add_sixteen(x + i, s);
  for (int k = 0; k < kWide; ++k) sums[k] = s[k];
}

// Of the running sums and the squares of the n < kSums elements that are left. So many as are `readable` from x on may
// be read: to copy n first takes most of the time of a row of 9, which is stored in pieces and read whole.
template <class T>
inline double finish_squares(f64v (&s)[kWide], const T* x, int64_t n, int64_t readable) {
  if (n > 0) {
    T padded[kSums] = {};
    if (readable < kSums) {
      for (int k = 0; k < n; ++k) padded[k] = x[k];
      x = padded;
    }
    for (int k = 0; k < kWide; ++k) {
      const f64v v = first_lanes(load_doubles(x + k * kDoubles), n - k * kDoubles);
      s[k] += v * v;
    }
  }
  for (int width = kWide / 2; width > 0; width /= 2)  // tree_sum, as far as whole vectors go
    for (int k = 0; k < width; ++k) s[k] += s[k + width];
  f64v sum = s[0];
  for (int width = kDoubles / 2; width > 0; width /= 2) {  // and within one
    sum += __builtin_shuffle(sum, load_lanes<i64v>(kNumbers) + width);
  }
  return sum[0];
}

template <class T>
double sum_squares(const T* __restrict__ x, int64_t n) {
  const int64_t whole = n - n % kSums;
  f64v s[kWide] = {};
  add_squares(x, whole, s);
  return finish_squares(s, x + whole, n - whole, n - whole);
}

// Four rows side by side, to the same bit as one after the other: the processor fetches ahead within a page of memory
// only, and four pages at a time come 1.4 times as fast as one.
template <class T>
void square_rows(Rows<T> rows, double* out) {
  constexpr int kRows = 4;
  constexpr int64_t kTile = 256;
  const int64_t whole = rows.n - rows.n % kSums;
  int64_t i = 0;
  for (; i + kRows <= rows.rows; i += kRows) {
    f64v s[kRows][kWide] = {};
    for (int64_t from = 0; from < whole; from += kTile)
      for (int k = 0; k < kRows; ++k)
        add_squares(rows.row(i + k) + from, whole - from < kTile ? whole - from : kTile, s[k]);
    for (int k = 0; k < kRows; ++k) {
      const T* rest = rows.row(i + k) + whole;
      out[i + k] = finish_squares(s[k], rest, rows.n - whole, rows.row(rows.rows - 1) + rows.n - rest);
    }
  }
  for (; i < rows.rows; ++i) out[i] = sum_squares(rows.row(i), rows.n);
}

// A subnormal product is off by 2^-150 at most: of 2^30 of them, less than the factors leave room for if max_norm is
// above 1e-33.
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
      if (!fits<F>(factors[i])) {
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

inline int32_t size_bits(float x) { return __builtin_bit_cast(int32_t, x) & 0x7fffffff; }
inline int64_t size_bits(double x) { return __builtin_bit_cast(int64_t, x) & 0x7fffffffffffffff; }

// out = f * row, multiplied in W; false if a product is too great for T. Products that are subnormal would be rounded
// up by more than the factor leaves room for: they become 0. Magnitudes are compared as integers, which order alike
// and whose maximum the compiler vectorises.
template <class T, class W>
bool scale_row(const T* __restrict__ row, W f, int64_t n, T* __restrict__ out) {
  using F = typename SumOf<T>::type;
  const auto least = size_bits(smallest<F>());
  auto largest = size_bits(F{0});
  for (int64_t j = 0; j < n; ++j) {
    const F v = static_cast<F>(f * W{load(row[j])});
    const auto size = size_bits(v);
    largest = size > largest ? size : largest;
    store(out[j], size < least ? F{0} : v);
  }
  return largest <= size_bits(greatest<F>());
}

// sums += rows of x, in order, four at a time: a sum is loaded and stored once for them.
template <class T>
void add_rows(Rows<T> x, typename SumOf<T>::type* __restrict__ sums) {
  int64_t i = 0;
  for (; i + 4 <= x.rows; i += 4) {
    const T *a = x.row(i), *b = x.row(i + 1), *c = x.row(i + 2), *d = x.row(i + 3);
    for (int64_t j = 0; j < x.n; ++j) sums[j] = (((sums[j] + load(a[j])) + load(b[j])) + load(c[j])) + load(d[j]);
  }
  for (; i < x.rows; ++i)
    for (int64_t j = 0; j < x.n; ++j) sums[j] += load(x.row(i)[j]);
}

template <class T>
void scale_rows(Rows<T> rows, const double* factors, T* __restrict__ out, typename SumOf<T>::type* __restrict__ sums) {
  using F = typename SumOf<T>::type;
  const int64_t n = rows.n;
  if (sums != nullptr)
    for (int64_t j = 0; j < n; ++j) sums[j] = 0;
  int64_t added = 0;  // rows of out that are in `sums`
  for (int64_t i = 0; i < rows.rows; ++i) {
    const double f = factors[i];
    T* __restrict__ to = out + i * n;
    // A factor such as 1e-60 (two layers of 1e30 each) is no float though the product is: that one is made in double.
    const bool kept =
        f != 0.0 && (fits<F>(f) ? scale_row(rows.row(i), static_cast<F>(f), n, to) : scale_row(rows.row(i), f, n, to));
    if (!kept)  // unread, or dropped since its products do not fit
      for (int64_t j = 0; j < n; ++j) store(to[j], F{0});
    if (sums != nullptr && (i + 1 - added == 4 || i + 1 == rows.rows)) {  // while they are in the nearest cache
      add_rows(Rows<T>{out + added * n, i + 1 - added, n, n}, sums);
      added = i + 1;
    }
  }
}
