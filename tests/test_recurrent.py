"""nn.LSTM, nn.GRU and nn.RNN: exact to P1 against a loop over single records, whatever the options are."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import private
from torch import Tensor, nn
from torch.nn.utils import prune, rnn
from torch.utils.data import TensorDataset

import fastdp
from fastdp import PrivacyError, recurrent
from fastdp.rules import is_recurrent

FEATURES = 3


@dataclasses.dataclass
class Options:
    kind: str = "LSTM"
    batch_first: bool = True
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj: int = 0
    hidden: int = 4
    states: str = "none"  # or "data", or "made" by a layer that is trained
    used: str = "y"  # of the outputs: "y", "h", "c", "all"
    inner: bool = False  # whether the input is made by a layer that is trained
    calls: int = 1
    frozen: int = -1  # which of its parameters is not trained


class Model(nn.Module):
    """x [B, T, 3] -> [B, ...], by the module in all the ways that options say."""

    def __init__(self, o: Options) -> None:
        super().__init__()
        self.o = o
        extra: dict[str, Any] = {"proj_size": o.proj} if o.proj else {}
        kind, extra = (nn.RNN, {"nonlinearity": "relu"}) if o.kind == "RELU" else (getattr(nn, o.kind), extra)
        shape = {"num_layers": o.layers, "bidirectional": o.bidirectional, "bias": o.bias, "batch_first": o.batch_first}
        self.rnn = kind(FEATURES, o.hidden, **shape, **extra)
        ways = o.layers * (1 + o.bidirectional)
        self.sizes = [(ways, o.proj or o.hidden), (ways, o.hidden)][: 1 + (o.kind == "LSTM")]
        self.inner = nn.Linear(FEATURES, FEATURES)
        self.makers = nn.ModuleList(nn.Linear(FEATURES, a * b) for a, b in self.sizes)
        for module in (self.inner,) * (not o.inner) + (self.makers,) * (o.states != "made"):
            module.requires_grad_(False)
        for k, p in enumerate(self.rnn.parameters()):
            p.requires_grad_(k != o.frozen)

    def states(self, x: Tensor) -> Any:
        if self.o.states == "none":
            return None
        made = [m(x[:, 0]).view(len(x), *size).transpose(0, 1) for m, size in zip(self.makers, self.sizes, strict=True)]
        return tuple(made) if self.o.kind == "LSTM" else made[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x) if self.o.inner else x
        hx, found = self.states(x), []
        for call in range(self.o.calls):
            inputs = x * (1.0 + call)
            y, hx = self.rnn(inputs if self.o.batch_first else inputs.transpose(0, 1), hx)
            y = y if self.o.batch_first else y.transpose(0, 1)
            h, c = hx if self.o.kind == "LSTM" else (hx, hx)
            kinds = {"y": [y], "h": [h.transpose(0, 1)], "c": [c.transpose(0, 1)]}
            kinds["all"] = kinds["y"] + [2 * h.transpose(0, 1)] + [c.transpose(0, 1).square()]
            found += [part.flatten(1) for part in kinds[self.o.used]]
        return torch.cat(found, 1)


@st.composite
def options(draw: st.DrawFn) -> Options:
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN", "RELU"]))
    return Options(
        kind=kind,
        layers=draw(st.integers(1, 3)),
        proj=draw(st.integers(0, 3)) if kind == "LSTM" else 0,
        hidden=draw(st.integers(1, 5)) if kind != "LSTM" else draw(st.integers(4, 6)),
        states=draw(st.sampled_from(["none", "data", "made"])),
        used=draw(st.sampled_from(["y", "h", "c", "all"])),
        calls=draw(st.integers(1, 2)),
        frozen=draw(st.integers(-1, 6)),
        **{key: draw(st.booleans()) for key in ("batch_first", "bidirectional", "bias", "inner")},
    )


def objective(out: Tensor) -> Tensor:
    """Of each record [B]; of no two outputs alike."""
    return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=out.dtype)).sin().sum(1)


def expected(model: nn.Module, records: Tensor, c: float, keep: list[int]) -> dict[str, Tensor]:
    """Each record's gradient by torch, clipped to c, and their sum."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for i in keep:
        loss = objective(model(records[i : i + 1])).sum()
        found = torch.autograd.grad(loss, [*trained.values()], allow_unused=True)
        gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, trained.values(), strict=True)]
        factor = min(1.0, c / max(1e-300, math.sqrt(sum(g.square().sum().item() for g in gradients))))
        for name, g in zip(trained, gradients, strict=True):
            total[name] += factor * g
    return total


