"""Per-sample gradients of a single layer: what the records share, what cancels, and what no float32 holds."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from loops import private
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastdp import PrivacyError, persample
from fastdp.clipping import GradientSum, Span
from fastdp.gradients import SCALED_AT_ONCE, Formed, Product, of_parameters
from fastdp.persample import Call, Unit
from fastdp.uses import LinearUse


def test_a_shared_mask_of_the_batch_size_stays_shared() -> None:
    """A [T, T] mask is not taken for one row a record in the batch that happens to have T of them."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x @ (self.weight * mask)

    module = Masked()
    unit = Unit("layer", module, [(module, "weight", module.weight)], nullcontext)
    mask = torch.triu(torch.ones(5, 5))
    for rows in (3, 5, 4):
        x, b = torch.randn(rows, 5), torch.randn(rows, 5)
        call = Call("layer", 0, [], unit, ((x, mask), {}), [module(x, mask).detach()])
        call.b = [b]
        want = torch.einsum("bi,bo->bio", x, b) * mask
        assert torch.allclose(unit.formed(call, rows)[module.weight], want.flatten(1), atol=1e-5)


@pytest.mark.parametrize("size", [1e35, 3e38, float("nan")])
def test_hostile_records_stay_within_the_bound(size: float) -> None:
    """P6, where a record's factor is no normal float32 number, or its gradient no number at all."""
    c = 1e-9
    module = nn.PReLU(6)  # a negative input is its weight's gradient
    records = TensorDataset(torch.full((1, 6), -size))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    _, module, optimizer, loader = private(module, optimizer, records, 1, max_grad_norm=c, loss_reduction="sum")
    module.weight.data.zero_()
    (x,) = next(iter(loader))
    module(x).sum().backward()
    optimizer.step()
    norm = module.weight.detach().double().norm().item()
    assert norm <= c and (norm == 0.0 if size != size else norm > 0.99 * c)


CANCELLING = {
    "bias": ([[0.0]] * 8, [[1.5e8], [-1.2e8], [8.7e7], [0.6e7], [-9.9e7], [3.3e7], [-5.9e7], [2000010.0]], 1.0, 1.0),
    "subnormal": ([[3e38], [-3e38]], [[1.1756e-38], [1.1754e-38]], 1.0, 1e-3),
    "overflow": ([[1e-38], [-3e-36]], [[3e38], [1e36]], 256.0, 1.0),
}


@pytest.mark.parametrize("size", [1, 64])  # gradients formed; norms from Gram matrices
@pytest.mark.parametrize("name", CANCELLING)
def test_positions_that_cancel_stay_within_the_bound(name: str, size: int) -> None:
    """P6: sums over positions whose terms are rounded, vanish or overflow one by one."""
    a, b, scale, c = CANCELLING[name]
    layer = nn.Linear(size, size)
    spans = [Span(key, p, size * size * 16 * i, p.shape) for i, (key, p) in enumerate(layer.named_parameters())]
    total = GradientSum(spans[: 1 + (name == "bias")], c)
    for order in (1, -1):
        use = LinearUse("layer", 0, [], layer, F.pad(torch.tensor([a[::order]]), (0, size - 1)))
        use.b = F.pad(torch.tensor([b[::order]]), (0, size - 1))
        (part,) = (p for p in of_parameters(use.parts({layer.weight}, 1, torch.float32)))
        assert isinstance(part, Formed if size == 1 else Product)
        total.fill([use], 1, 1, scale, False)
        assert total.flat.double().norm() <= c


@pytest.mark.parametrize(
    ("first", "again", "close"),
    [
        ([], [], True),
        ([0.0, 0.0], [0.0, 0.0], True),
        ([0.0, 0.0], [0.0, 1e-30], False),
        ([1.0, -100.0], [1.0, -100.09], True),
        ([1.0, -100.0], [1.0, -100.11], False),
        ([1.0, 100.0], [1.11, 100.0], False),
        ([3e38], [-3e38], False),  # their difference overflows
        ([torch.inf, 1.0], [torch.inf, 1.0005], True),
        ([torch.inf, 1.0], [torch.inf, 1.002], False),
        ([torch.inf, 1.0], [3e38, 1.0], False),
        ([1.0, 1.0], [1.0, torch.inf], False),
        ([1.0, 1.0], [torch.nan, 1.0], False),
        ([torch.nan, 1.0], [1.0, 1.0], False),
        ([torch.nan, 1.0], [torch.nan, 1.0], True),
        ([torch.nan], [torch.nan], True),
    ],
)
def test_outputs_that_count_as_the_same(first: list[float], again: list[float], close: bool) -> None:
    assert persample._close(torch.tensor(first), torch.tensor(again), 1e-3) is close
    assert not persample._close(torch.tensor(first), torch.tensor([*again, 0.0]), 1e-3)


class Positions(nn.Module):
    """What every transformer does; `expand` decides how."""

    def __init__(self, expand: bool) -> None:
        super().__init__()
        self.tokens, self.positions, self.out = nn.Embedding(10, 8), nn.Embedding(5, 8), nn.Linear(8, 2)
        self.expand = expand

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        places = places.expand(len(x), -1) if self.expand else places
        return self.out((self.tokens(x) + self.positions(places)).mean(1))


@pytest.mark.parametrize("expand", [False, True])
def test_positions_that_all_records_share_are_refused_with_the_cure(expand: bool) -> None:
    module = Positions(expand)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    _, module, optimizer, loader = private(module, optimizer, TensorDataset(torch.randint(0, 10, (40, 5))))
    (x,) = next(iter(loader))
    loss = module(x).square().sum(1).mean()
    if expand:
        before = module.positions.weight.clone()
        loss.backward()
        optimizer.step()
        assert not torch.equal(module.positions.weight, before)
    else:
        loss.backward()
        with pytest.raises(
            PrivacyError, match=r"'positions': the first dimension .* `positions.expand\(len\(x\), -1\)`"
        ):
            optimizer.step()


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("channels", [4, 32])
def test_a_bias_that_a_normalisation_takes_out_again_is_no_mixing(channels: int, size: float) -> None:
    """Its gradient is the rounding of what cancels: 4e-9 where the weight's is 2e-2."""
    norm = nn.GroupNorm(channels, channels)  # as fastdp.fix puts in for BatchNorm
    module = nn.Sequential(nn.Conv2d(3, channels, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(36 * channels, 2))
    x = size * torch.randn(60, 3, 8, 8)
    records = TensorDataset(x, torch.randint(0, 2, (60,)))
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), records)
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        optimizer.step()
    assert optimizer.steps == len(loader)


@pytest.mark.parametrize("add", [False, True])
def test_more_rows_than_are_scaled_at_once(add: bool) -> None:
    layer, rows = nn.Linear(3, 300), 700
    spans = [Span(key, p, 1024 * i, p.shape) for i, (key, p) in enumerate(layer.named_parameters())]
    total, a, b = GradientSum(spans, 1e6), torch.randn(rows, 3), torch.randn(rows, 300)
    assert rows > 2 * max(256, SCALED_AT_ONCE // 300)
    total.flat.fill_(1.0)
    use = LinearUse("layer", 0, [], layer, a)
    use.b = b
    total.fill([use], rows, rows, 1.0, add)
    torch.testing.assert_close(total.views[layer.weight], b.t() @ a + add, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(total.views[layer.bias], b.sum(0) + add, rtol=1e-4, atol=1e-3)
