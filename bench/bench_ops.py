"""Kernels against torch and numpy: noise, the noised step, and clipping against norm + scale + sum.

Bounds: clip_sum reads each gradient once, so its floor is the time to read [256, 200000]; noise is bound by ChaCha20's
arithmetic, 60 vector instructions per 16 words.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from fastdp import _kernels, fused, native, ops
from fastdp.clipping import Span


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_noise_against_torch_normal(pair, benchmark, threads: int) -> None:
    key = ops.random_key()
    x = torch.zeros(2_000_000)
    steps = iter(range(1000))
    pair(lambda s: x.normal_(), lambda s: ops.gaussian_noise_(x, 1.0, key=key, step=s), lambda: (next(steps),))
    benchmark.extra_info["million_normals_per_s"] = x.numel() / benchmark.stats.stats.median / 1e6


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_noise_against_numpy(pair, benchmark, threads: int) -> None:
    """numpy's default generator, which is neither parallel nor cryptographic."""
    key, rng = ops.random_key(), np.random.default_rng()
    x, z = torch.zeros(2_000_000), np.empty(2_000_000, np.float32)
    steps = iter(range(1000))
    pair(
        lambda s: rng.standard_normal(dtype=np.float32, out=z),
        lambda s: ops.gaussian_noise_(x, 1.0, key=key, step=s),
        lambda: (next(steps),),
    )
    benchmark.extra_info["million_normals_per_s"] = x.numel() / benchmark.stats.stats.median / 1e6


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def bench_noise_and_sgd_step_against_torch(pair, benchmark, threads: int) -> None:
    """Noise and SGD with momentum in one pass over 2 million parameters; torch's draw beside its own step."""
    key, steps = ops.random_key(), iter(range(1000))
    theirs, ours = (torch.nn.Parameter(torch.zeros(2_000_000)) for _ in range(2))
    optimizer, inner = (torch.optim.SGD([p], lr=0.01, momentum=0.9) for p in (theirs, ours))
    flat, spans = torch.empty(ours.numel()), {ours: Span("p", ours, 0, ours.shape)}

    def with_torch(g: torch.Tensor, step: int) -> None:
        noise = torch.empty_like(g).normal_()
        theirs.grad = noise.add_(g).div_(256)
        optimizer.step()

    def fused_step(g: torch.Tensor, step: int) -> None:
        for h, parameters in fused.steps(inner, spans, 1.0, 256):
            native.noise_step(h, parameters, g, key, step)

    pair(with_torch, fused_step, lambda: (flat.uniform_(-1.0, 1.0), next(steps)))
    benchmark.extra_info["million_parameters_per_s"] = flat.numel() / benchmark.stats.stats.median / 1e6


def norms_with_torch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The shortest way there is in torch: products of norms, or Gram matrices; the bias included."""
    if a.dim() == 2:
        of_a, of_b = (torch.linalg.vector_norm(x, dim=1).square_() for x in (a, b))
        return (of_a + 1.0) * of_b
    of_a, of_b = (torch.bmm(x, x.transpose(1, 2)) for x in (a, b))
    return (of_a.add_(1.0) * of_b).sum((1, 2))


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [((256,), 1024, 1024), ((64, 64), 128, 384)], ids=["one_position", "64_positions"]
)
def bench_linear_sq_norms_against_torch(pair, benchmark, rows, inputs: int, outputs: int, threads: int) -> None:
    a, b = torch.randn(*rows, inputs), torch.randn(*rows, outputs)
    torch.testing.assert_close(ops.linear_sq_norms(a, b).float(), norms_with_torch(a, b), rtol=1e-4, atol=0.0)
    pair(norms_with_torch, ops.linear_sq_norms, lambda: (a.normal_(), b.normal_()))
    benchmark.extra_info["GB_per_s"] = (a.nbytes + b.nbytes) / benchmark.stats.stats.median / 1e9


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
