"""bfloat16, by torch.autocast and as the parameters' type: exact to its own rounding, and clipped in float32.

float16 is refused.

bfloat16 keeps 8 bits: an operation's result is off by up to 2^-9 of itself. The loop over single samples rounds as the
batch does, but where sums come in another order, so each gradient may be off by the rounding of what it is a product
of: input, output gradient, and the sum, which the loop rounds and fastdp does not, 2^-8 each at most.
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
from test_modules import EXACT, LOOPED, WIDTH
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
    """Their sum against autograd's own gradient of the batch, which rounds each sum once, of inputs and gradients
    of outputs that are the same to the bit. (test_any_module has the loop over records.)"""
    module, inputs = prepared(made[0], kind), [floats(x, kind) for x in made[1]]
    if not any(p.requires_grad for p in module.parameters()):
        return
    alone = copy.deepcopy(module)
    with autocast(kind):
        y = alone(*inputs)
    b = torch.randn_like(y)
    found, _ = seen(module, b, *inputs, autocast=kind == "autocast")
    pairs = [(found[p], q) for p, q in zip(module.parameters(), alone.parameters(), strict=True) if p.requires_grad]
    sums = torch.autograd.grad(y, [q for _, q in pairs], b, allow_unused=True)
    for (mine, _), g in zip(pairs, sums, strict=True):
        want = torch.zeros_like(mine[0]) if g is None else g.float()
        size = mine.abs().sum(0).max().item()
        torch.testing.assert_close(mine.sum(0), want, rtol=0.0, atol=PRODUCT * size + 1e-6)


# ---- whole steps of the engine


def oracle_sum(module: nn.Module, kind: str, x: Tensor, y: Tensor, c: float, clipping: str) -> list[Tensor]:
    def loss(out: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(out.float(), labels)

    with autocast(kind):
        gradients = reference.per_sample_gradients(module, loss, x, y)
    return clipped(module, gradients, c, clipping)


def step_and_compare(module: nn.Module, kind: str, clipping: str = "flat", piece: int | None = None) -> None:
    """One step's sum of clipped gradients beside the loop's, to 2^-4 of the largest element: the batch's sums may come
    in another order than a record's, and each of some ten layers rounds to 2^-8."""
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


@pytest.mark.parametrize("piece", [None, 3])
@pytest.mark.parametrize("clipping", CLIPPINGS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["reused", "Tied", "MultiheadAttention", "Embedding", "Scale", "Outputs"])
def test_pieces_and_modes_of_clipping(name: str, kind: str, clipping: str, piece: int | None) -> None:
    module = nn.Sequential(MODELS[name](), nn.Linear(3, WIDTH)) if name in MODELS else EXACT[name]()
    step_and_compare(module, kind, clipping, piece)


@pytest.mark.parametrize("name", ["mlp", "reused", "sequences"])
def test_a_whole_step_within_autocast_sums_in_float32(name: str) -> None:
    """The backward and the step belong outside; where they are not, products of contributions are not rounded."""
    sums = []
    for inside in (False, True):
        torch.manual_seed(0)
        module = MODELS[name]()
        _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
        x, y = next(iter(loader))
        with autocast("autocast"):
            loss = F.cross_entropy(module(x), y)
            if inside:
                loss.backward()
                optimizer.step()
        if not inside:
            loss.backward()
            optimizer.step()
        sums.append(optimizer.gradient.flat.clone())
    torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("kind", ["model", "mixed"])
def test_the_optimizer_gets_what_was_noised_in_float32(make: type[torch.optim.Optimizer], kind: str) -> None:
    module = prepared(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), kind)
    got: list[Tensor] = []
    inner = make(module.parameters(), lr=0.1)
    inner.register_step_pre_hook(lambda *_: got.extend(p.grad.clone() for p in module.parameters()))
    records = TensorDataset(*(floats(x, kind) for x in data().tensors))
    _, module, optimizer, loader = private(module, inner, records, noise_multiplier=1e-2)
    x, y = next(iter(loader))
    with autocast(kind):
        loss = F.cross_entropy(module(x).float(), y)
    loss.backward()
    optimizer.step()
    for p, g in zip(module.parameters(), got, strict=True):
        noised = optimizer.gradient.views[p]
        assert noised.dtype == torch.float32 and g.dtype == p.dtype
        assert torch.equal(g, noised.to(p.dtype)) and not torch.equal(noised, noised.bfloat16().float())
        assert p.grad is None


