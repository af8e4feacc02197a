"""P6 at the level of one layer: what products over positions add, where terms cancel but for what rounding leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastdp.gradients import Formed, Norms, PerSample, Product, Scratch, of_parameters

I, O = 6, 9  # noqa: E741


def added(part: PerSample, rows: int, c: float, scale: float = 1.0) -> Tensor:
    """The clipped sum over `rows` records."""
    norms = Norms(rows, torch.float32)
    norms.add([part])
    factors, zeros = norms.factors(scale, c, None)
    out = torch.full(part.p.shape, torch.nan)
    part.add_to({part.p: out}, factors, zeros, Scratch(torch.float32), False)
    return out


def positions(a: list[float], b: list[float], inputs: int, outputs: int) -> Product:
    """One record whose a_t and b_t are these multiples of two vectors."""
    x, g = torch.randn(inputs).double(), torch.randn(outputs).double()
    x, g = x / x.norm(), g / g.norm()
    of_a, of_b = (torch.tensor(v).double()[None, :, None] for v in (a, b))
    return Product(nn.Parameter(torch.zeros(outputs, inputs)), 0, outputs, (of_a * x).float(), (of_b * g).float())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("small", [1e-19, 1e-20, 3e-21, 1e-24])
def test_a_position_that_vanishes_leaves_no_more_than_c(small: float, swapped: bool) -> None:
    """10 - 9.9: scaled, the first position is subnormal, and is lost; the second alone is a hundred times C."""
    scaled, other = [small, 9.9], [10 / small, -1.0]
    part = positions(scaled, other, I, O) if swapped else positions(other, scaled, O, I)
    assert part._scales_a == swapped
    assert added(part, 1, 1e-20).double().norm().item() <= 1e-20


@pytest.mark.parametrize("swapped", [False, True])
def test_a_position_that_overflows_drops_the_record(swapped: bool) -> None:
    """10 - 9.9 again; with the loss's mean undone, the first position is no float32 any more."""
    scaled, other = [2e38, 9.9], [5e-38, -1.0]
    part = positions(scaled, other, I, O) if swapped else positions(other, scaled, O, I)
    assert added(part, 1, 20.0, scale=4.0).count_nonzero() == 0
    assert added(part, 1, 20.0, scale=0.25).double().norm().item() == pytest.approx(0.025, rel=1e-3)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_positions_that_cancel_leave_no_more_than_c(size: float, swapped: bool) -> None:
    for _ in range(20):
        part = positions([size, size * (1 + 1e-7)], [1.0, -1.0], *((I, O) if swapped else (O, I)))
        assert added(part, 1, 1.0).double().norm().item() <= 1.0


@pytest.mark.parametrize("rows", [1, 2, 100, 700])
@pytest.mark.parametrize("inputs, outputs", [(I, O), (O, I), (O, O), (200, 300), (300, 200)])
@pytest.mark.parametrize("layout", ["records first", "positions first", "of a", "of b"])
def test_sums_of_sequences_of_any_layout(rows: int, inputs: int, outputs: int, layout: str) -> None:
    a, b = torch.randn(rows, 3, inputs), torch.randn(rows, 3, outputs)
    if layout in ("positions first", "of a"):
        a = a.transpose(0, 1).contiguous().transpose(0, 1)
    if layout in ("positions first", "of b"):
        b = b.transpose(0, 1).contiguous().transpose(0, 1)
    a[rows // 2] = torch.nan if rows > 1 else 0.0
    each = torch.einsum("bto,bti->boi", b.double(), a.double())
    norms = each.flatten(1).norm(dim=1)
    want = (each * (5.0 / norms).clamp(max=1.0)[:, None, None])[norms.isfinite() & (norms > 0)].sum(0)
    part = Product(nn.Parameter(torch.zeros(outputs, inputs)), 0, outputs, a, b)
    assert (added(part, rows, 5.0) - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


def test_products_of_one_position_beside_others_in_one_group() -> None:
    """Norms of both kinds, with and without a bias, in float32 and bfloat16, add up."""
    weights = [nn.Parameter(torch.zeros(4, 5)) for _ in range(4)]
    bias = nn.Parameter(torch.zeros(4))
    a, b = torch.randn(7, 5), torch.randn(7, 4)
    parts: list[PerSample] = [
        Product(weights[0], 0, 4, a, b),
        Product(weights[1], 0, 4, a, b, Formed(bias, 0, 4, b)),
        Product(weights[2], 0, 4, a.bfloat16(), b.bfloat16()),
        Product(weights[3], 0, 4, torch.randn(7, 30, 5), torch.randn(7, 30, 4)),
    ]
    norms = Norms(7, torch.float32)
    norms.add(of_parameters(parts))
    want = sum(block.formed().double().square().sum(1) for part in parts for block in part.blocks())
    torch.testing.assert_close(norms.sq, want, rtol=1e-5, atol=0.0)
