// Gaussian noise, added to memory or consumed by an optimizer's step as it is made: it is never stored on its own.

// Once in 4096 pairs: 32 more bits for those of kLanes blocks that are near an end. A function of its own, so that it
// takes neither registers nor room from the usual case.
[[gnu::noinline]] inline void refine_ends(const Stream& s, uint64_t first, const u32v (&x)[16], f32v (&t)[8]) {
  Stream tail = s;
  tail.domain = s.domain == Domain::noise ? Domain::noise_tail : Domain::secure_noise_tail;
  u32v low[16];
  stream_blocks(tail, first, low);
  for (int pair = 0; pair < 8; ++pair)
    t[pair] = from_end(x[2 * pair]) < 2 * kEnd ? signed_uniform(x[2 * pair], low[pair]) : t[pair];
}

inline void normal_chunk(const Stream& s, uint64_t chunk, float (&z)[kChunk]) {
  for (int part = 0; part < 16; part += kLanes) {
    u32v x[16];
    stream_blocks(s, 16 * chunk + part, x);
    f32v t[8];
    u32v nearest = ~u32v{};
    for (int pair = 0; pair < 8; ++pair) {
      t[pair] = signed_uniform(x[2 * pair]);
      const u32v distance = from_end(x[2 * pair]);
      nearest = distance < nearest ? distance : nearest;
    }
    if (any_lane(nearest < 2 * kEnd)) refine_ends(s, 16 * chunk + part, x, t);
    for (int pair = 0; pair < 8; ++pair) {
      f32v z0, z1;
      normal_pair(t[pair], x[2 * pair + 1], z0, z1);
      std::memcpy(z + 32 * pair + part, &z0, sizeof z0);
      std::memcpy(z + 32 * pair + 16 + part, &z1, sizeof z1);
    }
  }
}

// Calls body(begin, count, z) for consecutive pieces of [0, n) that lie in one chunk; z[j] is N(first + begin + j), and
// z[kChunk * k + j] that of the k-th of `normals`, kSecureApart further each.
template <int normals = 1, class Body>
inline void for_each_chunk(int64_t n, const Stream& stream, uint64_t first, Body body) {
  alignas(64) float z[normals][kChunk];
  for (int64_t i = 0; i < n;) {
    const uint64_t index = first + i;
    const int64_t skip = index % kChunk;
    const int64_t count = kChunk - skip < n - i ? kChunk - skip : n - i;
    for (int k = 0; k < normals; ++k) normal_chunk(stream, (index + k * kSecureApart) / kChunk, z[k]);
    body(i, count, z[0] + skip);
    i += count;
  }
}

template <class T>
void add_noise(T* x, int64_t n, const Stream& stream, uint64_t first, double std) {
  using F = typename SumOf<T>::type;
  const F s = static_cast<F>(std);
  for_each_chunk(n, stream, first, [=](int64_t i, int64_t count, const float* z) {
    T* __restrict__ to = x + i;
    for (int64_t j = 0; j < count; ++j) store(to[j], load(to[j]) + s * static_cast<F>(z[j]));
  });
}

// Hardening against attacks on floating-point noise, nothing that is proven. The sum (Holohan & Braghin 2021,
// arXiv:2107.10138, n = 2) has too many words in it to search for those that made it. The grid hides the low-order
// bits of x and of the noise, which Mironov (2012) reads: within the noise's reach, every x gives the same multiples.
template <class T>
void add_secure_noise(T* x, int64_t n, const Stream& stream, uint64_t first, double std, double grid) {
  const double half = 0.5 * std;
  // From 2^52 grids to 2^53, doubles are the multiples of the grid: this rounds to the nearest, ties to even, up to
  // 2^51 grids either way (beyond, to a coarser one's), and no zero keeps a sign. rint has no instruction in SSE2.
  const double shift = 0x1.8p52 * grid;
  for_each_chunk<kSecureNormals>(n, stream, first, [=](int64_t i, int64_t count, const float* z) {
    T* __restrict__ to = x + i;
    for (int64_t j = 0; j < count; ++j) {
      const auto normal = [=](int k) { return static_cast<double>(z[k * kChunk + j]); };
      const double noise = half * ((normal(0) + normal(1)) + (normal(2) + normal(3)));
      const double rounded = ((static_cast<double>(load(to[j])) + noise) + shift) - shift;
      store(to[j], static_cast<typename SumOf<T>::type>(rounded));
    }
  });
}

