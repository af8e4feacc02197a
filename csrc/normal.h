// Uniform words to numbers: two standard normals from two words (Box-Muller), and a logarithm for geometric skips.
// Only +, -, *, /, sqrt and explicit fused multiply-adds, each rounded once (compiled with -ffp-contract=off), so that
// every instruction set and every machine gives the same bits (P2).

// The radius sqrt(-2 log u) comes from u uniform in (0, 1), written from its nearer end: t = u below 1/2, u - 1 above.
// 32 bits of u are enough but near the ends, where the radius changes fast with u: within 2^-13 of them it takes 64.
// Tail: radii from 1 to 4.24 (u = 2^-13) then lie closer than float32's numbers do, and those beyond as close as 64
// bits of u put them (P7). Centre: no two neighbours lie further apart than 2^-26 (at radius 2^-6, u = 1 - 2^-13), a
// quarter of float32's spacing below 1, which is the scale that matters to the numbers that noise is added to; below
// radius 2^-6 the steps are 2^-64 / radius: finer than float32's down to radius 2^-20, where one pair in 2^41 gets.
constexpr uint32_t kEnd = 1u << 19;

FASTDP_LANES u32v from_end(u32v high) { return high + kEnd; }  // below 2 kEnd where u is within 2^-13 of an end

// t for u = (high + 1/2) 2^-32: signed, so that the complement near 1 costs nothing.
FASTDP_LANES f32v signed_uniform(u32v high) { return fused(to_float((i32v)high), 0x1p-32f, 0x1p-33f); }

// t for u = (k + 1/2) 2^-64, k = (high, low), near an end: 19, 24 and 8 bits, each exact; summed from the smallest, the
// result has full relative precision however small it is, down to 2^-65.
FASTDP_LANES f32v signed_uniform(u32v high, u32v low) {
  const u32v upper = mask((i32v)high < 0);
  const f32v top = to_float((i32v)(high ^ upper)) * 0x1p-32f;
  low ^= upper;
  const f32v middle = to_float((i32v)(low >> 8)) * 0x1p-56f;
  const f32v bottom = (to_float((i32v)(low & 0xffu)) + 0.5f) * 0x1p-64f;
  return float_of(bits_of(top + (middle + bottom)) | (upper & 0x80000000u));
}

// -2 log(u): at most that of u = 2^-65, which cuts the Gaussian at sqrt(2 * 65 log 2) = 9.49 standard deviations.
FASTDP_LANES f32v minus_two_log(f32v t) {
  const f32v u = t < 0.0f ? t + 1.0f : t;
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)): subtracting the bits of sqrt(1/2) carries into the exponent just there.
  const i32v e = ((i32v)bits_of(u) - 0x3f3504f3) & ~0x007fffff;  // times 2^23
  const f32v m = float_of((u32v)((i32v)bits_of(u) - e));
  const f32v f = e == 0 ? t : m - 1.0f;
  // log(1+f) = f - f^2/2 + f^3 p(f): the p of degree 6 that is best in relative error, 2^-24.8 of the logarithm and so
  // 2^-25.8 of the radius (Lawson's algorithm). Here 1 - 2 f p(f), by Estrin's scheme.
  const f32v z = f * f;
  const f32v p01 = fused(f, -2.0f * 3.3333910e-1f, 1.0f);
  const f32v p23 = fused(f, -2.0f * 1.9963063e-1f, 2.0f * 2.5001338e-1f);
  const f32v p45 = fused(f, -2.0f * 1.4914767e-1f, 2.0f * 1.6577585e-1f);
  const f32v p67 = fused(f, -2.0f * 8.7004378e-2f, 2.0f * 1.4267488e-1f);
  const f32v p = fused(z * z, fused(z, p67, p45), fused(z, p23, p01));
  return fused(z, p, fused(f, -2.0f, to_float(e) * (-2.0f * 6.9314718e-1f * 0x1p-23f)));
}

// Box & Muller (1958): t makes the radius, 32 bits the angle. Quadrants by swapping and by the sign of the radius.
FASTDP_LANES void normal_pair(f32v t, u32v angle, f32v& z0, f32v& z1) {
  const f32v radius = sqrt_lanes(minus_two_log(t));
  // The low 30 bits, centred on the half step, are an angle x in (-pi/4, pi/4) that is never 0.
  constexpr float unit = 3.6572951981e-10f;  // pi/4 * 2^-31
  const f32v x = fused(to_float((i32v)(angle << 2)), unit, 2.0f * unit);
  const f32v z = x * x;
  f32v s = fused(z, -1.9515295891e-4f, 8.3321608736e-3f);
  s = fused(s, z, -1.6666654611e-1f);
  s = fused(s, z * x, x);
  f32v c = fused(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = fused(c, z, 4.166664568298827e-2f);
  c = fused(c, z, -0.5f);
  c = fused(c, z, 1.0f);
  const auto swap = (i32v)angle < 0;                                        // bit 31
  const f32v r = float_of(bits_of(radius) ^ ((angle << 1) & 0x80000000u));  // bit 30
  z0 = r * (swap ? s : c);
  z1 = r * (swap ? c : s);
}

// log(m) = 2 atanh(f), f = (m-1)/(m+1): twelve terms leave 4e-18 for |f| <= 0.1716.
FASTDP_LANES double two_atanh(double f) {
  const double z = f * f;
  double p = 1.0 / 23;
  for (int k = 21; k >= 1; k -= 2) p = p * z + 1.0 / k;
  return 2.0 * f * p;
}

// Natural logarithm of a positive normal double, in arithmetic that is the same on every machine: libm's is not, and
// all ranks must draw the same batch.
FASTDP_LANES double portable_log(double x) {
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
FASTDP_LANES double portable_log1m(double q) { return q < 0.25 ? two_atanh(-q / (2.0 - q)) : portable_log(1.0 - q); }

// u = (k + 1/2) 2^-52 is exact in double, inside (0, 1), and off the true law by at most 2^-53.
FASTDP_LANES double open_unit(uint32_t low, uint32_t high) {
  const uint64_t k = (uint64_t{high} << 32 | low) >> 12;
  return (static_cast<double>(k) + 0.5) * 0x1p-52;
}
