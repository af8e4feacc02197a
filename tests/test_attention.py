"""nn.MultiheadAttention: the products that its projections are seen as, against autograd on each record alone."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import private, seen
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastdp
from fastdp import watch
from fastdp.attention import ProjectionUse
from fastdp.errors import PrivacyError
from fastdp.gradients import Norms
from fastdp.layers import Recorder
from fastdp.uses import products

LINEAR = F.linear
B = 4


class Attends(nn.Module):
    """Attention of sequences x [B, T, E] to what `how` names; in either layout, once or twice."""

    def __init__(self, how: str, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.how, self.call = how, call
        self.attention = nn.MultiheadAttention(**options)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        if not self.attention.batch_first:
            x, y, z = (t.transpose(0, 1) for t in (x, y, z))
        inputs = {"itself": [(x, x, x)], "another": [(x, y, y)], "two others": [(x, y, z)]}
        inputs["twice"] = [*inputs["itself"], *inputs["another"]]
        outputs = [self.attention(*of, **self.call)[0] for of in inputs[self.how]]
        out = torch.stack(outputs).sum(0)
        return out if self.attention.batch_first else out.transpose(0, 1)


@st.composite
def attending(draw: st.DrawFn) -> tuple[Attends, tuple[Tensor, Tensor, Tensor]]:
    how = draw(st.sampled_from(["itself", "another", "two others", "twice"]))
    heads = draw(st.integers(1, 3))
    width, length, other = heads * draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    options: dict[str, Any] = {"embed_dim": width, "num_heads": heads}
    options["bias"], options["batch_first"] = draw(st.booleans()), draw(st.booleans())
    options["add_zero_attn"] = draw(st.booleans())
    sizes = [width, width, width]
    if how == "two others" and draw(st.booleans()):
        sizes[1:] = options["kdim"], options["vdim"] = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    call: dict[str, Any] = {"need_weights": draw(st.booleans())}
    if how == "itself" and draw(st.booleans()):
        call["attn_mask"] = torch.ones(length, length, dtype=torch.bool).triu(1)
    x, y, z = (torch.randn(B, t, n, dtype=torch.float64) for t, n in zip((length, other, other), sizes, strict=True))
    module = Attends(how, call, **options).double()
    for p in module.parameters():
        nn.init.normal_(p)
        p.requires_grad_(draw(st.sampled_from([True, True, True, False])))
    return module, (x, y, z)


@settings(max_examples=150, deadline=None)
@given(attending())
def test_any_options(made: tuple[Attends, tuple[Tensor, Tensor, Tensor]]) -> None:
    module, inputs = made
    alone = copy.deepcopy(module)
    b = torch.randn(inputs[0].shape, dtype=torch.float64)
    found, uses = seen(module, b, *inputs)
    assert all(isinstance(use, ProjectionUse) for use in uses)
    assert F.linear is LINEAR
    pairs = [(p, q) for p, q in zip(module.parameters(), alone.parameters(), strict=True) if p.requires_grad]
    for i in range(B):
        y = alone(*(x[i : i + 1] for x in inputs))
        grads = torch.autograd.grad(y, [q for _, q in pairs], b[i : i + 1], allow_unused=True) if pairs else []
        for (p, _), g in zip(pairs, grads, strict=True):
            torch.testing.assert_close(found[p][i], torch.zeros_like(p) if g is None else g, rtol=1e-10, atol=1e-10)


def encoder(dropout: float = 0.0) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=dropout, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (5, 8)), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def steps(model: nn.Module, n: int = 2) -> list[Tensor]:
    records = TensorDataset(torch.randn(24, 40), torch.randn(24, 40))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, model, optimizer, loader = private(model, optimizer, records)
    for _, (x, y) in zip(range(n), loader, strict=False):
        optimizer.zero_grad()
        F.mse_loss(model(x).flatten(1), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_dropout_of_attention_weights_is_trained_with() -> None:
    model = encoder(0.3)
    before = [p.detach().clone() for p in model.parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(before, steps(model), strict=True))


def test_validate_names_the_rule() -> None:
    rules = {rule.type: rule.how for rule in fastdp.validate(encoder())}
    assert rules["MultiheadAttention"] == "norms from inputs and output gradients of its projections"


@pytest.mark.parametrize("options", [{"add_bias_kv": True}])
def test_what_it_has_no_rule_for_is_run_again(options: dict[str, Any]) -> None:
    rules = fastdp.validate(nn.MultiheadAttention(4, 2, **options))
    assert rules[0].how.startswith("run again record by record, with all in it, for in_proj_weight")


def test_linear_is_torchs_again_after_an_exception() -> None:
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    recorder = Recorder()
    watch.attach(module, recorder)
    with pytest.raises(Exception, match="mask"):
        module(*[torch.randn(2, 3, 4)] * 3, attn_mask=torch.ones(7, 7))
    assert F.linear is LINEAR
    assert all(p.requires_grad for p in module.parameters())


def test_a_call_without_records_is_refused() -> None:
    module = nn.MultiheadAttention(4, 2)
    recorder = Recorder()
    watch.attach(module, recorder)
    recorder.depth = 1
    module(*[torch.randn(3, 4)] * 3)[0].sum().backward()
    with pytest.raises(PrivacyError, match="the first dimension of its input is not the batch's records"):
        recorder.uses[0].parts(set(module.parameters()), B, torch.float32)


def test_another_thread_sees_torchs_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    module, other = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)
    recorder = Recorder()
    watch.attach(module, recorder)
    recorder.depth = 1
    seen: list[tuple[Tensor, Tensor]] = []

    def beside(x: Tensor) -> None:
        # With attention's own weight: on the attending thread this would be taken for a projection.
        y = F.linear(x, module.in_proj_weight)
        seen.append((y, F.linear(x, other.weight)))

    def during(*args: Any, **kwargs: Any) -> Tensor:
        thread = threading.Thread(target=beside, args=(torch.randn(3, B, 4),))
        thread.start()
        thread.join()
        return softmax(*args, **kwargs)

    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", during)  # in the middle of the call
    x = torch.randn(B, 3, 4)
    module(x, x, x)[0].sum().backward()
    assert len(seen) == 1 and len(recorder.uses) == 2


def test_attention_in_eval_mode_is_trained() -> None:
    """torch's fast path for inference, which an input without gradient would take, has no projections to be seen."""
    module = nn.Sequential(nn.Unflatten(1, (5, 8)), First(nn.MultiheadAttention(8, 2, batch_first=True))).eval()
    before = [p.detach().clone() for p in module.parameters()]
    assert all(not torch.equal(p, q) for p, q in zip(before[:1] + before[2:], after_steps(module), strict=True))
    assert torch.backends.mha.get_fastpath_enabled() and F.linear is LINEAR


