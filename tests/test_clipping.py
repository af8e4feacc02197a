"""P6: hostile records, and contributions at the ends of float32."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from loops import MODELS, data, oracle_step, private
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastdp import ops


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["mlp", "reused", "sequences", "logistic"])
def test_hostile_records_are_dropped_and_the_others_kept(name: str, bad: float) -> None:
    module = MODELS[name]()
    twin = copy.deepcopy(module)
    dataset = data()
    dataset.tensors[0][::7] = bad
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.5), dataset)
    check = torch.optim.SGD(twin.parameters(), lr=0.5)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        oracle_step(twin, check, x[: loader.rows], y[: loader.rows], 0.5, 12)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert p.isfinite().all()
            assert (p - q).abs().max() <= 1e-4 * q.abs().max()
        break


def contribution(module: nn.Module, x: Tensor, y: Tensor, c: float) -> Tensor:
    """What one record adds to the sum: with lr = B = 1 and no noise it is the step."""
    dataset = TensorDataset(x, y)
    _, module, optimizer, loader = private(
        module, torch.optim.SGD(module.parameters(), lr=1.0), dataset, 1, max_grad_norm=c
    )
    batch, labels = next(iter(loader))
    for p in module.parameters():
        p.data.zero_()
    (module(batch) * 1.0 - labels).square().sum().backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e18])
@pytest.mark.parametrize("c", [0.0, 1e-6, 1.0, 1e6])
def test_a_records_contribution_is_at_most_c(scale: float, c: float) -> None:
    for _ in range(5):
        x, y = torch.randn(1, 30) * scale, torch.randn(1, 20) * scale
        norm = contribution(nn.Linear(30, 20), x, y, c).norm().item()
        assert norm <= c
        true = 2 * y.double().norm().item() * math.sqrt(x.double().square().sum().item() + 1)
        assert norm == pytest.approx(min(c, true), rel=1e-5, abs=1e-42)


def test_cancelling_positions_stay_within_c() -> None:
    """Positions whose gradients nearly cancel: the norm is what rounding leaves, and must not be taken for less."""

    class Cancels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.stack([x, x * (1 + 1e-7)], dim=1)
            y = self.layer(x)
            return y[:, 0] - y[:, 1]

    for _ in range(20):
        x, y = torch.randn(1, 8) * 1e3, torch.randn(1, 8) * 1e3
        assert contribution(Cancels(), x, y, 1.0).norm().item() <= 1.0


@pytest.mark.parametrize("x", [1e-30, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("c", [1e-20, 2.5e-7, 1e-6, 0.1, 1.0])
def test_contributions_at_the_ends_of_float32(x: float, c: float) -> None:
    assert contribution(nn.Linear(1, 20), torch.full((1, 1), x), torch.ones(1, 20), c).norm().item() <= c
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.full((1, 3), x, dtype=torch.float64).to(dtype)
        assert ops.clip_sum(rows, c).double().norm().item() <= c
