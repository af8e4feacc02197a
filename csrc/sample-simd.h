// Poisson sampling of a block of records: each is in the batch with probability `rate`, independently. Instead of a
// draw per record, geometric skips: floor(log(u) / log(1 - rate)) records are left out before the next one that is
// in (Devroye 1986, section X.2), so a block costs its expected batch plus one draw.

inline int64_t sample_block(const Stream& stream, int64_t block, int64_t n, double rate, int64_t* ids) {
  const int64_t first_id = block * kSampleBlock;
  if (rate >= 1.0) {
    for (int64_t i = 0; i < n; ++i) ids[i] = first_id + i;
    return n;
  }
  const double log_out = portable_log1m(rate);
  uint32_t words[16 * kLanes];
  int64_t taken = 0, at = 0;
  for (uint64_t next = block * kBlocksPerSample;; next += kLanes) {
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