class First(nn.Module):
    """Of what attention of x to itself returns."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def after_steps(module: nn.Module) -> list[Tensor]:
    found = steps(module)
    return found[:1] + found[2:]


def test_parameters_that_lie_in_one_storage_are_told_apart() -> None:
    module = nn.MultiheadAttention(2, 1, batch_first=True)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(module.parameters()), module.parameters())
    module.in_proj_weight.requires_grad_(False)
    alone, x = copy.deepcopy(module).double(), torch.randn(B, 3, 2)
    b = torch.randn(B, 3, 2)
    found, _ = seen(First(module), b, x)
    for i in range(B):
        y = alone(*[x[i : i + 1].double()] * 3)[0]
        want = torch.autograd.grad(y, [p for p in alone.parameters() if p.requires_grad], b[i : i + 1].double())
        for g, w in zip(found.values(), want, strict=True):
            torch.testing.assert_close(g[i].double(), w, rtol=1e-4, atol=1e-5)


def test_an_input_of_attention_changed_in_place_is_refused() -> None:
    module = nn.MultiheadAttention(4, 2, batch_first=True)
    recorder = Recorder()
    watch.attach(module, recorder)
    recorder.depth = 1
    x = torch.randn(B, 3, 4)
    y = module(x, x, x)[0].sum()
    x.mul_(2)
    with pytest.raises(PrivacyError, match="module: its input or output gradient was changed in place"):
        y.backward()


def test_one_position_whose_gradient_is_not_packed() -> None:
    bias, a = nn.Parameter(torch.zeros(3)), torch.randn(B, 1, 3)
    b = torch.randn(3, B).t().unsqueeze(1)  # [B, 1, 3], of which records lie next to each other
    norms = Norms(B, torch.float32)
    norms.add(products(None, (bias, 0, 3), a, b, {bias}))
    torch.testing.assert_close(norms.sq, b.double().square().sum((1, 2)))
