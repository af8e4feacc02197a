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

typedef uint32_t u32v __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32v __attribute__((vector_size(4 * kLanes)));
typedef float f32v __attribute__((vector_size(4 * kLanes)));

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
