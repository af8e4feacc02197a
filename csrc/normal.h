// Uniform words to numbers: two standard normals from three words (Box-Muller), and a logarithm for geometric skips.
// Only +, -, *, / and sqrt, each rounded once (compiled with -ffp-contract=off), so that every instruction set and
// every machine gives the same bits (P2). No fused multiply-add: ChaCha20 costs about three times the transform, and
// without it the baseline build needs no library call to give the same bits.

// 64 bits (high, low) as a float in [0, 2^64) scaled by 2^-64, plus half a step. The three pieces are exact (24, 24
// and 16 bits); summed from the smallest, the result has full relative precision however small it is.
inline f32v unit_interval(u32v high, u32v low) {
  const f32v top = to_float((i32v)(high >> 8)) * 0x1p-24f;
  const f32v middle = to_float((i32v)(((high & 0xffu) << 16) | (low >> 16))) * 0x1p-48f;
  const f32v bottom = (to_float((i32v)(low & 0xffffu)) + 0.5f) * 0x1p-64f;
  return top + (middle + bottom);
}

// -2 log(u) for u = (k + 1/2) 2^-64, k = (high, low). Both ends are resolved: near 0 down to u = 2^-65, which cuts the
// Gaussian at sqrt(2 * 65 log 2) = 9.49 standard deviations; near 1 by computing 1 - u from the complement of k,
// so that small radii are as finely spaced as small floats are.
inline f32v minus_two_log(u32v high, u32v low) {
  const i32v upper = (i32v)high < 0;                                    // u >= 1/2
  const f32v v = unit_interval(high ^ (u32v)upper, low ^ (u32v)upper);  // min(u, 1 - u), in (0, 1/2]
  const f32v u = upper ? 1.0f - v : v;
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) carries into the exponent just there.
  const i32v shifted = (i32v)u - 0x3f3504f3;
  const i32v e = shifted >> 23;
  const f32v m = (f32v)((shifted & 0x007fffff) + 0x3f3504f3);
  const f32v f = (upper & (e == 0)) ? -v : m - 1.0f;
  // Minimax polynomial of (log(1+f) - f + f^2/2) / f^3 on [sqrt(1/2)-1, sqrt(2)-1] (Cephes logf): 1 ULP or so.
  const f32v z = f * f;
  f32v p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const f32v n = to_float(e);
  f32v y = f * z * p + n * -2.12194440e-4f;  // log 2 = 0.693359375 - 2.12194440e-4: the first is exact times any e
  y = y - 0.5f * z;
  return -2.0f * ((f + y) + n * 0.693359375f);
}

// Box & Muller (1958): radius from 64 bits, angle from 32. Quadrants by swapping and by the sign of the radius.
inline void normal_pair(u32v high, u32v low, u32v angle, f32v& z0, f32v& z1) {
  const f32v radius = sqrt_lanes(minus_two_log(high, low));
  // The low 30 bits, centred on the half step, are an angle x in (-pi/4, pi/4) that is never 0.
  const f32v x = to_float((i32v)((angle << 2) | 2u)) * 3.6572951981e-10f;  // pi/4 * 2^-31
  const f32v z = x * x;
  f32v s = -1.9515295891e-4f * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * x + x;
  f32v c = 2.443315711809948e-5f * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * (z * z) + (1.0f - 0.5f * z);
  const i32v swap = (i32v)angle < 0;                                   // bit 31
  const f32v r = (f32v)((u32v)radius ^ ((angle << 1) & 0x80000000u));  // bit 30
  z0 = r * (swap ? s : c);
  z1 = r * (swap ? c : s);
}

// log(m) = 2 atanh(f), f = (m-1)/(m+1): twelve terms leave 4e-18 for |f| <= 0.1716.
inline double two_atanh(double f) {
  const double z = f * f;
  double p = 1.0 / 23;
  for (int k = 21; k >= 1; k -= 2) p = p * z + 1.0 / k;
  return 2.0 * f * p;
}

// Natural logarithm of a positive normal double, in arithmetic that is the same on every machine: libm's is not, and
// all ranks must draw the same batch.
inline double portable_log(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int64_t sqrt_half = 0x3fe6a09e667f3bcd;
  const int64_t shifted = bits - sqrt_half;
  const int64_t e = shifted >> 52;
  bits = (shifted & 0x000fffffffffffff) + sqrt_half;
  double m;
  std::memcpy(&m, &bits, sizeof m);
  return static_cast<double>(e) * 0.6931471805599453 + two_atanh((m - 1.0) / (m + 1.0));
}

// log(1 - q) for 0 < q < 1, precise for small q.
inline double portable_log1m(double q) { return q < 0.25 ? two_atanh(-q / (2.0 - q)) : portable_log(1.0 - q); }
