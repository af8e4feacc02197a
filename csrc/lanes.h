// Vectors of kLanes 32-bit numbers, as wide as the instruction set this file is compiled for.
// GCC's and Clang's vector types give arithmetic, shifts, comparisons and selection; the two helpers below are the
// rest. Included once per instruction set, inside its own namespace: see isa-inl.h.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 and NEON
#endif

#define FASTDP_LANES inline
#define FASTDP_UNROLL_16 _Pragma("GCC unroll 16")

typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef float f32v __attribute__((vector_size(4 * kLanes)));

// Doubles of the same width, and what is converted to them.
constexpr int kDoubles = kLanes / 2;
typedef double f64v __attribute__((vector_size(8 * kDoubles)));
typedef int64_t i64v __attribute__((vector_size(8 * kDoubles)));
typedef float f32h __attribute__((vector_size(4 * kDoubles)));
typedef uint32_t u32h __attribute__((vector_size(4 * kDoubles)));

template <class V, class T>
V load_lanes(const T* x) {
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

// GCC 12 makes the two halves of a conversion to doubles one by one and joins them; and warns of _mm512_cvtps_pd.
#if defined(__AVX512F__)
inline f64v to_double(f32h x) { return (f64v)_mm512_maskz_cvtps_pd(0xff, (__m256)x); }
#elif defined(__AVX2__)
inline f64v to_double(f32h x) { return (f64v)_mm256_cvtps_pd((__m128)x); }
#else
inline f64v to_double(f32h x) { return __builtin_convertvector(x, f64v); }
#endif

inline f64v load_doubles(const float* x) { return to_double(load_lanes<f32h>(x)); }
inline f64v load_doubles(const double* x) { return load_lanes<f64v>(x); }
inline f64v load_doubles(const bf16* x) {
  f32h v;
  for (int i = 0; i < kDoubles; ++i) v[i] = load(x[i]);
  return to_double(v);
}

// Of lanes: GCC 12 makes a vector of them one by one.
constexpr int64_t kNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr uint32_t kLaneNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// 0 in those from `count` on
inline f64v first_lanes(f64v x, int64_t count) { return (f64v)((i64v)x & (load_lanes<i64v>(kNumbers) < count)); }

inline u32v lane_numbers() { return load_lanes<u32v>(kLaneNumbers); }
inline u32v bits_of(f32v x) { return (u32v)x; }
inline f32v float_of(u32v bits) { return (f32v)bits; }
inline u32v mask(i32v comparison) { return (u32v)comparison; }  // all bits where it is true

inline f32v to_float(i32v x) { return __builtin_convertvector(x, f32v); }

// Correctly rounded by IEEE 754, so the same at every width.
inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

inline f32v sqrt_lanes(f32v x) {
  alignas(64) float t[kLanes];
  std::memcpy(t, &x, sizeof t);
  for (int i = 0; i < kLanes; ++i) t[i] = square_root(t[i]);
  std::memcpy(&x, t, sizeof t);
  return x;
}

inline f32v all(float x) { return x + f32v{}; }
inline f32v all(f32v x) { return x; }

// a * b + c rounded once, by IEEE 754: a float stands for all lanes. The baseline of x86-64 lacks the
// instruction and calls libm's fmaf for each lane: the same bits, but noise at a third of the speed it had without.
template <class B, class C>
inline f32v fused(f32v a, B b, C c) {
  const f32v bs = all(b), cs = all(c);
#if defined(__AVX512F__)
  return (f32v)_mm512_fmadd_ps((__m512)a, (__m512)bs, (__m512)cs);
#elif defined(__AVX2__)
  return (f32v)_mm256_fmadd_ps((__m256)a, (__m256)bs, (__m256)cs);
#else
  f32v sum;
  for (int i = 0; i < kLanes; ++i) sum[i] = __builtin_fmaf(a[i], bs[i], cs[i]);
  return sum;
#endif
}

inline f64v fused(f64v a, f64v b, f64v c) {  // without the instruction rounded twice: for sums that need not agree
#if defined(__AVX512F__)
  return (f64v)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (f64v)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// a * b + c, rounded once or twice: for what need not agree from machine to machine.
inline f32v multiply_add(f32v a, f32v b, f32v c) {
#if defined(__AVX2__)
  return fused(a, b, c);
#else
  return a * b + c;
#endif
}
inline f64v multiply_add(f64v a, f64v b, f64v c) { return fused(a, b, c); }

inline bool any_lane(i32v x) {
  uint64_t t[kLanes / 2], any = 0;
  std::memcpy(t, &x, sizeof t);
  for (int i = 0; i < kLanes / 2; ++i) any |= t[i];
  return any != 0;
}

template <int n>
inline u32v rotate_left(u32v x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Whole bytes move in one shuffle; AVX-512 has a rotation of its own, which the compiler finds.
  if constexpr (n == 16 || n == 8) {
    // Byte k of a word comes from byte k - n/8; words 4, 8 and 12 of a lane add 4, 8 and 12 to each.
    constexpr int word = n == 16 ? 0x01000302 : 0x02010003;
    const __m256i from = _mm256_setr_epi32(word, word + 0x04040404, word + 0x08080808, word + 0x0c0c0c0c, word,
                                           word + 0x04040404, word + 0x08080808, word + 0x0c0c0c0c);
    return (u32v)_mm256_shuffle_epi8((__m256i)x, from);
  }
#endif
  return (x << n) | (x >> (32 - n));
}

// Copies to memory that another core has read and will read next: past the caches, see csrc/comm/stream.h. Seen by
// others after finish_stores.
template <class T>
inline void store_past_caches(T* to, const T* from, int64_t n) {
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  char* out = reinterpret_cast<char*>(to);
  const char* in = reinterpret_cast<const char*>(from);
  int64_t at = 0;
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0)
    for (; at + 64 <= bytes; at += 64)
      for (int64_t k = at; k < at + 64; k += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + k),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + k)));
#endif
  if (at != bytes) std::memcpy(out + at, in + at, bytes - at);
}

inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}
