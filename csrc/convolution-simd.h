// Per-sample gradients of a convolution's weight, from its input a and the gradient b of its output:
// out[o][c][t] = sum_p b[o][p] a[c][begin[p] + window[t]]. No matrix of windows is made: a tile of weights (c, t) keeps
// its sums in registers while the positions p go by, its inputs at as many addresses, which advance alike. Lanes are
// outputs o, with an input in each of them, or groups where a group has few outputs (depthwise: one).
// On Zen 4 it does 43 to 49 of the 55 10^9 multiply-adds that a core does in a second, of 200 positions or more.

template <class F>
struct LanesOf {
  using type = f32v;
};
template <>
struct LanesOf<double> {
  using type = f64v;
};
template <class F>
constexpr int kLanesOf = sizeof(typename LanesOf<F>::type) / sizeof(F);

// Weights of a tile, of `width` vectors each: 8 sums at least, which hide the latency of 2 multiply-adds a cycle, and
// no more than half of the registers.
template <int width>
constexpr int kTileWeights = kLanes == 16 ? 8 : 8 / width;

// The first `count` lanes, or all: a call of memcpy only where there are fewer.
template <class F>
inline typename LanesOf<F>::type load_part(const F* x, int64_t count) {
  typename LanesOf<F>::type v{};
  if (count >= kLanesOf<F>) return load_lanes<decltype(v)>(x);
  std::memcpy(&v, x, count * sizeof(F));
  return v;
}
template <class F, class V>
inline void store_part(F* to, const V& v, int64_t count) {
  if (count >= kLanesOf<F>)
    std::memcpy(to, &v, sizeof v);
  else
    std::memcpy(to, &v, count * sizeof(F));
}

// out[j][i] = x[i][j] of x [rows, n], the rows `stride` and `out_stride` apart.
template <class F>
void transpose(const F* x, int64_t rows, int64_t n, int64_t stride, F* out, int64_t out_stride) {
  using V = typename LanesOf<F>::type;
  constexpr int kSide = kLanesOf<F>;
  decltype(V{} < V{}) order;  // of two vectors, their lower halves' elements alternating
  for (int k = 0; k < kSide; ++k) order[k] = k / 2 + k % 2 * kSide;
  // The last square begins earlier where there is room: what is written twice is the same.
  const auto begin = [](int64_t at, int64_t end) { return at + kSide <= end || end < kSide ? at : end - kSide; };
  for (int64_t row = 0; row < rows; row += kSide)
    for (int64_t column = 0; column < n; column += kSide) {
      const int64_t i = begin(row, rows), j = begin(column, n), height = rows - i, width = n - j;
      V v[kSide], w[kSide];
      for (int r = 0; r < kSide; ++r) v[r] = r < height ? load_part(x + (i + r) * stride + j, width) : V{};
      for (int done = 1; done < kSide; done *= 2) {  // log2(kSide) perfect shuffles
        for (int r = 0; r < kSide / 2; ++r) {
          w[2 * r] = __builtin_shuffle(v[r], v[r + kSide / 2], order);
          w[2 * r + 1] = __builtin_shuffle(v[r], v[r + kSide / 2], order + kSide / 2);
        }
        std::memcpy(v, w, sizeof v);
      }
      for (int r = 0; r < kSide && r < width; ++r) store_part(out + (j + r) * out_stride + i, v[r], height);
    }
}

// sums[j] [width vectors] = (or, unless first, +=) sum_p a[j][begin[p]] b[p]
template <class F, int width, bool by_group>
void add_tile(const F* const (&weights)[kTileWeights<width>], const int64_t* __restrict__ begin, int64_t positions,
              const F* __restrict__ b, bool first, F* __restrict__ sums) {
  using V = typename LanesOf<F>::type;
  constexpr int kWeights = kTileWeights<width>, kSide = kLanesOf<F>;
  const F* a[kWeights];
  V s[kWeights][width] = {};
  for (int j = 0; j < kWeights; ++j) a[j] = weights[j];
  // One by one: GCC 12 keeps an array that is copied as a whole in memory.
  for (int j = 0; j < kWeights; ++j)
    for (int k = 0; k < width && !first; ++k) s[j][k] = load_lanes<V>(sums + (j * width + k) * kSide);
  for (int64_t p = 0; p < positions; ++p, b += width * kSide) {
    V y[width];
    for (int k = 0; k < width; ++k) y[k] = load_lanes<V>(b + k * kSide);
    const int64_t at = by_group ? begin[p] * (width * kSide) : begin[p];
    for (int j = 0; j < kWeights; ++j)
      for (int k = 0; k < width; ++k) {
        const V x = by_group ? load_lanes<V>(a[j] + at + k * kSide) : a[j][at] - V{};  // in every lane
        s[j][k] = multiply_add(x, y[k], s[j][k]);
      }
  }
  for (int j = 0; j < kWeights; ++j)
    for (int k = 0; k < width; ++k) std::memcpy(sums + (j * width + k) * kSide, &s[j][k], sizeof(V));
}