// Its own function for __restrict__, which the compiler believes of parameters only.
template <class T, class Update, class... State>
inline void step_chunk(int64_t count, const float* z, const NoisedGradient& h, Update update, T* __restrict__ p,
                       const T* __restrict__ sum, State* __restrict__... state) {
  const T std = static_cast<T>(h.std), scale = static_cast<T>(h.scale), decay = static_cast<T>(h.weight_decay);
  for (int64_t j = 0; j < count; ++j)
    update((sum[j] + std * static_cast<T>(z[j])) * scale + decay * p[j], p[j], state[j]...);
}

template <class T>
inline void add_up(int64_t count, const T* x, int64_t sums, int64_t apart, T* __restrict__ total) {
  for (int64_t j = 0; j < count; ++j) total[j] = x[j] + x[apart + j];
  for (int64_t k = 2; k < sums; ++k)
    for (int64_t j = 0; j < count; ++j) total[j] += x[k * apart + j];
}

// Calls update(gradient, p[i], state[i]...) for each element.
template <class T, class Update, class... State>
inline void noise_step(const StepRange<T>& r, const Stream& stream, const NoisedGradient& h, Update update,
                       State*... state) {
  for_each_chunk(r.n, stream, r.first, [=](int64_t i, int64_t count, const float* z) {
    alignas(64) T total[kChunk];
    const T* sum = r.sum + i;
    if (r.sums > 1) {
      add_up(count, sum, r.sums, r.sums_apart, total);
      sum = total;
    }
    step_chunk(count, z, h, update, r.p + i, sum, (state + i)...);
    for (int64_t k = 0; k < r.copies; ++k) {
      T* copy = r.copy + k * r.copies_apart;
      if (copy != r.p) store_past_caches(copy + i, r.p + i, count);
    }
  });
  if (r.copies > 1) finish_stores();
}

template <class T>
void noise_sgd(const StepRange<T>& r, const Stream& stream, const SgdStep& h) {
  const SgdUpdate<T> update(h);
  if (r.state[0] == nullptr) return noise_step(r, stream, h.gradient, update);
  noise_step(r, stream, h.gradient, update, r.state[0]);
}

template <class T>
void noise_adam(const StepRange<T>& r, const Stream& stream, const AdamStep& h) {
  noise_step(r, stream, h.gradient, AdamUpdate<T>(h), r.state[0], r.state[1]);
}

inline void keystream(const Stream& s, uint64_t first, int64_t blocks, uint32_t* words) {
  for (int64_t at = 0; at < blocks; at += kLanes) {
    u32v x[16];
    stream_blocks(s, first + at, x);
    const int64_t count = blocks - at < kLanes ? blocks - at : kLanes;
    for (int64_t lane = 0; lane < count; ++lane)
      for (int w = 0; w < 16; ++w) words[16 * (at + lane) + w] = x[w][lane];
  }
}

inline void normals_from_words(const uint32_t* words, int64_t n, float* z) {
  for (int64_t i = 0; i < n; i += kLanes) {
    u32v w[3];
    for (int k = 0; k < 3; ++k) std::memcpy(&w[k], words + k * n + i, sizeof w[k]);
    const f32v t = from_end(w[0]) < 2 * kEnd ? signed_uniform(w[0], w[1]) : signed_uniform(w[0]);
    f32v z0, z1;
    normal_pair(t, w[2], z0, z1);
    std::memcpy(z + i, &z0, sizeof z0);
    std::memcpy(z + n + i, &z1, sizeof z1);
  }
}
