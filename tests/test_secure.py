"""Secure mode: noise hardened against floating-point attacks (P2, P3, P7). Tested is what is claimed, no more."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import data, private
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastdp import ArgumentError, PrivacyEngine, _kernels, accounting, native, reference

N = 1_000_000


def secure(x: Tensor, std: float, key: Tensor, step: int = 1, offset: int = 0) -> Tensor:
    out = x.clone()
    native.add_noise(out, std, key, step, offset, secure=True)
    return out


@pytest.mark.parametrize("offset", [0, 5, 255, 257, 2**33 + 7, native.MAX_SECURE_OFFSET - 300])
@pytest.mark.parametrize("std", [1.0, 2.9, 1e-30])
def test_it_is_the_oracles(key: Tensor, offset: int, std: float) -> None:
    x = (3 * std * torch.randn(300, dtype=torch.float64)).float()
    got = secure(x, std, key, 2**40 + 3, offset).double()
    off = (got - reference.secure_noise(x, std, bytes(key.tolist()), 2**40 + 3, offset)).abs()
    # The kernel's normals are floats, 2e-6 from the oracle's: once in 500 values the next multiple is nearer to them.
    assert off.max() <= reference.secure_grid(std) and (off == 0).double().mean() > 0.97


def normals_of(key: Tensor, step: int, chunk: int, chunks: int) -> np.ndarray:
    """Those of the secure domain from chunk `chunk` on, by the generator and the transform that test_noise.py tests."""
    words, low = np.zeros((2, 16 * chunks, 8, 2), dtype=np.uint32)
    _kernels.keystream(key.data_ptr(), 6, step, 16 * chunk, 16 * chunks, words.ctypes.data)
    _kernels.keystream(key.data_ptr(), 7, step, 16 * chunk, 16 * chunks, low.ctypes.data)
    low = low.reshape(-1, 16)[:, :8]
    three = np.ascontiguousarray(np.stack([words[..., 0], low, words[..., 1]]).reshape(3, -1))
    z = np.zeros((2, three.shape[1]), dtype=np.float32)
    _kernels.normals_from_words(three.ctypes.data, three.shape[1], z.ctypes.data)
    return z.reshape(2, chunks, 16, 8).transpose(1, 3, 0, 2).reshape(-1)  # chunk, pair, output, lane


# From the others on: a radius beyond 6 whose first 32 bits are 5, 14 or 26, so that the tail's words show on the grid.
@pytest.mark.parametrize("chunk", [0, 54121847 // 16, 137660142 // 16, 21125718 // 16])
def test_its_bits_are_those_of_four_normals_in_double(key: Tensor, chunk: int) -> None:
    chunks, std = 400, 0.3
    x = torch.randn(256 * chunks)
    z = [normals_of(key, 1, chunk + 2**42 * k, chunks).astype(np.float64) for k in range(4)]
    grid = 2.0**-12  # the largest power of two up to 0.3 / 1024
    assert grid == reference.secure_grid(std)
    want = np.rint((x.double().numpy() + 0.5 * std * ((z[0] + z[1]) + (z[2] + z[3]))) / grid) * grid
    assert np.array_equal(secure(x.double(), std, key, offset=256 * chunk).numpy(), want)
    assert np.array_equal(secure(x, std, key, offset=256 * chunk).numpy(), want.astype(np.float32))


BITS = """
import hashlib, torch; from fastdp import _kernels, native
k = torch.arange(32, dtype=torch.uint8); h = hashlib.sha256()
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    for n, o in ((100003, 0), (7, 254), (1000, 77), (300, 2**50 - 300)):
        x = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(dtype)
        outs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outs.append(x.clone()); native.add_noise(outs[-1], 1.5, k, 9, o, secure=True)
        assert torch.equal(*outs)
        h.update(outs[0].double().numpy().tobytes())
