"""P6: hostile records, and contributions at the ends of float32, in each mode of clipping."""

from __future__ import annotations

import copy
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import MODELS, Reused, clipped, data, first_owners, oracle_step, private
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastdp import ops, reference
from fastdp.plan import CLIPPINGS
from fastdp.probe import Probe


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("name", ["mlp", "reused", "sequences", "logistic"])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_hostile_records_are_dropped_and_the_others_kept(name: str, bad: float, clipping: str) -> None:
    module = MODELS[name]()
    twin = copy.deepcopy(module)
    dataset = data()
    dataset.tensors[0][::7] = bad
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    _, module, optimizer, loader = private(module, optimizer, dataset, clipping=clipping)
    check = torch.optim.SGD(twin.parameters(), lr=0.5)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        oracle_step(twin, check, x[: loader.rows], y[: loader.rows], 0.5, 12, clipping)
        for p, q in zip(module.parameters(), twin.parameters(), strict=True):
            assert p.isfinite().all()
            assert (p - q).abs().max() <= 1e-4 * q.abs().max()
        break


def contribution(module: nn.Module, x: Tensor, y: Tensor, c: float, clipping: str = "flat") -> Tensor:
    """What one record adds to the sum: with lr = B = 1 and no noise it is the step."""
    dataset = TensorDataset(x, y)
    _, module, optimizer, loader = private(
        module, torch.optim.SGD(module.parameters(), lr=1.0), dataset, 1, max_grad_norm=c, clipping=clipping
    )
    batch, labels = next(iter(loader))
    for p in module.parameters():
        p.data.zero_()
    (module(batch) * 1.0 - labels).square().sum().backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()]).double()


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e18])
@pytest.mark.parametrize("c", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_records_contribution_is_at_most_c(scale: float, c: float, clipping: str) -> None:
    for _ in range(5):
        x, y = torch.randn(1, 30) * scale, torch.randn(1, 20) * scale
        norm = contribution(nn.Linear(30, 20), x, y, c, clipping).norm().item()
        assert norm <= c
        true = 2 * y.double().norm().item() * math.sqrt(x.double().square().sum().item() + 1)
        want = c * true / (true + 0.01) if clipping == "automatic" else min(c, true)
        assert norm == pytest.approx(want, rel=1e-5, abs=1e-42)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_cancelling_positions_stay_within_c(clipping: str) -> None:
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
        assert contribution(Cancels(), x, y, 1.0, clipping).norm().item() <= 1.0


@pytest.mark.parametrize("x", [1e-30, 1.0, 1e20, 3e38])
@pytest.mark.parametrize("c", [1e-20, 2.5e-7, 1e-6, 0.1, 1.0])
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_contributions_at_the_ends_of_float32(x: float, c: float, clipping: str) -> None:
    added = contribution(nn.Linear(1, 20), torch.full((1, 1), x), torch.ones(1, 20), c, clipping)
    assert added.norm().item() <= c
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.full((1, 3), x, dtype=torch.float64).to(dtype)
        assert ops.clip_sum(rows, c).double().norm().item() <= c


class Embedded(nn.Module):
    """Rows, products over positions, formed gradients and products with and without a bias, of layers in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.inner = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9))
        self.out = nn.Linear(9, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.nan_to_num(x).sign().long() + 2
        return self.out(self.inner(self.table(codes) + x[:, None]).mean(1))


class BorrowedBias(nn.Module):
    """The last layer's bias and weight are those of two layers that are not called, each in a group of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(6, 3), nn.Linear(6, 3)
        self.last = nn.Linear(6, 3)
        self.last.bias, self.last.weight = self.first.bias, self.other.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x)


HARD: dict[str, type[nn.Module]] = {**MODELS, "embedded": Embedded, "borrowed": BorrowedBias}


def total(module: nn.Module, x: Tensor, y: Tensor, clipping: str, c: float | dict[str, float], piece: int | None):
    """The sum over these records, all in one batch, as a step without noise leaves it, float64."""
    module = copy.deepcopy(module)
    _, module, optimizer, loader = private(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        TensorDataset(x, y),
        len(x),
        max_grad_norm=c,
        clipping=clipping,
        poisson_sampling=False,
        max_physical_batch_size=piece,
    )
    # The probe takes four fifths of the time, and has tests of its own.
    with mock.patch.object(Probe, "watch", lambda self, batch, rows: batch):
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(inputs), labels).backward()
            optimizer.step()
    assert optimizer.steps == 1
    flat = optimizer.gradient.flat.double()
    assert flat.isfinite().all()
    return torch.cat([flat[s.offset : s.offset + s.numel] for s in optimizer.gradient.spans])


