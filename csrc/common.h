// Types that every kernel shares. Nothing here depends on an instruction set.
#pragma once

#include <cstdint>
#include <cstring>

// What device code calls, too; nvcc knows both sides.
#if defined(__CUDACC__)
#define FASTDP_BOTH __host__ __device__
#else
#define FASTDP_BOTH
#endif

namespace fastdp {

struct bf16 {
  uint16_t bits;
};

enum class DType : int { f32 = 0, bf16 = 1, f64 = 2 };

// One use of the generator per domain: a key never gives the same words to two purposes (P2).
enum class Domain : uint32_t {
  sampling = 1,
  noise = 2,
  statistics = 3,
  initialisation = 4,
  noise_tail = 5,
  secure_noise = 6,
  secure_noise_tail = 7
};

// The words of one stream are ChaCha20(key, nonce = (domain, step)), counted from block 0.
struct Stream {
  uint32_t key[8];
  Domain domain;
  uint64_t step;
};

// Rows of length n, `stride` elements apart; the elements of a row are adjacent.
template <class T>
struct Rows {
  const T* data;
  int64_t rows, n, stride;
  FASTDP_BOTH const T* row(int64_t i) const { return data + i * stride; }
};

// [records, positions, n]: rows of n, `apart` from one position to the next.
template <class T>
struct Sequences {
  const T* data;
  int64_t records, positions, n, records_apart, apart;
  FASTDP_BOTH Rows<T> record(int64_t i) const { return {data + i * records_apart, positions, n, apart}; }
  // of one position each
  FASTDP_BOTH Rows<T> rows(int64_t from, int64_t count) const {
    return {data + from * records_apart, count, n, records_apart};
  }
};

// T is what tensors hold, Sum what sums of their elements are kept in.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};

FASTDP_BOTH inline float load(float x) { return x; }
FASTDP_BOTH inline double load(double x) { return x; }
FASTDP_BOTH inline float load(bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

FASTDP_BOTH inline void store(float& to, float x) { to = x; }
FASTDP_BOTH inline void store(double& to, double x) { to = x; }
FASTDP_BOTH inline void store(bf16& to, float x) {  // round to nearest even; a NaN stays a NaN
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

}  // namespace fastdp
