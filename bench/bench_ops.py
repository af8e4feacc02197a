"""Kernels against torch: noise, and clip_sum against norm + scale + sum.

Bounds: clip_sum reads each gradient once, so its floor is the time to read [256, 200000]; noise is bound by ChaCha20's
arithmetic, 60 vector instructions per 16 words.
"""

from __future__ import annotations

import time

import pytest
import torch

from fastdp import _kernels, native, ops


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_noise_against_torch_normal(pair, benchmark, threads: int) -> None:
    key = ops.random_key()
    x = torch.zeros(2_000_000)
    steps = iter(range(1000))
    pair(lambda s: x.normal_(), lambda s: ops.gaussian_noise_(x, 1.0, key=key, step=s), lambda: (next(steps),))
    benchmark.extra_info["million_normals_per_s"] = x.numel() / benchmark.stats.stats.median / 1e6


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_secure_noise_against_the_usual(pair, benchmark, threads: int) -> None:
    key = ops.random_key()
    x = torch.zeros(2_000_000)
    steps = iter(range(1000))
    pair(
        lambda s: native.add_noise(x, 1.0, key, s, 0),
        lambda s: native.add_noise(x, 1.0, key, s, 0, secure=True),
        lambda: (next(steps),),
    )
    benchmark.extra_info["million_values_per_s"] = x.numel() / benchmark.stats.stats.median / 1e6


def clip_with_torch(g: torch.Tensor) -> torch.Tensor:
    factors = (1.0 / torch.linalg.vector_norm(g, dim=1)).clamp(max=1.0)
    return torch.mv(g.t(), factors)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_clip_sum_against_torch(pair, benchmark, threads: int) -> None:
    g = torch.randn(256, 200_000)

    def fresh() -> tuple[torch.Tensor]:
        g[:, ::1000].normal_()
        return (g,)

    pair(clip_with_torch, lambda g: ops.clip_sum(g, 1.0), fresh, rounds=10)
    benchmark.extra_info["GB_per_s"] = g.numel() * 4 / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_clip_sum_against_one_read(pair, benchmark, threads: int) -> None:
    """The peer only reads the same memory. Best against best: what else runs on the machine slows both, not alike."""
    g = torch.randn(256, 200_000)
    out = torch.empty(200_000)
    reads: list[float] = []

    def read() -> None:
        start = time.perf_counter()
        _kernels.read_memory(g.data_ptr(), g.numel() // 2, threads)
        reads.append(time.perf_counter() - start)

    pair(read, lambda: native.clip_sum(g, 1.0, out), lambda: (), rounds=50)
    size = g.numel() * 4 / 1e9
    benchmark.extra_info["GB_per_s"] = size / benchmark.stats.stats.min
    benchmark.extra_info["read_GB_per_s"] = size / min(reads)
    benchmark.extra_info["of_read_bandwidth"] = min(reads) / benchmark.stats.stats.min


def bench_poisson_sample_against_bernoulli(pair) -> None:
    key = ops.random_key()
    n, rate = 1_200_000, 256 / 1_200_000
    steps = iter(range(1000))
    pair(
        lambda s: (torch.rand(n) < rate).nonzero(),
        lambda s: ops.poisson_sample(n, rate, key=key, step=s),
        lambda: (next(steps),),
    )