SIZES = [math.nan, math.inf, -math.inf, 3e38, -1e38, 1e20, 1e3, 1.0, 1e-3, 1e-30, 1e-45, 0.0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(list(HARD)),
    clipping=st.sampled_from(CLIPPINGS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    size=st.sampled_from(SIZES),
    places=st.integers(0, 6),
    c=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e6]),
    weights=st.sampled_from([1e-20, 1.0, 30.0]),
    piece=st.sampled_from([None, 3]),
    seed=st.integers(0, 99),
)
def test_a_record_moves_the_sum_by_at_most_c(name, clipping, dtype, size, places, c, weights, piece, seed) -> None:
    """The sensitivity: of the sum with and without the record, and of the record alone, where nothing is rounded away.

    4 epsilon of float64 are a hundredth of what summing a norm of some hundred elements may round, hence the 1e-14.
    """
    torch.manual_seed(seed)
    module = HARD[name]().to(dtype)
    with torch.no_grad():
        for p in module.parameters():
            p *= weights
    x, y = data(8, dtype).tensors
    x[-1, :places] = size
    exact = 1 + (1e-14 if dtype == torch.float64 else 0.0)
    assert total(module, x[-1:], y[-1:], clipping, c, None).norm().item() <= c * exact
    moved = total(module, x, y, clipping, c, piece) - total(module, x[:-1], y[:-1], clipping, c, piece)
    assert moved.norm().item() <= c * (1 + (1e-5 if dtype == torch.float32 else 1e-13))


@pytest.mark.parametrize("piece", [None, 3])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_sums_in_pieces_are_those_of_the_papers(clipping: str, name: str, piece: int | None) -> None:
    module = HARD[name]().double()
    x, y = data(8, torch.float64).tensors
    x[5] = 0.0
    gradients = reference.per_sample_gradients(module, F.cross_entropy, x, y)
    for c in (0.05, 5.0):
        got = total(module, x, y, clipping, c, piece)
        want = torch.cat([g.flatten() for g in clipped(module, gradients, c, clipping)])
        assert (got - want).abs().max() <= 1e-10 * want.abs().max()


def test_bounds_of_layers_are_kept_by_each_layer() -> None:
    """By name; C is their root of the sum of squares, for the noise too. A shared parameter is the first module's."""
    module = Reused().double()
    bounds = {"first": 0.3, "again": 1e-3, "tied": 0.02, "last": 5.0, "bias_only": 0.4}
    layers = first_owners(module)
    assert list(dict.fromkeys(layers)) == list(bounds)
    x, y = data(8, torch.float64).tensors
    got = total(module, x * 10, y, "per_layer", dict(reversed(bounds.items())), None)
    gradients = reference.per_sample_gradients(module, F.cross_entropy, x * 10, y)
    params = [p for p in module.parameters() if p.requires_grad]
    want = reference.per_layer_gradient(gradients, layers, bounds, params)
    assert (got - torch.cat([g.flatten() for g in want])).abs().max() <= 1e-10 * got.abs().max()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    how = {"max_grad_norm": bounds, "clipping": "per_layer", "noise_multiplier": 2.0}
    engine, *_ = private(module, optimizer, data(dtype=torch.float64), **how)
    c = math.sqrt(sum(bound**2 for bound in bounds.values()))
    assert engine.plan.max_grad_norm == pytest.approx(c, rel=1e-15)
    assert engine.plan.noise_std == pytest.approx(2.0 * c, rel=1e-15)
    assert dict(engine.plan.layer_bounds) == bounds and engine.plan.event[0] == 2.0


class Spoils(nn.Module):
    """A gradient that is not finite in the first layer alone, for records whose first feature is -1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        spoilt = torch.where(x[:, :1] == -1.0, y - y.detach(), 1.0).sqrt()  # 0, whose gradient is infinite
        return self.last(torch.tanh(y + spoilt))


def test_a_record_that_one_layer_drops_is_dropped_by_all() -> None:
    module, (x, y) = Spoils(), data(8).tensors
    x[2, 0] = -1.0
    kept = torch.arange(8) != 2
    got = total(module, x, y, "per_layer", 0.5, None)
    want = total(module, x[kept], y[kept], "per_layer", 0.5, None)
    assert want.norm() > 0.5 and (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_the_report_says_how_gradients_were_clipped(clipping: str) -> None:
    module = MODELS["mlp"]()
    engine, *_ = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data(), clipping=clipping)
    name = {"flat": "flat", "per_layer": "per-layer", "automatic": "automatic"}[clipping]
    (said,) = (line for line in engine.assumptions() if "clipping" in line)
    assert said.startswith(f"{name} clipping") and "at most C = 0.5" in said


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_a_parameter_that_a_step_does_not_use_stays_where_it_is(clipping: str) -> None:
    """What an earlier step left in its place would be a record's contribution once more."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.which = nn.ModuleList(nn.Linear(6, 4) for _ in range(2)), 0

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.heads[self.which](x)
            return y

    module = Heads()
    _, module, optimizer, loader = private(
        module, torch.optim.SGD(module.parameters(), lr=0.5), data(), clipping=clipping
    )
    for (x, y), which in zip(loader, (0, 1, 0), strict=False):
        module.which = which
        before = copy.deepcopy(module.heads)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        for p, q in zip(module.heads[1 - which].parameters(), before[1 - which].parameters(), strict=True):
            assert torch.equal(p, q)
        assert not torch.equal(module.heads[which].weight, before[which].weight)