// Channels of `size` elements, of `lanes` numbers each, to planes with zeros round them.
template <class F>
void pad(const Convolution& of, const F* x, int64_t channels, int64_t lanes, F* out) {
  const int64_t row = of.size[2] * lanes, padded = of.size[2] + 2 * of.padding[2];
  std::memset(out, 0, channels * of.plane * lanes * sizeof(F));
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t z = 0; z < of.size[0]; ++z)
      for (int64_t y = 0; y < of.size[1]; ++y, x += row) {
        const int64_t to = (z + of.padding[0]) * (of.size[1] + 2 * of.padding[1]) + y + of.padding[1];
        std::memcpy(out + (c * of.plane + to * padded + of.padding[2]) * lanes, x, row * sizeof(F));
      }
}

// Weights [from, end) of `lanes` outputs, whose b are `stride` apart; a: padded planes from channel from / taps on.
template <class F, int width, bool by_group>
void sum_panel(const Convolution& of, const F* a, const F* b, int64_t lanes, int64_t stride, int64_t from, int64_t end,
               F* scratch, F* out, int64_t out_stride) {
  constexpr int kWeights = kTileWeights<width>, kPanel = width * kLanesOf<F>;
  F *const of_b = scratch, *const sums = scratch + kConvolutionBlock * kPanel;
  const int64_t block = of.positions < kConvolutionBlock ? of.positions : kConvolutionBlock;
  if (lanes < kPanel) std::memset(of_b, 0, block * kPanel * sizeof(F));
  int64_t p = 0;
  do {
    const int64_t count = of.positions - p < block ? of.positions - p : block;
    transpose(b + p, lanes, count, stride, of_b, kPanel);
    for (int64_t k = from; k < end; k += kWeights) {
      const F* weights[kWeights];
      for (int j = 0; j < kWeights; ++j) {  // more than there are: the last one again
        const int64_t weight = k + j < end ? k + j : end - 1;
        const int64_t at = (weight / of.taps - from / of.taps) * of.plane + of.window[weight % of.taps];
        weights[j] = a + at * (by_group ? kPanel : 1);
      }
      // Where they will be written, fetched meanwhile: 7.1 us for 10.9 of a record of 32 KiB, [32, 16, 4, 4] of 5 x 5
      // positions.
      if (p == 0)
        for (int64_t o = 0; o < lanes; ++o) __builtin_prefetch(out + o * out_stride + k, 1);
      add_tile<F, width, by_group>(weights, of.begin + p, count, of_b, p == 0, sums + (k - from) * kPanel);
    }
    p += kConvolutionBlock;
  } while (p < of.positions);
  transpose(sums, end - from, lanes, kPanel, out + from, out_stride);
}

// One record, weights [from, end) of each output of group `group`, or of as many groups as come next where lanes are
// groups; a [groups * channels, *size], b [groups * outputs, positions], out [groups * outputs, channels * taps].
template <class F>
void convolution_gradients(const Convolution& of, const F* a, const F* b, int64_t group, int64_t from, int64_t end,
                           F* scratch, F* out) {
  constexpr int64_t kSide = kLanesOf<F>;
  const int64_t elements = of.size[0] * of.size[1] * of.size[2], weights = of.channels * of.taps;
  const int64_t channel = from / of.taps, channels = (end - 1) / of.taps + 1 - channel;
  const bool padded = of.plane != elements;
  F* const planes = scratch + kConvolutionPanel * (kConvolutionBlock + kConvolutionWeights);
  if (!of.by_group) {
    a += (group * of.channels + channel) * elements;
    if (padded) pad(of, a, channels, 1, planes);
    for (int64_t o = 0; o < of.outputs; o += 2 * kSide) {
      const int64_t at = group * of.outputs + o, left = of.outputs - o;
      const auto sum = left > kSide ? sum_panel<F, 2, false> : sum_panel<F, 1, false>;
      sum(of, padded ? planes : a, b + at * of.positions, left < 2 * kSide ? left : 2 * kSide, of.positions, from, end,
          scratch, out + at * weights, weights);
    }
    return;
  }
  F* const unpadded = planes + channels * of.plane * kSide;
  const int64_t last = group + kConvolutionPanel < of.groups ? group + kConvolutionPanel : of.groups;
  for (int64_t g = group; g < last; g += kSide) {
    const int64_t lanes = last - g < kSide ? last - g : kSide;
    for (int64_t c = 0; c < channels; ++c) {
      const F* x = a + (g * of.channels + channel + c) * elements;
      F* const plane = planes + c * of.plane * kSide;
      transpose(x, lanes, elements, of.channels * elements, padded ? unpadded : plane, kSide);
      if (padded) pad(of, unpadded, 1, kSide, plane);
    }
    for (int64_t o = 0; o < of.outputs; ++o) {
      const int64_t at = g * of.outputs + o;
      sum_panel<F, 1, true>(of, planes, b + at * of.positions, lanes, of.outputs * of.positions, from, end, scratch,
                            out + at * weights, of.outputs * weights);
    }
  }
}
