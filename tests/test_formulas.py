"""Layers whose per-sample gradients have a formula, against autograd on each record alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loops import private
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastdp
from fastdp import native
from fastdp.errors import ArgumentError, PrivacyError
from fastdp.formulas import FORMULAS
from fastdp.rules import has_formula
from fastdp.uses import FormulaUse

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer, and the shape of a record: groups and outputs of less and more than a vector or two, weights of an
    output and positions of more than the kernel does at once."""
    n, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 17, 35]))
    few = [1, 2, 3]

    def each(values: st.SearchStrategy[int]) -> tuple[int, ...]:
        return tuple(draw(values) for _ in range(n))

    kernel, dilation = each(st.integers(1, 3)), each(st.integers(1, 2))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    stride = (1,) * n if same else each(st.integers(1, 3))
    padding = "same" if same else draw(st.sampled_from(["valid", each(st.integers(0, 2))]))
    channels, bias = groups * draw(st.sampled_from([*few, 12] if groups <= 3 else few)), draw(st.booleans())
    outputs = groups * draw(st.sampled_from([*few, 8, 17, 35] if groups <= 3 else few))
    options = {"padding": padding, "dilation": dilation, "groups": groups, "bias": bias, "padding_mode": mode}
    layer = CONVOLUTIONS[n](channels, outputs, kernel, stride, **options)
    return layer, (channels, *each(st.integers(5, 9)))


@st.composite
def norms(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    positions = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    if draw(st.booleans()):
        groups = draw(st.integers(1, 3))
        channels = groups * draw(st.integers(2, 3))
        return nn.GroupNorm(groups, channels, eps=draw(st.sampled_from([1e-5, 0.5]))), (channels, *positions)
    shape = tuple(draw(st.lists(st.integers(2, 3), min_size=1, max_size=2)))
    if draw(st.booleans()):
        return nn.RMSNorm(shape, eps=draw(st.sampled_from([None, 0.5]))), (*positions, *shape)
    return nn.LayerNorm(shape, bias=draw(st.booleans()), eps=draw(st.sampled_from([1e-5, 0.5]))), (*positions, *shape)


def one_by_one(layer: nn.Module, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    named = dict(layer.named_parameters())
    rows = [torch.autograd.grad(layer(a[i : i + 1]), [*named.values()], b[i : i + 1]) for i in range(len(a))]
    return {name: torch.stack(gradients) for name, gradients in zip(named, zip(*rows, strict=True), strict=True)}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=150, deadline=None)
@given(st.one_of(convolutions(), norms()), st.integers(1, 4), st.integers(0, 2**31))
def test_formulas_give_what_autograd_gives_one_by_one(
    of: tuple[nn.Module, tuple[int, ...]], rows: int, seed: int
) -> None:
    layer, shape = of[0].double(), of[1]
    torch.manual_seed(seed)
    for p in layer.parameters():
        nn.init.normal_(p)
    a = torch.randn(rows, *shape, dtype=torch.float64)
    b = torch.randn_like(layer(a))
    assert has_formula(layer)
    formula, _ = FORMULAS[type(layer)]
    want = one_by_one(layer, a, b)
    weight, bias = formula(layer, a, b, True, "bias" in want)
    for name, g in (("weight", weight), ("bias", bias)):
        assert (g is None) == (name not in want)
        if g is not None:
            torch.testing.assert_close(g.reshape(want[name].shape), want[name], rtol=1e-9, atol=1e-9)
    assert formula(layer, a, b, False, False) == (None, None)


# More weights of an output, and more positions, than the kernel does at once; the last one's lanes are groups.
LARGE: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(2, 3, 768, padding=300), (2, 900)),
    (nn.Conv2d(35, 20, 3, padding=(0, 1)), (35, 24, 50)),
    (nn.Conv2d(120, 6, 3, padding=1, groups=3), (120, 30, 31)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=100, deadline=None)