def stepped(model: nn.Module, records: Tensor, c: float, **how: Any) -> dict[str, Tensor]:
    """What a step of SGD without noise subtracts from the parameters, times the number of records."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, rows = torch.optim.SGD(model.parameters(), lr=1.0), len(records)
    how = {"max_grad_norm": c, "loss_reduction": "sum", "poisson_sampling": False, **how}
    _, model, optimizer, loader = private(model, optimizer, TensorDataset(records), rows, **how)
    for (x,) in loader:
        objective(model(x)).sum().backward()
        optimizer.step()
    return {name: (before[name] - p.detach()) * rows for name, p in model.named_parameters() if p.requires_grad}


def check(o: Options, rows: int, times: int, seed: int, dtype: torch.dtype = torch.float64, **how: Any) -> None:
    torch.manual_seed(seed)
    model = Model(o).double()
    records = torch.randn(rows, times, FEATURES, dtype=torch.float64)
    want = expected(copy.deepcopy(model), records, 1.0, list(range(rows)))
    found = stepped(model.to(dtype), records.to(dtype), 1.0, **how)
    limit = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    size = max((g.abs().max().item() for g in want.values()), default=0.0)
    for name, g in want.items():
        assert (found[name] - g).abs().max() <= limit * max(size, 1e-6), name


@settings(max_examples=120, deadline=None)
@given(options(), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_a_step_is_the_sum_of_clipped_gradients(o: Options, rows: int, times: int, seed: int) -> None:
    check(o, rows, times, seed)


@settings(max_examples=30, deadline=None)
@given(options(), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_in_float32(o: Options, rows: int, times: int, seed: int) -> None:
    check(o, rows, times, seed, torch.float32)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_in_pieces(kind: str) -> None:
    check(Options(kind, inner=True, used="all"), 7, 3, 0, max_physical_batch_size=3)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "RELU"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_long_sequences_in_float32(kind: str, batch_first: bool) -> None:
    """Long enough for norms from products, and for rounding to add up."""
    check(Options(kind, batch_first, layers=2, hidden=40), 3, 60, 0, torch.float32)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "RELU"])
@pytest.mark.parametrize("how", [{}, {"max_physical_batch_size": 3}])
def test_wide_layers(kind: str, how: dict[str, Any]) -> None:
    """Too wide to be formed: the norms of both weights from one product, and of one if the other is frozen."""
    for frozen in (-1, 0, 1, 4, 5) if not how else (-1,):
        check(Options(kind, layers=2, hidden=40, inner=True, frozen=frozen), 7, 3, 0, **how)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "RELU"])
@pytest.mark.parametrize("times", [1, 2, 9])
def test_both_weights_may_be_one(kind: str, times: int) -> None:
    torch.manual_seed(0)
    model, records = Model(Options(kind, hidden=FEATURES)).double(), torch.randn(5, times, FEATURES).double()
    model.rnn.weight_hh_l0 = model.rnn.weight_ih_l0
    want = expected(copy.deepcopy(model), records, 1.0, list(range(5)))
    found = stepped(model, records, 1.0)
    for name, g in want.items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "RELU"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30, -1e30])
def test_hostile_records_do_not_reach_others(kind: str, value: float) -> None:
    torch.manual_seed(0)
    o = Options(kind, layers=2, inner=True)
    model, records = Model(o), torch.randn(5, 4, FEATURES)
    records[2, 1] = value
    others = [0, 1, 3, 4]
    want = expected(copy.deepcopy(model), records, 1.0, others)
    found = stepped(model, records, 1.0)
    rest = math.sqrt(sum((found[n] - g).square().sum().item() for n, g in want.items()))
    assert rest <= 1.0 + 1e-4 and (rest <= 1e-4 or math.isfinite(value))


@pytest.mark.filterwarnings("ignore")  # its own
def test_norms_are_those_of_opacus() -> None:
    layers = pytest.importorskip("opacus.layers")
    sampled = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    model, records = Model(Options(layers=2, bidirectional=True)).double(), torch.randn(4, 3, FEATURES).double()
    other = layers.DPLSTM(FEATURES, 4, 2, batch_first=True, bidirectional=True).double()
    other.load_state_dict(model.rnn.state_dict())
    wrapped = sampled.GradSampleModule(other, batch_first=True, loss_reduction="sum")
    objective(wrapped(records)[0].flatten(1)).sum().backward()
    found = {name.removeprefix("_module."): p.grad_sample for name, p in wrapped.named_parameters()}
    norms = sum(g.flatten(1).square().sum(1) for g in found.values()).sqrt()
    factors = (1.0 / norms).clamp_max(1.0)
    step = stepped(model, records, 1.0)
    for name, g in model.rnn.named_parameters():
        key = name if name in found else next(k for k in found if _same(k, name))
        want = torch.einsum("b,b...->...", factors, found[key])
        torch.testing.assert_close(step[f"rnn.{name}"], want.view_as(g), rtol=1e-9, atol=1e-12)


def _same(theirs: str, ours: str) -> bool:
    """`l0_reverse.ih.weight` is weight_ih_l0_reverse."""
    parts = set(ours.split("_", 2)[:2]) | {ours.split("_", 2)[2]}
    return set(theirs.split(".")) == parts


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_without_gradients_and_in_copies_it_is_torch_s_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = getattr(nn, kind)(3, 4, batch_first=True), torch.randn(6, 5, 3)
    want = layer(x)[0]
    _, layer, _, _ = private(layer, torch.optim.SGD(layer.parameters(), lr=1.0), TensorDataset(x), 3)
    layer.eval()
    torch.testing.assert_close(layer(x)[0], want)
    monkeypatch.setattr(recurrent.Layers, "forward", None)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], want)
    assert torch.equal(copy.deepcopy(layer)(x)[0], want)
    copied = pickle.loads(pickle.dumps(layer))
    assert torch.equal(copied(x)[0], want)
    copied(x)[0].sum().backward()
    assert copied.weight_ih_l0.grad is not None


class Loop:
    """A model that is private, and its first batch."""

    def __init__(self, model: nn.Module, rows: int = 6, times: int = 4) -> None:
        records = TensorDataset(torch.randn(rows, times, FEATURES))
        how = {"loss_reduction": "sum", "poisson_sampling": False}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _, self.model, self.optimizer, loader = private(model, optimizer, records, rows, **how)
        (self.x,) = next(iter(loader))


def test_the_root_may_be_recurrent_itself() -> None:
    loop = Loop(nn.GRU(FEATURES, 4, batch_first=True))
    before = loop.model.weight_hh_l0.detach().clone()
    y, h = loop.model(loop.x)
    (y.sum() + h.sum()).backward()
    loop.optimizer.step()
    assert not torch.equal(before, loop.model.weight_hh_l0)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_states_and_their_gradients_need_not_be_packed(kind: str) -> None:
    class Apart(Model):
        def states(self, x: Tensor) -> Any:
            made = [
                m(x[:, 0]).view(-1, n, ways).permute(2, 0, 1)
                for m, (ways, n) in zip(self.makers, self.sizes, strict=True)
            ]
            return tuple(made) if self.o.kind == "LSTM" else made[0]

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([s.permute(1, 2, 0).reshape(len(x), -1) for s in _list(self.rnn(x, self.states(x))[1])], 1)

    def _list(states: Any) -> list[Tensor]:
        return list(states) if isinstance(states, tuple) else [states]

    torch.manual_seed(0)
    model, records = Apart(Options(kind, layers=2, states="made")).double(), torch.randn(3, 4, FEATURES).double()
    want = expected(copy.deepcopy(model), records, 1.0, [0, 1, 2])
    found = stepped(model, records, 1.0)
    for name, g in want.items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


def test_outputs_may_be_changed_in_place() -> None:
    class InPlace(Model):
        def forward(self, x: Tensor) -> Tensor:
            y, (h, _) = self.rnn(x)
            return torch.cat([y.mul_(2).relu_().flatten(1), h[0].mul_(3)], 1)

    torch.manual_seed(0)
    model, records = InPlace(Options(used="y")).double(), torch.randn(3, 4, FEATURES).double()

    class Beside(Model):
        def forward(self, x: Tensor) -> Tensor:
            y, (h, _) = self.rnn(x)
            return torch.cat([(y * 2).relu().flatten(1), h[0] * 3], 1)

    beside = Beside(model.o).double()
    beside.load_state_dict(model.state_dict())
    want = expected(beside, records, 1.0, [0, 1, 2])
    found = stepped(model, records, 1.0)
    for name, g in want.items():
        torch.testing.assert_close(found[name], g, rtol=1e-9, atol=1e-12)


REFUSED = {
    "packed": (
        lambda m, x: m.rnn(rnn.pack_padded_sequence(x, [4] * len(x), batch_first=True))[0].data.sum(),
        "layer 'rnn': a PackedSequence: must be padded",
    ),
    "weights changed": (lambda m, x: _changed(m, m.rnn(x)[0]).sum(), "layer 'rnn': its input or output gradient was"),
    "other way": (lambda m, x: (m.rnn(x)[0].sum() + (x[:, 0] @ m.rnn.weight_ih_l0.T).sum()), "weight_ih_l0: autograd"),
    "time first": (lambda m, x: m.rnn(x.transpose(0, 1))[0].sum(), "layer 'rnn': .*record"),
    "one record": (lambda m, x: m.rnn(x[0])[0].sum(), "layer 'rnn': .*record"),
    "coupled": (lambda m, x: m.rnn(x - x.mean(0))[0].sum(), "layer 'rnn': its input for a record depends"),
    "coupled loss": (lambda m, x: m.rnn(x)[0].sum((1, 2)).softmax(0)[0], "layer 'rnn': a record's gradient depends"),
    "coupled states": (lambda m, x: m.rnn(x, (x[None, :, 0, :1].cumsum(1).expand(1, -1, 4).contiguous(),) * 2)[0].sum(),
                       "layer 'rnn': its input for a record depends"),
}  # fmt: skip


def _changed(m: nn.Module, y: Tensor) -> Tensor:
    m.rnn.weight_hh_l0.data.mul_(1.0)
    with torch.no_grad():
        m.rnn.weight_hh_l0.mul_(2.0)
    return y


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    of, message = REFUSED[name]

    class Strange(Model):
        def forward(self, x: Tensor) -> Tensor:
            return of(self, x)

    loop = Loop(Strange(Options()))
    with pytest.raises(PrivacyError, match=message) as error:
        loop.model(loop.x).backward()
        loop.optimizer.step()
    assert "\n" not in str(error.value)


def test_a_second_backward_is_refused() -> None:
    for again in ("create_graph", "at once", "after zero_grad"):
        loop = Loop(Model(Options()))
        loss = objective(loop.model(loop.x)).sum()
        with pytest.raises(PrivacyError, match=r"layer 'rnn': .*(second backward|create_graph)"):
            loss.backward(retain_graph=True, create_graph=again == "create_graph")
            if again == "after zero_grad":
                loop.optimizer.zero_grad()
            loss.backward()


def test_after_an_exception_the_module_is_as_before() -> None:
    loop = Loop(Model(Options()))
    with pytest.raises(RuntimeError):
        loop.model.rnn(torch.zeros(2, 3, FEATURES + 1))
    assert all(p.requires_grad for p in loop.model.rnn.parameters())
    assert torch.overrides._get_current_function_mode() is None
    other = nn.LSTM(FEATURES, 4)
    other(torch.zeros(2, 3, FEATURES))[0].sum().backward()
    assert other.weight_hh_l0.grad is not None


def test_which_modules_have_the_rule() -> None:
    class Sub(nn.LSTM):
        pass

    own = nn.GRU(2, 2)
    own.forward = lambda x: nn.GRU.forward(own, x)  # type: ignore[method-assign]
    pruned = prune.identity(nn.RNN(2, 2), "weight_hh_l0")
    assert [is_recurrent(m) for m in (nn.RNN(2, 2), Sub(2, 2), own, pruned, nn.LSTMCell(2, 2))] == [True] + [False] * 4
    assert "gradients of the gates" in str(fastdp.validate(nn.LSTM(2, 2, proj_size=1))[0])
