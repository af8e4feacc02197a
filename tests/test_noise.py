"""The generator against RFC 8439, and the noise against the normal law (P2, P7)."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from scipy import stats

from fastdp import _kernels, native, ops, reference

N = 2_000_000


def block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """The native generator's block under the RFC's names."""
    high, step = struct.unpack("<IQ", nonce)
    words = np.zeros(16, dtype=np.uint32)
    k = np.frombuffer(key, dtype=np.uint8).copy()
    _kernels.keystream(k.ctypes.data, high >> 16, step, counter | (high & 0xFFFF) << 32, 1, words.ctypes.data)
    return words.tobytes()


RFC_8439 = [  # section 2.3.2; appendix A.1, test vectors 1 to 5
    (
        bytes(range(32)),
        1,
        "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        bytes(32),
        0,
        "000000000000000000000000",
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        bytes(32),
        1,
        "000000000000000000000000",
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
    (
        bytes(31) + b"\x01",
        1,
        "000000000000000000000000",
        "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
        "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    ),
    (
        b"\x00\xff" + bytes(30),
        2,
        "000000000000000000000000",
        "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
        "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
    ),
    (
        bytes(32),
        0,
        "000000000000000000000002",
        "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c7"
        "8a970e0e955c14f3a88e741b97c286f75f8fc299e8148362fa198a39531bed6d",
    ),
]


@pytest.mark.parametrize(("key", "counter", "nonce", "want"), RFC_8439)
def test_rfc_8439_vectors(key: bytes, counter: int, nonce: str, want: str) -> None:
    assert reference.chacha20_block(key, counter, bytes.fromhex(nonce)).hex() == want
    assert block(key, counter, bytes.fromhex(nonce)).hex() == want


def test_blocks_side_by_side_are_the_blocks_one_by_one(key: torch.Tensor) -> None:
    words = np.zeros((40, 16), dtype=np.uint32)
    first = 2**32 - 7  # the counter carries inside a vector
    _kernels.keystream(key.data_ptr(), 2, 5, first, 40, words.ctypes.data)
    for i in range(40):
        assert tuple(words[i]) == reference.stream_words(bytes(key.tolist()), 2, 5, first + i)


@pytest.mark.parametrize("offset", [0, 5, 255, 256, 257, 2**33 + 7, native.MAX_OFFSET - 500])
def test_noise_is_the_oracles(key: torch.Tensor, offset: int) -> None:
    got = torch.zeros(500, dtype=torch.float64)
    ops.gaussian_noise_(got, 1.0, key=key, step=2**40 + 3, offset=offset)
    want = reference.gaussian_noise(500, bytes(key.tolist()), 2**40 + 3, offset)
    assert (got - want).abs().max() < 2e-6  # a few units in the last place of a float near 4


def test_ends_take_64_bits_in_the_stream_too(key: torch.Tensor) -> None:
    """Once in 4096 pairs, the radius has words from a domain of its own: all pairs of these among a million."""
    blocks, raw, step = 1 << 17, bytes(key.tolist()), 2**33 + 1
    first = 2**32 - blocks // 2  # block numbers carry into their high word midway
    words = np.zeros((blocks, 16), dtype=np.uint32)
    _kernels.keystream(key.data_ptr(), 2, step, first, blocks, words.ctypes.data)
    noise = torch.zeros(16 * blocks)
    ops.gaussian_noise_(noise, 1.0, key=key, step=step, offset=16 * first)
    got = noise.view(-1, 8, 2, 16).permute(0, 3, 1, 2).reshape(-1, 8, 2).double()  # by block, pair, output
    high = words[:, ::2]
    at = np.argwhere((high < 2**19) | (high >= 2**32 - 2**19))
    assert 150 < len(at) < 370  # 256 expected; 6 standard deviations
    for block, pair in at.tolist():
        low = reference.stream_words(raw, 5, step, first + block)[pair]
        want = reference.normal_pair(int(high[block, pair]), low, int(words[block, 2 * pair + 1]))
        assert (got[block, pair] - torch.tensor(want)).abs().max() < 1e-6 * math.hypot(*want)


def normals(words: np.ndarray) -> np.ndarray:
    z = np.zeros((2, words.shape[1]), dtype=np.float32)
    words = np.ascontiguousarray(words, dtype=np.uint32)
    _kernels.normals_from_words(words.ctypes.data, words.shape[1], z.ctypes.data)
    return z


def test_forced_words_reach_the_tails_and_the_middle() -> None:
    ends = [0, 1, 2, 3, 2**8, 2**19 - 1, 2**19, 2**23, 2**24, 2**31 - 1]
    ends += [2**32 - 1 - end for end in ends]
    angles = [0, 1, 2**29 - 1, 2**29, 2**30, 2**31, 3 * 2**30, 2**32 - 1]
    words = np.array([(h, w, a) for h in ends for w in ends for a in angles], dtype=np.uint32)
    words = np.resize(words, (-(-len(words) // 16) * 16, 3)).T
    got = normals(words).astype(np.float64)
    want = np.array([reference.normal_pair(*map(int, w)) for w in words.T]).T
    radius = np.hypot(*want)
    assert (np.abs(got - want) <= 1e-6 * radius).all()
    assert radius.max() == pytest.approx(math.sqrt(2 * 65 * math.log(2)), abs=1e-9)
    assert 0 < radius.min() < 1e-9  # the radius is resolved near 0 too


def test_tail_probabilities_are_right_to_8_sigma() -> None:
    """P(|z| > r) of the pair is the share of 64-bit words whose radius exceeds r: find it by bisection.

    Up to 4.24 the radius takes 32 bits only: the low ones change nothing, and the share is right to 2^-32.
    """

    def radius(k: int) -> float:
        z = normals(np.tile(np.array([[k >> 32], [k & 0xFFFFFFFF], [0]], dtype=np.uint32), (1, 16)))
        return float(np.hypot(z[0, 0], z[1, 0]))

    for r in (1.0, 2.0, 4.0, 6.0, 7.0, 8.0, 9.0):
        low, high = 0, 2**64 - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if radius(middle) > r else (low, middle)
        # The float radius is off by up to 2e-7 r, and the probability by r times that, relatively.
        grid = 2**-64 if r > 4.24 else 2**-32
        assert high / 2**64 == pytest.approx(math.exp(-r * r / 2), rel=1e-5 if r < 8 else 1e-4, abs=grid)


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    x = torch.zeros(N)
    ops.gaussian_noise_(x, 1.0, key=torch.arange(32, dtype=torch.uint8), step=1)
    return x.double().numpy()


# The key is fixed, so these either always pass or always fail; the limits are 5 sigma of each statistic.
def test_law(sample: np.ndarray) -> None:
    assert stats.kstest(sample, "norm").pvalue > 1e-4
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(np.mean(sample**power) - moment) < 5 * math.sqrt(variance / N)
    for sigmas in (1, 2, 3, 4, 4.5):
        p = 2 * stats.norm.sf(sigmas)
        assert abs((np.abs(sample) > sigmas).sum() - N * p) < 5 * math.sqrt(N * p)
    assert len(np.unique(sample)) > 0.9 * N


def test_pairs_are_isotropic(sample: np.ndarray) -> None:
    """Both outputs of a pair lie 16 apart in a chunk; their angle must be uniform and independent of the radius."""
    chunks = sample[: N // 256 * 256].reshape(-1, 8, 2, 16)
    z0, z1 = chunks[:, :, 0].ravel(), chunks[:, :, 1].ravel()
    angle = np.arctan2(z1, z0)
    assert stats.kstest(angle, "uniform", args=(-math.pi, 2 * math.pi)).pvalue > 1e-4
    assert abs(np.corrcoef(z0**2, z1**2)[0, 1]) < 5 / math.sqrt(len(z0))
    assert abs(np.corrcoef(np.hypot(z0, z1), angle)[0, 1]) < 5 / math.sqrt(len(z0))


def test_no_autocorrelation(sample: np.ndarray) -> None:
    for values in (sample, sample**2 - 1):
        values = values / values.std()
        for lag in [*range(1, 40), 240, 255, 256, 257, 512, 4096]:
            assert abs(np.mean(values[:-lag] * values[lag:])) < 5 / math.sqrt(N - lag)


def test_other_steps_keys_and_domains_are_independent(sample: np.ndarray) -> None:
    key = torch.arange(32, dtype=torch.uint8)
    other_key = key.clone()
    other_key[31] ^= 1
    for k, step in ((key, 0), (key, 2), (key, 1 + 2**32), (other_key, 1)):
        x = torch.zeros(N)
        ops.gaussian_noise_(x, 1.0, key=k, step=step)
        assert abs(np.mean(x.double().numpy() * sample)) < 5 / math.sqrt(N)
    raw = bytes(key.tolist())
    streams = {d: reference.stream_words(raw, d, 1, 0) for d in (1, 2, 3, 4, 5)}
    assert len(set(streams.values())) == 5


def test_offset_continues_the_same_sequence(sample: np.ndarray) -> None:
    x = torch.zeros(1000)
    ops.gaussian_noise_(x, 1.0, key=torch.arange(32, dtype=torch.uint8), step=1, offset=12_345)
    assert np.array_equal(x.double().numpy(), sample[12_345:13_345])


def test_every_instruction_set_gives_the_same_bits(at_isa) -> None:
    code = (
        "import hashlib, torch; from fastdp import ops\n"
        "k = torch.arange(32, dtype=torch.uint8); h = hashlib.sha256()\n"
        "for n, o in ((100003, 0), (7, 254), (1000, 77)):\n"
        "    x = torch.zeros(n); ops.gaussian_noise_(x, 1.5, key=k, step=9, offset=o); h.update(x.numpy().tobytes())\n"
        "for q in (0.001, 0.3, 0.9): h.update(ops.poisson_sample(20000, q, key=k, step=4).numpy().tobytes())\n"
        "g = torch.randn(9, 5000, generator=torch.Generator().manual_seed(1))\n"
        "h.update(ops.sq_norms(g).numpy().tobytes()); h.update(ops.clip_sum(g, 1.0).numpy().tobytes())\n"
        "print(h.hexdigest())"
    )
    assert at_isa(code).strip() == run_here(code)


def run_here(code: str) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue().strip()


def test_dtypes_and_std() -> None:
    key = torch.arange(32, dtype=torch.uint8)
    reference_noise = torch.zeros(1000)
    ops.gaussian_noise_(reference_noise, 1.0, key=key, step=1)
    for dtype, limit in ((torch.float64, 1e-6), (torch.bfloat16, 2e-2)):
        x = torch.full((1000,), 3.0, dtype=dtype)
        ops.gaussian_noise_(x, 2.0, key=key, step=1)
        assert (x.double() - 3.0 - 2.0 * reference_noise.double()).abs().max() < limit * 8
    x = torch.ones(10)
    assert torch.equal(ops.gaussian_noise_(x, 0.0, key=key, step=1), torch.ones(10))
    assert ops.gaussian_noise_(torch.empty(0), 1.0, key=key, step=1).numel() == 0
