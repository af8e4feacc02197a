// Per-sample gradients of the weight and the bias of a normalisation, from its input a and the gradient b of its
// output: sums over positions of b times the normalised input, and of b. The input is normalised again, as it was in
// the forward, but with mean and variance summed in double.

// The sum over i < n of term(get, i), which get(x + i)s numbers: one double, or as many as a vector holds. Left to the
// compiler, all of a group norm takes 1.2 to 1.6 times as long.
template <class T, class Term>
double sum_of(int64_t n, Term term) {
  f64v v[kWide] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kWide; ++k) v[k] += term([](const T* x) { return load_doubles(x); }, i + k * kDoubles);
  double s[kSums];
  std::memcpy(s, v, sizeof s);
  for (int k = 0; i + k < n; ++k) s[k] += term([](const T* x) { return double{load(*x)}; }, i + k);
  return tree_sum(s);
}

template <class T>
double sum(const T* __restrict__ x, int64_t n) {
  return sum_of<T>(n, [&](auto get, int64_t i) { return get(x + i); });
}

struct Normal {
  double mean, scale;  // (x - mean) * scale
};

// Without centring the mean is 0 (RMS norm).
template <class T>
Normal normal_of(const T* __restrict__ x, int64_t n, double eps, bool centre) {
  const double mean = centre ? sum(x, n) / static_cast<double>(n) : 0.0;
  const double squares = sum_of<T>(n, [&](auto get, int64_t i) {
    const auto v = get(x + i) - mean;
    return v * v;
  });
  const double variance = squares / static_cast<double>(n);
  return {mean, 1.0 / square_root(variance + eps)};
}

// One record of a layer norm or RMS norm: each row is normalised, and the sums are over rows; weight, bias [n] or null.
template <class T>
void layer_norm_gradients(Rows<T> a, Rows<T> b, double eps, bool centre, typename SumOf<T>::type* __restrict__ weight,
                          typename SumOf<T>::type* __restrict__ bias) {
  using F = typename SumOf<T>::type;
  for (int64_t j = 0; j < a.n; ++j) {
    if (weight != nullptr) weight[j] = 0;
    if (bias != nullptr) bias[j] = 0;
  }
  for (int64_t t = 0; t < a.rows; ++t) {
    const T* __restrict__ x = a.row(t);
    const T* __restrict__ g = b.row(t);
    if (weight != nullptr) {
      const Normal of = normal_of(x, a.n, eps, centre);
      const F mean = static_cast<F>(of.mean), scale = static_cast<F>(of.scale);
      for (int64_t j = 0; j < a.n; ++j) weight[j] += load(g[j]) * ((load(x[j]) - mean) * scale);
    }
    if (bias != nullptr)
      for (int64_t j = 0; j < a.n; ++j) bias[j] += load(g[j]);
  }
}

// One record of a group norm, [channels, positions]: `group` channels at a time are normalised together, and the sums
// are over positions; weight, bias [channels] or null.
template <class T>
void group_norm_gradients(Rows<T> a, Rows<T> b, int64_t group, double eps, typename SumOf<T>::type* weight,
                          typename SumOf<T>::type* bias) {
  using F = typename SumOf<T>::type;
  Normal of{};
  for (int64_t c = 0; c < a.rows; ++c) {
    if (bias != nullptr) bias[c] = static_cast<F>(sum(b.row(c), b.n));
    if (weight == nullptr) continue;
    if (c % group == 0) of = normal_of(a.row(c), group * a.n, eps, true);
    const T* __restrict__ x = a.row(c);
    const T* __restrict__ g = b.row(c);
    const double products = sum_of<T>(a.n, [&](auto get, int64_t i) { return get(g + i) * (get(x + i) - of.mean); });
    weight[c] = static_cast<F>(products * of.scale);
  }
}