# ---- P6


SIZES = [math.nan, math.inf, -math.inf, 3e38, -1e38, 1e20, 1e3, 1.0, 1e-3, 1e-30, 1e-38, 1e-40, 0.0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    name=st.sampled_from([*MODELS, "LayerNorm", "Conv1d", "Embedding", "Scale", "MultiheadAttention"]),
    kind=st.sampled_from(KINDS),
    clipping=st.sampled_from(CLIPPINGS),
    size=st.sampled_from(SIZES),
    places=st.integers(0, 6),
    c=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e6]),
    weights=st.sampled_from([1e-20, 1.0, 30.0]),
)
def test_a_record_adds_at_most_c(name, kind, clipping, size, places, c, weights) -> None:
    torch.manual_seed(0)
    module = MODELS[name]() if name in MODELS else EXACT[name]()
    module = prepared(module, kind)
    with torch.no_grad():
        for p in module.parameters():
            p *= weights
    x, y = data(1).tensors
    x[0, :places] = size
    _, module, optimizer, loader = private(
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        TensorDataset(floats(x, kind), y),
        1,
        max_grad_norm=c,
        clipping=clipping,
        poisson_sampling=False,
    )
    for inputs, labels in loader:
        with autocast(kind):
            loss = F.cross_entropy(module(inputs).float(), labels)
        loss.backward()
        optimizer.step()
    flat = optimizer.gradient.flat
    assert flat.dtype == torch.float32 and flat.isfinite().all()
    assert flat.double().norm().item() <= c


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_hostile_records_are_dropped_and_the_others_kept(kind: str, bad: float) -> None:
    sums = []
    for hostile in (True, False):
        torch.manual_seed(0)
        module = prepared(MODELS["reused"](), kind)
        x, y = data(8).tensors
        x[5] = bad
        keep = torch.arange(8) != 5
        x, y = (x, y) if hostile else (x[keep], y[keep])
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        _, module, optimizer, loader = private(
            module, optimizer, TensorDataset(floats(x, kind), y), len(x), poisson_sampling=False, loss_reduction="sum"
        )
        for inputs, labels in loader:
            with autocast(kind):
                loss = F.cross_entropy(module(inputs).float(), labels, reduction="sum")
            loss.backward()
            optimizer.step()
        sums.append(optimizer.gradient.flat * (len(x) if kind != "autocast" else 1))
    assert sums[0].isfinite().all() and sums[1].norm() > 0.1
    torch.testing.assert_close(*sums, rtol=2.0**-6, atol=2.0**-8)


# ---- coupled records, and training


class Deep(nn.Module):
    """Twelve layers, with normalisations, so that roundings add up."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(12)]
        self.layers = nn.Sequential(nn.Linear(6, 32), *blocks[:6], middle, *blocks[6:], nn.Linear(32, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Attending(nn.Module):
    """Softmax over the records, a small coupling for most of them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.t() / 10, dim=1) @ x