@example(LARGE[0], 2, 0)
@example(LARGE[1], 2, 0)
@example(LARGE[2], 2, 0)
@given(convolutions(), st.integers(0, 3), st.integers(0, 2**31))
def test_convolutions_of_float32_at_any_strides_and_threads(
    of: tuple[nn.Module, tuple[int, ...]], rows: int, seed: int
) -> None:
    """Against float64 of each record alone; and a hostile record changes no other's bits."""
    layer, shape = of
    torch.manual_seed(seed)
    # Of small integers: all sums are exact.
    a = torch.randint(-4, 5, (rows, *shape[1:], shape[0])).float().movedim(-1, 1)
    b = torch.randint(-4, 5, layer(a).movedim(1, -1).shape).float().movedim(-1, 1)
    formula, _ = FORMULAS[type(layer)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weight, bias = formula(layer, a, b, True, True)
            want = one_by_one(layer.double(), a.double(), b.double()) if rows else {}
            layer.float()
            assert weight.shape == (rows, *layer.weight.shape)
            for name, g in want.items():
                assert torch.equal((weight if name == "weight" else bias).double(), g)
            if rows:
                for hostile in (math.nan, math.inf):
                    x, y = a.clone(), b.clone()
                    x[0], y[0] = hostile, hostile
                    assert torch.equal(formula(layer, x, y, True, False)[0][1:], weight[1:])
    finally:
        torch.set_num_threads(before)


def test_convolutions_at_each_instruction_set(at_isa) -> None:
    names = (
        "test_convolutions_of_float32_at_any_strides_and_threads",
        "test_formulas_give_what_autograd_gives_one_by_one",
    )
    calls = "".join(f"import test_formulas; test_formulas.{name}()\n" for name in names)
    assert at_isa(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{calls}print('right')") == "right\n"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (r"a.stride\(\)", {"a": torch.zeros(2, 4, 5, 6).transpose(2, 3)}),
        (r"b.stride\(\)", {"b": torch.zeros(2, 6, 3, 6)[..., ::2]}),
        (r"out.stride\(\)", {"out": torch.zeros(2, 6, 2, 2, 6)[..., ::2]}),
        ("b", {"b": torch.zeros(2, 6, 4, 4)}),
        ("b", {"b": torch.zeros(2, 6, 3, 4, dtype=torch.float64)}),
        ("out", {"out": torch.zeros(3, 6, 2, 2, 3)}),
        ("a.dtype", {"a": torch.zeros(2, 4, 6, 5, dtype=torch.bfloat16)}),
        ("groups", {"groups": 1}),
        ("groups", {"groups": 0}),
        ("stride", {"stride": (0, 1)}),
        ("padding", {"padding": (1,)}),
        ("padding", {"padding": (-1, 0)}),
        ("dilation", {"dilation": (1, 0)}),
        ("kernel", {"dilation": (6, 1)}),
    ],
)
def test_what_would_be_read_beyond_its_end_is_refused(name: str, change: dict[str, Any]) -> None:
    fitting = {"a": torch.zeros(2, 4, 6, 5), "b": torch.zeros(2, 6, 3, 3), "out": torch.zeros(2, 6, 2, 2, 3)}
    options = {"groups": 2, "stride": (2, 1), "padding": (0, 0), "dilation": (1, 1)}
    native.convolution_gradients(**fitting | options)
    with pytest.raises(ArgumentError, match=rf"^{name}="):
        native.convolution_gradients(**fitting | options | change)


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "Conv1d": (lambda: nn.Conv1d(2, 3, 2), (2, 5)),
    "Conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="reflect"), (2, 5, 4)),
    "Conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 2, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "GroupNorm of [B, C]": (lambda: nn.GroupNorm(2, 4), (4,)),
    "LayerNorm": (lambda: nn.LayerNorm(3), (2, 3)),
    "RMSNorm": (lambda: nn.RMSNorm(3), (2, 3)),
}


def step(layer: nn.Module, records: Tensor, c: float, calls: int) -> dict[str, Tensor]:
    """What a step of SGD without noise adds to the parameters, of a loss that is the sum of squares."""
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    rows = len(records)
    _, layer, optimizer, loader = private(
        layer, optimizer, TensorDataset(records), rows, max_grad_norm=c, loss_reduction="sum", poisson_sampling=False
    )
    (x,) = next(iter(loader))
    sum((layer(x * (i + 1)).square() / (i + 1)).sum() for i in range(calls)).backward()
    optimizer.step()
    return {name: (before[name] - p.detach()) * rows for name, p in layer.named_parameters()}


