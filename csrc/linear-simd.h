// Squared norm of a linear layer's per-sample gradient G = sum_t b_t a_t^T without forming it ("ghost norm",
// Goodfellow 2015 for one position; Li et al. 2022, arXiv:2110.05679, for sequences):
// |G|^2 = sum_{t,u} <a_t, a_u> <b_t, b_u>. Products are summed in double, since the terms may cancel.

// Tiles of the two Gram matrices that are computed at once: kTileRows x kPanel sums stay in registers (8 of AVX2's 16,
// as many as hide the latency of 2 multiply-adds a cycle).
constexpr int kPanel = 2 * kDoubles, kTileRows = 4;

inline int64_t panels(int64_t positions) { return (positions + kPanel - 1) / kPanel; }

// The halves of x and y, their numbers alternating: x0 y0 x1 y1 ...
inline void interleave(f64v x, f64v y, f64v& low, f64v& high) {
  i64v order;
  for (int k = 0; k < kDoubles; ++k) order[k] = k / 2 + k % 2 * kDoubles;
  low = __builtin_shuffle(x, y, order);
  high = __builtin_shuffle(x, y, order + kDoubles / 2);
}

// kDoubles numbers from each of as many rows, beginning at k; to[k * kPanel + row].
template <class T>
inline void pack_square(const T* const (&row)[kDoubles], int64_t k, double* to) {
  f64v x[kDoubles], y[kDoubles];
  for (int r = 0; r < kDoubles; ++r) x[r] = load_doubles(row[r] + k);
  for (int width = 1; width < kDoubles; width *= 2) {  // a transposition in log2(kDoubles) perfect shuffles
    for (int r = 0; r < kDoubles / 2; ++r) interleave(x[r], x[r + kDoubles / 2], y[2 * r], y[2 * r + 1]);
    std::memcpy(x, y, sizeof x);
  }
  for (int j = 0; j < kDoubles; ++j) std::memcpy(to + j * kPanel, &x[j], sizeof x[j]);
}

// rows [T, n] as panels of kPanel positions each, [T / kPanel, n, kPanel], the last one filled up with zeros.
template <class T>
void pack_panels(Rows<T> rows, double* __restrict__ out) {
  for (int64_t t = 0; t < panels(rows.rows) * kPanel; t += kDoubles) {
    double* to = out + t / kPanel * rows.n * kPanel + t % kPanel;
    const T* row[kDoubles];
    for (int r = 0; r < kDoubles; ++r) row[r] = rows.row(t + r < rows.rows ? t + r : 0);
    int64_t k = 0;
    for (; k + kDoubles <= rows.n; k += kDoubles) pack_square(row, k, to + k * kPanel);
    for (; k < rows.n; ++k)
      for (int r = 0; r < kDoubles; ++r) to[k * kPanel + r] = double{load(row[r][k])};
    for (int r = 0; r < kDoubles; ++r)
      for (int64_t j = 0; t + r >= rows.rows && j < rows.n; ++j) to[j * kPanel + r] = 0.0;
  }
}

// out[r][j] = <x_{from + r}, x_{of panel j}> of packed x.
inline void gram_tile(const double* packed, int64_t n, int64_t from, int64_t panel, f64v (&out)[kTileRows][2]) {
  const double* rows = packed + from / kPanel * n * kPanel + from % kPanel;
  const double* columns = packed + panel * n * kPanel;
  f64v sums[kTileRows][2] = {};
  for (int64_t k = 0; k < n; ++k, rows += kPanel, columns += kPanel) {
    f64v low, high;
    std::memcpy(&low, columns, sizeof low);
    std::memcpy(&high, columns + kDoubles, sizeof high);
    for (int r = 0; r < kTileRows; ++r) {
      const f64v row = rows[r] - f64v{};  // in every lane
      sums[r][0] = fused(row, low, sums[r][0]);
      sums[r][1] = fused(row, high, sums[r][1]);
    }
  }
  std::memcpy(out, sums, sizeof sums);
}

// The lengths of a_t and b_t are on the diagonals of their Gram matrices.
inline void add_bounds(const f64v (&x)[kTileRows][2], const f64v (&y)[kTileRows][2], int64_t column, int64_t rows,
                       SequenceBounds& bounds) {
  for (int64_t r = 0; r < kTileRows && r < rows; ++r) {
    const int64_t half = (column + r) / kDoubles, lane = (column + r) % kDoubles;
    const double a = square_root(x[r][half][lane]), b = square_root(y[r][half][lane]);
    bounds.products += a * b;
    bounds.largest_b = b > bounds.largest_b ? b : bounds.largest_b;
    bounds.inputs += a;
  }
}

template <class T>
double gram_sq_norm(Rows<T> a, Rows<T> b, double* scratch, SequenceBounds& bounds) {
  static_assert(16 % kPanel == 0 && kPanel % kTileRows == 0);
  double* of_b = scratch + panels(a.rows) * kPanel * a.n;
  pack_panels(a, scratch);
  pack_panels(b, of_b);
  f64v once{}, twice{};  // a panel's own square is there whole; what is below it, and is not above, counts twice
  for (int64_t panel = 0; panel < panels(a.rows); ++panel)
    for (int64_t from = panel * kPanel; from < a.rows; from += kTileRows) {
      f64v x[kTileRows][2], y[kTileRows][2], sum{};
      gram_tile(scratch, a.n, from, panel, x);
      gram_tile(of_b, b.n, from, panel, y);
      for (int r = 0; r < kTileRows; ++r) sum += x[r][0] * y[r][0] + x[r][1] * y[r][1];
      const bool own = from < (panel + 1) * kPanel;
      if (own) add_bounds(x, y, from - panel * kPanel, a.rows - from, bounds);
      (own ? once : twice) += sum;
    }
  once += 2.0 * twice;
  double total = 0.0;
  for (int lane = 0; lane < kDoubles; ++lane) total += once[lane];
  return total < 0.0 ? 0.0 : total;  // below zero only by rounding; a NaN stays a NaN
}
