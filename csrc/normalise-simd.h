// Per-sample gradients of the weight and the bias of a normalisation, from its input a and the gradient b of its
// output: sums over positions of b times the normalised input, and of b. The input is normalised again, as it was in
// the forward, but with mean and variance summed in double.

template <class T>
double sum(const T* __restrict__ x, int64_t n) {
  double s[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) s[k] += double{load(x[i + k])};
  for (int k = 0; i + k < n; ++k) s[k] += double{load(x[i + k])};
  return tree_sum(s);
}

struct Normal {
  double mean, scale;  // (x - mean) * scale
};

// Without centring the mean is 0 (RMS norm).
template <class T>
Normal normal_of(const T* __restrict__ x, int64_t n, double eps, bool centre) {
  const double mean = centre ? sum(x, n) / static_cast<double>(n) : 0.0;
  double s[kSums] = {};
  int64_t i = 0;
  const auto add = [&](int k) {
    const double v = double{load(x[i + k])} - mean;
    s[k] += v * v;
  };
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) add(k);
  for (int k = 0; i + k < n; ++k) add(k);
  const double variance = tree_sum(s) / static_cast<double>(n);
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
    double s[kSums] = {};
    const T* __restrict__ x = a.row(c);
    const T* __restrict__ g = b.row(c);
    int64_t i = 0;
    const auto add = [&](int k) { s[k] += double{load(g[i + k])} * (double{load(x[i + k])} - of.mean); };
    for (; i + kSums <= a.n; i += kSums)
      for (int k = 0; k < kSums; ++k) add(k);
    for (int k = 0; i + k < a.n; ++k) add(k);
    weight[c] = static_cast<F>(tree_sum(s) * of.scale);
  }
}
