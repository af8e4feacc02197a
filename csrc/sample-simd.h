// Poisson sampling of a block of records: each is in the batch with probability `rate`, independently. Instead of a
// draw per record, geometric skips: floor(log(u) / log(1 - rate)) records are left out before the next one that is
// in (Devroye 1986, section X.2), so a block costs its expected batch plus one draw.

// u = (k + 1/2) 2^-52 is exact in double, inside (0, 1), and off the true law by at most 2^-53.
inline double open_unit(uint32_t low, uint32_t high) {
  const uint64_t k = (uint64_t{high} << 32 | low) >> 12;
  return (static_cast<double>(k) + 0.5) * 0x1p-52;
}

inline int64_t sample_block(const Stream& stream, int64_t block, int64_t n, double rate, int64_t* ids) {
  constexpr uint64_t kBlocksPerStream = 1024;  // room for 8192 draws of the at most 4097 that a block can take
  const int64_t first_id = block * kSampleBlock;
  if (rate >= 1.0) {
    for (int64_t i = 0; i < n; ++i) ids[i] = first_id + i;
    return n;
  }
  const double log_out = portable_log1m(rate);
  uint32_t words[16 * kLanes];
  int64_t taken = 0, at = 0;
  for (uint64_t next = block * kBlocksPerStream;; next += kLanes) {
    keystream(stream, next, kLanes, words);
    for (int k = 0; k < 16 * kLanes; k += 2) {
      const double skip = portable_log(open_unit(words[k], words[k + 1])) / log_out;
      if (skip >= static_cast<double>(n - at)) return taken;
      at += static_cast<int64_t>(skip);
      ids[taken++] = first_id + at++;
      if (at == n) return taken;
    }
  }
}
