// ChaCha20, RFC 8439 section 2.3, on kLanes blocks side by side: x[w][lane] is word w of block `first + lane`.
// The RFC's 32-bit counter and 96-bit nonce (words 12 to 15) hold: block counter bits 0-31; bits 32-47 and the domain;
// step low; step high. Streams of another domain or step are therefore other nonces, and a stream is 2^48 blocks long.

template <int n>
FASTDP_LANES void quarter_step(u32v& a, u32v b, u32v& d) {
  a += b, d = rotate_left<n>(d ^ a);
}

// Two quarter rounds, step by step: with 16 registers for 16 words and the temporaries, what the compiler then moves to
// memory and back is off the critical path more often (157 ns a block of vectors, against 165 one by one).
FASTDP_LANES void quarter_rounds(u32v& a, u32v& b, u32v& c, u32v& d, u32v& e, u32v& f, u32v& g, u32v& h) {
  quarter_step<16>(a, b, d), quarter_step<16>(e, f, h);
  quarter_step<12>(c, d, b), quarter_step<12>(g, h, f);
  quarter_step<8>(a, b, d), quarter_step<8>(e, f, h);
  quarter_step<7>(c, d, b), quarter_step<7>(g, h, f);
}

// words 12 and 13 may differ from lane to lane; the others are common to all.
FASTDP_LANES void chacha20(const uint32_t (&key)[8], u32v w12, u32v w13, uint32_t w14, uint32_t w15, u32v (&x)[16]) {
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
  u32v v[16];
  FASTDP_UNROLL_16  // else a call of memcpy, and v in memory: 13 ns
      for (int i = 0; i < 16; ++i) v[i] = init[i];
  for (int round = 0; round < 10; ++round) {
    quarter_rounds(v[0], v[4], v[8], v[12], v[1], v[5], v[9], v[13]);
    quarter_rounds(v[2], v[6], v[10], v[14], v[3], v[7], v[11], v[15]);
    quarter_rounds(v[0], v[5], v[10], v[15], v[1], v[6], v[11], v[12]);
    quarter_rounds(v[2], v[7], v[8], v[13], v[3], v[4], v[9], v[14]);
  }
  for (int i = 0; i < 16; ++i) x[i] = v[i] + init[i];
}

FASTDP_LANES void stream_blocks(const Stream& s, uint64_t first, u32v (&x)[16]) {
  const u32v zero = {}, from = zero + static_cast<uint32_t>(first);
  const u32v low = from + lane_numbers();
  const uint32_t upper = static_cast<uint32_t>(first >> 32) | static_cast<uint32_t>(s.domain) << 16;
  const u32v high = zero + upper - mask(low < from);  // and what is carried: true is -1
  chacha20(s.key, low, high, static_cast<uint32_t>(s.step), static_cast<uint32_t>(s.step >> 32), x);
}