@pytest.mark.parametrize("calls", [1, 2], ids=["called once", "called twice"])
@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_the_sum_of_clipped_gradients(name: str, frozen: str | None, calls: int) -> None:
    """One call or two of the layer, and parameters that are not trained; one record is NaN, and left out."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, records, c = make().double(), torch.randn(6, *shape, dtype=torch.float64), 2.0
    records[4] = math.nan
    trained = {key: p for key, p in layer.named_parameters() if key != frozen}
    for key, p in layer.named_parameters():
        nn.init.normal_(p)
        p.requires_grad_(key in trained)
    if not trained:
        return
    want = {key: torch.zeros_like(p) for key, p in trained.items()}
    for i in (0, 1, 2, 3, 5):
        x = records[i : i + 1]
        loss = sum((layer(x * (i + 1)).square() / (i + 1)).sum() for i in range(calls))
        gradients = torch.autograd.grad(loss, [*trained.values()])
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for key, g in zip(trained, gradients, strict=True):
            want[key] += g * min(1.0, c / norm)
    found = step(layer, records, c, calls)
    for key, p in found.items():
        expected = want.get(key, torch.zeros_like(p))
        torch.testing.assert_close(p, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_an_input_without_a_dimension_of_records_is_refused(name: str) -> None:
    """One record of C channels where C records are: its channels would be taken for records."""
    make, shape = LAYERS[name]
    layer = make()
    a = torch.randn(shape if name.startswith("Conv") else shape[-1:])
    use = FormulaUse("layer 'x'", 0, [], layer, a)
    use.b = a
    with pytest.raises(PrivacyError, match="layer 'x': the first dimension of its input is not the batch's records"):
        use.parts(set(layer.parameters()), len(a), torch.float32)


def test_a_subclass_and_a_layer_with_its_own_forward_have_no_formula() -> None:
    class Scaled(nn.Conv1d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    other = nn.LayerNorm(2)
    other.forward = lambda x: 2 * nn.LayerNorm.forward(other, x)  # type: ignore[method-assign]
    plain = nn.LayerNorm(2)
    assert [has_formula(m) for m in (Scaled(1, 1, 1), other, plain)] == [False, False, True]
    assert "per-sample gradients from" in str(fastdp.validate(plain)[0])


class Tokens(nn.Module):
    """Tokens [B, T] into a table, and what may happen to that."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(7, 3, padding_idx=2 if how == "padding" else None)
        self.out = nn.Linear(3, 7)
        if how == "tied":
            self.out.weight = self.table.weight
        self.table.weight.requires_grad_(how != "frozen")

    def forward(self, x: Tensor) -> Tensor:
        e = self.table(x) if self.how != "one token" else self.table(x[:, 0]).unsqueeze(1)
        if self.how == "twice":
            e = torch.cat([e, self.table(x.flip(1)[:, :2])], 1)
        return self.out(e.cumsum(1).tanh()).flatten(1)


@pytest.mark.parametrize("pieces", [None, 4])
@pytest.mark.parametrize("how", ["plain", "padding", "twice", "tied", "one token", "frozen"])
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_embeddings_are_clipped_as_dense_gradients_are(how: str, pieces: int | None, seed: int) -> None:
    """Tokens come several times in a record; a batch of one piece and of several."""
    torch.manual_seed(seed)
    model, c, rows = Tokens(how).double(), 0.05, 10
    x = torch.randint(0, 7, (rows, 5))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    want = {name: torch.zeros_like(p) for name, p in trained.items()}
    for i in range(rows):
        loss = model(x[i : i + 1]).square().sum()
        gradients = torch.autograd.grad(loss, [*trained.values()])
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        for name, g in zip(trained, gradients, strict=True):
            want[name] += g * min(1.0, c / norm)
    before = {name: p.detach().clone() for name, p in trained.items()}
    _, model, optimizer, loader = private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        TensorDataset(x),
        rows,
        max_grad_norm=c,
        loss_reduction="sum",
        poisson_sampling=False,
        max_physical_batch_size=pieces,
    )
    for (tokens,) in loader:
        optimizer.zero_grad()
        model(tokens).square().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if name in want:
            torch.testing.assert_close((before[name] - p.detach()) * rows, want[name], rtol=1e-9, atol=1e-12)


def test_embeddings_of_hostile_records_are_left_out() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 2)

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return self.table(x).sum(1) * w.unsqueeze(1)

    w = torch.tensor([1.0, 1.0, math.nan, math.inf, 1.0])
    model = Weighted()
    before = model.table.weight.detach().clone()
    _, model, optimizer, loader = private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        TensorDataset(torch.arange(5, dtype=torch.int32).repeat(3, 1).T, w),  # as codes of prepared tables are
        5,
        max_grad_norm=0.1,
        loss_reduction="sum",
        poisson_sampling=False,
    )
    for x, w in loader:
        model(x, w).sum().backward()
        optimizer.step()
    found = (before - model.table.weight.detach()).norm(dim=1) * 5
    torch.testing.assert_close(found, torch.tensor([0.1, 0.1, 0.0, 0.0, 0.1]))


def test_a_gradient_that_is_expanded_is_packed_first() -> None:
    layer = nn.GroupNorm(2, 4)
    records = TensorDataset(torch.randn(6, 4))
    _, model, optimizer, loader = private(
        layer, torch.optim.SGD(layer.parameters(), lr=1.0), records, 6, loss_reduction="sum", poisson_sampling=False
    )
    for (x,) in loader:
        model(x).sum().backward()
        optimizer.step()
    assert bool((layer.bias < 0).all())
