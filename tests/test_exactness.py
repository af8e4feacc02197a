"""P1: per-sample gradients of each layer with a rule of its own, over random shapes and options, against three others:
autograd on each record alone, torch.func, and Opacus, which is asked where it knows the layer.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import seen
from test_formulas import convolutions, norms
from torch import Tensor, nn

B = 4
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    positions = draw(st.lists(st.integers(1, 20), max_size=2))
    layer = nn.Linear(draw(st.integers(1, 20)), draw(st.integers(1, 20)), bias=draw(st.booleans()))
    return layer, torch.randn(B, *positions, layer.in_features, dtype=torch.float64)


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    rows = draw(st.integers(1, 9))  # few: a record uses one several times
    padding = draw(st.sampled_from([None, 0, -1]))
    layer = nn.Embedding(rows, draw(st.integers(1, 4)), padding_idx=padding)
    return layer, torch.randint(0, rows, (B, *draw(st.lists(st.integers(1, 6), max_size=2))))


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    if draw(st.booleans()):
        return draw(st.one_of(linears(), embeddings()))
    layer, shape = draw(st.one_of(convolutions(), norms()))
    return layer, torch.randn(B, *shape, dtype=torch.float64)


def one_by_one(layer: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    rows = [torch.autograd.grad(layer(a[i : i + 1]), [*layer.parameters()], b[i : i + 1]) for i in range(B)]
    return [torch.stack(gradients) for gradients in zip(*rows, strict=True)]


def by_torch_func(layer: nn.Module, a: Tensor, b: Tensor) -> list[Tensor]:
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def product(parameters: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, a.unsqueeze(0))
        return (y * b.unsqueeze(0)).sum()

    return [*torch.func.vmap(torch.func.grad(product), in_dims=(None, 0, 0))(parameters, a, b).values()]


@pytest.mark.filterwarnings("ignore:Using padding")
@settings(max_examples=120, deadline=None)
@given(layers(), st.sampled_from([torch.float64, torch.float32]))
def test_against_autograd_and_torch_func(made: tuple[nn.Module, Tensor], dtype: torch.dtype) -> None:
    layer, a = made[0].to(dtype), made[1] if made[1].dtype == torch.int64 else made[1].to(dtype)
    if not [*layer.parameters()]:
        return
    b = torch.randn_like(layer(a))
    want = one_by_one(copy.deepcopy(layer).double(), a if a.dtype == torch.int64 else a.double(), b.double())
    peer = by_torch_func(copy.deepcopy(layer), a, b)
    found, _ = seen(layer, b, a)
    for g, loop, func in zip(found.values(), want, peer, strict=True):
        size = max(1.0, loop.abs().max().item())
        torch.testing.assert_close(g.double(), loop, rtol=0.0, atol=TOLERANCE[dtype] * size)
        torch.testing.assert_close(g, func, rtol=0.0, atol=2 * TOLERANCE[dtype] * size)


@pytest.mark.filterwarnings("ignore:Using padding")
@settings(max_examples=60, deadline=None)
@given(layers())
def test_against_opacus(made: tuple[nn.Module, Tensor]) -> None:
    opacus = pytest.importorskip("opacus")
    layer, a = made
    layer = layer.double()
    known = opacus.GradSampleModule.GRAD_SAMPLERS
    options = getattr(layer, "padding_mode", "zeros"), getattr(layer, "padding", 0)
    if type(layer) not in known or options[0] != "zeros" or options[1] in ("same", "valid"):
        return  # its convolutions pad with zeros, by numbers
    if getattr(layer, "padding_idx", None) is not None:
        return  # which it does not leave out
    if isinstance(layer, nn.LayerNorm) and layer.bias is None:
        return  # it asks the bias
    b = torch.randn_like(layer(a))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = opacus.GradSampleModule(copy.deepcopy(layer), loss_reduction="sum")
        theirs(a).backward(b)
    found, _ = seen(layer, b, a)
    for g, p in zip(found.values(), theirs.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad_sample.view_as(g), rtol=1e-9, atol=1e-9)
