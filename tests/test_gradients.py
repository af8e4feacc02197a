"""P6 at the level of one layer: what products over positions add, where terms cancel but for what rounding leaves."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from fastdp import ArgumentError, gradients, native
from fastdp.gradients import Formed, Norms, PerSample, Product, Scratch, of_parameters
from fastdp.uses import LinearUse

I, O = 6, 9  # noqa: E741


def added(part: PerSample, rows: int, c: float, scale: float = 1.0) -> Tensor:
    """The clipped sum over `rows` records."""
    norms = Norms(rows, part.p.dtype)
    norms.add([part])
    factors, zeros = norms.factors(scale, c, None)
    out = torch.full_like(part.p.detach(), torch.nan)
    part.add_to({part.p: out}, factors, zeros, Scratch(part.p.dtype), False)
    return out


def sequences(a: Tensor, b: Tensor) -> Product:
    """Products over positions, whatever `are_small` would say of them."""
    return Product(nn.Parameter(torch.zeros(b.shape[2], a.shape[2], dtype=a.dtype)), 0, b.shape[2], a, b)


def same_in_all(width: int, values: list[float]) -> Tensor:
    """[1, T, width], of each position the same number in all columns."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1).expand(1, len(values), width).float()


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
    norms = Norms(1, torch.float32)
    norms.add([part])
    assert norms.factors(4.0, 20.0, None)[1] == 1  # which drops it from other layers, too, where each has its own norm
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


@pytest.mark.parametrize(("width", "c"), [(1, 0.5), (100, 5.0)])
def test_products_that_are_lost_leave_room(width: int, c: float) -> None:
    """Two positions that cancel, but the second one's product is subnormal, which the kernel makes 0."""
    scaled = same_in_all(width, [1.2e-38, -1.1e-38])
    rest = torch.zeros(1, 2, width + 1)
    rest[0, :, 0] = torch.tensor([1e38, 1e38 * (1.2 / 1.1)])
    for a, b in ((scaled, rest), (rest, scaled), (rest[..., :width], scaled)):
        assert added(sequences(a, b), 1, c).double().norm().item() <= c


@pytest.mark.parametrize("other", [3, 5, 1])
def test_a_product_that_does_not_fit_drops_the_record(other: int) -> None:
    """Two positions that cancel; the kernel would drop the first one alone. The scaled one is the narrower."""
    scaled, rest = same_in_all(1, [3e38, -1e35]), same_in_all(other, [1e-38, 3e-35])
    for a, b in ((scaled, rest), (rest, scaled)):
        assert added(sequences(a, b), 1, 1.0, scale=600.0).norm().item() <= 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e-9, 1e-8, 3e-8, 1e-7, 1e-6])
@pytest.mark.parametrize("widths", [(64, 64), (32, 64), (64, 32)])
@pytest.mark.parametrize("times", [1, 8, 32])
def test_gram_matrices_that_cancel_leave_room(
    dtype: torch.dtype, gap: float, widths: tuple[int, int], times: int
) -> None:
    a, b = (torch.randn(20, 1, width, dtype=dtype) * 1e3 for width in widths)
    a, b = torch.cat([a, a * (1 + gap)] * times, 1), torch.cat([b, -b] * times, 1)
    for x, y in zip(a.split(1), b.split(1), strict=True):
        assert added(sequences(x, y), 1, 1.0).double().norm().item() <= 1.0


@pytest.mark.parametrize("times", [8, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sequences_that_cancel_stay_within_c(times: int, dtype: torch.dtype) -> None:
    for widths in ((8, 8), (5, 12), (12, 5)):
        a, b = (torch.randn(1, 1, width, dtype=dtype).mul(1e3).repeat(1, times, 1) for width in widths)
        b[:, -1] *= 1 - times
        assert added(sequences(a, b), 1, 1.0).double().norm().item() <= 1.0


def test_doubles_whose_squares_vanish_count_whole() -> None:
    a, b = torch.ones(1, 2, 3).double() * 1e-163, torch.ones(1, 2, 4).double() * 1e153
    want = math.sqrt(12) * 2e-10
    assert added(sequences(a, b), 1, 1e-12).norm().item() == pytest.approx(1e-12, rel=1e-6)
    assert added(sequences(a, b), 1, 1.0).norm().item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("shape", [(1151,), (701, 2), (383, 3)])
@pytest.mark.parametrize("widths", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("turned", [False, True])
def test_sums_in_pieces_of_rows(
    shape: tuple[int, ...], widths: tuple[int, int], turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows than are scaled at once, by a number that pieces do not divide; a record has the factor 0."""
    monkeypatch.setattr(gradients, "SCALED_AT_ONCE", 1)  # 256 rows
    a, b = (torch.randn(*shape, width, dtype=torch.float64) for width in widths)
    if turned and len(shape) == 2:
        a, b = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (a, b))
    p = nn.Parameter(torch.zeros(widths[1], widths[0], dtype=torch.float64))
    factors = torch.rand(shape[0], dtype=torch.float64)
    a[3], factors[3] = math.nan, 0.0
    part, view = Product(p, 0, len(p), a, b), torch.ones_like(p.data)
    part.add_to({p: view}, factors, 1, Scratch(torch.float64), True)
    kept = torch.arange(shape[0]) != 3
    a, b = (x[kept].unsqueeze(1) if x.dim() == 2 else x[kept] for x in (a, b))
    want = 1 + torch.einsum("n,nto,nti->oi", factors[kept], b, a)
    torch.testing.assert_close(view, want, rtol=0.0, atol=1e-10)


def test_memory_of_another_size_is_refused() -> None:
    x, ones = torch.randn(4, 3, 5), torch.ones(12, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="out="):
        native.scale_rows(x, ones, torch.empty(11, 5), None)
    with pytest.raises(ArgumentError, match="sums="):
        native.scale_rows(x, ones, torch.empty(12, 5), torch.empty(5))
    with pytest.raises(ArgumentError, match="out="):
        native.add_linear_sq_norms([(x, x, False)], torch.zeros(3).double())
    with pytest.raises(ArgumentError, match="bounds="):
        native.add_linear_sq_norms([(x, x, False)], torch.zeros(4).double(), torch.zeros(4, 2).double())


def test_what_is_settled_lets_go_of_inputs_and_gradients() -> None:
    """The graph's hooks, and a loss that the user keeps, hold the use: not what it was made of, too."""
    layer, a, b = nn.Linear(2, 2), torch.randn(5, 40, 2), torch.randn(5, 40, 2)
    use = LinearUse("layer", 0, [(a, a._version)], layer, a)
    use.b = b
    want, held = torch.einsum("bto,bti->boi", b, a).flatten(1), [weakref.ref(x) for x in (a, b)]
    del a, b
    use.settle({*layer.parameters()}, 5, torch.float32)
    assert [x() for x in held] == [None, None]
    weight, _ = use.parts({*layer.parameters()}, 5, torch.float32)
    torch.testing.assert_close(weight.formed(), want)
