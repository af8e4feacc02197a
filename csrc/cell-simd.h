// One time of one record of an LSTM: what is left of it beside the products with its weights. Each function takes rows
// of n numbers; the gates i, f, g, o lie one after the other in a row of 4 n.

// c[0] + c[1] x + ...
template <int n>
inline f32v polynomial(f32v x, const float (&c)[n]) {
  f32v sum = all(c[n - 1]);
  for (int k = n - 2; k >= 0; --k) sum = multiply_add(sum, x, all(c[k]));
  return sum;
}

// e^x within 2 ULP, of x in [-87.3, 88], between 2^-126 and 2^127; beyond, what is at the end. A NaN stays one.
// x = k log(2) + r, |r| <= log(2) / 2; Cephes' polynomial, and its log(2) in two parts: k times the first is exact.
inline f32v exponential(f32v x) {
  x = x < -87.3f ? all(-87.3f) : x;
  x = x > 88.0f ? all(88.0f) : x;
  const f32v shifted = multiply_add(x, all(1.44269504f), all(0x1.8p23f));  // its low bits are k, rounded
  const f32v k = shifted - 0x1.8p23f;
  const f32v r = multiply_add(k, all(2.12194440e-4f), multiply_add(k, all(-0.693359375f), x));
  const f32v p = polynomial(
      r, {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f, 8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f});
  return (multiply_add(p, r * r, r) + 1.0f) * (f32v)(((u32v)shifted + 127u) << 23);
}

inline f32v sigmoid(f32v x) { return 1.0f / (1.0f + exponential(-x)); }

inline f32v tanh(f32v x) {
  const u32v sign = (u32v)x & 0x80000000u;
  const f32v size = (f32v)((u32v)x ^ sign), z = x * x;
  // Cephes: where 1 - 2 / (e^2x + 1) would cancel, an odd polynomial.
  const f32v p =
      polynomial(z, {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f, -5.70498872745e-3f});
  const f32v far = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? multiply_add(p * z, x, x) : (f32v)((u32v)far | sign);
}

inline double sigmoid(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }
inline double tanh(double x) { return __builtin_tanh(x); }

// The numbers that are worked on at once: kLanes floats, or one double.
template <class T>
struct AtOnce {
  using type = f32v;
};
template <>
struct AtOnce<double> {
  using type = double;
};

// Calls body(read, write) for the columns [0, n), as many at once as there are lanes: read(x) is x[j...], write(x, v)
// makes v of it.
template <class T, class Body>
inline void for_columns(int64_t n, Body body) {
  using V = typename AtOnce<T>::type;
  constexpr int64_t lanes = sizeof(V) / sizeof(T);
  const auto at = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    body(
        [=](const T* x) {
          V v{};
          std::memcpy(&v, x + j, count * sizeof(T));
          return v;
        },
        [=](T* x, V v) { std::memcpy(x + j, &v, count * sizeof(T)); });
  };
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) at(j, lanes);
  if (j < n) at(j, n - j);
}

// The gates before their nonlinearity become what they are after it; c = f before + i g, h = o tanh(c).
template <class T>
void lstm_forward(T* gates, const T* before, T* c, T* h, int64_t n) {
  for_columns<T>(n, [=](auto read, auto write) __attribute__((always_inline)) {
    const auto i = sigmoid(read(gates)), f = sigmoid(read(gates + n));
    const auto g = tanh(read(gates + 2 * n)), o = sigmoid(read(gates + 3 * n));
    const auto now = f * read(before) + i * g;
    write(gates, i);
    write(gates + n, f);
    write(gates + 2 * n, g);
    write(gates + 3 * n, o);
    write(c, now);
    write(h, o * tanh(now));
  });
}

// The gates become their gradients before the nonlinearity, and dc, the gradient of c but for what comes by way of h,
// that of what was before it; dh: the gradient of h.
template <class T>
void lstm_backward(T* gates, const T* before, const T* c, const T* dh, T* dc, int64_t n) {
  for_columns<T>(n, [=](auto read, auto write) __attribute__((always_inline)) {
    const auto i = read(gates), f = read(gates + n), g = read(gates + 2 * n), o = read(gates + 3 * n);
    const auto m = tanh(read(c)), dm = read(dh);  // tanh again: less time than to keep it takes
    const auto d = read(dc) + dm * (o * (T{1} - m * m));
    write(gates, d * (g * (i * (T{1} - i))));
    write(gates + n, d * (read(before) * (f * (T{1} - f))));
    write(gates + 2 * n, d * (i * (T{1} - g * g)));
    write(gates + 3 * n, dm * (m * (o * (T{1} - o))));
    write(dc, d * f);
  });
}
