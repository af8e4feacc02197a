"""bfloat16, by torch.autocast and as the parameters' type: exact to its own rounding, and clipped in float32; float16 is
refused.

bfloat16 keeps 8 bits: an operation's result is off by up to 2^-9 of itself. The loop over single samples rounds as the
batch does, but where sums come in another order, so each gradient may be off by the rounding of what it is a product
of: input, output gradient, and the sum, which the loop rounds and fastdp does not, 2^-8 each to be safe.
"""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import MODELS, clipped, data, private, seen
from test_attention import Attends, attending
from test_exactness import layers, one_by_one
from test_modules import EXACT, LOOPED, REFUSED, WIDTH
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fastdp import PrivacyError, reference
from fastdp.plan import CLIPPINGS

PRODUCT = 3 * 2.0**-8
KINDS = ["autocast", "model", "mixed"]


def prepared(module: nn.Module, kind: str) -> nn.Module:
    """The module with parameters as `kind` has them: float32, bfloat16, or some of each."""
    module = module.float() if kind == "autocast" else module.bfloat16()
    if kind == "mixed":
        for m in list(module.modules())[::2]:
            for p in m.parameters(recurse=False):
                p.data = p.data.float()
    return module


def autocast(kind: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=kind != "model")


def floats(x: Tensor, kind: str) -> Tensor:
    return x if not x.is_floating_point() else x.bfloat16() if kind == "model" else x.float()


# ---- per-sample gradients


@pytest.mark.filterwarnings("ignore:Using padding", "ignore:Mismatch dtype")
@settings(max_examples=120, deadline=None)
@given(layers(), st.sampled_from(["autocast", "model"]))
def test_per_sample_gradients_of_layers(made: tuple[nn.Module, Tensor], kind: str) -> None:
    """Against autograd on each record, in float64, from what the arithmetic had: inputs and weights as rounded.

    Normalisations round nothing but b here; elsewhere the input is rounded, the output gradient is given as bfloat16,
    and products and sums of float32 add nothing to speak of: 1e-4 of the largest. Input and weight come rounded to the
    oracle, so this is sharper than bfloat16: it tells whether a was rounded where the layer rounded it.
    """
    layer, a = prepared(made[0], kind), floats(made[1], kind)
    if not [*layer.parameters()]:
        return
    with autocast(kind), torch.no_grad():
        y = layer(a)
    b = torch.randn_like(y)
    rounded = a.bfloat16() if a.is_floating_point() and y.dtype == torch.bfloat16 else a
    exact = rounded.double() if rounded.is_floating_point() else rounded
    want = one_by_one(copy.deepcopy(layer).double(), exact, b.double())
    found, _ = seen(layer, b, a, autocast=kind == "autocast")
    for g, loop in zip(found.values(), want, strict=True):
        size = max(1.0, loop.abs().max().item())
        torch.testing.assert_close(g.double(), loop, rtol=0.0, atol=1e-4 * size)


@settings(max_examples=40, deadline=None)
@given(attending(), st.sampled_from(["autocast", "model"]))
def test_per_sample_gradients_of_attention(made: tuple[Attends, tuple[Tensor, ...]], kind: str) -> None:
    """Against the loop in bfloat16, through softmax and two products: 16 roundings of the largest."""
    module, inputs = prepared(made[0], kind), [floats(x, kind) for x in made[1]]
    if not any(p.requires_grad for p in module.parameters()):
        return
    alone = copy.deepcopy(module)
    with autocast(kind), torch.no_grad():
        b = torch.randn_like(module(*inputs))
    found, _ = seen(module, b, *inputs, autocast=kind == "autocast")
    pairs = [(found[p], q) for p, q in zip(module.parameters(), alone.parameters(), strict=True) if p.requires_grad]
    for i in range(len(b)):
        with autocast(kind):
            y = alone(*(x[i : i + 1] for x in inputs))
        grads = torch.autograd.grad(y, [q for _, q in pairs], b[i : i + 1], allow_unused=True)
        size = max(1.0, *(g.abs().max().item() for g in grads if g is not None))
        for (mine, _), g in zip(pairs, grads, strict=True):
            want = torch.zeros_like(mine[i]) if g is None else g.float()
            torch.testing.assert_close(mine[i], want, rtol=0.0, atol=16 * 2.0**-8 * size)


# ---- whole steps of the engine


def oracle_sum(module: nn.Module, kind: str, x: Tensor, y: Tensor, c: float, clipping: str) -> list[Tensor]:
    def loss(out: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(out.float(), labels)

    with autocast(kind):
        gradients = reference.per_sample_gradients(module, loss, x, y)
    return clipped(module, gradients, c, clipping)


def step_and_compare(module: nn.Module, kind: str, clipping: str = "flat", piece: int | None = None) -> None:
    """One step's sum of clipped gradients beside the loop's. Each record's gradient comes through at most some ten
    roundings, of which those after the last sum are fastdp's only difference: 2^-4 of the largest element."""
    module = prepared(nn.Sequential(module, nn.Linear(WIDTH, 3)), kind)
    twin = copy.deepcopy(module)
    records = TensorDataset(*(floats(x, kind) for x in data(24).tensors))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    how: dict[str, Any] = {"max_grad_norm": 0.7, "clipping": clipping, "max_physical_batch_size": piece}
    _, module, optimizer, loader = private(module, optimizer, records, 8, poisson_sampling=False, **how)
    xs, ys = [], []
    for x, y in loader:
        optimizer.zero_grad()
        with autocast(kind):
            loss = F.cross_entropy(module(x).float(), y)
        loss.backward()
        optimizer.step()
        xs.append(torch.as_tensor(x).as_subclass(Tensor))
        ys.append(torch.as_tensor(y).as_subclass(Tensor))
        if optimizer.steps:
            break
    want = oracle_sum(twin, kind, torch.cat(xs), torch.cat(ys), 0.7, clipping)
    assert optimizer.gradient.flat.dtype == torch.float32
    size = max(g.abs().max().item() for g in want)
    divided = 1 if kind == "autocast" else 8  # by the batch size, where torch's optimizer took the step
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    for (name, p), g in zip(trained, want, strict=True):
        mine = optimizer.gradient.views[p].double() * divided
        assert (mine - g).abs().max() <= 2.0**-4 * size, name


# Not in bfloat16: torch has no kernel, or no gradient, of its own.
UNKNOWN = {"autocast": {"LSTM", "LSTM_2_layers"}, "model": set(), "mixed": set()}


@pytest.mark.parametrize("kind", ["autocast", "model"])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:Mismatch dtype")
def test_any_module(name: str, kind: str) -> None:
    if name in UNKNOWN[kind]:
        pytest.skip("torch cannot")
    with warnings.catch_warnings():
        if name in LOOPED:
            warnings.filterwarnings("ignore", "fastdp: .* is run in a loop")
        step_and_compare(EXACT[name](), kind)