print(_kernels.isa(), h.hexdigest())
"""


def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    at_isa: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    exec(BITS, {})
    torch.set_num_threads(threads)
    assert at_isa(BITS).split()[1] == capsys.readouterr().out.split()[1]


def test_offset_continues_the_same_sequence(key: Tensor) -> None:
    x = torch.randn(5000)
    whole = secure(x, 1.0, key)
    for cut in (1, 255, 256, 1000, 4999):
        assert torch.equal(torch.cat([secure(x[:cut], 1.0, key), secure(x[cut:], 1.0, key, offset=cut)]), whole)


@functools.cache
def sample() -> np.ndarray:
    return secure(torch.zeros(N), 1.0, torch.arange(32, dtype=torch.uint8)).double().numpy()


# The key is fixed, so these either always pass or always fail; the limits are 5 sigma of each statistic.
def test_law() -> None:
    z = sample()
    assert stats.kstest(z, "norm").pvalue > 1e-4
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(np.mean(z**power) - moment) < 5 * math.sqrt(variance / N)
    edges = np.r_[-np.inf, np.linspace(-4, 4, 201) + 2.0**-11, np.inf]  # between two multiples of the grid
    counts = np.histogram(z, edges)[0]
    assert stats.chisquare(counts, N * np.diff(stats.norm.cdf(edges))).pvalue > 1e-4
    for sigmas in (1, 2, 3, 4, 4.5):
        p = 2 * stats.norm.sf(sigmas + 2.0**-11)
        assert abs((np.abs(z) > sigmas).sum() - N * p) < 5 * math.sqrt(N * p)


def test_values_are_independent_of_each_other_and_of_the_usual_noise(key: Tensor) -> None:
    z = sample()
    for values in (z, (z**2 - 1) / math.sqrt(2)):
        for lag in [*range(1, 40), 240, 255, 256, 257, 512, 4096]:
            assert abs(np.mean(values[:-lag] * values[lag:])) < 5 / math.sqrt(N - lag)
    others = [secure(torch.zeros(N), 1.0, key, step=2), secure(torch.zeros(N), 1.0, key, offset=N)]
    for k in range(4):  # the same key, step and indices in the usual mode
        others.append(torch.zeros(N))
        native.add_noise(others[-1], 1.0, key, 1, k * native.MAX_SECURE_OFFSET)
    for other in others:
        assert abs(np.mean(z * other.double().numpy())) < 5 / math.sqrt(N)
    raw = bytes(key.tolist())
    assert len({reference.stream_words(raw, domain, 1, 0) for domain in range(1, 8)}) == 7


@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("std", [1.0, 1.999, 3e-5, 1e-30, 1e30])
def test_every_output_is_a_multiple_of_the_grid(key: Tensor, dtype: torch.dtype, std: float) -> None:
    grid = reference.secure_grid(std)
    assert std / 2048 < grid <= std / 1024 and math.frexp(grid)[0] == 0.5
    for scale in (0.0, 1e-3, 1.0, 100.0, 1e5, 1e7):  # beyond 2^14 of them, float32 holds some multiples only
        x = (scale * std * torch.randn(20_000, dtype=torch.float64)).to(dtype)
        y = secure(x, std, key).double()
        assert torch.equal(y, torch.round(y / grid) * grid)
        # What came in, and the noise: rounded to the grid, and to the dtype where that is coarser.
        noise = secure(torch.zeros(20_000, dtype=torch.float64), std, key)
        limit = grid + torch.finfo(dtype).eps * y.abs()
        assert ((y - x.double() - noise).abs() <= limit).all()


def test_no_zero_has_a_sign(key: Tensor) -> None:
    y = secure(torch.zeros(N), 1.0, key)
    assert 200 < (y == 0).sum() < 600  # 390 expected; from either side
    assert not torch.signbit(y[y == 0]).any()


def test_low_order_bits_of_the_sum_do_not_show(key: Tensor) -> None:
    """Mironov 2012: with the usual noise, which numbers come out says what was there before; here it does not."""
    none, one = torch.zeros(N), torch.ones(N)
    near = torch.nextafter(one, 2 * one)
    plain = [x.clone() for x in (none, one)]
    for x in plain:
        native.add_noise(x, 1.0, key, 1, 0)
    coarse = [(x[x.abs() < 0.25] * 2**24 % 1 == 0).double().mean().item() for x in plain]
    assert coarse[0] < 0.5 and coarse[1] == 1.0
    hard = [secure(x, 1.0, key) for x in (none, one, near)]
    low, high = -512, 512  # the multiples of 2^-10 in [-0.5, 0.5): each comes out of each sum
    reached = [set((x[(x >= -0.5) & (x < 0.5)] * 1024).int().tolist()) for x in hard]
    assert all(each == set(range(low, high)) for each in reached)
    assert (hard[1] != hard[2]).double().mean() < 4 * 2**-13  # sums 2^-23 apart, multiples 2^-10 apart


def test_nothing_and_too_much(key: Tensor) -> None:
    x = torch.randn(10)
    assert torch.equal(secure(x, 0.0, key), x) and secure(torch.empty(0), 1.0, key).numel() == 0
    assert secure(torch.tensor([math.nan, math.inf]), 1.0, key).isfinite().sum() == 0
    with pytest.raises(ArgumentError, match="offset=1125899906842615: must be in"):
        secure(x, 1.0, key, offset=native.MAX_SECURE_OFFSET - 9)


# ---- runs


def still(secure_mode: bool, on_engine: bool, make: Callable[..., torch.optim.Optimizer], **kwargs: Any) -> Any:
    """A run whose gradients are all 0: engine, module, optimizer, loader."""
    module = nn.Linear(30, 20)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    engine = PrivacyEngine(seed=1, secure_mode=secure_mode and on_engine)
    return engine, *engine.make_private(
        module=module,
        optimizer=make(module.parameters(), lr=1.0),
        data_loader=DataLoader(data(50), batch_size=8),
        secure_mode=secure_mode and not on_engine,
        **{"noise_multiplier": 1.5, "max_grad_norm": 1.0, **kwargs},
    )


class Own(torch.optim.SGD):
    """A subclass, that the kernels leave to torch in any mode."""


@pytest.mark.parametrize("make", [torch.optim.SGD, Own])
@pytest.mark.parametrize("on_engine", [True, False])
@pytest.mark.filterwarnings("ignore:.*a step of noise alone")
def test_runs_take_it_once_a_step_on_empty_batches_too(make: Callable[..., Any], on_engine: bool) -> None:
    _, module, optimizer, loader = still(True, on_engine, make)
    weight, bias = module.weight, module.bias
    spans = {s.param: s.offset for s in optimizer.gradient.spans}
    for step, _ in zip(range(3), loader, strict=False):
        before = weight.detach().clone(), bias.detach().clone()
        optimizer.step()  # without a backward: nothing to sum, as of an empty batch
        for p, was in zip((weight, bias), before, strict=True):
            noise = secure(torch.zeros(p.numel()), 1.5, optimizer._key.tensor(), step, spans[p])
            assert torch.equal(p.detach(), was - (noise / 8).view_as(p))


def test_either_argument_means_the_same() -> None:
    engines = [still(True, on_engine, torch.optim.SGD)[0] for on_engine in (True, False)]
    assert engines[0].plan == engines[1].plan != still(False, True, torch.optim.SGD)[0].plan
    said = "secure mode: the noise is hardened against floating-point attacks, no guarantee"
    for engine in engines:
        assert engine.plan.secure_mode and said in engine.assumptions()
    assert said not in still(False, False, torch.optim.SGD)[0].assumptions()
    with pytest.raises(ArgumentError, match="secure_mode='yes': must be True or False"):
        PrivacyEngine(secure_mode="yes")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*a step of noise alone")
def test_epsilon_counts_the_tails_of_four_normals(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a delta just above what d cut normals a step use up, 4 d use up more."""
    monkeypatch.setattr(accounting, "TAIL_RADIUS", 5.0)
    delta, epsilons = 1.1 * accounting.tail_delta(2.0, 1, 620), []
    for mode in (True, False):
        engine, _, optimizer, loader = still(mode, True, torch.optim.SGD, noise_multiplier=2.0)
        next(iter(loader))
        optimizer.step()
        epsilons.append(engine.get_epsilon(delta))
    assert epsilons[0] == math.inf > epsilons[1]


def test_calibrated_runs_train() -> None:
    module = nn.Linear(6, 3)
    engine = PrivacyEngine(secure_mode=True)
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module,
        optimizer=torch.optim.Adam(module.parameters(), lr=0.05),
        data_loader=DataLoader(data(60), batch_size=12),
        target_epsilon=8.0,
        target_delta=1e-5,
        epochs=2,
        max_grad_norm=1.0,
    )
    assert engine.plan is not None and engine.plan.secure_mode
    before = module.weight.detach().clone()
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
    assert not torch.equal(module.weight, before)
    assert 0.995 * 8 < engine.get_epsilon(1e-5) <= 8


def test_a_secure_run_is_the_usual_one_but_for_its_noise() -> None:
    """Little noise: the same batches, and parameters that differ by about as much as the noise."""
    got = []
    for mode in (False, True):
        torch.manual_seed(0)
        module = nn.Linear(6, 3)
        how = {"noise_multiplier": 1e-4, "secure_mode": mode}
        _, module, optimizer, loader = private(module, torch.optim.Adam(module.parameters(), lr=0.1), data(), **how)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        got.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert 0 < (got[0] - got[1]).abs().max() < 0.05
