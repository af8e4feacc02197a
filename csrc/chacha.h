// ChaCha20, RFC 8439 section 2.3, on kLanes blocks side by side: x[w][lane] is word w of block `first + lane`.
// The RFC's 32-bit counter and 96-bit nonce (words 12 to 15) hold: block counter bits 0-31; bits 32-47 and the domain;
// step low; step high. Streams of another domain or step are therefore other nonces, and a stream is 2^48 blocks long.

inline void quarter_round(u32v& a, u32v& b, u32v& c, u32v& d) {
  a += b, d = rotate_left<16>(d ^ a);
  c += d, b = rotate_left<12>(b ^ c);
  a += b, d = rotate_left<8>(d ^ a);
  c += d, b = rotate_left<7>(b ^ c);
}

// words 12 and 13 may differ from lane to lane; the others are common to all.
inline void chacha20(const uint32_t (&key)[8], u32v w12, u32v w13, uint32_t w14, uint32_t w15, u32v (&x)[16]) {
  const u32v zero = {};
  const u32v init[16] = {zero + 0x61707865u,
                         zero + 0x3320646eu,
                         zero + 0x79622d32u,
                         zero + 0x6b206574u,
                         zero + key[0],
                         zero + key[1],
                         zero + key[2],
                         zero + key[3],
                         zero + key[4],
                         zero + key[5],
                         zero + key[6],
                         zero + key[7],
                         w12,
                         w13,
                         zero + w14,
                         zero + w15};
  for (int i = 0; i < 16; ++i) x[i] = init[i];
  for (int round = 0; round < 10; ++round) {
    quarter_round(x[0], x[4], x[8], x[12]);
    quarter_round(x[1], x[5], x[9], x[13]);
    quarter_round(x[2], x[6], x[10], x[14]);
    quarter_round(x[3], x[7], x[11], x[15]);
    quarter_round(x[0], x[5], x[10], x[15]);
    quarter_round(x[1], x[6], x[11], x[12]);
    quarter_round(x[2], x[7], x[8], x[13]);
    quarter_round(x[3], x[4], x[9], x[14]);
  }
  for (int i = 0; i < 16; ++i) x[i] += init[i];
}

inline void stream_blocks(const Stream& s, uint64_t first, u32v (&x)[16]) {
  u32v low, high;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t block = first + lane;
    low[lane] = static_cast<uint32_t>(block);
    high[lane] = static_cast<uint32_t>(block >> 32) | static_cast<uint32_t>(s.domain) << 16;
  }
  chacha20(s.key, low, high, static_cast<uint32_t>(s.step), static_cast<uint32_t>(s.step >> 32), x);
}