class Neighbour(nn.Module):
    """One column has something of the record before, in no direction of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] + 0.1 * x[:, 1:2].roll(1, 0), x[:, 1:]], 1)


def train(module: nn.Module, kind: str, steps: int, records: TensorDataset, loss=F.cross_entropy, **how: Any):
    """The module, and the loss of each step."""
    module = prepared(module, kind)
    x, y = records.tensors
    optimizer = torch.optim.AdamW(module.parameters(), lr=how.pop("lr", 1e-3))
    _, module, optimizer, loader = private(
        module, optimizer, TensorDataset(floats(x, kind), y), how.pop("batch", 30), **how
    )
    losses: list[float] = []
    while len(losses) < steps:
        for x, y in loader:
            optimizer.zero_grad()
            with autocast(kind):
                value = loss(module(x).float(), y)
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
            if len(losses) == steps:
                break
    return module, losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_no_coupling(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    train(Deep(nn.Tanh()), kind, 12, data(300))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("middle", [Centred(), Attending(), Neighbour()])
def test_coupled_modules_are_found(kind: str, middle: nn.Module) -> None:
    with pytest.raises(PrivacyError, match="its input for a record depends on the other records"):
        train(Deep(middle), kind, 1, data(300))


COUPLED = {
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 2.0])),
    "normaliser": lambda out, y: F.cross_entropy(out / out.std(), y),
    "number of records": lambda out, y: F.cross_entropy(out, y) / len(y) ** 0.5,
    "bfloat16 number of records": lambda out, y: F.cross_entropy(out, y) * torch.tensor(1 / len(y)).bfloat16(),
    "bfloat16 root": lambda out, y: F.cross_entropy(out, y) / torch.tensor(len(y) ** 0.5).bfloat16(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_losses_are_found(kind: str, name: str) -> None:
    with pytest.raises(PrivacyError, match=r"depends on the other records|number of records"):
        train(nn.Linear(6, 3), kind, 3, data(300), COUPLED[name])


@pytest.mark.parametrize("kind", KINDS)
def test_small_normalisers_are_found(kind: str) -> None:
    """They move all of a record's gradient by less than bfloat16 rounds one element."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.2, 1.2]))
    with pytest.raises(PrivacyError, match="depends on the other records"):
        train(nn.Linear(6, 3), kind, 1, data(1000), loss, batch=500)


def test_a_rounded_number_of_records_is_found_at_once() -> None:
    with pytest.raises(PrivacyError, match="the number of records in the batch"):
        train(nn.Linear(6, 3), "model", 1, data(300), COUPLED["bfloat16 number of records"])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6))
        self.types: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        self.types.append(y.dtype)
        return y


def test_what_is_run_again_is_run_under_the_same_autocast() -> None:
    module = Bare()
    types = module.types  # a list is not put back after a replay
    train(module, "autocast", 2, data(300))
    assert len(types) > 4 and set(types) == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_and_parameters_keep_their_type(kind: str) -> None:
    x = torch.randn(300, 6)
    records = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    module = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))
    types = [p.dtype for p in prepared(module, kind).parameters()]
    module, losses = train(module, kind, 60, records, noise_multiplier=0.6, max_grad_norm=1.0, lr=0.01)
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert [p.dtype for p in module.parameters()] == types


# ---- float16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(6, 3), "module: an input, output or autocast of torch.float16: must be bfloat16, float32"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)), r"layer '[01]': an input, output .* torch\.float16:"),
        (lambda: nn.PReLU(6), r"module: an input, output .* torch\.float16:"),
        (lambda: nn.Sequential(nn.Linear(6, 3), nn.PReLU(3)), r"layer '[01]': an input, output .* torch\.float16:"),
    ],
)
def test_autocast_to_float16_is_refused_by_name(make: Any, message: str) -> None:
    module = make()
    _, module, optimizer, loader = private(module, torch.optim.SGD(module.parameters(), lr=0.1), data())
    x, y = next(iter(loader))
    with pytest.raises(PrivacyError, match=message) as error:
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
    assert "float16" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler_is_refused(unscale: bool, loop) -> None:
    _, module, optimizer, loader = loop
    scaler = torch.amp.GradScaler("cpu")
    x, y = next(iter(loader))
    scaler.scale(F.cross_entropy(module(x), y)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(PrivacyError, match="GradScaler: a scaled loss is clipped at another norm"):
        scaler.step(optimizer)
    assert optimizer.steps == 0


def test_a_grad_scaler_that_is_off_is_none(loop) -> None:
    _, module, optimizer, loader = loop
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x, y = next(iter(loader))
    scaler.scale(F.cross_entropy(module(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.steps == 1
