"""Kernels against torch: noise, and clip_sum against norm + scale + sum.

Bounds: clip_sum reads each gradient once, so its floor is the time to read [256, 200000]; noise is bound by ChaCha20's
arithmetic, 60 vector instructions per 16 words.
"""

from __future__ import annotations

import pytest
import torch

from fastdp import ops


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_noise_against_torch_normal(pair, benchmark, threads: int) -> None:
    key = ops.random_key()
    x = torch.zeros(2_000_000)
    steps = iter(range(1000))
    pair(lambda s: x.normal_(), lambda s: ops.gaussian_noise_(x, 1.0, key=key, step=s), lambda: (next(steps),))
    benchmark.extra_info["million_normals_per_s"] = x.numel() / benchmark.stats.stats.median / 1e6


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


def bench_poisson_sample_against_bernoulli(pair) -> None:
    key = ops.random_key()
    n, rate = 1_200_000, 256 / 1_200_000
    steps = iter(range(1000))
    pair(
        lambda s: (torch.rand(n) < rate).nonzero(),
        lambda s: ops.poisson_sample(n, rate, key=key, step=s),
        lambda: (next(steps),),
    )
